"""Merges a run file onto its method page, and `key.path=value` overrides onto both.  Knows no spec class.

Maps are merged, except that a map whose `kind` changes is replaced.  Lists and scalars are replaced.  Every value
keeps the place where it was written, so that a problem or `sdkit show` can name the file it comes from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from attrs import evolve, field, frozen

from sdkit.language.errors import COMMAND_LINE, Path, Place, Problem, UnreadableInput, did_you_mean, shorten, spelled
from sdkit.language.files import file_names
from sdkit.language.source import MAX_DEPTH, TOO_DEEP, Node, Source, key_fault, read, read_text

RUN_KEYS = ("model", "data", "optimizer", "training", "evaluation", "output")
PACKAGED_PAGES = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "methods")
"""The folder of the method pages that come with sdkit."""
QUESTION = "?"
"""The value of an override that asks what its key takes."""
METHOD_HELP = "the name of a packaged method, or the path of a method page such as ./mine.yaml"
PAGE_PATH = r"/|\.ya?ml$"
"""A regular expression found in the path of a method page, and not in a name."""
FORBIDDEN_ON_METHOD_PAGES = ("method", *RUN_KEYS, "rewards", "machine")


@frozen(eq=False)
class LoadedSpec:
    """A spec as written: the merged data of run file, method page and overrides, and the place of each value."""

    name: str
    kind: Literal["run", "method"]
    folder: str  # paths in the spec are relative to it
    root: Node | None
    texts: Mapping[str, str]
    method: str | None = None  # the method page that the run file names
    is_complete: bool = True  # False if the method page is missing or unreadable
    problems: tuple[Problem, ...] = ()
    nodes: dict[Path, Node] = field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        self.nodes.update(self.root.walk() if self.root else ())

    @property
    def data(self) -> Any:
        """The merged data; None if nothing could be read."""
        return self.root.data if self.root else None

    def written(self, path: Path) -> bool:
        """Whether the user wrote this key; if not, its value is a default."""
        return path in self.nodes

    def is_bare(self, path: Path) -> bool:
        """Whether the user wrote a value without keys at this path: a bare kind, or an empty map."""
        return path in self.nodes and not (isinstance(value := self.nodes[path].value, dict) and value)

    def place(self, path: Path, *, at_key: bool = False) -> Place:
        """Returns the place of a value (with `at_key` its key's), or of the key of its nearest written ancestor."""
        node = self.nodes.get(path)
        if node and not at_key:
            return node.place
        while path and path not in self.nodes:
            path = path[:-1]
        node = self.nodes.get(path)
        return (node and (node.key or node.place)) or Place(self.name, 1, 1)


def is_run_file(data: Any) -> bool:
    """Whether this is the data of a run file; if not, it is a method page's."""
    return isinstance(data, dict) and any(key in data for key in ("method", *RUN_KEYS))


def is_sequence_data(data: Any) -> bool:
    """Whether this is the data of a sequence file."""
    return isinstance(data, dict) and "stages" in data


def load(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, resolved: bool = False, changes: Node | None = None
) -> LoadedSpec:
    """Reads a run file with its method page, or a method page, and applies the overrides.

    A path without a slash or an ending that is no file names a packaged method page.  `changes` is a map of a sequence
    file, merged onto the run file before the overrides.
    """
    name = os.fspath(path)
    if is_page_name(name) and not os.path.exists(name) and name in packaged_methods():
        path = packaged_page(name)
    source = read(path, resolved=resolved)
    parsed = [_parse_override(text, line) for line, text in enumerate(overrides, 1)]
    applicable = [o for o in parsed if isinstance(o, _Override)]
    texts = {source.name: source.text}
    if overrides:
        texts[COMMAND_LINE] = "\n".join(text.replace("\n", " ") for text in overrides)
    problems = [*source.problems, *(o for o in parsed if isinstance(o, Problem))]
    root, method, is_complete = source.root, None, True
    folder = folder_of(source.name)
    is_run = root is not None and is_run_file(root.data)
    named, changes = _split_method(changes)
    if root and is_run:
        root = merge(root, named) if named else root
        root = _apply([o for o in applicable if o.path == ("method",)], root, problems)
        method, page, root = _method_page(root, problems)
        is_complete = method is None or (page is not None and not (page.root is None and page.problems))
        if page:
            texts[page.name] = page.text
            problems += page.problems
        if page and page.root:
            root = merge(_without_run_keys(page.root, page.name, problems), root)
        root = merge(root, changes) if changes else root
    if root:
        root = _apply([o for o in applicable if o.path != ("method",)], root, problems)
    kind = "run" if is_run or (root and is_run_file(root.data)) else "method"
    return LoadedSpec(source.name, kind, folder, root, texts, method, is_complete, tuple(problems))


def merge(base: Node, over: Node) -> Node:
    """Merges `over` onto `base`; `over` wins."""
    kind_before, kind_after = _kind(base), _kind(over)
    if isinstance(over.value, str) and isinstance(base.value, dict) and kind_after == kind_before:
        return base
    if not isinstance(over.value, dict | str) or not isinstance(base.value, dict | str):
        return over
    if isinstance(over.value, str) or ("kind" in over.value and kind_after != kind_before):
        return evolve(over, replaced=base)
    if isinstance(base.value, str):  # a bare kind is shorthand for {kind: …}
        items = {"kind": Node(base.value, base.place, base.key)}
    else:
        items = dict(base.value)
    for name, child in over.value.items():
        items[name] = merge(items[name], child) if name in items else child
    return Node(items, over.place, over.key, base.replaced)


def _split_method(changes: Node | None) -> tuple[Node | None, Node | None]:
    """The changes' `method` alone, and the other changes; None where there are none."""
    if changes is None or "method" not in changes.value:
        return None, changes
    others = {name: child for name, child in changes.value.items() if name != "method"}
    return evolve(changes, value={"method": changes.value["method"]}), evolve(changes, value=others)


def _kind(node: Node) -> Any:
    if isinstance(node.value, dict):
        return node.value["kind"].value if "kind" in node.value else None
    return node.value


def folder_of(name: str) -> str:
    """Returns the folder of a file, or of the file that it links to."""
    return os.path.dirname(os.path.realpath(name) if os.path.islink(name) else name)


def _method_page(root: Node, problems: list[Problem]) -> tuple[str | None, Source | None, Node]:
    """Returns the path in `method`, the page if it is readable, and the run file without that key."""
    items = dict(root.value)
    named = items.pop("method", None)
    root = evolve(root, value=items)
    if named is None:
        return None, None, root
    if not isinstance(named.value, str) or not named.value:
        message = f"'method' is {METHOD_HELP}"
        problems.append(Problem(("method",), message, "method_file", None, named.place))
        return "", None, root
    if is_page_name(named.value):
        path = packaged_page(named.value)
    else:
        start = os.getcwd() if named.place.file == COMMAND_LINE else folder_of(named.place.file)
        path = os.path.normpath(os.path.join(start, os.path.expanduser(named.value)))
    try:
        return path, read(path), root
    except UnreadableInput as error:
        message, hint = str(error), error.hint or _suggest_page(path)
        if is_page_name(named.value):
            message = f"there is no packaged method {shorten(named.value)}"
            hint = _close_page(named.value)
        problems.append(Problem(("method",), message, "method_file", hint, named.place))
        return path, None, root


def is_page_name(text: str) -> bool:
    """Whether `method` (or a command's argument) names a packaged page; else it is the path of a file."""
    return not re.search(PAGE_PATH, text) and os.sep not in text


def packaged_page(name: str) -> str:
    """The path of a packaged method page, relative where it lies below the current folder.  It need not exist."""
    path = os.path.join(PACKAGED_PAGES, f"{name}.yaml")
    below = os.path.relpath(path)
    return path if below.startswith(os.pardir) else below


def packaged_methods() -> list[str]:
    """The names of the method pages that come with sdkit, in order."""
    names = (os.path.splitext(name) for name in file_names(PACKAGED_PAGES))
    return sorted(name for name, ending in names if ending == ".yaml")


def _close_page(name: str) -> str:
    """What to write in place of the name of a packaged page that does not exist."""
    packaged = packaged_methods()
    return (
        did_you_mean(name, packaged) or f"a file is written as a path: ./{name}.yaml; packaged: {', '.join(packaged)}"
    )


def _suggest_page(path: str) -> str | None:
    """A hint for a missing page: the most similar file name, or the pages in the folder."""
    folder, name = os.path.split(path)
    pages = [name for name in file_names(folder or ".") if name.endswith((".yaml", ".yml"))]
    return did_you_mean(name, pages) or (f"in {folder or '.'}: {', '.join(pages[:8])}" if pages else None)


def _without_run_keys(page: Node, name: str, problems: list[Problem]) -> Node:
    """The page without the keys that belong in a run file; reports them."""
    if not isinstance(page.value, dict):
        message = "a method page is a map of rollout, teacher, losses and route"
        problems.append(Problem((), message, "method_page", None, Place(name, 1, 1)))
        return evolve(page, value={})
    for key in [k for k in page.value if k in FORBIDDEN_ON_METHOD_PAGES]:
        message = f"a method page has rollout, teacher, losses and route, but no {shorten(key)}"
        hint = "a method page cannot build on another one" if key == "method" else f"move {key} to the run file"
        place = page.value[key].key
        problems.append(Problem((key,), message, "method_page", hint, place))
    return evolve(page, value={k: v for k, v in page.value.items() if k not in FORBIDDEN_ON_METHOD_PAGES})


@frozen(eq=False)
class _Override:
    path: Path
    value: Node
    key: Place


def _parse_override(text: str, line: int) -> _Override | Problem:
    """Parses one `key.path=value`; its line number is the position among the overrides."""
    name, equals, value = text.partition("=")
    path = tuple(name.split("."))
    key = Place(COMMAND_LINE, line, 1, max(1, len(name)))
    if not equals or not all(path):
        message = f"{shorten(text)} is not an override of the form key.path=value"
        return Problem((), message, "override", "example: optimizer.lr=1e-5", key)
    if fault := key_fault(path):
        return Problem((), fault, "override", None, key)
    if value == QUESTION:  # in YAML, the start of a key
        return _Override(path, Node(value, Place(COMMAND_LINE, line, len(name) + 2), key), key)
    source = read_text(value, COMMAND_LINE)
    if source.problems:
        problem = source.problems[0]
        place = _shift_place(problem.place or key, line, len(name) + 1)
        return evolve(problem, path=path, code="override", place=place)
    root = source.root or Node(None, Place(COMMAND_LINE, 1, 1, max(1, len(value))))
    if max(len(below) for below, _ in root.walk()) + len(path) > MAX_DEPTH:
        return Problem((), TOO_DEEP, "override", None, key)
    return _Override(path, _shift_node(root, line, len(name) + 1, key), key)


def _shift_place(place: Place, line: int, columns: int) -> Place:
    return evolve(place, line=line, column=place.column + columns)


def _shift_node(node: Node, line: int, columns: int, key: Place | None = None) -> Node:
    """The node with its places moved to the value's position on the command line."""
    key = key or (_shift_place(node.key, line, columns) if node.key else None)
    value = node.value
    if isinstance(value, dict):
        value = {name: _shift_node(child, line, columns) for name, child in value.items()}
    elif isinstance(value, list):
        value = [_shift_node(child, line, columns) for child in value]
    return Node(value, _shift_place(node.place, line, columns), key)


def _apply(overrides: Iterable[_Override], root: Node, problems: list[Problem]) -> Node:
    for override in overrides:
        try:
            root = _set(root, override, 0)
        except LookupError as error:
            problems.append(Problem(override.path, str(error.args[0]), "override", None, override.key))
    return root


def _set(node: Node, override: _Override, depth: int) -> Node:
    """`node` with the override's value set at its path.  Raises LookupError if the path leads through a non-map."""
    if depth == len(override.path):
        return merge(node, override.value)
    part = str(override.path[depth])
    if isinstance(node.value, list):
        if not part.isdecimal() or int(part) >= len(node.value):
            where, size = spelled(override.path[:depth]), len(node.value)
            raise LookupError(f"'{where}' is a list of {size}, which has no entry {shorten(part)}")
        items = list(node.value)
        items[int(part)] = _set(items[int(part)], override, depth + 1)
        return evolve(node, value=items)
    if node.value is not None and not isinstance(node.value, dict | str):
        where = spelled(override.path[:depth])
        raise LookupError(f"'{where}' is {shorten(node.value)}, which has no keys")
    items = node.value if isinstance(node.value, dict) else {}
    if part in items and part != "kind":
        return evolve(node, value={**items, part: _set(items[part], override, depth + 1)})
    value = override.value
    for name in reversed(override.path[depth:]):
        value = Node({name: value}, value.place, override.key)
    if node.value is None:
        return value
    merged = merge(node, value)
    # A map of another kind has the place of the override, which is to blame for what it lacks.
    return evolve(merged, place=node.place, key=node.key) if _kind(merged) == _kind(node) else merged
