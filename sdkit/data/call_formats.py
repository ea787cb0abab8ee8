"""How tool calls are written: shown to the student, and read from what it sampled.

A format of a chat template is a response template of transformers, in `sdkit/call_formats`.  Where the template writes no
calls there is the text protocol: tools are described in the first message, a call is the last line of a turn.
Knows nothing of what tools do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from attrs import frozen

from sdkit.batches import Message as ChatMessage
from sdkit.data.dummy_chats import ROW
from sdkit.data.thinking import opening_tag, without_thinking
from sdkit.language.errors import BadData, one_line, shorten
from sdkit.language.specs import ToolCalls
from sdkit.models.prefix import common_length
from sdkit.spans import Call, Message

if TYPE_CHECKING:
    from sdkit.data.prompts import Prompter

FOLDER = Path(__file__).parents[1] / "call_formats"
TEXT = "text"
QUESTION, KEY, VALUE, RESULT = "sdkitquestion", "sdkitkey", "sdkitvalue", "sdkitresult"
"""Texts of a dummy chat that no chat template contains."""
OPENING_TOKENS = 24
"""Tokens at the end of a prompt that may open the student's thinking."""
LONGEST_REASON = 200
"""Characters of the reason why a call cannot be read, which may quote the call."""
EXPLANATION = """You can call tools. To call one, end your answer with one line:
CALL name {"argument": value}
The result comes back as: RESULT name: text
An answer that does not end with such a line is final.

Tools:"""


@frozen(kw_only=True, eq=False)
class CallFormat:
    """How the student calls these tools."""

    name: str
    template: Mapping[str, Any] | None  # a response template; None: the text protocol
    tools: Sequence[Mapping[str, Any]]  # their schemas
    most: int  # calls of a turn
    note: str = ""  # why there is no other format
    in_system: bool = True  # whether the text protocol is described in a system message; else in the first message

    def describe(self) -> str:
        """Returns which tools there are, and how they are called."""
        names = ", ".join(names_of(self.tools))
        most = "one call" if self.most == 1 else f"up to {self.most} calls"
        return f"tools: {names}; {most} a turn, format {self.name}{f' ({self.note})' if self.note else ''}"

    @property
    def shown_tools(self) -> list[Mapping[str, Any]] | None:
        """The tools that the chat template shows; None, not an empty list, which some templates describe."""
        return list(self.tools) if self.template else None

    def shown(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """Returns a chat with the tools described, if the chat template does not show them."""
        if self.template or not messages:
            return list(messages)
        text = description(self.tools)
        first, *rest = messages
        if self.in_system and first["role"] != "system":
            return [{"role": "system", "content": text}, first, *rest]
        parts = (first["content"], text) if first["role"] == "system" else (text, first["content"])
        return [{**first, "content": "\n\n".join(parts)}, *rest]

    def observation(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Returns messages as the chat template takes them: results of tools are lines of one user turn in the text protocol."""
        if self.template or not any(message.role == "tool" for message in messages):
            return messages
        lines = [
            f"RESULT{f' {m.name}' if m.name else ''}: {m.content}" if m.role == "tool" else m.content for m in messages
        ]
        return [Message(role="user", content="\n".join(lines))]

    def turn_text(self, prompter: Prompter, call: Call) -> str:
        """Returns a turn that makes a call, as the chat template writes it with its end, or the text protocol without one.

        `prompter` shows these tools.
        """
        if self.template is None:
            return _call_line(call.name, call.arguments)
        question: ChatMessage = {"role": "user", "content": QUESTION}
        before = prompter.chat(ROW, [question])
        rendered = prompter.chat(ROW, [question, _turn_with([call])], generation_prompt=False)
        return rendered[common_length(before, rendered) :]

    def written(self, answer: ChatMessage) -> ChatMessage:
        """Returns an assistant's message as the chat template takes it: with its call as a line in the text protocol.

        Raises BadData if it has more calls than a turn may have.
        """
        calls = answer.get("tool_calls", ())
        if len(calls) > self.most:
            raise BadData(f"a turn has {len(calls)} tool calls; the format {self.name} takes {self.most}")
        if self.template or not calls:
            return answer
        function = calls[0]["function"]
        line = _call_line(function["name"], function["arguments"])
        return {"role": answer["role"], "content": "\n".join(filter(None, [answer["content"], line]))}

    def read(self, tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> tuple[tuple[Call, ...], str | None]:
        """Returns the calls in a sampled turn, or why they cannot be read."""
        opening = opening_tag(tokenizer.decode(prompt[-OPENING_TOKENS:]))
        try:
            if self.template is None:
                calls = _read_line(without_thinking(tokenizer.decode(ids, skip_special_tokens=True), opening))
            else:
                calls = _read_template(tokenizer, self.template, opening, ids, self.tools)
        except RecursionError:
            return (), "a tool call that cannot be read: it is nested too deeply"
        except ValueError as error:
            return (), f"a tool call that cannot be read: {one_line(error)[:LONGEST_REASON]}"
        if len(calls) > self.most:
            return (), f"{len(calls)} tool calls in one turn, at most {self.most} are allowed"
        return tuple(calls), None


def names_of(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names of tools, given their schemas."""
    return [tool["function"]["name"] for tool in tools]


def choose_format(prompter: Prompter, tools: Sequence[Mapping[str, Any]], spec: ToolCalls) -> CallFormat:
    """Returns the format of the chat template, or the text protocol.  Raises BadData if it cannot have the spec's format."""
    if spec.format == TEXT:
        return _text_protocol(prompter, tools, "")
    names = [spec.format] if spec.format != "auto" else sorted(path.stem for path in FOLDER.glob("*.yaml"))
    templates = {name: {**yaml.safe_load((FOLDER / f"{name}.yaml").read_text()), **ANCHOR} for name in names}
    own = getattr(prompter.tokenizer, "response_template", None)
    if own and spec.format == "auto":
        templates = {"tokenizer": {**own, **ANCHOR}, **templates}
    try:
        name = _matching(prompter, tools, templates)
    except BadData as error:
        if spec.format == "auto":
            return _text_protocol(prompter, tools, error.message)
        raise BadData(
            f"{error.message}, so calls cannot be of the format {spec.format}",
            path=("calls", "format"),
            hint="use format: auto, or text",
        ) from None
    several = _renders(prompter, tools, 2)
    return CallFormat(name=name, template=templates[name], tools=tools, most=spec.max_per_turn if several else 1)


ANCHOR: Mapping[str, Any] = {"start_anchor": "sdkitprompt"}
"""The parser gets no prompt but the thinking tag that it leaves open: no earlier text is taken for the student's."""


def call_messages(
    tools: Sequence[Mapping[str, Any]], names: Sequence[str | None], values: Sequence[str]
) -> ChatMessage:
    """Returns a dummy assistant turn that calls tools, each with one argument of these values; a name of None is any tool."""
    known = names_of(tools)
    return _turn_with(
        [
            Call(name=name if name in known else known[0], arguments={KEY: value})
            for name, value in zip(names, values, strict=True)
        ]
    )


def _call_line(name: str, arguments: Mapping[str, Any]) -> str:
    return f"CALL {name} {json.dumps(arguments, ensure_ascii=False)}"


def _turn_with(calls: Sequence[Call]) -> ChatMessage:
    """An assistant turn that makes these calls, as chat templates take it."""
    written = [
        {
            "type": "function",
            "id": f"call{number:05}",
            "function": {"name": call.name, "arguments": dict(call.arguments)},
        }
        for number, call in enumerate(calls)
    ]
    message: Any = {"role": "assistant", "content": "", "tool_calls": written}
    return message


def description(tools: Sequence[Mapping[str, Any]]) -> str:
    """Returns the text protocol and the tools, as the student reads them."""
    return "\n".join([EXPLANATION, *(_described(tool["function"]) for tool in tools)])


def _described(tool: Mapping[str, Any]) -> str:
    parameters = tool["parameters"]["properties"]
    lines = [f"- {tool['name']}: {one_line(tool['description'])}"]
    for name, schema in parameters.items():
        kind = json.dumps(schema.get("enum", schema.get("type", "any")))
        needed = "" if name in tool["parameters"].get("required", ()) else ", optional"
        lines.append(f"    {name} ({kind.strip(chr(34))}{needed}): {one_line(schema.get('description', ''))}")
    return "\n".join(lines)


def _text_protocol(prompter: Prompter, tools: Sequence[Mapping[str, Any]], note: str) -> CallFormat:
    chat = [{"role": "system", "content": KEY}, {"role": "user", "content": QUESTION}]
    try:
        in_system = KEY in prompter.chat(ROW, chat)
    except BadData:
        in_system = False
    return CallFormat(name=TEXT, template=None, tools=tools, most=1, note=note, in_system=in_system)


def _matching(
    prompter: Prompter, tools: Sequence[Mapping[str, Any]], templates: Mapping[str, Mapping[str, Any]]
) -> str:
    """The response template that reads the chat template's own rendering of a call."""
    name = names_of(tools)[0]
    chat: list[ChatMessage] = [
        {"role": "user", "content": QUESTION},
        call_messages(tools, [name], [VALUE]),
        {"role": "tool", "name": name, "content": RESULT},
    ]
    first = prompter.chat(ROW, chat[:1], tools=tools)
    if any(each not in first for each in names_of(tools)):
        raise BadData("the chat template shows no tools")
    rendered = prompter.chat(ROW, chat, tools=tools)
    turn = rendered[common_length(first, rendered) :]
    missing = [what for what, text in zip(WHAT, (name, KEY, VALUE, RESULT), strict=True) if text not in turn]
    if missing:
        raise BadData(f"the chat template drops {' and '.join(missing)} of a tool call")
    wanted = [Call(name=name, arguments={KEY: VALUE})]
    opening = opening_tag(first)
    for candidate, template in templates.items():
        try:
            if _read_template(prompter.tokenizer, template, opening, turn, ()) == wanted:
                return candidate
        except ValueError:
            continue
    raise BadData("the chat template writes tool calls in another format")


WHAT = ("the name", "the argument", "the value", "the result")


def _renders(prompter: Prompter, tools: Sequence[Mapping[str, Any]], count: int) -> bool:
    """Whether the chat template renders a turn with so many calls."""
    chat = [{"role": "user", "content": QUESTION}, call_messages(tools, [None] * count, [VALUE] * count)]
    chat += [{"role": "tool", "content": RESULT}] * count
    try:
        rendered = prompter.chat(ROW, chat, tools=tools)
    except BadData:
        return False
    return rendered.count(VALUE) == rendered.count(RESULT) == count


def _read_template(
    tokenizer: Any, template: Mapping[str, Any], opening: str, turn: str | Sequence[int], tools: Sequence[Any]
) -> list[Call]:
    """The calls in a turn.  Raises ValueError if one cannot be read."""
    text = turn if isinstance(turn, str) else list(turn)
    parsed = tokenizer.parse_response(text, dict(template), prefix=opening, tools=list(tools))
    return [_call_of(call.get("function", call)) for call in parsed.get("tool_calls", ())]


def _call_of(function: Any) -> Call:
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(f"{shorten(function)} has no name and arguments")
    return Call(name=name, arguments=arguments)


def _read_line(text: str) -> list[Call]:
    """The call in the last line of a text.  Raises ValueError if it is none that can be read."""
    line = text.rstrip().rpartition("\n")[2].strip()
    if line != "CALL" and not line.startswith("CALL "):
        return []
    name, _, arguments = line.removeprefix("CALL").strip().partition(" ")
    if not name:
        raise ValueError("CALL without the name of a tool")
    return [_call_of({"name": name, "arguments": arguments.strip() or "{}"})]
