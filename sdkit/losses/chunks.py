"""Computes the loss from hidden states in chunks of tokens, so no [M, V] tensor is ever allocated.

Each chunk's gradient is computed while its logits are in memory.  The backward pass only scales the stored gradients:
[M, H] for the hidden states and, if the head is trained, [V, H] (and [V] for its bias) in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdkit.batches import IDENTITY, HiddenStateScores, LogitTransform, TeacherScores, Tokens, TopKLogprobs
from sdkit.losses.divergence import entropy
from sdkit.losses.objective import Objective
from sdkit.losses.scores import logits as logits_of
from sdkit.losses.scores import sampled_logprobs, select_scores
from sdkit.losses.support import sampled_token, top_k_ids

BLOCK_BYTES = 4 * 2**20
"""Size of a float32 block of logits on a CPU.  The objective makes some twenty tensors of this size.  Small ones stay in
the cache and in the allocator; the pages of large ones go back to the kernel, and getting new ones takes longer than the
arithmetic (measured at 152k ids: docs/decisions.md, 2026-11-28)."""


def projected_loss(
    hidden: Tensor,
    head: Tensor,
    teacher: TeacherScores | None,
    tokens: Tokens,
    objective: Objective,
    chunk_tokens: int,
    reference: TeacherScores | None = None,
    transform: LogitTransform = IDENTITY,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the scalar loss, with a graph, and the objective's sums over all M tokens (its values per token, [M]).

    hidden [M, H] and head [V, H] have the model's dtype.  Logits are computed in that dtype, with the student's
    `transform`, and converted to float32 afterwards (objective.py).  Without grad mode, or if no input requires a
    gradient, only values are computed.  M = 0 gives a zero loss that can still be differentiated.
    """
    bias = transform.bias
    trained = [x for x in (hidden, head, bias) if x is not None and x.requires_grad]
    needs_grad = torch.is_grad_enabled() and bool(trained)
    grad_hidden = torch.zeros_like(hidden) if needs_grad else None
    grad_head = _accumulator(head) if needs_grad and head.requires_grad else None
    grad_bias = _accumulator(bias) if needs_grad and bias is not None and bias.requires_grad else None
    transform = transform.detached()
    losses: list[Tensor] = []
    stats: dict[str, Tensor] = {}
    rows = min(chunk_tokens, len(tokens))
    own_buffer = hidden.new_empty(rows, len(head))
    teacher_buffer, reference_buffer = (_buffer(scores, rows) for scores in (teacher, reference))
    for start in range(0, max(len(tokens), 1), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        chunk = tokens.slice(part.start, part.stop)
        with torch.no_grad():
            products = torch.mm(hidden[part], head.T, out=own_buffer[: len(chunk)])
            others = (
                teacher and select_scores(teacher, part, teacher_buffer),
                reference and logits_of(reference, part, reference_buffer),
            )
        for loss, sums in _block_losses(products, chunk, objective, transform, *others, needs_grad=needs_grad):
            losses.append(loss)
            stats = {name: _joined(stats.get(name), value) for name, value in sums.items()}
        if grad_hidden is None:
            continue
        gradient = products  # _block_losses has replaced each product by its gradient
        torch.mm(gradient, head.detach(), out=grad_hidden[part])
        if grad_head is not None:
            _add_product(grad_head, gradient.T, hidden.detach()[part])
        if grad_bias is not None:  # the bias is added to the products, so it has their gradient
            grad_bias += gradient.sum(0, dtype=grad_bias.dtype)
    value = torch.stack(losses).sum()
    if grad_hidden is None:
        return value, stats
    return _WithGradients.apply(value, hidden, head, bias, grad_hidden, grad_head, grad_bias), stats


def _buffer(scores: TeacherScores | None, rows: int) -> Tensor | None:
    """Memory for the logits of a chunk, which each chunk overwrites; None for scores that are no product of states."""
    return scores.hidden.new_empty(rows, len(scores.head)) if isinstance(scores, HiddenStateScores) else None


def _block_losses(
    products: Tensor,
    tokens: Tokens,
    objective: Objective,
    transform: LogitTransform,
    teacher: Tensor | TopKLogprobs | None,
    reference: Tensor | None,
    *,
    needs_grad: bool,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yields the loss and sums of each block of a chunk; overwrites `products` [C, V] by the gradient if one is needed."""
    rows = _block_rows(products)
    for start in range(0, max(len(products), 1), rows):
        at = slice(start, start + rows)
        own = products[at].requires_grad_(needs_grad)
        teacher_rows = None if teacher is None else _at(teacher, at)
        reference_rows = None if reference is None else reference[at]
        loss, sums = objective(transform(own), teacher_rows, tokens.slice(at.start, at.stop), reference_rows)
        if needs_grad:
            (gradient,) = torch.autograd.grad(loss, own)
            own.detach().copy_(gradient)
        yield loss.detach(), sums


def _block_rows(products: Tensor) -> int:
    """Returns how many rows of a chunk [C, V] the objective takes at once: all on an accelerator, few on a CPU."""
    if products.device.type != "cpu":
        return max(len(products), 1)
    return max(BLOCK_BYTES // (4 * products.shape[1]), 1)


def _joined(first: Tensor | None, second: Tensor) -> Tensor:
    """The sum of two scalars, or two vectors one after the other."""
    if first is None:
        return second
    return torch.cat([first, second]) if second.ndim else first + second


def _at(scores: Tensor | TopKLogprobs, rows: slice) -> Tensor | TopKLogprobs:
    return scores[rows] if isinstance(scores, Tensor) else scores.at(rows)


def _add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """total += first @ second, in one pass where the dtypes are the same."""
    if total.dtype == first.dtype:
        total.addmm_(first, second)
    else:
        total += first @ second


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    token: Tensor,
    temperature: float,
    chunk_tokens: int,
    transform: LogitTransform = IDENTITY,
) -> Tensor:
    """Returns the log-probability of each given token.  hidden [M, H], head [V, H], token [M] long -> [M] float32."""
    scores = HiddenStateScores(hidden=hidden, head=head, transform=transform)
    return scored_logprobs(scores, token, temperature, chunk_tokens)


def scored_logprobs(scores: TeacherScores, token: Tensor, temperature: float, chunk_tokens: int) -> Tensor:
    """Returns the log-probability of each given token under `scores`.  token [M] long -> [M] float32.

    For `TopKLogprobs`, `token` must be the sampled tokens.  Raises ValueError for `TopKLogprobs` if the temperature is
    not 1.
    """
    if isinstance(scores, TopKLogprobs):
        return sampled_logprobs(scores, temperature)
    chunks = _logprobs(scores, len(token), temperature, chunk_tokens)
    return torch.cat([sampled_token(logprobs, token[part]) for part, logprobs in chunks])


def token_logprobs_and_entropy(
    scores: TeacherScores, token: Tensor, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Returns each given token's log-probability and the entropy at its position.  token [M] long -> twice [M] float32."""
    chunks = _logprobs(scores, len(token), temperature, chunk_tokens)
    pairs = [(sampled_token(logprobs, token[part]), entropy(logprobs)) for part, logprobs in chunks]
    token_parts, entropy_parts = zip(*pairs, strict=True)
    return torch.cat(token_parts), torch.cat(entropy_parts)


def top_k_logprobs(scores: TeacherScores, token: Tensor, k: int, chunk_tokens: int) -> TopKLogprobs:
    """Reduces a local teacher's scores to the top-k form that a served teacher returns.  token [M] long: the sampled ids."""
    parts: list[TopKLogprobs] = []
    for part, logprobs in _logprobs(scores, len(token), 1.0, chunk_tokens):
        ids = top_k_ids(logprobs, k)
        sampled = sampled_token(logprobs, token[part])
        parts.append(TopKLogprobs(ids=ids, logprobs=logprobs.gather(-1, ids), sampled=sampled))
    return TopKLogprobs(
        ids=torch.cat([p.ids for p in parts]),
        logprobs=torch.cat([p.logprobs for p in parts]),
        sampled=torch.cat([p.sampled for p in parts]),
    )


@torch.no_grad()
def _logprobs(
    scores: TeacherScores, count: int, temperature: float, chunk_tokens: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yields slices of positions with their log-probabilities [C, V], float32; one empty slice if M is 0."""
    for start in range(0, max(count, 1), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        yield part, (logits_of(scores, part).float() / temperature).log_softmax(-1)


def _accumulator(parameter: Tensor) -> Tensor:
    """Zeros of the parameter's shape, at least float32, to accumulate the gradients of the chunks."""
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


class _WithGradients(torch.autograd.Function):
    """A value whose gradients were computed together with it."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        grad_hidden: Tensor,
        grad_head: Tensor | None,
        grad_bias: Tensor | None,
    ) -> Tensor:
        ctx.head_dtype = head.dtype
        ctx.gradients = grad_hidden, grad_head, grad_bias
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: once_differentiable's type
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        if ctx.gradients is None:
            raise RuntimeError("a second backward pass: the first has overwritten the gradients")
        # In place: at 7B another [V, H] in float32 takes 2 GiB.
        grad_hidden, *head_grads = (None if g is None else g.mul_(scale) for g in ctx.gradients)
        ctx.gradients = None
        return None, grad_hidden, *(None if g is None else g.to(ctx.head_dtype) for g in head_grads), None, None, None
