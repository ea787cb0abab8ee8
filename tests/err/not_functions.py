"""Names that are no functions of this file."""

from json import dumps

short = dumps


async def late(completion, row):
    return 1.0


class Score:
    pass
