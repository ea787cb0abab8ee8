"""The door of floor 0: a path in, a checked spec out.  Never raises for what a spec says."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal

from attrs import evolve, frozen

from sdkit.language.errors import Problem, by_position
from sdkit.language.overlay import LoadedSpec, load
from sdkit.language.rules import check
from sdkit.language.specs import ExperimentSpec, MethodSpec
from sdkit.language.structure import structure_method, structure_run


@frozen(eq=False, kw_only=True)
class CheckedSpec:
    """A spec as written, as structured (None if it has shape problems), and all that is wrong with it."""

    loaded: LoadedSpec
    spec: MethodSpec | ExperimentSpec | None
    kind: Literal["run", "method"]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """No errors; warnings do not count."""
        return self.spec is not None and not any(p.severity == "error" for p in self.problems)

    @property
    def texts(self) -> Mapping[str, str]:
        """File name → text, for `problems.render`."""
        return self.loaded.texts


def load_spec(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    base: str | os.PathLike[str] | None = None,
) -> CheckedSpec:
    """Read and check a run file or a method page; UnreadableInput only where the file cannot be read.

    Paths in the spec start at the file's folder, or at `base` (for a resolved spec that stands elsewhere).
    """
    loaded = load(path, overrides, resolved=base is not None)
    if base is not None:
        loaded = evolve(loaded, folder=os.fspath(base))
    problems = list(loaded.problems)
    spec = None
    if loaded.root or not problems:
        spec, found = (structure_run if loaded.kind == "run" else structure_method)(loaded)
        # What cannot be read as YAML need not be of the right type.
        unreadable = {p.place for p in problems}
        problems += [p for p in found if p.place not in unreadable]
    if spec and not problems:
        problems += check(spec, loaded)
    return CheckedSpec(
        loaded=loaded,
        spec=spec,
        kind=loaded.kind,
        problems=tuple(sorted(problems, key=by_position)),
    )
