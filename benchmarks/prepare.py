"""Is `prepare` fast, and does its memory stay flat? Side by side with a plain program on `datasets`.

    python -m benchmarks.prepare [--rounds 5]

Both programs read the same generated parquet of chat rows, add a system message, drop what can't be trained on, carve a
validation split and write JSON lines; they run as whole processes, in turn, in one go. Then `prepare` alone on ten times
the rows. Writes results/prepare.json.
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
from pathlib import Path

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
data = params.load(Path("params.yaml")).data.model_copy(update={"train_file": sys.argv[1], "test_file": sys.argv[2]})
prepare(data, prepared=Path(sys.argv[3]), report=Path(sys.argv[3]) / "report.json", progress=False)
"""

# Written from the documentation of `datasets` alone.
PLAIN = """
import sys
from datasets import load_dataset
files = {"train": sys.argv[1], "test": sys.argv[2]}
data = load_dataset("parquet", data_files=files, cache_dir=sys.argv[3] + "/cache")

def clean(row):
    messages = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    if not messages or messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "Answer only."}, *messages]
    return {"messages": messages, "category": row["category"]}

def valid(row):
    turns = row["messages"][1:]
    if any(not (message["content"] or "").strip() for message in row["messages"]):
        return False
    roles = [message["role"] for message in turns]
    return len(roles) > 1 and roles == ["user", "assistant"] * (len(roles) // 2)

data = data.map(clean, remove_columns=["prompt", "prompt_id"]).filter(valid)
train = data["train"].train_test_split(test_size=0.04, seed=0)
for name, split in (("train", train["train"]), ("validation", train["test"]), ("test", data["test"])):
    split.to_json(f"{sys.argv[3]}/{name}.jsonl", force_ascii=False)
"""


def write_rows(path: Path, rows: int) -> None:
    """Chat rows of about the size and shape of no_robots, in row groups of 10,000, from a fixed seed."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyzéü", k=rng.randint(2, 9))) for _ in range(2000)]
    message = pa.struct([("content", pa.string()), ("role", pa.string())])
    schema = pa.schema([("prompt", pa.string()), ("prompt_id", pa.string()), ("messages", pa.list_(message)), ("category", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 10_000):
            made = []
            for number in range(start, min(start + 10_000, rows)):
                turns = rng.choices((1, 2, 3), (85, 10, 5))[0]
                messages = [
                    {"content": f"{number} " + " ".join(rng.choices(words, k=rng.randint(10, 150))), "role": role}
                    for _ in range(turns)
                    for role in ("user", "assistant")
                ]
                prompt = messages[0]["content"]
                made.append({"prompt": prompt, "prompt_id": f"{number:064x}", "messages": messages, "category": rng.choice(("Chat", "Open QA"))})
            writer.write_table(pa.Table.from_pylist(made, schema=schema))


def measure(program: str, train: Path, test: Path) -> tuple[float, float]:
    """Seconds and peak MB of one run in a process and folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(train), str(test), folder],
            cwd=ROOT,
            env={**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"},
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, f"ended with {process.returncode}:\n{program}"
        return time.perf_counter() - began, usage.ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        train, large, test = (Path(folder) / f"{name}.parquet" for name in ("train", "large", "test"))
        for path, rows in ((train, ROWS), (large, 10 * ROWS), (test, 500)):
            write_rows(path, rows)
        runs: dict[str, list[tuple[float, float]]] = {"prepare": [], "datasets": [], "prepare, ten times the rows": []}
        for _ in range(rounds):
            runs["prepare"].append(measure(OURS, train, test))
            runs["datasets"].append(measure(PLAIN, train, test))
        for _ in range(max(1, rounds // 2)):
            runs["prepare, ten times the rows"].append(measure(OURS, large, test))
    ratios = sorted(plain[0] / ours[0] for ours, plain in zip(runs["prepare"], runs["datasets"], strict=True))
    peaks = {name: statistics.median(peak for _, peak in measured) for name, measured in runs.items()}
    record = {
        "machine": describe_machine(),
        "rows": ROWS,
        "seconds": {name: [round(seconds, 3) for seconds, _ in measured] for name, measured in runs.items()},
        "peak_mb": {name: round(peak, 1) for name, peak in peaks.items()},
        "times_faster_median": round(statistics.median(ratios), 2),
        "times_faster_min": round(ratios[0], 2),
        "memory_growth_for_ten_times_the_rows": round(peaks["prepare, ten times the rows"] / peaks["prepare"] - 1, 4),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
