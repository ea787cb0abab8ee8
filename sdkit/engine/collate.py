"""Rollouts → micro-batches: lengths sorted, padded tokens under a budget, weights from global counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attrs import frozen
from torch import Tensor

from sdkit.batches import Counts, MicroBatch, Rollout, Sequences, Tokens
from sdkit.engine.packing import padded_tokens, sequences
from sdkit.losses.objective import counted, row_weights
from sdkit.specs import LossTerm, Table, needs_teacher


@frozen(eq=False, kw_only=True)
class Collated:
    """One optimizer step's work on this rank."""

    micro_batches: tuple[MicroBatch, ...]
    order: tuple[Rollout, ...]  # the rollouts as the micro-batches hold them
    counts: dict[str, Counts]  # per loss term, of the global batch
    padded_tokens: int  # student tokens of all micro-batches, padding included


def term_lengths(term: LossTerm, rollouts: Sequence[Rollout]) -> list[int]:
    """How many tokens of each rollout the term counts; 0 where it needs a teacher that is not there."""
    return [len(_positions(term, r)) for r in rollouts]


def collate(
    rollouts: Sequence[Rollout],
    losses: Table[LossTerm],
    budget: int,
    total: Callable[[Tensor], Tensor],
    device: torch.device,
    longest_pack: int = 0,
) -> Collated:
    """Micro-batches of at most `budget` padded tokens, in an order that depends on lengths alone.

    `total` sums over ranks.  Rollouts of one prompt share rows of up to `longest_pack` tokens (packing.py).  Every
    weight is a share of the global batch, so the split into micro-batches changes no gradient.
    """
    order = _order(rollouts, together=longest_pack > 0)
    lengths = {name: term_lengths(term, order) for name, term in losses.items()}
    counts = _global_counts(lengths, len(order), total)
    weights = {
        name: row_weights(term.average, torch.tensor(lengths[name], dtype=torch.long), counts[name])
        for name, term in losses.items()
    }
    batches, padded = [], 0
    for start, end in _cuts(order, budget, longest_pack):
        part = order[start:end]
        rows = {name: w[start:end] for name, w in weights.items()}
        batches.append(_micro_batch(part, losses, rows, longest_pack, device))
        padded += batches[-1].student.input_ids.numel()
    return Collated(
        micro_batches=tuple(batches), order=tuple(order), counts=counts, padded_tokens=padded
    )


def _width(rollout: Rollout) -> int:
    prompt = max(len(rollout.prompt_ids), len(rollout.teacher_prompt_ids or ()))
    return prompt + len(rollout.completion_ids)


def _positions(term: LossTerm, rollout: Rollout) -> range:
    if needs_teacher(term) and rollout.teacher_prompt_ids is None:
        return range(0)
    return counted(term.mask, len(rollout.completion_ids))


def _global_counts(
    lengths: dict[str, list[int]], rows: int, total: Callable[[Tensor], Tensor]
) -> dict[str, Counts]:
    flat = [n for ls in lengths.values() for n in (rows, sum(1 for x in ls if x), sum(ls))]
    summed = total(torch.tensor(flat, dtype=torch.long)).tolist()
    triples = zip(summed[::3], summed[1::3], summed[2::3], strict=True)
    return {
        name: Counts(rows=r, filled_rows=f, tokens=t)
        for name, (r, f, t) in zip(lengths, triples, strict=True)
    }


def _order(rollouts: Sequence[Rollout], together: bool) -> list[Rollout]:
    """By width; with `together` group by group, by the width of each group's widest."""
    if not together:
        return sorted(rollouts, key=lambda r: (_width(r), r.group))
    widest: dict[int, int] = {}
    for r in rollouts:
        widest[r.group] = max(widest.get(r.group, 0), _width(r))
    return sorted(rollouts, key=lambda r: (widest[r.group], r.group, _width(r)))


def _cuts(order: Sequence[Rollout], budget: int, longest_pack: int) -> list[tuple[int, int]]:
    """Where to cut so that the padded tokens of either side stay within the budget; a lone rollout may exceed it."""

    def cost(part: Sequence[Rollout]) -> int:
        completions = [r.completion_ids for r in part]
        return max(
            padded_tokens([prompt(r) for r in part], completions, longest_pack)
            for prompt in (_student_prompt, _teacher_prompt)
        )

    cuts, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or cost(order[start : end + 1]) > budget:
            cuts.append((start, end))
            start = end
    return cuts


def _student_prompt(rollout: Rollout) -> tuple[int, ...]:
    return rollout.prompt_ids


def _teacher_prompt(rollout: Rollout) -> tuple[int, ...]:
    """A rollout without a teacher still has a place, so that rows line up; its weights are zero."""
    return rollout.teacher_prompt_ids or rollout.prompt_ids


def _micro_batch(
    rollouts: Sequence[Rollout],
    losses: Table[LossTerm],
    row_weight: dict[str, Tensor],
    longest_pack: int,
    device: torch.device,
) -> MicroBatch:
    kept = [sorted({p for t in losses.values() for p in _positions(t, r)}) for r in rollouts]
    teacher = any(needs_teacher(term) for term in losses.values())
    tokens = Tokens(
        token=_flat(
            [[r.completion_ids[p] for p in ps] for r, ps in zip(rollouts, kept, strict=True)]
        ),
        row=_flat([[i] * len(ps) for i, ps in enumerate(kept)]),
        weights={
            name: _token_weights(t, rollouts, kept, row_weight[name]) for name, t in losses.items()
        },
        sampler_logprobs=_flat_floats([r.sampler_logprobs for r in rollouts], kept),
        old_logprobs=_flat_floats([r.old_logprobs for r in rollouts], kept),
        advantages=_per_rollout([r.advantage for r in rollouts], kept),
    )
    completions = [r.completion_ids for r in rollouts]

    def side(prompt: Callable[[Rollout], tuple[int, ...]]) -> Sequences:
        return sequences([prompt(r) for r in rollouts], completions, kept, longest_pack, device)

    return MicroBatch(
        student=side(_student_prompt),
        teacher=side(_teacher_prompt) if teacher else None,
        tokens=tokens.to(device),
        rows=len(rollouts),
    )


def _token_weights(
    term: LossTerm, rollouts: Sequence[Rollout], kept: list[list[int]], rows: Tensor
) -> Tensor:
    own = [_positions(term, r) for r in rollouts]
    return torch.tensor(
        [
            float(w) * (p in o)
            for w, o, ps in zip(rows.tolist(), own, kept, strict=True)
            for p in ps
        ],
        dtype=torch.float32,
    )


def _flat(rows: list[list[int]]) -> Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=torch.long)


def _per_rollout(values: list[float | None], kept: list[list[int]]) -> Tensor | None:
    if any(value is None for value in values):
        return None
    each = [v for v, ps in zip(values, kept, strict=True) for _ in ps]
    return torch.tensor(each, dtype=torch.float32)


def _flat_floats(rows: list[tuple[float, ...] | None], kept: list[list[int]]) -> Tensor | None:
    if any(row is None for row in rows):
        return None
    values = [row[p] for row, ps in zip(rows, kept, strict=True) if row is not None for p in ps]
    return torch.tensor(values, dtype=torch.float32)
