"""Estimates what a micro-batch stores beside the models: activations, the projection chunk, the head's gradient.

Pure arithmetic for a decoder of the Llama family, whose layers hold two RMSNorms, attention and a feed-forward part.  It
counts what autograd saves and what is alive when most is; tests/plan/test_memory.py compares it with real runs.
"""

from __future__ import annotations

import math
from typing import assert_never

from sdkit.language.specs import (
    BaseDivergence,
    CrossEntropy,
    Distillation,
    DivergenceClip,
    ExperimentSpec,
    ForwardKl,
    LinearMix,
    Loss,
    PolicyGradient,
    ReferenceKl,
    ReverseKl,
    ShapeSpec,
    SkewedForwardKl,
    SkewedReverseKl,
    VocabularySupport,
)

FLOAT32 = 4
LONGEST_PACK = 2048
"""Tokens of the longest row that completions of one prompt share, as in models/packing.py."""
CPU_BLOCK_BYTES = 4 * 2**20
"""Size of the blocks of float32 logits in which a CPU computes the objective, as in losses/chunks.py."""


def micro_batch_tokens(spec: ExperimentSpec, ranks: int) -> int:
    """Returns the largest number of the student's tokens in one pass of a rank.

    That is `training.micro_batch_tokens`, or less if an update has fewer, or more if one rollout is longer.
    """
    budget, prompt = spec.training.micro_batch_tokens, spec.rollout.max_prompt_tokens
    if prompt is None:
        return budget
    longest = prompt + spec.longest_completion()
    prompts = math.ceil(spec.training.prompts_per_step / ranks)
    rollouts = math.ceil(prompts * spec.rollout.completions_per_prompt / spec.training.updates_per_rollout)
    return max(min(budget, rollouts * longest), longest)


def stored_bytes(spec: ExperimentSpec, shape: ShapeSpec, width: int, tokens: int, *, on_cpu: bool) -> float:
    """Returns the bytes of the activations of `tokens` tokens between the forward and the backward pass.

    `width` is the size of a value of the model in bytes.
    """
    hidden = width * shape.hidden_size
    layer = hidden if spec.model.activation_checkpointing else layer_bytes(spec, shape, width, tokens, on_cpu=on_cpu)
    norm = FLOAT32 * shape.hidden_size + 2 * hidden
    sides = 2 + (spec.teacher is not None) + spec.needs_reference  # hidden states, and the gradient of the student's
    return tokens * (shape.num_hidden_layers * layer + norm + sides * hidden)


def recomputed_bytes(spec: ExperimentSpec, shape: ShapeSpec, width: int, tokens: int, *, on_cpu: bool) -> float:
    """Returns the bytes of the one layer that activation checkpointing recomputes at a time, with its gradients."""
    if not spec.model.activation_checkpointing:
        return 0.0
    return tokens * (layer_bytes(spec, shape, width, tokens, on_cpu=on_cpu) + 2 * width * intermediate_size(shape))


def layer_bytes(spec: ExperimentSpec, shape: ShapeSpec, width: int, tokens: int, *, on_cpu: bool) -> float:
    """Returns the bytes that autograd saves of one layer, per token of a pass over `tokens` tokens.

    An RMSNorm saves its input in float32, the normalized input and its output.  Attention saves queries, keys, values
    and its result; with the mask of shared prompts, GPUs first repeat keys and values for every head.  A gated
    feed-forward part saves the gate before and after its activation, the other factor, and their product.
    """
    queries = shape.q_width or shape.hidden_size
    keys = shape.kv_width or shape.hidden_size
    norms = 2 * (FLOAT32 + 2 * width) * shape.hidden_size
    if shape.qk_norm:
        norms += (FLOAT32 + width) * (queries + keys)
    heads = shape.num_attention_heads or max(queries // 128, 1)
    attention = 2 * width * (queries + keys) + FLOAT32 * heads
    row = longest_row(spec, tokens)
    if spec.model.attn_implementation == "eager":  # softmax in float32, and its copy in the model's dtype
        scores = FLOAT32 + (width if width < FLOAT32 else 0)
        attention = 4 * width * queries + scores * heads * row
    elif shares_rows(spec):
        attention += width * row + (0 if on_cpu else 2 * width * (queries - keys))
    feed_forward = (4 if shape.gated_mlp else 2) * width * intermediate_size(shape)
    return norms + attention + feed_forward


def shares_rows(spec: ExperimentSpec) -> bool:
    """Whether completions of one prompt share a row of the forward pass."""
    return spec.training.share_prompts and spec.rollout.completions_per_prompt > 1


def longest_row(spec: ExperimentSpec, tokens: int) -> int:
    """Returns the tokens of the longest row of a pass over `tokens` tokens."""
    prompt = spec.rollout.max_prompt_tokens
    longest = tokens if prompt is None else min(tokens, prompt + spec.longest_completion())
    return max(longest, min(tokens, LONGEST_PACK)) if shares_rows(spec) else longest


def intermediate_size(shape: ShapeSpec) -> float:
    """Returns the width of the feed-forward part; if it is not stated, what the other parameters leave for it."""
    if shape.intermediate_size:
        return shape.intermediate_size
    hidden = shape.hidden_size
    layer = (shape.parameters - shape.vocab_size * hidden) / shape.num_hidden_layers
    return max(layer - attention_parameters(shape), 0.0) / ((3 if shape.gated_mlp else 2) * hidden)


def attention_parameters(shape: ShapeSpec) -> int:
    """Returns the parameters of one layer's query, key, value and output projections."""
    hidden = shape.hidden_size
    return 2 * hidden * ((shape.q_width or hidden) + (shape.kv_width or hidden))


def chunk_bytes(spec: ExperimentSpec, shape: ShapeSpec, width: int, *, on_cpu: bool) -> float:
    """Returns the bytes that are alive while the objective of one chunk of logits is computed.

    The products of student, teacher and reference with the output projection have `chunk_tokens` rows of the model's
    dtype; a blend is in float32.  All else is float32; a CPU computes it in blocks of a few rows.
    """
    rows = spec.training.chunk_tokens
    block = min(rows, max(CPU_BLOCK_BYTES // (FLOAT32 * shape.vocab_size), 1)) if on_cpu else rows
    teacher = any(term.needs_teacher for term in spec.losses.values()) and not any(spec.served_teachers())
    products = width * (1 + spec.has_reference_term + teacher) + (FLOAT32 if spec.blend else 0)
    units = max(_objective_units(term) for term in spec.losses.values()) + len(spec.losses) - 1
    return shape.vocab_size * (rows * products + FLOAT32 * block * units)


def _objective_units(term: Loss) -> int:
    """Tensors [C, V] in float32 that a loss term has alive at once, with its gradient (measured with one term)."""
    match term:
        case CrossEntropy() | PolicyGradient():
            return 3
        case ReferenceKl(estimator=estimator):
            return 6 if estimator == "vocabulary" else 5
        case Distillation(support=VocabularySupport(), divergence=divergence, clip=clip):
            return _divergence_units(divergence) + (clip != DivergenceClip())
        case Distillation():
            return 5
        case _:
            assert_never(term)


def _divergence_units(divergence: BaseDivergence) -> int:
    match divergence:
        case ForwardKl():
            return 6
        case ReverseKl():
            return 7
        case LinearMix():
            return 9
        case SkewedForwardKl() | SkewedReverseKl():
            return 10
        case _:  # Jensen-Shannon; of a user's own divergence nothing is known
            return 12


def head_gradient_bytes(spec: ExperimentSpec, shape: ShapeSpec, width: int) -> tuple[float, float]:
    """Returns the bytes of the output projection's gradient while the loss is computed, and in the backward pass.

    The gradient is accumulated in float32.  The backward pass scales a copy of it and rounds that to the model's dtype.
    """
    if spec.model.lora:
        return 0.0, 0.0
    size = shape.vocab_size * shape.hidden_size
    return FLOAT32 * size, size * (2 * FLOAT32 + (width if width < FLOAT32 else 0))
