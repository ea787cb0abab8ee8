"""Functions in a user's Python file: checked without running the file, then loaded.  Knows nothing of what they compute."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from sdkit.language.errors import BadData, Place, did_you_mean, printable, shorten
from sdkit.language.files import MAX_SOURCE_CODE_BYTES, UnreadableFile, read_file

Fault = tuple[Literal["file", "function", "functions", "class_name"], str, str | None]
"""The key at fault, the message, and an optional hint."""


def fault_of(path: str, shown: str, function: str, values: Sequence[str], given: Collection[str] = ()) -> Fault | None:
    """Returns why `function` cannot be called with these arguments; None if it can.

    The file is parsed, never run.  `path` is the file to open, `shown` the path as written in the spec.  `values`
    are the documented names of the positional arguments, `given` the names of the keyword arguments.
    """
    tree = parsed(path, shown)
    if isinstance(tree, tuple):
        return tree
    defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if function not in defined:
        message = f"{shown} defines no function {shorten(function)} at its top level"
        hint = _other_definition(tree, function) or did_you_mean(function, defined)
        return "function", message, hint
    definition = defined[function]
    try:
        _signature(definition.args).bind(*values, **dict.fromkeys(given))
    except TypeError:
        call = ", ".join([*values, *(f"{name}=…" for name in given)])
        message = f"{shown}:{definition.lineno}: {function} cannot be called as {function}({call})"
        return "function", message, None
    return None


def _other_definition(tree: ast.Module, name: str) -> str | None:
    """A hint where the file's top level gives the name to something else than a function that is written there."""
    for node in tree.body:
        match node:
            case ast.AsyncFunctionDef() if node.name == name:
                return f"line {node.lineno}: write `def` in place of `async def`"
            case ast.ClassDef() if node.name == name:
                return f"line {node.lineno} is a class: write a function that calls it"
            case ast.Assign(targets=targets) if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                return f"line {node.lineno} assigns it: write it with `def`"
            case ast.ImportFrom(names=names) if any(name in (alias.name, alias.asname) for alias in names):
                return (
                    f"line {node.lineno} imports it: name the file that defines it, or write a function that calls it"
                )
    return None


def file_fault_of(path: str, shown: str) -> Fault | None:
    """Returns why a file is not Python that can be read; None if it is.  Paths as in `fault_of`."""
    tree = parsed(path, shown)
    return tree if isinstance(tree, tuple) else None


def parsed(path: str, shown: str) -> ast.Module | Fault:
    """Returns the syntax tree of a file, or why there is none.  `shown` is the path as written in the spec."""
    try:
        content = read_file(path, MAX_SOURCE_CODE_BYTES)
        return ast.parse(importlib.util.decode_source(content))
    except UnicodeDecodeError as error:
        return (
            "file",
            f"{printable(shown)}: byte 0x{error.object[error.start]:02x} is not {error.encoding.upper()}",
            "save it as UTF-8",
        )
    except UnreadableFile as error:
        return "file", f"{printable(shown)}: {error}", None
    except SyntaxError as error:
        return "file", f"{printable(shown)}:{error.lineno or 1}: {error.msg}", None
    except (ValueError, RecursionError, MemoryError, OverflowError):  # nested too deeply
        return "file", f"{printable(shown)} is not Python that can be read", None


def _signature(args: ast.arguments) -> inspect.Signature:
    """The signature of a function definition, without evaluating its defaults."""
    positional = [*args.posonlyargs, *args.args]
    first_optional = len(positional) - len(args.defaults)
    parameters = [
        _parameter(a, "POSITIONAL_ONLY" if i < len(args.posonlyargs) else "POSITIONAL_OR_KEYWORD", i >= first_optional)
        for i, a in enumerate(positional)
    ]
    parameters += [_parameter(a, "VAR_POSITIONAL") for a in (args.vararg,) if a]
    keyword_only = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    parameters += [_parameter(a, "KEYWORD_ONLY", default is not None) for a, default in keyword_only]
    parameters += [_parameter(a, "VAR_KEYWORD") for a in (args.kwarg,) if a]
    return inspect.Signature(parameters)


def _parameter(arg: ast.arg, kind: str, optional: bool = False) -> inspect.Parameter:
    default = None if optional else inspect.Parameter.empty
    return inspect.Parameter(arg.arg, getattr(inspect.Parameter, kind), default=default)


def module_search_path(files: Iterable[Path]) -> list[str]:
    """Returns `sys.path` followed by the folders of these files: no module of the user's takes an installed one's place."""
    return list(dict.fromkeys([*sys.path, *(str(file.parent) for file in files)]))


class UserFunction:
    """A function from a user's file, which is run once.  Raises BadData if it cannot be loaded or fails.

    `file` is the path as written in the spec, relative to `base`.  The file can import the modules beside it.
    """

    def __init__(self, file: str, name: str, base: Path) -> None:
        self.file = file
        self.name = name
        self._path = (base / file).resolve()
        self._function = self._load()

    def call(self, *args: Any, what: str = "", **kwargs: Any) -> Any:
        """Returns the function's result; the error of a failing function names `what` it was called for."""
        try:
            return self._function(*args, **kwargs)
        except (Exception, SystemExit) as error:
            raise self._failure(f"{self.name} failed{what}", error) from error

    def error(self, problem: str, hint: str | None = None) -> BadData:
        return BadData(f"{self.name} in {self.file} {problem}", hint=hint)

    def _load(self) -> Callable[..., Any]:
        if not self._path.is_file():
            raise BadData(f"there is no file {self.file}")
        module_name = f"sdkit function {self._path}"
        spec = importlib.util.spec_from_file_location(module_name, self._path)
        if spec is None or spec.loader is None:
            raise BadData(f"{self.file} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses look up their module while it runs
        sys.path[:] = module_search_path([self._path])  # for good: functions may import when they are called
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise self._failure(f"{self.file} cannot be loaded", error) from error
        loaded = getattr(module, self.name, None)
        if not callable(loaded):
            hint = did_you_mean(self.name, [n for n, v in vars(module).items() if callable(v)])
            raise BadData(f"{self.file} has no function {shorten(self.name)}", hint=hint)
        return loaded

    def _failure(self, what: str, error: BaseException) -> BadData:
        """Returns an error raised by the user's code as BadData, with the innermost line of the user's file."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(self._path) and frame.lineno]
        if isinstance(error, SyntaxError) and error.lineno:
            lines.append(error.lineno)
        place = Place(self.file, lines[-1], 1) if lines else None
        return BadData(f"{what}: {type(error).__name__}: {error}", place=place)
