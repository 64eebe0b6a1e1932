"""Feed the project's commands thousands of hostile or damaged files, and count what does not end in one message.

    python -m benchmarks.attack [--inputs 3000] [--seed 0] [--kinds template tokenizer] [--real DIR] [--processes 50]

Each input is a few changed files in a small checkout in which the pipeline ran, and a command. It must end within 40 s with 0, 2 or 3; without a
traceback or a character that steers a terminal; and no byte may differ afterwards that is not the command's own: of the checkout, of the home
folder, or of files beside them. The libraries are imported once and each input runs in a forked process; some run as processes of their own.
Inputs are numbered and seeded. `--only KIND:NUMBER` runs one again and shows what it says.
"""

import argparse
import importlib
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.attack_inputs import KINDS, Attack, Case, Seeds
from benchmarks.attack_server import HostileHub, serving
from benchmarks.machine import describe_machine

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "attack.json"
SECONDS = 40
"""Most that an input may take."""
MEMORY_BYTES = 5 << 30
"""Of address space beyond what the imported libraries have."""
ALLOWED_CODES = (0, 2, 3)
OWN = {
    "tools.pin": ("models/base/attacked.json", "models/base/attacked", "home/hub/*"),
    "tools.fetch": ("data/raw/*attacked*", "data/raw/.gitignore", ".dvc/config.local", ".dvc/cache/*"),
    "tools.merge": ("models/merged*", "metrics/merge.json"),
    "tools.card": ("reports/model_card.md", "reports/environment.json"),
    "tools.recipes": ("params.yaml",),
    "tools.verify": ("reports/reproduction.json",),
    "stages.prepare": ("data/prepared*", "reports/prepare.json*", "metrics/throughput.json", "metrics/environment.json"),
    "stages.predict": ("data/predictions*", "metrics/throughput.json", "metrics/environment.json"),
    "stages.train": ("models/adapter*", "reports/train.json", "metrics/*.csv", "metrics/throughput.json", "metrics/environment.json"),
    "stages.evaluate": ("metrics/*", "reports/evaluation.json", "reports/report.html"),
}
"""What each command may write, beside .dvc/tmp and Git's index."""
EVERYBODYS = (".dvc/tmp/*", ".dvc/tmp", ".git/index")
SHARES = {
    "template": 600,
    "tokenizer": 600,
    "safetensors": 510,
    "adapter": 510,
    "model": 250,
    "project": 600,
    "hub": 550,
}
"""Inputs of each kind in a run of 3620."""


class Outcome(NamedTuple):
    code: int | None
    """Exit code; negative: the signal that ended it; None: it did not end."""
    seconds: float
    output: str
    changed: list[str]
    """Paths with other bytes that are not the command's own."""
    left: list[str]
    """Files left in the folder for temporary ones."""

    def failures(self) -> list[str]:
        """What the project promises, and did not keep."""
        found = []
        if self.code is None:
            found.append("endless")
        elif self.code not in ALLOWED_CODES:
            found.append(f"exit {self.code}")
        if "Traceback (most recent call last)" in self.output or "Exception ignored in" in self.output:
            found.append("traceback")
        if "panicked at" in self.output and "error:" not in self.output:
            found.append("panic")
        if any(not (character.isprintable() or character in "\n\t") for character in self.output):
            found.append("control character")
        if self.code in (2, 3) and not self.output.strip():
            found.append("silent")
        if self.changed:
            found.append("changed bytes")
        return found


class Sandbox:
    """A checkout, a home and files beside them, as they are before each input."""

    def __init__(self, place: Path) -> None:
        self.place, self.pristine, self.live = place, place / "pristine", place / "live"
        self.tmp = place / "tmp"

    @property
    def checkout(self) -> Path:
        return self.live / "checkout"

    def make(self) -> None:
        from tests.pipeline.clone import new_clone, tiny_rows

        raw = {"data/raw/micro/train.jsonl": tiny_rows("train", 60), "data/raw/micro/test.jsonl": tiny_rows("test", 8)}
        clone = new_clone(self.pristine / "checkout", ROOT / "tests" / "pipeline" / "micro.yaml", raw)
        clone.set(runtime__num_workers=1, runtime__progress=False)
        clone.repro()
        clone.commit("built")
        clone.run(sys.executable, "-m", "tools.card")
        clone.commit("card")
        for name in ("home/.bashrc", "home/.ssh/id", "beside/canary.txt", "home/hub/canary"):
            path = self.pristine / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{name}: nobody writes here\n", encoding="utf-8")
        subprocess.run(["git", "config", "--global", "user.name", "attack"], env={**os.environ, "HOME": str(self.pristine / "home")}, check=True)
        shutil.copytree(self.pristine, self.live, symlinks=True)
        self.tmp.mkdir()

    def state(self) -> dict[str, tuple[int, ...]]:
        """What says whether a file was written: no program can set its ctime."""
        found: dict[str, tuple[int, ...]] = {}
        folders = [str(self.live)]
        start = len(str(self.live)) + 1
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                        found[entry.path[start:]] = (0,)
                    else:
                        status = entry.stat(follow_symlinks=False)
                        found[entry.path[start:]] = (status.st_ctime_ns, status.st_size, status.st_ino, status.st_mode)
        return found

    def differs(self, name: str) -> bool:
        """Whether the path is not what it is in the pristine tree, by its content."""
        ours, theirs = self.live / name, self.pristine / name
        if ours.is_symlink() or theirs.is_symlink():
            return not (ours.is_symlink() and theirs.is_symlink() and os.readlink(ours) == os.readlink(theirs))
        if not (ours.is_file() and theirs.is_file()):
            return not (ours.is_dir() and theirs.is_dir())
        return ours.read_bytes() != theirs.read_bytes()

    def restore(self, names: set[str]) -> None:
        """Restore these paths."""
        for name in sorted(names):
            ours, theirs = self.live / name, self.pristine / name
            if ours.is_dir() and not ours.is_symlink():
                if not theirs.is_dir():
                    shutil.rmtree(ours)
            elif os.path.lexists(ours):
                ours.unlink()
            if theirs.is_dir() and not theirs.is_symlink():
                ours.mkdir(parents=True, exist_ok=True)
            elif os.path.lexists(theirs):
                ours.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(theirs, ours, follow_symlinks=False)
        for path in self.tmp.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


class Runner:
    """Runs inputs in one sandbox, one after the other."""

    def __init__(self, sandbox: Sandbox, hub: HostileHub, real: Path | None) -> None:
        self.sandbox, self.hub = sandbox, hub
        self.seeds = Seeds(sandbox.pristine / "checkout", real)
        self.before = sandbox.state()

    def run(self, case: Case, *, alone: bool = False) -> Outcome:
        """Change the files, run the command, look at what it did, and restore everything."""
        sandbox = self.sandbox
        self.hub.begin(case.hub)
        try:
            with _umask():
                case.apply(sandbox.checkout)
            between = sandbox.state()
            kept = {name: _content(sandbox.live / name) for name in _different(self.before, between)}
            output = sandbox.place / "output"
            begun = time.monotonic()
            code = (self._alone if alone else self._forked)(case, output)
            seconds = time.monotonic() - begun
            after = sandbox.state()
            own = tuple(f"checkout/{pattern}" if not pattern.startswith("home/") else pattern for pattern in (*OWN.get(case.module, ()), *EVERYBODYS))
            touched = _different(between, after)
            changed = [name for name in sorted(touched) if not any(fnmatch(name, pattern) for pattern in own) and self._is_changed(name, kept)]
            left = [path.name for path in sandbox.tmp.iterdir()] if code is not None and code >= 0 else []
            return Outcome(code, seconds, output.read_bytes().decode(errors="replace"), changed, left)
        finally:
            self.hub.end()
            sandbox.restore(_different(self.before, sandbox.state()))
            self.before = sandbox.state()

    def _is_changed(self, name: str, kept: Mapping[str, object]) -> bool:
        path = self.sandbox.live / name
        if name in kept:
            return _content(path) != kept[name]
        return self.sandbox.differs(name)

    def _environment(self, case: Case) -> dict[str, str]:
        live = self.sandbox.live
        return {
            "HOME": str(live / "home"),
            "HF_HOME": str(live / "home"),
            "TMPDIR": str(self.sandbox.tmp),
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_TOKEN": "hf_notARealToken",
            "GIT_CEILING_DIRECTORIES": str(live),
            "HF_HUB_OFFLINE": "0" if case.hub is not None else "1",
            **case.environment,
        }

    def _forked(self, case: Case, output: Path) -> int | None:
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process == 0:
            try:
                self._in_child(case, output)
            finally:
                os._exit(99)
        return _wait(process)

    def _in_child(self, case: Case, output: Path) -> None:
        os.setsid()
        given = os.open(self.sandbox.place / "stdin", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.write(given, case.stdin.encode())
        os.lseek(given, 0, os.SEEK_SET)
        said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, target in ((0, given), (1, said), (2, said)):
            os.dup2(target, number)
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
        os.environ.update(self._environment(case))
        os.chdir(self.sandbox.checkout)
        tempfile.tempdir = None
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
        sys.argv = [case.module, *case.arguments]
        from huggingface_hub import constants

        from qlora.delivery import hub
        from qlora.runtime import command

        constants.HF_HUB_OFFLINE = case.hub is None
        constants.HF_HUB_CACHE = str(self.sandbox.live / "home" / "hub")
        if not case.slow:
            hub.PAUSE_SECONDS = 0.001
        main = importlib.import_module(case.module).main
        try:
            command.run(main)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _alone(self, case: Case, output: Path) -> int | None:
        """As a person types it."""
        environment = {**os.environ, **self._environment(case), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        with output.open("wb") as said, (self.sandbox.place / "stdin").open("w+b") as given:
            given.write(case.stdin.encode())
            given.seek(0)
            command = [sys.executable, "-m", case.module, *case.arguments]
            process = subprocess.Popen(
                command, cwd=self.sandbox.checkout, env=environment, stdin=given, stdout=said, stderr=said, start_new_session=True
            )
            try:
                return process.wait(SECONDS + 10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return None


@contextmanager
def _umask() -> Iterator[None]:
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)


def _content(path: Path) -> object:
    if path.is_symlink():
        return os.readlink(path)
    return path.read_bytes() if path.is_file() and path.stat().st_size < 1 << 26 else path.exists()


def _different(before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def _wait(process: int) -> int | None:
    """The exit code of a child, killed with its children after SECONDS."""
    descriptor = os.pidfd_open(process)
    try:
        ended = bool(select.select([descriptor], [], [], SECONDS)[0])
    finally:
        os.close(descriptor)
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    return os.waitstatus_to_exitcode(status) if ended else None


def import_everything() -> None:
    """What the commands import, once."""
    os.environ.update({"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"})
    for name in ("torch", "peft", "transformers", "trl", "sentencepiece", "huggingface_hub", "httpx2", "pyarrow.parquet", "datasets", "dvc.repo"):
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    import torch

    torch.set_num_threads(1)
    for path in [*(ROOT / "tools").glob("*.py"), *(ROOT / "stages").glob("*.py"), *(ROOT / "qlora").rglob("*.py")]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("tools.benchmark",) and "ray" not in name:
            importlib.import_module(name)
    from transformers.models.auto import modeling_auto, tokenization_auto  # noqa: F401


def attack(
    runner: Runner, kinds: Mapping[str, tuple[Attack, int]], seed: int, first: int, minutes: float, processes: int, log: Callable[[str], None]
) -> dict[str, Any]:
    """Run so many inputs of each kind, and count."""
    totals: dict[str, Any] = {}
    every = max(1, sum(count for _, count in kinds.values()) // max(processes, 1))
    done = 0
    taken: defaultdict[str, float] = defaultdict(float)
    runs: Counter[str] = Counter()
    begun = time.monotonic()
    for kind, (make, count) in kinds.items():
        codes: Counter[str] = Counter()
        failures: Counter[str] = Counter()
        slowest, found, left = 0.0, [], 0
        for number in range(first, first + count):
            if time.monotonic() - begun > minutes * 60:
                break
            done += 1
            case = make(runner.seeds, random.Random(f"{seed}:{kind}:{number}"), number)
            outcome = runner.run(case, alone=done % every == 0 and processes > 0)
            taken[case.module] += outcome.seconds
            runs[case.module] += 1
            if number % 50 == 49:
                log(
                    f"-- {kind}:{number} {time.monotonic() - begun:.0f} s; "
                    + ", ".join(f"{name} {runs[name]}x {taken[name] / runs[name]:.2f}" for name in runs)
                    + "\n"
                )
            codes[str(outcome.code)] += 1
            slowest = max(slowest, outcome.seconds)
            left += bool(outcome.left)
            problems = outcome.failures()
            failures.update(problems)
            if problems:
                found.append({"number": number, "name": case.name, "command": case.module, "problems": problems, "changed": outcome.changed[:5]})
                log(f"!! {kind}:{number} {case.module} {case.name}: {problems} {outcome.changed[:5]} {outcome.seconds:.1f}s\n")
                log(f"{outcome.output[-1500:]}\n")
            elif outcome.seconds > 8:
                log(f"slow {kind}:{number} {case.module} {case.name}: {outcome.seconds:.1f}s {outcome.output[-200:]!r}\n")
        totals[kind] = {
            "inputs": sum(codes.values()),
            "codes": dict(sorted(codes.items())),
            "failures": dict(sorted(failures.items())),
            "slowest_seconds": round(slowest, 1),
            "left_temporary_files": left,
            "found": found,
        }
        print(kind, {name: value for name, value in totals[kind].items() if name != "found"}, flush=True)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=sum(SHARES.values()), help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no input begins after them")
    parser.add_argument("--kinds", nargs="+", choices=sorted(SHARES), default=list(SHARES))
    parser.add_argument("--processes", type=int, default=50, help="inputs that run as processes of their own")
    parser.add_argument("--real", type=Path, help="folder with real tokenizers, to be damaged too")
    parser.add_argument("--only", metavar="KIND:NUMBER", nargs="+", help="run these again, and show them")
    parser.add_argument("--sandbox", type=Path, help="a folder to keep the checkout in for the next run")
    parser.add_argument("--log", type=Path, help="file for what failed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="attack-") as temporary:
        place = arguments.sandbox or Path(temporary)
        sandbox = Sandbox(place)
        if not sandbox.pristine.exists():
            place.mkdir(parents=True, exist_ok=True)
            sandbox.make()
        else:
            shutil.rmtree(sandbox.live, ignore_errors=True)
            shutil.copytree(sandbox.pristine, sandbox.live, symlinks=True)
        import_everything()
        with serving() as hub:
            runner = Runner(sandbox, hub, arguments.real)
            if arguments.only:
                for one in arguments.only:
                    kind, _, number = one.partition(":")
                    case = KINDS[kind](runner.seeds, random.Random(f"{arguments.seed}:{kind}:{number}"), int(number))
                    outcome = runner.run(case)
                    print(f"{one} {case}\n{outcome}\n{outcome.output}\n{outcome.failures()}")
                return
            total = sum(SHARES.values())
            kinds = {kind: (KINDS[kind], max(1, SHARES[kind] * arguments.inputs // total)) for kind in arguments.kinds}
            with (arguments.log or Path(os.devnull)).open("w", encoding="utf-8") as log:

                def write(text: str) -> None:
                    log.write(text)
                    log.flush()

                totals = attack(runner, kinds, arguments.seed, arguments.first, arguments.minutes, arguments.processes, write)
    record = {"seed": arguments.seed, "machine": describe_machine(), "seconds": round(time.monotonic() - begun), "kinds": totals}
    arguments.results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    failed = sum(len(kind["found"]) for kind in totals.values())
    print(f"{sum(kind['inputs'] for kind in totals.values()):,} inputs, {failed} that broke the promise")


if __name__ == "__main__":
    main()
