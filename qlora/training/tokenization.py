"""Conversations as training examples: token ids and labels, nothing cut unseen."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora.core.conversation import Conversation
from qlora.core.errors import InputError
from qlora.core.files import read_jsonl
from qlora.core.text import visible
from qlora.model.chat_template import ChatTemplate, Encoded
from qlora.params.sequence import SequenceParams

IGNORE_INDEX = -100
"""Label of a token that the loss does not count."""


@dataclass(frozen=True, slots=True)
class Example:
    ids: list[int]
    labels: list[int]
    """The same length as ids; IGNORE_INDEX where a token is not supervised, as the first never is: nothing predicts it."""
    conversation: str = ""
    """Id of the one that it was made from."""

    @property
    def supervised(self) -> int:
        """Tokens that the loss counts."""
        return sum(label != IGNORE_INDEX for label in self.labels)


@dataclass(slots=True)
class EncodedSplit:
    """The examples of a split, and what became of every conversation and token on the way."""

    examples: list[Example] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Tokens of every conversation that has a form as tokens, also of those that are dropped for it."""
    dropped: Counter[str] = field(default_factory=lambda: Counter(control_token=0, too_long=0, no_answer_left=0))
    """Conversations that no example holds anything of, by reason."""
    cut: int = 0
    """Conversations that were truncated or split."""
    dropped_tokens: int = 0
    truncated_tokens: int = 0
    """Tokens of conversations that were not dropped, in no example."""
    repeated_tokens: int = 0
    """The first token of a later piece of a split conversation, which is the last of the piece before."""
    answers: int = 0
    """Assistant turns of which an example holds a token."""
    ends: int = 0
    """Those whose end of turn is supervised."""

    def record(self) -> dict[str, Any]:
        """For metrics: conversations in = out + dropped, and tokens in + repeated = out + dropped + truncated."""
        out = sum(len(example.ids) for example in self.examples)
        supervised = sum(example.supervised for example in self.examples)
        conversations = len(self.lengths) + self.dropped["control_token"]
        return {
            "conversations": {
                "in": conversations,
                "out": conversations - self.dropped.total(),
                "cut": self.cut,
                "dropped": dict(self.dropped),
            },
            "tokens": {
                "in": sum(self.lengths),
                "out": out,
                "supervised": supervised,
                "supervised_share": supervised / out,
                "dropped": self.dropped_tokens,
                "truncated": self.truncated_tokens,
                "repeated": self.repeated_tokens,
            },
            "end_of_turn_per_answer": self.ends / max(self.answers, 1),
        }


def tokenize_file(path: Path, template: ChatTemplate, sequence: SequenceParams) -> EncodedSplit:
    """The examples of a prepared split; see `encode_split`."""
    return encode_split(map(Conversation.from_record, read_jsonl(path)), template, sequence, path.stem)


def encode_split(conversations: Iterable[Conversation], template: ChatTemplate, sequence: SequenceParams, split: str) -> EncodedSplit:
    """Examples of at most sequence.max_length tokens, with at least one that is supervised.

    Raises:
        InputError: a conversation is too long and on_too_long is error, or no example is left.
    """
    made = EncodedSplit()
    for conversation in conversations:
        encoded = template.encode(conversation)
        if encoded is None:
            made.dropped["control_token"] += 1
            continue
        if len(encoded.ids) > sequence.max_length and sequence.on_too_long == "error":
            raise InputError(
                "sequence-too-long",
                f"{split} conversation {conversation.id} has {len(encoded.ids)} tokens, sequence.max_length is {sequence.max_length}: "
                "raise it, or set sequence.on_too_long to drop, truncate or split",
            )
        new = _add(made, conversation.id, encoded, sequence)
        if any(template.tokenizer.pad_token_id in example.labels for example in new):
            raise InputError(
                "chat-pad",
                f"{split} conversation {conversation.id} teaches the model to write its pad token {template.tokenizer.pad_token!r}: "
                "give the base model's tokenizer a pad_token that no answer contains, and pin it again",
            )
    if not made.examples:
        raise InputError(
            "sequence-all-dropped",
            f"no {split} conversation is left to learn from; sequence.max_length is {sequence.max_length}, dropped: {dict(made.dropped)}",
        )
    return made


def _add(made: EncodedSplit, conversation: str, encoded: Encoded, sequence: SequenceParams) -> list[Example]:
    """Put the conversation's examples into the split, account for each of its tokens, and return them."""
    length = len(encoded.ids)
    made.lengths.append(length)
    labels = _assistant_labels(encoded) if sequence.assistant_only_loss else encoded.ids
    pieces = _pieces(length, sequence)
    kept = [(start, end) for start, end in pieces if any(label != IGNORE_INDEX for label in labels[start + 1 : end])]
    if not kept:
        made.dropped["no_answer_left" if pieces else "too_long"] += 1
        made.dropped_tokens += length
        return []
    # The first token of a later piece was supervised at the end of the one before.
    new = [Example(encoded.ids[start:end], [IGNORE_INDEX, *labels[start + 1 : end]], conversation) for start, end in kept]
    made.examples += new
    repeated = sum(piece[0] < before[1] for before, piece in pairwise(kept))
    made.cut += kept != [(0, length)]
    made.repeated_tokens += repeated
    made.truncated_tokens += length + repeated - sum(end - start for start, end in kept)
    for answer, answer_end in encoded.spans:
        # A piece learns the tokens after its first.
        made.answers += any(start < answer_end - 1 and answer < end for start, end in kept)
        made.ends += any(start < answer_end - 1 < end for start, end in kept)
    return new


def _pieces(length: int, sequence: SequenceParams) -> list[tuple[int, int]]:
    """Which tokens of a conversation of this length become examples, as (start, end).

    Pieces of a split conversation share one token: the last of a piece predicts nothing there, and the first of the next is
    predicted by nothing there, so that each token is supervised once.
    """
    most = sequence.max_length
    if length <= most:
        return [(0, length)]
    if sequence.on_too_long == "truncate":
        return [(0, most)]
    if sequence.on_too_long == "split":
        return [(start, min(start + most, length)) for start in range(0, length - 1, most - 1)]
    return []


def _assistant_labels(encoded: Encoded) -> list[int]:
    labels = [IGNORE_INDEX] * len(encoded.ids)
    for start, end in encoded.spans:
        labels[start:end] = encoded.ids[start:end]
    return labels


HISTOGRAM_BINS = 64


def length_histogram(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """How many conversations have a length below each edge and from the edge before on, edges a power of two apart.

    >>> length_histogram([3, 4, 65])
    [(2, 0), (4, 1), (6, 1), ..., (66, 1)]
    """
    width = 1
    while max(lengths) >= width * HISTOGRAM_BINS:
        width *= 2
    counts = Counter(length // width for length in lengths)
    return [((place + 1) * width, counts[place]) for place in range(max(counts) + 1)]


def show(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The example's text with what is supervised between ⟦ and ⟧, and what would steer a terminal spelled out."""
    parts = []
    inside = False
    for text, label in zip(token_texts(example.ids, tokenizer), example.labels, strict=True):
        supervised = label != IGNORE_INDEX
        if supervised != inside:
            parts.append("⟦" if supervised else "⟧")
            inside = supervised
        parts.append(text)
    return "".join(parts) + ("⟧" if inside else "")


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the text. A token that ends within a character adds nothing, and the one that completes it all of it."""
    texts = []
    # Decoded alone, a token may lose its leading space, so each is decoded after those of the text before it.
    before = begin = 0
    for place in range(len(ids)):
        known = str(tokenizer.decode(list(ids[before:begin])))
        text = str(tokenizer.decode(list(ids[before : place + 1])))
        whole = not text.endswith("\ufffd") or place == len(ids) - 1
        texts.append(visible(text[len(known) :]) if whole else "")
        if whole:
            before, begin = begin, place + 1
    return texts
