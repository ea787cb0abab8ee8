"""Hints for unknown keys and refused values: the nearest key, sdkit's name for it, or where it belongs.

Imported only when a spec has such a key or value.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from attrs import frozen

from sdkit.language.errors import Path, did_you_mean, listed, nearest, spelled
from sdkit.language.introspection import Key, is_spec, keys_of, kinds_of, members, options_of
from sdkit.language.specs import ExperimentSpec, Table

_OTHER_NAMES = (
    ("update_rate", "alpha tau decay ema_decay mixup ref_model_mixup_alpha rate"),
    ("teacher_share", "alpha beta"),
    ("update_rate", "beta"),
    ("coefficient", "kl_coef weight"),
    ("temperature", "tau"),
    ("scale", "scale_rewards"),
    ("low", "epsilon clip_ratio_low"),
    ("high", "epsilon_high clip_ratio_high"),
    ("ratio", "importance_sampling_level"),
    ("completions_per_prompt", "n num_generations group_size"),
    ("samples", "n num_samples"),
    ("completions_per_prompt", "num_samples"),
    ("max_new_tokens", "max_completion_length max_tokens max_length response_length"),
    ("max_prompt_tokens", "max_prompt_length"),
    ("lr", "learning_rate rate"),
    ("max_grad_norm", "grad_clip gradient_clipping"),
    ("prompts_per_step", "batch_size train_batch_size"),
    ("epochs", "num_train_epochs"),
    ("steps", "max_steps"),
    ("updates_per_rollout", "num_iterations ppo_epochs"),
    ("activation_checkpointing", "gradient_checkpointing"),
    ("path", "name_or_path model_name_or_path"),
    ("dtype", "torch_dtype"),
    ("url", "base_url endpoint"),
    ("key_from", "api_key"),
    ("request_seconds", "timeout"),
    ("retries", "max_retries"),
    ("every", "eval_every eval_steps"),
    ("checkpoint_every", "save_steps save_every"),
    ("folder", "output_dir"),
    ("divergence", "kl_type"),
    ("average", "loss_type"),
    ("sees", "privileged_context context"),
    ("rewards", "reward"),
    ("losses", "loss"),
    ("lora", "adapter peft peft_config lora_config use_peft"),
    ("quantize_base", "load_in_4bit qlora"),
    ("trackers", "report_to logger tracker log_with"),
    ("kind", "loss_type mode type"),
)
"""sdkit's keys and their names in other toolkits; of several keys with one such name, the likelier comes first."""

SYNONYMS: Mapping[str, list[str]] = {
    name: [key for key, others in _OTHER_NAMES if name in others.split()]
    for _, names in _OTHER_NAMES
    for name in names.split()
}
"""Names in other toolkits → sdkit's keys, likeliest first."""

_ROWS = (
    "it counts rows: training.micro_batch_tokens counts tokens, and training.prompts_per_step the prompts of a step on all "
    "ranks"
)
_ALPHA = (
    "alpha of the SDPO repository, distillation_alpha of TRL, is the divergence: 0 is forward_kl, 1 reverse_kl, a number between "
    "them {kind: jsd, teacher_share: alpha}"
)
BY_PEER: Mapping[str, str] = {
    "alpha": _ALPHA,
    "distillation_alpha": _ALPHA,
    "beta": "beta of TRL's GKDConfig is teacher_share in divergence: {kind: jsd}; beta of GRPOConfig is the coefficient of a "
    "loss term of kind reference_kl",
    "per_device_train_batch_size": _ROWS,
    "micro_batch_size": _ROWS,
    "ppo_micro_batch_size_per_gpu": _ROWS,
    "ppo_mini_batch_size": "it counts the prompts of one optimizer step in verl: training.updates_per_rollout is train_batch_size "
    "divided by it",
    **dict.fromkeys(
        ("defaults", "include", "extends", "base"),
        "a run file builds on one method page: method: NAME, or ./page.yaml",
    ),
    "batch_size": "training.prompts_per_step is the size of a step, rollout.backend.batch_size that of a sampling pass",
    "bf16": "write dtype: bfloat16 in model",
    "fp16": "sdkit has no float16: write dtype: bfloat16 in model",
    "gradient_accumulation_steps": "sdkit accumulates over the micro-batches of a step: training.prompts_per_step is the size of "
    "the step, training.micro_batch_tokens that of a forward pass",
}
"""Names whose meaning depends on the toolkit, or that count something else → how to say in sdkit what each of them means."""

CLOSE = 0.85
"""How alike an unknown key and the one that it is a misspelling of must be, at least."""

_NO_K1 = "use k2 or vocabulary: the expected gradient of k1 is 0"
_NO_K3 = "use k2 or vocabulary: the gradient of k3 is that of the forward KL"
_ONE_TOKEN = (
    "use reverse_kl with support: sampled_token; differentiated, k1 teaches nothing and k3 pulls by the forward KL"
)
_BFLOAT16 = "write bfloat16, which has the range of float32 and needs no loss scaling"
REFUSED: Mapping[tuple[str | int, str], str] = {
    ("estimator", "k1"): _NO_K1,
    ("estimator", "kl"): _NO_K1,
    ("estimator", "k3"): _NO_K3,
    ("estimator", "low_var_kl"): _NO_K3,
    ("divergence", "k1"): _ONE_TOKEN,
    ("divergence", "k2"): _ONE_TOKEN,
    ("divergence", "k3"): _ONE_TOKEN,
    ("dtype", "fp32"): "write float32",
    ("dtype", "bf16"): "write bfloat16",
    ("dtype", "fp16"): _BFLOAT16,
    ("dtype", "float16"): _BFLOAT16,
    ("dtype", "half"): _BFLOAT16,
}
"""(key, value) → what to write instead, and why sdkit does not accept it."""


_FILE_KINDS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Endings of data files → the kind of source that reads them."""


def file_kind(name: str) -> str | None:
    """Returns the kind of source that reads files with the ending of this name; None if there is none."""
    return next((kind for ending, kind in _FILE_KINDS.items() if name.endswith(ending)), None)


def file_source(text: str) -> str | None:
    """Returns a hint for a data source that is a file's name alone; None if the text is no such name."""
    kind = file_kind(text)
    return kind and f"write source: {{kind: {kind}, path: {text}}}"


def advice(name: str, cls: type, parent: Path) -> str | None:
    """Returns a hint for the unknown key `name` in the map at `parent`, which is read as `cls`."""
    here = _keys_here(cls)
    if pair := spaced(name, here):
        return f"write {pair}"
    if unseen := next((character for character in name if not character.isprintable()), None):
        return f"remove U+{ord(unseen):04X}, which looks like a space or like nothing"
    synonyms = SYNONYMS.get(name, [])
    for word in synonyms:
        if word in here:
            return f'sdkit calls it "{word}"{_conversion(name, word)}'
    if name in BY_PEER:
        return BY_PEER[name]
    if close := nearest(name, here, cutoff=CLOSE):
        return f'did you mean "{close}"?'
    if name == "kind":
        home = _home_of_kind(cls)
        return f"it belongs at {spelled((*parent, home, name))}" if home else "remove it: there is only one kind here"
    if kinds := _kinds_with(name, parent):
        noun, has = ("kind", "has") if len(kinds) == 1 else ("kinds", "have")
        return f"only {noun} {listed(kinds, ' and ')} {has} it"
    return (
        _home(name, parent)
        or _home_of_synonym(synonyms, parent)
        or _peers_answers().get(name)
        or did_you_mean(name, here)
    )


def meant_key(name: str, cls: type) -> str | None:
    """Returns the key of `cls` that an unknown one is another name or spelling of; None if there is none."""
    here = _keys_here(cls)
    synonym = next((word for word in SYNONYMS.get(name, []) if word in here), None)
    name = "".join(filter(str.isprintable, name)).strip()
    pair = spaced(name, here)
    return pair.partition(":")[0] if pair else synonym or nearest(name, here, cutoff=CLOSE)


def spaced(text: str, keys: Collection[str]) -> str | None:
    """Returns `key: value` for a text such as `key:value` or `key=value`; None if it does not start with a key."""
    pair = re.fullmatch(r"(\w+)\s*[:=]\s*(.+)", text)
    return f"{pair[1]}: {pair[2]}" if pair and pair[1] in keys else None


def _keys_here(cls: type) -> list[str]:
    return [*keys_of(cls), *(["kind"] if hasattr(cls, "kind") else []), *(["method"] if cls is ExperimentSpec else [])]


def _home_of_kind(cls: type) -> str | None:
    """The one key of `cls` that is required and has kinds; None if there is none, or several."""
    homes = [name for name, key in keys_of(cls).items() if key.required and kinds_of(options_of(key.type))]
    return homes[0] if len(homes) == 1 else None


@cache
def _peers_answers() -> Mapping[str, str]:
    """The keys of other trainers' configurations → the path in sdkit's language, or why there is none."""
    from sdkit.language.peers import peers, read_table

    tables = {name: read_table(name) for name in peers()}
    answers: dict[str, str] = {}
    for table in tables.values():
        translated = f"this is a key of {table.summary}: `sdkit import` translates such a file"
        for rule in (rule for rule in table.rules if "key" in rule):
            outer, _, last = rule["key"].rpartition(".")
            answers.setdefault(last, f'sdkit has "{rule["to"]}"' if "to" in rule else translated)
            if outer:
                answers.setdefault(outer.partition(".")[0], translated)
        for key, reason in table.unsupported.items():
            answers.setdefault(key.rpartition(".")[2], f"sdkit has no such key: {reason}")
    needless = {key for table in tables.values() for key in table.ignored}
    return {**dict.fromkeys(needless, "remove it: sdkit has no such key, and a run needs none"), **answers}


def _conversion(name: str, key: str) -> str:
    """How a peer's value becomes that of sdkit's key, if the two are not the same for certain."""
    if name.endswith("decay"):
        return f", which is 1 − {name}"
    if key == "update_rate" and name in ("alpha", "beta", "tau"):
        return f", the student's share in an update; it is 1 − {name} if {name} is the share that stays"
    return ""


def _kinds_with(name: str, parent: Path) -> list[str]:
    """The kinds that have the key at this place; the map is of another kind."""
    owners = (at.owner for at in all_keys() if at.key.name == name and _is_at(at.path[:-1], parent))
    return list(dict.fromkeys(owner.kind for owner in owners if hasattr(owner, "kind")))


def _is_at(pattern: Path, path: Path) -> bool:
    """Whether a path is one that the pattern of an occurrence stands for."""
    pairs = zip(pattern, path, strict=False)
    return len(pattern) == len(path) and all(part in ("NAME", 0) or part == other for part, other in pairs)


def _home(name: str, parent: Path) -> str | None:
    """Where the key `name` belongs: in a map below, else at the shortest path."""
    places = [at.path for at in all_keys() if at.key.name == name]
    below = [path for path in places if _is_at(path[: len(parent)], parent)]
    home = min(below or places, key=len, default=None)
    return f"it belongs at {spelled(home)}" if home else None


def _home_of_synonym(words: list[str], parent: Path) -> str | None:
    places = [at.path for word in words for at in all_keys() if at.key.name == word]
    home = min(places, key=lambda path: (len(path), words.index(str(path[-1]))), default=None)
    return f'sdkit has "{spelled(home)}"' if home else None


@frozen
class Occurrence:
    """A key at one path; NAME stands for a user-chosen name, 0 for the index of a list."""

    path: Path
    key: Key
    owner: Any  # the class that has the key


@cache
def all_keys() -> list[Occurrence]:
    """Returns every key of the language at each of its paths."""
    found: list[Occurrence] = []
    seen: set[Any] = set()

    def visit(tp: Any, path: Path) -> None:
        for option in members(tp):
            origin, args = typing.get_origin(option), typing.get_args(option)
            if origin is Table:
                visit(args[0], (*path, "NAME"))
            elif origin is tuple:
                visit(args[0], (*path, 0))
            elif is_spec(option) and (option, path) not in seen:
                seen.add((option, path))
                for key in keys_of(option).values():
                    found.append(Occurrence((*path, key.name), key, option))
                    visit(key.type, (*path, key.name))

    visit(ExperimentSpec, ())
    return found
