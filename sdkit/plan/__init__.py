"""What a run will do and cost, derived from a spec without loading anything heavy."""
