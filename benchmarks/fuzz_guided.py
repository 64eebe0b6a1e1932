"""Fuzzing that follows the code: bytes that run new lines of this project's readers are kept and changed further, by atheris (libFuzzer).

    python -m pip install atheris==3.0.0
    python -m benchmarks.fuzz_guided [--seconds 300] [--seed 1]     writes results/fuzz_guided.json

Of each input the first byte chooses what it is: params.yaml, JSON lines, a JSON array or parquet. It must be read, or refused by one of this
project's errors. Everything runs in one process here, so a crash inside a library counts too; only Python code steers, so parquet, which
is read in C++, is better served by benchmarks/fuzz.py, which changes good files blindly.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "fuzz_guided.json"
KINDS = (".yaml", ".jsonl", ".json", ".parquet")
INPUT_BYTES = 16_384
CASE_SECONDS = 10
MEMORY_MB = 1024


def fuzz(corpus: Path, seconds: int, seed: int) -> None:
    """Runs until the time is over or an input ends in anything but a result or an error of this project; never returns."""
    import atheris

    with atheris.instrument_imports(include=["qlora", "ruamel"]):
        from qlora import params
        from qlora.core.errors import UserFacingError
        from qlora.data.cleaning import _clean_share
        from qlora.data.formats import FORMATS

    data = params.load(Path("params.yaml")).data
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
    paths = [folder / f"case{kind}" for kind in KINDS]
    formats = list(FORMATS)

    def one(content: bytes) -> None:
        if len(content) < 2:
            return
        path = paths[content[0] % len(KINDS)]
        path.write_bytes(content[2:])
        try:
            if path.suffix == ".yaml":
                params.load(path)
            else:
                read = data.model_copy(update={"format": formats[content[1] % len(formats)]})
                for _ in _clean_share(path, read, is_test=False, share=0, shares=1):
                    pass
        except UserFacingError:
            pass

    options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={INPUT_BYTES}", f"-timeout={CASE_SECONDS}", f"-rss_limit_mb={MEMORY_MB}"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={corpus}-found-", str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.corpus:
        fuzz(arguments.corpus, arguments.seconds, arguments.seed)
        return
    # Not before: what is instrumented must not have been imported.
    from benchmarks.fuzz import good_files
    from benchmarks.machine import describe_machine

    with tempfile.TemporaryDirectory() as name:
        good, corpus = Path(name) / "good", Path(name) / "corpus"
        good.mkdir()
        corpus.mkdir()
        for path in good_files(good):
            (corpus / path.name).write_bytes(bytes([KINDS.index(path.suffix), 0]) + path.read_bytes())
        command = [sys.executable, "-m", "benchmarks.fuzz_guided", "--seconds", str(arguments.seconds), "--seed", str(arguments.seed)]
        done = subprocess.run([*command, "--corpus", str(corpus)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        output = done.stdout.decode(errors="replace")
        for found in Path(name).glob("corpus-found-*"):
            kept = Path(tempfile.gettempdir()) / f"fuzz-{found.name}"
            kept.write_bytes(found.read_bytes())
            print(f"kept as {kept}", file=sys.stderr)
    ended = re.search(r"Done (\d+) runs in (\d+) second", output)
    assert done.returncode == 0, output[-3000:]
    assert ended, output[-3000:]
    features = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", output)
    record: dict[str, Any] = {
        "machine": describe_machine(),
        "seed": arguments.seed,
        "runs": int(ended[1]),
        "seconds": int(ended[2]),
        # Places of the code that were run, and inputs kept for running them: at first and at last.
        "places": [int(features[0][0]), int(features[-1][0])],
        "inputs": [int(features[0][2]), int(features[-1][2])],
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
