"""The spec language: its classes, how specs are read and how they are checked.  Imports neither torch nor numpy."""
