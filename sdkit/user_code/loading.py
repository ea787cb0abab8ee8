"""The base of user-defined functions: loads the function, calls it, and names it in every error."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, TypeVar

from sdkit.language.errors import BadData
from sdkit.language.specs import FileDivergence, FileWeight
from sdkit.language.user_functions import failure, load_function

Spec = TypeVar("Spec", FileDivergence, FileWeight)


class UserFunction(Generic[Spec]):
    """A function from a user's file.  Raises BadData if it cannot be loaded or fails."""

    def __init__(self, spec: Spec, base: Path) -> None:
        self.spec = spec
        self._path = (base / spec.file).resolve()
        self._function = load_function(self._path, spec.file, spec.function)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._function(*args, **kwargs)
        except (Exception, SystemExit) as error:
            message = f"{self.spec.function} failed"
            raise failure(message, self._path, self.spec.file, error) from error

    def _error(self, problem: str, hint: str | None = None) -> BadData:
        return BadData(f"{self.spec.function} in {self.spec.file} {problem}", hint=hint)
