"""Run the benchmarks that compare, one after another, and write docs/performance.md from what they found.

    python -m benchmarks [NAME ...]     all of them, or those named; each writes its results/NAME.json

One line for each; one that fails keeps its earlier result, the others go on, and the whole ends with 1.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from benchmarks import performance

NAMES = ("startup", "repro", "prepare", "train_cpu", "generate", "checkpoint_cost", "gpu")


def run_in_turn(commands: Mapping[str, Sequence[str]]) -> list[str]:
    """Say of each how long it took, and of one that failed the end of what it said; the names of those that did."""
    failed = []
    for name, command in commands.items():
        began = time.monotonic()
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
            status = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, check=False).returncode
            print(f"{name}: {time.monotonic() - began:.0f} s" + (f", failed with {status}" if status else ""), flush=True)
            if status:
                failed.append(name)
                said.seek(0)
                print(said.read()[-2000:], file=sys.stderr, flush=True)
    return failed


def gpu_is_there() -> bool:
    """Asked in a process of its own: this one stays small beside what it measures."""
    code = "import torch; print(torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.strip() == "True"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", choices=NAMES, help=", ".join(NAMES))
    names = parser.parse_args().names or NAMES
    commands = {name: [sys.executable, "-m", f"benchmarks.{name}"] for name in names}
    if "gpu" in commands and not gpu_is_there():
        del commands["gpu"]
        print("gpu: left out, torch sees no GPU here", flush=True)
    failed = run_in_turn(commands)
    performance.write()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
