"""What a chat template prints of the tools and the tool calls in a row's chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from sdkit.batches import Message, Row
from sdkit.data.dummy_chats import USER
from sdkit.language.errors import BadData

SENTINEL = "sdkittool"
"""A name that no chat template contains."""
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]]], str]
"""Renders a chat with tools.  Raises BadData if the chat template refuses it."""


class PrintedTools:
    """Compares what a chat template prints with what it is given, on dummy chats."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._prints_tools = cache(self._render_tools)
        self._prints_calls = cache(self._render_calls)

    def check(self, row: Row, messages: Sequence[Message]) -> None:
        """Raise BadData unless the chat template prints the row's tools and the calls in its chat."""
        if row.tools and not self._prints_tools():
            raise BadData(f"row {row.index}: the chat template prints no tools, but the row's column 'tools' has some")
        most = max((len(m.get("tool_calls", ())) for m in messages), default=0)
        if most and not self._prints_calls(1):
            raise BadData(
                f"row {row.index}: the chat template prints no tool calls, but a turn of the row makes one",
                hint="use a model whose chat template knows tools, or write calls as text of the turn",
            )
        if most > 1 and not self._prints_calls(2):
            raise BadData(
                f"row {row.index}: the chat template prints one tool call of a turn, and a turn makes {most}"
            )

    def _render_tools(self) -> bool:
        """Whether the chat template prints the schemas of tools."""
        function = {"name": SENTINEL, "description": "a", "parameters": {"type": "object", "properties": {}}}
        return self._prints([USER], ({"type": "function", "function": function},), 1)

    def _render_calls(self, count: int) -> bool:
        """Whether the chat template prints the names and the arguments of so many tool calls in a turn."""
        function = {"name": SENTINEL, "arguments": {f"{SENTINEL}key": f"{SENTINEL}value"}}
        calls = [{"id": f"abcdef12{i}", "type": "function", "function": function} for i in range(count)]
        results = [{"role": "tool", "content": "a", "name": "a", "tool_call_id": call["id"]} for call in calls]
        return self._prints([USER, {"role": "assistant", "content": "", "tool_calls": calls}, *results], (), 3 * count)

    def _prints(self, chat: Sequence[Message], tools: Sequence[Mapping[str, Any]], times: int) -> bool:
        """Whether the sentinel is printed at least so often; True for a chat that the template refuses, as it will the row's."""
        try:
            return self._render(chat, tools).count(SENTINEL) >= times
        except BadData:
            return True
