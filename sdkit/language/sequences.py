"""Reads and checks a sequence file: the run of every stage, and how the stages fit together.

Every stage becomes a checked spec of its own, whose values keep the file and line where they are written.  Each has the
suites of all stages: its own first, then those of the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from attrs import evolve, frozen

from sdkit.language import specs
from sdkit.language.columns import training_reward
from sdkit.language.errors import Place, Problem, UnreadableInput, by_position, did_you_mean, listed, outside, shorten
from sdkit.language.load import CheckedSpec, check_loaded
from sdkit.language.overlay import LoadedSpec, folder_of, is_sequence_data, load, merge
from sdkit.language.paths import is_local_model
from sdkit.language.resolved import resolved
from sdkit.language.rules.rollouts import reward_users
from sdkit.language.source import Node, read
from sdkit.language.structure import structure_as
from sdkit.language.tasksets import data_in_full


@frozen(eq=False, kw_only=True)
class Stage:
    """One stage: its run, and the suites that measure its task."""

    name: str
    checked: CheckedSpec  # with the suites of all stages
    suites: tuple[str, ...]

    @property
    def spec(self) -> Any:
        """The ExperimentSpec of the stage's run; a sequence without errors has one for each stage."""
        return self.checked.spec


@frozen(eq=False, kw_only=True)
class CheckedSequence:
    """A sequence file, its stages in order, and all problems found."""

    name: str
    spec: specs.SequenceSpec | None
    stages: tuple[Stage, ...]
    problems: tuple[Problem, ...]
    texts: Mapping[str, str]  # file name → text, for `errors.render`
    kind: Literal["sequence"] = "sequence"

    @property
    def ok(self) -> bool:
        """Whether there are no errors; warnings are allowed."""
        return self.spec is not None and not any(p.severity == "error" for p in self.problems)

    def stage(self, name: str) -> Stage:
        """The stage of this name.  Raises UnreadableInput if there is none."""
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise UnreadableInput(f"stage {shorten(name)} {outside(names)}", hint=did_you_mean(name, names))
        return self.stages[names.index(name)]


def is_sequence(path: str | os.PathLike[str]) -> bool:
    """Whether this is a sequence file: a YAML map with the key `stages`."""
    return os.path.isfile(path) and is_sequence_data(read(path).data)


def load_sequence(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> CheckedSequence:
    """Reads and checks a sequence file; `overrides` apply to the run of every stage.

    Raises UnreadableInput only if the sequence file itself cannot be read.
    """
    source = read(path)
    texts, problems = {source.name: source.text}, list(source.problems)
    loaded = LoadedSpec(source.name, "run", folder_of(source.name), source.root, texts)
    spec, faults = structure_as(specs.SequenceSpec, loaded)
    unreadable = {p.place for p in problems}
    problems += [p for p in faults if p.place not in unreadable]
    runs: dict[str, LoadedSpec] = {}
    for name, stage in spec.stages.items() if spec and not problems else ():
        try:
            runs[name] = _load_run(loaded, name, stage.run or (spec and spec.run), overrides)
        except _StageFault as fault:
            problems.append(fault.problem)
    texts |= {file: text for run in runs.values() for file, text in run.texts.items()}
    alone = {name: check_loaded(run) for name, run in runs.items()}
    problems += [p for checked in alone.values() for p in checked.problems]
    stages: tuple[Stage, ...] = ()
    if spec and not any(p.severity == "error" for p in problems):
        problems += _misfits(loaded, spec, alone)
        if not any(p.severity == "error" for p in problems):
            stages = tuple(_stages(spec, alone))
            problems += [p for stage in stages for p in stage.checked.problems]
    unique = sorted(dict.fromkeys(problems), key=by_position)
    return CheckedSequence(name=source.name, spec=spec, stages=stages, problems=tuple(unique), texts=texts)


class _StageFault(Exception):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def _load_run(loaded: LoadedSpec, name: str, run: str | None, overrides: Sequence[str]) -> LoadedSpec:
    """The run of a stage: its run file with the overrides of the sequence, of the stage and of the command line."""
    own = ("stages", name, "run")
    where = own if loaded.written(own) else ("run",) if loaded.written(("run",)) else ("stages", name)

    def fault(message: str, hint: str | None = None) -> _StageFault:
        return _StageFault(Problem(where, message, "stage_run", hint, loaded.place(where)))

    if run is None:
        raise fault(f"stage {shorten(name)} names no run file", "add run: FILE.yaml, to the stage or to the sequence")
    path = os.path.normpath(os.path.join(loaded.folder, run))
    changes = [loaded.nodes.get(at) for at in (("overrides",), ("stages", name, "overrides"))]
    written = [node for node in changes if node is not None]
    merged = merge(written[0], written[1]) if len(written) == 2 else written[0] if written else None
    try:
        if is_sequence(path):
            raise fault(f"{run} is a sequence file, not a run file")
        stage = load(path, overrides, changes=merged)
    except UnreadableInput as error:
        raise fault(error.message, error.hint) from None
    if stage.kind != "run":
        raise fault(f"{run} is a method page, not a run file", "a run file names it: `method: NAME`")
    return evolve(stage, texts={**loaded.texts, **stage.texts})


def _misfits(loaded: LoadedSpec, spec: specs.SequenceSpec, alone: Mapping[str, CheckedSpec]) -> Iterator[Problem]:
    """What is wrong with the stages together."""
    yield from _other_models(alone)
    yield from _other_environments(alone)
    yield from _ambiguous_suites(alone)
    known = list(dict.fromkeys(suite for checked in alone.values() for suite in _spec(checked).suites))
    for i, name in enumerate(spec.retention):
        if name not in known:
            message = f"suite {shorten(name)} {outside(known)}"
            where = ("retention", i)
            yield Problem(where, message, "retention_suite", did_you_mean(name, known), loaded.place(where))
    for name, own in _own_suites(spec, alone).items():
        if not own:
            message = f"stage {shorten(name)} has no suite of its own, so nothing measures its task"
            hint = "add a suite to its evaluation; suites that an earlier stage has, or that `retention` lists, do not count"
            where = ("stages", name)
            yield Problem(where, message, "stage_suite", hint, loaded.place(where, at_key=True))
    for i, part in enumerate(spec.carry_over):
        if fault := _uncarriable(part, [_spec(checked) for checked in alone.values()]):
            where = ("carry_over", i)
            yield Problem(where, fault, "carry_over", f"remove {part} from the list", loaded.place(where))


def _uncarriable(part: str, runs: Sequence[specs.ExperimentSpec]) -> str | None:
    """Why a part of a stage's state cannot go on in the next stage; None if it can."""
    if any(run.model.lora for run in runs):
        return f"the {part} of adapters cannot go on: a stage merges its adapters into the weights and starts new ones"
    if len({run.training.zero_stage for run in runs}) > 1:
        return f"the {part} cannot go on: the stages differ in training.zero_stage"
    if part == "optimizer":
        settings = (run.optimizer for run in runs)
        alike = len({(s.betas, s.eps, s.weight_decay, s.decay) for s in settings}) == 1
        return None if alike else "the optimizer cannot go on: the stages differ in its betas, eps or weight decay"
    weights = {run.teacher and run.teacher.weights for run in runs}
    if len(weights) > 1:
        return "the teacher cannot go on: the stages differ in teacher.weights"
    moving = any(isinstance(w, specs.UpdatedWeights) for run in runs for _, w in run.teachers())
    return None if moving else "no stage has a teacher that moves (an average or a copy), so none can go on"


def _spec(checked: CheckedSpec) -> specs.ExperimentSpec:
    assert isinstance(checked.spec, specs.ExperimentSpec)
    return checked.spec


def _own_suites(spec: specs.SequenceSpec, alone: Mapping[str, CheckedSpec]) -> dict[str, tuple[str, ...]]:
    """The suites that measure each stage's task: those that no earlier stage has and `retention` does not list."""
    seen = set(spec.retention)
    own: dict[str, tuple[str, ...]] = {}
    for name, checked in alone.items():
        own[name] = tuple(suite for suite in _spec(checked).suites if suite not in seen)
        seen |= set(own[name])
    return own


def _other_models(alone: Mapping[str, CheckedSpec]) -> Iterator[Problem]:
    """Stages whose run file names another model than the first stage's, whose weights they would start from."""
    first, *others = alone
    begun = _model(alone[first])
    for name in others:
        if (model := _model(alone[name])) != begun:
            place = alone[name].loaded.place(("model", "path"))
            message = (
                f"stage {shorten(name)} is for the model {shorten(model[0])}, but starts from the weights of stage "
                f"{shorten(first)}, a {shorten(begun[0])}"
            )
            hint = "one vocabulary and one shape: name the same model and revision in every stage"
            yield Problem(("model", "path"), message, "stage_model", hint, place)


def _model(checked: CheckedSpec) -> tuple[str, str | None]:
    model = _spec(checked).model
    local = is_local_model(model.path, checked.loaded.folder)
    return os.path.realpath(os.path.join(checked.loaded.folder, model.path)) if local else model.path, model.revision


def _other_environments(alone: Mapping[str, CheckedSpec]) -> Iterator[Problem]:
    """Stages with another environment than the first stage's: every stage plays the suites of all in its own."""
    first, *others = alone
    for name in others:
        if _environment(alone[name]) != _environment(alone[first]):
            message = (
                f"stage {shorten(name)} has another environment than stage {shorten(first)}, and the suites of both are "
                "played after every stage"
            )
            hint = "use one environment in all stages; kind: routed has a different one for each value of a column"
            path = ("environment",)
            yield Problem(path, message, "stage_environment", hint, alone[name].loaded.place(path))


def _environment(checked: CheckedSpec) -> Any:
    """A stage's environment, with the folder in which the paths of a user's code start."""
    environment = _spec(checked).environment
    has_path = any(specs.environments_of(environment, specs.HostedEnvironment))
    return environment, os.path.realpath(checked.loaded.folder) if has_path else None


def _ambiguous_suites(alone: Mapping[str, CheckedSpec]) -> Iterator[Problem]:
    """Suites that have one name in two stages but do not measure the same."""
    first: dict[str, tuple[str, Any]] = {}
    for stage, checked in alone.items():
        for name in _spec(checked).suites:
            meaning = _meaning(checked, name)
            before, other = first.setdefault(name, (stage, meaning))
            if other != meaning:
                message = (
                    f"suite {shorten(name)} of stage {shorten(stage)} is not the one of that name in stage "
                    f"{shorten(before)}"
                )
                path = ("evaluation", "suites", name)
                hint = (
                    "give one of them another name, or state what differs: columns and max_new_tokens that a suite does "
                    "not state are its run's"
                )
                yield Problem(path, message, "same_suite", hint, checked.loaded.place(path, at_key=True))


def _meaning(checked: CheckedSpec, name: str) -> Any:
    """What a suite measures: its rows, scores and decoding."""
    spec = _spec(checked)
    suite = spec.suites[name]
    data = data_in_full(spec, suite.data)
    limit = suite.max_new_tokens or spec.rollout.max_new_tokens
    rewards = [_reward(checked, reward) for reward in (suite.score, *suite.also)]
    folder = checked.loaded.folder if isinstance(data.source, specs.FileSource | specs.VerifiersSource) else None
    suite = evolve(suite, data=data, max_new_tokens=limit, loss_prompts=0, same_prompts="drop")
    return resolved(suite), rewards, folder and os.path.realpath(folder)


def _reward(checked: CheckedSpec, name: str) -> Any:
    """What a reward of this name is, with the folder in which the paths of a user's file start."""
    reward = _spec(checked).rewards[name]
    has_path = isinstance(reward, specs.FileReward | specs.RewardModel)
    return reward, os.path.realpath(checked.loaded.folder) if has_path else None


def _stages(spec: specs.SequenceSpec, alone: Mapping[str, CheckedSpec]) -> Iterator[Stage]:
    own = _own_suites(spec, alone)
    for name, checked in alone.items():
        others = {stage: other for stage, other in alone.items() if stage != name}
        combined = check_loaded(_with_suites_of(checked, others))
        yield Stage(name=name, checked=combined, suites=own[name])


def _with_suites_of(checked: CheckedSpec, others: Mapping[str, CheckedSpec]) -> LoadedSpec:
    """The spec as written, with the other stages' suites and the rewards that these use.

    Training drops rows whose prompt is in any of them.  A reward whose name is taken by another one gets the name of its
    stage in front.
    """
    loaded, spec = checked.loaded, _spec(checked)
    assert loaded.root is not None
    suites: dict[str, Node] = {}
    rewards: dict[str, Node] = {}
    taken = {name: _reward(checked, name) for name in spec.rewards}
    for stage, other in others.items():
        names = {}
        for name in _spec(other).rewards:
            reward = _reward(other, name)
            names[name] = name if taken.setdefault(name, reward) == reward else f"{stage}_{name}"
            taken[names[name]] = reward
        nodes = {new: _renamed(other.loaded.nodes["rewards", name], names) for name, new in names.items()}
        rewards |= {name: node for name, node in nodes.items() if name not in spec.rewards}
        for name in _spec(other).suites:
            if name not in spec.suites:
                suites.setdefault(name, _foreign_suite(other, name, names))
    added: dict[str, Any] = {"evaluation": {"suites": suites}, "rewards": rewards}
    if rewards and (only := training_reward(spec)) and next(reward_users(spec), None) is not None:
        added["reward"] = Node(only, loaded.place(("rewards", only)))  # no longer the only one
    root = merge(loaded.root, _as_node(added, loaded.root.place))
    return evolve(
        loaded, root=root, texts={**loaded.texts, **{k: v for o in others.values() for k, v in o.texts.items()}}
    )


def _renamed(reward: Node, names: Mapping[str, str]) -> Node:
    """A reward whose parts, if it is a weighted sum, have their new names."""
    if not isinstance(reward.value, dict) or "parts" not in reward.value:
        return reward
    parts = reward.value["parts"]
    renamed = evolve(parts, value={names.get(name, name): weight for name, weight in parts.value.items()})
    return evolve(reward, value={**reward.value, "parts": renamed})


def _foreign_suite(other: CheckedSpec, name: str, rewards: Mapping[str, str]) -> Node:
    """A suite of another stage as it is evaluated in this one: its columns and lengths are those of its own stage."""
    spec, suite = _spec(other), other.loaded.nodes["evaluation", "suites", name]
    items, data = dict(suite.value), suite.value["data"]
    if "columns" not in data.value and ("data", "columns") in other.loaded.nodes:
        items["data"] = evolve(data, value={**data.value, "columns": other.loaded.nodes["data", "columns"]})
    here = suite.place
    items["max_new_tokens"] = items.get("max_new_tokens", Node(spec.rollout.max_new_tokens, here, here))
    items["same_prompts"] = Node("drop", here, here)
    items["loss_prompts"] = Node(0, here, here)
    items["score"] = evolve(items["score"], value=rewards[items["score"].value])
    if "also" in items:
        also = [evolve(node, value=rewards[node.value]) for node in items["also"].value]
        items["also"] = evolve(items["also"], value=also)
    return evolve(suite, value=items)


def _as_node(data: Any, place: Place) -> Node:
    if isinstance(data, Node):
        return data
    return Node({name: _as_node(child, place) for name, child in data.items()}, place, place)


def describe(sequence: CheckedSequence) -> list[str]:
    """What the sequence does: a line for each stage, and one on what starts anew."""
    assert sequence.spec is not None
    lines = []
    for number, stage in enumerate(sequence.stages, 1):
        start = "the start model" if number == 1 else f"the weights of {sequence.stages[number - 2].name}"
        lines.append(f"stage {number}, {stage.name}: from {start}; measured by {listed(stage.suites)}")
    carried = sequence.spec.carry_over
    anew = [name for name in ("optimizer", "teacher") if name not in carried]
    if carried:
        lines.append(f"carried over from stage to stage: {', '.join(carried)}")
    if anew:
        lines.append(f"anew in every stage: {', '.join(anew)}")
    if sequence.spec.retention:
        lines.append(f"retention suites: {', '.join(sequence.spec.retention)}")
    return lines
