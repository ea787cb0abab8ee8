"""The nouns that flow through a step: rows, rollouts, micro-batches, teacher scores.

Everything here is frozen and compared by identity.  Rollouts are ragged tuples of token ids; padding happens when a
micro-batch is built and nowhere else.  Letters for shapes: N sequences, S padded length, M completion tokens that some
loss term counts (all sequences of a micro-batch, one after the other), H hidden width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from sdkit.language.errors import BadData
from sdkit.language.row_text import Fault, text_of

Message = Mapping[str, str]
"""One chat message: {"role": "system" | "user" | "assistant", "content": text}."""


@frozen(eq=False, kw_only=True)
class Row:
    """One row of a data set, with sdkit's names for its columns."""

    index: int
    messages: tuple[Message, ...]  # the student's prompt, as chat
    columns: Mapping[str, Any]  # every mapped column
    raw: Mapping[str, Any]  # the row as it was read

    @property
    def prompt_text(self) -> str:
        """The last user message."""
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "user")

    def text(self, column: str) -> str | None:
        """The text of a column; None where the row has none.  Raises BadData where it holds no text."""
        try:
            return text_of(self.columns.get(column))
        except Fault as fault:
            raise BadData(f"row {self.index}: '{column}' is {fault}") from None


@frozen(eq=False, kw_only=True)
class Attempt:
    """A rollout's completion as text, and what the reward made of it."""

    text: str
    reward: float
    feedback: str | None = None
    answer: str | None = None  # the text without thinking; None: not worked out


@frozen(eq=False, kw_only=True)
class GroupOutcome:
    """What is known of a rollout once its group has been judged."""

    group: Sequence[Attempt]  # all rollouts of the prompt, in order
    own: int  # this one's place in the group
    seed: int  # for a random pick


@frozen(kw_only=True)
class SamplingParams:
    """How to sample; temperature 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    ids_below: int | None = None  # only ids below this are drawn; None: all that the model has


@frozen(kw_only=True)
class SamplingRequest:
    """One completion asked of a backend."""

    prompt_ids: tuple[int, ...]
    seed: int


@frozen(eq=False, kw_only=True)
class Completion:
    """What a backend returns: ids up to and including the end token."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None  # under the temperature and truncation used
    finished: bool  # False where the length limit cut it


@frozen(eq=False, kw_only=True)
class LossMask:
    """The tokens of a completion that one loss term counts, and what each of them weighs."""

    positions: tuple[int, ...]  # ascending
    weights: tuple[float, ...] | None = None  # one a position; None: 1 everywhere


@frozen(eq=False, kw_only=True)
class Rollout:
    """One prompt with one completion."""

    row: Row
    group: int  # rollouts of one group answer the same prompt; numbered over all ranks
    prompt_ids: tuple[int, ...]  # what the student sees in training
    teacher_prompt_ids: tuple[int, ...] | None  # None: no teacher for this rollout
    completion_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...] | None
    old_logprobs: tuple[float, ...] | None = (
        None  # trainer's, before the first update on this batch
    )
    policy_version: int  # optimizer steps behind the weights that sampled
    finished: bool
    reward: float | None = None  # of the reward that training uses
    teacher_route: int = 0  # which of a routed teacher's routes is its teacher
    filled_slots: tuple[str, ...] = ()  # slots of the teacher's context that had something to say
    advantage: float | None = None  # the reward against its group
    group_rewards: tuple[float, ...] = ()  # of all rollouts of the group, as sampled
    token_statistics: Mapping[str, tuple[float, ...]] = field(
        factory=dict
    )  # per token, before the first update on this batch (measures.py)
    loss_masks: Mapping[str, LossMask] | None = None  # per loss term; None: not worked out yet
    branch: Literal["then", "otherwise"] | None = None  # of the method's route, where it has one


@frozen(eq=False, kw_only=True)
class RolloutBatch:
    """All rollouts of one step on this rank; groups stand together."""

    rollouts: tuple[Rollout, ...]

    def __iter__(self) -> Iterator[Rollout]:
        return iter(self.rollouts)

    def __len__(self) -> int:
        return len(self.rollouts)

    def check(self) -> None:
        """Raise ValueError where a rollout contradicts itself or a group is torn."""
        seen: list[int] = []
        for r in self.rollouts:
            for name in ("sampler_logprobs", "old_logprobs"):
                values = getattr(r, name)
                if values is not None and len(values) != len(r.completion_ids):
                    raise ValueError(f"{len(values)} {name} for {len(r.completion_ids)} tokens")
            for name, values in r.token_statistics.items():
                if len(values) != len(r.completion_ids):
                    raise ValueError(f"{len(values)} {name} for {len(r.completion_ids)} tokens")
            if not r.prompt_ids:
                raise ValueError(f"rollout of row {r.row.index} has no prompt")
            if r.group in seen[:-1]:
                raise ValueError(f"group {r.group} does not stand together")
            if not seen or seen[-1] != r.group:
                seen.append(r.group)

    def split(self, parts: int) -> tuple[RolloutBatch, ...]:
        """Whole groups dealt into `parts` batches, in order."""
        groups: dict[int, list[Rollout]] = {}
        for r in self.rollouts:
            groups.setdefault(r.group, []).append(r)
        held = list(groups.values())
        edges = [round(i * len(held) / parts) for i in range(parts + 1)]
        return tuple(
            RolloutBatch(rollouts=tuple(r for g in held[a:b] for r in g))
            for a, b in itertools.pairwise(edges)
        )


@frozen(eq=False, kw_only=True)
class UnpaddedSequence:
    """One sequence without padding, and the positions of its completion whose tokens are among the M."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    positions: tuple[int, ...]


@frozen(eq=False, kw_only=True)
class PaddedSequences:
    """Padded token ids for one forward pass, and where the M counted tokens are predicted."""

    input_ids: Tensor  # [R, S] long; R = N rows, or fewer where rollouts share their prompt
    attention_mask: Tensor  # [R, S] long, 1 on tokens, padding on the right; [R, 1, S, S] bool where rows are shared
    positions: Tensor | None  # [R, S] long where rows are shared
    tokens: int  # without padding
    predictor_index: (
        Tensor  # [M] long; index into the flattened [R * S] of the state that predicts a token
    )
    texts: tuple[UnpaddedSequence, ...]  # the N sequences one by one


@frozen(eq=False, kw_only=True)
class Tokens:
    """The M counted tokens and all that the losses know of each."""

    token: Tensor  # [M] long; the sampled id
    row: Tensor  # [M] long; sequence in the micro-batch, 0..N-1, ascending
    weights: Mapping[
        str, Tensor
    ]  # per loss term: [M] float32; 0 where the term does not count the token
    sampler_logprobs: Tensor | None  # [M] float32
    old_logprobs: Tensor | None  # [M] float32; None: the log-probabilities now, detached
    ratio: Tensor | None = None  # [M] float32; sampler correction where it needs whole sequences
    advantages: Tensor | None = None  # [M] float32; from the reward of the token's rollout
    has_teacher: Tensor | None = (
        None  # [M] bool; whether its rollout has a teacher prompt (None: all)
    )
    sequence_means: Mapping[str, Tensor] = field(
        factory=dict
    )  # [M] float32 each, of what a term needs the mean over whole sequences of (objective.py)

    def __len__(self) -> int:
        return self.token.numel()

    def slice(self, start: int, end: int) -> Tokens:
        """Tokens start..end; views, no copies."""
        return self._map(lambda x: x[start:end])

    def to(self, device: torch.device) -> Tokens:
        """The same tokens on another device."""
        return self._map(lambda x: x.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        def optional(x: Tensor | None) -> Tensor | None:
            return None if x is None else change(x)

        return Tokens(
            token=change(self.token),
            row=change(self.row),
            weights={name: change(w) for name, w in self.weights.items()},
            sampler_logprobs=optional(self.sampler_logprobs),
            old_logprobs=optional(self.old_logprobs),
            ratio=optional(self.ratio),
            advantages=optional(self.advantages),
            has_teacher=optional(self.has_teacher),
            sequence_means={name: change(x) for name, x in self.sequence_means.items()},
        )


@frozen(eq=False, kw_only=True)
class MicroBatch:
    """What one forward and backward pass needs.  May hold no rows at all (a rank that ran short)."""

    student: PaddedSequences
    teacher: PaddedSequences | None
    tokens: Tokens
    rows: int  # N
    teacher_routes: tuple[int, ...]  # [N]; which of a routed teacher's routes scores a sequence


@frozen(kw_only=True)
class Counts:
    """Sizes of the global batch (all micro-batches, all ranks) as one loss term sees it."""

    rows: int
    filled_rows: int  # rows with at least one counted token
    tokens: int


@frozen(eq=False, kw_only=True)
class LogitTransform:
    """Computes logits from head × hidden: softcap(scale × (product + bias)), where the model has these parts."""

    scale: float = 1.0
    softcap: float | None = None  # x -> softcap × tanh(x / softcap)
    bias: Tensor | None = None  # [V]

    def __call__(self, products: Tensor) -> Tensor:
        """[..., V] -> [..., V] of the same dtype; the argument itself where nothing changes it."""
        logits = products if self.bias is None else products + self.bias
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        return logits

    def first(self, rows: int | None) -> LogitTransform:
        """The transform of the first `rows` ids."""
        return self if self.bias is None else evolve(self, bias=self.bias[:rows])

    def detached(self) -> LogitTransform:
        """The same values without gradient."""
        return self if self.bias is None else evolve(self, bias=self.bias.detach())


IDENTITY = LogitTransform()


@frozen(eq=False, kw_only=True)
class HiddenStateScores:
    """A local teacher's answer: hidden states, projected chunk by chunk beside the student's."""

    hidden: Tensor  # [M, H]
    head: Tensor  # [V, H]; no gradient
    transform: LogitTransform = IDENTITY  # no gradient


@frozen(eq=False, kw_only=True)
class RoutedScores:
    """Several teachers' answers: each token has one of them."""

    parts: tuple[TeacherScores, ...]
    part: Tensor  # [M] long; which part
    place: Tensor  # [M] long; where in it
    vocabulary: int


@frozen(eq=False, kw_only=True)
class TopKLogprobs:
    """What a teacher told of a few ids alone, at temperature 1: its k likeliest, and the sampled token."""

    ids: Tensor  # [M, K] long, likeliest first; K may be 0
    logprobs: Tensor  # [M, K] float32; -inf: no such token (the student has no such id)
    sampled: Tensor  # [M] float32

    def at(self, places: slice | Tensor) -> TopKLogprobs:
        """The same of some of the tokens."""
        return TopKLogprobs(
            ids=self.ids[places], logprobs=self.logprobs[places], sampled=self.sampled[places]
        )


@frozen(eq=False, kw_only=True)
class BlendedScores:
    """A product of powers of several answers, which is a sum of their logits: Q ∝ Π part^factor, at any temperature.

    Not normalised.  As an advantage log Q − log S the logarithm of the normaliser is one number a state: a baseline,
    without a part in the expected gradient of tokens drawn from the student (where no floor or clip binds).
    """

    parts: tuple[TeacherScores, ...]
    factors: tuple[float, ...]  # one a part, as they are at this optimizer step; none of them 0


TeacherScores = HiddenStateScores | RoutedScores | TopKLogprobs | BlendedScores
"""What a teacher says of the counted tokens."""


class RolloutBackend(Protocol):
    """Token ids in, token ids out."""

    name: str

    def load(self, weights: Any, version: int) -> Mapping[str, float]:
        """Take these weights; returns figures of the transfer (seconds, canary difference)."""
        ...

    def sample(
        self, requests: Sequence[SamplingRequest], sampling: SamplingParams
    ) -> list[Completion]:
        """One completion per request, in order; equal requests give equal completions."""
        ...

    def close(self) -> None:
        """Free what the backend holds."""
        ...
