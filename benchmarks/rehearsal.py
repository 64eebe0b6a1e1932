"""Rehearse the recipe for a 24 GB card at real size without a GPU: an hour that ends with whatever would have failed on a rented card.

    python -m benchmarks.rehearsal                     every step that has no result yet
    python -m benchmarks.rehearsal --only merge        one step, whether it has a result or not
    python -m benchmarks.rehearsal --list              the steps
    python -m benchmarks.rehearsal --shape tiny        tries the program in a few minutes

Random weights in the shape of Llama-3.2-1B go through the real commands in a scratch clone: pin, prepare, baseline, train in 4 bits (killed
after its first checkpoint, then resumed), predict, merge, chat. Random weights in the shape of Llama-3-8B are hashed, loaded and merged. The
tokenizer and the rows are real: llama3_tokenizer/ and no_robots_test.parquet of the folder QLORA_REAL_DATA, or --tokenizer and --rows.

A step's seconds and the peak memory of all its processes go to results/rehearsal.json when it ends, beside the estimate, where there is one.
Memory is what can't be given back: files that are mapped are counted apart. A step that needs more than the machine has left is left out.
The steps are the first that Linux ends when memory runs out. No test runs this program: even its tiny shape takes minutes.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.torture import until_quiet
from tests.conftest import REAL
from tests.pipeline.clone import ROOT, Clone, new_clone

RESULTS = Path(__file__).parent / "results" / "rehearsal.json"
RECIPE = "llama3-8b-rtx4090"
SMALL, LARGE = "rehearsal-small", "rehearsal-large"
SHAPES = {"real": {SMALL: "llama3.2-1b", LARGE: "llama3-8b"}, "tiny": {SMALL: "tiny, tied", LARGE: "tiny"}}
ROWS = "data/raw/no_robots.parquet"
CODE = ("qlora", "stages", "tools", "benchmarks", "recipes")
CHECKPOINT = ".dvc/tmp/checkpoints/*/checkpoint-*"
GIB = 2**30
SPARE_BYTES = GIB
"""Of the machine's memory, beyond the estimate of a step: for its libraries."""
INTERVAL_SECONDS = 1
PATIENCE_SECONDS = 60
PARTS = (sys.executable, "-m", "benchmarks.rehearsal_parts")
TOOLS = (sys.executable, "-m")
REPRO = ("dvc", "repro", "--single-item")
"""No stage but the one named: code that changed since an earlier step runs that step again only when it is asked for."""


@dataclass(frozen=True)
class Step:
    what: str
    command: Sequence[str]
    killed: bool = False
    """With SIGKILL, all its processes, once the training's first checkpoint is there."""


def steps(folder: Path, tokenizer: Path, shapes: Mapping[str, str]) -> dict[str, Step]:
    """By name, in order."""
    weights = {name: folder / name for name in (SMALL, LARGE)}

    def make(name: str) -> Step:
        return Step("random weights", [*PARTS, "weights", "--shape", shapes[name], "--out", str(weights[name]), "--tokenizer", str(tokenizer)])

    def pin(name: str) -> Step:
        return Step("`tools.pin`: hash and link", [*TOOLS, "tools.pin", name, "--path", str(weights[name])])

    def large(what: str, *arguments: str) -> Step:
        return Step(what, [*PARTS, arguments[0], "--name", LARGE, *arguments[1:]])

    chat = ["tools.chat", "--prompt", "What is 20 + 22?", "--max-new-tokens", "16"]
    return {
        "imports": Step("the libraries of `train`, nothing else", [*PARTS, "imports"]),
        "weights": make(SMALL),
        "large: weights": make(LARGE),
        "pin": pin(SMALL),
        "large: pin": pin(LARGE),
        "estimates": Step("the estimates beside the steps", [*PARTS, "estimates", "--small", SMALL, "--large", LARGE]),
        "preflight": Step("`tools.preflight`", [*TOOLS, "tools.preflight"]),
        "prepare": Step("`dvc repro prepare`", [*REPRO, "prepare"]),
        "baseline": Step("`dvc repro baseline`: 4 answers of 16 tokens, 4 bits", [*REPRO, "baseline"]),
        "train, killed": Step("`dvc repro train` in 4 bits, killed after its first checkpoint", [*REPRO, "train"], killed=True),
        "train, resumed": Step("the same again: resumed, to its end", [*REPRO, "train"]),
        "predict": Step("`dvc repro predict evaluate`", [*REPRO, "predict", "evaluate"]),
        "merge": Step("`tools.merge`, compared over 4 conversations", [*TOOLS, "tools.merge", "--max-kl", "inf"]),
        "chat": Step("`tools.chat`: one answer of 16 tokens", [*TOOLS, *chat]),
        "large: load in 16 bits": large("load in 16 bits", "load", "--bits", "16"),
        "large: load in 4 bits": large("load in 4 bits: quantised on the CPU", "load", "--bits", "4"),
        "large: merge": large("merge a random adapter, write, hash", "merge", "--out", str(folder)),
    }


def overlay(shape: str) -> dict[str, Any]:
    """What differs from the recipe: the CPU, the rows at hand, and how many."""
    tiny = {"sequence__max_length": 256, "train__max_steps": 40} if shape == "tiny" else {"train__max_steps": 2}
    return {
        "data__train_file": ROWS,
        "data__test_file": ROWS,
        "base_model__name": SMALL,
        "train__batch_size": 1,
        "train__logging_steps": 1,
        "predict__num_examples": 4,
        "predict__batch_tokens": 8192,
        "predict__max_new_tokens": 16,
        "hardware__device": "cpu",
        "hardware__tf32": False,
        "hardware__num_threads": os.cpu_count(),
        "hardware__per_device_train_batch_size": 1,
        "runtime__save_steps": 1,
        "runtime__progress": False,
        **tiny,
    }


def workspace(folder: Path, rows: Path, shape: str) -> Clone:
    """The scratch clone, made at the first call; at later ones it gets the code as it is now, and keeps what ran.

    Its params.yaml stays too: after a change of the schema of params a new folder is needed.
    """
    path = folder / "clone"
    if (path / ROWS).exists():
        for name in CODE:
            shutil.copytree(ROOT / name, path / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "results"))
        return Clone(path)
    shutil.rmtree(path, ignore_errors=True)
    clone = new_clone(path, ROOT / "recipes" / f"{RECIPE}.yaml", {})
    clone.set(**overlay(shape))
    clone.commit("settings")
    (path / ROWS).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(rows, path / ROWS)
    return clone


def memory_of(process: int) -> tuple[int, int]:
    """Bytes of a process and all that it started: what can't be given back, and with the files that they have mapped.

    Memory that several share is counted once.
    """
    import psutil

    own = files = 0
    try:
        family = [process, *(child.pid for child in psutil.Process(process).children(recursive=True))]
    except psutil.Error:
        return 0, 0
    for pid in family:
        with contextlib.suppress(OSError):
            found = dict(re.findall(r"^(Pss\w*): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8"), re.MULTILINE))
            own += 1024 * (int(found["Pss_Anon"]) + int(found["Pss_Shmem"]))
            files += 1024 * int(found["Pss_File"])
    return own, own + files


def first_to_be_ended() -> None:
    """When memory runs out, before what others run on this machine."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")


def measure(command: Sequence[str], clone: Clone, log: Path, enough: Callable[[], bool]) -> dict[str, Any]:
    """Run a command to its end, or until there is enough of it; what it took, with its exit status."""
    most = [0, 0]
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=clone.path,
            env=clone.environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=first_to_be_ended,
        )
        try:
            while process.poll() is None and not enough():
                most = [max(pair) for pair in zip(most, memory_of(process.pid), strict=True)]
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(INTERVAL_SECONDS)
        finally:
            seconds = time.monotonic() - began
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {
        "seconds": round(seconds, 1),
        "peak_gib": round(most[0] / GIB, 2),
        "peak_with_mapped_files_gib": round(most[1] / GIB, 2),
        "status": process.returncode,
    }


class Rehearsal:
    """A folder with clone, weights and logs, and the results so far."""

    def __init__(self, shape: str, folder: Path, tokenizer: Path, rows: Path, results: Path) -> None:
        self.folder, self.results = folder, results
        folder.mkdir(parents=True, exist_ok=True)
        self.clone = workspace(folder, rows, shape)
        self.steps = steps(folder, tokenizer, SHAPES[shape])
        known = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
        self.record = {"shape": shape, "shapes": SHAPES[shape], "recipe": RECIPE, "estimated_gib": {}, "steps": {}, **known}
        self.record["machine"] = {**describe_machine(), "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)}

    def run(self, name: str) -> bool:
        """Whether the step ended as it must; what it took is then written to the results."""
        import psutil

        step, log = self.steps[name], self.folder / f"{name.replace(': ', '-').replace(', ', '-').replace(' ', '-')}.log"
        needed = self.record["estimated_gib"].get(name, 0) * GIB
        if (free := psutil.virtual_memory().available) < needed + SPARE_BYTES:
            print(f"{name}: left out, {free / GIB:.1f} GiB are free, {needed / GIB:.1f} are needed by estimate", flush=True)
            return False
        known = set(self.clone.path.glob(CHECKPOINT))
        found = measure(step.command, self.clone, log, lambda: step.killed and bool(set(self.clone.path.glob(CHECKPOINT)) - known))
        until_quiet(self.clone.path, "a process goes on", PATIENCE_SECONDS)
        said = log.read_text(encoding="utf-8", errors="replace")
        status = found.pop("status")
        if status != (-signal.SIGKILL if step.killed else 0):
            print(f"{name}: ended with {status} after {found['seconds']} s, see {log}\n{said[-2000:]}", flush=True)
            return False
        if name == "estimates":
            self.record["estimated_gib"] = {key: round(size / GIB, 2) for key, size in json.loads(said.splitlines()[-1]).items()}
        if name == "train, resumed":
            found["resumed"] = "resuming from checkpoint" in said
            found["losses"] = [
                float(line.split(",")[1]) for line in (self.clone.path / "metrics/train_loss.csv").read_text(encoding="utf-8").split()[1:]
            ]
        if name == "merge":
            numbers = self.clone.json("metrics/merge.json")
            found["merge"] = {key: numbers[key] for key in ("kl_mean", "tokens", "answers_equal", "nll_adapter", "nll_merged")}
        self.record["steps"][name] = {"what": step.what, **found}
        self.write()
        print(f"{name}: {found}", flush=True)
        return True

    def write(self) -> None:
        # In the order of the steps, whichever ran last.
        self.record["steps"] = {name: self.record["steps"][name] for name in self.steps if name in self.record["steps"]}
        self.record["without_result"] = [name for name in self.steps if name not in self.record["steps"]]
        self.results.write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="real")
    parser.add_argument("--only", action="append", metavar="STEP", help="a step of --list, again if it has a result; several times for several")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    parser.add_argument("--tokenizer", type=Path, default=REAL / "llama3_tokenizer")
    parser.add_argument("--rows", type=Path, default=REAL / "no_robots_test.parquet")
    parser.add_argument(
        "--folder", type=Path, help="for clone, weights and logs: 40 GB at the worst moment (qlora-rehearsal in the temporary folder)"
    )
    parser.add_argument("--results", type=Path, help="(results/rehearsal.json; of the tiny shape, in the folder)")
    given = parser.parse_args()
    # So that the step that runs ends too.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    folder = (given.folder or Path(tempfile.gettempdir()) / f"qlora-rehearsal-{given.shape}").resolve()
    if given.list:
        print("\n".join(f"{name:24}{step.what}" for name, step in steps(folder, given.tokenizer, SHAPES[given.shape]).items()))
        return
    for path in (given.tokenizer, given.rows):
        if not path.exists():
            sys.exit(f"{path} is not there: give --tokenizer and --rows, or set QLORA_REAL_DATA")
    results = given.results or (RESULTS if given.shape == "real" else folder / "rehearsal.json")
    rehearsal = Rehearsal(given.shape, folder, given.tokenizer.resolve(), given.rows.resolve(), results)
    chosen = given.only or [name for name in rehearsal.steps if name not in rehearsal.record["steps"]]
    if unknown := set(chosen) - rehearsal.steps.keys():
        parser.error(f"no step {', '.join(sorted(unknown))}: see --list")
    sys.exit(0 if all([rehearsal.run(name) for name in chosen]) else 1)


if __name__ == "__main__":
    main()
