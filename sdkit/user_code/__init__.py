"""Functions from a user's own Python file, checked before training."""
