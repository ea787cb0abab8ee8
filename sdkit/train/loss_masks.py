"""Which tokens each loss term counts, and what they weigh: settled once per rollout batch, before its first update.

Shares, means and pass rates are those of the whole batch on all ranks, also where it is then dealt into several
updates: so a token's place in them depends neither on the dealing nor on micro-batches.  Scalars that move have their
value at the batch's first update.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, assert_never

import torch
from attrs import evolve, frozen
from torch import Tensor

from sdkit.batches import LossMask, Rollout, RolloutBatch
from sdkit.language.errors import blaming
from sdkit.language.required_statistics import (
    Statistic,
    floor_that_leaves_out,
    needs_teacher_scores,
    weight_of,
)
from sdkit.language.schedules import plain
from sdkit.language.specs import (
    DriftWeight,
    FileWeight,
    Given,
    LossSpec,
    PassRateWeight,
    PerplexityWeight,
    PositionWeight,
    RouteSpec,
    TeacherEntropyWeight,
    Weight,
)
from sdkit.losses import token_weights
from sdkit.losses.objective import unmasked_span

AllGather = Callable[[Tensor], tuple[Tensor, slice]]
"""The values of all ranks, and where this rank's stand among them (`ranks.everywhere`)."""
UserFunction = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""Which tokens count [N, T] bool, and features by name -> weights [N, T] float64."""


def build_loss_masks(
    batch: RolloutBatch,
    losses: Mapping[str, LossSpec],
    *,
    everywhere: AllGather,
    route: RouteSpec | None = None,
    special: Collection[int] = (),
    functions: Mapping[str, UserFunction] | None = None,
) -> RolloutBatch:
    """The rollouts, each with the tokens that every term counts.

    `functions` are the users' own weights, by term.  Raises ValueError where a term is made of a measure that was not taken, or of a reward that is not known.
    """
    rollouts = [evolve(r, branch=route and branch_of(route, r)) for r in batch]
    found = {
        name: _term_masks(
            name, term, rollouts, everywhere, route, special, (functions or {}).get(name)
        )
        for name, term in losses.items()
    }
    return RolloutBatch(
        rollouts=tuple(
            evolve(r, counted={name: tokens[i] for name, tokens in found.items()})
            for i, r in enumerate(rollouts)
        )
    )


def branch_of(route: RouteSpec, rollout: Rollout) -> Literal["then", "otherwise"]:
    """Which terms of the route count the rollout."""
    if rollout.reward is None:
        raise ValueError("a route needs the rollouts' rewards")
    failed = rollout.reward < route.threshold
    with_context = rollout.teacher_prompt_ids is not None
    match route.when:
        case "failed":
            return "then" if failed else "otherwise"
        case "failed_with_context":
            return "then" if failed and with_context else "otherwise"
        case _:
            assert_never(route.when)


def _term_masks(
    name: str,
    term: LossSpec,
    rollouts: Sequence[Rollout],
    everywhere: AllGather,
    route: RouteSpec | None,
    special: Collection[int],
    function: UserFunction | None,
) -> list[LossMask]:
    spans = [_span(name, term, r, route) for r in rollouts]
    tokens = _apply_mask(term, _Tokens.of(rollouts, spans), everywhere, special)
    weight = weight_of(term)
    with blaming("losses", name, "weight"):
        weights = None if weight is None else _weights(weight, tokens, everywhere, function)
    return tokens.split(weights)


def _span(name: str, term: LossSpec, rollout: Rollout, route: RouteSpec | None) -> range:
    """The stretch of the completion that the term's mask leaves; empty where the rollout is not the term's."""
    elsewhere = {"then": "otherwise", "otherwise": "then"}
    routed_away = route and rollout.branch and name in getattr(route, elsewhere[rollout.branch])
    if routed_away or (needs_teacher_scores(term) and rollout.teacher_prompt_ids is None):
        return range(0)
    return unmasked_span(term.mask, len(rollout.completion_ids))


@frozen(eq=False)
class _Tokens:
    """The tokens of one term: rollout after rollout, each in order."""

    rollouts: Sequence[Rollout]
    row: Tensor  # [M] long; place of the rollout
    place: Tensor  # [M] long; position in the completion

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], spans: Sequence[range]) -> _Tokens:
        sizes = torch.tensor([len(s) for s in spans], dtype=torch.long)
        places = [torch.arange(s.start, s.stop) for s in spans]
        return cls(
            rollouts,
            torch.arange(len(spans)).repeat_interleave(sizes),
            torch.cat(places) if places else sizes,
        )

    def select(self, keep: Tensor) -> _Tokens:
        return _Tokens(self.rollouts, self.row[keep], self.place[keep])

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, [N] long."""
        return torch.tensor([len(r.completion_ids) for r in self.rollouts], dtype=torch.long)

    def ids(self) -> Tensor:
        """The tokens themselves, [M] long."""
        return self._picked([r.completion_ids for r in self.rollouts], torch.long)

    def statistic(self, name: Statistic) -> Tensor:
        """[M] float64.  Raises ValueError where it was not taken of a rollout with tokens here."""
        present = set(self.row.unique().tolist())
        if any(name not in self.rollouts[i].measures for i in present):
            raise ValueError(f"{name} was not measured")
        values = [
            r.token_statistics[name] if i in present else (0.0,) * len(r.completion_ids)
            for i, r in enumerate(self.rollouts)
        ]
        return self._picked(values, torch.float64)

    def _picked(self, values: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        starts = self.lengths.cumsum(0) - self.lengths
        flat = torch.tensor([x for each in values for x in each], dtype=dtype)
        return flat[starts[self.row] + self.place]

    def split(self, weights: Tensor | None) -> list[LossMask]:
        """The tokens of each rollout, with their weights."""
        sizes = torch.bincount(self.row, minlength=len(self.rollouts)).tolist()
        places = self.place.split(sizes)
        worth = [None] * len(sizes) if weights is None else weights.split(sizes)
        return [
            LossMask(positions=tuple(p.tolist()), weights=None if w is None else tuple(w.tolist()))
            for p, w in zip(places, worth, strict=True)
        ]


def _apply_mask(
    term: LossSpec, tokens: _Tokens, everywhere: AllGather, special: Collection[int]
) -> _Tokens:
    """What else the mask leaves out; the share of largest entropies last, over the tokens that are left then."""
    mask = term.mask
    if mask.special_tokens == "leave_out":
        tokens = tokens.select(
            ~torch.isin(tokens.ids(), torch.tensor(sorted(special), dtype=torch.long))
        )
    if mask.teacher_entropy_above is not None:
        tokens = tokens.select(
            tokens.statistic("teacher_entropy") > plain(mask.teacher_entropy_above)
        )
    floor = floor_that_leaves_out(term)
    if floor is not None:
        tokens = tokens.select(_log_ratio(tokens) >= plain(floor))
    if mask.student_entropy_top is not None:
        values, own = everywhere(tokens.statistic("student_entropy"))
        tokens = tokens.select(
            token_weights.top_share(values, plain(mask.student_entropy_top))[own]
        )
    return tokens


def _weights(
    weight: Weight, tokens: _Tokens, everywhere: AllGather, function: UserFunction | None
) -> Tensor:
    """[M] float64, at least 0."""
    rows = len(tokens.rollouts)
    match weight:
        case PositionWeight(smallest=smallest, middle=middle, width=width):
            place = (tokens.place + 1).double() / tokens.lengths[tokens.row]
            return token_weights.sigmoid_ramp(place, plain(smallest), plain(middle), plain(width))
        case TeacherEntropyWeight(rate=rate):
            values, own = everywhere(tokens.statistic("teacher_entropy"))
            return token_weights.entropy_weight(values, plain(rate))[own]
        case DriftWeight(strength=strength):
            return token_weights.drift(_log_ratio(tokens), tokens.row, rows, plain(strength))
        case PassRateWeight(power=power, threshold=threshold):
            rates = [_pass_rate(r, threshold) for r in tokens.rollouts]
            each = torch.tensor(rates, dtype=torch.float64)
            return token_weights.pass_rate_variance(each, plain(power))[tokens.row]
        case PerplexityWeight(of=who, power=power):
            measure: Statistic = "student_logprobs" if who == "student" else "teacher_logprobs"
            group = torch.tensor([r.group for r in tokens.rollouts], dtype=torch.long)
            return token_weights.perplexity(
                tokens.statistic(measure), tokens.row, group, plain(power)
            )
        case FileWeight():
            assert function is not None
            return _user_weights(weight, tokens, function)
        case _:
            assert_never(weight)


def _log_ratio(tokens: _Tokens) -> Tensor:
    return tokens.statistic("teacher_logprobs") - tokens.statistic("student_logprobs")


def _pass_rate(rollout: Rollout, threshold: float) -> float:
    rewards = rollout.group_rewards
    if not rewards:
        raise ValueError("a pass rate needs the group's rewards")
    return sum(reward >= threshold for reward in rewards) / len(rewards)


def _user_weights(weight: FileWeight, tokens: _Tokens, function: UserFunction) -> Tensor:
    """The function's weights, called with all rollouts at once, or with one group after the other."""
    row, place = tokens.row, tokens.place
    shape = len(tokens.rollouts), int(tokens.lengths.max()) if tokens.rollouts else 0
    counts = torch.zeros(shape, dtype=torch.bool).index_put((row, place), torch.tensor(True))
    features = {name: _feature(name, tokens, shape) for name in weight.given}
    weights = torch.zeros(shape, dtype=torch.float64)
    for rows in _function_calls(weight, tokens.rollouts):
        weights[rows] = function(counts[rows], {name: x[rows] for name, x in features.items()})
    return weights[row, place]


def _function_calls(weight: FileWeight, rollouts: Sequence[Rollout]) -> list[Tensor]:
    """The places of the rollouts that are handed over together."""
    if weight.rows == "rollout":
        return [torch.arange(len(rollouts))] * bool(rollouts)
    group = torch.tensor([r.group for r in rollouts], dtype=torch.long)
    return [(group == number).nonzero()[:, 0] for number in group.unique()]


def _feature(name: Given, tokens: _Tokens, shape: tuple[int, int]) -> Tensor:
    """[N, T], 0 where the term does not count a token; [N] for what belongs to the rollout.  float64."""
    match name:
        case "length":
            return tokens.lengths.double()
        case "reward":
            rewards = [r.reward for r in tokens.rollouts]
            if None in rewards:
                raise ValueError("the rollouts' rewards are not known")
            return torch.tensor(rewards, dtype=torch.float64)
        case "position":
            values = tokens.place.double()
        case _:
            values = tokens.statistic(name)
    return torch.zeros(shape, dtype=torch.float64).index_put((tokens.row, tokens.place), values)
