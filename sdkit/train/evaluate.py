"""Evaluates on held-out prompts: scores with intervals, the teacher's lift, and the objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdkit.batches import Completion, RolloutBackend, Row, SamplingParams, SamplingRequest
from sdkit.distributed import collectives
from sdkit.language.specs import Decoding, EvaluationSpec, HeldOutPrompts
from sdkit.rewards.scoring import reward_values, score
from sdkit.runs.evaluations import EvaluationResult, Key
from sdkit.runs.intervals import Interval, paired_difference
from sdkit.seeds import derive
from sdkit.stdout import Advance
from sdkit.train.collect_rollouts import collect_rollouts, completion_text
from sdkit.train.inputs import RunData
from sdkit.train.learner import Learner
from sdkit.train.rollout_sampler import RolloutSampler
from sdkit.train.step import evaluate_objective
from sdkit.train.step_specs import StepSpecs
from sdkit.train.token_statistics import prepare_rollouts


def headline(evaluation: EvaluationSpec) -> Key:
    """The key of the run's main score: the first suite's score under its first decoding."""
    name, suite = next(iter(evaluation.suites.items()))
    return name, next(iter(suite.decoding)), suite.score


def number_of_parts(evaluation: EvaluationSpec) -> int:
    """The number of parts of an evaluation: one for each decoding of each suite."""
    return sum(len(suite.decoding) for suite in evaluation.suites.values())


def evaluate(
    sampler: RolloutSampler, evaluation: EvaluationSpec, version: int, advance: Advance = lambda _: None
) -> EvaluationResult:
    """Sample and score every suite from the student's prompts.

    `version` is the student's policy version; `advance` is called with 1 after each of `number_of_parts`.
    """
    data = sampler.setup.data
    backend, _ = sampler.backends.load(sampler.models.student, version, evaluation=True)
    results: list[EvaluationResult] = []
    for name, suite in evaluation.suites.items():
        prompts = [(row, data.student_ids(row)) for row in data.suites[name]]
        results.append(evaluate_suite(data, name, suite, prompts, backend, advance))
    return merge(results)


def teacher_lift(
    sampler: RolloutSampler, evaluation: EvaluationSpec, before: EvaluationResult, specs: StepSpecs
) -> dict[Key, Interval]:
    """Score from the teacher's prompt minus score from the student's, on the first prompts of each suite.

    Measured before training: if it is not above zero, there is nothing to distil.  It uses the teacher's weights alone,
    without a blend.  Empty if the teacher has no prompt of its own, or is not a single model that can sample.
    """
    data = sampler.setup.data
    teacher = data.spec.teacher
    if teacher is None or teacher.sees is None or not evaluation.teacher_lift:
        return {}
    if teacher.weights.cannot_sample:
        return {}
    lift: dict[Key, Interval] = {}
    for name, suite in evaluation.suites.items():
        rows = data.suites[name][: evaluation.teacher_lift]
        with_prompt = {i: ids for i, ids in enumerate(_teacher_prompts(sampler, name, rows, specs)) if ids is not None}
        if not with_prompt:
            continue
        prompts = [(rows[i], ids) for i, ids in with_prompt.items()]
        backend, _ = sampler.backends.load(sampler.models.teacher_weights, specs.optimizer_steps, evaluation=True)
        for key, scores in evaluate_suite(data, name, suite, prompts, backend).scores.items():
            student = [before.scores[key][i] for i in with_prompt]
            lift[key] = paired_difference(student, scores)
    return lift


def _teacher_prompts(
    sampler: RolloutSampler, name: str, rows: Sequence[Row], specs: StepSpecs
) -> list[tuple[int, ...] | None]:
    """Each row's teacher prompt, None for a row that has none.

    If the context depends on rollouts, the prompt is that of the row's first rollout.
    """
    data = sampler.setup.data
    if not data.needs_rollouts_for_context:
        return [data.teacher_ids(row) for row in rows]
    by_row: dict[int, tuple[int, ...]] = {}
    for rollout in collect_rollouts(sampler, rows, ("lift", name), specs, suite=name).batch:
        if rollout.teacher_prompt_ids is not None:
            by_row.setdefault(rollout.group, rollout.teacher_prompt_ids)
    prompts = {i: ids for part in collectives.all_gather_object(by_row) for i, ids in part.items()}
    return [prompts.get(i) for i in range(len(rows))]


def held_out_loss(
    sampler: RolloutSampler, learner: Learner, evaluation: EvaluationSpec, specs: StepSpecs
) -> dict[str, float]:
    """All training metrics of the objective on held-out prompts, under eval/."""
    metrics: dict[str, float] = {}
    for position, (name, suite) in enumerate(evaluation.suites.items()):
        rows = sampler.setup.data.suites[name][: suite.loss_prompts]
        if not rows:
            continue
        collected = collect_rollouts(sampler, rows, ("held out", name), specs, suite=name)
        prefix = "eval/" if position == 0 else f"eval/{name}/"
        batch = prepare_rollouts(learner, collected.batch, specs)
        metrics |= {prefix + key: value for key, value in evaluate_objective(learner, batch, specs).items()}
    return metrics


def evaluate_suite(
    data: RunData,
    name: str,
    suite: HeldOutPrompts,
    prompts: Sequence[tuple[Row, tuple[int, ...]]],
    backend: RolloutBackend,
    advance: Advance = lambda _: None,
) -> EvaluationResult:
    """Sample and score the rows, each from its prompt."""
    spec, rows = data.spec, [row for row, _ in prompts]
    limit = suite.max_new_tokens or spec.rollout.max_new_tokens
    results: list[EvaluationResult] = []
    for decoding_name, decoding in suite.decoding.items():
        jobs = [(i, copy) for i in collectives.shard_indices(len(rows)) for copy in range(decoding.samples)]
        seeds = [derive(spec.training.seed, "evaluation", name, decoding_name, i, copy) for i, copy in jobs]
        owners = [i for i, _ in jobs]
        requests = [SamplingRequest(prompt_ids=prompts[i][1], seed=n) for i, n in zip(owners, seeds, strict=True)]
        completions = backend.sample(requests, _sampling_params(decoding, limit, spec.rollout.stop))
        results.append(_score_completions(data, (name, decoding_name), rows, owners, completions))
        advance(1)
    return merge(results)


def _sampling_params(decoding: Decoding, limit: int, stop: tuple[str, ...]) -> SamplingParams:
    return SamplingParams(
        temperature=decoding.temperature, top_p=decoding.top_p, top_k=decoding.top_k, max_new_tokens=limit, stop=stop
    )


def _score_completions(
    data: RunData, key: tuple[str, str], rows: Sequence[Row], owners: Sequence[int], completions: Sequence[Completion]
) -> EvaluationResult:
    """Score this rank's completions; returns those of all ranks in the order of the rows.  key: suite and decoding."""
    texts = [completion_text(data, c.ids) for c in completions]
    results = score(data.rewards[key[0]], texts, [rows[i] for i in owners])
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
    entry = data.panel[key[0]].entry if key[0] in data.panel else None
    records = [{**record, "panel": entry} if entry else record for _, record, _ in scored]
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


def merge(parts: Sequence[EvaluationResult]) -> EvaluationResult:
    """Returns the results of several suites as one."""
    return EvaluationResult(
        scores={key: scores for part in parts for key, scores in part.scores.items()},
        records=[record for part in parts for record in part.records],
        tokens=sum(part.tokens for part in parts),
        lengths={key: length for part in parts for key, length in part.lengths.items()},
    )
