"""Compares mathematics for `math.py`: one line of JSON in, one out.  A script, never imported.

It is a separate process because a power tower can block the interpreter forever.  The watchdog of faulthandler is a C
thread, which can end the process at any time.
"""

import faulthandler
import json
import logging
import resource
import sys

from math_verify import parse, verify

MEMORY = 4 * 2**30


def _parse(text):
    return parse(text, parsing_timeout=0)


def compare(right, answer):
    """Returns whether they are equal; None if the right answer cannot be parsed."""
    written = right if "$" in right or "\\boxed" in right else f"\\boxed{{{right}}}"
    gold = _parse(written)
    if not gold:
        return None
    return bool(verify(gold, _parse(answer), timeout_seconds=None))


def main():
    logging.disable(logging.CRITICAL)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    print("ready", flush=True)
    with open("/dev/null", "w") as devnull:
        for line in sys.stdin:
            job = json.loads(line)
            faulthandler.dump_traceback_later(job["seconds"], exit=True, file=devnull)
            try:
                equal = compare(job["right"], job["answer"])
            except Exception:  # an answer that makes the comparison fail is wrong
                equal = False
            finally:
                faulthandler.cancel_dump_traceback_later()
            print(json.dumps(equal), flush=True)


if __name__ == "__main__":
    main()
