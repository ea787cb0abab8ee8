"""The mathematics: tensors in, tensors out.  No state, no logging, no ranks."""
