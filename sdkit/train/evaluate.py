"""Held-out measurement: scores with intervals, the teacher's lift, the objective on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sdkit.batches import Completion, Row, SamplingParams, SamplingRequest
from sdkit.distributed import collectives
from sdkit.language.specs import Decoding, RoutedWeights, ServedWeights, Suite
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

View = Callable[[Row], tuple[int, ...] | None]


def headline(world: TrainState) -> Key:
    """The score that stands for the run: the first suite's first decoding."""
    assert world.spec.evaluation is not None
    name, suite = next(iter(world.spec.evaluation.suites.items()))
    return name, next(iter(suite.decoding)), suite.score


def evaluate(world: TrainState) -> EvaluationResult:
    """Every suite from the student's own prompt."""
    assert world.spec.evaluation is not None
    parts = [
        _suite(world, name, suite, world.data.suites[name], world.student, world.data.student_ids)
        for name, suite in world.spec.evaluation.suites.items()
    ]
    return _joined(parts)


def teacher_lift(world: TrainState, before: EvaluationResult) -> dict[Key, Interval]:
    """Score under the teacher's view minus score under the student's, on the first prompts of each suite.

    Measured before training: where it is not above zero there is nothing to distil.  Of the teacher's weights alone,
    without a blend.  Empty where the teacher has no view of its own, or is no single model that could sample.
    """
    evaluation, teacher = world.spec.evaluation, world.spec.teacher
    if evaluation is None or teacher is None or teacher.sees is None or not evaluation.teacher_lift:
        return {}
    if isinstance(teacher.weights, RoutedWeights | ServedWeights):
        return {}
    lift: dict[Key, Interval] = {}
    for name, suite in evaluation.suites.items():
        rows = world.data.suites[name][: evaluation.teacher_lift]
        view = _teacher_view(world, name, rows)
        seen = [i for i, row in enumerate(rows) if id(row) in view]
        if not seen:
            continue
        chosen = [rows[i] for i in seen]
        under = _suite(world, name, suite, chosen, world.teacher_weights, partial(_look_up, view))
        for key, scores in under.scores.items():
            own = [before.scores[key][i] for i in seen]
            lift[key] = paired_difference(own, scores)
    return lift


def _look_up(prompts: Mapping[int, tuple[int, ...]], row: Row) -> tuple[int, ...]:
    return prompts[id(row)]


def _teacher_view(world: TrainState, name: str, rows: Sequence[Row]) -> dict[int, tuple[int, ...]]:
    """The teacher's prompt of each row that has one; where the context waits for rollouts, that of the first rollout."""
    data = world.data
    if not data.needs_rollouts_for_context:
        return {id(row): ids for row in rows if (ids := data.teacher_ids(row)) is not None}
    found: dict[int, tuple[int, ...]] = {}
    for rollout in collect_rollouts(world, rows, ("lift", name), suite=name).batch:
        if rollout.teacher_prompt_ids is not None:
            found.setdefault(rollout.group, rollout.teacher_prompt_ids)
    return {
        id(rows[i]): ids for part in collectives.all_gather_object(found) for i, ids in part.items()
    }


def held_out_loss(world: TrainState) -> dict[str, float]:
    """Every training metric of the objective on held-out prompts, under eval/."""
    assert world.spec.evaluation is not None
    found: dict[str, float] = {}
    for position, (name, suite) in enumerate(world.spec.evaluation.suites.items()):
        rows = world.data.suites[name][: suite.loss_prompts]
        if not rows:
            continue
        gathered = collect_rollouts(world, rows, ("held out", name), suite=name)
        prefix = "eval/" if position == 0 else f"eval/{name}/"
        batch = prepare_rollouts(world, gathered.batch, training=False)
        found |= {prefix + key: value for key, value in evaluate_objective(world, batch).items()}
    return found


def _suite(
    world: TrainState, name: str, suite: Suite, rows: Sequence[Row], weights: Weights, view: View
) -> EvaluationResult:
    backend, _ = world.backend(weights, evaluation=True)
    limit = suite.max_new_tokens or world.spec.rollout.max_new_tokens
    parts = []
    for decoding, how in suite.decoding.items():
        jobs = [
            (i, copy) for i in collectives.shard_indices(len(rows)) for copy in range(how.samples)
        ]
        requests = [
            SamplingRequest(
                prompt_ids=view(rows[i]) or (),
                seed=derive(world.spec.training.seed, "evaluation", name, decoding, i, copy),
            )
            for i, copy in jobs
        ]
        done = backend.sample(requests, _sampling(how, limit, world.spec.rollout.stop))
        parts.append(_scored(world, (name, decoding), rows, [i for i, _ in jobs], done))
    return _joined(parts)


def _sampling(how: Decoding, limit: int, stop: tuple[str, ...]) -> SamplingParams:
    return SamplingParams(
        temperature=how.temperature,
        top_p=how.top_p,
        top_k=how.top_k,
        max_new_tokens=limit,
        stop=stop,
    )


def _scored(
    world: TrainState,
    where: tuple[str, str],
    rows: Sequence[Row],
    owners: Sequence[int],
    done: Sequence[Completion],
) -> EvaluationResult:
    """This rank's completions with their scores, joined with those of the other ranks in the order of the rows."""
    texts = [completion_text(world, c.ids) for c in done]
    judged = score(world.data.rewards[where[0]], texts, [rows[i] for i in owners])
    each = reward_values(judged)
    own = [
        {
            "suite": where[0],
            "decoding": where[1],
            "row": rows[i].index,
            "prompt": rows[i].prompt_text,
            "completion": text,
            "scores": {reward: values[j] for reward, values in each.items()},
            "feedback": {
                reward: values[j].feedback
                for reward, values in judged.items()
                if values[j].feedback
            },
        }
        for j, (text, i) in enumerate(zip(texts, owners, strict=True))
    ]
    found = [(i, record, len(c.ids)) for i, record, c in zip(owners, own, done, strict=True)]
    everyone = sorted(
        (one for part in collectives.all_gather_object(found) for one in part),
        key=lambda one: one[0],
    )
    records = [record for _, record, _ in everyone]
    lengths = [length for _, _, length in everyone]
    mean = {where: sum(lengths) / max(len(lengths), 1)}
    scores = {(*where, reward): values for reward, values in _per_prompt(everyone).items()}
    return EvaluationResult(scores=scores, records=records, tokens=sum(lengths), lengths=mean)


def _per_prompt(
    found: Sequence[tuple[int, Mapping[str, Any], int]],
) -> dict[str, tuple[float, ...]]:
    """Per reward: each prompt's mean over its completions.  Prompts stand in order."""
    values: dict[str, dict[int, list[float]]] = {}
    for prompt, record, _ in found:
        for reward, value in record["scores"].items():
            values.setdefault(reward, {}).setdefault(prompt, []).append(value)
    return {
        reward: tuple(sum(each) / len(each) for each in prompts.values())
        for reward, prompts in values.items()
    }


def _joined(parts: Sequence[EvaluationResult]) -> EvaluationResult:
    return EvaluationResult(
        scores={key: scores for part in parts for key, scores in part.scores.items()},
        records=[record for part in parts for record in part.records],
        tokens=sum(part.tokens for part in parts),
        lengths={key: length for part in parts for key, length in part.lengths.items()},
    )
