"""A spec as plain data, with every default written out or with none, and its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from sdkit.language.errors import Path
from sdkit.language.introspection import entry_type, is_spec, keys_of, kinds_of, members
from sdkit.language.specs import MethodSpec, Table


def resolved(spec: Any) -> Any:
    """Returns the spec as maps, lists and scalars.  Structuring the result gives an equal spec."""
    if attrs.has(type(spec)):
        kind = {"kind": spec.kind} if hasattr(spec, "kind") else {}
        fields = keys_of(type(spec)).values()
        return kind | {key.name: resolved(getattr(spec, key.field)) for key in fields}
    if isinstance(spec, Mapping):
        return {name: resolved(value) for name, value in spec.items()}
    if isinstance(spec, tuple | list):
        return [resolved(value) for value in spec]
    return spec


def without_defaults(value: Any, tp: Any) -> Any:
    """Returns plain data that the language reads as `value` under a key of type `tp`, as short as it can be."""
    if isinstance(value, Table):
        return {name: without_defaults(entry, entry_type(tp)) for name, entry in value.items()}
    if isinstance(value, tuple):
        return [without_defaults(entry, entry_type(tp)) for entry in value]
    if not is_spec(type(value)):
        return value
    keys = [key for key in keys_of(type(value)).values() if getattr(value, key.field) != key.default]
    data = {key.name: without_defaults(getattr(value, key.field), key.type) for key in keys}
    if type(value) not in kinds_of(members(tp)).values():
        return data
    return {"kind": value.kind, **data} if data else value.kind


def canonical_hash(spec: MethodSpec) -> str:
    """Returns the SHA-256 of the resolved spec's canonical JSON, the same in every process and on every machine."""
    text = json.dumps(resolved(spec), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def leaves(data: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields every scalar of a resolved spec with its path.  An empty map or list counts as a scalar."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for name, value in items:
        if isinstance(value, dict | list) and value:
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value
