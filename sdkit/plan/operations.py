"""Counts the operations of a forward pass."""

from __future__ import annotations

from sdkit.language.specs import ShapeSpec


def forward_operations(shape: ShapeSpec, tokens: float, length: float, scored: float) -> float:
    """Returns the operations of a forward pass over `tokens` tokens, `scored` of which need logits.

    2 per token and parameter of the layers, 2 · layers · width · length per token for causal attention in sequences of
    `length` (a token attends to half of them on average, in two products), and 2 · width · vocabulary per scored token.
    Embeddings apart from the output projection count as layers, for a shape does not say whether they are tied.
    """
    head = shape.vocab_size * shape.hidden_size
    attention = 2 * shape.num_hidden_layers * shape.hidden_size * length
    return tokens * (2 * (shape.parameters - head) + attention) + 2 * head * scored


def shared_prompt_operations(shape: ShapeSpec, prompts: float, prompt: float, completions: int, new: int) -> float:
    """Returns the operations of a pass that scores `completions` of `new` tokens, after `prompts` of `prompt` tokens."""
    tokens = completions * new
    after = forward_operations(shape, tokens, 2 * prompt + new, tokens)  # a completion attends to its whole prompt
    return forward_operations(shape, prompts * prompt, prompt, 0) + after
