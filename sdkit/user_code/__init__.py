"""User-defined functions from a Python file, checked before training."""
