"""A user's own function as a divergence: loaded, held to the built-in ones' self-test, and checked at every call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sdkit.language.errors import BadData, blaming
from sdkit.language.errors import Path as Blame
from sdkit.language.specs import Distillation, FileDivergence, LossSpec
from sdkit.language.user_functions import failure, load_function
from sdkit.losses.selftest import faults


class UserDivergence:
    """The function of one term.  Raises BadData where it cannot be loaded, fails, or returns what is no divergence."""

    def __init__(self, spec: FileDivergence, base: Path, blame: Blame = ()) -> None:
        """`blame` is the key of the spec that names the function."""
        self.spec = spec
        self.blame = blame
        self.path = (base / spec.file).resolve()
        self.function = load_function(self.path, spec.file, spec.function)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Log-probabilities [C, K], [C, K] -> [C]."""
        with blaming(*self.blame):
            return self._called(student, teacher)

    def _called(self, student: Tensor, teacher: Tensor) -> Tensor:
        try:
            found = self.function(student, teacher)
        except (Exception, SystemExit) as error:
            what = f"{self.spec.function} failed"
            raise failure(what, self.path, self.spec.file, error) from error
        if not isinstance(found, Tensor) or found.shape != student.shape[:-1]:
            returned = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise self._refused(f"returned {returned}, not a tensor {list(student.shape[:-1])}")
        return found

    def try_out(self) -> None:
        """Raises BadData with everything that is wrong."""
        spec = self.spec
        found = list(
            faults(self, zero_when_equal=spec.zero_when_equal, exact_gradient=spec.exact_gradient)
        )
        if found:
            raise self._refused("; ".join(found))

    def _refused(self, what: str) -> BadData:
        return BadData(f"{self.spec.function} in {self.spec.file} {what}")


def open_user_divergences(losses: Mapping[str, LossSpec], base: Path) -> dict[str, UserDivergence]:
    """The users' functions among the terms' divergences, by term, each tried out."""
    found: dict[str, UserDivergence] = {}
    for name, term in losses.items():
        if isinstance(term, Distillation) and isinstance(term.divergence, FileDivergence):
            blame = ("losses", name, "divergence")
            with blaming(*blame):
                found[name] = UserDivergence(term.divergence, base, blame)
                found[name].try_out()
    return found
