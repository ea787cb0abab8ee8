"""Checks sdkit on one GPU: `python -m tools.gpu_check first`, then `second`, each at most five minutes."""
