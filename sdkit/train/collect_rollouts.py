"""Prompts → rollouts: who samples, from which prompt, under which weights; what the teacher will see."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, assert_never

from attrs import field, frozen

from sdkit.batches import (
    Completion,
    GroupOutcome,
    Rollout,
    RolloutBatch,
    Row,
    SamplingParams,
    SamplingRequest,
)
from sdkit.distributed import collectives
from sdkit.language.specs import (
    DatasetSamples,
    MixtureSamples,
    ReplayBackend,
    StudentSamples,
    TeacherSamples,
)
from sdkit.models.weights import Weights
from sdkit.rewards.scoring import reward_values, score
from sdkit.seeds import derive
from sdkit.train.advantages import group_outcomes, with_advantages

if TYPE_CHECKING:
    from sdkit.train.state import TrainState


@frozen(eq=False, kw_only=True)
class CollectedRollouts:
    """Rollouts with what it took to get them."""

    batch: RolloutBatch
    requests: tuple[
        SamplingRequest, ...
    ]  # as sampled; the data set's own completions have requests too
    scores: Mapping[str, Sequence[float]]  # per reward: one number a rollout
    seconds: Mapping[str, float]
    figures: Mapping[str, float]  # of the weight transfer, and of who sampled


def sampling_params(world: TrainState) -> SamplingParams:
    """The sampling settings of rollouts."""
    r = world.spec.rollout
    return SamplingParams(
        temperature=r.temperature,
        top_p=r.top_p,
        top_k=r.top_k,
        max_new_tokens=r.max_new_tokens,
        stop=r.stop,
        ids_below=world.ids_below,
    )


def collect_rollouts(
    world: TrainState, rows: Sequence[Row], stream: Sequence[str | int], *, suite: str | None = None
) -> CollectedRollouts:
    """One group of rollouts per row, judged, with what the teacher will see of each; this rank's share of the rows.

    Groups are numbered by row over all ranks, and seeds follow the number, so more ranks sample the same.  `stream` names the seeds (such as "rollout" and the step); `suite` is given where the rows are held out.
    """
    started = time.perf_counter()
    size = world.spec.rollout.completions_per_prompt
    jobs = [
        (group, rows[group]) for group in collectives.shard_indices(len(rows)) for _ in range(size)
    ]
    requests = sampling_requests(world, rows, stream)
    by = resolve_sampler(world, stream, suite)
    if suite is None and world.prefetcher:
        drawn = _take_prefetched(world, requests, int(stream[-1]))
    else:
        drawn = _sample_completions(
            world, by, [row for _, row in jobs], requests, suite is not None
        )
    completions = drawn.completions
    transfer = dict(drawn.figures)
    if isinstance(world.spec.rollout.sampled_by, MixtureSamples):
        transfer["by_student"] = float(isinstance(by, StudentSamples))
    sync = transfer.pop("sync_seconds", 0.0)
    sampled = time.perf_counter()
    scorers = world.data.train_rewards if suite is None else world.data.rewards[suite]
    texts = [completion_text(world, c.ids) for c in completions]
    judged = score(scorers, texts, [row for _, row in jobs])
    answers = [world.data.answer(row, c.ids) for (_, row), c in zip(jobs, completions, strict=True)]
    seeds = [r.seed for r in requests]
    known = group_outcomes(judged.get(world.data.reward or ""), texts, answers, size, seeds)
    rollouts = [
        _make_rollout(world, row, group, completion, drawn.version, seen)
        for (group, row), completion, seen in zip(jobs, completions, known, strict=True)
    ]
    sampled_batch = RolloutBatch(rollouts=tuple(rollouts))
    longest = world.spec.rollout.max_new_tokens
    batch = with_advantages(world.losses, sampled_batch, collectives.all_gather, longest)
    batch.check()
    return CollectedRollouts(
        batch=batch,
        requests=requests,
        scores=reward_values(judged),
        seconds={
            "rollout": sampled - started - sync,
            "sync": sync,
            "judge": time.perf_counter() - sampled,
            **drawn.seconds,
        },
        figures=transfer,
    )


def resolve_sampler(
    world: TrainState, stream: Sequence[str | int], suite: str | None
) -> StudentSamples | TeacherSamples | DatasetSamples:
    """Who answers these prompts: of a mixture, what the batch's coin says; the student on held-out rows."""
    by = world.spec.rollout.sampled_by
    if not isinstance(by, MixtureSamples):
        return by
    coin = random.Random(derive(world.spec.training.seed, *stream, "coin")).random()
    if suite is not None or coin < world.scalar(by.student_share):
        return StudentSamples()
    return DatasetSamples(column=by.column)


@frozen(eq=False, kw_only=True)
class _SampledCompletions:
    """One completion per request, and where they came from."""

    completions: Sequence[Completion]
    version: int  # optimizer steps behind the weights that sampled
    figures: Mapping[str, float] = field(factory=dict)
    seconds: Mapping[str, float] = field(factory=dict)


def sampling_requests(
    world: TrainState, rows: Sequence[Row], stream: Sequence[str | int]
) -> tuple[SamplingRequest, ...]:
    """What is asked of the sampler for this rank's share of the rows: a group for each."""
    prompt = _sampling_prompt(world)
    size = world.spec.rollout.completions_per_prompt
    return tuple(
        SamplingRequest(
            prompt_ids=prompt(rows[group]),
            seed=derive(world.spec.training.seed, *stream, group, copy),
        )
        for group in collectives.shard_indices(len(rows))
        for copy in range(size)
    )


def _take_prefetched(
    world: TrainState, requests: Sequence[SamplingRequest], step: int
) -> _SampledCompletions:
    """What the servers have sampled for this step while earlier ones were trained on."""
    assert world.prefetcher is not None
    started = time.perf_counter()
    world.prefetcher.request(world, step)
    figures = {"sync_seconds": time.perf_counter() - started}
    found = world.prefetcher.take(world, step)
    figures |= {**found.figures, "staleness": float(world.optimizer_steps - found.version)}
    return _SampledCompletions(
        completions=[found.completions[r.prompt_ids, r.seed] for r in requests],
        version=found.version,
        figures=figures,
        seconds={"sampler": found.seconds},
    )


def _sample_completions(
    world: TrainState,
    sampled_by: StudentSamples | TeacherSamples | DatasetSamples,
    rows: Sequence[Row],
    requests: Sequence[SamplingRequest],
    evaluation: bool,
) -> _SampledCompletions:
    """One completion per request, now; `rows` are the requests' own."""
    if isinstance(world.plan.backend, ReplayBackend) and not evaluation:
        return _sample_from(world, world.student, requests)  # whoever sampled: the recording has it
    match sampled_by:
        case DatasetSamples(column=column):
            held = [dataset_completion(world, row, column) for row in rows]
            return _SampledCompletions(completions=held, version=world.optimizer_steps)
        case TeacherSamples(weights="teacher"):
            weights = world.teacher_weights
        case StudentSamples() | TeacherSamples():
            weights = world.student
        case _:
            assert_never(sampled_by)
    return _sample_from(world, weights, requests, evaluation=evaluation)


def _sample_from(
    world: TrainState,
    weights: Weights,
    requests: Sequence[SamplingRequest],
    *,
    evaluation: bool = False,
) -> _SampledCompletions:
    backend, figures = world.backend(weights, evaluation=evaluation)
    done = backend.sample(requests, sampling_params(world))
    return _SampledCompletions(completions=done, version=world.optimizer_steps, figures=figures)


def dataset_completion(world: TrainState, row: Row, column: str) -> Completion:
    """The data set's completion as token ids, with the token that ends a turn; cut at the longest completion."""
    ids = world.data.prompter.completion_ids(row.text(column) or "", world.end_ids[0])
    limit = world.spec.rollout.max_new_tokens
    return Completion(ids=ids[:limit], logprobs=None, finished=len(ids) <= limit)


def _sampling_prompt(world: TrainState) -> Any:
    sampled_by = world.spec.rollout.sampled_by
    if isinstance(sampled_by, TeacherSamples) and sampled_by.prompt == "teacher":
        return lambda row: world.data.teacher_ids(row) or world.data.student_ids(row)
    return world.data.student_ids


def _make_rollout(
    world: TrainState,
    row: Row,
    group: int,
    completion: Completion,
    version: int,
    seen: GroupOutcome | None,
) -> Rollout:
    if world.data.needs_rollouts_for_context:
        prompt = world.data.teacher_prompt(row, seen)
        teacher_ids, filled = (prompt.ids, prompt.filled) if prompt else (None, ())
    else:
        teacher_ids, filled = world.data.teacher_ids(row), ()
    return Rollout(
        row=row,
        group=group,
        prompt_ids=world.data.student_ids(row),
        teacher_prompt_ids=teacher_ids,
        teacher_route=world.data.teacher_route(row),
        completion_ids=completion.ids,
        sampler_logprobs=completion.logprobs,
        policy_version=version,
        finished=completion.finished,
        reward=None if seen is None else seen.group[seen.own].reward,
        filled_slots=filled,
        group_rewards=() if seen is None else tuple(a.reward for a in seen.group),
    )


def rollout_records(gathered: CollectedRollouts) -> list[dict[str, Any]]:
    """What the run directory keeps of each rollout: enough to train on it again."""
    return [
        {
            "row": r.row.index,
            "group": r.group,
            "seed": request.seed,
            "policy_version": r.policy_version,
            "sampled_from_ids": request.prompt_ids,
            "prompt_ids": r.prompt_ids,
            "teacher_prompt_ids": r.teacher_prompt_ids,
            "completion_ids": r.completion_ids,
            "sampler_logprobs": r.sampler_logprobs,
            "finished": r.finished,
            "reward": r.reward,
        }
        for r, request in zip(gathered.batch, gathered.requests, strict=True)
    ]


def sort_records(parts: Iterable[Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The records of all ranks as one rank would have them."""
    return sorted((record for part in parts for record in part), key=lambda record: record["group"])


def completion_text(world: TrainState, ids: Sequence[int]) -> str:
    """A completion as a verifier reads it: without special tokens."""
    return world.data.tokenizer.decode(ids, skip_special_tokens=True)


def sample_texts(
    world: TrainState, batch: RolloutBatch, scored: Mapping[str, Sequence[float]], count: int
) -> list[dict[str, Any]]:
    """A few rollouts as text: prompt, teacher prompt, completion, rewards."""
    decode = world.data.tokenizer.decode
    return [
        {
            "row": r.row.index,
            "prompt": decode(r.prompt_ids),
            "teacher_prompt": None
            if r.teacher_prompt_ids is None
            else decode(r.teacher_prompt_ids),
            "completion": decode(r.completion_ids),
            "finished": r.finished,
            "rewards": {name: values[i] for name, values in scored.items()},
        }
        for i, r in enumerate(list(batch)[:count])
    ]
