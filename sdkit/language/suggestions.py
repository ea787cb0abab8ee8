"""Hints for unknown keys and refused values: the nearest key, sdkit's name for it, or where it belongs.

Imported only when a spec has such a key or value.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from typing import Any

from sdkit.language.errors import did_you_mean
from sdkit.language.introspection import is_spec, keys_of, members
from sdkit.language.specs import ExperimentSpec, Table

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "alpha": ("update_rate", "teacher_share"),
    "beta": ("teacher_share", "update_rate", "coefficient"),
    "kl_coef": ("coefficient",),
    "scale_rewards": ("scale",),
    "epsilon": ("low",),
    "epsilon_high": ("high",),
    "clip_ratio_low": ("low",),
    "clip_ratio_high": ("high",),
    "importance_sampling_level": ("ratio",),
    "tau": ("update_rate", "temperature"),
    "decay": ("update_rate",),
    "ema_decay": ("update_rate",),
    "mixup": ("update_rate",),
    "ref_model_mixup_alpha": ("update_rate",),
    "rate": ("update_rate", "lr"),
    "n": ("completions_per_prompt", "samples"),
    "num_generations": ("completions_per_prompt",),
    "group_size": ("completions_per_prompt",),
    "num_samples": ("samples", "completions_per_prompt"),
    "max_completion_length": ("max_new_tokens",),
    "max_tokens": ("max_new_tokens",),
    "max_length": ("max_new_tokens",),
    "response_length": ("max_new_tokens",),
    "max_prompt_length": ("max_prompt_tokens",),
    "learning_rate": ("lr",),
    "grad_clip": ("max_grad_norm",),
    "gradient_clipping": ("max_grad_norm",),
    "batch_size": ("prompts_per_step",),
    "train_batch_size": ("prompts_per_step",),
    "per_device_train_batch_size": ("micro_batch_tokens",),
    "micro_batch_size": ("micro_batch_tokens",),
    "num_train_epochs": ("epochs",),
    "max_steps": ("steps",),
    "num_iterations": ("updates_per_rollout",),
    "ppo_epochs": ("updates_per_rollout",),
    "gradient_checkpointing": ("activation_checkpointing",),
    "name_or_path": ("path",),
    "model_name_or_path": ("path",),
    "torch_dtype": ("dtype",),
    "base_url": ("url",),
    "endpoint": ("url",),
    "api_key": ("key_from",),
    "timeout": ("request_seconds",),
    "max_retries": ("retries",),
    "eval_every": ("every",),
    "eval_steps": ("every",),
    "save_steps": ("checkpoint_every",),
    "save_every": ("checkpoint_every",),
    "output_dir": ("folder",),
    "kl_type": ("divergence",),
    "loss_type": ("average", "kind"),
    "privileged_context": ("sees",),
    "context": ("sees",),
    "reward": ("rewards",),
    "loss": ("losses",),
    "weight": ("coefficient",),
    "mode": ("kind",),
    "type": ("kind",),
}
"""Names in other toolkits → sdkit's keys, most likely first."""

_NO_K1 = "use k2 or vocabulary: the expected gradient of k1 is 0"
_NO_K3 = "use k2 or vocabulary: the gradient of k3 is that of the forward KL"
_ONE_TOKEN = (
    "use reverse_kl with support: sampled_token; differentiated, k1 teaches nothing and k3 pulls by the forward KL"
)
REFUSED: Mapping[tuple[str | int, str], str] = {
    ("estimator", "k1"): _NO_K1,
    ("estimator", "kl"): _NO_K1,
    ("estimator", "k3"): _NO_K3,
    ("estimator", "low_var_kl"): _NO_K3,
    ("divergence", "k1"): _ONE_TOKEN,
    ("divergence", "k2"): _ONE_TOKEN,
    ("divergence", "k3"): _ONE_TOKEN,
}
"""(key, value) → what to write instead, and why sdkit does not accept it.  Source: reference/methods.md §5.4."""


def advice(name: str, cls: type) -> str | None:
    """Returns a hint for the unknown key `name` in a map read as `cls`."""
    here = [*keys_of(cls), *(["kind"] if hasattr(cls, "kind") else [])]
    if cls is ExperimentSpec:
        here.append("method")
    for word in SYNONYMS.get(name, ()):
        if word in here:
            return f'sdkit calls it "{word}"' + (f", which is 1 − {name}" if name.endswith("decay") else "")
    if hint := did_you_mean(name, here):
        return hint
    if name == "kind":
        return "remove it: there is only one kind here"
    words = (name, *SYNONYMS.get(name, ()))
    places = ((path.count("."), words.index(word), path) for word, path in all_keys() if word in words)
    for _, other, path in sorted(places)[:1]:
        return f'sdkit has "{path}"' if other else f"it belongs at {path}"
    return None


def all_keys() -> Iterator[tuple[str, str]]:
    """Yields every key of the language with its path; NAME stands for a user-chosen name."""
    seen: set[Any] = set()

    def below(tp: Any, path: str) -> Iterator[tuple[str, str]]:
        for option in members(tp):
            origin, args = typing.get_origin(option), typing.get_args(option)
            if origin is Table:
                yield from below(args[0], f"{path}NAME.")
            elif origin is tuple:
                yield from below(args[0], f"{path}0.")
            elif is_spec(option) and (option, path) not in seen:
                seen.add((option, path))
                for key in keys_of(option).values():
                    yield key.name, f"{path}{key.name}"
                    yield from below(key.type, f"{path}{key.name}.")

    yield from below(ExperimentSpec, "")
