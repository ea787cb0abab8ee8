"""Mathematical equality: math-verify in worker processes.  Knows nothing of tokens or groups."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from sdkit.batches import Row
from sdkit.language.errors import BadData, BadEnvironment, shorten
from sdkit.language.specs import MathVerifyReward
from sdkit.processes import WorkerPool
from sdkit.rewards.answers import extract, right_text
from sdkit.rewards.scorer import ScoredCompletion, Scorer, score_in_threads

WORKER = Path(__file__).with_name("math_worker.py")
MAX_WORKERS = min(4, os.cpu_count() or 1)


def math_verify(reward: MathVerifyReward) -> Scorer:
    """Scores 1 if the answer equals the column's, else 0; also 0 if the comparison takes too long.

    Raises BadEnvironment without the package; the scorer raises BadData if a right answer cannot be parsed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise BadEnvironment(
            "rewards of kind math_verify need a package that is missing: math-verify", hint="pip install 'sdkit[math]'"
        )
    workers = WorkerPool(_start)

    def score(completion: str, row: Row) -> ScoredCompletion:
        right = right_text(row, reward.answer).strip()
        answer = extract(reward.extract, completion)
        if answer is None:
            return ScoredCompletion(reward=0.0)
        try:
            equal = _compare(workers, right, answer, reward.seconds)
        except TimeoutError:
            message = f"The answer could not be compared within {reward.seconds:g} s."
            return ScoredCompletion(reward=0.0, feedback=message)
        if equal is None:
            value = f"{shorten(right)} in the column '{reward.answer}'"
            raise BadData(f"row {row.index}: {value} is nothing that math-verify can read")
        return ScoredCompletion(reward=float(equal))

    score_all = functools.partial(score_in_threads, score, threads=MAX_WORKERS)
    return Scorer(score_all, check_row=lambda row: right_text(row, reward.answer))


def _compare(workers: WorkerPool[str], right: str, answer: str, seconds: float) -> bool | None:
    """Returns whether they are equal; None if the right answer cannot be parsed.

    Raises TimeoutError if the comparison takes too long or too much memory.
    """
    job = {"right": right, "answer": answer, "seconds": seconds}
    with workers.worker() as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
            raise TimeoutError
        return json.loads(line)


def _start() -> subprocess.Popen[str]:
    worker = subprocess.Popen(
        [sys.executable, "-P", str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C must reach only the trainer, which finishes its step
    )
    assert worker.stdout is not None
    if worker.stdout.readline() != "ready\n":
        worker.kill()
        raise BadEnvironment("math-verify cannot be loaded", hint="try: python -c 'import math_verify'")
    return worker
