"""Prompts and completions side by side in one forward pass; rollouts of one prompt may share a row.

A shared row holds the prompt once and every completion after it.  A completion's tokens attend to the prompt and to
themselves, and count their positions from the prompt's end, so each sees exactly what it would see alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from sdkit.batches import PaddedSequences, UnpaddedSequence
from sdkit.models.weights import Weights

LONGEST_PACK = 2048
"""Tokens of the longest shared row: attention across completions is computed and masked, which must not cost more
than the prompt that is saved."""

PROMPT, SHORT = 8, 8
"""Tokens of a prompt and of a short completion that a model is tried with."""

Ids = tuple[int, ...]


@frozen
class Pack:
    """Completions (by their place in the micro-batch) behind one prompt."""

    prompt: Ids
    members: tuple[int, ...]
    width: int  # tokens


def pack_rollouts(prompts: Sequence[Ids], completions: Sequence[Ids], longest: int) -> list[Pack]:
    """Which completions share a row: those of equal prompts, up to `longest` tokens; 0 lets none share."""
    open_packs: dict[Ids, int] = {}
    found: list[Pack] = []
    for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        at = open_packs.get(prompt)
        if at is not None and found[at].width + len(completion) <= longest:
            old = found[at]
            found[at] = Pack(prompt, (*old.members, place), old.width + len(completion))
        else:
            open_packs[prompt] = len(found)
            found.append(Pack(prompt, (place,), len(prompt) + len(completion)))
    return found


def _rows(prompts: Sequence[Ids], completions: Sequence[Ids], longest: int) -> list[Pack]:
    """The rows of one forward pass: none is shared where one is longer than `longest`.

    The mask of shared rows is that of the pass, and only rows of so many tokens are known to need no other.
    """
    rows = pack_rollouts(prompts, completions, longest)
    return (
        pack_rollouts(prompts, completions, 0) if any(row.width > longest for row in rows) else rows
    )


def padded_tokens(prompts: Sequence[Ids], completions: Sequence[Ids], longest: int) -> int:
    """Rows × widest row of one forward pass over these."""
    rows = _rows(prompts, completions, longest)
    return len(rows) * max((pack.width for pack in rows), default=0)


def pad_sequences(
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    kept: Sequence[Sequence[int]],
    longest: int,
    device: torch.device,
) -> PaddedSequences:
    """One forward pass.  `kept`: positions of each completion whose states are wanted, in the order given.

    Completions are spliced in as ids, never encoded again.  No sequences at all make one row of one token, of which no
    state is wanted: the pass is then run for the ranks that have some.
    """
    rows = _rows(prompts, completions, longest) or [Pack((0,), (), 1)]
    width = max(pack.width for pack in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    # Which completion of its row a token belongs to: 0 the prompt, 1… the completions, -1 padding.
    owner = torch.full((len(rows), width), -1)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    starts: dict[int, tuple[int, int]] = {}  # member → (of the prompt's last token, of its first)
    for i, pack in enumerate(rows):
        end = len(pack.prompt)
        ids[i, :end] = torch.tensor(pack.prompt)
        owner[i, :end], positions[i, :end] = 0, torch.arange(end)
        for number, member in enumerate(pack.members, start=1):
            start, end = end, end + len(completions[member])
            starts[member] = i * width + len(pack.prompt) - 1, i * width + start
            ids[i, start:end] = torch.tensor(completions[member], dtype=torch.long)
            owner[i, start:end] = number
            positions[i, start:end] = torch.arange(end - start) + len(pack.prompt)
    # The state at position j predicts token j + 1.
    predicts = [
        starts[m][1] + p - 1 if p else starts[m][0] for m, ps in enumerate(kept) for p in ps
    ]
    shared = any(len(pack.members) > 1 for pack in rows)
    return PaddedSequences(
        input_ids=ids.to(device),
        attention_mask=(_shared_prompt_mask(owner) if shared else (owner >= 0).long()).to(device),
        positions=positions.to(device) if shared else None,
        tokens=sum(pack.width for pack in rows),
        predictor_index=torch.tensor(predicts, dtype=torch.long, device=device),
        texts=tuple(
            UnpaddedSequence(prompt=p, completion=c, positions=tuple(k))
            for p, c, k in zip(prompts, completions, kept, strict=True)
        ),
    )


def _shared_prompt_mask(owner: Tensor) -> Tensor:
    """Who attends to whom.  owner [N, S] -> [N, 1, S, S] bool; every token at least to itself."""
    width = owner.shape[1]
    query, key = owner[:, :, None], owner[:, None, :]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    return (causal & ((key == query) | (key == 0)))[:, None]


@torch.no_grad()
def shares_rows(
    weights: Weights,
    device: torch.device,
    longest: int = PROMPT + 2 * SHORT,
    text: int = PROMPT + SHORT,
) -> bool:
    """Whether each completion of a shared row of `longest` tokens has the states that it has alone.

    The completions are as long as `text`, prompt included, allows; a short one follows them.  The last states of each
    are compared.
    """
    room = longest - PROMPT - SHORT
    count = -(-room // max(text - PROMPT, 1))
    prompt, long, short, _ = probe_texts(weights, room // count)
    try:
        together = last_states(weights, device, prompt, [*[long] * count, short], longest)
    except (RuntimeError, TypeError, ValueError):  # an attention that wants another kind of mask
        return False
    alone = last_states(weights, device, prompt, [long, short], 0)
    expected = [*[alone[0]] * count, alone[1]]
    return all(same_states(weights, *pair) for pair in zip(together, expected, strict=True))


@torch.no_grad()
def completions_leak(weights: Weights, device: torch.device) -> bool:
    """Whether a completion's states depend on another completion before it in a shared row.

    Both passes have the same shapes, so that a leak smaller than the tolerance of `shares_rows` shows.
    """
    prompt, long, short, other = probe_texts(weights, SHORT)
    a, b = (
        last_states(weights, device, prompt, [x, short], LONGEST_PACK)[1] for x in (long, other)
    )
    bound = 1e-4 if weights.head.dtype == torch.float32 else 5e-3
    return not bool(((a - b).norm(dim=-1) / b.norm(dim=-1)).mean() < bound)


def probe_texts(weights: Weights, length: int) -> tuple[Ids, Ids, Ids, Ids]:
    """Random ids: a prompt, a completion of `length` tokens, a short one, and another of `length`."""
    draw = torch.Generator().manual_seed(0)

    def ids(size: int) -> Ids:
        return tuple(torch.randint(1, weights.head.shape[0], (size,), generator=draw).tolist())

    return ids(PROMPT), ids(length), ids(SHORT), ids(length)


def last_states(
    weights: Weights, device: torch.device, prompt: Ids, completions: Sequence[Ids], longest: int
) -> list[Tensor]:
    """The states that predict the last tokens of each completion: one [at most SHORT, H], float32, a completion."""
    kept = [range(max(len(c) - SHORT, 0), len(c)) for c in completions]
    batch = pad_sequences([prompt] * len(completions), completions, kept, longest, device)
    return list(weights.hidden(batch).float().split([len(k) for k in kept]))


def same_states(weights: Weights, found: Tensor, expected: Tensor) -> bool:
    """Whether states of the same tokens in two forward passes differ by rounding alone.

    In float32 every token is compared; in bfloat16 the median, as rounding can move a single token far.
    """
    apart = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    exact = weights.head.dtype == torch.float32
    return bool(apart.max() < 1e-3 if exact else apart.median() < 0.05)
