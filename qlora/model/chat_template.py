"""Conversations as tokens: the one place for training, evaluation and chat, so that all three see the same ids.

What serving shows a model before an answer is the only truth: the prompt of an answer is the template's rendering of what came before it with
the generation prompt, and the answer is what the template writes after that, up to and with the token that ends the turn.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from transformers import PreTrainedTokenizerBase

from qlora.core.conversation import ROLES, Conversation, Message, Tool
from qlora.core.errors import InputError
from qlora.model import structure
from qlora.model.control_tokens import Tokens
from qlora.model.escaping import Shown, strings, texts, texts_of_call
from qlora.model.rendering import NotRenderedError, Renderer, time_limit
from qlora.params.chat import ChatParams

FOLDER = Path(__file__).parent / "chat_templates"
"""Templates that chat.template may name, NAME.jinja each. The stages depend on the folder."""
OWN_TEMPLATE = "Write a template of your own to qlora/model/chat_templates/NAME.jinja and set chat.template to NAME"
MANY_SCRIPTS = (
    Message(role="user", content=" What\tis 12345 + 67.8?\n\n\nÉcole, naïve “quotes”, Ｗｉｄｅ  "),
    Message(role="assistant", content="東京 है Привет مرحبا ไทย 🙂👩🏽‍💻 e\u0301  \n x_y(z) don't"),
    Message(role="user", content="And?"),
    Message(role="assistant", content="  - done."),
)
THINKING = "Let me think."
SWITCHES = ({"enable_thinking": False}, {"thinking": False}, {"reasoning_effort": "none"})
"""Variables by which families switch reasoning off, tried when a prompt opens a block of it."""
WORTH_A_WARNING = 0.001
"""Share of characters without tokens."""
logger = logging.getLogger("qlora.chat")


Dropped = Literal["control_token", "not_rendered", "inseparable"]
"""A text looks like structure; the template can't show a text of the conversation; an answer shares a token with its prompt."""
DROPPED: tuple[Dropped, ...] = get_args(Dropped)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation, or one answer with what came before it, as tokens.

    `spans` holds one (start, end) per answer that is learned: ids[:start] is its prompt, ids[start:end] the answer and the token
    that ends the turn.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Encoding:
    """What became of a conversation."""

    rows: list[Encoded] = field(default_factory=list)
    """One that holds every answer; or one per answer, where the prompt of some answer is not the beginning of the whole conversation."""
    dropped: Dropped | None = None
    """Why there are no rows."""
    characters: int = 0
    """Of the texts in the rows, the template's own left out."""
    lost: int = 0
    """Of those that the tokenizer has no tokens for."""
    trimmed: int = 0
    """Characters of white space around texts that the template leaves out."""

    def answers(self) -> Iterator[tuple[Encoded, tuple[int, int]]]:
        """Each answer that is learned: the row that holds it, and its span there."""
        return ((row, span) for row in self.rows for span in row.spans)


class _Turn(NamedTuple):
    """An answer as text."""

    place: int
    """Among the messages."""
    prompt: str
    answer: str
    whole: str
    """The conversation up to it, with what the template writes after the end of the turn."""


class InseparableError(InputError):
    """An answer whose first characters and the prompt's last are one token."""


class ChatTemplate:
    """Renders conversations with one tokenizer and one template, and refuses what would teach something wrong."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: ChatParams, *, on_invalid: Literal["drop", "error"] = "error") -> None:
        """Set `tokenizer.chat_template` to the template in use, so that it is saved with the adapter.

        Args:
            on_invalid: Whether a conversation that the template can't show is dropped and counted, or ends the run.

        Raises:
            InputError: the model has no template, or one that would teach something wrong; chat.on_control_tokens does not suit it.
        """
        self.tokenizer = tokenizer
        self._policy, self._on_invalid, self._most_unknown = chat.on_control_tokens, on_invalid, chat.max_unknown_share
        self.refusal: str | None = None
        """Why the first conversation that was dropped as one that the template can't show was."""
        self._renderer = Renderer(tokenizer, _source(tokenizer, chat.template), chat.template_kwargs)
        tokenizer.chat_template = self._renderer.template
        with time_limit():
            self._structure = structure.learn(self._renderer)
        self._tokens = Tokens(tokenizer, list(self._structure.own()))
        self._delimiters = self._plain_delimiters()
        if self._policy == "escape" and self._delimiters:
            raise InputError(
                "chat-escape",
                f"chat.on_control_tokens: escape does not suit chat.template: {chat.template}, whose turns are parted by what no tokenizer can tell "
                f"from what a person wrote ({self._delimiters.pattern}): choose error or drop",
            )
        self._ends = self._learn_ends()
        self.end_of_turn = self._tokens.control[self._ends[0]]
        self._end_pattern = structure.any_of(self._ends)
        with time_limit():
            self._probe = self._check_template()
        self._choose_pad()

    @property
    def control_ids(self) -> frozenset[int]:
        """Tokens that are structure, whether the tokenizer calls them special or not."""
        return frozenset(self._tokens.control.values())

    @property
    def writes_only_content(self) -> bool:
        """Whether an answer is its content and the end of its turn, with no reasoning, channel or marks before it."""
        return not any(self._structure.before_content)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens with which the template ends an answer."""
        return [self._tokens.control[text] for text in self._ends]

    def encode(self, conversation: Conversation) -> Encoding:
        """The conversation as tokens; no rows where it is dropped.

        Raises:
            InputError: a text in it looks like structure under chat.on_control_tokens: error; a role does not exist; or the template can't show the
                conversation whole under data.on_invalid: error.
        """
        found = self._forgery(conversation)
        if found and self._policy == "error":
            raise InputError(
                "chat-control-token",
                f"conversation {conversation.id}: a {found[0]} turn contains {found[1]!r}, which the chat template takes for structure. "
                "Remove it from the raw data, or set chat.on_control_tokens to drop or escape.",
            )
        if found and self._policy == "drop":
            return Encoding(dropped="control_token")
        try:
            return self._encode(conversation, escape=bool(found))
        except (NotRenderedError, InseparableError) as error:
            if self._on_invalid == "error":
                raise InputError(error.code, f"conversation {conversation.id}: {error.message} (or set data.on_invalid to drop)") from None
            self.refusal = self.refusal or error.message
            return Encoding(dropped="inseparable" if isinstance(error, InseparableError) else "not_rendered")

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Token ids after which the model writes its next turn.

        Raises:
            InputError: a message looks like structure, and chat.on_control_tokens does not escape it; or the template can't render it.
        """
        found = self._forgery(Conversation("", "", messages, tools))
        if found and self._policy != "escape":
            raise InputError(
                "chat-control-token",
                f"a message contains {found[1]!r}, which the chat template takes for structure: leave it out, or set chat.on_control_tokens: escape",
            )
        shown = Shown.of(Conversation("", "", messages, tools), self._tokens if found else None)
        return self._tokens.ids(self._renderer.text(shown.messages, shown.tools, prompt=True), shown.literals)

    def content_of(self, ids: Sequence[int]) -> str:
        """The text of an answer, given without the token that ends it: what a person would read, without reasoning and channels."""
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        if self.writes_only_content:
            return text.strip()
        whole = str(self.tokenizer.decode(list(ids), skip_special_tokens=False))
        ends = [place + len(opening) for opening in self._structure.before_content if opening and (place := whole.rfind(opening)) >= 0]
        if ends:
            return self._tokens.without_special(whole[max(ends) :]).strip()
        # Cut off in the middle of its reasoning.
        opening = self._structure.before_reasoning
        begun = whole.strip()
        reasons = self._structure.opened or (opening and (begun.startswith(opening) or opening.startswith(begun)))
        return "" if reasons else text.strip()

    def scored_bytes(self, message: Message, ids: Sequence[int]) -> int:
        """UTF-8 bytes of the message's own text that its tokens, without the end of turn, hold: what bits per byte divides by.

        What the template writes into an answer, such as the name of a channel, and characters without tokens do not count.
        """
        content = self.content_of(ids)
        if message.get("tool_calls"):
            content = str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
        return len((message.get("reasoning_content", "") + content).encode())

    def require_readable(self, lost: int, characters: int, split: str) -> None:
        """Warn of text that the tokenizer has no tokens for.

        Raises:
            InputError: more than chat.max_unknown_share of it.
        """
        share = lost / max(characters, 1)
        told = f"the tokenizer has no tokens for {lost:,} of the {characters:,} characters of the {split} split ({share:.2%})"
        if share > self._most_unknown:
            raise InputError(
                "chat-unknown", f"{told}, chat.max_unknown_share is {self._most_unknown:g}: choose a base model for this language, or raise it"
            )
        if share > WORTH_A_WARNING:
            logger.warning("%s: the model will never see them", told)

    def _encode(self, conversation: Conversation, *, escape: bool) -> Encoding:
        shown = Shown.of(conversation, self._tokens if escape else None)
        turns = [self._turn(shown, place) for place in conversation.assistant_turns()]
        rows, rendered = self._together(turns, shown.literals)
        if not rows:
            made = [self._alone(turn, shown.literals) for turn in turns]
            rows, rendered = made, [turn.prompt + turn.answer for turn in turns]
        trimmed = self._require_shown(shown, turns, rendered)
        places = list(conversation.assistant_turns())
        shown_by_row = [conversation.messages[: last + 1] for last in (places if len(rows) > 1 else places[-1:])]
        counts = [self._lost(row.ids, shown.with_literals(text), messages) for row, text, messages in zip(rows, rendered, shown_by_row, strict=True)]
        return Encoding(rows, characters=sum(count for count, _ in counts), lost=sum(lost for _, lost in counts), trimmed=trimmed)

    def _turn(self, shown: Shown, place: int) -> _Turn:
        message = shown.messages[place]
        prompt = self._renderer.text(shown.messages[:place], shown.tools, prompt=True)
        whole = self._renderer.text(shown.messages[: place + 1], shown.tools)
        answer = None if whole.startswith(prompt) else self._answer_without_system(shown, place)
        if answer is None:
            answer = self._answer(message, prompt, whole)
        end = self._end_pattern.search(answer) if self._end_pattern else None
        if end is None and self._structure.after_last.strip():
            raise NotRenderedError("chat-no-stop", f"no {' or '.join(self._ends)} follows an answer under the chat template")
        # GLM 4 writes nothing after the last answer: what opens the next turn ends it.
        answer = answer[: end.end()] if end else answer + self._ends[-1 if message.get("tool_calls") else 0]
        return _Turn(place, prompt, answer, whole if whole.startswith(prompt + answer) else prompt + answer)

    def _answer_without_system(self, shown: Shown, place: int) -> str | None:
        """The answer as the conversation without its system turn has it, where there is one: Mistral v0.3 writes the system text into the last
        turn if that is a user's, and not at all if an answer follows."""
        messages = shown.messages[1 : place + 1]
        if shown.messages[0]["role"] != "system" or not messages[:-1]:
            return None
        prompt, whole = self._renderer.text(messages[:-1], shown.tools, prompt=True), self._renderer.text(messages, shown.tools)
        return whole[len(prompt) :] if whole.startswith(prompt) else None

    def _answer(self, message: Message, prompt: str, whole: str) -> str:
        """What follows the prompt, with the end of the turn and what the template writes after it.

        Raises:
            NotRenderedError: the prompt is not what training would show: a block of reasoning that the answer does not have, or does have.
        """
        reasoning = message.get("reasoning_content", "").strip()
        if self._structure.opened and not reasoning:
            raise NotRenderedError(
                "chat-reasoning",
                f"the prompt that serving shows ends in {_tail(prompt)!r}, a block of reasoning, and this answer has none: train on answers with "
                f"`reasoning_content`{self._switch()}",
            )
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        if self._structure.opened and not self._structure.reasoning:
            # DeepSeek's templates open the block and never show what was in it: it stands there as the model writes it.
            before = re.sub(r"<\w+>\s*\Z", "", prompt)
            return f"{reasoning}\n{self._structure.opened}\n\n{whole.removeprefix(before).lstrip()}"
        if reasoning:
            raise NotRenderedError(
                "chat-reasoning",
                f"the prompt that serving shows ends in {_tail(prompt)!r}, so the reasoning of this answer would never be written: leave "
                "`reasoning_content` out of the raw data, or switch reasoning on in chat.template_kwargs",
            )
        common = structure.common_length(prompt, whole)
        raise NotRenderedError(
            "chat-prompt",
            f"the prompt that serving shows is not what the chat template writes before an answer:\n  prompt   ...{prompt[-200:]!r}\n"
            f"  training ...{whole[max(0, common - 100) :][:300]!r}\n{OWN_TEMPLATE}",
        )

    def _switch(self) -> str:
        """The variable of this template that switches reasoning off, as a way out; nothing where it has none."""
        for values in SWITCHES:
            found = structure.learn(Renderer(self.tokenizer, self._renderer.template, values))
            if found.opened is None and found.before_content:
                return f", or set chat.template_kwargs: {json.dumps(values)}"
        return ""

    def _together(self, turns: Sequence[_Turn], literals: Sequence[str] | None) -> tuple[list[Encoded], list[str]]:
        """All answers in one row, and its text; nothing where the prompt of one is not the beginning of the whole."""
        if not turns or not all(turns[-1].whole.startswith(turn.prompt + turn.answer) for turn in turns):
            return [], []
        whole, lengths = self._tokens.ids_and_beginnings(turns[-1].whole, [turn.prompt for turn in turns], literals)
        if lengths is None:
            return [], []
        stops = set(self.stop_ids)
        spans = []
        for length in lengths:
            end = next((place for place in range(length, len(whole)) if whole[place] in stops), None)
            if end is None:
                return [], []
            spans.append((length, end + 1))
        return [Encoded(whole, spans)], [turns[-1].whole]

    def _alone(self, turn: _Turn, literals: Sequence[str] | None) -> Encoded:
        """An answer after its prompt, whose ids are the prompt's own.

        Raises:
            InseparableError: no tokens of the answer continue those of the prompt with the same text.
        """
        prompt, together, apart = self._tokens.all_ids([turn.prompt, turn.prompt + turn.answer, turn.answer], literals)
        if together[: len(prompt)] != prompt:
            # A tokenizer that begins every text with a space would begin the answer with one.
            after = self._tokens.ids_after_anchor(turn.answer, literals)
            wanted = self.tokenizer.decode(together)
            fitting = [answer for answer in (apart, after) if answer and self.tokenizer.decode([*prompt, *answer]) == wanted]
            if not fitting:
                raise InseparableError(
                    "chat-prompt",
                    f"an answer in {turn.prompt[-200:] + turn.answer[:50]!r} shares a token with the prompt before it, and this tokenizer can't part "
                    "them: take white space at the beginning of answers out of the raw data, or let the chat template trim it",
                )
            together = [*prompt, *fitting[0]]
        return Encoded(together, [(len(prompt), len(together))])

    def _require_shown(self, shown: Shown, turns: Sequence[_Turn], rendered: Sequence[str]) -> int:
        """Characters of outer white space that the template removed.

        Raises:
            NotRenderedError: a text of the conversation is not in what is trained, or one of an answer not in that answer.
        """
        trimmed = 0
        last = turns[-1:] if len(rendered) == 1 else turns
        for text, turn in zip(rendered, last, strict=True):
            trimmed += sum(_trimmed_by(text, message) for message in shown.messages[: turn.place + 1])
        self._require_known(shown, turns)
        for turn in turns:
            _trimmed_by(turn.answer, shown.messages[turn.place], whole=True)
            _require_calls(turn.answer, shown.messages[turn.place])
        return trimmed

    def _require_known(self, shown: Shown, turns: Sequence[_Turn]) -> None:
        """Raises NotRenderedError for what this template never shows: its words may happen to stand elsewhere in the text."""
        last = turns[-1]
        if any("tool_calls" in message for message in shown.messages[: last.place + 1]) and not self._structure.tools:
            raise NotRenderedError("chat-text-lost", "the chat template leaves out calls of tools")
        shows_reasoning = self._structure.reasoning or self._structure.opened
        if not shows_reasoning and any("reasoning_content" in shown.messages[turn.place] for turn in turns):
            raise NotRenderedError("chat-text-lost", "the chat template leaves out the reasoning of answers")
        if shown.tools and self._renderer.text(shown.messages[: last.place], prompt=True) == last.prompt:
            raise NotRenderedError("chat-text-lost", "the chat template leaves out the definitions of the row's tools")

    def _lost(self, ids: Sequence[int], text: str, messages: Sequence[Message]) -> tuple[int, int]:
        """Characters of the messages' texts, and how many of those the tokens of the rendered text don't hold."""
        wanted = [shown for message in messages for _, shown in texts(message)]
        characters = sum(map(len, wanted))
        decoded = str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if decoded == text:
            return characters, 0
        unknown = self.tokenizer.unk_token_id
        known = self.tokenizer.decode([number for number in ids if number != unknown], clean_up_tokenization_spaces=False)
        missing = Counter(text) - Counter(str(known))
        if self._tokens.takes_white_space:
            # Of the template's own, beside its tokens.
            missing = Counter({character: count for character, count in missing.items() if not character.isspace()})
        return characters, (missing & Counter("".join(wanted))).total()

    def _forgery(self, conversation: Conversation) -> tuple[str, str] | None:
        """Role and text of the first thing in a conversation that the template or the tokenizer would take for structure."""
        for message in conversation.messages:
            if message["role"] not in ROLES:
                raise InputError("chat-role", f"{message['role']!r} is not a role: expected one of {', '.join(sorted(ROLES))}")
            for pattern in (self._tokens.pattern, self._delimiters):
                for text in strings(message) if pattern else ():
                    if pattern and (found := pattern.search(text)):
                        return message["role"], found.group()
        for text in strings(list(conversation.tools)) if self._tokens.pattern else ():
            if self._tokens.pattern and (found := self._tokens.pattern.search(text)):
                return "tool", found.group()
        return None

    def _plain_delimiters(self) -> re.Pattern[str] | None:
        # What opens a conversation may be a system text of the template's own, which parts nothing, or a header in plain text.
        bos = self.tokenizer.bos_token
        headers = [text for text in self._structure.openings if not any(token in text for token in self._tokens.structural if token != bos)]
        return structure.plain_delimiters(self._structure, self._tokens.pattern, headers)

    def _learn_ends(self) -> list[str]:
        found = structure.ends_of(self._structure, self._tokens.special_by_text)
        if found is None:
            raise InputError(
                "chat-no-stop",
                f"an answer ends with {self._structure.after_answer!r} under this chat template: no control token tells the model to stop. "
                f"{OWN_TEMPLATE}",
            )
        return [found.answer, *([found.call] if found.call else [])]

    def _check_template(self) -> Conversation:
        """A conversation that this template can show.

        Raises:
            InputError: two BOS, or a template that can't show a plain conversation or one with reasoning.
        """
        plain = Conversation("probe", "", MANY_SCRIPTS)
        thinking = [Message(**message, reasoning_content=THINKING) if message["role"] == "assistant" else message for message in MANY_SCRIPTS]
        probe, encoding = self._first_shown(plain, Conversation("probe", "", thinking))
        bos = self.tokenizer.bos_token_id
        if bos is not None and encoding.rows[0].ids[:2] == [bos, bos]:
            raise InputError("chat-bos", f"the chat template begins with two BOS tokens ({self.tokenizer.bos_token!r})")
        if self._policy == "escape" and [row.ids for row in self._encode(probe, escape=True).rows] != [row.ids for row in encoding.rows]:
            raise InputError(
                "chat-escape",
                "chat.on_control_tokens: escape does not suit this tokenizer, which reads a text between control tokens otherwise than by itself: "
                "choose error or drop",
            )
        # Only what follows a prompt's last control token was compared: here the whole prompt is, once.
        for (row, (start, _)), place in zip(encoding.answers(), probe.assistant_turns(), strict=True):
            if row.ids[:start] != self.prompt(probe.messages[:place]):
                raise InputError(
                    "chat-prompt",
                    "this tokenizer reads what follows a control token otherwise than by itself, so prompts of training are not serving's",
                )
        if "{% generation %}" in re.sub(r"\{%-?\s*generation\s*-?%\}", "{% generation %}", self._renderer.template):
            self._check_markers(probe)
        return probe

    def _first_shown(self, *probes: Conversation) -> tuple[Conversation, Encoding]:
        refusal: InputError | None = None
        for probe in probes:
            try:
                return probe, self._encode(probe, escape=False)
            except InseparableError:
                return self._first_shown(_trimmed(probe))
            except NotRenderedError as error:
                refusal = refusal or error
        assert refusal
        raise InputError(refusal.code, refusal.message) from None

    def _check_markers(self, probe: Conversation) -> None:
        """Raises InputError where {% generation %} marks something else than the answers that follow serving's prompts."""
        shown = Shown.of(probe, None)
        for number, place in enumerate(probe.assistant_turns(), start=1):
            answer = self._turn(shown, place).answer.strip()
            # Earlier answers may be shown otherwise.
            marked = self._renderer.marked(probe.messages[: place + 1])
            last = marked[-1] if marked else ""
            end = self._end_pattern.search(last) if self._end_pattern else None
            agrees = last and answer.endswith((last[: end.end()] if end else last).strip())
            if len(marked) != number or not agrees:
                raise InputError(
                    "chat-spans",
                    f"{{% generation %}} of the chat template marks {marked}, but serving's prompt is followed by {answer!r}: fix the template",
                )

    @classmethod
    def saved(cls, tokenizer: PreTrainedTokenizerBase, *, on_control_tokens: Literal["error", "drop", "escape"] = "error") -> "ChatTemplate":
        """That of a published folder, whose template holds all that the params said of it."""
        chat = ChatParams(template="model", on_control_tokens=on_control_tokens, template_kwargs={}, max_unknown_share=1.0)
        return cls(tokenizer, chat)

    def _choose_pad(self) -> None:
        """Pad with a token that no answer holds, where the tokenizer has one.

        Padding is masked by position; a supervised token would still confuse other programs.
        """
        tokenizer: Any = self.tokenizer
        if tokenizer.pad_token_id not in (None, *self.stop_ids):
            return
        used = "".join(self._structure.own())
        unused = [token for token in self._tokens.control if token not in used and token != tokenizer.unk_token]
        candidates = [*unused, tokenizer.bos_token, tokenizer.unk_token, tokenizer.eos_token]
        fitting = [token for token in candidates if token is not None and self._tokens.control.get(token) not in self.stop_ids]
        tokenizer.pad_token = fitting[0] if fitting else tokenizer.eos_token

    def require_same(self, saved: "ChatTemplate") -> None:
        """Raises InputError when this template, saved with its tokenizer and loaded again, renders a conversation of many scripts otherwise."""
        ours, theirs = ([number for row in template.encode(self._probe).rows for number in row.ids] for template in (self, saved))
        if ours != theirs:
            raise InputError(
                "chat-reloaded",
                "the tokenizer gives other tokens once it was saved with the adapter and loaded again, nothing was published:\n"
                f"  training {self._names(ours)}\n  saved    {saved._names(theirs)}",
            )

    def _names(self, ids: list[int]) -> list[str]:
        return list(self.tokenizer.convert_ids_to_tokens(ids))


def _tail(prompt: str) -> str:
    """The tag that a prompt ends with, to be shown."""
    return str(re.findall(r"(?:<[^<>]*>)?\s*\Z", prompt[-50:])[0])


def _require_calls(answer: str, message: Message) -> None:
    """Raises NotRenderedError unless the calls stand in the answer one after the other."""
    place = 0
    for call in message.get("tool_calls", ()):
        name = call["function"]["name"]
        begin = answer.find(name, place)
        arguments = [text for kind, text in texts_of_call(call, numbers=True) if kind == "argument"]
        if begin < 0 or any(text not in answer[begin:] and json.dumps(text, ensure_ascii=False)[1:-1] not in answer[begin:] for text in arguments):
            raise NotRenderedError("chat-text-lost", f"the chat template leaves out a call of {name!r}")
        place = begin + len(name)


def _trimmed_by(text: str, message: Message, *, whole: bool = False) -> int:
    """Characters of white space around the message's texts that are not in the rendered text.

    Args:
        whole: Its reasoning must be there too, and numbers that it calls tools with.

    Raises:
        NotRenderedError: a text itself is not there.
    """
    trimmed = 0
    for kind, wanted in texts(message, whole=whole):
        if wanted in text:
            continue
        core = wanted.strip()
        if core in text:
            trimmed += len(wanted) - len(core)
        elif json.dumps(core, ensure_ascii=False)[1:-1] not in text:
            raise NotRenderedError("chat-text-lost", f"the chat template leaves out {kind} of a turn of role {message['role']}: {core[:100]!r}")
    return trimmed


def _trimmed(conversation: Conversation) -> Conversation:
    messages = [Message(**{**message, "content": message["content"].strip()}) for message in conversation.messages]
    return Conversation(conversation.id, conversation.category, messages, conversation.tools)


def _source(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """The text of the template that chat.template names."""
    if name != "model":
        path = FOLDER / f"{name}.jinja"
        if not path.is_file():
            known = ", ".join(["model", *sorted(file.stem for file in FOLDER.glob("*.jinja"))])
            raise InputError(
                "chat-template-missing", f"chat.template = {name!r}: there is no {path}; known: {known}. Write the file, or choose another."
            )
        return path.read_text(encoding="utf-8")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise InputError("chat-no-template", "the base model has no chat template: set chat.template to vicuna, or choose an instruct model")
    return str(template)
