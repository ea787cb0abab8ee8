"""Prefetches rollout batches from the servers while earlier batches are trained on.

Batch t is sampled with exactly the weights before step max(0, t - max_staleness), whatever else the servers do meanwhile,
so a run with prefetching can be repeated and resumed.  All turns of a trajectory are sampled with these weights; the first
rank's thread asks the environment.  A checkpoint includes the batches that are sampled but not yet trained on, with their
completions (`ahead.jsonl`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attrs import frozen

from sdkit.batches import Completion, Row, SamplingParams, SamplingRequest
from sdkit.checkpoints.checkpoint import PREFETCHED
from sdkit.distributed import collectives
from sdkit.environments.trajectories import TrajectorySampler
from sdkit.language.errors import UnreadableInput
from sdkit.language.schedules import at_step
from sdkit.runs.directory import read_lines
from sdkit.sampling.replay import completion_from, completion_record
from sdkit.serving.rollouts import Job, LoadedServers
from sdkit.train.models import Models
from sdkit.train.rollout_backends import RolloutBackends
from sdkit.train.sampling_requests import rows_by_seed, sampling_params, sampling_requests
from sdkit.train.setup import RunSetup
from sdkit.train.trajectories import sample_on_servers, trajectory_sampler


@frozen(eq=False, kw_only=True)
class PrefetchedBatch:
    """A batch that is sampled and not yet trained on.  Every rank has all of it."""

    version: int  # policy version that sampled it: its number of optimizer steps
    completions: Mapping[tuple[tuple[int, ...], int], Completion]  # by prompt and seed
    figures: Mapping[str, float]
    seconds: float


class RolloutPrefetcher:
    """Requests rollout batches from the servers, and keeps them until their step."""

    def __init__(self, setup: RunSetup, models: Models, backends: RolloutBackends) -> None:
        self.setup = setup
        self.models = models
        self.backends = backends
        self._jobs: dict[int, Job] = {}
        self._sampled: dict[int, PrefetchedBatch] = {}

    def request(self, step: int, version: int) -> None:
        """Request batch `step` and those to prefetch after it, if not yet requested, with the current weights.

        `version` is the policy version of these weights.
        """
        last = step + self.setup.spec.rollout.max_staleness
        for batch in range(step, min(last + 1, self.setup.end)):
            if batch not in self._jobs and batch not in self._sampled:
                self._request(batch, version)

    def take(self, step: int) -> PrefetchedBatch:
        """Wait for batch `step`, which must have been requested, and return it."""
        self._wait_for(step)
        return self._sampled.pop(step)

    def wait(self) -> None:
        """Wait for every requested batch."""
        for batch in sorted(self._jobs):
            self._wait_for(batch)

    def write(self, folder: Path) -> None:
        """Write the sampled batches for `read`.  Call `wait` first."""
        if collectives.rank() == 0:
            lines = [json.dumps(_record(n, batch)) + "\n" for n, batch in self._sampled.items()]
            (folder / PREFETCHED).write_text("".join(lines), encoding="utf-8")

    def read(self, folder: Path) -> None:
        """Read the batches that `write` wrote.  Raises UnreadableInput if the file is missing."""
        if not (folder / PREFETCHED).is_file():
            raise UnreadableInput(f"{folder} has no {PREFETCHED}, which rollout.max_staleness needs")
        self._sampled = {line["batch"]: _from_record(line) for line in read_lines(folder / PREFETCHED)}

    def _request(self, batch: int, version: int) -> None:
        servers, data = self.backends.servers(), self.setup.data
        servers.retain_weights(self.models.student, version)
        rows, stream = data.batch_rows(batch), ("rollout", batch)
        sampling = sampling_params(data.spec.rollout, self.models.ids_below)
        start = at_step(data.spec.rollout, version).starts_with
        trajectories = trajectory_sampler(self.setup, self.models, sampling, None, all_ranks=True, starts_with=start)
        sample = trajectories and partial(_sample_trajectories, trajectories, rows_by_seed(data, rows, stream))
        self._jobs[batch] = servers.submit(sampling_requests(data, rows, stream), sampling, sample=sample)

    def _wait_for(self, batch: int) -> None:
        if (job := self._jobs.get(batch)) is None:
            return
        sampled = self.backends.servers().result(job)
        del self._jobs[batch]
        keys = [(request.prompt_ids, request.seed) for request in job.requests]
        self._sampled[batch] = PrefetchedBatch(
            version=job.version,
            completions=dict(zip(keys, sampled.completions, strict=True)),
            figures=sampled.transfer_metrics,
            seconds=sampled.seconds,
        )


def _sample_trajectories(
    sampler: TrajectorySampler,
    rows: Mapping[int, Row],
    servers: LoadedServers,
    requests: Sequence[SamplingRequest],
    sampling: SamplingParams,
) -> list[Completion]:
    """Return the trajectories of all ranks' requests; `rows` by the seed of the request."""
    return sample_on_servers(sampler, [rows[request.seed] for request in requests], servers, requests, sampling)


def _record(number: int, batch: PrefetchedBatch) -> dict[str, Any]:
    return {
        "batch": number,
        "policy_version": batch.version,
        "figures": batch.figures,
        "seconds": batch.seconds,
        "completions": [
            {"seed": seed, "sampled_from_ids": prompt, **completion_record(completion)}
            for (prompt, seed), completion in batch.completions.items()
        ],
    }


def _from_record(line: Mapping[str, Any]) -> PrefetchedBatch:
    completions = {
        (tuple(record["sampled_from_ids"]), record["seed"]): completion_from(record) for record in line["completions"]
    }
    return PrefetchedBatch(
        version=line["policy_version"], completions=completions, figures=line["figures"], seconds=line["seconds"]
    )
