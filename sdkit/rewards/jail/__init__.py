"""The jail of tested programs, run as `python FOLDER`.  Uses only the standard library: nothing else is visible inside."""
