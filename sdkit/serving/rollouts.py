"""Rollouts from servers, for all ranks: the first alone talks to them, from one thread, job by job.

Jobs are done in the order in which they are given.  Each names its own weight file, so what a server has loaded is never
a question of who came last.  The other ranks hear from the first every few seconds while a job is awaited.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar, cast

from attrs import define, frozen

from sdkit.batches import Completion, SamplingParams, SamplingRequest
from sdkit.distributed import collectives
from sdkit.language.errors import ProcessDied, SdkitError
from sdkit.models.weights import Weights
from sdkit.sampling.canary import Canary
from sdkit.serving.pool import ServerPool
from sdkit.serving.weight_files import WeightFile

T = TypeVar("T")
PULSE = 10.0
"""Seconds between two words of the first rank to the others."""
LEAVE = 10.0
"""Seconds that the thread has to leave what it does, once the run ends."""


@frozen(eq=False, kw_only=True)
class SampledBatch:
    """What a job brought."""

    completions: tuple[Completion, ...]  # of all ranks' requests, rank after rank
    figures: Mapping[str, float]  # of the transfer
    seconds: float


@define(eq=False)
class Job:
    """Completions asked of the servers."""

    requests: tuple[SamplingRequest, ...]  # of all ranks, rank after rank
    own: slice  # this rank's
    version: int  # of the weights that sample
    file: WeightFile | None  # on the first rank alone, and so the future
    future: Future[SampledBatch] | None


class ServerRollouts:
    """The rollout backend of a run with servers.  `pool` is the first rank's alone."""

    name = "vllm_server"

    def __init__(self, pool: ServerPool | None, canary: Canary, end_ids: tuple[int, ...]) -> None:
        self.pool = pool
        self.canary = canary
        self._thread = _Thread() if pool else None
        if pool:
            pool.begin(canary, end_ids)
        self._newest: tuple[int, int] | None = None  # weights and version that were written last
        self._files: list[WeightFile] = []  # oldest first
        self._jobs: list[Job] = []

    def load(self, weights: Weights, version: int) -> Mapping[str, float]:
        """Write the weights to a file and have every server take it; returns the figures of the transfer.

        Raises NumericsGuard where a server's canary is another, ProcessDied where none answers.
        """
        started = time.perf_counter()
        self.retain_weights(weights, version)
        future: Future[dict[str, float]] | None = None
        if self.pool and self._thread:
            pool, file = self.pool, self._files[-1]
            future = self._thread.give(lambda: pool.load(file))
        return {**self._awaited(future), "sync_seconds": time.perf_counter() - started}

    def sample(
        self, requests: Sequence[SamplingRequest], sampling: SamplingParams
    ) -> list[Completion]:
        job = self.submit(requests, sampling)
        return list(self.result(job).completions[job.own])

    def retain_weights(self, weights: Weights, version: int) -> None:
        """Write these weights to a file, unless the newest holds them; what is asked from now on is asked of them."""
        if self._newest == (id(weights), version):
            return
        self._newest = None
        here = self.canary.told_by(weights)
        if self.pool:
            self._files.append(self.pool.wanted.folder.write(weights, version, here))
            self._forget()
        else:
            for _ in weights.named_tensors():  # under stage 3 all ranks put the tensors together
                pass
        self._newest = id(weights), version

    def submit(self, requests: Sequence[SamplingRequest], sampling: SamplingParams) -> Job:
        """Give every rank's requests to the thread, to be sampled by the weights kept last."""
        assert self._newest is not None, "ask before keep"
        parts = collectives.all_gather_object(tuple(requests))
        begin = sum(map(len, parts[: collectives.rank()]))
        everyone = tuple(request for part in parts for request in part)
        job = Job(everyone, slice(begin, begin + len(requests)), self._newest[1], None, None)
        if self.pool and self._thread:
            job.file = file = self._files[-1]
            pool = self.pool
            job.future = self._thread.give(lambda: _work(pool, file, everyone, sampling))
            self._jobs.append(job)
        return job

    def result(self, job: Job) -> SampledBatch:
        """What a job brings, as soon as it is done.  Raises as `load` does."""
        sampled = self._awaited(job.future)
        self._forget()
        return sampled

    def close(self) -> None:
        """Leave the servers, and remove the weight files."""
        if self.pool and self._thread:
            self.pool.abort()
            self._thread.end(self.pool.close)

    def _awaited(self, future: Future[T] | None) -> T:
        """The result that the first rank's thread has, on every rank; so is a failure.

        What the thread waits for has deadlines of its own (`ServerPool`), so this waits as long as it lives.
        """
        over = False
        while not over:
            if future is not None:
                concurrent.futures.wait([future], timeout=PULSE)
            over = collectives.broadcast_object(future is not None and future.done())
        error = future.exception() if future is not None else None
        result = future.result() if future is not None and error is None else None
        told = error if error is None or isinstance(error, SdkitError) else ProcessDied(str(error))
        result, told = collectives.broadcast_object((result, told))
        if told is not None:
            raise error or told  # what is no message has its traceback where it happened
        return cast(T, result)

    def _forget(self) -> None:
        """Remove the files that nothing will be sampled from."""
        self._jobs = [job for job in self._jobs if job.future and not job.future.done()]
        needed = [*self._files[-1:], *(job.file for job in self._jobs)]
        for file in [f for f in self._files if f not in needed]:
            with contextlib.suppress(OSError):
                file.path.unlink(missing_ok=True)
            self._files.remove(file)


def _work(
    pool: ServerPool,
    file: WeightFile,
    requests: Sequence[SamplingRequest],
    sampling: SamplingParams,
) -> SampledBatch:
    """In the thread: everything that a job is."""
    started = time.perf_counter()
    figures = pool.load(file)
    done = pool.sample(file, requests, sampling)
    seconds = time.perf_counter() - started
    return SampledBatch(completions=tuple(done), figures=figures, seconds=seconds)


class _Thread:
    """Does one thing after the other, apart from the main thread."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], object], Future[object]] | None]
        self._work = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="rollout servers", daemon=True)
        self._thread.start()

    def give(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._work.put((work, future))  # pyright: ignore[reportArgumentType]
        return future

    def end(self, last: Callable[[], None]) -> None:
        """Do this as the last thing; waits a while for it."""
        self.give(last)
        self._work.put(None)
        self._thread.join(LEAVE)

    def _run(self) -> None:
        while (given := self._work.get()) is not None:
            work, future = given
            try:
                future.set_result(work())
            except BaseException as error:  # whoever waits for it is told
                future.set_exception(error)
