"""Conversations as tokens: the one place for training, evaluation and chat, so that all three see the same ids."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qlora.core.conversation import ROLES, Conversation, Message
from qlora.core.errors import InputError
from qlora.params.chat import ChatParams

FOLDER = Path(__file__).parent / "chat_templates"
"""Templates that chat.template may name, NAME.jinja each. The stages depend on the folder."""
MARK = "\ue000{}\ue001"
"""Stands for a text while a template is rendered: characters of the private use area, which no tokenizer knows."""
MANY_SCRIPTS = (
    Message(role="user", content=" What\tis 12345 + 67.8?\n\n\nÉcole, naïve “quotes”, Ｗｉｄｅ  "),
    Message(role="assistant", content="東京 है Привет مرحبا ไทย 🙂👩🏽‍💻 e\u0301  \n x_y(z) don't"),
    Message(role="user", content="And?"),
    Message(role="assistant", content="  - done."),
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as tokens.

    `spans` holds one (start, end) per assistant turn: ids[:start] is its prompt, ids[start:end] the answer and the token
    that ends the turn.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


class ChatTemplate:
    """Renders conversations with one tokenizer and one template, and refuses what would teach something wrong."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: ChatParams) -> None:
        """Set `tokenizer.chat_template` to the template in use, so that it is saved with the adapter.

        Raises:
            InputError: the model has no template, or one that would teach something wrong; chat.on_control_tokens does not suit it.
        """
        self.tokenizer = tokenizer
        self._policy = chat.on_control_tokens
        tokenizer.chat_template = _own_template(tokenizer) if chat.template == "model" else _template_file(chat.template)
        openings, between = self._around_turns()
        # all_special_tokens would be the named ones alone: Llama 3 has 250 more. And a template may use a token that is not special.
        added = {token.content: (number, token.special) for number, token in tokenizer.added_tokens_decoder.items()}
        structural = [content for content in added if any(content in text for text in (*openings, *between))]
        self._control = {content: number for content, (number, special) in added.items() if special or content in structural}
        self._control_pattern = _any_of(self._control)
        # What opens a conversation may be a system text of the template's own, which parts nothing, or a header in plain text.
        headers = [text for text in openings if not any(content in text for content in structural if content != tokenizer.bos_token)]
        self._delimiters = self._plain_delimiters([*headers, *between])
        if self._policy == "escape" and (self._delimiters or not all(added[content][1] for content in structural)):
            parts = self._delimiters.pattern if self._delimiters else ", ".join(structural)
            raise InputError(
                "chat-escape",
                f"chat.on_control_tokens: escape does not suit chat.template: {chat.template}, whose turns are parted by what no tokenizer can tell "
                f"from what a person wrote ({parts}): choose error or drop",
            )
        self.end_of_turn = self._check_template()
        self._choose_pad()

    def encode(self, conversation: Conversation) -> Encoded | None:
        """The conversation as tokens; None when a text in it looks like structure and chat.on_control_tokens drops such a conversation.

        Raises:
            InputError: such a text under chat.on_control_tokens: error, a role that does not exist, or a template that fails.
        """
        found = self._forgery(conversation.messages)
        if found and self._policy == "error":
            raise InputError(
                "chat-control-token",
                f"conversation {conversation.id}: a {found[0]} turn contains {found[1]!r}, which the chat template takes for structure. "
                "Remove it from the raw data, or set chat.on_control_tokens to drop or escape.",
            )
        if found and self._policy == "drop":
            return None
        encoded = self._render_escaped(conversation.messages) if found else self._render(conversation.messages)
        turns = sum(1 for _ in conversation.assistant_turns())
        if len(encoded.spans) != turns:
            raise InputError(
                "chat-spans", f"conversation {conversation.id}: the chat template marks {len(encoded.spans)} answers, the conversation has {turns}"
            )
        last = {encoded.ids[end - 1] for _, end in encoded.spans}
        if last != {self.end_of_turn}:
            raise InputError(
                "chat-no-stop",
                f"conversation {conversation.id}: answers end with {self._names(sorted(last))} under the chat template, "
                f"expected {self._names([self.end_of_turn])}",
            )
        return encoded

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids after which the model writes its next turn; texts in the messages are taken as they are."""
        return self._apply(messages, add_generation_prompt=True)["input_ids"]

    def _forgery(self, messages: Sequence[Message]) -> tuple[str, str] | None:
        """Role and text of the first thing in a message that the template or the tokenizer would take for structure."""
        for message in messages:
            if message["role"] not in ROLES:
                raise InputError("chat-role", f"{message['role']!r} is no role: expected one of {', '.join(sorted(ROLES))}")
            for pattern in (self._control_pattern, self._delimiters):
                if pattern and (found := pattern.search(message["content"])):
                    return message["role"], found.group()
        return None

    def _render(self, messages: Sequence[Message]) -> Encoded:
        text, answers = self._text(messages)
        cuts = [edge for answer in answers for edge in answer]
        pieces = [self._ids(text[start:end]) for start, end in pairwise((0, *cuts, len(text)))]
        whole, apart = self._ids(text), [number for piece in pieces for number in piece]
        edges = list(accumulate(map(len, pieces)))[:-1]
        if whole != apart:
            # Either this tokenizer begins every text with a space of its own, and what stands before an edge is the same without the rest ...
            before = [self._ids(text[:cut]) for cut in cuts]
            if all(whole[: len(ids)] == ids for ids in before):
                edges = list(map(len, before))
            # ... or an answer's first characters and the prompt's last became one token, which no prompt to answer ends with.
            elif self.tokenizer.decode(apart) == self.tokenizer.decode(whole):
                whole = apart
            else:
                raise InputError(
                    "chat-prompt",
                    f"an answer in {text[:200]!r} shares a token with the prompt before it, and this tokenizer can't part them: take white "
                    "space at the beginning of answers out of the raw data, or let the chat template trim it",
                )
        return Encoded(whole, list(zip(edges[::2], edges[1::2], strict=True)))

    def _ids(self, text: str) -> list[int]:
        tokenizer: Any = self.tokenizer
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _render_escaped(self, messages: Sequence[Message]) -> Encoded:
        """Like `_render`, but control tokens in the messages are tokenised as the text that they are.

        The messages are rendered with a mark in place of each such text, so that every control token in the result is the
        template's. What lies between those is tokenised by itself, as the tokenizer does too, with the texts put back.
        """
        literals: list[str] = []

        def hide(found: re.Match[str]) -> str:
            literals.append(found.group())
            return MARK.format(len(literals) - 1)

        assert self._control_pattern
        # The characters of the marks themselves are hidden too: a text may hold them.
        hidden_texts = re.compile(f"{self._control_pattern.pattern}|[{MARK.format('')}]")
        hidden = [Message(role=message["role"], content=hidden_texts.sub(hide, message["content"])) for message in messages]
        text, answers = self._text(hidden)
        marks = re.compile(MARK.format(r"(\d+)"))
        ids: list[int] = []
        mask: list[int] = []
        end = 0
        for found in [*self._control_pattern.finditer(text), None]:
            piece, start = text[end : found.start() if found else len(text)], end
            shown = marks.sub(lambda mark: literals[int(mark.group(1))], piece)
            # Where a character of the shown text stands in the rendered text.
            places = [start + place for place in _places(piece, marks, literals)]
            for number, (first, _) in self._tokens_of_text(shown):
                ids.append(number)
                mask.append(any(begin <= places[first] < stop for begin, stop in answers))
            if found:
                ids.append(self._control[found.group()])
                mask.append(any(begin <= found.start() < stop for begin, stop in answers))
                end = found.end()
        return Encoded(ids, spans_of([int(value) for value in mask]))

    def _tokens_of_text(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """Ids and character spans of a text in which nothing is a control token."""
        backend: Any = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        try:
            encoding = backend.encode(text, add_special_tokens=False)
        finally:
            backend.encode_special_tokens = False
        return list(zip(encoding.ids, encoding.offsets, strict=True))

    def _text(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and where in it the answers stand."""
        tokenizer: Any = self.tokenizer
        with _template_errors(messages):
            render: Any = render_jinja_template  # typed as text, returns a pair
            rendered, answers = render(
                [list(messages)], chat_template=tokenizer.chat_template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
            )
        return rendered[0], answers[0]

    def _apply(self, messages: Sequence[Message], **options: bool) -> dict[str, list[int]]:
        tokenizer: Any = self.tokenizer
        with _template_errors(messages):
            return dict(tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options))

    def _around_turns(self) -> tuple[list[str], list[str]]:
        """What the template writes before the first turn, a system's or a user's, and what it writes between turns."""
        turns = [Message(role=("user", "assistant")[number % 2], content=MARK.format(number)) for number in range(4)]
        openings, between = [], []
        for opening in ([Message(role="system", content=MARK.format(9))], []):
            try:
                first, *others = re.split(MARK.format(r"\d+"), self._text([*opening, *turns])[0])[:-1]
            except InputError:
                if not opening:
                    raise
                continue
            openings.append(first)
            between += others
        return openings, between

    def _plain_delimiters(self, between: Sequence[str]) -> re.Pattern[str] | None:
        """Plain text by which turns are parted, such as "\\n\\nHuman:": a person could write it too.

        A bare word after a control token, as in <|im_start|>user, is none: without that token it parts nothing.
        """
        found: dict[str, str] = {}
        for text in between:
            pieces = self._control_pattern.split(text) if self._control_pattern else [text]
            for place, piece in enumerate(pieces):
                core = piece.strip()
                space = piece[: len(piece) - len(piece.lstrip())]
                if core and not (place and core.isalpha()) and len(space) <= len(found.get(core, space)):
                    found[core] = space
        # Where a header ends in the white space that a delimiter begins with, a message that opens with the delimiter forges it.
        ends = [text[len(text.rstrip()) :] for text in between]
        parts = [
            rf"(?:\A|{re.escape(space)})" + re.escape(core) if any(end.endswith(space) for end in ends) else re.escape(space + core)
            for core, space in found.items()
        ]
        return re.compile("|".join(sorted(parts, key=len, reverse=True))) if parts else None

    def _check_template(self) -> int:
        """The token that ends every answer, after the template was tried on a conversation of its own.

        Raises:
            InputError: not exactly one BOS, no supervised end of turn, or a prompt that training never shows.
        """
        probe = [Message(role=role, content=content) for role, content in (("user", "Hello"), ("assistant", "Good day"), ("user", "And?"))]
        first = self._render(probe[:2])
        both = self._render([*probe, Message(role="assistant", content="Bye")])
        if len(first.spans) != 1 or len(both.spans) != 2:
            raise InputError("chat-spans", "the chat template does not mark the assistant's tokens ({% generation %}): use chat.template: vicuna")
        ends = {both.ids[end - 1] for _, end in both.spans}
        if len(ends) != 1 or not ends <= set(self._control.values()):
            raise InputError(
                "chat-no-stop",
                f"an answer ends with {self._names(sorted(ends))} under this chat template: no single control token tells the model to stop",
            )
        bos = self.tokenizer.bos_token_id
        if bos is not None and both.ids.count(bos) != 1 and bos not in ends:
            raise InputError(
                "chat-bos",
                f"the chat template writes {both.ids.count(bos)} BOS tokens ({self.tokenizer.bos_token!r}), expected one: {self._names(both.ids)}",
            )
        for messages, encoded, span in ((probe[:1], first, 0), (probe, both, 1)):
            prompt, trained = self._prompt(messages), encoded.ids[: encoded.spans[span][0]]
            if prompt != trained:
                raise InputError(
                    "chat-prompt",
                    "the generation prompt is not what training shows before an answer:\n"
                    f"  prompt   {self._names(prompt)}\n  training {self._names(trained)}",
                )
        if self._policy == "escape" and self._render_escaped(probe) != self._render(probe):
            raise InputError(
                "chat-escape",
                "chat.on_control_tokens: escape does not suit this tokenizer, which reads a text between control tokens otherwise than by itself: "
                "choose error or drop",
            )
        return ends.pop()

    def _choose_pad(self) -> None:
        """Pad with a token that no answer holds, where the tokenizer has one.

        Padding is masked by position; a supervised token would still confuse other programs.
        """
        tokenizer: Any = self.tokenizer
        if tokenizer.pad_token_id not in (None, self.end_of_turn):
            return
        used = "".join(text for texts in self._around_turns() for text in texts)
        unused = [token for token in self._control if token not in used and token != tokenizer.unk_token]
        candidates = [*unused, tokenizer.bos_token, tokenizer.unk_token, tokenizer.eos_token]
        fitting = [token for token in candidates if token is not None and self._control.get(token) != self.end_of_turn]
        tokenizer.pad_token = fitting[0] if fitting else tokenizer.eos_token

    def require_same(self, saved: "ChatTemplate") -> None:
        """Raises InputError when this template, saved with its tokenizer and loaded again, renders a conversation of many scripts otherwise."""
        ours, theirs = self._render(MANY_SCRIPTS), saved._render(MANY_SCRIPTS)
        if ours != theirs:
            raise InputError(
                "chat-reloaded",
                "the tokenizer gives other tokens once it was saved with the adapter and loaded again, nothing was published:\n"
                f"  training {self._names(ours.ids)}\n  saved    {saved._names(theirs.ids)}",
            )

    def _names(self, ids: list[int]) -> list[str]:
        return list(self.tokenizer.convert_ids_to_tokens(ids))


def spans_of(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of ones as (start, end).

    >>> spans_of([0, 1, 1, 0, 1])
    [(1, 3), (4, 5)]
    """
    edges = [index for index, (before, after) in enumerate(zip((0, *mask), (*mask, 0), strict=True)) if before != after]
    return list(zip(edges[::2], edges[1::2], strict=True))


@contextmanager
def _template_errors(messages: Sequence[Message]) -> Iterator[None]:
    try:
        yield
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise InputError(
            "chat-template", f"the chat template refuses roles {roles}: {error}. If it knows no system turn, set data.system_message to null."
        ) from None


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Matches any of these texts, the longest first; None when there are none."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _places(piece: str, marks: re.Pattern[str], literals: Sequence[str]) -> list[int]:
    """For each character of the piece with its marks replaced by the literals, its place in the piece."""
    places: list[int] = []
    end = 0
    for mark in marks.finditer(piece):
        places += range(end, mark.start())
        places += [mark.start()] * len(literals[int(mark.group(1))])
        end = mark.end()
    return [*places, *range(end, len(piece))]


def _template_file(name: str) -> str:
    path = FOLDER / f"{name}.jinja"
    if not path.is_file():
        known = ", ".join(["model", *sorted(file.stem for file in FOLDER.glob("*.jinja"))])
        raise InputError("chat-template-missing", f"chat.template = {name!r}: there is no {path}; known: {known}. Write the file, or choose another.")
    return path.read_text(encoding="utf-8")


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The model's template; where it does not mark the assistant's tokens, TRL's training template of the same family."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise InputError("chat-no-template", "the base model has no chat template: set chat.template to vicuna, or choose an instruct model")
    if "endgeneration" in template:
        return str(template)
    from trl.chat_template_utils import get_training_chat_template  # noqa: PLC0415 - five seconds that most runs need not pay

    try:
        patched = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise InputError(
            "chat-no-markers", f"the base model's chat template does not mark the assistant's tokens, and TRL knows none of its family: {error}"
        ) from None
    return str(patched or template)
