"""Format `alpaca`: {"instruction": ..., "input": ..., "output": ...}, with `system` and `history` where they are there."""

from collections import Counter
from typing import Any

from qlora.core.conversation import Message
from qlora.data.formats.turns import answer, text

COLUMNS = {"instruction": ("instruction",), "output": ("output",)}
OPTIONAL = {"input": ("input",), "system": ("system",), "history": ("history",)}


def to_messages(row: dict[str, Any], ignored: Counter[str] | None = None) -> list[Message]:  # noqa: ARG001 - there are no keys of messages
    """One question and its answer, after the turns of `history`; `input` follows `instruction` after a blank line, or is the question alone.

    Raises:
        ValueError: a column holds another type; `history` is no list of [question, answer].
    """
    messages: list[Message] = []
    system = text("system", row.get("system"))
    if system.strip():
        messages.append({"role": "system", "content": system})
    history = row.get("history") or []
    if not isinstance(history, list):
        raise ValueError(f"history is {history!r}, expected a list of [question, answer]")
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history[{index}] is {pair!r}, expected [question, answer]")
        messages += [{"role": "user", "content": text(f"history[{index}][0]", pair[0])}, answer(f"history[{index}][1]", pair[1])]
    asked = [text(name, row.get(name)) for name in ("instruction", "input")]
    question = "\n\n".join(part for part in asked if part.strip()) or asked[0]
    return [*messages, {"role": "user", "content": question}, answer("output", row.get("output"))]
