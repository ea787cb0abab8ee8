"""User-defined token weights: loaded, tried out before training, checked at every call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdkit.language.errors import blaming
from sdkit.language.specs import FileWeight, Loss
from sdkit.language.user_functions import UserFunction

Features = Mapping[str, Tensor]
"""Inputs of a weight, by name: [N, T], or [N] for `length` and `reward`; float64."""


class UserWeight(UserFunction):
    """The weight of one term.  Raises BadData if it cannot be loaded, fails or returns invalid weights."""

    def __init__(self, spec: FileWeight, base: Path) -> None:
        super().__init__(spec.file, spec.function, base)
        self.spec = spec

    def __call__(self, counts: Tensor, features: Features) -> Tensor:
        """counts [N, T] bool, features at least those of `given` -> [N, T] float64, 0 at tokens that do not count."""
        given: dict[str, Any] = {name: features[name].clone() for name in self.spec.given}
        with torch.no_grad():
            result = self.call(counts.clone(), **given)
        return self._validate(result, counts)

    def _validate(self, result: object, counts: Tensor) -> Tensor:
        rows, width = counts.shape
        expected = f"a tensor [{rows}, {width}] of finite numbers of at least 0"
        if not isinstance(result, Tensor):
            raise self.error(f"returned {type(result).__name__}, not {expected}")
        if result.shape != counts.shape:
            raise self.error(f"returned a tensor {list(result.shape)}, not {expected}")
        if result.is_complex():
            raise self.error(f"returned complex numbers, not {expected}")
        weights = result.detach().cpu().double().masked_fill(~counts, 0.0)
        invalid = ~weights.isfinite() | (weights < 0)
        if invalid.any():
            row, place = invalid.nonzero()[0].tolist()
            value = weights[row, place].item()
            raise self.error(f"returned {value:g} for rollout {row}, token {place}, not {expected}")
        return weights

    def try_out(self) -> None:
        """Calls the function on made-up rollouts of several lengths.

        Raises BadData if the weights depend on padding or on chance, or, with `rows: rollout`, on other rollouts.
        """
        counts, features = _made_up_rollouts()
        weights = self(counts, features)
        self._check_equal(weights, self(counts, features), "returns something else when called again")
        wider = self(_padded(counts), {name: _padded(x) for name, x in features.items()})
        self._check_equal(weights, wider[:, : counts.shape[1]], "depends on padding", "look at counts")
        if self.spec.rows == "group":
            return
        for row in range(len(counts)):
            one = slice(row, row + 1)
            alone = self(counts[one], {name: x[one] for name, x in features.items()})
            problem = "gives a rollout different weights when other rollouts are present"
            self._check_equal(weights[one], alone, problem, "set rows: group, or use each row alone")

    def _check_equal(self, a: Tensor, b: Tensor, problem: str, hint: str | None = None) -> None:
        if not torch.allclose(a, b, rtol=1e-5, atol=1e-7):
            raise self.error(problem, hint)


def open_user_weights(losses: Mapping[str, Loss], base: Path) -> dict[str, UserWeight]:
    """Loads and tries out the user-defined weights of the terms; returns them by term."""
    weights: dict[str, UserWeight] = {}
    for name, term in losses.items():
        if isinstance(weight := term.token_weight, FileWeight):
            with blaming("losses", name, "weight"):
                weights[name] = UserWeight(weight, base)
                weights[name].try_out()
    return weights


def _made_up_rollouts() -> tuple[Tensor, Features]:
    """Five rollouts of up to seven tokens, one empty, one whose first two tokens do not count."""
    draw = torch.Generator().manual_seed(0)
    length = torch.tensor([7, 3, 0, 5, 1])
    position = torch.arange(7).expand(5, 7)
    counts = position < length[:, None]
    counts[3, :2] = False

    def numbers() -> Tensor:
        return torch.rand(5, 7, generator=draw, dtype=torch.float64) * 3 * counts

    return counts, {
        "position": position.double() * counts,
        "turn": (1 + position // 3).double() * counts,
        "length": length.double(),
        "reward": torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0], dtype=torch.float64),
        "student_logprobs": -numbers(),
        "student_entropy": numbers(),
        "teacher_logprobs": -numbers(),
        "teacher_entropy": numbers(),
    }


def _padded(values: Tensor) -> Tensor:
    """Appends three columns of zeros to [N, T]; [N] stays as it is."""
    return torch.nn.functional.pad(values, (0, 3)) if values.dim() == 2 else values
