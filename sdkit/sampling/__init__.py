"""Rollout backends that run in the trainer's process."""
