"""What a chat template writes around the texts of a conversation, learned by rendering conversations of marks."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from qlora.core.conversation import Message, Tool, ToolCall
from qlora.model.rendering import NotRenderedError, Renderer

MARK = "\ue000{}\ue001"
"""Stands for a text while a template is rendered: characters of the private use area, which no tokenizer knows."""
MARKS = re.compile(MARK.format(r"(\d+)"))
TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look up a key.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "The key."}}, "required": ["key"]},
    },
}


@dataclass(slots=True)
class Structure:
    """Texts of a template's own, with nothing of a conversation in them."""

    openings: list[str] = field(default_factory=list)
    """Before the first turn: a system's, if the template knows one, and a user's."""
    between: list[str] = field(default_factory=list)
    """Between two plain turns."""
    after_answer: str = ""
    """From an answer to the user turn after it."""
    after_last: str = ""
    """From the last answer to the end."""
    before_content: list[str] = field(default_factory=list)
    """Within an answer, before its content: a channel's name, or what parts it from the reasoning. Empty where nothing is."""
    before_reasoning: str = ""
    reasoning: bool = False
    """Whether the reasoning of the last answer is shown."""
    opened: str | None = None
    """What ends the block of reasoning that the prompt of an answer opens; None where it opens none."""
    tools: bool = False
    """Whether calls of tools are shown."""
    around_calls: list[str] = field(default_factory=list)
    after_call: str = ""
    """From the arguments of a call that is the last message to the end."""
    after_call_before_result: str = ""

    def own(self) -> Iterator[str]:
        """All of them."""
        yield from self.openings
        yield from self.between
        yield from (self.after_answer, self.after_last, *self.before_content, self.before_reasoning)
        yield from self.around_calls


def learn(renderer: Renderer) -> Structure:
    """Render conversations of marks.

    Raises:
        NotRenderedError: the template can't render a user's and an assistant's turns.
    """
    found = Structure()
    turns = [Message(role=("user", "assistant")[number % 2], content=MARK.format(number)) for number in range(4)]
    for opening in ([Message(role="system", content=MARK.format(9))], []):
        try:
            pieces = _around(renderer.text([*opening, *turns]))
            if len(pieces) < len(turns) + 1:
                raise NotRenderedError("chat-text-lost", f"the chat template shows {len(pieces) - 1} of the texts of {len(turns)} turns")
        except NotRenderedError:
            if not opening:
                raise
            continue
        first, *others, last = pieces
        found.openings.append(first)
        found.between += others
        found.after_answer, found.after_last = others[-2] if len(others) > 1 else "", last
    _learn_answer(renderer, found, turns[:2])
    _learn_calls(renderer, found, turns[0])
    return found


def _around(text: str) -> list[str]:
    """The pieces before, between and after the marks."""
    return MARKS.split(text)[::2]


def _learn_answer(renderer: Renderer, found: Structure, turns: Sequence[Message]) -> None:
    """What stands between a prompt and the content of its answer, without reasoning and with it."""
    question, answer = turns
    prompt, whole = renderer.text([question], prompt=True), renderer.text(turns)
    if whole.startswith(prompt):
        found.before_content.append(whole[len(prompt) : whole.find(MARK.format(1))].strip())
    tag = re.search(r"<(\w+)>\s*\Z", prompt)
    if tag and f"</{tag[1]}>" in renderer.template:
        found.opened = f"</{tag[1]}>"
        found.before_content.append(found.opened)
    reasoned = renderer.text([question, Message(role="assistant", content=answer["content"], reasoning_content=MARK.format(5))])
    places = [reasoned.find(MARK.format(number)) for number in (5, 1)]
    if -1 < places[0] < places[1]:
        found.reasoning = True
        found.before_content.append(reasoned[places[0] + len(MARK.format(5)) : places[1]].strip())
        found.before_reasoning = reasoned[common_length(reasoned, prompt) : places[0]].strip()


def common_length(first: str, second: str) -> int:
    """Characters that both texts begin with."""
    return next((place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other), min(len(first), len(second)))


def _learn_calls(renderer: Renderer, found: Structure, question: Message) -> None:
    call: ToolCall = {"id": "call00001", "type": "function", "function": {"name": "lookup", "arguments": {"key": MARK.format(6)}}}
    calls = Message(role="assistant", content="", tool_calls=[call])
    result = Message(role="tool", content=MARK.format(7), name="lookup", tool_call_id="call00001")
    answer = Message(role="assistant", content=MARK.format(8))
    for as_text in (False, True):
        renderer.arguments_as_text = as_text
        try:
            pieces = _around(renderer.text([question, calls, result, answer], [TOOL]))
            last = _around(renderer.text([question, calls], [TOOL]))
        except NotRenderedError:
            continue
        # The question, the call, the result and the answer.
        if len(pieces) == 5 and len(last) == 3:
            found.tools = True
            found.around_calls = pieces
            found.after_call, found.after_call_before_result = last[-1], pieces[2]
            return
    renderer.arguments_as_text = False


@dataclass(frozen=True, slots=True)
class Ends:
    """Tokens that end an answer, as texts."""

    answer: str
    call: str | None
    """Of an answer that calls a tool, where it is another."""


def ends_of(structure: Structure, control: Mapping[str, bool]) -> Ends | None:
    """The token that ends an answer, None where the template has none.

    It is the last of those control tokens that follow every answer, in the middle of a conversation and at its end; where they have none in
    common, what follows the last answer (gpt-oss writes `<|end|>` after earlier answers, `<|return|>` after the last); where nothing
    follows the last answer, what opens the next turn (GLM 4).

    Args:
        control: Texts of control tokens, and whether the tokenizer calls them special.
    """
    pattern = any_of(control)
    if pattern is None:
        return None
    middle, last = pattern.findall(structure.after_answer), pattern.findall(structure.after_last)
    common = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(middle, last, strict=False))]
    chosen = common[-1:] or last[:1] or middle[:1]
    if not chosen:
        return None
    return Ends(chosen[0], _end_of_call(structure, pattern, control, chosen[0]))


def _end_of_call(structure: Structure, pattern: re.Pattern[str], control: Mapping[str, bool], end: str) -> str | None:
    after = pattern.findall(structure.after_call)
    if not structure.tools or end in after:
        return None
    special = [text for text in after if control[text]]
    following = [text for text in pattern.findall(structure.after_call_before_result)[len(after) :] if control[text]]
    return next(iter([*special[-1:], *following[:1]]), None)


def any_of(texts: Mapping[str, object] | Sequence[str]) -> re.Pattern[str] | None:
    """Matches any of these texts, the longest first; None when there are none."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def plain_delimiters(structure: Structure, control: re.Pattern[str] | None, headers: Sequence[str]) -> re.Pattern[str] | None:
    """Plain text by which turns are parted, such as "\\n\\nHuman:": a person could write it too.

    Text beside a control token that parts nothing without it is none, such as the word in <|im_start|>user.

    Args:
        headers: What opens a conversation, where no control token of the template's is in it.
    """
    texts = [*headers, *structure.between]
    found: dict[str, str] = {}
    for text in texts:
        # What stands before a control token, or between two, parts nothing without them; nor does a bare word after one.
        *before, piece = control.split(text) if control else [text]
        core = piece.strip()
        space = piece[: len(piece) - len(piece.lstrip())]
        # A tag such as [INST] parts turns with white space around it or without.
        space = "" if core[:1] in "[<{" and core[-1:] in "]>}" else space
        if core and not (before and core.isalpha()) and len(space) <= len(found.get(core, space)):
            found[core] = space
    # Where a header ends in the white space that a delimiter begins with, a message that opens with the delimiter forges it.
    endings = [text[len(text.rstrip()) :] for text in texts]
    parts = [
        rf"(?:\A|{re.escape(space)})" + re.escape(core) if any(ending.endswith(space) for ending in endings) else re.escape(space + core)
        for core, space in found.items()
    ]
    return re.compile("|".join(sorted(parts, key=len, reverse=True))) if parts else None
