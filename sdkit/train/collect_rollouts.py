"""Collects rollouts: samples completions for prompts, scores them, and builds the teacher's prompts."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, assert_never

from attrs import field, frozen

from sdkit.batches import Completion, GroupOutcome, Rollout, RolloutBatch, Row, SamplingParams, SamplingRequest
from sdkit.distributed import collectives
from sdkit.language.specs import DatasetSamples, MixtureSamples, ReplayBackend, StudentSamples, TeacherSamples
from sdkit.models.weights import Weights
from sdkit.rewards.scoring import ScoredCompletion, reward_values, score
from sdkit.seeds import derive
from sdkit.train.advantages import group_outcomes, with_advantages

if TYPE_CHECKING:
    from sdkit.train.state import TrainState


@frozen(eq=False, kw_only=True)
class CollectedRollouts:
    """Rollouts, with their requests, scores, timings and metrics."""

    batch: RolloutBatch
    requests: tuple[SamplingRequest, ...]  # one a rollout, also for completions from the data set
    scores: Mapping[str, Sequence[float]]  # by reward: one score a rollout
    seconds: Mapping[str, float]
    figures: Mapping[str, float]  # of the weight transfer and of the sampler


def sampling_params(state: TrainState) -> SamplingParams:
    """Return the sampling parameters of rollouts."""
    r = state.spec.rollout
    return SamplingParams(
        temperature=r.temperature,
        top_p=r.top_p,
        top_k=r.top_k,
        max_new_tokens=r.max_new_tokens,
        stop=r.stop,
        ids_below=state.ids_below,
    )


def collect_rollouts(
    state: TrainState, rows: Sequence[Row], stream: Sequence[str | int], *, suite: str | None = None
) -> CollectedRollouts:
    """Sample, score and return one group of rollouts for each of this rank's rows.

    Groups are numbered by row over all ranks, and seeds depend on the number, so any number of ranks samples the same.
    `stream` names the seeds (such as "rollout" and the step).  `suite` is the evaluation suite of held-out rows, None for
    training rows.
    """
    started = time.perf_counter()
    group_size = state.spec.rollout.completions_per_prompt
    groups = [g for g in collectives.shard_indices(len(rows)) for _ in range(group_size)]
    own_rows = [rows[group] for group in groups]
    requests = sampling_requests(state, rows, stream)
    sampler = resolve_sampler(state, stream, suite)
    if suite is None and state.prefetcher:
        sampled = _take_prefetched(state, requests, int(stream[-1]))
    else:
        sampled = _sample_completions(state, sampler, own_rows, requests, suite is not None)
    metrics = dict(sampled.figures)
    if isinstance(state.spec.rollout.sampled_by, MixtureSamples):
        metrics["by_student"] = float(isinstance(sampler, StudentSamples))
    sync_seconds = metrics.pop("sync_seconds", 0.0)
    sampled_at = time.perf_counter()
    batch, scores = _score_completions(state, groups, own_rows, requests, sampled, suite)
    return CollectedRollouts(
        batch=batch,
        requests=requests,
        scores=reward_values(scores),
        seconds={
            "rollout": sampled_at - started - sync_seconds,
            "sync": sync_seconds,
            "judge": time.perf_counter() - sampled_at,
            **sampled.seconds,
        },
        figures=metrics,
    )


def _score_completions(
    state: TrainState,
    groups: Sequence[int],
    rows: Sequence[Row],
    requests: Sequence[SamplingRequest],
    sampled: _SampledCompletions,
    suite: str | None,
) -> tuple[RolloutBatch, dict[str, list[ScoredCompletion]]]:
    """Return the rollouts with rewards, advantages and teacher prompts, and the scores by reward."""
    completions = sampled.completions
    rewards = state.data.train_rewards if suite is None else state.data.rewards[suite]
    texts = [completion_text(state, c.ids) for c in completions]
    scores = score(rewards, texts, rows)
    answers = [state.data.answer(row, c.ids) for row, c in zip(rows, completions, strict=True)]
    spec = state.spec.rollout
    outcomes = group_outcomes(
        scores.get(state.data.reward or ""), texts, answers, spec.completions_per_prompt, [r.seed for r in requests]
    )
    rollouts = [
        _make_rollout(state, row, group, completion, sampled.version, outcome)
        for group, row, completion, outcome in zip(groups, rows, completions, outcomes, strict=True)
    ]
    batch = with_advantages(
        state.losses, RolloutBatch(rollouts=tuple(rollouts)), collectives.all_gather, spec.max_new_tokens
    )
    batch.check()
    return batch, scores


def resolve_sampler(
    state: TrainState, stream: Sequence[str | int], suite: str | None
) -> StudentSamples | TeacherSamples | DatasetSamples:
    """Return what answers these prompts.  A mixture draws one for the batch, and is the student for held-out rows."""
    sampled_by = state.spec.rollout.sampled_by
    if not isinstance(sampled_by, MixtureSamples):
        return sampled_by
    coin = random.Random(derive(state.spec.training.seed, *stream, "coin")).random()
    if suite is not None or coin < state.scalar(sampled_by.student_share):
        return StudentSamples()
    return DatasetSamples(column=sampled_by.column)


@frozen(eq=False, kw_only=True)
class _SampledCompletions:
    """One completion per request, with the version of the weights that sampled and metrics of the sampling."""

    completions: Sequence[Completion]
    version: int  # policy version that sampled: its number of optimizer steps
    figures: Mapping[str, float] = field(factory=dict)
    seconds: Mapping[str, float] = field(factory=dict)


def sampling_requests(
    state: TrainState, rows: Sequence[Row], stream: Sequence[str | int]
) -> tuple[SamplingRequest, ...]:
    """Return the sampling requests of this rank's rows, one group of requests per row."""
    prompt = _sampling_prompt(state)
    size = state.spec.rollout.completions_per_prompt
    return tuple(
        SamplingRequest(prompt_ids=prompt(rows[group]), seed=derive(state.spec.training.seed, *stream, group, copy))
        for group in collectives.shard_indices(len(rows))
        for copy in range(size)
    )


def _take_prefetched(state: TrainState, requests: Sequence[SamplingRequest], step: int) -> _SampledCompletions:
    """Return the completions that the servers sampled for this step while earlier steps were trained on."""
    assert state.prefetcher is not None
    started = time.perf_counter()
    state.prefetcher.request(state, step)
    figures = {"sync_seconds": time.perf_counter() - started}
    batch = state.prefetcher.take(state, step)
    figures |= {**batch.figures, "staleness": float(state.optimizer_steps - batch.version)}
    return _SampledCompletions(
        completions=[batch.completions[r.prompt_ids, r.seed] for r in requests],
        version=batch.version,
        figures=figures,
        seconds={"sampler": batch.seconds},
    )


def _sample_completions(
    state: TrainState,
    sampled_by: StudentSamples | TeacherSamples | DatasetSamples,
    rows: Sequence[Row],
    requests: Sequence[SamplingRequest],
    evaluation: bool,
) -> _SampledCompletions:
    """Sample one completion per request, without prefetching.  `rows` has the row of each request."""
    if isinstance(state.plan.backend, ReplayBackend) and not evaluation:
        # The recorded run has the completions, whatever sampled them.
        return _sample_from(state, state.student, requests)
    match sampled_by:
        case DatasetSamples(column=column):
            completions = [dataset_completion(state, row, column) for row in rows]
            return _SampledCompletions(completions=completions, version=state.optimizer_steps)
        case TeacherSamples(weights="teacher"):
            weights = state.teacher_weights
        case StudentSamples() | TeacherSamples():
            weights = state.student
        case _:
            assert_never(sampled_by)
    return _sample_from(state, weights, requests, evaluation=evaluation)


def _sample_from(
    state: TrainState, weights: Weights, requests: Sequence[SamplingRequest], *, evaluation: bool = False
) -> _SampledCompletions:
    backend, figures = state.backend(weights, evaluation=evaluation)
    completions = backend.sample(requests, sampling_params(state))
    return _SampledCompletions(completions=completions, version=state.optimizer_steps, figures=figures)


def dataset_completion(state: TrainState, row: Row, column: str) -> Completion:
    """Return the data set's completion as token ids with the end-of-turn token, cut at `rollout.max_new_tokens`."""
    ids = state.data.prompter.completion_ids(row.text(column) or "", state.end_ids[0])
    limit = state.spec.rollout.max_new_tokens
    return Completion(ids=ids[:limit], logprobs=None, finished=len(ids) <= limit)


def _sampling_prompt(state: TrainState) -> Any:
    sampled_by = state.spec.rollout.sampled_by
    if isinstance(sampled_by, TeacherSamples) and sampled_by.prompt == "teacher":
        return lambda row: state.data.teacher_ids(row) or state.data.student_ids(row)
    return state.data.student_ids


def _make_rollout(
    state: TrainState, row: Row, group: int, completion: Completion, version: int, outcome: GroupOutcome | None
) -> Rollout:
    if state.data.needs_rollouts_for_context:
        prompt = state.data.teacher_prompt(row, outcome)
        teacher_ids, filled = (prompt.ids, prompt.filled) if prompt else (None, ())
    else:
        teacher_ids, filled = state.data.teacher_ids(row), ()
    return Rollout(
        row=row,
        group=group,
        prompt_ids=state.data.student_ids(row),
        teacher_prompt_ids=teacher_ids,
        teacher_route=state.data.teacher_route(row),
        completion_ids=completion.ids,
        sampler_logprobs=completion.logprobs,
        policy_version=version,
        finished=completion.finished,
        reward=None if outcome is None else outcome.group[outcome.own].reward,
        filled_slots=filled,
        group_rewards=() if outcome is None else tuple(a.reward for a in outcome.group),
    )


def rollout_records(collected: CollectedRollouts) -> list[dict[str, Any]]:
    """Return the record of each rollout in the run directory, which is enough to train on it again."""
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
        for r, request in zip(collected.batch, collected.requests, strict=True)
    ]


def sort_records(by_rank: Iterable[Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the records of all ranks in the order of a run on one rank."""
    return sorted((record for records in by_rank for record in records), key=lambda record: record["group"])


def completion_text(state: TrainState, ids: Sequence[int]) -> str:
    """Return the text of a completion without special tokens, as rewards read it."""
    return state.data.tokenizer.decode(ids, skip_special_tokens=True)


def sample_texts(
    state: TrainState, batch: RolloutBatch, scores: Mapping[str, Sequence[float]], count: int
) -> list[dict[str, Any]]:
    """Return the first `count` rollouts as text: prompt, teacher prompt, completion and rewards."""
    decode = state.data.tokenizer.decode
    return [
        {
            "row": r.row.index,
            "prompt": decode(r.prompt_ids),
            "teacher_prompt": None if r.teacher_prompt_ids is None else decode(r.teacher_prompt_ids),
            "completion": decode(r.completion_ids),
            "finished": r.finished,
            "rewards": {name: values[i] for name, values in scores.items()},
        }
        for i, r in enumerate(list(batch)[:count])
    ]
