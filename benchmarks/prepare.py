"""Is `prepare` fast, and do its cost per row and its memory stay flat? Side by side with a plain program on `datasets`.

    python -m benchmarks.prepare [--sizes 52000 520000 5200000] [--rounds 3]

Both programs read the same generated parquet of chat rows, add a system message, drop what can't be trained on, carve a validation split and write
JSON lines of id, category and messages; they run as whole processes, in turn. Beside the plain one, on 52,000 rows as long as no_robots' (1,230
characters) and on as many of 370: `prepare` with every check but the near duplicates (data.near_threshold: null), by one process, and with all
checks. Then on rows of 500 characters: every size, with near duplicates up to 520,000. 5.2 million rows need 6 GB where TMPDIR lies while this
runs. Writes results/prepare.json.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import describe_machine

ROWS = 52_000
LENGTHS = {"": 158, ", 370 characters": 46}
"""Mean of a row as its runs are named, no_robots' where nothing is said, and the most words of a message that make it."""
SIZES = [52_000, 520_000, 5_200_000]
NEAR_ROWS = 520_000
BEYOND_ASCII = ["\u201cquoted\u201d", "caf\u00e9", "\u6771\u4eac", "\U0001f600", "na\u00efve \u2013 na\u00efve"]
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
out = Path(sys.argv[3])
prepare(params.Params.model_construct(data=data, runtime=runtime), prepared=out, report=out / "report.json", notes=out)
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


def write_rows(path: Path, rows: int, seed: int, *, different: int = 20_000, most_words: int = 61, prompts: bool = False) -> None:
    """Chat rows of 2.56 messages, in row groups of 10,000, from a seed: about 500 characters each, with at most 158 words a message 1,230.

    That is no_robots' length; like there 14 % of the messages hold a character beyond ASCII, and each row has its prompt once more when asked for.
    Texts are drawn from so many different ones, each opened by the number of its message, so that none is repeated: five million rows take half
    a minute.
    """
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(2000)]
    texts = [text(rng, words, most_words) for _ in range(different)]
    message = pa.struct([("content", pa.string()), ("role", pa.string())])
    extra = [("prompt", pa.string()), ("prompt_id", pa.string())] if prompts else []
    schema = pa.schema([*extra, ("messages", pa.list_(message)), ("category", pa.string())])
    written = 0
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 10_000):
            count = min(10_000, rows - start)
            offsets = [0, *accumulate(2 * turns for turns in rng.choices((1, 2, 3), (80, 12, 8), k=count))]
            contents = [f"{number} {chosen}" for number, chosen in enumerate(rng.choices(texts, k=offsets[-1]), start=written)]
            written += len(contents)
            roles = ["user", "assistant"] * (len(contents) // 2)
            made = pa.StructArray.from_arrays([pa.array(contents), pa.array(roles)], fields=list(message))
            categories = pa.array(rng.choices(("Chat", "Open QA"), k=count))
            columns = [pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), made), categories]
            asked = [[contents[first] for first in offsets[:-1]], [f"{number:064x}" for number in range(start, start + count)]] if prompts else []
            writer.write_table(pa.table([*map(pa.array, asked), *columns], schema=schema))


def text(rng: random.Random, words: Sequence[str], most: int) -> str:
    chosen = rng.choices(words, k=rng.randint(most // 12, most))
    if rng.random() < 0.14:
        chosen[rng.randrange(len(chosen))] = rng.choice(BEYOND_ASCII)
    return "\n".join(" ".join(chosen[start : start + 24]) for start in range(0, len(chosen), 24))


def measure(program: str, train: Path, test: Path, *arguments: str) -> tuple[float, float, Any]:
    """Seconds, peak MB of all its processes together, and the test conversations, of one run in processes and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        environment = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        most = 0.0
        with subprocess.Popen([sys.executable, "-c", program, str(train), str(test), folder, *arguments], cwd=ROOT, env=environment) as running:
            while running.poll() is None:
                most = max(most, sum(map(peak_mb, (running.pid, *children(running.pid)))))
                time.sleep(0.05)
        seconds = time.perf_counter() - began
        assert running.returncode == 0
        lines = map(json.loads, (Path(folder) / "test.jsonl").read_text(encoding="utf-8").splitlines())
        return seconds, most, {line["id"]: line for line in lines}


def children(process: int) -> list[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split()]
    return []


def peak_mb(process: int) -> float:
    """Of those alive at one moment the sum is the most that they can ever have held together; memory that they share counts for each."""
    with suppress(FileNotFoundError, ProcessLookupError):
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text(encoding="utf-8"))
        return int(found[1]) * 1024 / 1e6 if found else 0.0
    return 0.0


def times_faster(ours: list[float], plain: list[float]) -> dict[str, float]:
    """By round, in which they ran one after the other."""
    ratios = [theirs / own for own, theirs in zip(ours, plain, strict=True)]
    return {"median": round(statistics.median(ratios), 2), "min": round(min(ratios), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="rows, ascending")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sizes: list[int] = arguments.sizes
    seconds: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, list[float]] = defaultdict(list)
    loads = []
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, tuple[Any, ...]] = {}
        for number, (length, words) in enumerate(LENGTHS.items()):
            pair = [Path(folder) / f"{number}-{split}.parquet" for split in ("train", "test")]
            for path, rows, seed in zip(pair, (ROWS, 500), (0, 1), strict=True):
                write_rows(path, rows, seed, different=3 * rows, most_words=words, prompts=True)
            sides |= {
                f"prepare{length}": (OURS, *pair, "exact"),
                f"datasets{length}": (PLAIN, *pair),
                f"prepare, one process{length}": (OURS, *pair, "exact", "1"),
                f"prepare, near duplicates{length}": (OURS, *pair, "near"),
            }
        test = Path(folder) / "test.parquet"
        write_rows(test, 500, 1)
        files = {rows: Path(folder) / f"{rows}.parquet" for rows in sizes}
        for rows, path in files.items():
            write_rows(path, rows, 0)
        # Rows that share a message would all be looked at by the gate of near duplicates.
        near = {rows: Path(folder) / f"{rows}-near.parquet" for rows in sizes if rows <= NEAR_ROWS}
        for rows, path in near.items():
            write_rows(path, rows, 0, different=3 * rows)
        runs: dict[str, tuple[Any, ...]] = {
            **sides,
            **{f"prepare, {rows:,} short rows": (OURS, path, test, "exact") for rows, path in files.items()},
            **{f"prepare, near duplicates, {rows:,} short rows": (OURS, path, test, "near") for rows, path in near.items()},
        }
        for _ in range(arguments.rounds):
            made: dict[Path, Any] = {}
            for name, run in runs.items():
                loads.append(round(os.getloadavg()[0], 2))
                took, peak, conversations = measure(*run)
                print(f"{name}: {took:.2f} s, {peak:.0f} MB", flush=True)
                seconds[name].append(took)
                peaks[name].append(peak)
                assert made.setdefault(run[2], conversations) == conversations, "the programs did not do the same work"
    cost = {f"{rows:,}": round(statistics.median(seconds[f"prepare, {rows:,} short rows"]) / rows * 1e6, 2) for rows in sizes}
    record = {
        "machine": describe_machine(),
        "rows": ROWS,
        "load_before_each_run": loads,
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "peak_mb_of_all_processes": {name: round(statistics.median(values), 1) for name, values in peaks.items()},
        "microseconds_per_row": cost,
        "times_faster": {
            f"{name}{length}": times_faster(seconds[f"{name}{length}"], seconds[f"datasets{length}"])
            for length in LENGTHS
            for name in ("prepare", "prepare, one process", "prepare, near duplicates")
        },
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
