"""What the formats share: lists of turns in the spellings that people use, tools, and what is no text."""

import ast
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from qlora.core.conversation import PLAIN_KEYS, Message, Tool, ToolCall

SYSTEM, USER, ASSISTANT, TOOL, CALL = "system", "user", "assistant", "tool", "call"
ROLES = {
    **dict.fromkeys(("system", "developer"), SYSTEM),
    **dict.fromkeys(("user", "human"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai"), ASSISTANT),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "function_response", "tool_response", "tool_result"), TOOL),
    **dict.fromkeys(("function_call", "tool_call"), CALL),
}
"""Roles in the spellings of both kinds of conversation, in any case. A call is an assistant's turn whose text is a tool's name and arguments."""
ANSWERED = (USER, ASSISTANT)
"""Of nearly all turns of a file."""
REASONING = ("reasoning_content", "thinking", "reasoning")
TEXT_KEYS = frozenset(("role", "content", "from", "value"))
ASSISTANT_KEYS = frozenset(("weight", "train", "tool_calls", "function_call", *REASONING))
HARMLESS = frozenset(("id", "timestamp", "created_at", "createdAt", "date", "model", "annotations", "language", "lang", "tokens", "token_count"))
"""Keys of a message that say nothing of what is to be learned."""
OF_A_CALL = frozenset(("name", "arguments", "parameters", "id", "type", "index"))
IMAGE_MARK = "<image>"
THINK, THOUGHT = "<think>", "</think>"


class UnsupportedTurnError(ValueError):
    """A row that is well formed and that this pipeline can't train on; `reason` is the word it is counted by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def message_list(column: str, found: Any, *, images: Any = None, ignored: Counter[str] | None = None) -> list[Message]:
    """Messages from [{"role": ..., "content": ...}, ...] or [{"from": ..., "value": ...}, ...]; that list may also be a text of JSON or Python.

    A blank system turn is none. An unknown role stays, and is then an invalid conversation.

    Args:
        ignored: Keys of messages that are neither read nor known to be harmless are counted there.

    Raises:
        ValueError: another type.
        UnsupportedTurnError: an image, a weight other than 0 and 1, or a call that can't be read.
    """
    if images:
        raise UnsupportedTurnError("image", "the row has images, which a text model can't see")
    if isinstance(found, str):
        found = _literal(column, found)
    if found is None:
        return []
    if not isinstance(found, list):
        raise ValueError(f"{column} is {found!r}, expected a list of {{'role': ..., 'content': ...}}")
    messages: list[Message] = []
    for index, item in enumerate(found):
        if not isinstance(item, dict):
            raise ValueError(f"{column}[{index}] is {item!r}, expected {{'role': ..., 'content': ...}}")
        role, content = item.get("role"), item.get("content")
        if role in ANSWERED and type(content) is str and len(item) == PLAIN_KEYS and THOUGHT not in content:
            messages.append({"role": role, "content": content})
            continue
        message = _unusual(f"{column}[{index}]", item, ignored)
        if message["role"] != SYSTEM or message["content"].strip():
            messages.append(message)
    return messages


def _literal(column: str, found: str) -> Any:
    """The list that a text writes down, as JSON or as Python's repr."""
    try:
        return orjson.loads(found)
    except orjson.JSONDecodeError:
        try:
            value = ast.literal_eval(found)
            # What JSON has no form for can't be a line of the prepared data.
            orjson.dumps(value)
            return value
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"{column} is {found[:200]!r}, expected a list of {{'role': ..., 'content': ...}}") from None


def _unusual(place: str, item: dict[str, Any], ignored: Counter[str] | None) -> Message:
    """A message that is more, or less, than two texts under their usual names."""
    if not {"role", "content", "from", "value"} & set(item):
        raise ValueError(f"{place} has {', '.join(map(repr, item)) or 'nothing'}, expected 'role' and 'content'")
    role_key, content_key = ("role" if "role" in item else "from"), ("content" if "content" in item else "value")
    speaker = text(f"{place}.{role_key}", item.get(role_key))
    role = ROLES.get(speaker.strip().lower(), speaker)
    content = _content(f"{place}.{content_key}", item.get(content_key), role)
    calls = item.get("tool_calls") or item.get("function_call")
    if role == CALL:
        role, content, calls = ASSISTANT, "", content
    message: Message = {"role": role, "content": content}
    if role == ASSISTANT:
        _add_reasoning(place, message, item)
        if calls:
            message["tool_calls"] = _calls(place, calls)
        if not _is_learned(place, item):
            message["learn"] = False
    elif role == TOOL:
        if item.get("tool_call_id"):
            message["tool_call_id"] = text(f"{place}.tool_call_id", item["tool_call_id"])
        if item.get("name"):
            message["name"] = text(f"{place}.name", item["name"])
    if ignored is not None:
        ignored.update(_unread(item, role))
    return message


def _unread(item: Mapping[str, Any], role: str) -> list[str]:
    """Keys that hold something of which nothing becomes."""
    spare = [
        key for names in (REASONING, ("tool_calls", "function_call"), ("role", "from"), ("content", "value")) for key in _filled(item, names)[1:]
    ]
    return [key for key, value in item.items() if value is not None and key not in HARMLESS and (key in spare or not _is_read(key, value, role))]


def _filled(item: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Of several names for one thing those that hold something, in the order in which they are looked at."""
    return [name for name in names if item.get(name)]


def _is_read(key: str, value: Any, role: str) -> bool:
    """Whether something becomes of the key: what only an assistant or a tool has is not read of others."""
    if key in ("tool_call_id", "name"):
        return role == TOOL
    # Of other turns nothing is learned anyway.
    if key in ("weight", "train") and not value:
        return True
    return key in TEXT_KEYS or (role == ASSISTANT and key in ASSISTANT_KEYS)


def _content(place: str, content: Any, role: str) -> str:
    if isinstance(content, list):
        content = "".join(_part(f"{place}[{index}]", part) for index, part in enumerate(content))
    elif isinstance(content, dict) and role in (TOOL, CALL):
        content = orjson.dumps(content).decode()
    found = text(place, content)
    if IMAGE_MARK in found and place.endswith(".value"):
        raise UnsupportedTurnError("image", f"{place} holds {IMAGE_MARK!r}")
    return found


def answer(place: str, value: Any) -> Message:
    """An assistant's message from a column of text, its reasoning apart; raises ValueError for anything but text."""
    message: Message = {"role": ASSISTANT, "content": text(place, value)}
    if THOUGHT in message["content"]:
        _add_reasoning(place, message, {})
    return message


def _add_reasoning(place: str, message: Message, item: Mapping[str, Any]) -> None:
    """Reasoning under one of its names, or in a block at the beginning of the content."""
    key = next((key for key in REASONING if item.get(key)), None)
    reasoning = text(f"{place}.{key}", item[key]) if key else ""
    before, closed, rest = message["content"].partition(THOUGHT)
    if closed and before.lstrip().startswith(THINK):
        reasoning = reasoning or before.lstrip().removeprefix(THINK)
        message["content"] = rest.lstrip()
    if reasoning.strip():
        message["reasoning_content"] = reasoning.strip()


def _is_learned(place: str, item: Mapping[str, Any]) -> bool:
    """`weight` as OpenAI and Fireworks have it, `train` as axolotl has it."""
    weight, train = item.get("weight"), item.get("train")
    if weight is not None and weight not in (0, 1):
        raise UnsupportedTurnError("weight", f"{place}.weight is {weight!r}, expected 0 (not learned) or 1")
    if train is not None and not isinstance(train, bool):
        raise UnsupportedTurnError("weight", f"{place}.train is {train!r}, expected true or false")
    return bool((1 if weight is None else weight) and (train is None or train))


def _calls(place: str, found: Any) -> list[ToolCall]:
    """Calls of tools as OpenAI writes them, or one {"name": ..., "arguments": ...}, as objects or as JSON text.

    Arguments that are null are left out: a parquet file can't tell them from those that another call has.
    """
    if isinstance(found, str):
        found = _json(place, found)
    calls: list[ToolCall] = []
    for call in found if isinstance(found, list) else [found]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UnsupportedTurnError("bad_tool_call", f"{place} calls {call!r}, expected a name and arguments")
        given: Any = next((function[key] for key in ("arguments", "parameters") if function.get(key) is not None), {})
        arguments = _json(place, given) if isinstance(given, str) and given.strip() else given or {}
        unknown = [key for key, value in function.items() if value is not None and key not in OF_A_CALL]
        if not isinstance(arguments, dict) or isinstance(given, list) or unknown:
            raise UnsupportedTurnError("bad_tool_call", f"{place} calls {function['name']} with {function!r}, expected arguments as an object")
        made: ToolCall = {"type": "function", "function": {"name": function["name"], "arguments": without_nulls(arguments)}}
        if isinstance(call.get("id"), str) and call["id"]:
            made["id"] = call["id"]
        calls.append(made)
    return calls


def _json(place: str, found: str, reason: str = "bad_tool_call") -> Any:
    try:
        return orjson.loads(found)
    except orjson.JSONDecodeError:
        raise UnsupportedTurnError(reason, f"{place} holds {found[:200]!r}, which is not JSON") from None


def tools_of(found: Any) -> list[Tool]:
    """Definitions of tools, as objects or as JSON text, in OpenAI's form.

    Raises:
        UnsupportedTurnError: they can't be read.
    """
    if isinstance(found, str):
        found = _json("tools", found, "bad_tool") if found.strip() else None
    tools: list[Tool] = []
    for tool in found if isinstance(found, list) else [found] if found else []:
        tool = _json("tools", tool, "bad_tool") if isinstance(tool, str) else tool
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UnsupportedTurnError("bad_tool", f"tools holds {tool!r}, expected a name, a description and parameters")
        whole = {"description": "", "parameters": {"type": "object", "properties": {}}, **without_nulls(function)}
        tools.append({"type": "function", "function": {key: whole[key] for key in ("name", *(key for key in whole if key != "name"))}})
    return tools


def without_nulls(value: Any) -> Any:
    """The value without keys that hold null."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def _part(place: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text"):
        return text(f"{place}.text", part.get("text"))
    if isinstance(kind, str):
        raise UnsupportedTurnError("image", f"{place} is of type {kind!r}, which is not text")
    raise ValueError(f"{place} is {part!r}, expected {{'type': 'text', 'text': ...}}")


def text(place: str, value: Any) -> str:
    """The value, "" for null; raises ValueError for anything but text."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{place} is {value!r} ({type(value).__name__}), expected text")
    return value or ""
