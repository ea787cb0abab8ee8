"""Rollouts from servers, for all ranks.  Only rank 0 talks to the servers, from one worker thread, one job at a time.

Jobs run in the order of submission.  Each names its own weight file, so it never depends on the job before it.  While
the ranks wait for a job, rank 0 sends the others a heartbeat every few seconds.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar, cast

from attrs import frozen

from sdkit.batches import Completion, SamplingParams, SamplingRequest
from sdkit.distributed import collectives
from sdkit.language.errors import ProcessDied, SdkitError
from sdkit.models.weights import Weights
from sdkit.processes import DaemonThreads
from sdkit.sampling.canary import Canary
from sdkit.serving.pool import Player, ServerPool
from sdkit.serving.weight_files import WeightFile
from sdkit.stdout import Advance, no_progress

T = TypeVar("T")
HEARTBEAT_SECONDS = 10.0
"""Seconds between two heartbeats of rank 0, far below the timeout of a collective."""
SHUTDOWN_SECONDS = 10.0
"""Seconds that the worker thread has to stop once the run ends."""


@frozen(eq=False, kw_only=True)
class SampledBatch:
    """The result of a job."""

    completions: tuple[Completion, ...]  # for the requests of all ranks, in rank order
    transfer_metrics: Mapping[str, float]  # of the weight transfer
    seconds: float


@frozen(eq=False)
class LoadedServers:
    """The servers with the weights of one file, which no other replaces during a batch."""

    pool: ServerPool
    file: WeightFile
    advance: Advance

    def sample(self, requests: Sequence[SamplingRequest], sampling: SamplingParams) -> list[Completion]:
        """Return one completion per request, in order."""
        return self.pool.sample(self.file, requests, sampling, self.advance)

    def play(self, requests: Sequence[SamplingRequest], sampling: SamplingParams, players: Sequence[Player]) -> None:
        """Run the players of trajectories at the same time, as `ServerPool.play` does."""
        self.pool.play(self.file, requests, sampling, players)


SampleBatch = Callable[[LoadedServers, Sequence[SamplingRequest], SamplingParams], Sequence[Completion]]
"""Samples the completions of a batch from servers."""


@frozen(eq=False)
class Job:
    """A batch of requests submitted to the servers."""

    requests: tuple[SamplingRequest, ...]  # of all ranks, in rank order
    own: slice  # this rank's part
    version: int  # of the weights to sample with
    file: WeightFile | None  # on rank 0 only, as is `future`
    future: Future[SampledBatch] | None


class ServerRollouts:
    """The rollout backend of a run with servers.  Only rank 0 has a `pool`."""

    name = "vllm_server"

    def __init__(self, pool: ServerPool | None, canary: Canary, end_ids: tuple[int, ...], vocabulary: int) -> None:
        self.pool = pool
        self.canary = canary
        self._thread = DaemonThreads(1, "rollout servers") if pool else None
        if pool:
            pool.set_model(canary, end_ids, vocabulary)
        self._newest_weights: tuple[int, int] | None = None  # id and version of the weights last written
        self._files: list[WeightFile] = []  # oldest first
        self._jobs: list[Job] = []

    def load(self, weights: Weights, version: int) -> Mapping[str, float]:
        """Write the weights to a file and load it on every server; returns the metrics of the transfer.

        Raises NumericsGuard if a server fails the canary, ProcessDied if none answers.
        """
        started = time.perf_counter()
        self.retain_weights(weights, version)
        future: Future[dict[str, float]] | None = None
        if self.pool and self._thread:
            pool, file = self.pool, self._files[-1]
            future = self._thread.submit(lambda: pool.load(file))
        return {**self._broadcast_result(future), "sync_seconds": time.perf_counter() - started}

    def sample(
        self,
        requests: Sequence[SamplingRequest],
        sampling: SamplingParams,
        advance: Advance = no_progress,
        *,
        sample: SampleBatch | None = None,
    ) -> list[Completion]:
        """Return one completion per request, in order; `sample` as in `submit`."""
        job = self.submit(requests, sampling, advance, sample=sample)
        return list(self.result(job).completions[job.own])

    def retain_weights(self, weights: Weights, version: int) -> None:
        """Write these weights to a file unless the newest file holds them; jobs submitted from now on sample with them."""
        if self._newest_weights == (id(weights), version):
            return
        self._newest_weights = None
        trainer_logprobs = self.canary.logprobs(weights)
        if self.pool:
            self._files.append(self.pool.expected.folder.write(weights, version, trainer_logprobs))
            self._remove_unused_files()
        else:
            for _ in weights.named_tensors():  # under ZeRO stage 3 all ranks take part in the gather
                pass
        self._newest_weights = id(weights), version

    def submit(
        self,
        requests: Sequence[SamplingRequest],
        sampling: SamplingParams,
        advance: Advance = no_progress,
        *,
        sample: SampleBatch | None = None,
    ) -> Job:
        """Submit the requests of all ranks, to be sampled by the weights last passed to `retain_weights`.

        `advance` receives this rank's share of each completion.  `sample` runs in the worker thread, asks the servers more
        than once, and returns the completions.
        """
        assert self._newest_weights is not None, "call retain_weights before submit"
        parts = collectives.all_gather_object(tuple(requests))
        begin = sum(map(len, parts[: collectives.rank()]))
        all_requests = tuple(request for part in parts for request in part)
        own = slice(begin, begin + len(requests))
        file = future = None
        if self.pool and self._thread:
            file = self._files[-1]
            share = len(requests) / max(len(all_requests), 1)
            servers = LoadedServers(self.pool, file, lambda number: advance(number * share))
            ask = sample or LoadedServers.sample
            future = self._thread.submit(
                lambda: _load_and_sample(servers, lambda: ask(servers, all_requests, sampling))
            )
        job = Job(all_requests, own, self._newest_weights[1], file, future)
        if future:
            self._jobs.append(job)
        return job

    def result(self, job: Job) -> SampledBatch:
        """Wait for a job and return its result.  Raises as `load` does."""
        sampled = self._broadcast_result(job.future)
        self._remove_unused_files()
        return sampled

    def close(self) -> None:
        """Stop the worker thread, close the connections and remove the weight files."""
        if self.pool and self._thread:
            self.pool.abort()
            self._thread.submit(self.pool.close)
            self._thread.end(SHUTDOWN_SECONDS)

    def _broadcast_result(self, future: Future[T] | None) -> T:
        """Returns the worker thread's result on every rank, or raises its error on every rank.

        Waits without a limit of its own: the thread's requests have deadlines (`ServerPool`).
        """
        is_done = False
        while not is_done:
            if future is not None:
                concurrent.futures.wait([future], timeout=HEARTBEAT_SECONDS)
            is_done = collectives.broadcast_object(future is not None and future.done())
        error = future.exception() if future is not None else None
        result = future.result() if future is not None and error is None else None
        shared = error if error is None or isinstance(error, SdkitError) else ProcessDied(str(error))
        result, shared = collectives.broadcast_object((result, shared))
        if shared is not None:
            raise error or shared  # rank 0 raises the original, with its traceback
        return cast(T, result)

    def _remove_unused_files(self) -> None:
        """Remove the weight files that no job needs any more."""
        self._jobs = [job for job in self._jobs if job.future and not job.future.done()]
        needed = [*self._files[-1:], *(job.file for job in self._jobs)]
        for file in [f for f in self._files if f not in needed]:
            with contextlib.suppress(OSError):
                file.path.unlink(missing_ok=True)
            self._files.remove(file)


def _load_and_sample(servers: LoadedServers, sample: Callable[[], Sequence[Completion]]) -> SampledBatch:
    started = time.perf_counter()
    metrics = servers.pool.load(servers.file)
    completions = tuple(sample())
    return SampledBatch(completions=completions, transfer_metrics=metrics, seconds=time.perf_counter() - started)
