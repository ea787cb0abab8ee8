"""Evaluates on held-out prompts: scores with intervals, the teacher's lift, and the objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sdkit.batches import Completion, Row, SamplingParams, SamplingRequest
from sdkit.distributed import collectives
from sdkit.language.specs import Decoding, Suite
from sdkit.models.weights import Weights
from sdkit.rewards.scoring import reward_values, score
from sdkit.runs.evaluations import EvaluationResult, Key
from sdkit.runs.intervals import Interval, paired_difference
from sdkit.seeds import derive
from sdkit.train.collect_rollouts import collect_rollouts, completion_text
from sdkit.train.step import evaluate_objective
from sdkit.train.token_statistics import prepare_rollouts

if TYPE_CHECKING:
    from sdkit.train.state import TrainState

PromptIds = Callable[[Row], tuple[int, ...] | None]


def headline(state: TrainState) -> Key:
    """The key of the run's main score: the first suite's score under its first decoding."""
    assert state.spec.evaluation is not None
    name, suite = next(iter(state.spec.evaluation.suites.items()))
    return name, next(iter(suite.decoding)), suite.score


def evaluate(state: TrainState) -> EvaluationResult:
    """Sample and score every suite from the student's prompts."""
    assert state.spec.evaluation is not None
    parts = [
        _evaluate_suite(state, name, suite, state.data.suites[name], state.student, state.data.student_ids)
        for name, suite in state.spec.evaluation.suites.items()
    ]
    return _merge(parts)


def teacher_lift(state: TrainState, before: EvaluationResult) -> dict[Key, Interval]:
    """Score from the teacher's prompt minus score from the student's, on the first prompts of each suite.

    Measured before training: if it is not above zero, there is nothing to distil.  It uses the teacher's weights alone,
    without a blend.  Empty if the teacher has no prompt of its own, or is not a single model that can sample.
    """
    evaluation, teacher = state.spec.evaluation, state.spec.teacher
    if evaluation is None or teacher is None or teacher.sees is None or not evaluation.teacher_lift:
        return {}
    if teacher.weights.cannot_sample:
        return {}
    lift: dict[Key, Interval] = {}
    for name, suite in evaluation.suites.items():
        rows = state.data.suites[name][: evaluation.teacher_lift]
        prompts = _teacher_prompts(state, name, rows)
        with_prompt = [i for i, row in enumerate(rows) if id(row) in prompts]
        if not with_prompt:
            continue
        chosen = [rows[i] for i in with_prompt]
        evaluated = _evaluate_suite(state, name, suite, chosen, state.teacher_weights, partial(_look_up, prompts))
        for key, scores in evaluated.scores.items():
            student = [before.scores[key][i] for i in with_prompt]
            lift[key] = paired_difference(student, scores)
    return lift


def _look_up(prompts: Mapping[int, tuple[int, ...]], row: Row) -> tuple[int, ...]:
    return prompts[id(row)]


def _teacher_prompts(state: TrainState, name: str, rows: Sequence[Row]) -> dict[int, tuple[int, ...]]:
    """Each row's teacher prompt by `id(row)`, without rows that have none.

    If the context depends on rollouts, the prompt is that of the row's first rollout.
    """
    data = state.data
    if not data.needs_rollouts_for_context:
        return {id(row): ids for row in rows if (ids := data.teacher_ids(row)) is not None}
    by_row: dict[int, tuple[int, ...]] = {}
    for rollout in collect_rollouts(state, rows, ("lift", name), suite=name).batch:
        if rollout.teacher_prompt_ids is not None:
            by_row.setdefault(rollout.group, rollout.teacher_prompt_ids)
    return {id(rows[i]): ids for part in collectives.all_gather_object(by_row) for i, ids in part.items()}


def held_out_loss(state: TrainState) -> dict[str, float]:
    """All training metrics of the objective on held-out prompts, under eval/."""
    assert state.spec.evaluation is not None
    metrics: dict[str, float] = {}
    for position, (name, suite) in enumerate(state.spec.evaluation.suites.items()):
        rows = state.data.suites[name][: suite.loss_prompts]
        if not rows:
            continue
        gathered = collect_rollouts(state, rows, ("held out", name), suite=name)
        prefix = "eval/" if position == 0 else f"eval/{name}/"
        batch = prepare_rollouts(state, gathered.batch, training=False)
        metrics |= {prefix + key: value for key, value in evaluate_objective(state, batch).items()}
    return metrics


def _evaluate_suite(
    state: TrainState, name: str, suite: Suite, rows: Sequence[Row], weights: Weights, prompt_ids: PromptIds
) -> EvaluationResult:
    backend, _ = state.backend(weights, evaluation=True)
    limit = suite.max_new_tokens or state.spec.rollout.max_new_tokens
    parts = []
    for decoding_name, decoding in suite.decoding.items():
        jobs = [(i, copy) for i in collectives.shard_indices(len(rows)) for copy in range(decoding.samples)]
        requests = [
            SamplingRequest(
                prompt_ids=prompt_ids(rows[i]) or (),
                seed=derive(state.spec.training.seed, "evaluation", name, decoding_name, i, copy),
            )
            for i, copy in jobs
        ]
        completions = backend.sample(requests, _sampling_params(decoding, limit, state.spec.rollout.stop))
        parts.append(_score_completions(state, (name, decoding_name), rows, [i for i, _ in jobs], completions))
    return _merge(parts)


def _sampling_params(decoding: Decoding, limit: int, stop: tuple[str, ...]) -> SamplingParams:
    return SamplingParams(
        temperature=decoding.temperature, top_p=decoding.top_p, top_k=decoding.top_k, max_new_tokens=limit, stop=stop
    )


def _score_completions(
    state: TrainState,
    key: tuple[str, str],
    rows: Sequence[Row],
    owners: Sequence[int],
    completions: Sequence[Completion],
) -> EvaluationResult:
    """Score this rank's completions; returns those of all ranks in the order of the rows.  key: suite and decoding."""
    texts = [completion_text(state, c.ids) for c in completions]
    results = score(state.data.rewards[key[0]], texts, [rows[i] for i in owners])
    numbers = reward_values(results)
    own_records = [
        {
            "suite": key[0],
            "decoding": key[1],
            "row": rows[i].index,
            "prompt": rows[i].prompt_text,
            "completion": text,
            "scores": {reward: values[j] for reward, values in numbers.items()},
            "feedback": {reward: values[j].feedback for reward, values in results.items() if values[j].feedback},
        }
        for j, (text, i) in enumerate(zip(texts, owners, strict=True))
    ]
    own = [(i, record, len(c.ids)) for i, record, c in zip(owners, own_records, completions, strict=True)]
    scored = sorted((item for part in collectives.all_gather_object(own) for item in part), key=lambda item: item[0])
    records = [record for _, record, _ in scored]
    lengths = [length for _, _, length in scored]
    mean = {key: sum(lengths) / max(len(lengths), 1)}
    scores = {(*key, reward): values for reward, values in _mean_per_prompt(scored).items()}
    return EvaluationResult(scores=scores, records=records, tokens=sum(lengths), lengths=mean)


def _mean_per_prompt(scored: Sequence[tuple[int, Mapping[str, Any], int]]) -> dict[str, tuple[float, ...]]:
    """Each prompt's mean over its completions, by reward, in the order of the prompts."""
    values: dict[str, dict[int, list[float]]] = {}
    for prompt, record, _ in scored:
        for reward, value in record["scores"].items():
            values.setdefault(reward, {}).setdefault(prompt, []).append(value)
    return {
        reward: tuple(sum(scores) / len(scores) for scores in prompts.values()) for reward, prompts in values.items()
    }


def _merge(parts: Sequence[EvaluationResult]) -> EvaluationResult:
    return EvaluationResult(
        scores={key: scores for part in parts for key, scores in part.scores.items()},
        records=[record for part in parts for record in part.records],
        tokens=sum(part.tokens for part in parts),
        lengths={key: length for part in parts for key, length in part.lengths.items()},
    )
