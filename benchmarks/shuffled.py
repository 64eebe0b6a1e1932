"""Do the embedded data measure learning? The default's pipeline on its true answers and on shuffled ones, and what `tools.compare` calls them.

    python -m benchmarks.shuffled [--steps 130]     writes results/shuffled.json

An adapter trained on shuffled answers must learn the form of a chat and nothing else: it stays under a fifth where the other succeeds, and every
score calls it worse. 130 updates are a third of the default's.
"""

import argparse
import copy
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from tests.helpers import verdicts
from tests.pipeline.clone import new_clone, tiny_rows

RESULTS = Path(__file__).parent / "results" / "shuffled.json"
TINY = "data/raw/tiny/train-00000-of-00001.parquet"
SHUFFLED = "data/raw/shuffled/train.jsonl"
MOST_SHUFFLED = 0.2
MEASURED = ("exact_match", "rouge_l", "chrf", "nll", "bits_per_byte")


def with_shuffled_answers(rows: Sequence[Any], seed: int = 0) -> list[Any]:
    """The rows, each answer exchanged for one of any of them."""
    rows = copy.deepcopy(list(rows))
    turns = [message for row in rows for message in row["messages"] if message["role"] == "assistant"]
    answers = [turn["content"] for turn in turns]
    random.Random(seed).shuffle(answers)
    for turn, answer in zip(turns, answers, strict=True):
        turn["content"] = answer
    return rows


def measure(steps: int, folder: Path) -> dict[str, Any]:
    """The scores after training on shuffled and on true answers, and the verdicts of the second against the first."""
    rows = [row for row in tiny_rows("train", 10_000) if row["category"] != "broken"]
    clone = new_clone(folder, None, {SHUFFLED: with_shuffled_answers(rows)})
    clone.set(data__train_file=SHUFFLED, train__max_steps=steps)
    clone.repro()
    shuffled: Any = clone.json("metrics/evaluate.json")
    clone.commit("shuffled")
    clone.run("git", "tag", "shuffled")
    clone.run("dvc", "exp", "run", "-S", f"data.train_file={TINY}", "--name", "true")
    true: Any = clone.json("metrics/evaluate.json")
    refused = clone.run("python", "-m", "tools.compare", "true", "shuffled", "--fail-if-worse", "exact_match", fails=True)
    return {
        "steps": steps,
        "shuffled": shuffled,
        "true": true,
        "verdicts": verdicts(clone.run("python", "-m", "tools.compare", "shuffled", "true")),
        "refused": "worse: exact_match" in refused,
    }


def failures(record: dict[str, Any]) -> list[str]:
    """What was not found as it must be."""
    found = []
    if record["shuffled"]["exact_match"] >= MOST_SHUFFLED:
        found.append(f"exact match of the shuffled answers is {record['shuffled']['exact_match']}")
    if record["shuffled"]["stop_rate"] <= 0.9:
        found.append("the form of a chat was not learned")
    found += [f"{name}: {record['verdicts'].get(name)}" for name in MEASURED if record["verdicts"].get(name) != "better"]
    # Answers learned from shuffled ones may hold no 4-gram at all: BLEU has no row to read a verdict from, then.
    if record["verdicts"].get("bleu", "better") != "better":
        found.append(f"bleu: {record['verdicts']['bleu']}")
    if not record["refused"]:
        found.append("--fail-if-worse did not fail")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=130)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        record = measure(parser.parse_args().steps, Path(folder))
    text = json.dumps({"machine": describe_machine(), **record}, indent=2)
    print(text)
    if found := failures(record):
        sys.exit(f"FAILED: {'; '.join(found)}")
    RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
