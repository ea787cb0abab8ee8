"""The parts of a run, each built from one spec and none knowing another."""
