"""What does `dvc repro` cost when little is to do? Beside a repository of four empty stages with one dependency each.

    python -m benchmarks.repro [--rounds 7]     writes results/repro.json

A fresh clone of this project, with the committed outputs in its workspace, and a plain DVC repository take turns at a `dvc repro` that has nothing
to run. After that, one param of the last stage is changed back and forth in the clone.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ruamel.yaml import YAML

from benchmarks.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "repro.json"
ROOT = Path(__file__).parents[1]
PLAIN = """stages:
  one: {cmd: cp in one, deps: [in], outs: [one]}
  two: {cmd: cp one two, deps: [one], outs: [two]}
  three: {cmd: cp two three, deps: [two], outs: [three]}
  four: {cmd: cp three four, deps: [three], outs: [four]}
"""
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}


def run(folder: Path, *command: str) -> str:
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def repro(folder: Path, ran: int) -> float:
    """Seconds of a `dvc repro` that runs so many stages."""
    began = time.perf_counter()
    output = run(folder, "dvc", "repro")
    seconds = time.perf_counter() - began
    assert output.count("Running stage") == ran, output[-1000:]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        plain, clone = Path(name) / "plain", Path(name) / "clone"
        plain.mkdir()
        run(plain, "git", "init", "--quiet")
        run(plain, "dvc", "init", "--quiet")
        (plain / "in").write_text("in", encoding="utf-8")
        (plain / "dvc.yaml").write_text(PLAIN, encoding="utf-8")
        repro(plain, 4)
        run(ROOT, "git", "clone", "--quiet", str(ROOT), str(clone))
        shutil.copytree(ROOT / ".dvc" / "cache", clone / ".dvc" / "cache")
        run(clone, "dvc", "checkout", "--quiet")
        repro(clone, 0)
        seconds: dict[str, list[float]] = {"plain": [], "ours": []}
        for number in range(arguments.rounds):
            for which, folder in sorted({"plain": plain, "ours": clone}.items(), reverse=bool(number % 2)):
                seconds[which].append(repro(folder, 0))
        yaml, changed = YAML(), []
        for tokens, stages in ((3, 3), (4, 3), (3, 0)):
            values = yaml.load(clone / "params.yaml")
            values["predict"].update(max_new_tokens=tokens, num_examples=4)
            yaml.dump(values, clone / "params.yaml")
            # The base model answers again, and the adapter; nothing is trained.
            changed.append(repro(clone, stages))
    ratios = [ours / bare for ours, bare in zip(seconds["ours"], seconds["plain"], strict=True)]
    record = {
        "machine": describe_machine(),
        "nothing_to_run": {name: [round(value, 3) for value in found] for name, found in seconds.items()},
        "seconds_median": {name: round(statistics.median(found), 3) for name, found in seconds.items()},
        "times_plain_median": round(statistics.median(ratios), 3),
        "one_param_of_predict": round(statistics.median(changed[:2]), 2),
        "changed_back_from_the_run_cache": round(changed[2], 2),
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
