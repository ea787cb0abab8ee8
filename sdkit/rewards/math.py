"""Mathematical equality, by the package math-verify in processes of its own.  Knows nothing of tokens or groups."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdkit.batches import Row
from sdkit.language.errors import BadData, BadEnvironment, shorten
from sdkit.language.specs import MathVerifyReward
from sdkit.rewards.answers import extract, right_text
from sdkit.rewards.scorer import Pair, ScoredCompletion, Scorer, score_in_threads

WORKER = Path(__file__).with_name("math_worker.py")
AT_ONCE = min(4, os.cpu_count() or 1)


def math_verify(reward: MathVerifyReward) -> Scorer:
    """1 where the answer equals the column's, else 0; 0 too where the comparison takes too long.

    Raises BadEnvironment without the package; the scorer raises BadData where a right answer is no mathematics.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise BadEnvironment(
            "rewards of kind math_verify need a package that is missing: math-verify",
            hint="pip install 'sdkit[math]'",
        )
    workers = WorkerPool()

    def judge(completion: str, row: Row) -> ScoredCompletion:
        right = right_text(row, reward.answer).strip()
        answer = extract(reward.extract, completion)
        if answer is None:
            return ScoredCompletion(reward=0.0)
        try:
            equal = workers.compare(right, answer, reward.seconds)
        except TimeoutError:
            late = f"The answer could not be compared within {reward.seconds:g} s."
            return ScoredCompletion(reward=0.0, feedback=late)
        if equal is None:
            what = f"{shorten(right)} in the column '{reward.answer}'"
            raise BadData(f"row {row.index}: {what} is nothing that math-verify can read")
        return ScoredCompletion(reward=float(equal))

    def many(pairs: Sequence[Pair]) -> list[ScoredCompletion]:
        return score_in_threads(judge, pairs, threads=AT_ONCE, seconds=None)

    return Scorer(many, check_row=lambda row: right_text(row, reward.answer))


class WorkerPool:
    """Processes that compare, started when first needed.  They end when this process does: their input closes."""

    def __init__(self) -> None:
        self._idle: queue.LifoQueue[subprocess.Popen[str]] = queue.LifoQueue()

    def compare(self, right: str, answer: str, seconds: float) -> bool | None:
        """Whether they are equal; None where the right answer cannot be read.

        Raises TimeoutError where that takes too long or too much memory.
        """
        job = {"right": right, "answer": answer, "seconds": seconds}
        with self._worker() as worker:
            assert worker.stdin is not None
            assert worker.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.write(json.dumps(job) + "\n")
                worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                raise TimeoutError
            return json.loads(line)

    @contextlib.contextmanager
    def _worker(self) -> Iterator[subprocess.Popen[str]]:
        """A worker of one's own; one that died is not given back."""
        worker = None
        while worker is None or worker.poll() is not None:
            try:
                worker = self._idle.get_nowait()
            except queue.Empty:
                worker = _start()
        try:
            yield worker
        except BaseException:
            worker.kill()
            worker.communicate()
            raise
        self._idle.put(worker)


def _start() -> subprocess.Popen[str]:
    worker = subprocess.Popen(
        [sys.executable, "-P", str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is for the trainer, which finishes its step
    )
    assert worker.stdout is not None
    if worker.stdout.readline() != "ready\n":
        worker.kill()
        raise BadEnvironment(
            "math-verify cannot be loaded", hint="try: python -c 'import math_verify'"
        )
    return worker
