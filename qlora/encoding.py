"""Conversations as training examples: token ids and labels, nothing cut unseen."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qlora.chat_template import ChatTemplate
from qlora.conversation import Conversation
from qlora.errors import InputError
from qlora.params.sequence import SequenceParams

IGNORE_INDEX = -100
"""Label of a token that the loss does not count."""


@dataclass(frozen=True, slots=True)
class Example:
    ids: list[int]
    labels: list[int]
    """The same length as ids; IGNORE_INDEX where a token is not learned."""

    @property
    def supervised(self) -> int:
        """Tokens that the loss counts; the first of a row is predicted by nothing."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def encode_split(
    conversations: Iterable[Conversation], template: ChatTemplate, sequence: SequenceParams, split: str
) -> tuple[list[Example], dict[str, int]]:
    """Examples that fit sequence.max_length, and the numbers of conversations that were dropped, by reason.

    Raises:
        InputError: a conversation is too long and on_too_long is error, or none is left.
    """
    examples, dropped = [], {"control_token": 0, "too_long": 0}
    for conversation in conversations:
        encoded = template.encode(conversation)
        if encoded is None:
            dropped["control_token"] += 1
        elif len(encoded.ids) <= sequence.max_length:
            labels = _assistant_labels(encoded.ids, encoded.spans) if sequence.assistant_only_loss else list(encoded.ids)
            examples.append(Example(encoded.ids, labels))
        elif sequence.on_too_long == "drop":
            dropped["too_long"] += 1
        else:
            raise InputError(
                "sequence-too-long",
                f"{split} conversation {conversation.id} has {len(encoded.ids)} tokens, sequence.max_length is {sequence.max_length}: "
                "raise it, or set sequence.on_too_long to drop",
            )
    if not examples:
        raise InputError(
            "sequence-all-dropped", f"no {split} conversation is left to learn from; sequence.max_length is {sequence.max_length}, dropped: {dropped}"
        )
    return examples, dropped


def _assistant_labels(ids: Sequence[int], spans: Iterable[tuple[int, int]]) -> list[int]:
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return labels


def show(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The example's text with what is supervised between ⟦ and ⟧."""
    parts = []
    inside = False
    for start, token, label in zip(range(len(example.ids)), example.ids, example.labels, strict=True):
        supervised = label != IGNORE_INDEX
        if supervised != inside:
            parts.append("⟦" if supervised else "⟧")
            inside = supervised
        parts.append(_text(tokenizer, example.ids[:start], token))
    return "".join(parts) + ("⟧" if inside else "")


def _text(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], token: int) -> str:
    """What this token adds to the text: decoded alone, a token loses its leading space under some tokenizers."""
    start = tokenizer.decode(list(before))
    return str(tokenizer.decode([*before, token]))[len(start) :]
