"""The sandbox of tested programs, run as `python FOLDER`: the standard library alone, for its walls close behind it."""
