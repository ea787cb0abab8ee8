"""The collectives of a single rank."""


def all_gather(values):
    """All values, and the slice of them that is this rank's."""
    return values, slice(0, len(values))
