"""A second implementation of the losses: plain floats, plain loops, nothing shared with sdkit.losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sdkit.batches import Counts, HiddenStateScores, Tokens

Floats = Sequence[float]


def softmax(logits: Floats, temperature: float = 1.0) -> list[float]:
    scaled = [math.exp(z / temperature) for z in logits]
    return [x / sum(scaled) for x in scaled]


def top(p: Floats, k: int) -> list[int]:
    return sorted(range(len(p)), key=lambda v: -p[v])[:k]


def chosen(p: Floats, q: Floats, k: int, by: str) -> list[int]:
    first, second = top(p, k), top(q, k)
    both = first + [v for v in second if v not in first]
    return {"student": first, "teacher": second, "union": both}[by]


def cut(p: Floats, q: Floats, ids: list[int], remainder: str) -> tuple[list[float], list[float]]:
    a, b = [p[v] for v in ids], [q[v] for v in ids]
    if remainder == "tail_bucket":
        outside = [v for v in range(len(p)) if v not in ids]
        a, b = [*a, sum(p[v] for v in outside)], [*b, sum(q[v] for v in outside)]
    if remainder == "renormalize":
        a = [x / sum(a) for x in a]
    if remainder in ("renormalize", "renormalize_teacher"):
        b = [x / sum(b) for x in b]
    return a, b


def kl(first: Floats, second: Floats) -> float:
    pairs = zip(first, second, strict=True)
    return sum(p * (math.log(p) - math.log(q)) for p, q in pairs if p > 0)


def diverge(name: str, share: float, student: Floats, teacher: Floats) -> float:
    if name == "forward_kl":
        return kl(teacher, student)
    if name == "reverse_kl":
        return kl(student, teacher)
    if name == "linear_mix":
        return share * kl(teacher, student) + (1 - share) * kl(student, teacher)
    if name == "skewed_forward_kl":
        return kl(teacher, [share * t + (1 - share) * s for s, t in zip(student, teacher, strict=True)])
    if name == "skewed_reverse_kl":
        return kl(student, [share * s + (1 - share) * t for s, t in zip(student, teacher, strict=True)])
    middle = [(1 - share) * s + share * t for s, t in zip(student, teacher, strict=True)]
    return (1 - share) * kl(student, middle) + share * kl(teacher, middle)


def slope(f: Callable[[list[float]], float], at: Floats, step: float = 1e-5) -> list[float]:
    """Central differences."""

    def moved(v: int, by: float) -> list[float]:
        return [z + by * (i == v) for i, z in enumerate(at)]

    return [(f(moved(v, step)) - f(moved(v, -step))) / (2 * step) for v in range(len(at))]


@pytest.fixture(scope="session")
def naive() -> SimpleNamespace:
    return SimpleNamespace(softmax=softmax, top=top, chosen=chosen, cut=cut, kl=kl, diverge=diverge, slope=slope)


@pytest.fixture
def pair() -> SimpleNamespace:
    """The fixture of all golden values: logits of student and teacher [6], float64."""
    return SimpleNamespace(
        student=torch.tensor([2, 1, 0.5, 0, -1, -2], dtype=torch.float64, requires_grad=True),
        teacher=torch.tensor([1, 2, 0, 0.5, -0.5, -3], dtype=torch.float64),
    )


@pytest.fixture
def logits() -> SimpleNamespace:
    """Five positions of a vocabulary of seven, [5, 7] float64."""
    draw = torch.Generator().manual_seed(3)
    return SimpleNamespace(
        student=(1.5 * torch.randn(5, 7, generator=draw, dtype=torch.float64)).requires_grad_(),
        teacher=1.5 * torch.randn(5, 7, generator=draw, dtype=torch.float64),
    )


@pytest.fixture(scope="session")
def tokens_of() -> Callable[..., Tokens]:
    """Builds `Tokens` from ids, with weight 1 in the term `distil`; keywords replace its fields."""

    def build(token: Sequence[int] | Tensor, **changes: object) -> Tokens:
        ids = torch.as_tensor(token)
        fields = {
            "row": torch.zeros_like(ids),
            "weights": {"distil": torch.ones(len(ids))},
            "sampler_logprobs": None,
            "old_logprobs": None,
        }
        return Tokens(token=ids, **{**fields, **changes})  # type: ignore[arg-type]

    return build


@pytest.fixture(scope="session")
def problem_of() -> Callable[..., SimpleNamespace]:
    """Builds a micro-batch after the forward pass: hidden states, heads and ragged rows."""

    def build(lengths: Sequence[int], dtype: torch.dtype = torch.float64) -> SimpleNamespace:
        draw = torch.Generator().manual_seed(11)
        count, width, vocabulary = sum(lengths), 5, 13

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

        problem = SimpleNamespace(
            lengths=torch.tensor(lengths),
            row=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
            hidden=normal(count, width).requires_grad_(),
            head=normal(vocabulary, width).requires_grad_(),
            teacher=HiddenStateScores(hidden=normal(count, width), head=normal(vocabulary, width)),
            token=torch.randint(vocabulary, (count,), generator=draw),
            sampler_logprobs=-2 + 0.5 * normal(count).float(),
            old_logprobs=-2 + 0.5 * normal(count).float(),
            counts=Counts(
                rows=len(lengths), filled_rows=(filled := sum(n > 0 for n in lengths)), turns=filled, tokens=count
            ),
        )
        problem.reference = HiddenStateScores(hidden=normal(count, width), head=normal(vocabulary, width))
        problem.advantages = normal(len(lengths)).float()[problem.row]
        return problem

    return build
