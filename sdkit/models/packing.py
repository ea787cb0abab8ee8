"""Packs prompts and completions into one forward pass; rollouts of one prompt may share a row.

A shared row holds the prompt once, followed by its completions.  A completion's tokens attend only to the prompt and to
their own completion, with positions counted from the end of the prompt, so each sees exactly what it would see alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from sdkit.batches import PaddedSequences, UnpaddedSequence
from sdkit.models.prefix import Ids, group_by_prefix
from sdkit.models.weights import Weights

LONGEST_PACK = 2048
"""Tokens of the longest shared row.  Attention between completions is computed and then masked, which must not cost more
than the shared prompt saves."""

PROMPT, SHORT = 8, 8
"""Tokens of the prompt and of the short completion in a probe of the model."""


@frozen
class Pack:
    """A row: one prompt and the completions that share it, by their index in the micro-batch."""

    prompt: Ids
    members: tuple[int, ...]
    width: int  # tokens


def pack_rollouts(prompts: Sequence[Ids], completions: Sequence[Ids], longest: int) -> list[Pack]:
    """Returns rows in which completions of equal prompts share up to `longest` tokens; with 0 none are shared."""
    open_packs: dict[Ids, int] = {}
    packs: list[Pack] = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        pack_index = open_packs.get(prompt)
        if pack_index is not None and packs[pack_index].width + len(completion) <= longest:
            pack = packs[pack_index]
            packs[pack_index] = Pack(prompt, (*pack.members, index), pack.width + len(completion))
        else:
            open_packs[prompt] = len(packs)
            packs.append(Pack(prompt, (index,), len(prompt) + len(completion)))
    return packs


def _pass_rows(prompts: Sequence[Ids], completions: Sequence[Ids], longest: int) -> list[Pack]:
    """Returns the rows of one forward pass; none is shared if any row is longer than `longest`.

    All rows of a pass use the same kind of mask, and the mask for shared rows is only verified up to `longest` tokens.
    """
    rows = pack_rollouts(prompts, completions, longest)
    return pack_rollouts(prompts, completions, 0) if any(row.width > longest for row in rows) else rows


def padded_tokens(prompts: Sequence[Ids], completions: Sequence[Ids], longest: int) -> int:
    """Returns rows × widest row of one forward pass, padding included."""
    rows = _pass_rows(prompts, completions, longest)
    return len(rows) * max((pack.width for pack in rows), default=0)


def pad_sequences(
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    wanted: Sequence[Sequence[int]],
    longest: int,
    device: torch.device,
) -> PaddedSequences:
    """Returns one padded forward pass.  `wanted`: the positions of each completion whose states are needed, in order.

    Completions are inserted as token ids, never re-tokenized.  Without sequences the pass is one row of one token with
    no wanted states: this rank then only keeps in step with the others.
    """
    rows = _pass_rows(prompts, completions, longest) or [Pack((0,), (), 1)]
    width = max(pack.width for pack in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    # Of each completion: flat indices of the prompt's last token and of its own first token.
    starts: dict[int, tuple[int, int]] = {}
    for i, pack in enumerate(rows):
        end = len(pack.prompt)
        ids[i, :end] = torch.tensor(pack.prompt)
        positions[i, :end] = torch.arange(end)
        for member in pack.members:
            start, end = end, end + len(completions[member])
            starts[member] = i * width + len(pack.prompt) - 1, i * width + start
            ids[i, start:end] = torch.tensor(completions[member], dtype=torch.long)
            positions[i, start:end] = torch.arange(end - start) + len(pack.prompt)
    # The state at position j predicts token j + 1.
    predicts = [starts[m][1] + p - 1 if p else starts[m][0] for m, ps in enumerate(wanted) for p in ps]
    shared = any(len(pack.members) > 1 for pack in rows)
    return PaddedSequences(
        input_ids=ids.to(device),
        attention_mask=_shared_prompt_mask(rows, completions, width, device) if shared else None,
        positions=positions.to(device) if shared else None,
        tokens=sum(pack.width for pack in rows),
        prefix_groups=group_by_prefix([pack.prompt for pack in rows], [pack.width for pack in rows]),
        predictor_index=torch.tensor(predicts, dtype=torch.long, device=device),
        texts=tuple(
            UnpaddedSequence(prompt=p, completion=c, positions=tuple(k))
            for p, c, k in zip(prompts, completions, wanted, strict=True)
        ),
    )


def _shared_prompt_mask(rows: Sequence[Pack], completions: Sequence[Ids], width: int, device: torch.device) -> Tensor:
    """Returns the attention mask, [R, 1, S, S] bool with S = width; every token attends at least to itself.

    It is written block by block, on the device that uses it: comparing every query with every key takes several times as
    long and as much memory (docs/decisions.md, 2026-11-28).
    """
    # Prompt, completions and padding of each row are blocks of their own.
    blocks = [
        (len(pack.prompt), *(len(completions[member]) for member in pack.members), width - pack.width) for pack in rows
    ]
    longest = max(max(sizes) for sizes in blocks)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril_()
    mask = torch.zeros(len(rows), 1, width, width, dtype=torch.bool, device=device)
    for (row,), sizes in zip(mask, blocks, strict=True):
        row[sizes[0] :, : sizes[0]] = True
        for size, end in zip(sizes, itertools.accumulate(sizes), strict=True):
            row[end - size : end, end - size : end] = causal[:size, :size]
    return mask


@torch.no_grad()
def shares_rows(
    weights: Weights, device: torch.device, longest: int = PROMPT + 2 * SHORT, text: int = PROMPT + SHORT
) -> bool:
    """Whether every completion in a shared row of `longest` tokens gets the same states as alone.

    `text` bounds each completion, prompt included; a short completion follows the long ones.  Compares the last states
    of each.
    """
    room = longest - PROMPT - SHORT
    count = -(-room // max(text - PROMPT, 1))
    prompt, long, short, _ = probe_texts(weights, room // count)
    try:
        together = last_states(weights, device, prompt, [*[long] * count, short], longest)
    except (RuntimeError, TypeError, ValueError, IndexError):  # the attention needs another kind of mask
        return False
    alone = last_states(weights, device, prompt, [long, short], 0)
    expected = [*[alone[0]] * count, alone[1]]
    return all(same_states(weights, *pair) for pair in zip(together, expected, strict=True))


@torch.no_grad()
def completions_leak(weights: Weights, device: torch.device) -> bool:
    """Whether a completion's states depend on the completion before it in a shared row.

    Both passes have the same shapes, which reveals leaks below the tolerance of `shares_rows`.
    """
    prompt, long, short, other = probe_texts(weights, SHORT)
    a, b = (last_states(weights, device, prompt, [x, short], LONGEST_PACK)[1] for x in (long, other))
    return differs(weights, a, b)


@torch.no_grad()
def sees_ahead(weights: Weights, device: torch.device) -> bool:
    """Whether a token's states depend on the tokens after it, so that padding would need a mask.

    Both passes have the same shapes, which reveals leaks below the tolerance of `same_states`.
    """
    prompt, long, short, other = probe_texts(weights, SHORT)
    batches = [pad_sequences([prompt], [short + x], [range(1, SHORT + 1)], 0, device) for x in (long, other)]
    return differs(weights, *(weights.hidden(batch).float() for batch in batches))


def probe_texts(weights: Weights, length: int) -> tuple[Ids, Ids, Ids, Ids]:
    """Returns random ids: a prompt, a completion of `length` tokens, a short one, and another of `length` tokens."""
    generator = torch.Generator().manual_seed(0)

    def ids(size: int) -> Ids:
        return tuple(torch.randint(1, weights.head_shape[0], (size,), generator=generator).tolist())

    return ids(PROMPT), ids(length), ids(SHORT), ids(length)


def last_states(
    weights: Weights, device: torch.device, prompt: Ids, completions: Sequence[Ids], longest: int
) -> list[Tensor]:
    """Returns the states that predict each completion's last tokens: a float32 [at most SHORT, H] per completion."""
    wanted = [range(max(len(c) - SHORT, 0), len(c)) for c in completions]
    batch = pad_sequences([prompt] * len(completions), completions, wanted, longest, device)
    return list(weights.hidden(batch).float().split([len(positions) for positions in wanted]))


def same_states(weights: Weights, actual: Tensor, expected: Tensor) -> bool:
    """Whether the states of the same tokens in two forward passes differ only by rounding.

    Compares every token in float32, but the median in bfloat16, where rounding can move a single token far.
    """
    difference = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    is_exact = weights.head.dtype == torch.float32
    return bool(difference.max() < 1e-3 if is_exact else difference.median() < 0.05)


def differs(weights: Weights, actual: Tensor, expected: Tensor) -> bool:
    """Whether the states of the same tokens in two forward passes of the same shapes differ by more than rounding."""
    bound = 1e-4 if weights.head.dtype == torch.float32 else 5e-3
    return not bool(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).mean() < bound)
