"""Rollouts → micro-batches: lengths sorted, padded tokens under a budget, weights from global counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from attrs import evolve, frozen
from torch import Tensor

from sdkit.batches import Counts, LossMask, MicroBatch, PaddedSequences, Rollout, Tokens
from sdkit.language.specs import LossSpec, PerToken, Table, needs_teacher
from sdkit.losses.objective import row_weights
from sdkit.models.packing import pad_sequences, padded_tokens


@frozen(eq=False, kw_only=True)
class CollatedBatch:
    """One optimizer step's work on this rank."""

    micro_batches: tuple[MicroBatch, ...]
    order: tuple[Rollout, ...]  # the rollouts as the micro-batches hold them
    counts: dict[str, Counts]  # per loss term, of the global batch
    padded_tokens: int  # student tokens of all micro-batches, padding included


def collate(
    rollouts: Sequence[Rollout],
    losses: Table[LossSpec],
    budget: int,
    total: Callable[[Tensor], Tensor],
    device: torch.device,
    longest_pack: int = 0,
) -> CollatedBatch:
    """Micro-batches of at most `budget` padded tokens, in an order that depends on lengths alone.

    `total` sums over ranks.  Rollouts of one prompt share rows of up to `longest_pack` tokens (packing.py).  Every
    weight is a share of the global batch, so the split into micro-batches changes no gradient.  Raises ValueError
    where a rollout's tokens have not been counted (counting.py).
    """
    order = _order(rollouts, together=longest_pack > 0)
    lengths = {name: [len(_loss_mask(r, name).positions) for r in order] for name in losses}
    counts, completions = _global_counts(lengths, order, total)
    divisors = _divisors(losses, counts, completions)
    weights = {
        name: row_weights(
            term.average, torch.tensor(lengths[name], dtype=torch.long), divisors[name]
        )
        for name, term in losses.items()
    }
    teacher = any(needs_teacher(term) for term in losses.values())
    batches, padded = [], 0
    for start, end in _micro_batch_bounds(order, budget, longest_pack):
        part = order[start:end]
        rows = {name: w[start:end] for name, w in weights.items()}
        kept = [sorted({p for name in losses for p in _loss_mask(r, name).positions}) for r in part]
        batches.append(_micro_batch(part, kept, rows, teacher, longest_pack, device))
        padded += batches[-1].student.input_ids.numel()
    return CollatedBatch(
        micro_batches=tuple(batches), order=tuple(order), counts=counts, padded_tokens=padded
    )


def collate_completions(
    rollouts: Sequence[Rollout],
    budget: int,
    device: torch.device,
    longest_pack: int,
    *,
    teacher: bool,
) -> Iterator[tuple[Sequence[Rollout], MicroBatch]]:
    """All completion tokens, without weights: the rollouts of each micro-batch, and the micro-batch."""
    order = _order(rollouts, together=longest_pack > 0)
    for start, end in _micro_batch_bounds(order, budget, longest_pack):
        part = order[start:end]
        kept = [list(range(len(r.completion_ids))) for r in part]
        yield part, _micro_batch(part, kept, {}, teacher, longest_pack, device)


def empty_micro_batch(losses: Iterable[str], *, teacher: bool, device: torch.device) -> MicroBatch:
    """What a rank that has no more rollouts runs, so that all ranks go forward and backward equally often."""
    return _micro_batch((), [], {name: torch.zeros(0) for name in losses}, teacher, 0, device)


def _width(rollout: Rollout) -> int:
    prompt = max(len(rollout.prompt_ids), len(rollout.teacher_prompt_ids or ()))
    return prompt + len(rollout.completion_ids)


def _loss_mask(rollout: Rollout, name: str) -> LossMask:
    if rollout.loss_masks is None or name not in rollout.loss_masks:
        raise ValueError(f"the tokens that {name} counts are not settled")
    return rollout.loss_masks[name]


def _divisors(
    losses: Table[LossSpec], counts: dict[str, Counts], completions: int
) -> dict[str, Counts]:
    """The counts that each term's average divides by: terms that say joint share their sum of tokens, those that say
    completions divide by the tokens of all.
    """
    joint = [n for n, t in losses.items() if t.average == PerToken(denominator="joint")]
    shared = dict.fromkeys(joint, sum(counts[name].tokens for name in joint)) | {
        n: completions
        for n, t in losses.items()
        if t.average == PerToken(denominator="completions")
    }
    return {n: evolve(c, tokens=shared.get(n, c.tokens)) for n, c in counts.items()}


def _global_counts(
    lengths: dict[str, list[int]], rollouts: Sequence[Rollout], total: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Counts], int]:
    """Of each term, and the tokens of all completions; on all ranks."""
    rows = len(rollouts)
    flat = [n for ls in lengths.values() for n in (rows, sum(1 for x in ls if x), sum(ls))]
    whole = sum(len(r.completion_ids) for r in rollouts)
    *summed, completions = total(torch.tensor([*flat, whole], dtype=torch.long)).tolist()
    triples = zip(summed[::3], summed[1::3], summed[2::3], strict=True)
    counts = {
        name: Counts(rows=r, filled_rows=f, tokens=t)
        for name, (r, f, t) in zip(lengths, triples, strict=True)
    }
    return counts, completions


def _order(rollouts: Sequence[Rollout], together: bool) -> list[Rollout]:
    """By width; with `together` group by group, by the width of each group's widest."""
    if not together:
        return sorted(rollouts, key=lambda r: (_width(r), r.group))
    widest: dict[int, int] = {}
    for r in rollouts:
        widest[r.group] = max(widest.get(r.group, 0), _width(r))
    return sorted(rollouts, key=lambda r: (widest[r.group], r.group, _width(r)))


def _micro_batch_bounds(
    order: Sequence[Rollout], budget: int, longest_pack: int
) -> list[tuple[int, int]]:
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
    kept: list[list[int]],
    row_weights: dict[str, Tensor],
    teacher: bool,
    longest_pack: int,
    device: torch.device,
) -> MicroBatch:
    """`kept` are the positions of each completion that some term counts, ascending."""
    tokens = Tokens(
        token=_flatten(
            [[r.completion_ids[p] for p in ps] for r, ps in zip(rollouts, kept, strict=True)]
        ),
        row=_flatten([[i] * len(ps) for i, ps in enumerate(kept)]),
        weights={
            name: _token_weights(name, rollouts, kept, rows) for name, rows in row_weights.items()
        },
        sampler_logprobs=_flat_floats([r.sampler_logprobs for r in rollouts], kept),
        old_logprobs=_flat_floats([r.old_logprobs for r in rollouts], kept),
        advantages=_per_rollout([r.advantage for r in rollouts], kept),
        has_teacher=_flat_bools([r.teacher_prompt_ids is not None for r in rollouts], kept),
    )
    completions = [r.completion_ids for r in rollouts]

    def side(prompt: Callable[[Rollout], tuple[int, ...]]) -> PaddedSequences:
        return pad_sequences([prompt(r) for r in rollouts], completions, kept, longest_pack, device)

    return MicroBatch(
        student=side(_student_prompt),
        teacher=side(_teacher_prompt) if teacher else None,
        tokens=tokens.to(device),
        rows=len(rollouts),
        teacher_routes=tuple(r.teacher_route for r in rollouts),
    )


def _token_weights(
    name: str, rollouts: Sequence[Rollout], kept: list[list[int]], rows: Tensor
) -> Tensor:
    """The row's weight × the token's own, 0 where the term does not count the token.  [M] float32."""
    weights: list[float] = []
    for row, rollout, positions in zip(rows.tolist(), rollouts, kept, strict=True):
        counted = _loss_mask(rollout, name)
        own = counted.weights or (1.0,) * len(counted.positions)
        worth = dict(zip(counted.positions, own, strict=True))
        weights += [row * worth.get(p, 0.0) for p in positions]
    return torch.tensor(weights, dtype=torch.float32)


def _flatten(rows: list[list[int]]) -> Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=torch.long)


def _flat_bools(values: list[bool], kept: list[list[int]]) -> Tensor | None:
    if all(values):
        return None
    each = [v for v, ps in zip(values, kept, strict=True) for _ in ps]
    return torch.tensor(each, dtype=torch.bool)  # also where there is none


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
