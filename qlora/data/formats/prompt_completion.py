"""Format `prompt_completion` (TRL): {"prompt": ..., "completion": ...}, both text or both lists of messages."""

from typing import Any

from qlora.core.conversation import Message
from qlora.data.formats.turns import message_list, text

COLUMNS = ("prompt", "completion")
OPTIONAL = ()


def to_messages(row: dict[str, Any]) -> list[Message]:
    """A question and its answer; of lists, the prompt's messages and then the completion's.

    Raises:
        ValueError: a column holds another type, or one is text and the other a list.
        UnsupportedTurnError: a tool turn or an image.
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return message_list("prompt", prompt) + message_list("completion", completion)
    return [{"role": "user", "content": text("prompt", prompt)}, {"role": "assistant", "content": text("completion", completion)}]
