"""Collects rollouts: samples completions for prompts, scores them, and builds the teacher's prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from attrs import frozen

from sdkit.batches import Completion, GroupOutcome, Rollout, RolloutBatch, Row, SamplingRequest, TurnOutcome, View
from sdkit.data.turn_outcomes import turn_outcomes
from sdkit.distributed import collectives
from sdkit.rewards.scoring import ScoredCompletion, reward_values, score
from sdkit.sampling.replay import trajectory_record, written_record
from sdkit.spans import Span, last_turn, rewards_by_turn
from sdkit.stdout import Advance, no_progress
from sdkit.train.advantages import group_outcomes, with_advantages
from sdkit.train.collate import RolloutKey, rollout_key
from sdkit.train.inputs import RunData
from sdkit.train.rollout_sampler import RolloutSampler, SampledCompletions
from sdkit.train.sampling_requests import Stream, group_numbers
from sdkit.train.step_specs import StepSpecs
from sdkit.train.written_answers import with_answers


@frozen(eq=False, kw_only=True)
class CollectedRollouts:
    """Rollouts, with their requests, scores, timings and metrics."""

    batch: RolloutBatch
    requests: tuple[SamplingRequest, ...]  # one a rollout, also for completions from the data set
    scores: Mapping[str, Sequence[float]]  # by reward: one score a rollout
    seconds: Mapping[str, float]
    figures: Mapping[str, float]  # of the weight transfer and of the sampler


def collect_rollouts(
    sampler: RolloutSampler,
    rows: Sequence[Row],
    stream: Stream,
    specs: StepSpecs,
    *,
    suite: str | None = None,
    advance: Advance = no_progress,
) -> CollectedRollouts:
    """Sample, score and return one group of rollouts for each of this rank's rows.

    `suite` is the evaluation suite of held-out rows, None for training rows; `advance` as in `RolloutBackend`.
    """
    started = time.perf_counter()
    sampled = sampler.sample(rows, stream, specs, suite=suite, advance=advance)
    metrics = dict(sampled.figures)
    sync_seconds = metrics.pop("sync_seconds", 0.0)
    sampled_at = time.perf_counter()
    batch, scores, writing = _score_completions(sampler, rows, sampled, specs, suite)
    return CollectedRollouts(
        batch=batch,
        requests=sampled.requests,
        scores=reward_values(scores),
        seconds={
            "rollout": sampled_at - started - sync_seconds,
            "sync": sync_seconds,
            "judge": time.perf_counter() - sampled_at - sum(writing.values()),
            **writing,
            **sampled.seconds,
        },
        figures=metrics,
    )


def _score_completions(
    sampler: RolloutSampler, rows: Sequence[Row], sampled: SampledCompletions, specs: StepSpecs, suite: str | None
) -> tuple[RolloutBatch, dict[str, list[ScoredCompletion]], dict[str, float]]:
    """Return the rollouts with rewards, advantages and teacher prompts, the scores by reward, and how long a writer took."""
    data, completions, writing = sampler.setup.data, sampled.completions, {}
    spec = data.spec.rollout
    groups = group_numbers(len(rows), spec.completions_per_prompt)
    own_rows = [rows[group] for group in groups]
    texts = [completion_text(data, last_turn(c.ids, c.spans)) for c in completions]
    scores = score(
        data.train_rewards if suite is None else data.rewards[suite], texts, own_rows, [c.reward for c in completions]
    )
    answers = [data.answer(row, last_turn(c.ids, c.spans)) for row, c in zip(own_rows, completions, strict=True)]
    seeds = [request.seed for request in sampled.requests]
    outcomes = group_outcomes(scores.get(data.reward or ""), texts, answers, spec.completions_per_prompt, seeds)
    if sampler.writer:
        started = time.perf_counter()
        completions = with_answers(
            sampler.writer, data, own_rows, completions, outcomes, seeds, training=suite is None
        )
        writing = {"writer": time.perf_counter() - started}
    rollouts = [
        _make_rollout(data, row, group, completion, sampled.version, outcome)
        for group, row, completion, outcome in zip(groups, own_rows, completions, outcomes, strict=True)
    ]
    batch = RolloutBatch(rollouts=tuple(rollouts))
    batch = with_advantages(specs.losses, batch, collectives.all_gather, spec.max_new_tokens)
    batch.check()
    return batch, scores, writing


def _make_rollout(
    data: RunData, row: Row, group: int, completion: Completion, version: int, outcome: GroupOutcome | None
) -> Rollout:
    opening = completion.opening
    row = row if opening is None else row.with_opening(opening)
    views: tuple[View, ...] = ()
    if data.context_by_turn:
        views, filled = _teacher_views(data, row, outcome, completion)
        teacher_ids = views[0].prompt_ids if views else None
    elif data.needs_rollouts_for_context:
        prompt = data.teacher_prompt(row, outcome, TurnOutcome(written=completion.written or ""))
        teacher_ids, filled = (prompt.ids, prompt.filled) if prompt else (None, ())
    else:
        teacher_ids, filled = data.teacher_ids(row, is_opened=opening is not None), ()
    return Rollout(
        row=row,
        group=group,
        prompt_ids=data.student_ids(row, is_opened=opening is not None),
        teacher_prompt_ids=teacher_ids,
        teacher_route=data.teacher_route(row),
        completion_ids=completion.ids,
        spans=completion.spans,
        ending=completion.ending,
        turn_rewards=completion.turn_rewards,
        turn_feedback=completion.turn_feedback,
        unanswered=completion.unanswered,
        views=views,
        environment_reward=completion.reward,
        opening=opening,
        written=completion.written,
        sampler_logprobs=completion.logprobs,
        policy_version=version,
        finished=completion.finished,
        reward=None if outcome is None else outcome.group[outcome.own].reward,
        filled_slots=filled,
        group_rewards=() if outcome is None else tuple(a.reward for a in outcome.group),
    )


def _teacher_views(
    data: RunData, row: Row, outcome: GroupOutcome | None, completion: Completion
) -> tuple[tuple[View, ...], tuple[str, ...]]:
    """Return a view of each turn for which the teacher has a prompt, and the slots that are not empty in one of them."""
    views: list[View] = []
    filled: dict[str, None] = {}
    for span, turn in turn_outcomes(completion, data.tokenizer.decode):
        prompt = data.teacher_prompt(row, outcome, turn) if span.end > span.start else None
        if prompt:
            views.append(View(prompt_ids=prompt.ids, start=span.start, end=span.end))
            filled |= dict.fromkeys(prompt.filled)
    return tuple(views), tuple(filled)


def rollout_records(
    collected: CollectedRollouts, divergences: Mapping[RolloutKey, Sequence[float | None]] | None = None
) -> list[dict[str, Any]]:
    """Return the record of each rollout in the run directory, which is enough to train on it again.

    `divergences` are those of `StepResult`; a rollout that was not trained on has none.
    """
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
            **trajectory_record(r, r.environment_reward),
            **written_record(r),
            "reward": r.reward,
            "scores": {name: values[i] for name, values in collected.scores.items()},
            "token_divergence": _rounded((divergences or {}).get(rollout_key(r))),
        }
        for i, (r, request) in enumerate(zip(collected.batch, collected.requests, strict=True))
    ]


def _rounded(values: Sequence[float | None] | None) -> list[float | None] | None:
    """The values with four digits, which are enough to look at."""
    return None if values is None else [None if v is None else float(f"{v:.4g}") for v in values]


def sort_records(by_rank: Iterable[Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the records of all ranks in the order of a run on one rank."""
    return sorted((record for records in by_rank for record in records), key=lambda record: record["group"])


def completion_text(data: RunData, ids: Sequence[int]) -> str:
    """Return the text of a completion without special tokens, as rewards read it."""
    return data.tokenizer.decode(ids, skip_special_tokens=True)


def trajectory_parts(
    data: RunData, ids: Sequence[int], spans: Sequence[Span], turn_rewards: Sequence[float], ending: str | None
) -> dict[str, Any]:
    """Return the `turns` of a trajectory as a person reads them, and its `ending`; nothing for a completion of one turn.

    Each part has a turn, a role and a text; turns have a reward if the environment gave them one.
    """
    if not spans:
        return {}
    rewards = rewards_by_turn(sum(span.is_turn for span in spans), turn_rewards, ending)
    turns = [
        {
            "turn": span.turn,
            "role": span.role,
            "text": completion_text(data, ids[slice(*(span.body or (span.start, span.end)))]),
            **({"reward": rewards[span.turn]} if span.is_turn and span.turn in rewards else {}),
        }
        for span in spans
    ]
    return {"turns": turns, "ending": ending}


def trajectory_text(parts: Iterable[Mapping[str, Any]]) -> str:
    """Return the `turns` of a trajectory as one text, a line `[role] …` for each part."""
    return "\n".join(f"[{part['role']}] {part['text']}" for part in parts)


def sample_texts(
    data: RunData, batch: RolloutBatch, scores: Mapping[str, Sequence[float]], count: int
) -> list[dict[str, Any]]:
    """Return the first `count` rollouts as text: prompt, teacher prompt, completion and rewards.

    A teacher prompt that differs by turn stands with the turns.
    """
    decode = data.tokenizer.decode
    return [
        {
            "row": r.row.index,
            "prompt": decode(r.prompt_ids),
            "teacher_prompt": None if r.teacher_prompt_ids is None or r.views else decode(r.teacher_prompt_ids),
            "completion": decode(r.completion_ids),
            "finished": r.finished,
            "rewards": {name: values[i] for name, values in scores.items()},
            **_with_teacher_prompts(
                r, trajectory_parts(data, r.completion_ids, r.spans, r.turn_rewards, r.ending), decode
            ),
        }
        for i, r in enumerate(list(batch)[:count])
    ]


def _with_teacher_prompts(
    rollout: Rollout, parts: dict[str, Any], decode: Callable[[Sequence[int]], str]
) -> dict[str, Any]:
    """Add to each turn that the teacher scores with a prompt of its own that prompt."""
    prompts = {view.start: view.prompt_ids for view in rollout.views}
    for part, span in zip(parts.get("turns", ()), rollout.spans, strict=True):
        if span.start in prompts:
            part["teacher_prompt"] = decode(prompts[span.start])
    return parts
