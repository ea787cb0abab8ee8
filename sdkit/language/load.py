"""Entry point of the language package: reads and checks a spec.  A spec's content never raises; it yields problems."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from attrs import evolve, frozen

from sdkit.language.errors import Problem, by_position
from sdkit.language.overlay import LoadedSpec, load
from sdkit.language.rules import check
from sdkit.language.specs import ExperimentSpec, MethodSpec
from sdkit.language.structure import structure


@frozen(eq=False, kw_only=True)
class CheckedSpec:
    """A spec as written, the spec object built from it (None if that failed), and all problems found."""

    loaded: LoadedSpec
    spec: MethodSpec | ExperimentSpec | None
    kind: Literal["run", "method"]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no errors; warnings are allowed."""
        return self.spec is not None and not any(p.severity == "error" for p in self.problems)

    @property
    def base(self) -> Path:
        """The folder that relative paths in the spec start from, absolute."""
        return Path(self.loaded.folder).resolve()

    @property
    def texts(self) -> Mapping[str, str]:
        """File name → text, for `errors.render`."""
        return self.loaded.texts


def load_spec(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, base: str | os.PathLike[str] | None = None
) -> CheckedSpec:
    """Reads and checks a run file or a method page.  Raises UnreadableInput only if the file cannot be read.

    Relative paths in the spec start at the file's folder, or at `base` for a resolved spec stored elsewhere.
    """
    loaded = load(path, overrides, resolved=base is not None)
    if base is not None:
        loaded = evolve(loaded, folder=os.fspath(base))
    return check_loaded(loaded)


def check_loaded(loaded: LoadedSpec) -> CheckedSpec:
    """Checks a spec as written."""
    problems = list(loaded.problems)
    spec = None
    if loaded.root or not problems:
        spec, shape_problems = structure(loaded)
        # One problem per place: a value that is not valid YAML also has the wrong type.
        unreadable = {p.place for p in problems}
        problems += [p for p in shape_problems if p.place not in unreadable]
    if spec and not problems:
        problems += check(spec, loaded)
    return CheckedSpec(loaded=loaded, spec=spec, kind=loaded.kind, problems=tuple(sorted(problems, key=by_position)))


def strictly(checked: CheckedSpec) -> CheckedSpec:
    """Returns the checked spec with every warning as an error."""
    return evolve(checked, problems=tuple(evolve(problem, severity="error") for problem in checked.problems))
