"""`sdkit smoke`: runs two real optimizer steps of any run file or method page on a tiny random model.

The code path is that of `sdkit train`.  Model, rows and rewards (scripted, on both sides of every threshold) are
replaced by the smallest stand-ins.  The gradient must be neither zero nor rounding noise.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from attrs import evolve
from rich.console import Console

from sdkit.checkpoints import checkpoint
from sdkit.data.written import scripted_answer
from sdkit.distributed import zero
from sdkit.language import specs
from sdkit.language.errors import NumericsGuard
from sdkit.language.method_pages import columns_of_method, needs_turns
from sdkit.language.schedules import scalar_at, with_schedules
from sdkit.models import tiny
from sdkit.runs import directory
from sdkit.serving.tiny_server import ScriptedWriter, TinyServer
from sdkit.stdout import quiet
from sdkit.train import gradient_signal, loop, report, scripted_rewards
from sdkit.train.run import open_run

T = TypeVar("T")
STEPS = 2
ROWS = 8
NO_SIGNAL_HINT = "a teacher that sees and is what the student is leaves nothing to learn"
WIDE_BOUND = 30.0
"""Nats, wider than the difference of two tiny random models; trained models differ by much less than those."""
VOCABULARY = 512
MAX_NEW_TOKENS = 16  # tokens of a completion
DEMONSTRATED_TOKENS = 4  # for which a turn of a demonstration has room
MAX_COMPLETIONS = 32  # in a group


def smoke(
    spec: specs.MethodSpec,
    console: Console,
    steps: int = STEPS,
    home: Path | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> list[dict[str, Any]]:
    """Run `steps` steps of the spec in miniature; returns the lines of metrics.jsonl.

    Paths in the spec are relative to `home` (default: the current folder).  `dtype` is the student's (default: the
    spec's).  Raises NumericsGuard if a step has no gradient or one that is not finite.
    """
    with tempfile.TemporaryDirectory(prefix="sdkit-smoke-") as folder:
        base = Path(folder)
        with quiet():  # the first import of DeepSpeed prints to stdout
            tiny.build(base / "model", vocabulary=VOCABULARY)
            if any(spec.external_teachers()) or any(spec.served_teachers()):
                tiny.build(base / "teacher", seed=1, vocabulary=VOCABULARY)
            if spec.blend and isinstance(spec.blend.base, specs.ExternalWeights):
                tiny.build(base / "base", seed=2, vocabulary=VOCABULARY)
        with _teacher_server(spec, base / "teacher") as url, _writer_server(spec) as writer_url:
            small = miniature(spec, steps, (home or Path()).resolve(), url, writer_url)
            if dtype:
                small = evolve(small, model=evolve(small.model, dtype=dtype))
            return _run(small, base, console)


@contextlib.contextmanager
def _teacher_server(spec: specs.MethodSpec, folder: Path) -> Iterator[str]:
    """The address of a tiny server for the served teachers; empty if there are none."""
    if not any(spec.served_teachers()):
        yield ""
        return
    server = TinyServer(folder, "teacher")
    try:
        yield server.url
    finally:
        server.close()


@contextlib.contextmanager
def _writer_server(spec: specs.MethodSpec) -> Iterator[str]:
    """The address of a scripted writer of the teacher's context; empty if there is none."""
    if spec.writer is None:
        yield ""
        return
    server = ScriptedWriter("writer", lambda _: scripted_answer(spec.slots.values(), "Think first.", 1))
    try:
        yield server.url
    finally:
        server.close()


def _run(spec: specs.ExperimentSpec, base: Path, console: Console) -> list[dict[str, Any]]:
    assert spec.training.steps is not None
    trainer = open_run(spec, base)
    data, student = trainer.setup.data, trainer.models.student
    scorer = scripted_rewards.scorer(spec)
    data.rewards = {name: dict.fromkeys(r, scorer) for name, r in data.rewards.items()}
    data.train_rewards = dict.fromkeys(data.train_rewards, scorer)
    data.environments = data.open_environments(base)
    passes = gradient_signal.record_gradient_norms(trainer.learner.student)
    run = directory.create(base / "run")
    try:
        report.print_objective_card(console, trainer.setup, trainer.models, run)
        loop.run(trainer, report.Report(run, console, trainer.setup))
        checkpoint.save_model(student, data.tokenizer, run.path)
        return _check_gradients(run.history(), passes, spec.training.steps)
    finally:
        run.close()
        trainer.close()
        zero.stop()


def _check_gradients(
    lines: list[dict[str, Any]], passes: Sequence[gradient_signal.GradientNorms], steps: int
) -> list[dict[str, Any]]:
    trained = [line for line in lines if "grad_norm" in line]
    for line in trained:
        if not 0 < line["grad_norm"] < float("inf"):
            raise NumericsGuard(f"step {line['step']} has a gradient of norm {line['grad_norm']}", hint=NO_SIGNAL_HINT)
    if gradient_signal.is_noise(passes):
        raise NumericsGuard("the gradient is rounding noise alone", hint=NO_SIGNAL_HINT)
    assert len(trained) == steps
    return lines


def miniature(
    spec: specs.MethodSpec, steps: int, home: Path, url: str = "", writer_url: str = ""
) -> specs.ExperimentSpec:
    """The spec with a tiny model, a few rows and short completions; the method itself is unchanged.

    `url` is the address of the tiny server that replaces every served teacher, `writer_url` that of a scripted writer.
    """
    spec = with_schedules(spec, _middle_part)
    full = spec if isinstance(spec, specs.ExperimentSpec) else None
    # A spec for an accelerator may sample with vLLM, which may be missing here: use transformers.
    for_accelerator = bool(full and full.machine and full.machine.accelerator)
    spec = evolve(spec, rollout=_small_rollout(spec.rollout, for_accelerator))
    mapped = (full and full.data.columns) or ()
    rows = stand_in_rows(spec, ["prompt", "answer", "demonstration", *mapped, *columns_of_method(spec)])
    rewards = (full and list(full.rewards)) or ["reward"]
    environment = _small_environment(spec, full and full.environment, rewards[0])
    return specs.ExperimentSpec(
        rollout=evolve(spec.rollout, stop=(OFTEN,)) if environment else spec.rollout,
        environment=environment,
        teacher=spec.teacher and _tiny_teacher(spec.teacher, url, writer_url),
        losses=specs.Table({name: _small_loss(term, home) for name, term in spec.losses.items()}),
        route=spec.route,
        model=_small_model(full.model if full else specs.ModelSpec(path="model")),
        data=rows,
        rewards=specs.Table(dict.fromkeys(rewards, specs.RegexReward(pattern="."))),
        reward=full and full.reward,
        evaluation=full
        and full.evaluation
        and evolve(
            full.evaluation,
            suites=specs.Table({n: _small_suite(s, rows) for n, s in full.evaluation.suites.items()}),
            every=None,
            teacher_lift=2,
            panel=(),
            panel_every=None,
        ),
        optimizer=evolve(full.optimizer, warmup_steps=0) if full else specs.OptimizerSpec(lr=1e-3),
        training=_small_training(
            full.training if full else None, steps, max(2, len(scripted_rewards.group_rewards(spec)))
        ),
        output=specs.OutputSpec(samples_every=1, samples=1, trackers=()),
    )


OFTEN = "e"
"""A text that ends turns of the tiny model, which samples an end token too rarely for a second turn."""


def _small_environment(
    spec: specs.MethodSpec, environment: specs.Environment | None, reward: str
) -> specs.Environment | None:
    """Two short turns; a scripted reward stands in for a user's class, which may never reward the tiny model.

    A method page has no environment, but terms or the teacher's context of it may need one.
    """
    by_student = isinstance(spec.rollout.sampled_by, specs.StudentSamples)
    if environment is None and not (by_student and needs_turns(spec)):
        return None
    if isinstance(environment, specs.RoutedEnvironment):
        routes = {name: _small_environment(spec, route, reward) for name, route in environment.routes.items()}
        return evolve(environment, routes=specs.Table(routes))
    short: dict[str, Any] = {"max_turns": 2, "max_observation_tokens": 16, "max_trajectory_tokens": None}
    if spec.rollout.starts_with:  # no trajectory ends within its demonstration
        short["threshold"] = scripted_rewards.NEVER
    if isinstance(environment, specs.RetryEnvironment):
        return evolve(environment, **short)
    return specs.RetryEnvironment(reward=reward, **short)


def _small_model(model: specs.ModelSpec) -> specs.ModelSpec:
    lora = model.lora and evolve(model.lora, r=min(model.lora.r, 4), target_modules="all-linear")
    return specs.ModelSpec(path="model", dtype=model.dtype, lora=lora, attn_implementation="sdpa")


def _small_rollout(rollout: specs.RolloutSpec, for_accelerator: bool) -> specs.RolloutSpec:
    backend = rollout.backend
    if for_accelerator or isinstance(backend, specs.AutoBackend | specs.VllmServerBackend | specs.ReplayBackend):
        backend = specs.TransformersBackend()
    return evolve(
        rollout,
        backend=backend,
        sampled_by=_small_sampler(rollout.sampled_by),
        max_staleness=0,
        completions_per_prompt=min(rollout.completions_per_prompt, MAX_COMPLETIONS),
        max_new_tokens=max(
            min(rollout.max_new_tokens, MAX_NEW_TOKENS), DEMONSTRATED_TOKENS * bool(rollout.starts_with)
        ),
        max_prompt_tokens=None,
        top_k=min(rollout.top_k, 64),
    )


def _small_sampler(sampled_by: specs.SampledBy) -> specs.SampledBy:
    """The sampler with one turn of a demonstration, which has two."""
    if isinstance(sampled_by, specs.StudentSamples) and sampled_by.starts_with:
        return evolve(sampled_by, starts_with=evolve(sampled_by.starts_with, turns_left=1.0))
    return sampled_by


def _tiny_teacher(teacher: specs.TeacherSpec, url: str, writer_url: str) -> specs.TeacherSpec:
    sees = teacher.sees
    writer = (
        sees
        and sees.writer
        and evolve(sees.writer, url=writer_url, model="writer", key_from=None, max_new_tokens=MAX_NEW_TOKENS)
    )
    return evolve(
        teacher,
        weights=_tiny_weights(teacher.weights, url),
        sees=sees and evolve(sees, max_prompt_tokens=None, writer=writer),
        blend=_tiny_blend(teacher.blend),
    )


def _tiny_blend(blend: specs.Blend | None) -> specs.Blend | None:
    if isinstance(blend, specs.ExtrapolateBlend) and isinstance(blend.base, specs.ExternalWeights):
        return evolve(blend, base=evolve(blend.base, path="base", revision=None))
    return blend


def _middle_part(schedule: specs.Schedule) -> specs.Schedule:
    """The schedule from its midpoint to three quarters: a value that starts or ends at 0 gives no gradient there."""
    span = schedule.to - schedule.start
    return evolve(schedule, start=schedule.start + span / 2, to=schedule.to - span / 4, steps=STEPS)


def _tiny_weights(weights: T, url: str) -> T:
    if isinstance(weights, specs.ExternalWeights):
        return evolve(weights, path="teacher", revision=None)
    if isinstance(weights, specs.ServedWeights):
        return evolve(weights, url=url, model="teacher", tokenizer=None, key_from=None)
    if isinstance(weights, specs.RoutedWeights):
        routes = {name: _tiny_weights(route, url) for name, route in weights.routes.items()}
        return evolve(weights, routes=specs.Table(routes))
    return weights


def _small_loss(term: specs.Loss, home: Path) -> specs.Loss:
    weight = term.token_weight
    if isinstance(weight, specs.FileWeight):
        term = evolve(term, weight=evolve(weight, file=str(home / weight.file)))
    if isinstance(term, specs.Distillation) and isinstance(term.divergence, specs.FileDivergence):
        path = str(home / term.divergence.file)
        term = evolve(term, divergence=evolve(term.divergence, file=path))
    threshold = term.mask.teacher_entropy_above
    mask = evolve(
        term.mask,
        skip_first=min(term.mask.skip_first, 8),
        turns=term.mask.turns and specs.TurnRange(first=min(term.mask.turns.first, 2)),
        # The tiny model writes no tags.
        spans=term.mask.spans and evolve(term.mask.spans, pattern="[a-m]+"),
        # The tiny model's small vocabulary bounds its entropy.
        teacher_entropy_above=None if threshold is None else min(scalar_at(threshold, 0), 1.0),
    )
    term = evolve(term, mask=mask)
    if isinstance(term, specs.PolicyGradient):
        return evolve(term, advantage=_small_advantage(term.advantage))
    if not isinstance(term, specs.Distillation):
        return term
    clip = evolve(
        term.clip, token=term.clip.token and WIDE_BOUND, log_ratio=term.clip.log_ratio and (-WIDE_BOUND, WIDE_BOUND)
    )
    if isinstance(term.support, specs.TopKSupport):
        k = min(term.support.k, VOCABULARY // 4)
        term = evolve(term, support=evolve(term.support, k=k))
    return evolve(term, clip=clip)


def _small_advantage(advantage: T) -> T:
    """The advantage with an overlong penalty that the shortest completions do not incur."""
    if isinstance(advantage, specs.AdvantageAdd | specs.AdvantageScale):
        return evolve(advantage, group_relative=_small_advantage(advantage.group_relative))
    if isinstance(advantage, specs.GroupRelative) and advantage.overlong:
        stretch = min(advantage.overlong.stretch, MAX_NEW_TOKENS // 2)
        return evolve(advantage, overlong=evolve(advantage.overlong, stretch=stretch))
    return advantage


def _small_training(training: specs.TrainingSpec | None, steps: int, prompts: int) -> specs.TrainingSpec:
    base = training or specs.TrainingSpec(steps=steps, prompts_per_step=prompts)
    updates = min(base.updates_per_rollout, 2)
    return evolve(
        base, steps=steps, epochs=None, prompts_per_step=prompts, updates_per_rollout=updates, micro_batch_tokens=2048
    )


def stand_in_rows(spec: specs.MethodSpec, columns: Iterable[str]) -> specs.DataSpec:
    """Return a few rows with these columns, and with those that name a route."""
    demonstration = spec.rollout.starts_with and spec.rollout.starts_with.column
    routes = _routes(spec)
    names = {*columns, *routes}

    def value(name: str, i: int) -> str | None:
        if name == "tools":  # the tiny model's chat template prints none
            return None
        if name in routes:
            return routes[name][i % len(routes[name])]
        if name == demonstration:
            turn = {"role": "assistant", "content": str(i)}
            return json.dumps([turn, {"role": "user", "content": "Go on."}, turn])
        return f"{name} {i}: {i} + {i} = {2 * i}"

    rows = tuple(
        specs.Table({name: value(name, i) for name in sorted(names)})
        for i in range(max(ROWS, 2 * len(scripted_rewards.group_rewards(spec)), *map(len, routes.values())))
    )
    mapped = {name: specs.ChatTurns(turns=name) if name == demonstration else name for name in sorted(names)}
    return specs.DataSpec(source=specs.InlineSource(rows=rows), columns=specs.Table(mapped))


def _routes(spec: specs.MethodSpec) -> dict[str, list[str]]:
    """The columns by which the teacher and the environment are routed, each with the values that both know."""
    parts = (spec.teacher and spec.teacher.weights, getattr(spec, "environment", None))
    routes: dict[str, list[str]] = {}
    for part in parts:
        if isinstance(part, specs.RoutedWeights | specs.RoutedEnvironment):
            known = routes.get(part.by, part.routes)
            routes[part.by] = [name for name in part.routes if name in known] or list(part.routes)
    return routes


def _small_suite(suite: specs.Suite, data: specs.DataSpec) -> specs.Suite:
    assert isinstance(data.source, specs.InlineSource)
    held_out = tuple(
        specs.Table({k: f"held out {v}" if k == "prompt" else v for k, v in row.items()}) for row in data.source.rows
    )
    return evolve(
        suite,
        data=specs.DataSpec(source=specs.InlineSource(rows=held_out), columns=data.columns),
        max_new_tokens=8,
        loss_prompts=min(suite.loss_prompts, 2),
        decoding=specs.Table({n: evolve(d, samples=min(d.samples, 2)) for n, d in suite.decoding.items()}),
    )
