"""How long until something happens? The first update of the embedded default's training, and the help of every tool.

python -m benchmarks.startup [--rounds 5]     writes results/startup.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "startup.json"
TOOLS = sorted(path.stem for path in (Path(__file__).parents[1] / "tools").glob("[a-z]*.py"))

# The training stage as it is, but for its end: right after the first update.
FIRST_STEP = """
import os, sys, time
from pathlib import Path
import stages.train
from qlora.training.callbacks import SaveOrStop
def first(self, args, state, control, **_):
    sys.stdout.flush()
    os._exit(0)
SaveOrStop.on_step_end = first
folder = Path(sys.argv[1])
from qlora import params
stages.train.train(
    params.load(Path("params.yaml")), train=Path("data/prepared/train.jsonl"), validation=Path("data/prepared/validation.jsonl"),
    manifests=Path("models/base"), adapter_folder=folder / "a", report=folder / "r.json", metrics=folder, notes=folder,
)
"""


def seconds_of(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    commands = {f"tools.{name} --help": [sys.executable, "-m", f"tools.{name}", "--help"] for name in TOOLS}
    commands["tools.recipes list"] = [sys.executable, "-m", "tools.recipes", "list"]
    with tempfile.TemporaryDirectory() as folder:
        commands["first update of the default"] = [sys.executable, "-c", FIRST_STEP, folder]
        found = {name: [seconds_of(command) for _ in range(arguments.rounds)] for name, command in commands.items()}
    record = {
        "machine": describe_machine(),
        "rounds": arguments.rounds,
        "seconds_median": {name: round(statistics.median(seconds), 3) for name, seconds in found.items()},
        "seconds_most": {name: round(max(seconds), 3) for name, seconds in found.items()},
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
