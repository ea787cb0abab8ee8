"""Checkpoints: writing, resuming and converting them."""
