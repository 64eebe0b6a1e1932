"""A chat template as text: rendered as transformers does for serving, and by nothing but what it is given."""

import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qlora.core.conversation import Message, Tool
from qlora.core.errors import InputError, UserFacingError, machine_error

CLOCK = "strftime_now"
"""The function by which a template asks for today's date. In chat.template_kwargs: the text that it answers."""
_ASKED = "a template asked for the date"
_NO_CLOCK = "{% macro " + CLOCK + "(format) %}{{ raise_exception('" + _ASKED + "') }}{% endmacro %}\n"
NOT_IN_THE_ROW = frozenset(("learn",))
"""Keys of a message that are no template's business."""


MOST_SECONDS = 10
"""Of processor time for one rendering, which takes a thousandth of a second, or for the first ones together: a template is a program."""


MOST_CHARACTERS = 1_000_000
"""Of a template's own, around a conversation: the longest known one writes some 10,000. To tokenise a text of gigabytes takes hours."""
MOST_COPIES = 4
"""Of a conversation's text in its rendering, with what escapes it."""


class _OutOfTimeError(BaseException):
    """No Exception: those Jinja catches where it computes a constant while it compiles, and goes on without a limit."""


class NotRenderedError(InputError):
    """A conversation that this chat template can't show, or not whole."""


class Renderer:
    """Renders conversations with one template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, values: Mapping[str, Any]) -> None:
        """Take `values` for the template's variables, whatever a program that serves the model later passes."""
        self.template = "".join(map(_assignment, values.items())) + source
        """What is saved with an adapter: the values are its first lines."""
        self._guarded = self.template if CLOCK in values else _NO_CLOCK + self.template
        self._tokenizer: Any = tokenizer
        self.arguments_as_text = False
        """Whether the template takes the arguments of a tool call as JSON text only, as DeepSeek's do."""

    def text(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, *, prompt: bool = False) -> str:
        """The messages as the model reads them; with `prompt`, as they stand before its next answer.

        Raises:
            NotRenderedError: the template fails on them.
            InputError: the template asks for today's date.
        """
        return self._render(messages, tools, add_generation_prompt=prompt)[0]

    def marked(self, messages: Sequence[Message]) -> list[str]:
        """What the template itself marks as the assistant's by {% generation %}."""
        text, spans = self._render(messages, None, return_assistant_tokens_mask=True)
        return [text[start:end] for start, end in spans]

    def _render(self, messages: Sequence[Message], tools: Sequence[Tool] | None, **options: bool) -> tuple[str, list[tuple[int, int]]]:
        render: Any = render_jinja_template  # typed as text, returns a pair
        shown = [self._shown(message) for message in messages]
        try:
            with time_limit():
                texts, spans = render(
                    [shown],
                    tools=[dict(tool) for tool in tools] if tools else None,
                    chat_template=self._guarded,
                    **self._tokenizer.special_tokens_map,
                    **options,
                )
        except (UserFacingError, MemoryError):
            raise
        # A template is a program: it can raise whatever Python can.
        except Exception as error:
            if unable := machine_error(error, "the chat template"):
                raise unable from error
            if _ASKED in str(error):
                raise InputError(
                    "chat-clock",
                    "the chat template writes today's date, so another day would give another model: fix it, for instance with "
                    f'chat.template_kwargs: {{{CLOCK}: "26 Jul 2024"}}',
                ) from None
            roles = [message["role"] for message in messages]
            hint = " If it knows no system turn, set data.system_message to null." if "system" in roles else ""
            reason = f"{error}"[:1000] if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"[:1000]
            raise NotRenderedError("chat-template", f"the chat template refuses roles {roles}: {reason}.{hint}") from None
        if len(texts[0]) > MOST_CHARACTERS:
            _require_finite(len(texts[0]), len(json.dumps([shown, tools or []], ensure_ascii=False)))
        return texts[0], spans[0] if spans else []

    def _shown(self, message: Message) -> dict[str, Any]:
        shown: dict[str, Any] = {key: value for key, value in message.items() if key not in NOT_IN_THE_ROW}
        if self.arguments_as_text and "tool_calls" in message:
            shown["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
                for call in message["tool_calls"]
            ]
        return shown


def _require_finite(rendered: int, given: int) -> None:
    """Raises InputError for characters that are not the conversation's, by the million."""
    if rendered > MOST_CHARACTERS + MOST_COPIES * given:
        raise InputError(
            "chat-endless",
            f"the chat template makes {rendered:,} characters of a conversation of {given:,}: it is damaged, or hostile; choose another "
            "chat.template or base model",
        )


@contextmanager
def time_limit() -> Iterator[None]:
    """End the block after MOST_SECONDS of this process's time. Within another limit that one counts; in other threads than the main one none does.

    Raises:
        InputError: the time is over.
    """
    # Not the clock's time: on a busy machine a good template takes long too.
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_PROF)[0]:
        yield
        return
    before = signal.signal(signal.SIGPROF, _took_too_long)
    try:
        # Again each second: where Python frees an object, or Jinja, an exception can get lost.
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS, 1)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except _OutOfTimeError:
        # It may have come a second time, before the line above.
        signal.setitimer(signal.ITIMER_PROF, 0)
        raise InputError(
            "chat-endless",
            f"the chat template did not end within {MOST_SECONDS} s: it is damaged, or hostile; choose another chat.template or base model",
        ) from None
    finally:
        signal.signal(signal.SIGPROF, before)


def _took_too_long(_number: int, _frame: object) -> None:
    raise _OutOfTimeError


def _assignment(item: tuple[str, Any]) -> str:
    name, value = item
    if name == CLOCK:
        return f"{{% macro {CLOCK}(format) %}}{{{{ {_literal(value)} }}}}{{% endmacro %}}\n"
    return f"{{% set {name} = {_literal(value)} %}}\n"


def _literal(value: Any) -> str:
    """The value as Jinja writes it; JSON's null is its none."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
