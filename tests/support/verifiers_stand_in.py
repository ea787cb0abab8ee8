"""Stands in for an interpreter that has verifiers: lists tasks, and plays them.  Imports nothing but the standard library.

Its taskset has the tasks "Guess 0.", "Guess 1.", …, as many as the setting `size` says; task i of the split `s` has the
secret `s`i.  The settings `fault` and `wait` make it fail.
"""

import itertools
import json
import os
import stat
import sys
import time
from pathlib import Path


def rows_of(config):
    if config.get("fault") == "raise":
        raise ValueError("no such split")
    if config.get("fault") == "exit":
        os._exit(3)
    time.sleep(config.get("wait", 0))
    split = config.get("split", "train")
    for i in itertools.count() if config.get("size") is None else range(config["size"]):
        prompt = f"Guess {i}."
        if config.get("system"):
            prompt = [{"role": "system", "content": config["system"]}, {"role": "user", "content": prompt}]
        yield {"prompt": prompt, "key": f"{split} {i}", "secret": f"{split}{i}", "answer": None if i else "x"}


class Episode:
    """What `verifiers_episode.py` has, without the package."""

    @classmethod
    def _prepare(cls, id, config, tasks):
        cls.tasks = {row["key"]: row for row in itertools.islice(rows_of(config), tasks)}

    def __init__(self, id, config, tasks):
        self.right = False

    def reset(self, task, shows_prompt):
        self.row = list(self.tasks.values())[task] if isinstance(task, int) else self.tasks[task]
        return "" if shows_prompt else self.row["prompt"]

    def reply(self, text):
        self.right = text == self.row["secret"]
        return None if self.right else "Wrong."

    def get_reward(self):
        return float(self.right)


def write_interpreter(folder):
    """Write the interpreter to a folder; returns its name there."""
    path = folder / "with_verifiers"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -P {__file__} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path.name


def main(option, program, *words):
    """Run a program of sdkit's as the interpreter would."""
    assert option == "-P"
    if Path(program).name == "worker.py":
        _, *rest = words
        os.execv(sys.executable, [sys.executable, "-P", program, __file__, *rest])
    _, config, limit = words
    try:
        for row in itertools.islice(rows_of(json.loads(config)), json.loads(limit)):
            print(json.dumps(row))
    except ValueError as error:
        print(json.dumps(f"ValueError: {error}"), end="")
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
