"""Talk to the tuned model in the terminal.

    python -m tools.chat                              a conversation: /reset begins a new one, /exit or Ctrl-D ends it, Ctrl-C ends an answer
    python -m tools.chat --prompt "Spell 'dvc'."      one answer; into a pipe goes nothing but the answer
    python -m tools.chat --compare                    every question to base and tuned model, one below the other
    python -m tools.chat --from-test 5 --seed 1       five rows of the test set: query, original answer, generated answer

Template, system message (data.system_message), stop tokens and lengths are those of params.yaml, so that a greedy answer is the one that the
evaluation saw. When a conversation outgrows the model's context, its oldest questions and answers are left out.
"""

import argparse
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import params
from qlora.core.conversation import Conversation, Message, read_conversations, with_system_message
from qlora.core.dvc_lock import require_recorded
from qlora.core.errors import InputError
from qlora.core.text import visible
from qlora.params import Params
from qlora.runtime import command

if TYPE_CHECKING:
    from qlora.delivery.chat import Chat
    from qlora.prediction.generation import Answer

ADAPTER = Path("models/adapter")
MANIFESTS = Path("models/base")
TEST = Path("data/prepared/test.jsonl")
HINT = "/reset begins a new conversation, /exit or Ctrl-D ends, Ctrl-C ends an answer"


def load(values: Params, *, base_only: bool, sample: bool, max_new_tokens: int | None) -> "Chat":
    """Base model and adapter, as the stage `predict` loads them.

    Raises:
        InputError: there is no adapter, or it is not the one that dvc.lock records.
    """
    from qlora.delivery.chat import Chat  # noqa: PLC0415
    from qlora.model import adapter, device, loading  # noqa: PLC0415 - seconds that --help need not take
    from qlora.model.base import open_base_model  # noqa: PLC0415

    if not base_only:
        require_recorded([ADAPTER])
    place = device.set_up_device(values.hardware, deterministic=False)
    base = open_base_model(values, MANIFESTS)
    progress = values.runtime.progress and sys.stderr.isatty()
    model: Any = loading.load_model(values.base_model, base.folder, place, progress=progress, device_map=values.hardware.device_map)
    if not base_only:
        model = adapter.load_adapter(model, ADAPTER, values.base_model.name)
    changes = {"do_sample": sample, "max_new_tokens": max_new_tokens or values.predict.max_new_tokens}
    return Chat(model.eval(), base.template, values.predict.model_copy(update=changes))


def ask(chat: "Chat", messages: Sequence[Message], sides: Sequence[str]) -> "Answer | None":
    """Print the answer of each side, named where there are two; returns the last side's, None if Ctrl-C came before it began.

    In a terminal it is printed as it comes, with what would steer the terminal spelled out; into a pipe, to the byte, at its end.
    """
    streaming = sys.stdout.isatty()
    for side in sides:
        if len(sides) > 1:
            print(f"{side}: ", end="", flush=True)
        with _side(chat, side):
            answer = chat.answer(messages, _print_visible if streaming else None)
        command.say("" if streaming else answer.text)
        if chat.interrupted:
            return answer if side == sides[-1] else None
        if not answer.stopped:
            print(f"(cut after {answer.tokens} tokens; --max-new-tokens)", file=sys.stderr, flush=True)
    return answer


def _print_visible(text: str) -> None:
    print(visible(text), end="", flush=True)


def _side(chat: "Chat", side: str) -> Any:
    model: Any = chat.model
    return model.disable_adapter() if side == "base" and hasattr(model, "disable_adapter") else nullcontext()


def converse(chat: "Chat", system: str | None, sides: Sequence[str]) -> None:
    """Questions from standard input until it ends; the last side's answers continue the conversation."""
    print(HINT, file=sys.stderr, flush=True)
    beginning = with_system_message([], system)
    history = list(beginning)
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            history = list(beginning)
            continue
        try:
            asked = chat.fit([*history, Message(role="user", content=line)])
            if len(asked) <= len(history):
                print(f"(the oldest {len(history) + 1 - len(asked)} turns no longer fit and are left out)", file=sys.stderr, flush=True)
            with _interruptible(chat):
                answer = ask(chat, asked, sides)
        except InputError as error:
            # Of this message alone: the conversation continues without it.
            print(f"error: {visible(str(error))}", file=sys.stderr, flush=True)
            continue
        if answer is None:
            print(f"({sides[-1]} did not answer: the conversation continues without this question)", file=sys.stderr, flush=True)
        elif answer.text:
            history = [*asked, Message(role="assistant", content=answer.text)]


def _lines() -> Iterator[str]:
    """What is typed, line by line; Ctrl-C throws a line away."""
    prompt = "> " if sys.stdin.isatty() else ""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                print(f"\n{HINT}", file=sys.stderr, flush=True)
                continue
            if line:
                yield line
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _interruptible(chat: "Chat") -> Iterator[None]:
    """Ctrl-C ends the answer, after the token that is being made."""

    def interrupt(_number: int, _frame: object) -> None:
        chat.interrupted = True

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def drawn_test_rows(count: int, seed: int) -> list[Conversation]:
    """Rows of the test set, drawn by the seed.

    Raises:
        InputError: it is not the test set that dvc.lock records.
    """
    require_recorded([TEST])
    conversations = read_conversations(TEST)
    return random.Random(seed).sample(conversations, min(count, len(conversations)))


def show_test_rows(chat: "Chat", conversations: Sequence[Conversation], sides: Sequence[str]) -> None:
    """Of each everything before the last answer, that answer, and the model's."""
    for conversation in conversations:
        *before, original = conversation.messages
        print(f"── {visible(conversation.id)} ({visible(conversation.category)})")
        for message in before:
            print(f"{'query' if message['role'] == 'user' else message['role']}: {visible(message['content'])}")
        print(f"original answer: {visible(original['content'])}")
        for side in sides:
            try:
                with _side(chat, side):
                    answer = chat.answer(before)
                shown = visible(answer.text) + ("" if answer.stopped else f" (cut after {answer.tokens} tokens)")
            except InputError as error:
                shown = f"left out, {visible(str(error))}"
            print(f"{'generated answer' if len(sides) == 1 else f'{side} answer'}: {shown}", flush=True)
        print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    task.add_argument("--from-test", type=command.positive_int, metavar="N", help="show N rows of the test set and end")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--base", action="store_true", help="the base model alone")
    model.add_argument("--compare", action="store_true", help="base and tuned model")
    parser.add_argument("--system", metavar="TEXT", help="system message in place of data.system_message; '' for none")
    parser.add_argument("--sample", action="store_true", help="draw with predict.temperature and predict.top_p; else greedy")
    parser.add_argument("--seed", type=int, default=0, help="of --from-test and --sample (0)")
    parser.add_argument("--max-new-tokens", type=command.positive_int, help="of an answer (predict.max_new_tokens)")
    return parser


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.from_test and arguments.system is not None:
        parser.error("--system does not go with --from-test: a test row has its own")
    values = params.load(Path("params.yaml"))
    # Before the seconds that a model takes.
    rows = drawn_test_rows(arguments.from_test, arguments.seed) if arguments.from_test else []
    chat = load(values, base_only=arguments.base, sample=arguments.sample, max_new_tokens=arguments.max_new_tokens)
    if arguments.sample:
        import torch  # noqa: PLC0415

        torch.manual_seed(arguments.seed)
    sides = ("base", "tuned") if arguments.compare else ("base",) if arguments.base else ("tuned",)
    system = values.data.system_message if arguments.system is None else arguments.system or None
    if arguments.from_test:
        show_test_rows(chat, rows, sides)
    elif arguments.prompt is not None:
        ask(chat, chat.fit(with_system_message([Message(role="user", content=arguments.prompt)], system)), sides)
    else:
        converse(chat, system, sides)


if __name__ == "__main__":
    command.run(main)
