"""Format `prompt_completion` (TRL): {"prompt": ..., "completion": ...}, both text or both lists of messages."""

from collections import Counter
from typing import Any

from qlora.core.conversation import Message
from qlora.data.formats.turns import answer, message_list, text

COLUMNS = {"prompt": ("prompt", "question"), "completion": ("completion", "response", "answer")}
OPTIONAL = {"system": ("system", "system_prompt")}


def to_messages(row: dict[str, Any], ignored: Counter[str] | None = None) -> list[Message]:
    """A question and its answer; of lists, the prompt's messages and then the completion's.

    Raises:
        ValueError: a column holds another type, or one is text and the other a list.
        UnsupportedTurnError: an image, a weight or a call that can't be used.
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    system = text("system", row.get("system"))
    opening: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = message_list("prompt", prompt, ignored=ignored) + message_list("completion", completion, ignored=ignored)
        return messages if messages and messages[0]["role"] == "system" else opening + messages
    return [*opening, {"role": "user", "content": text("prompt", prompt)}, answer("completion", completion)]
