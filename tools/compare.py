"""Is one revision's model better than another's, or is it noise? Paired by example, with 95 % intervals.

    python -m tools.compare REV1              the workspace against REV1: a commit, branch, tag or the name of an experiment
    python -m tools.compare REV1 REV2         REV2 against REV1
    python -m tools.compare HEAD --fail-if-worse exact_match --fail-if-worse nll    exit code 4 when one of them is shown to be worse
    python -m tools.compare --all [BASE]      HEAD and all its experiments, ranked by --score (exact_match), each against the best, or against BASE

With --all the best is that of HEAD's test set; what was measured on another one stands below the table.

Scored again from data/predictions/tuned.jsonl and data/prepared/test.jsonl of each, from DVC's cache (`dvc fetch --all-commits` where they are not
there); nothing runs. Both must come from the same test set.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from qlora import params
from qlora.core.errors import InputError, translate_errors
from qlora.runtime import command
from qlora.scoring.table import aligned, interval, signed, table

PREDICTIONS, TEST = Path("data/predictions/tuned.jsonl"), Path("data/prepared/test.jsonl")
WORKSPACE = "workspace"
WORSE = 4
"""Exit code of --fail-if-worse."""


def predictions(revision: str) -> list[dict[str, Any]]:
    """The tuned model's answers at a revision, scored.

    Raises:
        InputError: there is no such revision, its outputs are not in the cache, or another version of this project made them.
    """
    from qlora.core.conversation import Conversation  # noqa: PLC0415 - a second that --help need not take
    from qlora.scoring.measures import MEASURES, scored  # noqa: PLC0415

    contents = [_content(path, revision) for path in (PREDICTIONS, TEST)]
    what = f"{PREDICTIONS} or {TEST} of {revision}"
    problem, way_out = "is damaged or was made by another version of this project", "run `dvc repro` at that revision"
    with translate_errors("compare-format", what, problem, way_out):
        answers, test = ([orjson.loads(line) for line in content.splitlines()] for content in contents)
        if not answers:
            raise ValueError("it holds no line")
        try:
            rows = scored(answers, [Conversation.from_record(record) for record in test])
        except InputError as error:
            raise ValueError(error.message) from None
        for row in rows:
            _ = row["id"], row["turn"], row["seed"], row["tokens"]
            for measure in MEASURES.values():
                for counted in measure.rows([row]):
                    measure.statistics(counted)
    return rows


def _content(path: Path, revision: str) -> bytes:
    if revision == WORKSPACE:
        if not path.is_file():
            raise InputError("compare-missing", f"{path} does not exist: run `dvc repro` first")
        return path.read_bytes()
    from dvc.api import DVCFileSystem  # noqa: PLC0415 - a second that --help need not take
    from dvc.scm import RevError, SCMError  # noqa: PLC0415

    try:
        content: bytes = DVCFileSystem(".", rev=revision).read_bytes(f"/{path}")
    except (RevError, SCMError) as error:
        raise InputError("compare-revision", f"{revision!r} is not a commit, branch, tag or experiment here: {error}") from None
    except FileNotFoundError as error:
        raise InputError(
            "compare-missing", f"{path} of {revision} is not here ({error}): `dvc fetch --all-commits`, or `dvc repro` at that revision"
        ) from None
    return content


class Side(NamedTuple):
    """A revision with its answers, or why there are none."""

    name: str
    changed: str
    """Its params that are not HEAD's, as `dvc exp run -S` takes them."""
    rows: list[dict[str, Any]]
    reason: str = ""


def experiments() -> dict[str, str]:
    """Commits by name: HEAD, and its experiments as `dvc exp show` lists them.

    Raises:
        InputError: this is no repository of Git and DVC with a commit.
    """
    from dvc.exceptions import DvcException  # noqa: PLC0415 - a second that --help need not take
    from dvc.repo import Repo  # noqa: PLC0415
    from dvc.scm import SCMError  # noqa: PLC0415

    try:
        with Repo(".") as repo:
            listed = repo.experiments.ls()
            found = {name: revision for experiments in listed.values() for name, revision in experiments}
    except (DvcException, SCMError) as error:
        raise InputError("compare-revision", f"the experiments of HEAD can't be listed: {error}") from None
    return {"HEAD": "HEAD", **found}


def sides(revisions: Mapping[str, str]) -> list[Side]:
    """Each revision with what it changed of HEAD's params."""
    before = _params("HEAD")
    found = []
    for name, revision in revisions.items():
        after = _params(revision)
        changed = " ".join(f"{key}={after.get(key)}" for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key))
        try:
            found.append(Side(name, changed, predictions(revision)))
        except InputError as error:
            found.append(Side(name, changed, [], error.message.replace(revision, name)))
    return found


def _params(revision: str) -> dict[str, str]:
    """params.yaml at a revision, keys with their section, values as YAML writes them; empty where it can't be read."""
    from dvc.api import DVCFileSystem  # noqa: PLC0415 - a second that --help need not take

    try:
        sections = YAML(typ="safe", pure=True).load(DVCFileSystem(".", rev=revision).read_text("/params.yaml"))
        values = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    except (FileNotFoundError, YAMLError, AttributeError, ValueError, RecursionError):
        return {}
    return {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in values.items()}


def ranked(found: Sequence[Side], score: str, base: str | None, *, resamples: int) -> tuple[str, list[str], int]:
    """A table, the best first, why each side that is not in it isn't, and the number of conversations that the table is of.

    Args:
        base: Name of the side that each is compared with; None: the best of those that can be compared with HEAD.
        resamples: Of the bootstrap behind each interval.

    Raises:
        InputError: no side has answers.
    """
    from qlora.scoring.measures import MEASURES, values  # noqa: PLC0415 - a second that --help need not take

    sign = -1 if MEASURES[score].better == "higher" else 1
    points = {side.name: point for side in found if side.rows and (point := values(side.rows)[score]) is not None}
    order = sorted((side for side in found if side.name in points), key=lambda side: (sign * points[side.name], side.name))
    left_out = [f"{side.name}: {side.reason or f'{score} is not defined for its answers'}" for side in found if side.name not in points]
    if not order:
        raise InputError("compare-nothing", "neither HEAD nor an experiment of it has answers here:\n  " + "\n  ".join(left_out))
    if base and base not in points:
        raise InputError("compare-score", f"{score} is not defined for the answers of {base}: choose another --score")
    against = _reference(order, score, base)
    lines = [("", score, "difference", "95 % interval", "", "params")]
    for side in order:
        try:
            lines.append((side.name, f"{points[side.name]:.4f}", *_standing(side, against, score, resamples), side.changed))
        except InputError as error:
            left_out.append(f"{side.name}: {error.message}")
    return aligned(lines, words=(0, 4, 5)), left_out, len({row["id"] for row in against.rows})


def _reference(order: Sequence[Side], score: str, base: str | None) -> Side:
    """BASE, or the first that was measured on what HEAD was; where HEAD has no answers, on what most were."""
    named = {side.name: side for side in order}
    if base in named:
        return named[base]
    measured = {side.name: _measured(side, score) for side in order}
    common = measured["HEAD"] if "HEAD" in measured else Counter(measured.values()).most_common(1)[0][0]
    return next(side for side in order if measured[side.name] == common)


def _measured(side: Side, score: str) -> frozenset[tuple[Any, ...]]:
    """What two sides must share to be compared: turns, seeds, which were answered, and for a score per token the tokens."""
    from qlora.scoring.bootstrap import PER_TOKEN  # noqa: PLC0415 - a second that --help need not take

    return frozenset(
        (row["id"], row["turn"], row["seed"], row["answer"] is not None, row["tokens"] if score in PER_TOKEN else 0) for row in side.rows
    )


def _standing(side: Side, against: Side, score: str, resamples: int) -> tuple[str, str, str]:
    """Difference, interval and verdict.

    Raises:
        InputError: the two can't be compared by this score.
    """
    from qlora.scoring.bootstrap import compare  # noqa: PLC0415 - a second that --help need not take

    if side is against:
        return "", "", "compared with"
    difference = compare(against.rows, side.rows, resamples=resamples, names=[score]).get(score)
    if difference is None:
        raise InputError(
            "compare-score", f"{score} can't be compared with {against.name}'s, which took the same text for other tokens: bits_per_byte can"
        )
    return signed(difference.delta), interval(difference), difference.verdict


def _resamples() -> int:
    return params.load(Path("params.yaml")).evaluate.resamples


def _leaderboard(score: str, base: str | None) -> None:
    revisions = experiments()
    if base and base not in revisions:
        # What it is compared with must be at hand.
        predictions(base)
        revisions[base] = base
    found = sides(revisions)
    if base and (reason := next(side.reason for side in found if side.name == base)):
        raise InputError("compare-missing", reason)
    shown, left_out, conversations = ranked(found, score, base, resamples=_resamples())
    command.say(shown)
    command.say(f"\n{conversations:,} conversations; better and worse than the one compared with, where the interval leaves out 0")
    _warn_of_few(conversations)
    if left_out:
        command.say("\nnot ranked:\n  " + "\n  ".join(left_out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="REV1", nargs="?")
    parser.add_argument("after", metavar="REV2", nargs="?")
    parser.add_argument("--fail-if-worse", metavar="SCORE", action="append", default=[], help="may be given several times")
    parser.add_argument("--all", action="store_true", help="HEAD and its experiments, ranked")
    parser.add_argument("--score", help="what --all ranks by (default: exact_match)")
    arguments = parser.parse_args()
    if arguments.all and (arguments.after or arguments.fail_if_worse):
        parser.error("--all takes at most one revision, BASE, and no --fail-if-worse")
    if not arguments.all and (arguments.score or not arguments.before):
        parser.error("--score belongs to --all" if arguments.score else "REV1, or --all, is needed")
    _require_directed([*arguments.fail_if_worse, *filter(None, [arguments.score])])
    if arguments.all:
        _leaderboard(arguments.score or "exact_match", arguments.before)
    else:
        _two(arguments.before, arguments.after or WORKSPACE, arguments.fail_if_worse)


def _require_directed(scores: Sequence[str]) -> None:
    """Raises InputError for a name that is none of a score of which more is better, or less."""
    from qlora.scoring.measures import MEASURES  # noqa: PLC0415 - a second that --help need not take

    directed = [name for name, measure in MEASURES.items() if measure.better != "neither"]
    if unknown := [name for name in scores if name not in directed]:
        raise InputError("compare-score", f"{unknown[0]!r} is not a score that can be worse: known are {', '.join(directed)}")


def _two(before: str, after: str, fail_if_worse: Sequence[str]) -> None:
    from qlora.scoring.bootstrap import compare  # noqa: PLC0415 - a second that --help need not take
    from qlora.scoring.measures import MEASURES  # noqa: PLC0415

    both = [predictions(revision) for revision in (before, after)]
    differences = compare(*both, resamples=_resamples())
    command.say(table(differences, before, after))
    conversations, answers = len({row["id"] for row in both[0]}), sum(row["answer"] is not None for row in both[0])
    command.say(f"\n{conversations:,} conversations, {answers:,} answers; better and worse where the interval leaves out 0")
    _warn_of_few(conversations)
    absent = [name for name in MEASURES if name not in differences]
    if absent:
        command.say(f"{' and '.join(absent)} can't be compared: the two took the same text for other tokens (bits_per_byte can)")
    if lost := [name for name in fail_if_worse if name in absent]:
        raise InputError("compare-score", f"{lost[0]} can't be compared between {before} and {after}: use bits_per_byte")
    if undefined := [name for name in fail_if_worse if differences[name].verdict == "not defined"]:
        raise InputError("compare-score", f"{undefined[0]} is not defined for the answers of {before} and {after}, so it can't be worse: use another")
    worse = [name for name in fail_if_worse if differences[name].verdict == "worse"]
    if worse:
        print(f"worse: {', '.join(worse)}", file=sys.stderr)
        sys.exit(WORSE)


def _warn_of_few(conversations: int) -> None:
    from qlora.scoring.bootstrap import FEWEST  # noqa: PLC0415 - a second that --help need not take

    if conversations < FEWEST:
        command.say(f"fewer than {FEWEST} conversations: too few for a verdict")


if __name__ == "__main__":
    command.run(main)
