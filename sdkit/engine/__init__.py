"""The engine: questions and their order, never methods."""
