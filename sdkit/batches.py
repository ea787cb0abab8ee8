"""Data types of a training step: rows, rollouts, micro-batches, teacher scores.

Instances are frozen; those that hold tensors or rows compare by identity.  Rollouts are ragged tuples of token ids;
padding is added only when a micro-batch is built.  Shapes: N sequences, S padded length, M completion tokens that some
loss term counts (of all sequences of a micro-batch, in order), H hidden width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from attrs import evolve, field, fields, frozen

from sdkit.language.errors import BadData
from sdkit.language.row_text import Fault, text_of
from sdkit.spans import ASSISTANT, Ending, Span, check_spans, sampled_positions
from sdkit.stdout import Advance, no_progress

if TYPE_CHECKING:  # rows are checked without torch
    import torch
    from torch import Tensor

Message = Mapping[str, Any]
"""One chat message: {"role": "system" | "user" | "assistant" | "tool", "content": text}, with what `sdkit.data.chats` says of
tool calls and their results."""


@frozen(eq=False, kw_only=True)
class Row:
    """One row of a data set, with its columns under sdkit's names."""

    index: int
    messages: tuple[Message, ...]  # the student's prompt, as chat
    columns: Mapping[str, Any]  # every mapped column
    raw: Mapping[str, Any]  # the row as it was read
    tools: tuple[Mapping[str, Any], ...] = ()  # schemas of the functions that the chat template shows

    @property
    def prompt_text(self) -> str:
        """The last user message."""
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "user")

    def with_opening(self, text: str) -> Row:
        """Returns the row with a text appended to its last user message."""
        last = max(i for i, message in enumerate(self.messages) if message["role"] == "user")
        message = {**self.messages[last], "content": self.messages[last]["content"] + text}
        return evolve(self, messages=(*self.messages[:last], message, *self.messages[last + 1 :]))

    def text(self, column: str) -> str | None:
        """Returns the text of a column, or None if the row has none.  Raises BadData if the value is not text."""
        try:
            return text_of(self.columns.get(column))
        except Fault as fault:
            raise BadData(f"row {self.index}: '{column}' is {fault}") from None


@frozen(eq=False, kw_only=True)
class Attempt:
    """A rollout's completion as text, with its reward and feedback."""

    text: str
    reward: float
    feedback: str | None = None
    answer: str | None = None  # the text without thinking; None: not computed


@frozen(eq=False, kw_only=True)
class GroupOutcome:
    """A rollout's group after scoring: the evidence that a teacher's context may use."""

    group: Sequence[Attempt]  # all rollouts of the prompt, in order
    own: int  # index of this rollout in the group
    seed: int  # for a random choice


@frozen(eq=False, kw_only=True)
class TurnOutcome:
    """A turn of a trajectory: what stands before it, and what a teacher's context may say about it."""

    history: tuple[int, ...] = ()  # ids of the turns and observations before it
    last_user: tuple[int, int] | None = None  # where `history` has the text of its last user turn, if it has one
    feedback: str | None = None  # on the turn
    later: Sequence[Sequence[tuple[str, str]]] = ()  # of each turn from this one on: role and text of what followed it
    number: int = 1
    written: str = ""  # the writer's answer about the rollout; empty: it failed, or there is none


@frozen(kw_only=True)
class SamplingParams:
    """Sampling parameters; temperature 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    ids_below: int | None = None  # sample only ids below this; None: all ids of the model


@frozen(kw_only=True)
class SamplingRequest:
    """A request to a backend for one completion."""

    prompt_ids: tuple[int, ...]
    seed: int
    max_new_tokens: int | None = None  # if fewer than the sampling parameters allow
    trajectory: int | None = None  # of a later turn: the seed of the first one
    environment_seed: int = 0  # of its trajectory's environment; equal for all completions of a prompt


@frozen(eq=False, kw_only=True)
class Completion:
    """A backend's answer: ids up to and including the end token.  With `spans`: those of several turns."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None  # at the sampling temperature, after top-p and top-k; 0 where not sampled
    finished: bool  # False if a limit cut it off
    spans: tuple[Span, ...] = ()  # none: one sampled turn
    ending: Ending | None = None  # of a trajectory
    turn_rewards: tuple[float, ...] = ()  # of a trajectory's turns, as its environment judged them
    turn_feedback: tuple[str | None, ...] = ()  # on each of a trajectory's turns; none: its environment gives none
    unanswered: tuple[tuple[str, str], ...] = ()  # role and text of what followed the last turn, which nothing answers
    reward: float | None = None  # of a trajectory, if its environment gives one
    opening: str | None = None  # what a trajectory's environment appended to the last user message of its prompt
    written: str | None = None  # a writer's answer about it; empty: it failed; None: not asked

    @property
    def parts(self) -> Sequence[Span]:
        """The spans; without any, one of all tokens."""
        return self.spans or (Span(role=ASSISTANT, turn=1, start=0, end=len(self.ids)),)

    @property
    def sampled(self) -> Sequence[int]:
        """The positions that were sampled, ascending."""
        return sampled_positions(self.spans, len(self.ids))

    @property
    def sampled_ids(self) -> Sequence[int]:
        """The ids of all turns, without what was shown in between."""
        return [self.ids[position] for position in self.sampled]


@frozen(eq=False, kw_only=True)
class LossMask:
    """The tokens of a completion that one loss term counts, and their weights."""

    positions: tuple[int, ...]  # ascending
    weights: tuple[float, ...] | None = None  # one per position; None: all 1


@frozen(kw_only=True)
class View:
    """What the teacher sees before tokens start..end of a completion, which it scores."""

    prompt_ids: tuple[int, ...]
    start: int
    end: int


@frozen(eq=False, kw_only=True)
class Rollout:
    """One prompt with one completion, which may have several turns."""

    row: Row
    group: int  # rollouts of a group share their prompt; ids are unique over all ranks
    prompt_ids: tuple[int, ...]  # the student's prompt in training
    # None: no teacher for this rollout.  Of a teacher whose context differs by turn: the prompt of its first view.
    teacher_prompt_ids: tuple[int, ...] | None
    completion_ids: tuple[int, ...]
    spans: tuple[Span, ...] = ()  # none: all of the completion was sampled
    ending: Ending | None = None  # of a trajectory
    turn_rewards: tuple[float, ...] = ()  # of a trajectory's turns
    turn_feedback: tuple[str | None, ...] = ()  # on each of a trajectory's turns
    unanswered: tuple[tuple[str, str], ...] = ()  # role and text of what followed a trajectory's last turn
    views: tuple[View, ...] = ()  # of a teacher whose context differs by turn, ascending; none: see `teacher_views`
    environment_reward: float | None = None
    opening: str | None = None  # what its environment appended to the prompt; `row` has it, too
    written: str | None = None  # a writer's answer about it; empty: it failed; None: not asked
    # One per completion token, as all values per token; arbitrary where it was not sampled.
    sampler_logprobs: tuple[float, ...] | None
    # Computed by the trainer, before the first update on this batch.
    old_logprobs: tuple[float, ...] | None = None
    policy_version: int  # optimizer steps completed by the weights that sampled
    finished: bool
    reward: float | None = None  # of the reward used for training
    teacher_route: int = 0  # index of the route that teaches it, for a routed teacher
    filled_slots: tuple[str, ...] = ()  # non-empty slots of the teacher's context
    advantage: float | None = None  # the reward relative to its group
    group_rewards: tuple[float, ...] = ()  # of all rollouts of the group, as sampled
    # Per token, before the first update on this batch (train/token_statistics.py).
    token_statistics: Mapping[str, tuple[float, ...]] = field(factory=dict)
    loss_masks: Mapping[str, LossMask] | None = None  # per loss term; None: not computed yet
    branch: Literal["then", "otherwise"] | None = None  # branch of the method's route, if it has one

    @property
    def sampled(self) -> Sequence[int]:
        """The positions of the completion that were sampled, ascending."""
        return sampled_positions(self.spans, len(self.completion_ids))

    @property
    def sampled_ids(self) -> Sequence[int]:
        """The ids of all turns, without what was shown in between."""
        return [self.completion_ids[position] for position in self.sampled]

    @property
    def is_by_student(self) -> bool:
        """Whether the student sampled some of it; False for a trajectory that ended within its demonstration."""
        return not self.spans or any(span.sampled for span in self.spans)

    @property
    def teacher_views(self) -> tuple[View, ...]:
        """The views that the teacher scores: of single turns, or one of the whole completion; none without a teacher."""
        if self.views or self.teacher_prompt_ids is None:
            return self.views
        return (View(prompt_ids=self.teacher_prompt_ids, start=0, end=len(self.completion_ids)),)

    def in_views(self, positions: Sequence[int]) -> list[bool]:
        """Returns whether the teacher scores each of these tokens of the completion."""
        scored = [False] * len(self.completion_ids)
        for view in self.teacher_views:
            scored[view.start : view.end] = [True] * (view.end - view.start)
        return [scored[position] for position in positions]


def check_views(views: Sequence[View], length: int) -> None:
    """Raises ValueError unless the views are ascending parts of a completion of `length` tokens."""
    end = 0
    for view in views:
        if not end <= view.start < view.end <= length:
            raise ValueError(f"a view of tokens {view.start} to {view.end} of {length}, after one that ends at {end}")
        end = view.end


@frozen(eq=False, kw_only=True)
class RolloutBatch:
    """All rollouts of one step on this rank; each group is contiguous."""

    rollouts: tuple[Rollout, ...]

    def __iter__(self) -> Iterator[Rollout]:
        return iter(self.rollouts)

    def __len__(self) -> int:
        return len(self.rollouts)

    def check(self) -> None:
        """Raises ValueError if a rollout is inconsistent or a group is not contiguous."""
        seen: list[int] = []
        for r in self.rollouts:
            for name in ("sampler_logprobs", "old_logprobs"):
                values = getattr(r, name)
                if values is not None and len(values) != len(r.completion_ids):
                    raise ValueError(f"{len(values)} {name} for {len(r.completion_ids)} tokens")
            for name, values in r.token_statistics.items():
                if len(values) != len(r.completion_ids):
                    raise ValueError(f"{len(values)} {name} for {len(r.completion_ids)} tokens")
            check_spans(r.spans, len(r.completion_ids))
            check_views(r.views, len(r.completion_ids))
            if not r.prompt_ids:
                raise ValueError(f"rollout of row {r.row.index} has no prompt")
            if r.group in seen[:-1]:
                raise ValueError(f"group {r.group} is not contiguous")
            if not seen or seen[-1] != r.group:
                seen.append(r.group)

    def split(self, parts: int) -> tuple[RolloutBatch, ...]:
        """Splits the batch into `parts` batches of whole groups, in order."""
        groups: dict[int, list[Rollout]] = {}
        for r in self.rollouts:
            groups.setdefault(r.group, []).append(r)
        contents = list(groups.values())
        edges = [round(i * len(contents) / parts) for i in range(parts + 1)]
        return tuple(
            RolloutBatch(rollouts=tuple(r for g in contents[a:b] for r in g)) for a, b in itertools.pairwise(edges)
        )


@frozen(eq=False, kw_only=True)
class UnpaddedSequence:
    """One sequence without padding; `positions` of its completion are among the M tokens."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    positions: tuple[int, ...]


@frozen(kw_only=True)
class PrefixGroup:
    """Consecutive rows of a forward pass whose first tokens are equal, and computed once where the model allows it."""

    start: int
    end: int  # of the rows
    prefix: int  # number of those tokens; none of them predicts a counted token.  0: nothing is worth computing apart
    width: int  # tokens of the widest row


@frozen(eq=False, kw_only=True)
class PaddedSequences:
    """Padded token ids for one forward pass, and where the M counted tokens are predicted."""

    input_ids: Tensor  # [R, S] long; R = N rows, or fewer where rollouts share their prompt
    # [R, 1, S, S] bool where rows are shared.  None: causal; padding is on the right, where no token attends to it.
    attention_mask: Tensor | None
    positions: Tensor | None  # [R, S] long where rows are shared
    tokens: int  # without padding
    prefix_groups: tuple[PrefixGroup, ...]  # all R rows, in order
    # [M] long; index into the flattened [R * S] of the hidden state that predicts a token.
    predictor_index: Tensor
    texts: tuple[UnpaddedSequence, ...]  # the N sequences, unpadded


@frozen(eq=False, kw_only=True)
class Tokens:
    """The M counted tokens, with the values that the losses need of each."""

    token: Tensor  # [M] long; the sampled id
    row: Tensor  # [M] long; sequence in the micro-batch, 0..N-1, ascending
    # Per loss term: [M] float32; 0 at tokens that the term does not count.
    weights: Mapping[str, Tensor]
    sampler_logprobs: Tensor | None  # [M] float32
    old_logprobs: Tensor | None  # [M] float32; None: use the current log-probabilities, detached
    ratio: Tensor | None = None  # [M] float32; sampler correction, if it needs complete sequences
    fully_counted: frozenset[str] = frozenset()  # terms known, without asking the device, to count every token
    advantages: Tensor | None = None  # [M] float32; from the reward of the token's rollout
    has_teacher: Tensor | None = None  # [M] bool; whether a teacher's view has the token (None: all)
    turn: Tensor | None = None  # [M] long, below M, ascending; turn of any sequence (None: one turn per sequence)
    # [M] float32 each: means and discounted sums over complete sequences (losses/policy_terms.py).
    sequence_means: Mapping[str, Tensor] = field(factory=dict)

    def __len__(self) -> int:
        return self.token.numel()

    def counts(self, term: str) -> Tensor | None:
        """Returns which tokens a loss term counts, [M] bool; None if it is known to count all."""
        return None if term in self.fully_counted else self.weights[term] > 0

    def slice(self, start: int, end: int) -> Tokens:
        """Returns tokens start..end as views."""
        return self._map(lambda x: x[start:end])

    def to(self, device: torch.device) -> Tokens:
        """Returns the tokens on another device."""
        return self._map(lambda x: x.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """Returns the tokens with every tensor changed."""
        from torch import Tensor

        def changed(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: change(x) for name, x in value.items()}
            return change(value) if isinstance(value, Tensor) else value

        return Tokens(**{part.name: changed(getattr(self, part.name)) for part in fields(Tokens)})


@frozen(eq=False, kw_only=True)
class MicroBatch:
    """Input of one forward and backward pass.  May have no rows, on a rank with fewer rollouts than others."""

    student: PaddedSequences
    teacher: PaddedSequences | None
    tokens: Tokens
    rows: int  # N
    teacher_routes: tuple[int, ...]  # [N]; index of the route that scores a rollout
    teacher_rows: tuple[int, ...]  # of each sequence of `teacher`: its rollout, 0..N-1, ascending


@frozen(kw_only=True)
class Counts:
    """Sizes of the global batch (all micro-batches, all ranks) for one loss term."""

    rows: int
    filled_rows: int  # rows with at least one counted token
    turns: int  # with at least one counted token
    tokens: int


@frozen(eq=False, kw_only=True)
class LogitTransform:
    """Computes logits from head × hidden: softcap(scale × (product + bias)); each part is optional."""

    scale: float = 1.0
    softcap: float | None = None  # x -> softcap × tanh(x / softcap)
    bias: Tensor | None = None  # [V]

    def __call__(self, products: Tensor) -> Tensor:
        """[..., V] -> [..., V] of the same dtype; returns the argument itself if all parts are absent."""
        logits = products if self.bias is None else products + self.bias
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        return logits

    def first(self, rows: int | None) -> LogitTransform:
        """Returns the transform of the first `rows` ids."""
        return self if self.bias is None else evolve(self, bias=self.bias[:rows])

    def detached(self) -> LogitTransform:
        """Returns the transform without gradient."""
        return self if self.bias is None else evolve(self, bias=self.bias.detach())


IDENTITY = LogitTransform()


@frozen(eq=False, kw_only=True)
class HiddenStateScores:
    """A local teacher's hidden states, projected to logits chunk by chunk together with the student's."""

    hidden: Tensor  # [M, H]
    head: Tensor  # [V, H]; no gradient
    transform: LogitTransform = IDENTITY  # no gradient


@frozen(eq=False, kw_only=True)
class RoutedScores:
    """Scores of several teachers; each token is scored by one of them."""

    parts: tuple[TeacherScores, ...]
    part: Tensor  # [M] long; index into `parts`
    place: Tensor  # [M] long; token index within the part
    vocabulary: int


@frozen(eq=False, kw_only=True)
class TopKLogprobs:
    """A teacher's log-probabilities of its k likeliest ids and of the sampled token, at temperature 1."""

    ids: Tensor  # [M, K] long, likeliest first; K may be 0
    logprobs: Tensor  # [M, K] float32; -inf: padding (the student has no such id)
    sampled: Tensor  # [M] float32

    def at(self, index: slice | Tensor) -> TopKLogprobs:
        """Returns the selected tokens."""
        return TopKLogprobs(ids=self.ids[index], logprobs=self.logprobs[index], sampled=self.sampled[index])


@frozen(eq=False, kw_only=True)
class BlendedScores:
    """A product of powers of several teachers, Q ∝ Π part^factor: a weighted sum of logits, at any temperature.

    Not normalised.  In the advantage log Q − log S, the log of the normaliser is one number per state: a baseline, which
    does not change the expected gradient of tokens sampled from the student (unless a floor or clip applies).
    """

    parts: tuple[TeacherScores, ...]
    factors: tuple[float, ...]  # one per part, at this optimizer step; none is 0


TeacherScores = HiddenStateScores | RoutedScores | TopKLogprobs | BlendedScores
"""A teacher's scores of the M counted tokens."""


class RolloutBackend(Protocol):
    """Samples completions: token ids in, token ids out."""

    name: str

    def load(self, weights: Any, version: int) -> Mapping[str, float]:
        """Loads weights; returns metrics of the transfer (seconds, canary difference)."""
        ...

    def sample(
        self, requests: Sequence[SamplingRequest], sampling: SamplingParams, advance: Advance = no_progress
    ) -> list[Completion]:
        """Returns one completion per request, in order; equal requests give equal completions.

        `advance` receives numbers of completions as they are sampled, in all about one for each request.
        """
        ...

    def close(self) -> None:
        """Releases the backend's resources."""
        ...
