"""Is `prepare` fast, and does its memory stay flat? Side by side with a plain program on `datasets`.

    python -m benchmarks.prepare [--rounds 5]

Both programs read the same generated parquet of chat rows, add a system message, drop what can't be trained on, carve a
validation split and write JSON lines of id, category and messages; they run as whole processes, in turn, in one go: `prepare` with every gate but
the near duplicates (data.near_threshold: null), with all, and on ten times the rows. Writes results/prepare.json.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import describe_machine

ROWS = 52_000
RESULTS = Path(__file__).parent / "results" / "prepare.json"
ROOT = Path(__file__).parents[1]

OURS = """
import sys
from pathlib import Path
from qlora import params
from stages.prepare import prepare
values = params.load(Path("params.yaml"))
near = values.data.near_threshold if sys.argv[4] == "near" else None
data = values.data.model_copy(update={"train_file": sys.argv[1], "test_file": sys.argv[2], "near_threshold": near})
runtime = values.runtime.model_copy(update={"num_workers": int(sys.argv[5]) if sys.argv[5:] else None})
prepare(data, runtime, prepared=Path(sys.argv[3]), report=Path(sys.argv[3]) / "report.json")
"""

# Written from the documentation of `datasets` alone.
PLAIN = """
import hashlib, json, sys
from datasets import load_dataset
files = {"train": sys.argv[1], "test": sys.argv[2]}
data = load_dataset("parquet", data_files=files, cache_dir=sys.argv[3] + "/cache")

def clean(row):
    messages = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    digest = hashlib.sha256(json.dumps(messages, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()
    if not messages or messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "Answer only."}, *messages]
    return {"id": digest[:16], "category": row["category"], "messages": messages}

def valid(row):
    turns = row["messages"][1:]
    if any(not (message["content"] or "").strip() for message in row["messages"]):
        return False
    roles = [message["role"] for message in turns]
    return len(roles) > 1 and roles == ["user", "assistant"] * (len(roles) // 2)

data = data.map(clean, remove_columns=["prompt", "prompt_id", "messages", "category"]).filter(valid)
train = data["train"].train_test_split(test_size=0.04, seed=0)
for name, split in (("train", train["train"]), ("validation", train["test"]), ("test", data["test"])):
    split.to_json(f"{sys.argv[3]}/{name}.jsonl", force_ascii=False)
"""


def write_rows(path: Path, rows: int, seed: int) -> None:
    """Chat rows of the size and shape of no_robots' 500 test rows, in row groups of 10,000, from a seed.

    There a message has 84 words of 4.7 letters and 3.6 line breaks, and 14 % of the messages hold a character beyond ASCII.
    """
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(2000)]
    beyond_ascii = ["\u201cquoted\u201d", "caf\u00e9", "\u6771\u4eac", "\U0001f600", "na\u00efve \u2013 na\u00efve"]
    message = pa.struct([("content", pa.string()), ("role", pa.string())])
    schema = pa.schema([("prompt", pa.string()), ("prompt_id", pa.string()), ("messages", pa.list_(message)), ("category", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 10_000):
            made = []
            for number in range(start, min(start + 10_000, rows)):
                turns = rng.choices((1, 2, 3), (80, 12, 8))[0]
                messages = [
                    {"content": f"{number} {text(rng, words, beyond_ascii)}", "role": role} for _ in range(turns) for role in ("user", "assistant")
                ]
                prompt = messages[0]["content"]
                made.append({"prompt": prompt, "prompt_id": f"{number:064x}", "messages": messages, "category": rng.choice(("Chat", "Open QA"))})
            writer.write_table(pa.Table.from_pylist(made, schema=schema))


def text(rng: random.Random, words: Sequence[str], beyond_ascii: Sequence[str]) -> str:
    chosen = rng.choices(words, k=rng.randint(10, 158))
    if rng.random() < 0.14:
        chosen[rng.randrange(len(chosen))] = rng.choice(beyond_ascii)
    return "\n".join(" ".join(chosen[start : start + 24]) for start in range(0, len(chosen), 24))


# The peak that wait4 reports begins at this program's own memory: the measured one has to look itself.
PEAK = """
import re, resource
from pathlib import Path
largest_worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
own = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(max(own, largest_worker))
"""


def measure(program: str, train: Path, test: Path, *arguments: str) -> tuple[float, float, Any]:
    """Seconds, peak MB of its largest process, and the test conversations, of one run in a process and folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", program + PEAK, str(train), str(test), folder, *arguments],
            cwd=ROOT,
            env={**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"},
            stdout=subprocess.PIPE,
            check=True,
        )
        seconds = time.perf_counter() - began
        lines = map(json.loads, (Path(folder) / "test.jsonl").read_text(encoding="utf-8").splitlines())
        return seconds, int(done.stdout.split()[-1]) / 1000, {line["id"]: line for line in lines}


def times_faster(ours: list[float], plain: list[float]) -> dict[str, float]:
    """By round, in which they ran one after the other."""
    ratios = [theirs / own for own, theirs in zip(ours, plain, strict=True)]
    return {"median": round(statistics.median(ratios), 2), "min": round(min(ratios), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        train, large, test = (Path(folder) / f"{name}.parquet" for name in ("train", "large", "test"))
        for path, rows, seed in ((train, ROWS, 0), (large, 10 * ROWS, 0), (test, 500, 1)):
            write_rows(path, rows, seed)
        runs = {
            "prepare": (OURS, train, test, "exact"),
            "datasets": (PLAIN, train, test),
            "prepare, one process": (OURS, train, test, "exact", "1"),
            "prepare, near duplicates": (OURS, train, test, "near"),
            "prepare, ten times the rows": (OURS, large, test, "exact"),
            "prepare, near duplicates, ten times the rows": (OURS, large, test, "near"),
        }
        for _ in range(rounds):
            made = []
            for name, run in runs.items():
                took, peak, conversations = measure(*run)
                seconds[name].append(took)
                peaks[name].append(peak)
                made.append(conversations)
            assert all(conversations == made[0] for conversations in made), "the programs did not do the same work"
    peak_mb = {name: round(statistics.median(values), 1) for name, values in peaks.items()}
    record = {
        "machine": describe_machine(),
        "rows": ROWS,
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "peak_mb": peak_mb,
        "times_faster": {
            name: times_faster(seconds[name], seconds["datasets"]) for name in ("prepare", "prepare, one process", "prepare, near duplicates")
        },
        "memory_growth_for_ten_times_the_rows": round(peak_mb["prepare, ten times the rows"] / peak_mb["prepare"] - 1, 4),
        "bytes_per_row_of_near_duplicates": round(
            (peak_mb["prepare, near duplicates, ten times the rows"] - peak_mb["prepare, ten times the rows"]) * 1e6 / (10 * ROWS)
        ),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
