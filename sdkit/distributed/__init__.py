"""Collectives, the launcher and DeepSpeed ZeRO."""
