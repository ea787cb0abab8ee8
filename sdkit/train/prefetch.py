"""Rollout batches sampled ahead of their turn, while earlier ones are trained on.

Batch t is sampled by the weights as they are before step max(0, t - max_staleness), exactly, whatever else the servers do
in between: so a run with look-ahead can be repeated, and resumed.  Batches of a checkpoint that wait for their turn are
written beside it (`ahead.jsonl`), each with its completions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from sdkit.batches import Completion
from sdkit.checkpoints.checkpoint import PREFETCHED
from sdkit.distributed import collectives
from sdkit.language.errors import UnreadableInput
from sdkit.runs.directory import read_lines
from sdkit.serving.rollouts import Job
from sdkit.train.collect_rollouts import sampling_params, sampling_requests

if TYPE_CHECKING:
    from sdkit.train.state import TrainState


@frozen(eq=False, kw_only=True)
class PrefetchedBatch:
    """A batch that has been sampled and waits for its turn.  All ranks have all of it."""

    version: int  # optimizer steps behind the weights that sampled it
    completions: Mapping[tuple[tuple[int, ...], int], Completion]  # by prompt and seed
    figures: Mapping[str, float]
    seconds: float


class RolloutPrefetcher:
    """The batches that are asked of the servers, or wait for their turn."""

    def __init__(self, batches: int) -> None:
        self.batches = batches  # how far sampling runs ahead
        self._asked: dict[int, Job] = {}
        self._waiting: dict[int, PrefetchedBatch] = {}

    def request(self, world: TrainState, step: int) -> None:
        """Ask for what is not yet asked for of batch `step` and those after it, of the weights as they are now."""
        for batch in range(step, min(step + self.batches + 1, world.end)):
            if batch not in self._asked and batch not in self._waiting:
                self._request(world, batch)

    def take(self, world: TrainState, step: int) -> PrefetchedBatch:
        """Batch `step`, which must have been asked for; waits for it."""
        self._wait_for(world, step)
        return self._waiting.pop(step)

    def wait(self, world: TrainState) -> None:
        """Wait for every batch that is asked for."""
        for batch in sorted(self._asked):
            self._wait_for(world, batch)

    def write(self, folder: Path) -> None:
        """What waits for its turn, to be taken up by `read`; everything must have been settled."""
        if collectives.rank() == 0:
            lines = [json.dumps(_record(batch, w)) + "\n" for batch, w in self._waiting.items()]
            (folder / PREFETCHED).write_text("".join(lines), encoding="utf-8")

    def read(self, folder: Path) -> None:
        """Take up what `write` left.  Raises UnreadableInput where it is not there."""
        if not (folder / PREFETCHED).is_file():
            raise UnreadableInput(
                f"{folder} has no {PREFETCHED}, which rollout.max_staleness needs"
            )
        self._waiting = {
            line["batch"]: _from_record(line) for line in read_lines(folder / PREFETCHED)
        }

    def _request(self, world: TrainState, batch: int) -> None:
        backend = world.servers()
        backend.retain_weights(world.student, world.optimizer_steps)
        requests = sampling_requests(world, world.data.batch_rows(batch), ("rollout", batch))
        self._asked[batch] = backend.submit(requests, sampling_params(world))

    def _wait_for(self, world: TrainState, batch: int) -> None:
        if (job := self._asked.get(batch)) is None:
            return
        sampled = world.servers().result(job)
        del self._asked[batch]
        keys = [(request.prompt_ids, request.seed) for request in job.requests]
        self._waiting[batch] = PrefetchedBatch(
            version=job.version,
            completions=dict(zip(keys, sampled.completions, strict=True)),
            figures=sampled.transfer_metrics,
            seconds=sampled.seconds,
        )


def _record(batch: int, waiting: PrefetchedBatch) -> dict[str, Any]:
    return {
        "batch": batch,
        "policy_version": waiting.version,
        "figures": waiting.figures,
        "seconds": waiting.seconds,
        "completions": [
            {
                "seed": seed,
                "sampled_from_ids": prompt,
                "completion_ids": each.ids,
                "sampler_logprobs": each.logprobs,
                "finished": each.finished,
            }
            for (prompt, seed), each in waiting.completions.items()
        ],
    }


def _from_record(line: Mapping[str, Any]) -> PrefetchedBatch:
    completions = {
        (tuple(each["sampled_from_ids"]), each["seed"]): Completion(
            ids=tuple(each["completion_ids"]),
            logprobs=tuple(each["sampler_logprobs"]),
            finished=each["finished"],
        )
        for each in line["completions"]
    }
    return PrefetchedBatch(
        version=line["policy_version"],
        completions=completions,
        figures=line["figures"],
        seconds=line["seconds"],
    )
