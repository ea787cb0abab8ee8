"""User-defined divergences: loaded, put through the self-test of the built-in ones, checked at every call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sdkit.language.errors import Path as Blame
from sdkit.language.errors import blaming
from sdkit.language.specs import Distillation, FileDivergence, Loss
from sdkit.language.user_functions import UserFunction
from sdkit.losses.selftest import find_problems


class UserDivergence(UserFunction):
    """The divergence of one term.  Raises BadData if it cannot be loaded, fails or returns a wrong shape."""

    def __init__(self, spec: FileDivergence, base: Path, blame: Blame = ()) -> None:
        """`blame` is the key of the spec that names the function."""
        super().__init__(spec.file, spec.function, base)
        self.spec = spec
        self.blame = blame

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Log-probabilities [C, K], [C, K] -> [C]."""
        shape = student.shape[:-1]
        with blaming(*self.blame):
            result = self.call(student, teacher)
            if not isinstance(result, Tensor) or result.shape != shape:
                got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise self.error(f"returned {got}, not a tensor {list(shape)}")
        return result

    def try_out(self) -> None:
        """Raises BadData with everything that is wrong with the function."""
        spec = self.spec
        problems = list(find_problems(self, zero_when_equal=spec.zero_when_equal, exact_gradient=spec.exact_gradient))
        if problems:
            raise self.error("; ".join(problems))


def open_user_divergences(losses: Mapping[str, Loss], base: Path) -> dict[str, UserDivergence]:
    """Loads and tests the user-defined divergences of the terms; returns them by term."""
    divergences: dict[str, UserDivergence] = {}
    for name, term in losses.items():
        if isinstance(term, Distillation) and isinstance(term.divergence, FileDivergence):
            blame = ("losses", name, "divergence")
            with blaming(*blame):
                divergences[name] = UserDivergence(term.divergence, base, blame)
                divergences[name].try_out()
    return divergences
