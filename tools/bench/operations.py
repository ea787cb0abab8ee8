"""The operations that a step's mathematics needs, whoever computes it.

A forward pass takes 2 operations per parameter of the layers and token, 2 · layers · width · length per token for
causal attention in a sequence of `length`, and 2 · width · vocabulary for each token whose logits are needed.  A
backward pass takes twice as much, or as much as the forward pass if the weights are frozen under adapters.  Sampling
computes each prompt once per group and each completion token once; the student's update, each prompt once per group;
the teacher's pass, each prompt.
"""

from __future__ import annotations

from attrs import frozen

from sdkit.language.specs import ShapeSpec
from tools.bench.shapes import Shape


@frozen(kw_only=True)
class Operations:
    """Operations of one step."""

    sampling: float
    training: float

    @property
    def total(self) -> float:
        return self.sampling + self.training


def count_operations(shape: Shape, model: ShapeSpec, prompt: float, teacher_prompt: float) -> Operations:
    """Return the operations of a step whose prompts have `prompt` and `teacher_prompt` tokens on average."""
    new, rollouts = shape.max_new_tokens, shape.prompts * shape.group
    head = model.vocab_size * model.hidden_size
    layers = model.parameters - head  # the embeddings are the head: every model here ties them

    def forward(tokens: float, length: float, scored: float) -> float:
        attention = 2 * model.num_hidden_layers * model.hidden_size * length
        return tokens * (2 * layers + attention) + 2 * head * scored

    completions = rollouts * new
    sampling = forward(shape.prompts * prompt, prompt, shape.prompts) + forward(
        completions, 2 * prompt + new, completions
    )
    teacher = forward(rollouts * (teacher_prompt + new), teacher_prompt + new, completions)
    student = forward(shape.prompts * prompt, prompt, 0) + forward(completions, 2 * prompt + new, completions)
    return Operations(sampling=sampling, training=teacher + (2 if shape.lora else 3) * student)
