"""The operations that passes over a model need, whoever computes them: one formula for plans, metrics and benchmarks.

A forward pass takes 2 operations per parameter of the layers and token, 2 · layers · width · length per token for causal
attention in a sequence of `length` tokens, and 2 · width · vocabulary for each token whose logits are needed.  A token
after a prompt attends to all of it: there, `length` is twice the prompt and once the rest.
"""

from __future__ import annotations

from sdkit.language.specs import ShapeSpec


def forward_operations(shape: ShapeSpec, tokens: float, length: float, scored: float) -> float:
    """Returns the operations of a forward pass over `tokens` tokens of sequences of `length`, with `scored` logits.

    Embeddings apart from the output projection count as layers, unless `shape` leaves them out.
    """
    head = shape.vocab_size * shape.hidden_size
    attention = 2 * shape.num_hidden_layers * shape.hidden_size * length
    return tokens * (2 * (shape.parameters - head) + attention) + 2 * head * scored


def shared_prompt_operations(shape: ShapeSpec, prompts: float, prompt: float, completions: int, new: float) -> float:
    """Returns the operations of a pass that scores `completions` of `new` tokens, after `prompts` of `prompt` tokens."""
    tokens = completions * new
    after = forward_operations(shape, tokens, 2 * prompt + new, tokens)  # a completion attends to its whole prompt
    return forward_operations(shape, prompts * prompt, prompt, 0) + after


def training_factor(*, adapters: bool) -> int:
    """Returns a forward and backward pass in forward passes.

    The backward pass takes twice as much as the forward pass, or as much if the base weights are frozen under adapters.
    """
    return 2 if adapters else 3
