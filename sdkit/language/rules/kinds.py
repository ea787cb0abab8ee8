"""What changes with a `kind`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sdkit.language.errors import Path, listed
from sdkit.language.resolved import resolved
from sdkit.language.rules.base import Context, Finding, method_rule
from sdkit.language.specs import MethodSpec


@method_rule("another kind keeps no keys of the former one", "warning")
def dropped_keys(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """Where a run file or an override changes a `kind`, it replaces the map: keys of the former kind would mean
    something else.  A key that both kinds have may have been meant to stay, unless its default is what it was.
    """
    data = resolved(spec)
    for path, node in context.loaded.nodes.items():
        former = node.replaced.value if node.replaced else None
        now = _at(data, path)
        if not isinstance(former, dict) or not isinstance(now, Mapping) or "kind" not in now:
            continue
        dropped = [
            key
            for key, value in former.items()
            if key != "kind" and key in now and not context.loaded.written((*path, key)) and value.data != now[key]
        ]
        if dropped:
            is_or_are, it = ("is", "it") if len(dropped) == 1 else ("are", "them")
            message = f"the kind is now '{now['kind']}', so {listed(dropped, ' and ')} of the former kind {is_or_are} dropped"
            yield path, message, f"write {it} again beside the new kind"


def _at(data: Any, path: Path) -> Any:
    """The value at a path of a resolved spec; None if there is none."""
    for part in path:
        if isinstance(data, Mapping):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return None
    return data
