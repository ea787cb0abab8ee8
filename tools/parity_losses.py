"""Formulas of a token's loss, in plain Python numbers: what tools/parity_figures.py makes its figures of.

A number with a gradient is complex; what carries none is `held`.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Mapping, Sequence
from typing import Any

Number = complex


def held(x: Number) -> float:
    """The number without its gradient."""
    return complex(x).real


def lesser(a: Number, b: Number) -> Number:
    """The smaller, and its gradient; of equals the first."""
    return a if held(a) <= held(b) else b


def greater(a: Number, b: Number) -> Number:
    """The larger, and its gradient; of equals the first."""
    return a if held(a) >= held(b) else b


def softmax(logits: Sequence[Number], temperature: float) -> list[Number]:
    """Probabilities [V]."""
    powers = [cmath.exp(z / temperature) for z in logits]
    return [x / sum(powers) for x in powers]


def entropy(p: Sequence[Number]) -> float:
    """−Σ p log p."""
    return -sum(held(x) * math.log(held(x)) for x in p)


def kl(p: Sequence[Number], q: Sequence[Number]) -> Number:
    """Σ p log(p / q)."""
    return sum(a * (cmath.log(a) - cmath.log(b)) for a, b in zip(p, q, strict=True))


def mixed(p: Sequence[Number], q: Sequence[Number], share: float) -> list[Number]:
    """(1 − share) p + share q."""
    return [(1 - share) * a + share * b for a, b in zip(p, q, strict=True)]


def kind(spec: Any) -> str:
    """Of a union's member, written with keys or bare; of a user's function, its name."""
    found = spec if isinstance(spec, str) else keys(spec).get("kind", "")
    return keys(spec)["function"] if found == "file" else found


def keys(spec: Any) -> Mapping[str, Any]:
    """A member's keys."""
    return {} if isinstance(spec, str) or spec is None else spec


def on_support(s: list[Number], t: list[Number], support: Any) -> tuple[Sequence[Number], Sequence[Number]]:
    """Both sides on the support, after the remainder rule."""
    if kind(support) == "vocabulary":
        return s, t
    by = {"student": [s], "teacher": [t], "union": [s, t]}[support["chosen_by"]]
    largest = [sorted(range(len(p)), key=lambda v, p=p: -held(p[v]))[: support["k"]] for p in by]
    ids = sorted({v for chosen in largest for v in chosen})
    a, b = [s[v] for v in ids], [t[v] for v in ids]
    match support["remainder"]:
        case "tail_bucket":
            rest = [v for v in range(len(s)) if v not in ids]
            return [*a, sum(s[v] for v in rest)], [*b, sum(t[v] for v in rest)]
        case "renormalize":
            return [x / sum(a) for x in a], [x / sum(b) for x in b]
        case "renormalize_teacher":
            return a, [x / sum(b) for x in b]
        case _:
            return a, b


def bounded_kl(s: Sequence[Number], t: Sequence[Number], forward: bool, term: Any) -> Number:
    """A KL whose log-ratios and entries are bounded; of the reverse one the weights may be held."""
    clip, total = keys(term.get("clip")), 0j
    low, high = clip.get("log_ratio", (-math.inf, math.inf))
    for a, b in zip(s, t, strict=True):
        ratio = greater(lesser(cmath.log(a) - cmath.log(b), high), low)
        entry = lesser(-b * ratio if forward else a * ratio, clip.get("entry", math.inf))
        if not forward and keys(term["divergence"]).get("detach_weights"):
            entry = held(entry) * (1 + cmath.log(a) - cmath.log(held(a)))
        total += entry
    return total


def divergence(term: Any, s: Sequence[Number], t: Sequence[Number]) -> Number:
    """How far apart the two sides are on the support."""
    own = keys(term["divergence"])
    match kind(term["divergence"]):
        case "forward_kl":
            return bounded_kl(s, t, True, term)
        case "reverse_kl":
            return bounded_kl(s, t, False, term)
        case "jsd":
            share = own.get("teacher_share", 0.5)
            middle = mixed(s, t, share)
            return (1 - share) * kl(s, middle) + share * kl(t, middle)
        case "linear_mix":
            share = own.get("forward_share", 0.5)
            return share * kl(t, s) + (1 - share) * kl(s, t)
        case "skewed_forward_kl":
            return kl(t, mixed(s, t, own.get("share", 0.1)))
        case "skewed_reverse_kl":
            return kl(s, mixed(t, s, own.get("share", 0.1)))
        case "squared":
            return sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
        case other:
            raise KeyError(other)


def distillation(term: Any, s: list[Number], t: list[Number], y: int) -> Number:
    """The loss of a token; s and t are at the term's temperature."""
    clip = keys(term.get("clip"))
    if kind(term["support"]) == "sampled_token":
        low, high = clip.get("log_ratio", (-math.inf, math.inf))
        weight = held(cmath.log(s[y]) - cmath.log(t[y]))
        return min(max(weight, low), high) * cmath.log(s[y])
    found = divergence(term, *on_support(s, t, term["support"]))
    return lesser(found, clip.get("token", math.inf))
