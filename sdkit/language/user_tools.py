"""Tools and environments in a user's Python file, read from its syntax tree: the file is never run."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdkit.language import specs
from sdkit.language.errors import did_you_mean, listed, shorten
from sdkit.language.user_functions import Fault, parsed

Definition = ast.FunctionDef | ast.AsyncFunctionDef
LineFault = tuple[int, str, str | None]
"""The line of a fault in a user's file, the message, and an optional hint."""
OWN = ("reset", "reply", "get_reward", "close")
"""Methods of an environment, which are no tools."""
NOT_TOOLS = ("property", "classmethod", "cached_property")
"""Decorators of class members that are no plain methods."""


def class_faults(path: str, environment: specs.FileEnvironment) -> Iterator[Fault]:
    """Yields why a class is no environment: no class, no `reset`, neither `reply` nor a tool, or faulty tools."""
    tree, shown = parsed(path, environment.file), environment.file
    if isinstance(tree, tuple):
        yield tree
        return
    defined = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if environment.class_name not in defined:
        message = f"{shown} defines no class {shorten(environment.class_name)} at its top level"
        yield "class_name", message, did_you_mean(environment.class_name, defined)
        return
    own = defined[environment.class_name]
    names = [node.name for node in _functions(own.body)]
    if "reset" not in names and not own.bases:
        yield "class_name", f"{shown}:{own.lineno}: {own.name} has no method reset", None
    if "reply" in names:
        return
    if not _tools(own) and not own.bases:
        message = f"{shown}:{own.lineno}: {own.name} has no method reply, and no public method that could be a tool"
        yield "class_name", message, None
    for line, message, hint in _tool_faults(_tools(own), is_method=True):
        yield "class_name", f"{shown}:{line}: {message}", hint


def function_faults(path: str, environment: specs.ToolsEnvironment) -> Iterator[Fault]:
    """Yields why functions of a file are no tools."""
    tree, shown = parsed(path, environment.file), environment.file
    if isinstance(tree, tuple):
        yield tree
        return
    functions = list(_functions(tree.body))
    public = [node for node in functions if not node.name.startswith("_")]
    for name in environment.functions:
        if name not in [node.name for node in functions]:
            message = f"{shown} defines no function {shorten(name)} at its top level"
            yield "functions", message, did_you_mean(name, [node.name for node in public])
    if not public and not environment.functions:
        yield "file", f"{shown} defines no public function at its top level", None
    chosen = [node for node in functions if node.name in environment.functions] if environment.functions else public
    for line, message, hint in _tool_faults(chosen, is_method=False):
        yield "functions" if environment.functions else "file", f"{shown}:{line}: {message}", hint


def opens_prompts(environment: specs.Environment | None, folder: Path | str) -> bool:
    """Returns whether an environment may append a text to the first prompt: by its kind, or by what `reset` returns."""
    return any(
        _returns_text(own, folder) if isinstance(own, specs.FileEnvironment) else own.opens_prompts
        for _, own in specs.environments_of(environment, specs.BaseEnvironment)
    )


def _returns_text(environment: specs.FileEnvironment, folder: Path | str) -> bool:
    """Whether `reset` of the class may return a text."""
    tree = parsed(os.path.join(folder, environment.file), environment.file)
    if isinstance(tree, tuple):
        return False
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == environment.class_name]
    own = [node for cls in classes for node in _functions(cls.body) if node.name == "reset"]
    if not own:
        return any(cls.bases for cls in classes)
    returned = [node.value for node in ast.walk(own[-1]) if isinstance(node, ast.Return)]
    return any(value and not (isinstance(value, ast.Constant) and value.value is None) for value in returned)


def _functions(body: Sequence[ast.stmt]) -> Iterator[Definition]:
    return (node for node in body if isinstance(node, Definition))


def _tools(cls: ast.ClassDef) -> list[Definition]:
    """The public methods of a class that its environment does not need itself."""
    return [
        node
        for node in _functions(cls.body)
        if not (node.name.startswith("_") or node.name in OWN or any(map(_is_no_method, node.decorator_list)))
    ]


def _is_no_method(decorator: ast.expr) -> bool:
    name = decorator.attr if isinstance(decorator, ast.Attribute) else getattr(decorator, "id", "")
    return name in (*NOT_TOOLS, "setter", "deleter", "getter")


def _tool_faults(tools: Sequence[Definition], *, is_method: bool) -> Iterator[LineFault]:
    names = [tool.name for tool in tools]
    for place, tool in enumerate(tools):
        if tool.name in OWN:
            yield (tool.lineno, f"{tool.name} is what an environment's own method is called, and no tool", "rename it")
        if tool.name in names[:place]:
            yield (tool.lineno, f"there is another tool of the name {tool.name}", "rename one")
        yield from _faults_of(tool, is_method=is_method)


def _faults_of(tool: Definition, *, is_method: bool) -> Iterator[LineFault]:
    doc = ast.get_docstring(tool)
    if not doc:
        yield (tool.lineno, f"the tool {tool.name} has no docstring", "say what it does: the model reads it")
        return
    static = any(getattr(decorator, "id", "") == "staticmethod" for decorator in tool.decorator_list)
    args = [*tool.args.posonlyargs, *tool.args.args]
    arguments = [*(args[1:] if is_method and not static else args), *tool.args.kwonlyargs]
    if tool.args.posonlyargs or tool.args.vararg or tool.args.kwarg:
        yield (tool.lineno, f"the tool {tool.name} takes arguments without a name", "name each argument")
    if untyped := [arg.arg for arg in arguments if arg.annotation is None]:
        yield (tool.lineno, f"the tool {tool.name} gives no type for {listed(untyped)}", "annotate each argument")
    described = re.findall(r"^\s*(\w+):", doc.partition("Args:")[2], re.MULTILINE)
    if missing := [arg.arg for arg in arguments if arg.arg not in described]:
        hint = "describe each argument under `Args:`, as `name: what it is`"
        yield (tool.lineno, f"the docstring of the tool {tool.name} does not describe {listed(missing)}", hint)
