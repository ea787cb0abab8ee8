"""Compares mathematics for `rewards_math`, a line of JSON in and out.  A script, never imported.

A process of its own because a power tower can hold the interpreter for good: the watchdog of faulthandler is a thread
of C, which ends the process whatever it is doing.
"""

import faulthandler
import json
import logging
import resource
import sys

from math_verify import parse, verify

MEMORY = 4 * 2**30


def expressions(text):
    return parse(text, parsing_timeout=0)


def compared(right, answer):
    """Whether they are equal; None where the right answer is no mathematics."""
    written = right if "$" in right or "\\boxed" in right else f"\\boxed{{{right}}}"
    gold = expressions(written)
    if not gold:
        return None
    return bool(verify(gold, expressions(answer), timeout_seconds=None))


def main():
    logging.disable(logging.CRITICAL)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    print("ready", flush=True)
    with open("/dev/null", "w") as nowhere:
        for line in sys.stdin:
            job = json.loads(line)
            faulthandler.dump_traceback_later(job["seconds"], exit=True, file=nowhere)
            try:
                equal = compared(job["right"], job["answer"])
            except Exception:  # an answer on which the comparison breaks is wrong
                equal = False
            finally:
                faulthandler.cancel_dump_traceback_later()
            print(json.dumps(equal), flush=True)


if __name__ == "__main__":
    main()
