"""Rollouts → micro-batches: lengths sorted, padded tokens under a budget, weights from global counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attrs import frozen
from torch import Tensor

from sdkit.batches import Counts, MicroBatch, Rollout, Sequences, Tokens
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
) -> Collated:
    """Micro-batches of at most `budget` padded tokens, in an order that depends on lengths alone.

    `total` sums over ranks.  Every weight is a share of the global batch, so the split into micro-batches changes
    no gradient.
    """
    order = sorted(rollouts, key=lambda r: (_width(r), r.group))
    lengths = {name: term_lengths(term, order) for name, term in losses.items()}
    counts = _global_counts(lengths, len(order), total)
    weights = {
        name: row_weights(term.average, torch.tensor(lengths[name], dtype=torch.long), counts[name])
        for name, term in losses.items()
    }
    batches, padded = [], 0
    for start, end in _cuts([_width(r) for r in order], budget):
        part = order[start:end]
        rows = {name: w[start:end] for name, w in weights.items()}
        batches.append(_micro_batch(part, losses, rows, device))
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


def _cuts(widths: list[int], budget: int) -> list[tuple[int, int]]:
    """Where to cut rows of ascending width so that rows × widest stays within the budget; a lone row may exceed it."""
    cuts, start = [], 0
    for end in range(1, len(widths) + 1):
        if end == len(widths) or (end + 1 - start) * widths[end] > budget:
            cuts.append((start, end))
            start = end
    return cuts


def _micro_batch(
    rollouts: Sequence[Rollout],
    losses: Table[LossTerm],
    row_weight: dict[str, Tensor],
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
    return MicroBatch(
        student=_sequences([r.prompt_ids for r in rollouts], rollouts, kept, device),
        # A row without a teacher still has a place, so that rows line up; its weights are zero.
        teacher=_sequences(
            [r.teacher_prompt_ids or r.prompt_ids for r in rollouts], rollouts, kept, device
        )
        if teacher
        else None,
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


def _sequences(
    prompts: Sequence[tuple[int, ...]],
    rollouts: Sequence[Rollout],
    kept: list[list[int]],
    device: torch.device,
) -> Sequences:
    """Prompt ids and completion ids side by side: the completion is spliced, never encoded again."""
    rows = [[*p, *r.completion_ids] for p, r in zip(prompts, rollouts, strict=True)]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    # The state at position j predicts token j + 1.
    predicts = [
        i * width + len(prompt) + p - 1
        for i, (prompt, ps) in enumerate(zip(prompts, kept, strict=True))
        for p in ps
    ]
    return Sequences(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        predicts=torch.tensor(predicts, dtype=torch.long, device=device),
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
