"""A tokenizer's control tokens, and texts as ids in which nothing that a person wrote becomes one."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from qlora.core.errors import translate_errors
from qlora.model.structure import MARKS, any_of

ANCHORS = ("\n", ".", "x")


class Tokens:
    """One tokenizer with one template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, own_texts: Sequence[str]) -> None:
        """Find the control tokens: those that the tokenizer calls special, and those that the template writes.

        Not every added token is one: Gemma's line break is added, and white space parts nothing.

        Args:
            own_texts: What the template writes around the texts of a conversation.
        """
        self._tokenizer: Any = tokenizer
        # all_special_tokens would be the named ones alone: Llama 3 has 250 more.
        self._added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        numbers = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        self.structural = [content for content in numbers if content.strip() and any(content in text for text in own_texts)]
        self.control = {content: number for content, number in numbers.items() if self._added[content].special or content in self.structural}
        self.special_by_text = {content: bool(self._added[content].special) for content in self.control}
        self.pattern = any_of(self.control)
        self._special = any_of([content for content, special in self.special_by_text.items() if special])

    @property
    def takes_white_space(self) -> bool:
        """Whether a control token swallows the white space beside it, as Phi 3's do."""
        return any(self._added[content].rstrip or self._added[content].lstrip for content in self.control)

    def without_special(self, text: str) -> str:
        return self._special.sub("", text) if self._special else text

    def ids(self, text: str, literals: Sequence[str] | None = None) -> list[int]:
        """The rendered text as ids.

        Args:
            literals: What the marks in it stand for: tokenised as the text that they are. None: there are none, and the tokenizer reads it as it is.
        """
        return self.all_ids([text], literals)[0]

    def all_ids(self, texts: Sequence[str], literals: Sequence[str] | None = None) -> list[list[int]]:
        """Like `ids`, of several texts at once."""
        if literals is not None:
            return [self._escaped_ids(text, literals) for text in texts]
        with translate_errors("tokenizer-unloadable", self._tokenizer.name_or_path, "has a tokenizer that can't read a text", "pin another one"):
            found: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def ids_and_beginnings(self, whole: str, beginnings: Sequence[str], literals: Sequence[str] | None) -> tuple[list[int], list[int] | None]:
        """Ids of a rendered text, and how many of them each beginning of it has; None where one's ids are not the first of the whole's.

        What follows a control token is tokenised as if nothing stood before that token. So of a beginning only what follows its last one is looked
        at, or the time would grow with the square of a conversation's length.
        """
        cuts = [self._last_control(text) for text in beginnings]
        ids, *tails = self.all_ids([whole, *(text[start:] for text, (start, _) in zip(beginnings, cuts, strict=True))], literals)
        control = frozenset(self.control.values())
        places = [place for place, number in enumerate(ids) if number in control]
        lengths = []
        for tail, (_, number) in zip(tails, cuts, strict=True):
            first = 0 if number == 0 else places[number - 1] if number <= len(places) else len(ids)
            if ids[first : first + len(tail)] != tail:
                return ids, None
            lengths.append(first + len(tail))
        return ids, lengths

    def _last_control(self, text: str) -> tuple[int, int]:
        """Where the last control token of the rendered text begins, and how many there are; (0, 0) where there is none."""
        found = list(self.pattern.finditer(text)) if self.pattern else []
        return (found[-1].start(), len(found)) if found else (0, 0)

    def ids_after_anchor(self, text: str, literals: Sequence[str] | None = None) -> list[int]:
        """Ids of the text as they are in the middle of another; empty where it grows together with each that was tried."""
        for anchor in ANCHORS:
            before, both = self.all_ids([anchor, anchor + text], literals)
            if both[: len(before)] == before:
                return both[len(before) :]
        return []

    def _escaped_ids(self, text: str, literals: Sequence[str]) -> list[int]:
        """Every control token in the rendered text is the template's; what lies between them is tokenised by itself, as the tokenizer does too."""
        assert self.pattern
        ids: list[int] = []
        end, before = 0, ""
        for found in [*self.pattern.finditer(text), None]:
            piece = text[end : found.start() if found else len(text)]
            # Some tokens take the white space beside them in, such as Phi 3's.
            if before and self._added[before].rstrip:
                piece = piece.lstrip()
            if found and self._added[found.group()].lstrip:
                piece = piece.rstrip()
            ids += self._ids_of_text(MARKS.sub(lambda mark: literals[int(mark.group(1))], piece))
            if found:
                ids.append(self.control[found.group()])
                end, before = found.end(), found.group()
        return ids

    def _ids_of_text(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token."""
        found: list[int] = self._reader_of_text.encode(text, add_special_tokens=False).ids
        return found

    @cached_property
    def _reader_of_text(self) -> Tokenizer:
        """The tokenizer, to which its control tokens are text; other added tokens stay tokens."""
        settings = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in settings["added_tokens"]:
            token["special"] = token["content"] in self.control
        reader = Tokenizer.from_str(json.dumps(settings))
        reader.encode_special_tokens = True
        return reader
