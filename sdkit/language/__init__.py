"""The spec language: classes, reading, checking.  Imports neither torch nor numpy."""
