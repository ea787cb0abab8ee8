"""Messages through pipes, each after its length: a reader takes no byte of the next one.  Part of `__main__`."""

import json
import os

_LENGTH = 8


def receive(source):
    """The next message.  Raises EOFError where there is none."""
    return json.loads(_exactly(source, int.from_bytes(_exactly(source, _LENGTH), "big")))


def send(target, message):
    """Write one message."""
    text = json.dumps(message).encode()
    rest = memoryview(len(text).to_bytes(_LENGTH, "big") + text)
    while rest:
        rest = rest[os.write(target, rest) :]


def _exactly(source, length):
    parts = []
    while length:
        part = os.read(source, min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
