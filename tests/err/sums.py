def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: the first
    """
    return a + b


def reset() -> None:
    """Forgets everything."""
