"""Kill runs at random moments, run them again as a person would, and compare every byte with a run that was left alone.

    python -m benchmarks.torture [--kills 200] [--minutes 60] [--seed 0] [--jobs 2]     make torture

A trial is a fresh checkout with an empty cache, a command (`dvc repro`, `dvc exp run`, with --temp, or the queue), a base model in 32 or 4 bits
or a training by two processes, and some kills: SIGKILL, SIGTERM, SIGINT or SIGUSR1 to dvc, to the stage, to one process of several, or to all.
After each the same command is run again; what a plain rerun can't fix, a HEAD, a queue or a lock left in the middle, is fixed by the commands
that `tools.doctor` prints. At the end it must have made the reference's bytes and left no process, no checkpoint, a clean `dvc status`,
HEAD on its branch and nothing for doctor to find; a file that was edited before all of it must still be so, or be among Git's stashes.

Trials are numbered and seeded; each is a line of results/torture.jsonl, and a run of the same code goes on with the first number that is not there.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import describe_machine
from qlora.core.dvc_lock import fingerprint
from tests.pipeline.clone import Clone, new_clone, tiny_rows

RESULTS = Path(__file__).parent / "results" / "torture.jsonl"
RECIPE = Path(__file__).with_name("torture.yaml")
SETTINGS: dict[str, dict[str, Any]] = {
    "32-bit": {},
    "4-bit": {"base_model__load_in_4bit": True},
    "two processes": {"hardware__num_processes": 2, "hardware__per_device_train_batch_size": 1},
}
COMMANDS = {
    "repro": "dvc repro",
    "exp run": "dvc exp run",
    "temp": "dvc exp run --temp",
    "queue": "dvc exp run --queue && dvc queue start",
}
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1")
KILLS_A_TRIAL = 4
RERUNS = 3
"""Of a command that nobody kills any more; the record says how many it took."""
EDITED = "README.md"
"""A tracked file that no stage depends on."""
CODE = ("qlora", "stages", "tools", "dvc.yaml", "requirements.txt", "benchmarks/torture.py", "benchmarks/torture.yaml")
PATIENCE_SECONDS = 240


class Reference(NamedTuple):
    pristine: Path
    outputs: dict[str, bytes]
    lock: bytes
    seconds: float


class Failure(Exception):  # noqa: N818 - an outcome, not a bug of this program
    """A trial did not end as it must."""


def code() -> str:
    """Changes with whatever a trial tries."""
    root = Path(__file__).parents[1]
    found = [root / name for name in CODE]
    return fingerprint({}, (file for path in found for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))))


def unrun(path: Path) -> Clone:
    """A checkout in which nothing ran: a training of some seconds with several checkpoints."""
    raw = {"data/raw/micro/train.jsonl": tiny_rows("train", 60), "data/raw/micro/test.jsonl": tiny_rows("test", 6)}
    return new_clone(path, RECIPE, raw)


def references(folder: Path, settings: Sequence[str]) -> dict[str, Reference]:
    """For each setting a checkout in which nothing ran, and what a run that was left alone makes there."""
    found = {}
    for name in settings:
        clone = unrun(folder / name)
        clone.set(**SETTINGS[name])
        clone.commit("settings")
        shutil.copytree(clone.path, folder / f"{name}-pristine", symlinks=True)
        began = time.monotonic()
        clone.repro()
        found[name] = Reference(folder / f"{name}-pristine", clone.outputs(), (clone.path / "dvc.lock").read_bytes(), time.monotonic() - began)
    return found


def processes(folder: Path, *words: str) -> list[int]:
    """Processes that work in the folder or below it and have one of the words in their command line; all without words."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            inside = (process / "cwd").resolve().is_relative_to(folder)
            zombie = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if inside and not zombie and (not words or any(word in line for word in words)):
            found.append(int(process.name))
    return found


def until_quiet(folder: Path, why: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := processes(folder):
        if time.monotonic() > deadline:
            lines = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200] for pid in left if Path(f"/proc/{pid}").exists()]
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise Failure(f"{why}: {lines}")
        time.sleep(0.1)


class Trial:
    def __init__(self, number: int, seed: int, all_references: Mapping[str, Reference], folder: Path, most_kills: int = KILLS_A_TRIAL) -> None:
        self.rng = random.Random(f"{seed} {number}")
        self.settings = self.rng.choice(list(all_references))
        self.mode = self.rng.choice(list(COMMANDS))
        self.reference = all_references[self.settings]
        self.clone = Clone(folder / f"trial-{number}")
        self.log = folder / f"trial-{number}.log"
        self.most_kills = most_kills
        self.record: dict[str, Any] = {"trial": number, "seed": seed, "settings": self.settings, "command": COMMANDS[self.mode], "kills": []}

    def run(self) -> dict[str, Any]:
        shutil.copytree(self.reference.pristine, self.clone.path, symlinks=True)
        (self.clone.path / EDITED).write_text(f"edited before trial {self.record['trial']}\n", encoding="utf-8")
        try:
            for _ in range(self.most_kills):
                if self._attempt(killed=True):
                    break
                self._recover()
            for rerun in range(1, RERUNS + 1):
                self.record["reruns"] = rerun
                if self._attempt(killed=False):
                    break
                self._recover()
            self._check()
            self.record["ended"] = "same bytes"
        except (Failure, AssertionError) as failure:
            self.record["ended"] = f"FAILED: {failure}"[:2000]
            return self.record
        finally:
            log = self.log.read_text(encoding="utf-8", errors="replace")
            self.record["resumed"] = log.count("resuming from checkpoint")
            self.record["taken_over"] = log.count("reusing the finished adapter")
        shutil.rmtree(self.clone.path)
        self.log.unlink()
        return self.record

    def _attempt(self, *, killed: bool) -> bool:
        """Whether the command ended well."""
        with self.log.open("ab") as log:
            log.write(f"\n##### {COMMANDS[self.mode]}\n".encode())
            log.flush()
            process = subprocess.Popen(
                ["/bin/bash", "-c", COMMANDS[self.mode]],
                cwd=self.clone.path,
                env=self.clone.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            if killed:
                time.sleep(self.rng.uniform(0.3, 0.8 * self.reference.seconds))
                self._kill()
            try:
                status = process.wait(timeout=PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                until_quiet(self.clone.path, "the command did not end", 0)
                process.wait()
                return False
        # A queue's worker works on without the command; what was killed must end soon.
        until_quiet(self.clone.path, "a process goes on", PATIENCE_SECONDS)
        return status == 0

    def _kill(self) -> None:
        victims = {
            "dvc": processes(self.clone.path, "bin/dvc", "-m dvc"),
            "stage": processes(self.clone.path, "-m stages."),
            "one of the stage": [],
            "all": processes(self.clone.path),
        }
        if len(victims["stage"]) > 1:
            victims["one of the stage"] = [self.rng.choice(victims["stage"])]
        there = [name for name, found in victims.items() if found]
        if not there:
            return
        name = self.rng.choice(there)
        sent = self.rng.choice(SIGNALS if "stage" in name else SIGNALS[:3])
        doing = ["".join(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[2:3]) for pid in victims["stage"] if Path(f"/proc/{pid}").exists()]
        reached = 0
        for pid in victims[name]:
            try:
                os.kill(pid, getattr(signal, sent))
                reached += 1
            except ProcessLookupError:
                continue
        if reached:
            self.record["kills"].append(f"{sent} to {name}" + (f" during {doing[0]}" if doing else ""))

    def _recover(self) -> None:
        """By what doctor prints, if anything."""
        for line in self._doctor("--commands").stdout.splitlines():
            if line.startswith("dvc repro"):
                continue
            self.record.setdefault("fixed_by", []).append(line)
            with self.log.open("ab") as log:
                log.write(f"\n##### {line}\n".encode())
                log.flush()
                subprocess.run(["/bin/bash", "-c", line], cwd=self.clone.path, env=self.clone.environment, stdout=log, stderr=log, check=False)

    def _doctor(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "tools.doctor", *arguments]
        return subprocess.run(
            command, cwd=self.clone.path, env=self.clone.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )

    def _check(self) -> None:
        until_quiet(self.clone.path, "a process is left", 10)
        left = [str(path) for path in (self.clone.path / ".dvc/tmp/checkpoints").glob("*/*") if path.name not in ("finished", "lock")]
        if left:
            raise Failure(f"left behind: {left}")
        branch = self.clone.run("git", "symbolic-ref", "--short", "HEAD").strip()
        if branch != "main":
            raise Failure(f"HEAD is on {branch}")
        edit = f"edited before trial {self.record['trial']}"
        if edit not in (self.clone.path / EDITED).read_text(encoding="utf-8"):
            stashes = self.clone.run("git", "stash", "list", "--format=%gd").split()
            if not any(edit in self.clone.run("git", "show", f"{name}:{EDITED}") for name in stashes):
                raise Failure(f"the edit of {EDITED} is lost")
            self.record["edit"] = "in a stash"
        if self.mode in ("temp", "queue"):
            names = self.clone.run("dvc", "exp", "list", "--name-only").split()
            if not names:
                raise Failure("no experiment was made")
            self.clone.run("dvc", "exp", "apply", names[0])
        outputs = self.clone.outputs()
        different = sorted(name for name in outputs.keys() | self.reference.outputs.keys() if outputs.get(name) != self.reference.outputs.get(name))
        if different:
            raise Failure(f"other bytes: {different}")
        if (self.clone.path / "dvc.lock").read_bytes() != self.reference.lock:
            raise Failure("another dvc.lock")
        status = self.clone.run("dvc", "status")
        if "up to date" not in status:
            raise Failure(f"dvc status: {status}")
        # The edited file, and a stash with it, are nobody's damage.
        # The command that starts a queue's worker ends well, whoever kills the worker later.
        self._recover()
        doctor = self._doctor()
        if doctor.returncode or "nothing found" not in doctor.stdout:
            raise Failure(f"doctor: {doctor.stdout}")


def torture(
    kills: int,
    minutes: float,
    seed: int,
    jobs: int,
    results: Path,
    made: Mapping[str, Reference] | None = None,
    kills_a_trial: int = KILLS_A_TRIAL,
) -> Counter[str]:
    """Trials, each with one of the settings, until there are so many kills or the time is over; what they ended in, and `kills`.

    Args:
        made: References by their settings, where they are there already; made here for all settings otherwise.
    """
    known = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
    this = code()
    done = [record for record in known if record["seed"] == seed and record.get("code") == this]
    counts: Counter[str] = Counter()

    def count(record: dict[str, Any]) -> None:
        counts["kills"] += len(record["kills"])
        counts["failed" if record["ended"].startswith("FAILED") else "same bytes"] += 1

    for record in done:
        count(record)
    next_number = 1 + max((record["trial"] for record in done), default=-1)
    deadline = time.monotonic() + 60 * minutes
    if counts["kills"] >= kills:
        return counts
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ThreadPoolExecutor(jobs) as pool:
        made = made or references(Path(folder), tuple(SETTINGS))
        kept = Path(tempfile.gettempdir()) / "torture-failures"
        while counts["kills"] < kills and time.monotonic() < deadline:
            numbers = range(next_number, next_number + jobs)
            next_number += jobs
            for record in pool.map(lambda number: Trial(number, seed, made, Path(folder), kills_a_trial).run(), numbers):
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**record, "code": this, "machine": describe_machine()}) + "\n")
                count(record)
                print(
                    f"trial {record['trial']}: {record['settings']}, {record['command']}: {', '.join(record['kills'])}: {record['ended']}", flush=True
                )
                if record["ended"].startswith("FAILED"):
                    kept.mkdir(exist_ok=True)
                    for path in Path(folder).glob(f"trial-{record['trial']}*"):
                        shutil.move(path, kept / f"{seed}-{path.name}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    # Begun by nohup or in a shell's background, it would hand on that these are ignored.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    counts = torture(arguments.kills, arguments.minutes, arguments.seed, arguments.jobs, arguments.results)
    print(f"{counts['kills']} kills, {counts['same bytes']} trials ended with the same bytes, {counts['failed']} did not")
    sys.exit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    main()
