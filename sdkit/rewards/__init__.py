"""Rewards: scores of completions."""
