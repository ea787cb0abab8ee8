"""A user's own function as the weight of tokens: loaded, tried out before training, and never believed unseen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sdkit.language.errors import BadData, blaming
from sdkit.language.required_statistics import weight_of
from sdkit.language.specs import FileWeight, LossSpec
from sdkit.language.user_functions import failure, load_function

Features = Mapping[str, Tensor]
"""What a weight is made of, by name: [N, T], or [N] for `length` and `reward`; float64."""


class UserWeight:
    """The function of one term.  Raises BadData where it cannot be loaded, fails, or returns what is no weight."""

    def __init__(self, spec: FileWeight, base: Path) -> None:
        self.spec = spec
        self.path = (base / spec.file).resolve()
        self.function = load_function(self.path, spec.file, spec.function)

    def __call__(self, counts: Tensor, features: Features) -> Tensor:
        """counts [N, T] bool, features at least those of `given` -> [N, T] float64, 0 where nothing counts."""
        given = {name: features[name].clone() for name in self.spec.given}
        try:
            with torch.no_grad():
                found = self.function(counts.clone(), **given)
        except (Exception, SystemExit) as error:
            what = f"{self.spec.function} failed"
            raise failure(what, self.path, self.spec.file, error) from error
        return self._read(found, counts)

    def _read(self, found: object, counts: Tensor) -> Tensor:
        rows, width = counts.shape
        wanted = f"a tensor [{rows}, {width}] of finite numbers of at least 0"
        if not isinstance(found, Tensor):
            raise self._refused(f"returned {type(found).__name__}, not {wanted}")
        if found.shape != counts.shape:
            raise self._refused(f"returned a tensor {list(found.shape)}, not {wanted}")
        if found.is_complex():
            raise self._refused(f"returned complex numbers, not {wanted}")
        weights = found.detach().cpu().double().masked_fill(~counts, 0.0)
        bad = ~weights.isfinite() | (weights < 0)
        if bad.any():
            row, place = bad.nonzero()[0].tolist()
            value = weights[row, place].item()
            raise self._refused(
                f"returned {value:g} for rollout {row}, token {place}, not {wanted}"
            )
        return weights

    def _refused(self, what: str, hint: str | None = None) -> BadData:
        return BadData(f"{self.spec.function} in {self.spec.file} {what}", hint=hint)

    def try_out(self) -> None:
        """Made-up rollouts of several lengths: the result must not depend on padding, on chance, nor, with
        `rows: rollout`, on other rollouts.
        """
        counts, features = _made_up()
        whole = self(counts, features)
        self._same(whole, self(counts, features), "returns something else when called again")
        wider = self(_padded(counts), {name: _padded(x) for name, x in features.items()})
        self._same(whole, wider[:, : counts.shape[1]], "depends on padding", "look at counts")
        if self.spec.rows == "group":
            return
        for row in range(len(counts)):
            one = slice(row, row + 1)
            alone = self(counts[one], {name: x[one] for name, x in features.items()})
            told = "gives a rollout other weights beside other rollouts"
            self._same(whole[one], alone, told, "set rows: group, or use each row alone")

    def _same(self, a: Tensor, b: Tensor, what: str, hint: str | None = None) -> None:
        if not torch.allclose(a, b, rtol=1e-5, atol=1e-7):
            raise self._refused(what, hint)


def open_user_weights(losses: Mapping[str, LossSpec], base: Path) -> dict[str, UserWeight]:
    """The users' functions among the terms' weights, by term, each tried out."""
    found: dict[str, UserWeight] = {}
    for name, term in losses.items():
        if isinstance(weight := weight_of(term), FileWeight):
            with blaming("losses", name, "weight"):
                found[name] = UserWeight(weight, base)
                found[name].try_out()
    return found


def _made_up() -> tuple[Tensor, Features]:
    """Five rollouts of up to seven tokens, one without any, one that counts from its third."""
    draw = torch.Generator().manual_seed(0)
    length = torch.tensor([7, 3, 0, 5, 1])
    position = torch.arange(7).expand(5, 7)
    counts = position < length[:, None]
    counts[3, :2] = False

    def numbers() -> Tensor:
        return torch.rand(5, 7, generator=draw, dtype=torch.float64) * 3 * counts

    return counts, {
        "position": position.double() * counts,
        "length": length.double(),
        "reward": torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0], dtype=torch.float64),
        "student_logprobs": -numbers(),
        "student_entropy": numbers(),
        "teacher_logprobs": -numbers(),
        "teacher_entropy": numbers(),
    }


def _padded(values: Tensor) -> Tensor:
    """Three more columns of nothing; what has one number a rollout stays as it is."""
    return torch.nn.functional.pad(values, (0, 3)) if values.dim() == 2 else values
