"""The requests that sample the completions of some rows: prompts, seeds and sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence

from sdkit.batches import Row, SamplingParams, SamplingRequest
from sdkit.distributed import collectives
from sdkit.language.specs import RolloutSpec, TeacherSamples
from sdkit.seeds import derive
from sdkit.train.inputs import RunData

Stream = Sequence[str | int]
"""The name of a stream of seeds, such as "rollout" and the number of the rollout batch."""


def sampling_params(rollout: RolloutSpec, ids_below: int | None) -> SamplingParams:
    """Return the sampling parameters of rollouts; only ids below `ids_below` are sampled, if it is given."""
    return SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_new_tokens=rollout.max_new_tokens,
        stop=rollout.stop,
        ids_below=ids_below,
    )


def group_numbers(rows: int, group_size: int) -> list[int]:
    """Return the group of each of this rank's rollouts; groups are numbered by row over all ranks."""
    return [group for group in collectives.shard_indices(rows) for _ in range(group_size)]


def sampling_requests(
    data: RunData, rows: Sequence[Row], stream: Stream, suite: str | None = None
) -> tuple[SamplingRequest, ...]:
    """Return the sampling requests of this rank's rows, one group of requests per row; `suite`: of held-out rows.

    Seeds depend on the number of the group, so any number of ranks samples the same.
    """
    rollout, seed = data.spec.rollout, data.spec.training.seed
    return tuple(
        SamplingRequest(
            prompt_ids=_sampling_prompt(data, rows[group]),
            seed=derive(seed, *stream, group, copy),
            environment_seed=derive(seed, *stream, group, "environment")
            if suite is None
            else held_out_environment(seed, suite, rows[group]),
        )
        for group in collectives.shard_indices(len(rows))
        for copy in range(rollout.completions_per_prompt)
    )


def held_out_environment(seed: int, suite: str, row: Row) -> int:
    """Return the seed of the environment of a held-out row, the same in every evaluation."""
    return derive(seed, "evaluation", suite, row.index, "environment")


def _sampling_prompt(data: RunData, row: Row) -> tuple[int, ...]:
    sampled_by = data.spec.rollout.sampled_by
    if isinstance(sampled_by, TeacherSamples) and sampled_by.prompt == "teacher":
        return data.teacher_ids(row) or data.student_ids(row)
    return data.student_ids(row)
