"""Dropout whose mask is a hash of a seed and the place of an entry: backward draws it again, and nothing is stored."""
