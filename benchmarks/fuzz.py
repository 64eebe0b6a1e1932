"""Damaged and hostile files through `prepare`, in this process and as whole processes: one message or a result, nothing else.

    python -m benchmarks.fuzz [--cases 20000] [--processes 200] [--seed 0]     writes results/fuzz.json

Each case is a good parquet, JSON or params file with some bytes changed, cut, repeated or exchanged for tokens of its format. It must be read, or
refused by one of this project's errors, within the limits of time and memory; a whole process must end with 0, 2 or 3, without a traceback, and
leave what was prepared before as it was.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML

from benchmarks.machine import describe_machine
from qlora import params
from qlora.core.errors import UserFacingError
from qlora.params import Params
from qlora.params.data import DataParams
from qlora.params.runtime import RuntimeParams
from stages.prepare import prepare

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
ROOT = Path(__file__).parents[1]
MOST_SECONDS, MOST_BYTES = 10.0, 1 << 30
TOKENS: dict[str, list[bytes]] = {
    ".jsonl": [
        b"null",
        b"[]",
        b"{}",
        b'"\\ud800"',
        b"\\u0000",
        b"1e999",
        b"-0",
        b"[" * 3000,
        b'{"messages":',
        b"\xff\xfe",
        b"\n",
        b"\r",
        b'"role":',
        b"NaN",
    ],
    ".json": [b"null", b"[]", b"{}", b"]", b",", b"[" * 3000, b'"', b"\xc3", b"\xef\xbb\xbf"],
    ".yaml": [
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!python/object:os.system ",
        b"[" * 500,
        b"null",
        b"~",
        b"1e999",
        b"\t",
        b"---\n",
        b"{",
        b": ",
        b"? ",
        b"| ",
        b"\x00",
    ],
    ".parquet": [b"PAR1", b"\x00" * 8, b"\xff" * 8, b"\x15\x00", b"\x7f\xff\xff\xff"],
}


def good_files(folder: Path) -> list[Path]:
    """One of each kind, small."""
    rows = [
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": str(n)}], "category": "ab"[n % 2]}
        for n in range(40)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "good.parquet", compression="none")
    pq.write_table(pa.Table.from_pylist(rows), folder / "packed.parquet", compression="zstd", row_group_size=7)
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "good.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "good.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    return sorted(folder.iterdir())


def mutated(content: bytes, suffix: str, rng: random.Random) -> bytes:
    """The content with one to six changes."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(changed) + 1)
        end = min(len(changed), place + rng.choice((1, 1, 2, 8, 64, 512)))
        kind = rng.randrange(6)
        if kind == 0 and changed:
            changed[min(place, len(changed) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[place:end]
        elif kind == 2:
            changed[place:end] = rng.randbytes(end - place)
        elif kind == 3:
            changed[place:place] = changed[place:end] * rng.choice((1, 3, 50))
        elif kind == 4:
            changed[place:place] = rng.choice(TOKENS[suffix])
        elif kind == 5 and rng.random() < 0.3:
            del changed[place:]
    return bytes(changed)


def run_case(path: Path, folder: Path, values: params.Params) -> str:
    """How the file was taken: "ok", or the code of the error that refused it."""
    try:
        if path.suffix == ".yaml":
            params.load(path)
        else:
            data: DataParams = values.data.model_copy(
                update={"train_file": str(path), "test_file": str(path), "validation_fraction": 0.2, "test_fraction": 0.2}
            )
            runtime: RuntimeParams = values.runtime.model_copy(update={"num_workers": 1, "progress": False})
            prepare(Params.model_construct(data=data, runtime=runtime), prepared=folder / "prepared", report=folder / "report.json", notes=folder)
    except UserFacingError as error:
        return error.code
    return "ok"


def in_process(cases: int, seed: int) -> dict[str, Any]:
    values = params.load(ROOT / "params.yaml")
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "good").mkdir()
        files = good_files(folder / "good")
        for number in range(cases):
            source = files[number % len(files)]
            path = folder / f"case{source.suffix}"
            path.write_bytes(mutated(source.read_bytes(), source.suffix, rng))
            began = time.monotonic()
            try:
                outcomes[f"{source.suffix} {run_case(path, folder, values)}"] += 1
            except BaseException:
                kept = Path(tempfile.gettempdir()) / f"fuzz-{seed}-{number}{source.suffix}"
                kept.write_bytes(path.read_bytes())
                print(f"case {number}, kept as {kept}:", file=sys.stderr, flush=True)
                raise
            slowest = max(slowest, time.monotonic() - began)
            assert slowest < MOST_SECONDS, f"case {number} took {slowest:.1f} s"
    return {"cases": cases, "slowest_seconds": round(slowest, 3), "outcomes": dict(sorted(outcomes.items()))}


def repeated(text: str, count: int, folder: Path, *, in_one_row: bool) -> Path:
    """A small parquet file in which one long text stands many times: its dictionary holds it once."""
    turn = {"role": "user", "content": text}
    answer = {"role": "assistant", "content": "ok"}
    rows = [{"messages": [turn, answer] * count}] if in_one_row else [{"messages": [turn, answer]}] * count
    path = folder / "bomb.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
    return path


def million_columns(folder: Path) -> Path:
    path = folder / "wide.jsonl"
    path.write_text("{" + ",".join(f'"c{number}":1' for number in range(1_000_000)) + "}\n", encoding="utf-8")
    return path


def long_string(folder: Path) -> Path:
    path = folder / "long.jsonl"
    messages = [{"role": "user", "content": "x" * 100_000_000}, {"role": "assistant", "content": "ok"}]
    path.write_text(
        "".join(json.dumps({"messages": part}) + "\n" for part in (messages, [{**messages[0], "content": "short"}, messages[1]])), encoding="utf-8"
    )
    return path


def anchors(folder: Path) -> Path:
    """Params in which one list stands for ten to the ninth."""
    path = folder / "anchors.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    path.write_text("\n".join(lines) + "\nlora: {r: *a8, target_modules: *a8}\n", encoding="utf-8")
    return path


# The kernel's own count of this program's most memory, and of the most that a process had which it started to read with; that of wait4 begins
# with what the process that forked it held.
MEASURED = """
import atexit, re, resource, runpy, sys
own = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
atexit.register(lambda: open("held", "w").write(str(own() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)))
sys.argv[0] = "stages.prepare"
runpy.run_module("stages.prepare", run_name="__main__", alter_sys=True)
"""

NUL_ROW = b'{"messages": [{"role": "user", "content": "%d\\u0000b"}, {"role": "assistant", "content": "ok"}]}\n'

BOMBS: dict[str, Callable[[Path], Path]] = {
    "500 MB of one text, a row each": lambda folder: repeated("y" * 10_000, 50_000, folder, in_one_row=False),
    "500 MB of one text in one row": lambda folder: repeated("y" * 10_000, 50_000, folder, in_one_row=True),
    "a million columns": million_columns,
    "a string of 100 MB": long_string,
    "a million anchors": anchors,
    "params of 50 MB": lambda folder: _written(folder / "large.yaml", b"lora: {r: 8}\n" * 4_000_000),
    "params nested 50,000 deep": lambda folder: _written(folder / "deep.yaml", b"a: " + b"[" * 50_000),
    "JSON nested a million deep": lambda folder: _written(folder / "deep.jsonl", b'{"messages": ' + b"[" * 1_000_000 + b"\n"),
    "NUL": lambda folder: _written(folder / "nul.jsonl", b"".join(NUL_ROW % number for number in range(40))),
    "zeros": lambda folder: _written(folder / "zeros.jsonl", b"\0" * 50_000_000),
}


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def whole_processes(count: int, seed: int) -> dict[str, Any]:
    """`python -m stages.prepare` on damaged files, and on bombs; what was prepared before stays."""
    rng = random.Random(f"processes {seed}")
    outcomes: Counter[str] = Counter()
    slowest, peak = 0.0, 0
    bombs = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "good").mkdir()
        files = good_files(folder / "good")
        (folder / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
        (folder / "requirements.txt").write_text("", encoding="utf-8")
        _set(folder, folder / "good/good.jsonl")
        assert _prepared(folder)[0] == 0
        before = _hashes(folder / "prepared")
        cases: list[tuple[str, Callable[[], Path]]] = []
        for number in range(count):
            source = files[number % len(files)]
            content = mutated(source.read_bytes(), source.suffix, rng)
            cases.append((f"{number}", lambda source=source, content=content: _written(folder / f"case{source.suffix}", content)))  # type: ignore[misc]
        cases += [(name, lambda make=make: make(folder)) for name, make in BOMBS.items()]  # type: ignore[misc]
        for case, make in cases:
            path = make()
            _set(folder, path)
            status, output, seconds, bytes_held = _prepared(folder)
            text = f"{case}: exit {status}, {seconds:.1f} s, {bytes_held / 1e6:,.0f} MB: {output[-300:]}"
            assert status in (0, 2, 3), text
            assert "Traceback" not in output, text
            assert seconds < MOST_SECONDS, text
            assert bytes_held < MOST_BYTES, text
            assert not list(folder.rglob("*.partial")), text
            if status == 0:
                _set(folder, folder / "good/good.jsonl")
                _prepared(folder)
            assert _hashes(folder / "prepared") == before, text
            outcomes[f"exit {status}"] += 1
            slowest, peak = max(slowest, seconds), max(peak, bytes_held)
            if case in BOMBS:
                bombs[case] = {"exit": status, "seconds": round(seconds, 2), "megabytes": round(bytes_held / 1e6)}
    return {"processes": count, "slowest_seconds": round(slowest, 2), "peak_bytes": peak, "outcomes": dict(outcomes), "bombs": bombs}


def _set(folder: Path, path: Path) -> None:
    """Params that read this file; a params file takes the place of them all."""
    if path.suffix == ".yaml":
        (folder / "params.yaml").write_bytes(path.read_bytes())
        return
    yaml = YAML()
    values = yaml.load(ROOT / "params.yaml")
    values["data"].update({"train_file": str(path), "test_file": str(path), "validation_fraction": 0.2, "test_fraction": 0.2})
    values["runtime"].update({"allow_other_versions": True, "progress": False, "num_workers": 1})
    yaml.dump(values, folder / "params.yaml")


def _prepared(folder: Path) -> tuple[int, str, float, int]:
    """Exit code, output, seconds and peak memory."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "--prepared", "prepared", "--report", "report.json", "--notes", "."],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    seconds = time.monotonic() - began
    held = folder / "held"
    kilobytes = int(held.read_text(encoding="utf-8")) if held.exists() else 0
    held.unlink(missing_ok=True)
    return done.returncode, done.stdout.decode(errors="replace"), seconds, 1024 * kilobytes


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"machine": describe_machine(), "seed": arguments.seed}
    # First: making the bombs takes memory of its own.
    record["in_process"] = in_process(arguments.cases, arguments.seed)
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
    assert peak < MOST_BYTES, f"{peak / 1e6:,.0f} MB"
    record["in_process"]["peak_bytes"] = peak
    record["whole_processes"] = whole_processes(arguments.processes, arguments.seed)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
