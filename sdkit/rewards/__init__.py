"""Scores of completions."""
