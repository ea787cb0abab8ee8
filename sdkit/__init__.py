"""sdkit: self-distillation and on-policy distillation of language models, as data.

`import sdkit` loads neither torch nor the rest of sdkit: each name below is imported when it is first used.
docs/api.md describes them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdkit.api import (
        check_spec,
        load_spec,
        plan_spec,
        read_evaluations,
        read_metrics,
        read_rollouts,
        read_status,
        resolve_spec,
        show_spec,
    )
    from sdkit.batches import RolloutBatch, TopKLogprobs
    from sdkit.language.errors import InvalidSpec, Problem, SdkitError
    from sdkit.language.specs import ExperimentSpec, LossSpec, MethodSpec, TeacherSpec
    from sdkit.train.batch_objective import BatchObjective, build_objective, build_rollout_batch

__version__ = "0.1.0"
__all__ = [
    "BatchObjective",
    "ExperimentSpec",
    "InvalidSpec",
    "LossSpec",
    "MethodSpec",
    "Problem",
    "RolloutBatch",
    "SdkitError",
    "TeacherSpec",
    "TopKLogprobs",
    "build_objective",
    "build_rollout_batch",
    "check_spec",
    "load_spec",
    "plan_spec",
    "read_evaluations",
    "read_metrics",
    "read_rollouts",
    "read_status",
    "resolve_spec",
    "show_spec",
]

_MODULES = {
    "sdkit.batches": ("RolloutBatch", "TopKLogprobs"),
    "sdkit.language.errors": ("InvalidSpec", "Problem", "SdkitError"),
    "sdkit.language.specs": ("ExperimentSpec", "LossSpec", "MethodSpec", "TeacherSpec"),
    "sdkit.train.batch_objective": ("BatchObjective", "build_objective", "build_rollout_batch"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sdkit' has no attribute '{name}'")
    module = next((module for module, names in _MODULES.items() if name in names), "sdkit.api")
    return getattr(import_module(module), name)
