"""Is one revision's model better than another's, or is it noise? Paired by example, with 95 % intervals.

    python -m tools.compare REV1              the workspace against REV1: a commit, branch, tag or the name of an experiment
    python -m tools.compare REV1 REV2         REV2 against REV1
    python -m tools.compare HEAD --fail-if-worse exact_match --fail-if-worse nll    exit code 4 when one of them is shown to be worse

Read from data/predictions/tuned.jsonl of each, from DVC's cache (`dvc fetch --all-commits` where it is not there); nothing runs. Both must
come from the same test set.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from qlora import command
from qlora.errors import InputError

if TYPE_CHECKING:
    from qlora.comparison import Difference

PREDICTIONS = Path("data/predictions/tuned.jsonl")
WORKSPACE = "workspace"
WORSE = 4
"""Exit code of --fail-if-worse."""


def predictions(revision: str) -> list[dict[str, Any]]:
    """The tuned model's answers at a revision.

    Raises:
        InputError: there is no such revision, its predictions are not in the cache, or another version of this project made them.
    """
    from qlora.measures import MEASURES  # noqa: PLC0415 - a second that --help need not take

    try:
        rows = [orjson.loads(line) for line in _content(revision).splitlines()]
        if not rows:
            raise ValueError("it holds no line")
        for row in rows:
            _ = row["id"], row["turn"], row["seed"], row["tokens"]
            for measure in MEASURES.values():
                for counted in measure.rows([row]):
                    measure.statistics(counted)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "compare-format",
            f"{PREDICTIONS} of {revision} is damaged or was made by another version of this project ({error!r}): run `dvc repro` at that revision",
        ) from None
    return rows


def _content(revision: str) -> bytes:
    if revision == WORKSPACE:
        if not PREDICTIONS.is_file():
            raise InputError("compare-missing", f"{PREDICTIONS} does not exist: run `dvc repro` first")
        return PREDICTIONS.read_bytes()
    from dvc.api import DVCFileSystem  # noqa: PLC0415 - a second that --help need not take
    from dvc.scm import RevError, SCMError  # noqa: PLC0415

    try:
        content: bytes = DVCFileSystem(".", rev=revision).read_bytes(f"/{PREDICTIONS}")
    except (RevError, SCMError) as error:
        raise InputError("compare-revision", f"{revision!r} is no commit, branch, tag or experiment here: {error}") from None
    except FileNotFoundError as error:
        raise InputError(
            "compare-missing", f"{PREDICTIONS} of {revision} is not at hand ({error}): `dvc fetch --all-commits`, or `dvc repro` at that revision"
        ) from None
    return content


def table(differences: "Mapping[str, Difference]", before: str, after: str) -> str:
    """One line per measure."""
    heads = ("", before, after, "difference", "95 % interval", "p(better)", "")
    rows = [
        (
            name,
            f"{found.before:.4f}",
            f"{found.after:.4f}",
            f"{found.delta:+.4f}",
            f"{found.low:+.4f} to {found.high:+.4f}",
            "" if found.p_better is None else f"{found.p_better:.3f}",
            found.verdict,
        )
        for name, found in differences.items()
    ]
    widths = [max(len(row[place]) for row in (heads, *rows)) for place in range(len(heads))]
    aligned = (
        "  ".join(cell.ljust(width) if place in (0, 6) else cell.rjust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in (heads, *rows)
    )
    return "\n".join(line.rstrip() for line in aligned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="REV1")
    parser.add_argument("after", metavar="REV2", nargs="?", default=WORKSPACE)
    parser.add_argument("--fail-if-worse", metavar="SCORE", action="append", default=[], help="may be given several times")
    arguments = parser.parse_args()
    from qlora.comparison import FEWEST, compare  # noqa: PLC0415 - a second that --help need not take
    from qlora.measures import MEASURES  # noqa: PLC0415

    directed = [name for name, measure in MEASURES.items() if measure.better != "neither"]
    unknown = [name for name in arguments.fail_if_worse if name not in directed]
    if unknown:
        raise InputError("compare-score", f"{unknown[0]!r} is no score that can be worse: known are {', '.join(directed)}")
    sides = [predictions(revision) for revision in (arguments.before, arguments.after)]
    differences = compare(*sides)
    print(table(differences, arguments.before, arguments.after))
    conversations, answers = len({row["id"] for row in sides[0]}), sum(row["answer"] is not None for row in sides[0])
    print(f"\n{conversations:,} conversations, {answers:,} answers; better and worse where the interval leaves out 0")
    if conversations < FEWEST:
        print(f"fewer than {FEWEST} conversations: too few for a verdict")
    absent = [name for name in MEASURES if name not in differences]
    if absent:
        print(f"{' and '.join(absent)} can't be compared: the two took the same text for other tokens (bits_per_byte can)")
    if lost := [name for name in arguments.fail_if_worse if name in absent]:
        raise InputError("compare-score", f"{lost[0]} can't be compared between {arguments.before} and {arguments.after}: use bits_per_byte")
    worse = [name for name in arguments.fail_if_worse if differences[name].verdict == "worse"]
    if worse:
        print(f"worse: {', '.join(worse)}", file=sys.stderr)
        sys.exit(WORSE)


if __name__ == "__main__":
    command.run(main)
