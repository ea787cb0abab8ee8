"""How long `sdkit validate` takes for one file, as a ratio to an interpreter that does nothing.

Runs the two in turn, so that a machine whose speed drifts slows both; prints medians and the ratio of each pair.
"""

import os
import statistics
import subprocess
import sys
import time

RUNS = 15


def seconds(command: list[str]) -> float:
    # With bytecode, as on any machine that ran sdkit before.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    spec = sys.argv[1] if len(sys.argv) > 1 else "specs/sdft.yaml"
    empty = [sys.executable, "-c", "pass"]
    validate = [sys.executable, "-m", "sdkit", "validate", spec]
    seconds(validate)  # the first run compiles
    pairs = [(seconds(empty), seconds(validate)) for _ in range(RUNS)]
    ratios = [b / a for a, b in pairs]
    print(f"empty interpreter   {statistics.median(a for a, _ in pairs) * 1000:6.0f} ms")
    print(f"sdkit validate      {statistics.median(b for _, b in pairs) * 1000:6.0f} ms  ({spec})")
    print(f"ratio               {statistics.median(ratios):6.1f}     ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main()
