"""Scores a model on tasks and measures what that costs."""
