"""Prepared conversations as the tokens that a training sees: what is supervised, what is a control token, what is left out.

python -m tools.inspect --split train --count 3         in the terminal; supervised tokens are green, control tokens reversed
python -m tools.inspect --id 0026517a645220b0           one conversation, wherever it is
python -m tools.inspect --count 20 --html tokens.html   as a page

The first thing to run before an expensive training. Without colours (a pipe, or NO_COLOR is set) supervised tokens are between ⟦ and ⟧.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qlora import params
from qlora.core.conversation import Conversation, read_conversations
from qlora.core.errors import InputError
from qlora.core.files import atomic_writers
from qlora.core.text import visible
from qlora.delivery.ownership import replacing
from qlora.params import Params
from qlora.runtime import command

PREPARED = Path("data/prepared")
MANIFESTS = Path("models/base")
SPLITS = ("train", "validation", "test")
GREEN, REVERSED, RESET = "\x1b[32m", "\x1b[7m", "\x1b[0m"
LEFT_OUT = {
    "control_token": "a text in it looks like structure (chat.on_control_tokens)",
    "not_rendered": "the chat template can't show it (data.on_invalid)",
    "inseparable": "an answer shares a token with the prompt before it",
}
TEMPLATE = Path(__file__).with_name("inspect.html.jinja")


@dataclass(frozen=True, slots=True)
class Piece:
    """One token: what it adds to the text, and what training does with it."""

    number: int
    text: str
    supervised: bool
    control: bool


@dataclass(frozen=True, slots=True)
class View:
    """One conversation as training sees it."""

    title: str
    pieces: list[Piece]


def views(values: Params, split: str | None, identifier: str | None) -> Iterator[View]:
    """Conversations of a split, or those with an id, as tokens.

    Raises:
        InputError: nothing was prepared, or no conversation has this id.
    """

    from qlora.model.base import open_base_model  # noqa: PLC0415 - seconds that --help need not take

    template = open_base_model(values, MANIFESTS).template
    found = False
    for name in SPLITS if identifier else (split or "train",):
        path = PREPARED / f"{name}.jsonl"
        if not path.is_file():
            raise InputError("inspect-nothing", f"{path} does not exist: run `dvc repro prepare` first")
        for conversation in read_conversations(path):
            if identifier in (None, conversation.id):
                found = True
                yield from _views(name, conversation, template, values)
    if not found:
        raise InputError("inspect-nothing", f"no conversation has the id {identifier!r}; ids are the first 16 digits in {PREPARED}/*.jsonl")


def _views(split: str, conversation: Conversation, template: Any, values: Params) -> Iterator[View]:
    """One view of the conversation, or of each piece of it that is trained on."""
    from qlora.training.tokenization import IGNORE_INDEX, encode_split, token_texts  # noqa: PLC0415

    title = f"{split} {conversation.id} ({conversation.category})"
    # The test split is measured whole.
    sequence = values.sequence if split != "test" else values.sequence.model_copy(update={"max_length": sys.maxsize})
    encoding = template.encode(conversation)
    if encoding.dropped:
        yield View(f"{title}: left out, {LEFT_OUT[encoding.dropped]}", [])
        return
    try:
        made = encode_split([conversation], template, sequence, split)
    except InputError as error:
        if error.code not in ("sequence-all-dropped", "sequence-too-long"):
            raise
        limit = f"longer than sequence.max_length = {sequence.max_length} (on_too_long: {sequence.on_too_long})"
        yield View(f"{title}: left out, {max(len(row.ids) for row in encoding.rows)} tokens, {limit}", [])
        return
    for number, example in enumerate(made.examples, start=1):
        texts = token_texts(example.ids, template.tokenizer)
        pieces = [
            Piece(token, text, label != IGNORE_INDEX, token in template.control_ids)
            for token, text, label in zip(example.ids, texts, example.labels, strict=True)
        ]
        kind = "answer" if made.one_by_one and not made.repeated_tokens else "piece"
        part = f", {kind} {number} of {len(made.examples)}" if len(made.examples) > 1 else ""
        cut = f", cut from {made.lengths[0]}" if made.cut and not part else ""
        yield View(f"{title}{part}: {len(pieces)} tokens{cut}, {example.supervised} supervised", pieces)


def terminal(view: View, *, colours: bool) -> str:
    """The view as text: coloured, or with ⟦ ⟧ around what is supervised."""
    parts = [f"{visible(view.title)}\n"]
    inside = False
    for piece in view.pieces:
        if colours:
            style = (GREEN if piece.supervised else "") + (REVERSED if piece.control else "")
            parts.append(f"{style}{piece.text}{RESET}" if style else piece.text)
        else:
            if piece.supervised != inside:
                parts.append("⟦" if piece.supervised else "⟧")
                inside = piece.supervised
            parts.append(piece.text)
    return "".join(parts) + ("⟧" if inside else "") + "\n"


def page(shown: list[View]) -> str:
    """The views as one HTML file without scripts; a token's number shows under the pointer. Jinja escapes every text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415 - the terminal needs none

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template(TEMPLATE.name).render(views=shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--id", help="the conversation with this id, of any split")
    parser.add_argument("--count", type=int, default=3, help="conversations shown, from the first (3)")
    parser.add_argument("--html", type=Path, help="write a page in place of the terminal")
    arguments = parser.parse_args()
    values = params.load(Path("params.yaml"))
    shown = list(islice(views(values, arguments.split, arguments.id), arguments.count))
    if arguments.html:
        with replacing(arguments.html, own=False), atomic_writers([arguments.html]) as (file,):
            file.write(page(shown).encode())
        command.say(f"{arguments.html} shows {len(shown)} conversation(s)")
        return
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\n".join(terminal(view, colours=colours) for view in shown))


if __name__ == "__main__":
    command.run(main)
