"""The operations that a step's mathematics needs, whoever computes it (sdkit/plan/operations.py).

Sampling computes each prompt once per group and each completion token once; the student's update, each prompt once per group;
the teacher's pass, each prompt.
"""

from __future__ import annotations

from attrs import frozen

from sdkit.language.specs import ShapeSpec
from sdkit.plan.operations import forward_operations, shared_prompt_operations, training_factor
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
    completions = rollouts * new
    sampling = forward_operations(model, shape.prompts * prompt, prompt, shape.prompts)
    sampling += forward_operations(model, completions, 2 * prompt + new, completions)
    teacher = shared_prompt_operations(model, rollouts, teacher_prompt, rollouts, new)
    student = shared_prompt_operations(model, shape.prompts, prompt, rollouts, new)
    return Operations(sampling=sampling, training=teacher + training_factor(adapters=shape.lora) * student)
