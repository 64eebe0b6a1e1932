"""Conversations as training examples: token ids and labels, nothing cut unseen."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora.core.conversation import Conversation, read_conversations
from qlora.core.errors import InputError
from qlora.core.text import visible
from qlora.model.chat_template import ChatTemplate, Encoded, Encoding
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
    conversations: int = 0
    lengths: list[int] = field(default_factory=list)
    """Tokens of every row of every conversation that has a form as tokens, also of those that are dropped for it."""
    dropped: Counter[str] = field(default_factory=lambda: Counter(control_token=0, not_rendered=0, inseparable=0, too_long=0, no_answer_left=0))
    """Conversations that no example holds anything of, by reason."""
    one_by_one: int = 0
    """Conversations each answer of which is a row of its own, after the history that serving would show."""
    history_tokens: int = 0
    """Of those, tokens of prompts beyond the first row's: what was shown before is shown again."""
    cut: int = 0
    """Conversations that were truncated or split, or of which some answers were dropped."""
    dropped_tokens: int = 0
    truncated_tokens: int = 0
    """Tokens of rows that were not dropped, in no example."""
    repeated_tokens: int = 0
    """The first token of a later piece of a split row, which is the last of the piece before."""
    characters: int = 0
    """Of the texts in the rows."""
    lost: int = 0
    """Of those that the tokenizer has no tokens for."""
    trimmed: int = 0
    """Characters of white space around texts that the chat template leaves out."""
    answers_in: int = 0
    """Answers of conversations that have a form as tokens."""
    answers: int = 0
    """Those of which an example holds a token."""
    ends: int = 0
    """Those whose end of turn is supervised."""

    def record(self) -> dict[str, Any]:
        """For metrics: conversations in = out + dropped, and tokens in + repeated = out + dropped + truncated."""
        out = sum(len(example.ids) for example in self.examples)
        supervised = sum(example.supervised for example in self.examples)
        return {
            "conversations": {
                "in": self.conversations,
                "out": self.conversations - self.dropped.total(),
                "cut": self.cut,
                "one_by_one": self.one_by_one,
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
                "history": self.history_tokens,
            },
            "characters": {"in": self.characters, "lost": self.lost, "trimmed": self.trimmed},
            "answers": {"in": self.answers_in, "out": self.answers},
            "end_of_turn_per_answer": self.ends / max(self.answers, 1),
        }


def tokenize_file(path: Path, template: ChatTemplate, sequence: SequenceParams) -> EncodedSplit:
    """The examples of a prepared split; see `encode_split`.

    Raises:
        InputError: also where the tokenizer has no tokens for too much of the text.
    """
    made = encode_split(read_conversations(path), template, sequence, path.stem)
    template.require_readable(made.lost, made.characters, path.stem)
    return made


def encode_split(conversations: Iterable[Conversation], template: ChatTemplate, sequence: SequenceParams, split: str) -> EncodedSplit:
    """Examples of at most sequence.max_length tokens, with at least one that is supervised.

    Raises:
        InputError: a conversation is too long and on_too_long is error, or no example is left.
    """
    made = EncodedSplit()
    for conversation in conversations:
        made.conversations += 1
        encoding = template.encode(conversation)
        if encoding.dropped:
            made.dropped[encoding.dropped] += 1
            continue
        longest = max(len(row.ids) for row in encoding.rows)
        if longest > sequence.max_length and sequence.on_too_long == "error":
            raise InputError(
                "sequence-too-long",
                f"{split} conversation {conversation.id} has {longest} tokens, sequence.max_length is {sequence.max_length}: "
                "raise it, or set sequence.on_too_long to drop, truncate or split",
            )
        new = _add(made, conversation.id, encoding, sequence)
        if any(template.tokenizer.pad_token_id in example.labels for example in new):
            raise InputError(
                "chat-pad",
                f"{split} conversation {conversation.id} teaches the model to write its pad token {template.tokenizer.pad_token!r}: "
                "give the base model's tokenizer a pad_token that no answer contains, and pin it again",
            )
    if not made.examples:
        raise InputError(
            "sequence-all-dropped",
            f"no {split} conversation is left to learn from; sequence.max_length is {sequence.max_length}, dropped: {dict(made.dropped)}"
            + (f". The first that the chat template can't show: {template.refusal}" if template.refusal else ""),
        )
    return made


def _add(made: EncodedSplit, conversation: str, encoding: Encoding, sequence: SequenceParams) -> list[Example]:
    """Put the conversation's examples into the split, account for each of its tokens, and return them."""
    made.characters += encoding.characters
    made.lost += encoding.lost
    made.trimmed += encoding.trimmed
    made.one_by_one += len(encoding.rows) > 1
    made.history_tokens += sum(row.spans[0][0] for row in encoding.rows[1:])
    rows = [(row, _kept_pieces(row, sequence)) for row in encoding.rows]
    new = [example for row, kept in rows for example in _add_row(made, conversation, row, kept, sequence)]
    made.cut += bool(new) and any(kept != [(0, len(row.ids))] for row, kept in rows)
    made.answers_in += sum(len(row.spans) for row in encoding.rows)
    if not new:
        made.dropped["no_answer_left" if _pieces(len(encoding.rows[0].ids), sequence) else "too_long"] += 1
    return new


def _kept_pieces(row: Encoded, sequence: SequenceParams) -> list[tuple[int, int]]:
    """Pieces of which a token is supervised."""
    labels = _labels(row, sequence)
    return [(start, end) for start, end in _pieces(len(row.ids), sequence) if any(label != IGNORE_INDEX for label in labels[start + 1 : end])]


def _add_row(made: EncodedSplit, conversation: str, row: Encoded, kept: Sequence[tuple[int, int]], sequence: SequenceParams) -> list[Example]:
    length = len(row.ids)
    made.lengths.append(length)
    if not kept:
        made.dropped_tokens += length
        return []
    labels = _labels(row, sequence)
    # The first token of a later piece was supervised at the end of the one before.
    new = [Example(row.ids[start:end], [IGNORE_INDEX, *labels[start + 1 : end]], conversation) for start, end in kept]
    made.examples += new
    repeated = sum(piece[0] < before[1] for before, piece in pairwise(kept))
    made.repeated_tokens += repeated
    made.truncated_tokens += length + repeated - sum(end - start for start, end in kept)
    for answer, answer_end in row.spans:
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


def _labels(row: Encoded, sequence: SequenceParams) -> list[int]:
    if not sequence.assistant_only_loss:
        return row.ids
    labels = [IGNORE_INDEX] * len(row.ids)
    for start, end in row.spans:
        labels[start:end] = row.ids[start:end]
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
