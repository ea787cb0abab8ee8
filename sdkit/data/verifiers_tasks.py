"""A program that lists the tasks of a verifiers taskset as rows.

    python verifiers_tasks.py ID CONFIG_AS_JSON LIMIT_AS_JSON

Each line of standard output is a task, as a JSON object; with exit code 1 the last line, without an end, is the error.
`sdkit/environments/verifiers_episode.py` loads this file too.  Imports nothing of sdkit: verifiers may be installed for
another interpreter.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

VERSION = "0.4."
MOST = 1_000_000
"""Tasks of the largest taskset that is read without a limit."""


def check_version() -> None:
    """Raise ValueError for another version of verifiers."""
    version = importlib.metadata.version("verifiers")
    if not version.startswith(VERSION):
        raise ValueError(f"verifiers is {version}; {VERSION}x is needed")


def key_of(task: Any) -> str:
    """Return what tells a task apart: the key that its class gives, or the hash of its data without its place."""
    from verifiers.v1.task import Task, task_key

    if type(task).key is not Task.key:
        return str(task.key)
    return task_key(task.data.model_dump(mode="json", exclude_none=True, exclude={"idx"}))


def opening_messages(data: Any) -> list[Any]:
    """Return the system prompt and the prompt of a task's data as messages; none if it has neither."""
    from verifiers.v1.types import SystemMessage, UserMessage

    system = [SystemMessage(content=data.system_prompt)] if data.system_prompt else []
    prompt = [UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else list(data.prompt or [])
    return [*system, *prompt]


def _row(task: Any) -> dict[str, Any]:
    from verifiers.v1.task import TaskData

    shown = {"id", "name", "description"} | type(task.data).model_fields.keys() - TaskData.model_fields.keys()
    fields = task.data.model_dump(mode="json", include=shown)
    messages = [
        message.model_dump(mode="json", include={"role", "content"}) for message in opening_messages(task.data)
    ]
    is_text = isinstance(task.data.prompt, str) and len(messages) == 1
    return {**fields, "prompt": task.data.prompt if is_text else messages, "key": key_of(task)}


def _rows(name: str, config: dict[str, Any], limit: int | None) -> Iterator[dict[str, Any]]:
    from verifiers.v1.utils.loaders import load_taskset, taskset_config_type

    check_version()
    taskset = load_taskset(taskset_config_type(name).model_validate({**config, "id": name}))
    if limit is None and not taskset.bounded:
        raise ValueError("it is infinite; set data.limit")
    for number, task in enumerate(itertools.islice(taskset, limit)):
        if number == MOST:
            raise ValueError(f"it has more than {MOST} tasks; set data.limit")
        yield _row(task)


def main(name: str, config: str, limit: str) -> int:
    """Write the rows; returns the exit code."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        os.dup2(2, 1)  # what the taskset prints
        try:
            for row in _rows(name, json.loads(config), json.loads(limit)):
                output.write(json.dumps(row) + "\n")
        except BaseException as error:  # also SystemExit, of the taskset's code
            output.write(json.dumps(f"{type(error).__name__}: {error}"))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
