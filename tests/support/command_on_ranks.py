"""`python command_on_ranks.py COUNT LOG WORDS…`: `sdkit WORDS…` on several ranks, each a fork of this process.

Ends with the code of the first rank; writes what each rank wrote to standard error.  LOG names the ranks' own logs.
"""

import sys
from pathlib import Path

import forked

DEADLINE = 240.0  # seconds


def main(count, log, *words):
    def command():
        from sdkit import cli

        sys.argv = ["sdkit", *words]
        cli.main()

    forked.warm()
    results = forked.ranks(int(count), command, Path(log), deadline=DEADLINE)
    sys.stderr.writelines(each.output for each in results)
    sys.exit(results[0].code)


if __name__ == "__main__":
    main(*sys.argv[1:])
