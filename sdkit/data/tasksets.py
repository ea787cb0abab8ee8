"""Reads the tasks of a verifiers taskset, which are listed by a process of the interpreter that has the package."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from sdkit.language.errors import BadData, BadEnvironment
from sdkit.language.specs import VerifiersSource
from sdkit.processes import kill_group

PROGRAM = Path(__file__).with_name("verifiers_tasks.py")
START_SECONDS = 300.0
"""How long importing verifiers and loading a taskset may take."""


def read_tasks(source: VerifiersSource, base: Path, limit: int | None) -> list[bytes]:
    """Returns the first `limit` tasks of a taskset, or all of them, each as a JSON object.

    Raises BadEnvironment without the package, BadData if the taskset cannot be loaded.
    """
    if source.id is None:
        raise BadData("data of kind verifiers names no taskset", hint="add id, or an environment of kind verifiers")
    if source.python is None:
        check_package("data")
    words = [source.id, json.dumps(dict(source.config)), json.dumps(limit)]
    python = interpreter(source.python, base)
    try:
        process = subprocess.Popen(
            [python, "-P", str(PROGRAM), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise BadData(f"cannot run {python}: {error.strerror}") from error
    try:
        output, _ = process.communicate(timeout=START_SECONDS)
    except subprocess.TimeoutExpired:
        raise BadData(f"verifiers' {source.id} gave no tasks within {START_SECONDS:g} s") from None
    finally:
        kill_group(process)
    *tasks, end = output.split(b"\n")
    if code := process.returncode:
        reason = json.loads(end) if code == 1 and end else f"its process ended with code {code}"
        raise BadData(f"verifiers' {source.id} cannot be loaded: {reason}")
    return tasks


def interpreter(python: str | None, base: Path) -> str:
    """Returns the interpreter that a spec names, or this one."""
    return str(base / python) if python else sys.executable


def check_package(part: str) -> None:
    """Raises BadEnvironment, naming the part of the spec that needs it, if this interpreter has no verifiers."""
    if importlib.util.find_spec("verifiers") is None:
        message = f"{part} of kind verifiers needs a package that is missing: verifiers"
        raise BadEnvironment(
            message, hint="pip install 'sdkit[verifiers]', or name an interpreter that has it by python"
        )
