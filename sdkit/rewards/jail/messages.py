"""Length-prefixed JSON messages through pipes; a reader never consumes bytes of the next one.  Part of `__main__`."""

import json
import os

_LENGTH = 8


def receive(source):
    """Returns the next message.  Raises EOFError at the end of the input."""
    return json.loads(_read_exactly(source, int.from_bytes(_read_exactly(source, _LENGTH), "big")))


def send(target, message):
    """Writes one message."""
    text = json.dumps(message).encode()
    remaining = memoryview(len(text).to_bytes(_LENGTH, "big") + text)
    while remaining:
        remaining = remaining[os.write(target, remaining) :]


def _read_exactly(source, length):
    parts = []
    while length:
        part = os.read(source, min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
