"""Evaluates on held-out prompts: scores with intervals, the teacher's lift, and the objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdkit.batches import Completion, RolloutBackend, Row, SamplingParams, SamplingRequest
from sdkit.distributed import collectives
from sdkit.environments.routed import route_of
from sdkit.language.metric_names import WITHIN
from sdkit.language.specs import Decoding, EvaluationSpec, HeldOutPrompts
from sdkit.rewards.scoring import reward_values, score
from sdkit.runs.evaluations import EvaluationResult, Key, read_back
from sdkit.runs.sample_measures import completion_measures, prompt_measures
from sdkit.runs.teacher_lift import TeacherLift, lift_of, merged
from sdkit.seeds import derive
from sdkit.spans import last_turn
from sdkit.stdout import Advance, no_progress
from sdkit.train.collect_rollouts import collect_rollouts, completion_text, trajectory_text
from sdkit.train.inputs import RunData
from sdkit.train.learner import Learner
from sdkit.train.rollout_sampler import RolloutSampler
from sdkit.train.sampling_requests import held_out_environment
from sdkit.train.step import evaluate_objective
from sdkit.train.step_specs import StepSpecs
from sdkit.train.token_statistics import prepare_rollouts


def headline(evaluation: EvaluationSpec) -> Key:
    """The key of the run's main score: the first suite's score under its first decoding."""
    name, suite = next(iter(evaluation.suites.items()))
    return name, next(iter(suite.decoding)), suite.score


def number_of_completions(data: RunData, suites: Mapping[str, HeldOutPrompts]) -> int:
    """The number of completions that this rank samples for these suites."""
    return sum(
        len(collectives.shard_indices(len(data.suites[name]))) * decoding.samples
        for name, suite in suites.items()
        for decoding in suite.decoding.values()
    )


def evaluate(
    sampler: RolloutSampler, evaluation: EvaluationSpec, version: int, advance: Advance = no_progress
) -> EvaluationResult:
    """Sample and score every suite from the student's prompts.

    `version` is the student's policy version; `advance` receives numbers of sampled completions, in all `number_of_completions`.
    """
    data = sampler.setup.data
    backend, _ = sampler.backends.load(sampler.models.student, version, evaluation=True)
    results: list[EvaluationResult] = []
    for name, suite in evaluation.suites.items():
        prompts = [(row, data.student_ids(row)) for row in data.suites[name]]
        results.append(evaluate_suite(sampler, name, suite, prompts, backend, advance))
    return merge(results)


def teacher_lift(
    sampler: RolloutSampler, evaluation: EvaluationSpec, before: EvaluationResult, specs: StepSpecs
) -> TeacherLift:
    """Score from the teacher's prompt minus score from the student's, on the first prompts of each suite.

    Measured before training: if it is not above zero, there is nothing to distil.  It uses the teacher's weights alone,
    without a blend.  Empty if the teacher has no prompt of its own, or is not a single model that can sample.
    """
    data = sampler.setup.data
    teacher = data.spec.teacher
    if teacher is None or teacher.sees is None or not evaluation.teacher_lift:
        return merged([])
    if teacher.weights.cannot_sample:
        return merged([])
    lifts: list[TeacherLift] = []
    for name, suite in evaluation.suites.items():
        rows = data.suites[name][: evaluation.teacher_lift]
        with_prompt = {i: ids for i, ids in enumerate(_teacher_prompts(sampler, name, rows, specs)) if ids is not None}
        if not with_prompt:
            continue
        prompts = [(rows[i], ids) for i, ids in with_prompt.items()]
        backend, _ = sampler.backends.load(sampler.models.teacher_weights, specs.optimizer_steps, evaluation=True)
        measured = evaluate_suite(sampler, name, suite, prompts, backend, by_teacher=True)
        lifts.append(lift_of(before, list(with_prompt), measured))
    return merged(lifts)


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
    sampler: RolloutSampler,
    name: str,
    suite: HeldOutPrompts,
    prompts: Sequence[tuple[Row, tuple[int, ...]]],
    backend: RolloutBackend,
    advance: Advance = no_progress,
    *,
    by_teacher: bool = False,
) -> EvaluationResult:
    """Sample and score the rows, each from its prompt, which is the student's or the teacher's."""
    data, rows = sampler.setup.data, [row for row, _ in prompts]
    spec = data.spec
    limit = suite.max_new_tokens or spec.rollout.max_new_tokens
    results: list[EvaluationResult] = []
    for decoding_name, decoding in suite.decoding.items():
        jobs = [(i, copy) for i in collectives.shard_indices(len(rows)) for copy in range(decoding.samples)]
        seeds = [derive(spec.training.seed, "evaluation", name, decoding_name, i, copy) for i, copy in jobs]
        owners = [i for i, _ in jobs]
        requests = [
            SamplingRequest(
                prompt_ids=prompts[i][1],
                seed=seed,
                environment_seed=held_out_environment(spec.training.seed, name, rows[i]),
            )
            for i, seed in zip(owners, seeds, strict=True)
        ]
        sampling = _sampling_params(decoding, limit, spec.rollout.stop)
        completions = sampler.complete(
            backend, requests, [rows[i] for i in owners], sampling, name, advance, by_teacher=by_teacher
        )
        results.append(_score_completions(data, (name, decoding_name), suite, rows, owners, completions))
    return merge(results)


def _sampling_params(decoding: Decoding, limit: int, stop: tuple[str, ...]) -> SamplingParams:
    return SamplingParams(
        temperature=decoding.temperature, top_p=decoding.top_p, top_k=decoding.top_k, max_new_tokens=limit, stop=stop
    )


def _score_completions(
    data: RunData,
    key: tuple[str, str],
    suite: HeldOutPrompts,
    rows: Sequence[Row],
    owners: Sequence[int],
    completions: Sequence[Completion],
) -> EvaluationResult:
    """Score this rank's completions; returns those of all ranks in the order of the rows.  key: suite and decoding."""
    name, decoding = key
    texts = [completion_text(data, last_turn(c.ids, c.spans)) for c in completions]
    results = score(data.rewards[name], texts, [rows[i] for i in owners], [c.reward for c in completions])
    numbers = reward_values(results)
    measures = _measures(owners, completions, greedy=suite.decoding[decoding].temperature == 0)
    own = [
        (
            i,
            {
                "suite": name,
                "decoding": decoding,
                "row": rows[i].index,
                "prompt": rows[i].prompt_text,
                "completion": trajectory_text(data, completions[j]) or text,
                "scores": {reward: values[j] for reward, values in numbers.items()},
                "feedback": {reward: values[j].feedback for reward, values in results.items() if values[j].feedback},
                **_passed(suite, numbers[suite.score][j]),
                "measures": measures[j],
                **_turns(completions[j]),
            },
        )
        for j, (text, i) in enumerate(zip(texts, owners, strict=True))
    ]
    scored = sorted((item for part in collectives.all_gather_object(own) for item in part), key=lambda item: item[0])
    entry = data.panel[name].entry if name in data.panel else None
    records: Sequence[dict[str, Any]] = [record | {"panel": entry} if entry else record for _, record in scored]
    if data.spec.environment and not entry:
        thresholds = {row.index: route_of(data.spec.environment, row).threshold for row in rows}
        records = _with_success_by_turn(records, data.spec.environment.max_turns, thresholds)
    return read_back(records, tokens=int(sum(record["measures"]["completion_tokens"] for record in records)))


def _passed(suite: HeldOutPrompts, score: float) -> dict[str, bool]:
    """Whether a completion passed, for pass@k; empty if the suite has no score to pass."""
    return {} if suite.pass_score is None else {"passed": score >= suite.pass_score}


def _measures(owners: Sequence[int], completions: Sequence[Completion], *, greedy: bool) -> list[dict[str, float]]:
    """The measures of each completion; those of a prompt as a whole stand at each of its completions."""
    by_prompt: dict[int, list[Sequence[int]]] = {}
    for i, completion in zip(owners, completions, strict=True):
        by_prompt.setdefault(i, []).append(completion.sampled_ids)
    of_prompts = {i: prompt_measures(texts) for i, texts in by_prompt.items()}
    return [_completion_measures(c, greedy=greedy) | of_prompts[i] for i, c in zip(owners, completions, strict=True)]


def _completion_measures(completion: Completion, *, greedy: bool) -> dict[str, float]:
    logprobs = None if greedy or completion.logprobs is None else [completion.logprobs[p] for p in completion.sampled]
    return completion_measures(completion.sampled_ids, logprobs, finished=completion.finished)


def _turns(completion: Completion) -> dict[str, Any]:
    """How a trajectory went, turn by turn; empty for a completion of one turn."""
    if not completion.spans:
        return {}
    return {"ending": completion.ending, "turn_rewards": completion.turn_rewards}


def _with_success_by_turn(
    records: Sequence[dict[str, Any]], max_turns: int, thresholds: Mapping[int, float]
) -> Sequence[dict[str, Any]]:
    """The records with a score within_K for each K: 1 if one of the first K turns reached the threshold of its row.

    Unchanged if the environment rewards no turn.
    """
    if not any(record["turn_rewards"] for record in records):
        return records

    def success(record: Mapping[str, Any]) -> dict[str, float]:
        threshold = thresholds[record["row"]]
        first = next((k for k, reward in enumerate(record["turn_rewards"], 1) if reward >= threshold), None)
        return {f"{WITHIN}{k}": float(first is not None and first <= k) for k in range(1, max_turns + 1)}

    return [record | {"scores": record["scores"] | success(record)} for record in records]


def merge(parts: Sequence[EvaluationResult]) -> EvaluationResult:
    """Returns the results of several suites as one."""
    return EvaluationResult(
        scores={key: scores for part in parts for key, scores in part.scores.items()},
        records=[record for part in parts for record in part.records],
        tokens=sum(part.tokens for part in parts),
    )
