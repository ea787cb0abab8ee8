"""Collates rollouts into micro-batches: sorted by length, within a token budget, weighted by global counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from attrs import astuple, evolve, fields, frozen
from torch import Tensor

from sdkit.batches import Counts, LossMask, MicroBatch, PaddedSequences, Rollout, Tokens
from sdkit.language.specs import LossSpec, PerToken, PerTurn, Table
from sdkit.losses.objective import row_weights
from sdkit.losses.token_weights import turn_units
from sdkit.models.packing import pad_sequences, padded_tokens
from sdkit.spans import turns_at

RolloutKey = tuple[int, tuple[int, ...]]
"""Group and completion of a rollout."""


@frozen(eq=False, kw_only=True)
class CollatedBatch:
    """This rank's micro-batches of one optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    order: tuple[Rollout, ...]  # the rollouts, in the order of the micro-batches
    counts: dict[str, Counts]  # per loss term, of the global batch
    padded_tokens: int  # student tokens of all micro-batches, padding included


def collate(
    rollouts: Sequence[Rollout],
    losses: Table[LossSpec],
    budget: int,
    all_reduce_sum: Callable[[Tensor], Tensor],
    device: torch.device,
    longest_pack: int = 0,
) -> CollatedBatch:
    """Return micro-batches of at most `budget` padded tokens, in an order that depends only on lengths.

    `all_reduce_sum` sums over ranks.  Rollouts of one prompt share rows of up to `longest_pack` tokens
    (models/packing.py).  Weights are normalised by the global batch, so the split into micro-batches changes no gradient.
    Raises ValueError if a rollout has no loss mask (loss_masks.py).
    """
    order = [_with_turn_shares(r, losses) for r in _sort_by_width(rollouts, by_group=longest_pack > 0)]
    lengths = {name: [len(_loss_mask(r, name).positions) for r in order] for name in losses}
    counts, completions = _global_counts(losses, order, all_reduce_sum)
    divisors = _divisors(losses, counts, completions)
    weights = {
        name: row_weights(term.average, torch.tensor(lengths[name], dtype=torch.long), divisors[name])
        for name, term in losses.items()
    }
    teacher = any(term.needs_teacher for term in losses.values())
    batches, padded = [], 0
    for start, end in _micro_batch_bounds(order, budget, longest_pack):
        part = order[start:end]
        rows = {name: w[start:end] for name, w in weights.items()}
        positions = [counted_positions(r, losses) for r in part]
        batches.append(_micro_batch(part, positions, rows, teacher, longest_pack, device))
        padded += batches[-1].student.input_ids.numel()
    return CollatedBatch(micro_batches=tuple(batches), order=tuple(order), counts=counts, padded_tokens=padded)


def rollout_key(rollout: Rollout) -> RolloutKey:
    """Return what tells a rollout of a batch from the others; those of one group with the same tokens are alike."""
    return rollout.group, rollout.completion_ids


def counted_positions(rollout: Rollout, losses: Iterable[str]) -> list[int]:
    """Return the positions in the completion that some term counts, ascending."""
    return sorted({p for name in losses for p in _loss_mask(rollout, name).positions})


def collate_completions(
    rollouts: Sequence[Rollout], budget: int, device: torch.device, longest_pack: int, *, teacher: bool
) -> Iterator[tuple[Sequence[Rollout], MicroBatch]]:
    """Yield the rollouts of each micro-batch and the micro-batch, which holds all sampled tokens and no weights."""
    order = _sort_by_width(rollouts, by_group=longest_pack > 0)
    for start, end in _micro_batch_bounds(order, budget, longest_pack):
        part = order[start:end]
        positions = [list(r.sampled) for r in part]
        yield part, _micro_batch(part, positions, {}, teacher, longest_pack, device)


def empty_micro_batch(losses: Iterable[str], *, teacher: bool, device: torch.device) -> MicroBatch:
    """Return a micro-batch without rollouts, run by a rank that has none left.

    All ranks must run the same number of forward and backward passes.
    """
    return _micro_batch((), [], {name: torch.zeros(0) for name in losses}, teacher, 0, device)


def _width(rollout: Rollout) -> int:
    return max(len(prompt) + len(completion) for prompt, completion in (_as_student(rollout), *_as_teacher(rollout)))


def _loss_mask(rollout: Rollout, name: str) -> LossMask:
    if rollout.loss_masks is None or name not in rollout.loss_masks:
        raise ValueError(f"the rollouts have no loss mask of {name}")
    return rollout.loss_masks[name]


def _with_turn_shares(rollout: Rollout, losses: Table[LossSpec]) -> Rollout:
    """Return the rollout with each token's share of its turn, 1 / counted tokens of the turn, for averages per turn."""
    changed = {}
    for name, term in losses.items():
        if isinstance(term.average, PerTurn):
            mask = _loss_mask(rollout, name)
            turns = turns_at(rollout.spans, mask.positions)
            tokens, weights = Counter(turns), mask.weights or (1.0,) * len(turns)
            shares = (weight / tokens[turn] for weight, turn in zip(weights, turns, strict=True))
            changed[name] = evolve(mask, weights=tuple(shares))
    return evolve(rollout, loss_masks={**(rollout.loss_masks or {}), **changed}) if changed else rollout


def _divisors(losses: Table[LossSpec], counts: dict[str, Counts], completions: int) -> dict[str, Counts]:
    """Return the counts that each term's average divides by.

    Terms with `denominator: joint` share the sum of their tokens.  Terms with `denominator: completions` divide by the
    sampled tokens of all completions.
    """
    joint = [n for n, t in losses.items() if t.average == PerToken(denominator="joint")]
    shared = dict.fromkeys(joint, sum(counts[name].tokens for name in joint)) | {
        n: completions for n, t in losses.items() if t.average == PerToken(denominator="completions")
    }
    return {n: evolve(c, tokens=shared.get(n, c.tokens)) for n, c in counts.items()}


def _global_counts(
    losses: Iterable[str], rollouts: Sequence[Rollout], all_reduce_sum: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Counts], int]:
    """Return the counts of each term and the number of sampled tokens, both over all ranks."""
    own = {name: _counts(name, rollouts) for name in losses}
    flat = [number for counts in own.values() for number in astuple(counts)]
    own_tokens = sum(len(r.sampled) for r in rollouts)
    *sums, completions = all_reduce_sum(torch.tensor([*flat, own_tokens], dtype=torch.long)).tolist()
    sizes = [size.name for size in fields(Counts)]
    by_term = zip(*[iter(sums)] * len(sizes), strict=True)
    counts = {name: Counts(**dict(zip(sizes, term, strict=True))) for name, term in zip(own, by_term, strict=True)}
    return counts, completions


def _counts(name: str, rollouts: Sequence[Rollout]) -> Counts:
    positions = [_loss_mask(r, name).positions for r in rollouts]
    return Counts(
        rows=len(rollouts),
        filled_rows=sum(1 for ps in positions if ps),
        turns=sum(len(set(turns_at(r.spans, ps))) for r, ps in zip(rollouts, positions, strict=True)),
        tokens=sum(map(len, positions)),
    )


def _sort_by_width(rollouts: Sequence[Rollout], by_group: bool) -> list[Rollout]:
    """Sort rollouts by width; with `by_group`, sort groups by their widest rollout and keep each group together."""
    if not by_group:
        return sorted(rollouts, key=lambda r: (_width(r), r.group))
    widest: dict[int, int] = {}
    for r in rollouts:
        widest[r.group] = max(widest.get(r.group, 0), _width(r))
    return sorted(rollouts, key=lambda r: (widest[r.group], r.group, _width(r)))


def _micro_batch_bounds(order: Sequence[Rollout], budget: int, longest_pack: int) -> list[tuple[int, int]]:
    """Return the start and end of each micro-batch.

    The padded tokens of the student's and of the teacher's batch both stay within the budget; only a single rollout may
    exceed it.
    """

    def cost(part: Sequence[Rollout]) -> int:
        sides = [_as_student(r) for r in part], [row for r in part for row in _as_teacher(r)]
        return max(
            padded_tokens([prompt for prompt, _ in rows], [completion for _, completion in rows], longest_pack)
            for rows in sides
        )

    bounds, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or cost(order[start : end + 1]) > budget:
            bounds.append((start, end))
            start = end
    return bounds


Ids = tuple[int, ...]


def _as_student(rollout: Rollout) -> tuple[Ids, Ids]:
    """Return the rollout's prompt and completion."""
    return rollout.prompt_ids, rollout.completion_ids


def _as_teacher(rollout: Rollout) -> list[tuple[Ids, Ids]]:
    """Return the prompt and the scored tokens of each of the teacher's rows.

    Without a teacher it is the student's row, whose weights are zero, so that rows align.
    """
    rows = [(view.prompt_ids, rollout.completion_ids[view.start : view.end]) for view in rollout.teacher_views]
    return rows or [_as_student(rollout)]


def _teacher_positions(rollout: Rollout, positions: Sequence[int]) -> list[list[int]]:
    """Return, for each of the teacher's rows, where its tokens are that stand for these of the completion, ascending.

    The rows together have as many.  A token in no view has no teacher; the first or last one of the next row stands for it.
    """
    views = rollout.teacher_views
    if not views:
        return [list(positions)]
    parts: list[list[int]] = [[] for _ in views]
    number = 0
    for position in positions:
        while number < len(views) - 1 and position >= views[number].end:
            number += 1
        view = views[number]
        parts[number].append(min(max(position, view.start), view.end - 1) - view.start)
    return parts


def _scored_rows(rollout: Rollout, positions: Sequence[int]) -> list[tuple[tuple[Ids, Ids], list[int]]]:
    """Return the teacher's rows that have counted tokens, at least one row, each with where these tokens are."""
    rows = list(zip(_as_teacher(rollout), _teacher_positions(rollout, positions), strict=True))
    return [(row, part) for row, part in rows if part] or rows[:1]


def _micro_batch(
    rollouts: Sequence[Rollout],
    positions: list[list[int]],
    row_weights: dict[str, Tensor],
    teacher: bool,
    longest_pack: int,
    device: torch.device,
) -> MicroBatch:
    """Build a micro-batch.  `positions` are those in each completion that some term counts, ascending."""
    completions = [r.completion_ids for r in rollouts]
    advantages = [None if r.advantage is None else (r.advantage,) * len(r.completion_ids) for r in rollouts]
    rows = [i for i, ps in enumerate(positions) for _ in ps]
    weights = {name: _token_weights(name, rollouts, positions, own) for name, own in row_weights.items()}
    taught = [known for r, ps in zip(rollouts, positions, strict=True) for known in r.in_views(ps)]
    tokens = Tokens(
        token=torch.tensor([completions[i][p] for i, ps in enumerate(positions) for p in ps], dtype=torch.long),
        row=torch.tensor(rows, dtype=torch.long),
        weights=weights,
        sampler_logprobs=_select_floats([r.sampler_logprobs for r in rollouts], positions),
        old_logprobs=_select_floats([r.old_logprobs for r in rollouts], positions),
        fully_counted=frozenset(name for name, own in weights.items() if bool((own > 0).all())),
        advantages=_select_floats(advantages, positions),
        turn=_turns(rollouts, positions, rows),
        has_teacher=None if all(taught) else torch.tensor(taught, dtype=torch.bool),
    )

    student = [_as_student(r) for r in rollouts]
    teachers = [_scored_rows(r, ps) for r, ps in zip(rollouts, positions, strict=True)]
    rows_of_teacher = [row for scored in teachers for row, _ in scored]
    in_rows = [part for scored in teachers for _, part in scored]
    return MicroBatch(
        student=_pad(student, positions, longest_pack, device),
        teacher=_pad(rows_of_teacher, in_rows, longest_pack, device) if teacher else None,
        tokens=tokens.to(device),
        rows=len(rollouts),
        teacher_routes=tuple(r.teacher_route for r in rollouts),
        teacher_rows=tuple(i for i, scored in enumerate(teachers) for _ in scored),
    )


def _turns(rollouts: Sequence[Rollout], positions: list[list[int]], rows: list[int]) -> Tensor | None:
    """Number the turns of all rollouts, in order: the turn of each token, [M] long; None if each has one turn."""
    if not any(r.spans for r in rollouts):
        return None
    turns = [turn for r, ps in zip(rollouts, positions, strict=True) for turn in turns_at(r.spans, ps)]
    return turn_units(torch.tensor(rows, dtype=torch.long), torch.tensor(turns, dtype=torch.long))


def _pad(
    rows: Sequence[tuple[Ids, Ids]], positions: Sequence[Sequence[int]], longest_pack: int, device: torch.device
) -> PaddedSequences:
    prompts, completions = [prompt for prompt, _ in rows], [completion for _, completion in rows]
    return pad_sequences(prompts, completions, positions, longest_pack, device)


def _token_weights(name: str, rollouts: Sequence[Rollout], positions: list[list[int]], rows: Tensor) -> Tensor:
    """Return row weight × token weight, 0 for a token that the term does not count.  [M] float32."""
    weights: list[float] = []
    for row, rollout, ps in zip(rows.tolist(), rollouts, positions, strict=True):
        mask = _loss_mask(rollout, name)
        token_weights = mask.weights or (1.0,) * len(mask.positions)
        by_position = dict(zip(mask.positions, token_weights, strict=True))
        weights += [row * by_position.get(p, 0.0) for p in ps]
    return torch.tensor(weights, dtype=torch.float32)


def _select_floats(rows: list[tuple[float, ...] | None], positions: list[list[int]]) -> Tensor | None:
    """Select the values at each rollout's positions, [M] float32; None if a rollout has none."""
    if any(row is None for row in rows):
        return None
    values = [row[p] for row, ps in zip(rows, positions, strict=True) if row is not None for p in ps]
    return torch.tensor(values, dtype=torch.float32)
