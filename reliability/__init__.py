"""Promises of the project at full size: each module proves one and writes its record."""
