"""Two real optimizer steps of any run file or method page, on a tiny random model.

The code path is the real one; what a laptop cannot have is replaced by the smallest stand-in: the model, the rows,
the rewards (scripted, on both sides of every threshold).  The gradient must be neither zero nor rounding noise.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from attrs import evolve
from rich.console import Console

from sdkit.checkpoints import checkpoint
from sdkit.distributed import zero
from sdkit.language.errors import NumericsGuard
from sdkit.language.required_statistics import weight_of
from sdkit.language.schedules import scalar_at, with_schedules
from sdkit.language.specs import (
    AdvantageAdd,
    AdvantageScale,
    AutoBackend,
    Blend,
    ColumnSlot,
    Context,
    DataSpec,
    Distillation,
    ExperimentSpec,
    ExternalWeights,
    ExtrapolateBlend,
    FileDivergence,
    FileWeight,
    GroupRelative,
    InlineSource,
    LoraSpec,
    Loss,
    MethodSpec,
    ModelSpec,
    OptimizerSpec,
    OutputSpec,
    PolicyGradient,
    RegexReward,
    ReplayBackend,
    RolloutSpec,
    RoutedWeights,
    Schedule,
    Sees,
    ServedWeights,
    Suite,
    Table,
    TeacherSpec,
    TopKSupport,
    TrainingSpec,
    TransformersBackend,
    VllmServerBackend,
    blend_base,
    completion_column,
    external_teachers,
    served_teachers,
)
from sdkit.models import tiny
from sdkit.runs import directory
from sdkit.serving.tiny_server import TinyServer
from sdkit.stdout import quiet
from sdkit.train import gradient_signal, loop, report, scripted_rewards
from sdkit.train.run import open_world
from sdkit.train.state import TrainState

T = TypeVar("T")
STEPS = 2
ROWS = 8
NOTHING = "a teacher that sees and is what the student is leaves nothing to learn"
FAR = 30.0
"""Nats: tiny random models differ by less, and trained ones by much less than they do."""
VOCABULARY = 512
LONGEST = 16  # tokens of a completion


def smoke(
    spec: MethodSpec, console: Console, steps: int = STEPS, home: Path | None = None
) -> list[dict[str, Any]]:
    """Run `steps` steps of the spec in miniature; returns the lines of metrics.jsonl.

    `home` is the folder that the spec's own files are named from (default: the current one).  Raises NumericsGuard where a step had no gradient, or one that is not finite.
    """
    with tempfile.TemporaryDirectory(prefix="sdkit-smoke-") as folder:
        base = Path(folder)
        with quiet():  # the first to import DeepSpeed, which speaks on stdout
            tiny.build(base / "model", vocabulary=VOCABULARY)
            if any(external_teachers(spec)) or any(served_teachers(spec)):
                tiny.build(base / "teacher", seed=1, vocabulary=VOCABULARY)
            if isinstance(blend_base(spec), ExternalWeights):
                tiny.build(base / "base", seed=2, vocabulary=VOCABULARY)
        with _served(spec, base / "teacher") as url:
            return _run(miniature(spec, steps, (home or Path()).resolve(), url), base, console)


@contextlib.contextmanager
def _served(spec: MethodSpec, folder: Path) -> Iterator[str]:
    """The address of a server for the served teachers, where there are any."""
    if not any(served_teachers(spec)):
        yield ""
        return
    server = TinyServer(folder, "teacher")
    try:
        yield server.url
    finally:
        server.close()


def _run(small: ExperimentSpec, base: Path, console: Console) -> list[dict[str, Any]]:
    assert small.training.steps is not None
    world = open_world(small, base)
    scorer = scripted_rewards.scorer(small)
    world.data.rewards = {name: dict.fromkeys(r, scorer) for name, r in world.data.rewards.items()}
    world.data.train_rewards = dict.fromkeys(world.data.train_rewards, scorer)
    passes = gradient_signal.watch(world.student_module)
    run = directory.create(base / "run", tensorboard=False)
    try:
        report.opening(console, world, run)
        loop.run(world, report.Report(run, console, small.training.steps))
        checkpoint.save_model(world, run.path)
        return _checked(world, run.history(), passes)
    finally:
        run.close()
        world.close()
        zero.stop()


def _checked(
    world: TrainState, lines: list[dict[str, Any]], passes: Sequence[gradient_signal.Pass]
) -> list[dict[str, Any]]:
    trained = [line for line in lines if "grad_norm" in line]
    for line in trained:
        if not 0 < line["grad_norm"] < float("inf"):
            raise NumericsGuard(
                f"step {line['step']} has a gradient of norm {line['grad_norm']}",
                hint=NOTHING,
            )
    if gradient_signal.is_noise(passes):
        raise NumericsGuard("the gradient is rounding noise alone", hint=NOTHING)
    assert len(trained) == world.plan.steps
    return lines


def miniature(spec: MethodSpec, steps: int, home: Path, url: str = "") -> ExperimentSpec:
    """The spec with a tiny model, a few rows and short completions; everything a method says is kept.

    `url` is the address of the tiny server that stands in for every other.
    """
    full = spec if isinstance(spec, ExperimentSpec) else None
    rows = _data(spec)
    # With vLLM on an accelerator that is not at hand, transformers stands in.
    elsewhere = bool(full and full.machine and full.machine.accelerator)
    return ExperimentSpec(
        rollout=_rollout(spec.rollout, elsewhere),
        teacher=spec.teacher and _teacher(spec.teacher, url),
        losses=Table({name: _term(term, home) for name, term in spec.losses.items()}),
        route=spec.route,
        model=_model(full.model if full else ModelSpec(path="model")),
        data=rows,
        rewards=Table(
            dict.fromkeys(full.rewards if full else ("reward",), RegexReward(pattern="."))
        ),
        reward=full and full.reward,
        evaluation=full
        and full.evaluation
        and evolve(
            full.evaluation,
            suites=Table({n: _suite(s, rows) for n, s in full.evaluation.suites.items()}),
            every=None,
            teacher_lift=2,
        ),
        optimizer=evolve(full.optimizer, warmup_steps=0) if full else OptimizerSpec(lr=1e-3),
        training=_training(
            full.training if full else None, steps, max(2, len(scripted_rewards.groups(spec)))
        ),
        output=OutputSpec(samples_every=1, samples=1, tensorboard=False),
    )


def _model(model: ModelSpec) -> ModelSpec:
    lora = model.lora and LoraSpec(rank=min(model.lora.rank, 4), alpha=model.lora.alpha)
    return ModelSpec(path="model", dtype=model.dtype, lora=lora, attention="sdpa")


def _rollout(rollout: RolloutSpec, elsewhere: bool) -> RolloutSpec:
    backend = rollout.backend
    if elsewhere or isinstance(backend, AutoBackend | VllmServerBackend | ReplayBackend):
        backend = TransformersBackend()
    return evolve(
        rollout,
        backend=backend,
        max_staleness=0,
        max_new_tokens=min(rollout.max_new_tokens, LONGEST),
        max_prompt_tokens=None,
        top_k=min(rollout.top_k, 64),
        sampled_by=with_schedules(rollout.sampled_by, _on_the_way),
    )


def _teacher(teacher: TeacherSpec, url: str) -> TeacherSpec:
    return evolve(
        teacher,
        weights=_weights(teacher.weights, url),
        sees=teacher.sees and _sees(teacher.sees),
        blend=_blend(with_schedules(teacher.blend, _on_the_way)),
    )


def _blend(blend: Blend | None) -> Blend | None:
    if isinstance(blend, ExtrapolateBlend) and isinstance(blend.base, ExternalWeights):
        return evolve(blend, base=evolve(blend.base, path="base", revision=None))
    return blend


def _sees(sees: Sees) -> Sees:
    return evolve(sees, max_prompt_tokens=None)


def _on_the_way(schedule: Schedule) -> Schedule:
    """From half-way to three quarters of it: a number that starts or ends at 0 teaches nothing there."""
    way = schedule.to - schedule.start
    return evolve(schedule, start=schedule.start + way / 2, to=schedule.to - way / 4, steps=STEPS)


def _weights(weights: T, url: str) -> T:
    weights = with_schedules(weights, _on_the_way)
    if isinstance(weights, ExternalWeights):
        return evolve(weights, path="teacher", revision=None)
    if isinstance(weights, ServedWeights):
        return evolve(weights, url=url, model="teacher", tokenizer=None, key_from=None)
    if isinstance(weights, RoutedWeights):
        routes = {name: _weights(one, url) for name, one in weights.routes.items()}
        return evolve(weights, routes=Table(routes))
    return weights


def _term(term: Loss, home: Path) -> Loss:
    weight = weight_of(term)
    if isinstance(weight, FileWeight):
        term = evolve(term, weight=evolve(weight, file=str(home / weight.file)))
    if isinstance(term, Distillation) and isinstance(term.divergence, FileDivergence):
        path = str(home / term.divergence.file)
        term = evolve(term, divergence=evolve(term.divergence, file=path))
    term = with_schedules(term, _on_the_way)
    above = term.mask.teacher_entropy_above
    mask = evolve(
        term.mask,
        skip_first=min(term.mask.skip_first, 8),
        # The tiny model is as unsure as its small vocabulary lets it be.
        teacher_entropy_above=None if above is None else min(scalar_at(above, 0), 1.0),
    )
    term = evolve(term, mask=mask)
    if isinstance(term, PolicyGradient):
        return evolve(term, advantage=_advantage(term.advantage))
    if not isinstance(term, Distillation):
        return term
    clip = evolve(
        term.clip,
        token=term.clip.token and FAR,
        log_ratio=term.clip.log_ratio and (-FAR, FAR),
    )
    if isinstance(term.support, TopKSupport):
        k = min(term.support.k, VOCABULARY // 4)
        term = evolve(term, support=evolve(term.support, k=k))
    return evolve(term, clip=clip)


def _advantage(advantage: T) -> T:
    """With a penalty of overlong completions that short ones escape."""
    if isinstance(advantage, AdvantageAdd | AdvantageScale):
        return evolve(advantage, group_relative=_advantage(advantage.group_relative))
    if isinstance(advantage, GroupRelative) and advantage.overlong:
        short = min(advantage.overlong.stretch, LONGEST // 2)
        return evolve(advantage, overlong=evolve(advantage.overlong, stretch=short))
    return advantage


def _training(training: TrainingSpec | None, steps: int, prompts: int) -> TrainingSpec:
    base = training or TrainingSpec(steps=steps, prompts_per_step=prompts)
    updates = min(base.updates_per_rollout, 2)
    return evolve(
        base,
        steps=steps,
        epochs=None,
        prompts_per_step=prompts,
        updates_per_rollout=updates,
        micro_batch_tokens=2048,
    )


def _data(spec: MethodSpec) -> DataSpec:
    names = {"prompt", "answer", "demonstration"}
    if isinstance(spec, ExperimentSpec):
        names |= set(spec.data.columns or ())
    if column := completion_column(spec.rollout.sampled_by):
        names.add(column)
    if spec.teacher and isinstance(spec.teacher.sees, Context):
        slots = spec.teacher.sees.slots.values()
        names |= {slot.name for slot in slots if isinstance(slot, ColumnSlot)}
    routed = spec.teacher and spec.teacher.weights
    routed = routed if isinstance(routed, RoutedWeights) else None
    names |= {routed.by} if routed else set()

    def value(name: str, i: int) -> str:
        if routed and name == routed.by:
            return list(routed.routes)[i % len(routed.routes)]
        return f"{name} {i}: {i} + {i} = {2 * i}"

    rows = tuple(
        Table({name: value(name, i) for name in sorted(names)})
        for i in range(max(ROWS, 2 * len(scripted_rewards.groups(spec))))
    )
    return DataSpec(
        source=InlineSource(rows=rows), columns=Table({name: name for name in sorted(names)})
    )


def _suite(suite: Suite, data: DataSpec) -> Suite:
    assert isinstance(data.source, InlineSource)
    held_out = tuple(
        Table({k: f"held out {v}" if k == "prompt" else v for k, v in row.items()})
        for row in data.source.rows
    )
    return evolve(
        suite,
        data=DataSpec(source=InlineSource(rows=held_out), columns=data.columns),
        max_new_tokens=8,
        loss_prompts=min(suite.loss_prompts, 2),
        decoding=Table(
            {n: evolve(d, samples=min(d.samples, 2)) for n, d in suite.decoding.items()}
        ),
    )
