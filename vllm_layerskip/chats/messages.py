# SPDX-License-Identifier: Apache-2.0
"""A chat's messages and tools in the form in which vLLM hands them to a chat template.

It is what ``vllm.renderers.chat_utils.parse_chat_messages`` and the OpenAI server's models make of
them, key by key: templates print whole objects, so the order of keys is text, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_layerskip.chats.content_format import ContentFormat
from vllm_layerskip.files.records import without_nulls

Message = dict[str, Any]

_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""The key that holds the text, by the type of a part."""
_NULL_MATTERS = ("default", "const")
"""In a tool's JSON Schema."""


def template_messages(
    messages: Sequence[Mapping[str, Any]], content_format: ContentFormat
) -> list[Message]:
    """Messages for a template; a key that is null is not given.

    Raises:
        ValueError: a message has a form that vLLM or this package cannot serve.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError("messages must be a list of objects with role and content, not empty.")
    return [
        _message(message, f"message {number}", content_format)
        for number, message in enumerate(messages, start=1)
    ]


def template_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools for a template; None if there are none. JSON text is read.

    Raises:
        ValueError: they have another form than OpenAI's.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools: this is no JSON ({error}).") from None
    if not tools:
        return None
    if not isinstance(tools, list | tuple):
        raise ValueError(f"tools={tools!r:.80} must be a list.")
    return [_tool(tool, f"tool {number}") for number, tool in enumerate(tools, start=1)]


def as_system(messages: Sequence[Message]) -> list[Message]:
    """Messages of the role ``developer`` as one system message in front, for templates without it.

    vLLM does so, and joins it with the system's own messages.
    """
    renamed = [
        {**{k: v for k, v in message.items() if k != "tools"}, "role": "system"}
        if message["role"] == "developer"
        else message
        for message in messages
    ]
    system = [message for message in renamed if message["role"] == "system"]
    if renamed[:1] == system:
        return renamed
    contents = [_joined(message["content"]) for message in system]
    merged = {"role": "system", "content": "\n\n".join(filter(None, contents))}
    return [merged, *(message for message in renamed if message["role"] != "system")]


def _joined(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def _message(given: Any, where: str, content_format: ContentFormat) -> Message:
    given = without_nulls(given)
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
        raise ValueError(f"{where}: it must be an object with role (a text) and content.")
    role, parts = given["role"], _parts(given.get("content"), where)
    only_text = all(part["type"] == "text" for part in parts)
    texts = [part["text"] if part["type"] == "text" else part["name"] for part in parts]
    if content_format == "string":
        message: Message = {"role": role, "content": "\n".join(filter(None, texts))}
    elif role == "tool" and only_text:  # Most templates print what a tool says as it is.
        message = {"role": role, "content": "\n".join(texts)}
    else:
        message = {"role": role, "content": parts}
    if role == "assistant":
        message |= _of_the_assistant(given, where)
    elif role == "tool" and "tool_call_id" in given:
        message["tool_call_id"] = given["tool_call_id"]
    message |= {key: given[key] for key in ("name", "task") if isinstance(given.get(key), str)}
    if role == "developer":
        message["tools"] = given.get("tools")
    return message


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError(f"{where}: content={content!r:.80} must be a text or a list of parts.")
    parts = (_part(part, where) for part in content if part is not None)
    return [part for part in parts if part is not None]


def _part(part: Any, where: str) -> dict[str, Any] | None:
    """A part, or None if there is no text in it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "tool_reference" and isinstance(part.get("name"), str):
        return {"type": kind, "name": part["name"]}
    if kind not in _TEXT_PARTS:
        raise ValueError(
            f"{where}: a part of the content is {part!r:.80}. Only text is served: a part must be "
            'a text, or an object like {"type": "text", "text": "..."}.'
        )
    text = part.get(_TEXT_PARTS[kind])
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"{where}: the {kind} of a part, {text!r:.80}, must be a text.")
    return {"type": "text", "text": text}


def _of_the_assistant(given: Mapping[str, Any], where: str) -> Message:
    found: Message = {}
    calls = given.get("tool_calls", [])
    if not isinstance(calls, list):
        raise ValueError(f"{where}: tool_calls={calls!r:.80} must be a list.")
    if calls:
        found["tool_calls"] = [_tool_call(call, where) for call in calls]
    reasoning = given.get("reasoning", given.get("reasoning_content"))
    if reasoning is not None:
        found |= {"reasoning": reasoning, "reasoning_content": reasoning}
    return found


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call, its arguments as an object: OpenAI's clients write them as JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise ValueError(
            f"{where}: the tool call {call!r:.80} must be an object of type function, with name "
            "and arguments in 'function'."
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None  # vLLM goes on with the chat, too.
    arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
    function = _in_order({**function, "arguments": arguments}, ("arguments", "name"))
    return _in_order({**call, "function": function}, ("id", "function", "type"))


def _tool(given: Any, where: str) -> dict[str, Any]:
    given = _schema(given)
    function = given.get("function") if isinstance(given, Mapping) else None
    if (
        not isinstance(function, Mapping)
        or given.get("type", "function") != "function"
        or not isinstance(function.get("name"), str)
    ):
        raise ValueError(
            f"{where}: {given!r:.80} must be an object like "
            '{"type": "function", "function": {"name": ..., "description": ..., "parameters": '
            "{...}}}."
        )
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise ValueError(f"{where}: parameters={parameters!r:.80} must be an object.")
    deferred = {"defer_loading": given["defer_loading"]} if "defer_loading" in given else {}
    # The server's models have these keys and no others, and the first three even if they are null.
    described = {key: function.get(key) for key in ("name", "description", "parameters")}
    given = {**deferred, **function}
    described |= {key: given[key] for key in ("strict", "defer_loading") if key in given}
    return {"type": "function", "function": described, **deferred}


def _schema(value: Any) -> Any:
    """``without_nulls``, but a JSON Schema may say that a default is null."""
    if isinstance(value, Mapping):
        return {
            key: _schema(part)
            for key, part in value.items()
            if part is not None or key in _NULL_MATTERS
        }
    return [_schema(part) for part in value] if isinstance(value, list | tuple) else value


def _in_order(value: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The same with these keys first."""
    return {key: value[key] for key in keys if key in value} | dict(value)
