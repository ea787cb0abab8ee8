"""A reward that uses a module beside it."""

from wordlist import WORDS


def short(completion, row):
    return float(len(completion.split()) < len(WORDS))
