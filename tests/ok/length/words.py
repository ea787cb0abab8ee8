"""A reward that uses a module beside it."""

from wordlist import WORDS


def plain(completion, row):
    return float(not set(completion.split()) & WORDS)
