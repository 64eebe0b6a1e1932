"""A conversation as it is rendered: with marks in place of the texts that look like control tokens, where those are escaped."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from qlora.core.conversation import Conversation, Message, Tool, ToolCall
from qlora.model.control_tokens import Tokens
from qlora.model.structure import MARK, MARKS


class Shown(NamedTuple):
    """A conversation as it is rendered: texts that look like control tokens are marks, where they are escaped."""

    messages: Sequence[Message]
    tools: Sequence[Tool]
    literals: list[str] | None
    """What each mark stands for; None: nothing is escaped."""

    @classmethod
    def of(cls, conversation: Conversation, tokens: Tokens | None) -> "Shown":
        """Escape by these tokens; None: as it is."""
        if tokens is None or tokens.pattern is None:
            return cls(conversation.messages, conversation.tools, None)
        literals: list[str] = []
        # The characters of the marks themselves are hidden too: a text may hold them.
        hidden = re.compile(f"{tokens.pattern.pattern}|[{MARK.format('')}]")

        def hide(found: re.Match[str]) -> str:
            literals.append(found.group())
            return MARK.format(len(literals) - 1)

        messages = [{**_mapped(message, lambda text: hidden.sub(hide, text)), "role": message["role"]} for message in conversation.messages]
        return cls(cast("list[Message]", messages), _mapped(list(conversation.tools), lambda text: hidden.sub(hide, text)), literals)

    def with_literals(self, text: str) -> str:
        literals = self.literals
        return text if literals is None else MARKS.sub(lambda mark: literals[int(mark.group(1))], text)


def strings(value: object) -> Iterator[str]:
    """Every text in a message or a tool's definition, names of keys too: those of arguments are rendered."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from strings(inner)
    elif isinstance(value, Iterable):
        for inner in value:
            yield from strings(inner)


def _mapped(value: Any, change: Any) -> Any:
    """The value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mapped(inner, change) for inner in value]
    return value


def texts(message: Message, *, whole: bool = False) -> Iterator[tuple[str, str]]:
    """What of a message a template must show, and what it is.

    Args:
        whole: With its reasoning, which is shown of the answer that is learned and need not be of earlier ones, and with numbers.
    """
    if message["content"]:
        yield "the text", message["content"]
    if whole and "reasoning_content" in message:
        yield "the reasoning", message["reasoning_content"].strip()
    for call in message.get("tool_calls", ()):
        yield from ((f"a call ({kind})", text) for kind, text in texts_of_call(call, numbers=whole))


def texts_of_call(call: ToolCall, *, numbers: bool) -> Iterator[tuple[str, str]]:
    """The tool's name and what it is called with, and what each is."""
    yield "name", call["function"]["name"]
    for value in _leaves(call["function"]["arguments"]):
        if isinstance(value, str) and value:
            yield "argument", value
        elif numbers and isinstance(value, int | float) and not isinstance(value, bool):
            yield "argument", json.dumps(value)


def _leaves(value: object) -> Iterator[object]:
    """Values and names of keys."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value
