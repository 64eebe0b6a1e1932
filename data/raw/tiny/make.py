"""Make the embedded dataset: small tasks whose answers can be checked exactly.

    python -m data.raw.tiny.make

Writes train- and test-00000-of-00001.parquet beside this file, in the columns of HuggingFaceH4/no_robots
(prompt, prompt_id, messages, category). Everything follows from SEED: the same code writes the same bytes.
The test problems are drawn first and never drawn again, in whatever wording: not for train and not for the text
that the embedded base model is pretrained on (models/base/tiny/make.py).
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SEED = 20261123
TRAIN_ROWS_PER_CATEGORY = 280
TEST_ROWS_PER_CATEGORY = 28
FOLDER = Path(__file__).parent

Problem = tuple[str | int, ...]
Turn = tuple[str, str]
"""A question and its answer."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONSONANTS = "bcdfgklmnprstvz"
VOWELS = "aeiou"
ACCENTED_VOWELS = "áéíóúäöüàèêîôû"
SYSTEM_TURNS = ("You are precise.", "Reply with the bare result.", "You answer in one line.")


def word(rng: random.Random, *, syllables: int, accents: bool = False) -> str:
    """An invented word, such as "velato"; with `accents`, a third of its vowels carry one."""
    vowels = [rng.choice(ACCENTED_VOWELS if accents and rng.random() < 0.33 else VOWELS) for _ in range(syllables)]
    return "".join(rng.choice(CONSONANTS) + vowel for vowel in vowels) + rng.choice(("", *CONSONANTS))


def addition(rng: random.Random) -> Problem:
    return tuple(sorted((rng.randint(10, 99), rng.randint(10, 99))))


def ask_addition(rng: random.Random, a: int, b: int) -> Turn:
    if rng.random() < 0.5:
        a, b = b, a
    return rng.choice((f"What is {a} + {b}?", f"Add {a} and {b}.")), str(a + b)


def capitals(rng: random.Random) -> Problem:
    return (word(rng, syllables=rng.randint(1, 3), accents=True),)


def ask_capitals(rng: random.Random, text: str) -> Turn:
    return rng.choice((f'Write "{text}" in capital letters.', f'Put "{text}" in upper case.')), text.upper()


def compare(rng: random.Random) -> Problem:
    return tuple(sorted(rng.sample(range(10, 1000), 2)))


def ask_compare(rng: random.Random, low: int, high: int) -> Turn:
    first, second = rng.sample((low, high), 2)
    if rng.random() < 0.5:
        return f"Which number is larger, {first} or {second}?", str(high)
    return f"Which number is smaller, {first} or {second}?", str(low)


def letter(rng: random.Random) -> Problem:
    return (word(rng, syllables=rng.randint(1, 3)),)


def ask_letter(rng: random.Random, text: str) -> Turn:
    if rng.random() < 0.5:
        return f'What is the first letter of "{text}"?', text[0]
    return f'What is the last letter of "{text}"?', text[-1]


def order(rng: random.Random) -> Problem:
    return tuple(sorted(rng.sample(LETTERS, rng.randint(3, 4))))


def ask_order(rng: random.Random, *letters: str) -> Turn:
    text = " ".join(rng.sample(letters, len(letters)))
    return rng.choice((f"Put these letters in order: {text}", f"Sort the letters {text}.")), " ".join(letters)


def repeat(rng: random.Random) -> Problem:
    return (word(rng, syllables=rng.randint(1, 3), accents=True),)


def ask_repeat(rng: random.Random, text: str) -> Turn:
    return rng.choice((f'Say "{text}" twice.', f'Repeat the word "{text}" two times.')), f"{text} {text}"


def spell(rng: random.Random) -> Problem:
    return (word(rng, syllables=rng.randint(1, 3)),)


def ask_spell(rng: random.Random, text: str) -> Turn:
    return rng.choice((f'Spell "{text}".', f'How is "{text}" spelled?')), "-".join(text)


def successor(rng: random.Random) -> Problem:
    return (rng.randint(10, 4999),)


def ask_successor(rng: random.Random, number: int) -> Turn:
    if rng.random() < 0.5:
        return f"What number comes after {number}?", str(number + 1)
    return f"What number comes before {number}?", str(number - 1)


TASKS: dict[str, tuple[Callable[[random.Random], Problem], Callable[..., Turn]]] = {
    "addition": (addition, ask_addition),
    "capitals": (capitals, ask_capitals),
    "compare": (compare, ask_compare),
    "letter": (letter, ask_letter),
    "order": (order, ask_order),
    "repeat": (repeat, ask_repeat),
    "spell": (spell, ask_spell),
    "successor": (successor, ask_successor),
}


class World:
    """Draws problems and never one of those set aside: with `hold_out` every drawn problem is set aside too."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.held_out: set[tuple[str, Problem]] = set()

    def turn(self, category: str, *, hold_out: bool = False) -> Turn:
        """A question of this category and its answer; the problem behind it was never held out before."""
        draw, ask = TASKS[category]
        while True:
            problem = draw(self.rng)
            if (category, problem) not in self.held_out:
                break
        if hold_out:
            self.held_out.add((category, problem))
        return ask(self.rng, *problem)

    def exercises(self, weights: Mapping[str, float]) -> Iterator[Turn]:
        """Endless exercises in plain text with their answers, none of them held out.

        Args:
            weights: How often a category comes; 1 where none is given.
        """
        categories = list(TASKS)
        while True:
            category = self.rng.choices(categories, [weights.get(name, 1.0) for name in categories])[0]
            question, answer = self.turn(category)
            yield plain(question, self.rng.randrange(len(PLAIN_FORMS))), answer


PLAIN_FORMS = ("Task.\n{}\nResult.\n", "{}\n", "Exercise: {}\nAnswer: ", "Question.\n\n{}\n\nAnswer.\n\n")


def plain(question: str, form: int = 0) -> str:
    """An exercise as the pretraining text has it, up to its answer and a line break: no roles, no control tokens."""
    return PLAIN_FORMS[form].format(question)


def messages_of(turns: list[Turn], system: str | None) -> list[dict[str, str | None]]:
    messages: list[dict[str, str | None]] = [] if system is None else [{"content": system, "role": "system"}]
    for question, answer in turns:
        messages += [{"content": question, "role": "user"}, {"content": answer, "role": "assistant"}]
    return messages


def rows(world: World, per_category: int, *, hold_out: bool = False) -> list[dict[str, object]]:
    """Conversations of one to three turns, a tenth of them with a system turn of their own, in mixed order."""
    rng = world.rng
    made = []
    for category in TASKS:
        for _ in range(per_category):
            turns = [world.turn(category, hold_out=hold_out) for _ in range(rng.choices((1, 2, 3), (82, 12, 6))[0])]
            system = rng.choice(SYSTEM_TURNS) if rng.random() < 0.1 else None
            made.append(row(messages_of(turns, system), category, turns[0][0]))
    rng.shuffle(made)
    return made


def row(messages: list[dict[str, str | None]], category: str, prompt: str) -> dict[str, object]:
    prompt_id = hashlib.sha256(prompt.encode()).hexdigest()
    return {"prompt": prompt, "prompt_id": prompt_id, "messages": messages, "category": category}


def broken_rows(world: World) -> list[dict[str, object]]:
    """Two rows of each fault that `prepare` must catch; the prompt says which."""

    def fault(name: str, messages: list[dict[str, str | None]]) -> Iterator[dict[str, object]]:
        for number in (1, 2):
            yield row(messages, "broken", f"A deliberately broken row, {name} {number}.")

    question, answer = world.turn("addition")
    user: dict[str, str | None] = {"content": question, "role": "user"}
    assistant: dict[str, str | None] = {"content": answer, "role": "assistant"}
    system: dict[str, str | None] = {"content": "You are precise.", "role": "system"}
    return [
        *fault("no messages", []),
        *fault("unknown role", [{"content": question, "role": "wizard"}, assistant]),
        *fault("system turn in the middle", [user, assistant, system, user, assistant]),
        *fault("two user turns", [user, user, assistant]),
        *fault("assistant first", [assistant, user, assistant]),
        *fault("no answer", [user, assistant, user]),
        *fault("no user", [system, assistant]),
        *fault("empty content", [user, {"content": " \n", "role": "assistant"}]),
        *fault("null content", [{"content": None, "role": "user"}, assistant]),
    ]


def write(rows: list[dict[str, object]], path: Path) -> None:
    text = pa.string()
    message = pa.struct([("content", text), ("role", text)])
    schema = pa.schema([("prompt", text), ("prompt_id", text), ("messages", pa.list_(message)), ("category", text)])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd", compression_level=19)


def make() -> tuple[World, list[dict[str, object]], list[dict[str, object]]]:
    """The world after both splits were drawn, and their rows: the pretraining text goes on from this world."""
    world = World(random.Random(SEED))
    test = rows(world, TEST_ROWS_PER_CATEGORY, hold_out=True)
    train = rows(world, TRAIN_ROWS_PER_CATEGORY)
    for broken in broken_rows(world):
        train.insert(world.rng.randrange(len(train)), broken)
    return world, train, test


def main() -> None:
    _, train, test = make()
    for name, made in (("train", train), ("test", test)):
        path = FOLDER / f"{name}-00000-of-00001.parquet"
        write(made, path)
        print(f"{path.name}: {len(made)} rows, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
