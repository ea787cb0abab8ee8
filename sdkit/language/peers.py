"""Translates another trainer's configuration into a run file, by the tables in sdkit/peers.

A table has `rules`: the peer's `key`, the path `to` in a spec, and what the value becomes: one of `values`, else
`otherwise`, else itself.  In these, `$key` is the value of another key, and null sets nothing.  A rule applies under
`when`, and a key that the configuration leaves out has the peer's own default.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import Factory, define, frozen

from sdkit.language.errors import InvalidSpec, Path, UnreadableInput, listed, shorten, spelled
from sdkit.language.files import file_names
from sdkit.language.introspection import keys_of
from sdkit.language.peer_formulas import FORMULAS, Config
from sdkit.language.scalars import compact
from sdkit.language.source import read, read_text
from sdkit.language.specs import TrainingSpec

TABLES = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "peers")
MAX_REFERENCES = 10
MAX_LINE = 100
PLACEHOLDERS: Mapping[str, Any] = {
    "model.path": "name/the-model",
    "data.source": {"kind": "hub", "path": "name/the-data"},
}
"""What a run file cannot do without, where the configuration does not say it."""
NOTHING: Sequence[Any] = (None, False, 0, "", [], {})
"""Values with which a setting that has no equivalent is off."""


@define
class Translation:
    """A run file's values by path, each with a comment, and what the user should know about them."""

    values: dict[Path, tuple[Any, str]] = Factory(dict)
    differs: list[str] = Factory(list)
    missing: list[str] = Factory(list)
    to_fill_in: list[str] = Factory(list)

    @property
    def text(self) -> str:
        """The run file."""
        return "\n".join(_lines(self._tree(), 0)) + "\n"

    def report(self) -> str:
        """Returns what has no equivalent, what differs, and what is to be filled in; empty if nothing is."""
        parts = {"no equivalent": self.missing, "not quite the same": self.differs, "to be filled in": self.to_fill_in}
        return "\n".join(
            "\n".join([f"{title}:", *(f"  {line}" for line in lines)]) for title, lines in parts.items() if lines
        )

    def _tree(self) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for path, value in self.values.items():
            here: Any = tree
            for part in path[:-1]:
                here = here.setdefault(str(part), {}) if isinstance(here, dict) else here
            if isinstance(here, dict):  # otherwise a kind without keys, such as `transformers`
                here[str(path[-1])] = value
        return tree


@frozen(kw_only=True)
class Table:
    """The table of one peer, with those that it includes."""

    name: str
    summary: str
    recognised_by: Sequence[str]
    defaults: Config
    spec: Sequence[tuple[Path, Any]]
    rules: Sequence[Mapping[str, Any]]
    ignored: Sequence[str]
    unsupported: Mapping[str, str]
    to_fill_in: Mapping[str, str]

    def knows(self, key: str) -> bool:
        """Whether a rule reads the key."""
        return any(key == used for rule in self.rules for used in keys_read_by(rule))


def peers() -> dict[str, str]:
    """Returns the peers whose configurations can be translated: name → summary."""
    names = (os.path.splitext(name)[0] for name in file_names(TABLES))
    return {name: table.summary for name in sorted(names) if (table := read_table(name)).summary}


def translate(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), peer: str | None = None, processes: int = 1
) -> tuple[Table, Translation]:
    """Returns the table that fits a YAML or JSON configuration, and the translation.

    `overrides` are `key=value` of the peer's keys; `processes` is the number of the peer's processes, on which its batch
    depends.  Raises UnreadableInput if the configuration cannot be read or recognised, InvalidSpec if it is not YAML.
    """
    config, unresolved = _read_config(path, overrides)
    table = read_table(peer) if peer in peers() else _recognise(config, peer)
    config = _gathered(config, table)
    translation = Translation()
    for where, value in table.spec:
        translation.values[where] = (value, "")
    full = {**table.defaults, **config, "processes": processes}
    for rule in table.rules:
        if all(_holds(full, key, wanted) for key, wanted in rule.get("when", {}).items()):
            _apply(rule, full, config, translation)
    for key, value in config.items():
        if not table.knows(key) and not _is_below(key, table.ignored):
            reason = next((why for name, why in table.unsupported.items() if _is_below(key, [name])), "not known")
            if value not in NOTHING:
                translation.missing.append(f"{key}: {shorten(value)} – {reason}")
    translation.missing += [
        f"{key}: {shorten(text)} – not resolved; give {key}=VALUE" for key, text in unresolved.items()
    ]
    _fill_in(table, translation)
    return table, translation


def _read_config(path: str | os.PathLike[str], overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration, flat and without its variables, and the settings that refer to what is not in it."""
    source = read(path)
    if source.problems:
        raise InvalidSpec(source.problems, {source.name: source.text})
    if not isinstance(source.data, dict):
        raise UnreadableInput(f"{source.name} is not a map of settings")
    config = dict(_flat(source.data))
    for text in overrides:
        key, equals, value = text.lstrip("+").partition("=")
        if not (key and equals):
            raise UnreadableInput(f"{shorten(text)} is not of the form key=value")
        config[key] = read_text(value, "<command line>").data
    variables: set[str] = set()
    for _ in range(MAX_REFERENCES):
        for key, value in config.items():
            if isinstance(value, str) and value.startswith("${") and (name := value[2:-1]) in config:
                config[key] = config[name]
                variables |= {name} if "." not in name else set()
    unresolved = {key: value for key, value in config.items() if "${" in str(value) or value == "???"}
    return {key: v for key, v in config.items() if key not in unresolved.keys() | variables}, unresolved


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _gathered(config: Config, table: Table) -> dict[str, Any]:
    """The configuration, in which a map that a rule reads is one value again."""
    gathered = dict(config)
    for key in filter(None, (rule.get("key") for rule in table.rules)):
        below = {name: value for name, value in gathered.items() if name.startswith(f"{key}.")}
        if below and key not in gathered and not any(table.knows(name) for name in below):
            gathered = {name: value for name, value in gathered.items() if name not in below}
            gathered[key] = {name.removeprefix(f"{key}."): value for name, value in below.items()}
    return gathered


def read_table(name: str) -> Table:
    """Reads a table and those that it includes; its own entries come last, and win."""
    data = read(os.path.join(TABLES, f"{name}.yaml")).data
    parts = [read_table(other) for other in data.get("include", ())]
    prefixes = data.get("prefixes", {})
    data = _expand(data, prefixes)
    return Table(
        name=name,
        summary=data.get("summary", ""),
        recognised_by=data.get("recognised_by", ()),
        defaults={k: v for part in parts for k, v in part.defaults.items()} | data.get("defaults", {}),
        spec=[*(entry for part in parts for entry in part.spec), *_paths(data.get("spec", {}))],
        rules=[*(rule for part in parts for rule in part.rules), *data.get("rules", ())],
        ignored=[*(key for part in parts for key in part.ignored), *data.get("ignored", ())],
        unsupported={k: v for part in parts for k, v in part.unsupported.items()} | data.get("unsupported", {}),
        to_fill_in=data.get("to_fill_in", {}),
    )


def _expand(data: Any, prefixes: Mapping[str, str]) -> Any:
    """The data with the short names of long prefixes written out, in keys and values."""
    if isinstance(data, dict):
        return {_expand(name, prefixes): _expand(value, prefixes) for name, value in data.items()}
    if isinstance(data, list):
        return [_expand(value, prefixes) for value in data]
    if isinstance(data, str):
        mark, rest = ("$", data[1:]) if data.startswith("$") else ("", data)
        first, dot, last = rest.partition(".")
        return f"{mark}{prefixes[first]}{dot}{last}" if first in prefixes else data
    return data


def _paths(data: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of a table's `spec`: scalars and lists, by path."""
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _paths(value, (*path, name))
        else:
            yield (*path, name), value


def _recognise(config: Config, peer: str | None) -> Table:
    known = peers()
    if peer is not None:
        raise UnreadableInput(f"{shorten(peer)} is not one of {listed(known)}")
    scores = {name: sum(key in config for key in read_table(name).recognised_by) for name in known}
    best = [name for name, score in scores.items() if score and score == max(scores.values())]
    if len(best) != 1:
        raise UnreadableInput(
            "which trainer's configuration this is does not show", hint=f"--from {' or '.join(best or known)}"
        )
    return read_table(best[0])


def keys_read_by(rule: Mapping[str, Any]) -> Iterator[str]:
    """The peer's keys that a rule reads."""
    yield from filter(None, [rule.get("key")])
    yield from rule.get("when", ())
    yield from FORMULAS[rule["formula"]][1] if "formula" in rule else ()
    pending = [rule.get("otherwise"), rule.get("values")]
    while pending:
        data = pending.pop()
        if isinstance(data, str) and data.startswith("$"):
            yield data[1:]
        pending += data.values() if isinstance(data, dict) else data if isinstance(data, list) else []


def _is_below(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _holds(config: Config, key: str, wanted: Any) -> bool:
    value = config.get(key)
    if wanted in ("$given", "$absent"):
        return (value is None) == (wanted == "$absent")
    return any(_same(value, one) for one in (wanted if isinstance(wanted, list) else [wanted]))


def _same(a: Any, b: Any) -> bool:
    """Whether two scalars are equal; 1 and 1.0 are, 1 and true are not."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _apply(rule: Mapping[str, Any], config: Config, given: Config, translation: Translation) -> None:
    """Set what the rule says, or note that the value has no equivalent."""
    key = rule.get("key")
    value = config.get(key) if key else rule["value"]
    if value is None:
        return
    result: Any = value
    matches = [result for known, result in rule.get("values", ()) if _same(known, value)]
    if matches:
        result = _filled(matches[0], value, config)
    elif "otherwise" in rule:
        result = _filled(rule["otherwise"], value, config)
    elif "formula" in rule:
        try:
            result = FORMULAS[rule["formula"]][0](value, config)
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError):
            result = None
            translation.missing.append(f"{key}: {shorten(value)} – cannot be computed from these values")
    elif "values" in rule:
        result = None
        if key in given:
            known = listed(known for known, _ in rule["values"])
            translation.missing.append(f"{key}: {shorten(value)} – {rule.get('reason', f'sdkit has {known}')}")
    if result is None or "to" not in rule:
        return
    if "note" in rule:
        translation.differs.append(f"{rule['to']} ({key}): {rule['note']}")
    comment = "" if key is None else key if key in given else f"default of {key}"
    path = tuple(rule["to"].split("."))
    for below, leaf in _paths(result, path) if isinstance(result, dict) else [(path, result)]:
        translation.values[below] = (leaf, comment)


def _filled(template: Any, value: Any, config: Config) -> Any:
    """A template with the values of the keys that it names."""
    if isinstance(template, str) and template.startswith("$"):
        return value if template == "$value" else config.get(template[1:])
    if isinstance(template, dict):
        return {name: _filled(inner, value, config) for name, inner in template.items()}
    return [_filled(inner, value, config) for inner in template] if isinstance(template, list) else template


def _fill_in(table: Table, translation: Translation) -> None:
    """Add placeholders, and the list of what the user has to fill in."""
    for where, value in PLACEHOLDERS.items():
        path = tuple(where.split("."))
        if not any(known[: len(path)] == path for known in translation.values):
            for below, leaf in _paths(value, path) if isinstance(value, dict) else [(path, value)]:
                translation.values[below] = (leaf, "to be filled in")
            translation.to_fill_in.append(f"{where}: the configuration does not say it")
    values = {spelled(path): value for path, (value, _) in translation.values.items()}
    prompts = [values.get("rollout.max_prompt_tokens"), values.get("teacher.sees.max_prompt_tokens")]
    new = values.get("rollout.max_new_tokens")
    longest = max((n for n in prompts if isinstance(n, int)), default=0) + (new if isinstance(new, int) else 0)
    if longest > keys_of(TrainingSpec)["micro_batch_tokens"].default:
        translation.values["training", "micro_batch_tokens"] = (longest, "the longest sequence")
    translation.to_fill_in += [f"{where}: {why}" for where, why in table.to_fill_in.items()]


def _lines(tree: Mapping[str, Any], depth: int) -> Iterator[str]:
    """The tree as YAML; a map whose values have one comment stands on one line if it fits."""
    for name, value in tree.items():
        head = f"{'  ' * depth}{compact(name, flow=True)}:"
        data, comments = _plain(value)
        line = f"{head} {compact(data, flow=True)}"
        if isinstance(value, dict) and (len(comments) > 1 or len(line) > MAX_LINE):
            yield head
            yield from _lines(value, depth + 1)
        else:
            yield line + "".join(f" # {comment}" for comment in comments if comment)


def _plain(value: Any) -> tuple[Any, set[str]]:
    """A tree, or a leaf, without its comments, and the comments."""
    if not isinstance(value, dict):
        return value[0], {value[1]}
    parts = {name: _plain(child) for name, child in value.items()}
    comments = set().union(*(comments for _, comments in parts.values()))
    return {name: data for name, (data, _) in parts.items()}, comments
