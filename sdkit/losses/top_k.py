"""The top-k support of a distillation term, for a local teacher and for a served one.

Both functions return student and teacher on the support, and metrics of the probability that it covers.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor

from sdkit.language.specs import TopKSupport
from sdkit.losses import support as supports
from sdkit.losses.distributions import Distributions
from sdkit.losses.policy_terms import LossMetrics
from sdkit.losses.support import mass, on_support, overlap, top_k_ids, union_ids


def on_top_k(support: TopKSupport, student: Tensor, teacher: Tensor) -> tuple[tuple[Tensor, Tensor], LossMetrics]:
    """Restricts both sides to the support that `support` selects.  [C, V], [C, V] -> twice [C, K]."""
    ids, duplicate, shares = _top_k(support, student.detach(), teacher)
    return on_support(student, teacher, ids, duplicate, support.remainder), shares


def on_served_top_k(
    support: TopKSupport, sides: Distributions, temperature: float
) -> tuple[tuple[Tensor, Tensor], LossMetrics]:
    """`on_top_k` for a teacher known only by its own top k, at temperature 1.

    Renormalised, these may be used at a temperature τ, since log T / τ is known up to a constant.  Raises ValueError for
    what they do not contain: another side's choice, more tokens, the remaining mass at another temperature.
    """
    served, student, k = sides.top_k, sides.student(temperature), support.k
    assert served is not None
    if support.chosen_by != "teacher" or k > served.ids.shape[-1]:
        raise ValueError(
            f"the teacher returned its own top {served.ids.shape[-1]}, not the {support.chosen_by}'s top {k}"
        )
    if temperature != 1 and support.remainder in ("tail_bucket", "drop"):
        raise ValueError(f"the teacher's top k at temperature 1 have no {support.remainder} at {temperature:g}")
    ids, teacher = served.ids[:, :k], served.logprobs[:, :k].to(student.dtype)
    absent = teacher == -math.inf
    # Padding gets ids that no student token has.
    teacher_ids = torch.where(absent, -1 - torch.arange(k, device=ids.device), ids)
    shares = {
        "student_mass": mass(student.detach(), ids, absent),
        "overlap": overlap(top_k_ids(student, k), teacher_ids),
    }
    if temperature == 1:
        shares["teacher_mass"] = teacher.exp().sum(-1)
    pair = supports.on_served_top_k(student, teacher / temperature, ids, support.remainder)
    return pair, shares


def _top_k(support: TopKSupport, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, LossMetrics]:
    """Returns ids [C, K] long, duplicate [C, K] bool, and the metrics of the support."""
    student_ids, teacher_ids = top_k_ids(student, support.k), top_k_ids(teacher, support.k)
    match support.chosen_by:
        case "student":
            ids, duplicate = student_ids, torch.zeros_like(student_ids, dtype=torch.bool)
        case "teacher":
            ids, duplicate = teacher_ids, torch.zeros_like(teacher_ids, dtype=torch.bool)
        case "union":
            ids, duplicate = union_ids(student_ids, teacher_ids)
        case _:
            assert_never(support.chosen_by)
    shares = {
        "student_mass": mass(student, ids, duplicate),
        "teacher_mass": mass(teacher, ids, duplicate),
        "overlap": overlap(student_ids, teacher_ids),
    }
    return ids, duplicate, shares
