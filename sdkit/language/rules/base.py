"""What a rule is (a function that yields a spec's problems, with a name, a summary and a reason), and helpers for rules."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path as Folder
from typing import Any, Literal, TypeVar

from attrs import frozen

from sdkit.language import specs
from sdkit.language.bundled import BUNDLED, PREFIX
from sdkit.language.errors import Path, did_you_mean, outside, shorten
from sdkit.language.model_shapes import shape_at
from sdkit.language.overlay import LoadedSpec
from sdkit.language.paths import is_local_model, start_of
from sdkit.language.templates import Field, TemplateError, parse
from sdkit.language.user_functions import Fault, fault_of

T = TypeVar("T")

Finding = tuple[Path, str, str | None]
"""The path of a key, the message, and an optional hint."""

ADAPTER_CONFIG = "adapter_config.json"
IS_ADAPTER = "is a PEFT adapter, not a model"
MERGE_FIRST = (
    "merge it (`sdkit export RUN --merge-lora`, or PEFT's merge_and_unload) and name the merged model's folder"
)
IS_QUANTIZED = "has quantized weights, which cannot be trained"
UNQUANTIZED = "name the original model: model.lora.quantize_base: nf4 trains adapters over 4 bits of it"


@frozen(eq=False)
class Context:
    """What a rule can read besides the spec: which keys the user wrote, and which files exist."""

    loaded: LoadedSpec

    def stated(self, path: Path, value: Any, name: str | None = None) -> str:
        """`top_p is 0.9`, followed by `by default` if the user did not write it."""
        default = "" if self.loaded.written(path) else " by default"
        return f"{name or path[-1]} is {shorten(value)}{default}"

    def file(self, path: str) -> str:
        """A path from the spec, resolved against the spec's folder."""
        return os.path.join(self.loaded.folder, path)

    def start_of(self, where: Path, path: str) -> str | None:
        """A hint: where the relative path at a key starts; None for an absolute path."""
        return None if os.path.isabs(path) else start_of(self.loaded, where)[1]


@frozen(eq=False)
class Rule:
    """One check across fields."""

    code: str
    summary: str
    severity: Literal["error", "warning"]
    check: Callable[[Any, Context], Iterator[Finding]]
    runs_only: bool

    @property
    def reason(self) -> str:
        """Why the rule exists: its function's docstring, on one line."""
        return " ".join((self.check.__doc__ or "").split())


MethodCheck = Callable[[specs.MethodSpec, Context], Iterator[Finding]]
RunCheck = Callable[[specs.ExperimentSpec, Context], Iterator[Finding]]


def method_rule(summary: str, severity: Literal["error", "warning"] = "error") -> Callable[[MethodCheck], Rule]:
    """Decorator: a rule over methods.  The function's name is the rule's code, its docstring the reason."""
    return lambda check: Rule(check.__name__, summary, severity, check, False)


def run_rule(summary: str, severity: Literal["error", "warning"] = "error") -> Callable[[RunCheck], Rule]:
    """Decorator: a rule over run files, which a method page alone cannot break."""
    return lambda check: Rule(check.__name__, summary, severity, check, True)


def terms(spec: specs.MethodSpec, *kinds: type[T]) -> Iterator[tuple[Path, T]]:
    """The loss terms of these classes, each with its path."""
    for name, term in spec.losses.items():
        if isinstance(term, kinds):
            yield ("losses", name), term


def reward_advantages(spec: specs.MethodSpec) -> Iterator[tuple[Path, specs.GroupRelative]]:
    """The reward advantages of the policy gradients, each with its path."""
    for path, term in terms(spec, specs.PolicyGradient):
        if part := term.advantage.group_relative:
            inner = () if part is term.advantage else ("group_relative",)
            yield (*path, "advantage", *inner), part


def log_ratios(spec: specs.MethodSpec) -> Iterator[tuple[Path, specs.PolicyGradient, specs.LogRatio]]:
    """The teacher's log-ratios in the advantages of policy gradients, each with its path and its term."""
    for path, term in terms(spec, specs.PolicyGradient):
        if part := term.advantage.log_ratio:
            inner = () if part is term.advantage else ("log_ratio",)
            yield (*path, "advantage", *inner), term, part


def k2_terms(spec: specs.MethodSpec) -> list[Path]:
    """Paths of the terms that estimate the KL to the reference from the sampled token."""
    return [path for path, term in terms(spec, specs.ReferenceKl) if term.estimator == "k2"]


def of_teacher(spec: specs.MethodSpec) -> list[tuple[Path, specs.LossSpec]]:
    """The terms whose loss needs the teacher, each with its path."""
    return [(path, term) for path, term in terms(spec, specs.LossSpec) if term.needs_teacher]


def consultations(spec: specs.MethodSpec) -> Iterator[tuple[Path, str]]:
    """Masks and weights that need the teacher in terms whose loss does not, each with the statistic it needs."""
    for path, term in terms(spec, specs.LossSpec):
        for statistic, key in () if term.needs_teacher else term.statistics():
            model, _, quantity = statistic.partition("_")
            if model == "teacher":
                yield (*path, *key), f"teacher's {quantity.replace('logprobs', 'log-probabilities')}"


def slots(spec: specs.MethodSpec, *kinds: type[T]) -> Iterator[tuple[Path, T]]:
    """The slots of these classes in the teacher's context and in the question to its writer, each with its path."""
    for path, slot in spec.placed_slots():
        if isinstance(slot, kinds):
            yield path, slot


def adds_no_view(sees: specs.Sees | None) -> bool:
    """Whether the teacher's prompt equals the student's: no context, or a user turn with the prompt alone."""
    if sees is None:
        return True
    # unused_slot reports slots that the template does not use; contexts of other kinds have text.
    if not isinstance(sees, specs.UserTurn) or sees.slots:
        return False
    try:
        parts = parse(sees.template)
    except TemplateError:
        return False
    return [part for part in parts if not isinstance(part, str) or part.strip()] == [Field("prompt")]


def data_of(spec: specs.ExperimentSpec) -> Iterator[tuple[Path, specs.DataSpec]]:
    """The training data and the data of every suite, each with its path."""
    yield ("data",), spec.data
    for path, _, suite in spec.placed_suites():
        yield (*path, "data"), suite.data


def columns_of(spec: specs.ExperimentSpec, data: specs.DataSpec) -> Mapping[str, Any]:
    """The columns of a data set; a suite without columns uses those of the training data."""
    return data.columns or spec.data.columns or {}


def total_updates(spec: specs.ExperimentSpec) -> int | None:
    """The run's number of optimizer steps; None if the spec gives epochs."""
    steps = spec.training.steps
    return steps and steps * spec.training.updates_per_rollout


def shape_of(spec: specs.ExperimentSpec, context: Context) -> specs.ShapeSpec | None:
    """The model's shape, if the spec states it or the model is bundled or local."""
    return spec.model.shape or shape_at(spec.model.path, Folder(context.loaded.folder))


def not_plain(where: Path, name: str) -> Iterator[Finding]:
    """A finding for a name that metric names, file names or overrides could not have."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", name):
        yield where, f"{shorten(name)} is not a plain name", "use letters, digits, _ and -, a letter first"


def at_user_file(where: Path, context: Context, file: str, fault: Fault | None) -> Iterator[Finding]:
    """The finding for a fault of a user's file; `where` is the path of the spec that names it."""
    if fault:
        key, message, hint = fault
        there = key != "file" or os.path.exists(context.file(file))
        yield (*where, key), message, hint if there else context.start_of((*where, key), file)


def pattern_fault(pattern: str) -> str | None:
    """Why a regular expression cannot be read; None if it can."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"not a regular expression: {error}"
    return None


def uncallable(
    where: Path,
    context: Context,
    user: specs.FileDivergence | specs.FileReward | specs.FileWeight,
    *values: str,
    given: Sequence[str] = (),
) -> Iterator[Finding]:
    """A finding if a user's function is missing or does not take these arguments; `user` is the spec at `where`."""
    yield from at_user_file(
        where, context, user.file, fault_of(context.file(user.file), user.file, user.function, values, given)
    )


def unknown_bundled(where: Path, path: str) -> Iterator[Finding]:
    """A finding for a `bundled:NAME` that does not exist."""
    if path.startswith(PREFIX) and path.removeprefix(PREFIX) not in BUNDLED:
        names = [PREFIX + name for name in BUNDLED]
        yield where, f"{shorten(path)} {outside(names)}", did_you_mean(path, names)


def no_model(where: Path, path: str, context: Context) -> Iterator[Finding]:
    """A finding for a local path that contains no model."""
    folder = context.file(path)
    if not is_local_model(path, context.loaded.folder):
        return
    if not os.path.isdir(folder):
        yield where, f"there is no folder {path}", context.start_of(where, path)
    elif os.path.isfile(os.path.join(folder, ADAPTER_CONFIG)):
        yield where, f"folder {path} {IS_ADAPTER}", MERGE_FIRST
    elif not os.path.isfile(os.path.join(folder, "config.json")):
        yield where, f"folder {path} has no config.json, so it is no model", None
