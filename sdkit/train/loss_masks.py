"""LossSpec masks: the tokens that each loss term counts, and their weights.

They are computed once per rollout batch, before its first update.  Shares, means and pass rates are taken over the
full rollout batch on all ranks, even if the batch is then split into several updates, so a token's mask and weight depend
neither on that split nor on micro-batches.  Scheduled numbers have their value at the batch's first update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, assert_never

import torch
from attrs import evolve, frozen
from torch import Tensor

from sdkit.batches import LossMask, Rollout, RolloutBatch
from sdkit.data.text_spans import Decode, matched_tokens
from sdkit.language.errors import blaming
from sdkit.language.specs import (
    DriftWeight,
    FileWeight,
    Given,
    LossSpec,
    PassRateWeight,
    PerplexityWeight,
    PositionWeight,
    RouteSpec,
    Statistic,
    StepAgreementWeight,
    TeacherEntropyWeight,
    Weight,
)
from sdkit.losses import token_weights
from sdkit.losses.objective import unmasked_span
from sdkit.losses.token_weights import ROUNDING
from sdkit.spans import positions_of, ranges_of, turns_at

AllGather = Callable[[Tensor], tuple[Tensor, slice]]
"""Returns the concatenated values of all ranks, and the slice of this rank's (`collectives.all_gather`)."""
UserFunction = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""A user's weight function: mask of counted tokens [N, T] bool, features by name -> weights [N, T] float64."""


def build_loss_masks(
    batch: RolloutBatch,
    losses: Mapping[str, LossSpec],
    *,
    all_gather: AllGather,
    route: RouteSpec | None = None,
    special: Collection[int] = (),
    functions: Mapping[str, UserFunction] | None = None,
    decode: Decode | None = None,
) -> RolloutBatch:
    """Return the rollouts, each with the loss mask of every term and its branch of the route.

    `special` are the special token ids; `functions` are user-written weight functions by term; `decode` gives the text
    that patterns search.  Raises ValueError if a term needs a token statistic that was not computed, a reward that is
    missing, or `decode`.
    """
    rollouts = [evolve(r, branch=route and branch_of(route, r)) for r in batch]
    masks = {
        name: _term_masks(name, term, rollouts, all_gather, route, special, decode, (functions or {}).get(name))
        for name, term in losses.items()
    }
    return RolloutBatch(
        rollouts=tuple(
            evolve(r, loss_masks={name: term_masks[i] for name, term_masks in masks.items()})
            for i, r in enumerate(rollouts)
        )
    )


def branch_of(route: RouteSpec, rollout: Rollout) -> Literal["then", "otherwise"]:
    """Return the branch of the route that the rollout takes.  Raises ValueError if its reward is missing."""
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
    all_gather: AllGather,
    route: RouteSpec | None,
    special: Collection[int],
    decode: Decode | None,
    function: UserFunction | None,
) -> list[LossMask]:
    places = [positions_of(r.spans, len(r.completion_ids), term.mask.roles) for r in rollouts]
    numbers = [_span(name, term, r, len(p), route) for r, p in zip(rollouts, places, strict=True)]
    tokens = _Tokens.of(rollouts, places, numbers)
    if term.needs_teacher_prompt and any(r.views for r in rollouts):
        tokens = tokens.select(tokens.in_views())
    with blaming("losses", name, "mask"):
        tokens = _apply_mask(term, tokens, all_gather, special, decode)
    weight = term.token_weight
    with blaming("losses", name, "weight"):
        weights = None if weight is None else _weights(weight, tokens, all_gather, function)
    return tokens.split(weights)


def _span(name: str, term: LossSpec, rollout: Rollout, length: int, route: RouteSpec | None) -> range:
    """Return which of the `length` tokens of the term's roles are within its mask; none if it does not apply."""
    other_branch = {"then": "otherwise", "otherwise": "then"}
    routed_away = route and rollout.branch and name in getattr(route, other_branch[rollout.branch])
    if routed_away or (term.needs_teacher_prompt and rollout.teacher_prompt_ids is None):
        return range(0)
    return unmasked_span(term.mask, length)


@frozen(eq=False)
class _Tokens:
    """The tokens of one loss term, in the order of the rollouts and of their positions.

    Positions number the tokens of a completion that have the term's roles: those sampled, unless it counts observations.
    """

    rollouts: Sequence[Rollout]
    places: Sequence[Sequence[int]]  # the positions in the completion of the tokens with the term's roles, by rollout
    row: Tensor  # [M] long; index into `rollouts`
    position: Tensor  # [M] long; index into the rollout's `places`

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], places: Sequence[Sequence[int]], numbers: Sequence[range]) -> _Tokens:
        sizes = torch.tensor([len(n) for n in numbers], dtype=torch.long)
        positions = [torch.arange(n.start, n.stop) for n in numbers]
        row = torch.arange(len(numbers)).repeat_interleave(sizes)
        return cls(rollouts, places, row, torch.cat(positions) if positions else sizes)

    def select(self, keep: Tensor) -> _Tokens:
        return evolve(self, row=self.row[keep], position=self.position[keep])

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of the term's roles in each completion, [N] long."""
        return torch.tensor(list(map(len, self.places)), dtype=torch.long)

    def turns(self) -> Tensor:
        """Return the turn of each token, [M] long."""
        return self._select_tokens([_turns(r) for r in self.rollouts], torch.long)

    def ids(self) -> Tensor:
        """Return the token ids, [M] long."""
        return self._select_tokens([r.completion_ids for r in self.rollouts], torch.long)

    def in_views(self) -> Tensor:
        """Return whether the teacher scores each token, [M] bool."""
        return self._select_tokens([r.in_views(range(len(r.completion_ids))) for r in self.rollouts], torch.bool)

    def statistic(self, name: Statistic) -> Tensor:
        """Return the statistic of each token, [M] float64.

        Raises ValueError if a rollout with tokens here lacks it.
        """
        present = set(self.row.tolist())
        if any(name not in self.rollouts[i].token_statistics for i in present):
            raise ValueError(f"{name} was not computed")
        values = [
            r.token_statistics[name] if i in present else (0.0,) * len(r.completion_ids)
            for i, r in enumerate(self.rollouts)
        ]
        return self._select_tokens(values, torch.float64)

    def _select_tokens(self, values: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        """Return the values of these tokens, [M]; `values` has one per completion token."""
        starts = self.lengths.cumsum(0) - self.lengths
        flat = torch.tensor(
            [row[p] for places, row in zip(self.places, values, strict=True) for p in places], dtype=dtype
        )
        return flat[starts[self.row] + self.position]

    def matched(self, pattern: str, roles: Sequence[str], decode: Decode | None) -> Tensor:
        """Return which tokens touch a match of the pattern in a turn or observation, [M] bool."""
        if decode is None:
            raise ValueError("a pattern needs the text of the tokens: pass decode")
        marks = []
        for r in self.rollouts:
            inside = [0] * len(r.completion_ids)
            for start, end in ranges_of(r.spans, len(inside), roles):
                for i in matched_tokens(pattern, r.completion_ids[start:end], decode):
                    inside[start + i] = 1
            marks.append(inside)
        return self._select_tokens(marks, torch.bool)

    def split(self, weights: Tensor | None) -> list[LossMask]:
        """Return the loss mask of each rollout.  weights [M], None: 1 for every token."""
        sizes = torch.bincount(self.row, minlength=len(self.rollouts)).tolist()
        positions = self.position.split(sizes)
        row_weights = [None] * len(sizes) if weights is None else weights.split(sizes)
        return [
            LossMask(positions=tuple(places[i] for i in p.tolist()), weights=None if w is None else tuple(w.tolist()))
            for places, p, w in zip(self.places, positions, row_weights, strict=True)
        ]


def _turns(rollout: Rollout) -> list[int]:
    return turns_at(rollout.spans, range(len(rollout.completion_ids)))


def _apply_mask(
    term: LossSpec, tokens: _Tokens, all_gather: AllGather, special: Collection[int], decode: Decode | None
) -> _Tokens:
    """Return the tokens within the term's span that its mask keeps.

    The share of largest entropies comes last: it is a share of the tokens that the other settings keep.
    """
    mask = term.mask
    if mask.turns is not None:
        turn, last = tokens.turns(), math.inf if mask.turns.last is None else mask.turns.last + ROUNDING
        tokens = tokens.select((turn >= mask.turns.first) & (turn <= last))
    if mask.spans is not None:
        matched = tokens.matched(mask.spans.pattern, mask.roles, decode)
        tokens = tokens.select(matched if mask.spans.count == "inside" else ~matched)
    if mask.special_tokens == "leave_out":
        tokens = tokens.select(~torch.isin(tokens.ids(), torch.tensor(sorted(special), dtype=torch.long)))
    if mask.teacher_entropy_above is not None:
        tokens = tokens.select(tokens.statistic("teacher_entropy") > mask.teacher_entropy_above)
    if term.masking_floor is not None:
        tokens = tokens.select(_log_ratio(tokens) >= term.masking_floor)
    if mask.student_entropy_top is not None:
        values, own_slice = all_gather(tokens.statistic("student_entropy"))
        tokens = tokens.select(token_weights.top_share(values, mask.student_entropy_top)[own_slice])
    return tokens


def _weights(weight: Weight, tokens: _Tokens, all_gather: AllGather, function: UserFunction | None) -> Tensor:
    """Return the weight of each token, [M] float64, at least 0."""
    match weight:
        case PositionWeight(smallest=smallest, middle=middle, width=width):
            share = (tokens.position + 1).double() / tokens.lengths[tokens.row]
            return token_weights.sigmoid_ramp(share, smallest, middle, width)
        case TeacherEntropyWeight(rate=rate):
            values, own_slice = all_gather(tokens.statistic("teacher_entropy"))
            return token_weights.entropy_weight(values, rate)[own_slice]
        case DriftWeight(strength=strength):
            rows = len(tokens.rollouts)
            return token_weights.drift(_log_ratio(tokens), tokens.row, rows, strength)
        case StepAgreementWeight(largest=largest):
            rows = len(tokens.rollouts)
            return token_weights.step_agreement(_log_ratio(tokens), tokens.row, tokens.turns(), rows, largest)
        case PassRateWeight(power=power, threshold=threshold):
            rates = [_pass_rate(r, threshold) for r in tokens.rollouts]
            pass_rates = torch.tensor(rates, dtype=torch.float64)
            return token_weights.pass_rate_variance(pass_rates, power)[tokens.row]
        case PerplexityWeight(of=model, power=power):
            name: Statistic = "student_logprobs" if model == "student" else "teacher_logprobs"
            group = torch.tensor([r.group for r in tokens.rollouts], dtype=torch.long)
            return token_weights.perplexity(tokens.statistic(name), tokens.row, group, power)
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
    """Return the user function's weights, [M] float64; it is called once with all rollouts, or once per group."""
    row, position = tokens.row, tokens.position
    shape = len(tokens.rollouts), int(tokens.lengths.max()) if tokens.rollouts else 0
    mask = torch.zeros(shape, dtype=torch.bool).index_put((row, position), torch.tensor(True))
    features = {name: _feature(name, tokens, shape) for name in weight.given}
    weights = torch.zeros(shape, dtype=torch.float64)
    for rows in _function_calls(weight, tokens.rollouts):
        weights[rows] = function(mask[rows], {name: x[rows] for name, x in features.items()})
    return weights[row, position]


def _function_calls(weight: FileWeight, rollouts: Sequence[Rollout]) -> list[Tensor]:
    """Return the rollout indices of each call of the user function."""
    if weight.rows == "rollout":
        return [torch.arange(len(rollouts))] * bool(rollouts)
    group = torch.tensor([r.group for r in rollouts], dtype=torch.long)
    return [(group == number).nonzero()[:, 0] for number in group.unique()]


def _feature(name: Given, tokens: _Tokens, shape: tuple[int, int]) -> Tensor:
    """Return a feature in float64: [N, T] per token, 0 where the term does not count it, or [N] per rollout."""
    match name:
        case "length":
            return tokens.lengths.double()
        case "reward":
            rewards = [r.reward for r in tokens.rollouts]
            if None in rewards:
                raise ValueError("the rollouts' rewards are not known")
            return torch.tensor(rewards, dtype=torch.float64)
        case "position":
            values = tokens.position.double()
        case "turn":
            values = tokens.turns().double()
        case _:
            values = tokens.statistic(name)
    return torch.zeros(shape, dtype=torch.float64).index_put((tokens.row, tokens.position), values)
