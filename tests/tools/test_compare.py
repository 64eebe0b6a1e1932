"""Two revisions of a real repository, read from DVC's cache."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora.generation import Answer
from qlora.records import json_line, write_jsonl
from qlora.test_set import _scored
from tests.pipeline.clone import ENVIRONMENT
from tools.compare import PREDICTIONS, WORSE, Side, ranked

ROOT = Path(__file__).parents[2]


def answers(right: int, count: int = 40) -> list[dict[str, Any]]:
    """Of `count` answers the first `right` are the reference."""
    return [
        {
            "id": f"{place:04}",
            "turn": 0,
            "category": "c",
            "seed": 0,
            **{"nll_sum": 2.0 + place / 100 + (place >= right), "stop_nll": 0.5, "tokens": 4, "bytes": 9},
            **_scored(Answer(f"answer {place}" if place < right else "no", stopped=True, tokens=2), f"answer {place}"),
        }
        for place in range(count)
    ]


def run(folder: Path, *command: str, expected: int = 0) -> str:
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == expected, done.stdout
    return done.stdout


def compare(folder: Path, *arguments: str, expected: int = 0) -> str:
    return run(folder, sys.executable, "-m", "tools.compare", *arguments, expected=expected)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tags `few`, `many`, `shorter` and `retokenised`; the workspace is as `many`."""
    folder = tmp_path_factory.mktemp("repository")
    run(folder, "git", "init", "--quiet")
    run(folder, "dvc", "init", "--quiet")
    retokenised = [{**row, "tokens": 8} for row in answers(10)]
    for tag, made in (("few", answers(10)), ("shorter", answers(10, count=39)), ("retokenised", retokenised), ("many", answers(35))):
        (folder / PREDICTIONS).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / PREDICTIONS, made)
        run(folder, "dvc", "add", "--quiet", str(PREDICTIONS))
        run(folder, "git", "add", "--all")
        run(folder, "git", "commit", "--quiet", "--message", tag)
        run(folder, "git", "tag", tag)
    return folder


def verdicts(shown: str) -> dict[str, str]:
    """By measure, from the table."""
    lines = [line for line in shown.splitlines() if " to " in line]
    return {line.split()[0]: re.sub(r"^[01]\.\d+\s+", "", line.split(" to ")[1].split(maxsplit=1)[1]) for line in lines}


def test_a_revision_shows_no_difference_to_itself(repository: Path) -> None:
    assert set(verdicts(compare(repository, "few", "few")).values()) == {"no difference shown"}
    assert set(verdicts(compare(repository, "many")).values()) == {"no difference shown"}


def test_better_and_worse_are_said_and_can_set_the_exit_code(repository: Path) -> None:
    shown = compare(repository, "few", "many")
    assert "40 conversations, 40 answers" in shown
    found = verdicts(shown)
    assert found["exact_match"] == found["nll"] == found["chrf"] == "better"
    assert found["stop_rate"] == "no difference shown"
    assert found["length_ratio"] == "different"
    assert verdicts(compare(repository, "many", "few"))["exact_match"] == "worse"
    assert "worse: exact_match, nll" in compare(
        repository, "many", "few", "--fail-if-worse", "exact_match", "--fail-if-worse", "nll", "--fail-if-worse", "stop_rate", expected=WORSE
    )
    compare(repository, "few", "many", "--fail-if-worse", "exact_match")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("few", "shorter"), "compare-unaligned"),
        (("few", "nothing"), "compare-revision"),
        (("few", "--fail-if-worse", "beauty"), "compare-score"),
        (("few", "many", "--fail-if-worse", "length_ratio"), "compare-score"),
        (("few", "retokenised", "--fail-if-worse", "nll"), "compare-score"),
    ],
)
def test_what_can_not_be_compared_is_named(repository: Path, arguments: tuple[str, ...], code: str) -> None:
    shown = compare(repository, *arguments, expected=2)
    assert f"error: [{code}]" in shown
    assert "Traceback" not in shown


def test_answers_that_are_not_at_hand_say_how_to_get_them(repository: Path, tmp_path: Path) -> None:
    run(tmp_path, "git", "clone", "--quiet", str(repository), "clone")
    assert "[compare-missing]" in compare(tmp_path / "clone", "few", "many", expected=2)
    assert "[compare-missing]" in compare(tmp_path / "clone", "workspace", expected=2)


def test_what_another_tokenizer_made_is_compared_without_what_counts_tokens(repository: Path) -> None:
    shown = compare(repository, "few", "retokenised")
    assert "nll and perplexity can't be compared" in shown
    assert verdicts(shown)["bits_per_byte"] == "no difference shown"


@pytest.mark.parametrize(
    "content",
    [
        b'{"id":"1","turn":0,"exact_match":1.0}\n',
        b"",
        b'{"id": "1", "tur',
        json_line({**answers(1)[0], "statistics": {name: value for name, value in answers(1)[0]["statistics"].items() if name != "rouge_2"}}),
    ],
    ids=["older", "empty", "cut off", "a score less"],
)
def test_answers_that_are_damaged_or_of_another_version_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / PREDICTIONS).parent.mkdir(parents=True)
    (tmp_path / PREDICTIONS).write_bytes(content)
    assert "[compare-format]" in compare(tmp_path, "workspace", expected=2)


def test_few_conversations_are_said_to_be_few(tmp_path: Path) -> None:
    (tmp_path / PREDICTIONS).parent.mkdir(parents=True)
    write_jsonl(tmp_path / PREDICTIONS, answers(3, count=5))
    assert "fewer than 12 conversations" in compare(tmp_path, "workspace")


@pytest.fixture(scope="module")
def experiments(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experiments of `many`, as `dvc exp run` leaves them: a commit under a reference that names HEAD; the answers of one are nowhere."""
    folder = tmp_path_factory.mktemp("experiments") / "clone"
    shutil.copytree(repository, folder)
    (folder / "params.yaml").write_text("lora: {r: 8}\ntrain: {learning_rate: 2e-3}\n", encoding="utf-8")
    write_jsonl(folder / PREDICTIONS, answers(30))
    run(folder, "dvc", "add", "--quiet", str(PREDICTIONS))
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", "baseline")
    head = run(folder, "git", "rev-parse", "HEAD").strip()
    made = {"good": answers(38), "same": answers(30), "other-set": answers(39, count=39), "lost": answers(5)}
    for number, (name, rows) in enumerate(made.items()):
        (folder / "params.yaml").write_text(f"lora: {{r: {number}}}\ntrain: {{learning_rate: 2e-3}}\n", encoding="utf-8")
        write_jsonl(folder / PREDICTIONS, rows)
        run(folder, "dvc", "add", "--quiet", str(PREDICTIONS))
        run(folder, "git", "commit", "--quiet", "--all", "--message", name)
        run(folder, "git", "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", "HEAD")
        if name == "lost":
            place = cached_file(folder)
            place.unlink()
        run(folder, "git", "reset", "--quiet", "--hard", head)
    run(folder, "dvc", "checkout", "--quiet", "--force")
    return folder


def cached_file(folder: Path) -> Path:
    md5 = re.findall(r"md5: (\w{32})", (folder / f"{PREDICTIONS}.dvc").read_text(encoding="utf-8"))[0]
    return folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]


def test_all_experiments_are_ranked_and_none_is_lost(experiments: Path) -> None:
    shown = compare(experiments, "--all").split("\n")
    assert shown[0].split() == ["exact_match", "difference", "95", "%", "interval", "params"]
    assert [line.split()[0] for line in shown[1:4]] == ["good", "HEAD", "same"]
    assert shown[1].split() == ["good", "0.9500", "compared", "with", "lora.r=0"]
    assert [line.split()[2] for line in shown[2:4]] == ["-0.2000", "-0.2000"]
    assert shown[5].startswith("40 conversations; ")
    assert re.search(r"^  other-set: the predictions are not of the same turns: 1 stand", "\n".join(shown[5:]), re.MULTILINE)
    shown = compare(experiments, "--all", "HEAD").split("\n")
    assert [line.split()[0] for line in shown[1:4]] == ["good", "HEAD", "same"]
    assert shown[1].split()[1:3] == ["0.9500", "+0.2000"]
    assert shown[1].split()[-2:] == ["better", "lora.r=0"]
    assert shown[2].split() == ["HEAD", "0.7500", "compared", "with"]
    assert re.search(r"same +0.7500 +\+0.0000 +\+0.0000 to \+0.0000 +no difference shown +lora.r=1$", shown[3])
    below = "\n".join(shown[4:])
    assert re.search(r"^  other-set: the predictions are not of the same turns: 1 stand", below, re.MULTILINE)
    assert re.search(r"^  lost: data/predictions/tuned.jsonl of lost is not at hand .*`dvc fetch --all-commits`", below, re.MULTILINE)


def test_the_best_is_of_what_head_was_measured_on() -> None:
    few, same, many = Side("HEAD", "", answers(3, count=5)), Side("same", "", answers(2, count=5)), Side("many", "", answers(40))
    shown, left_out, conversations = ranked([few, same, many], "exact_match", None)
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["HEAD", "same"]
    assert [line.split(":")[0] for line in left_out] == ["many"]
    assert conversations == 5, "so few that it is said"
    # Without HEAD's answers: what most were measured on.
    shown, left_out, _ = ranked([Side("HEAD", "", [], "not at hand"), few._replace(name="a"), same, many], "exact_match", None)
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["a", "same"]
    assert [line.split(":")[0] for line in left_out] == ["HEAD", "many"]


def test_a_score_per_token_is_ranked_among_those_of_heads_tokens() -> None:
    other = Side("other", "", [{**row, "tokens": 8} for row in answers(30)])
    for score, expected in (("nll", ["HEAD"]), ("bits_per_byte", ["HEAD", "other"])):
        shown, _, _ = ranked([Side("HEAD", "", answers(30)), other], score, None)
        assert [line.split()[0] for line in shown.splitlines()[1:]] == expected


def test_the_score_and_what_is_compared_with_can_be_chosen(experiments: Path) -> None:
    shown = compare(experiments, "--all", "--score", "nll", "good").split("\n")
    assert [line.split()[0] for line in shown[1:4]] == ["good", "HEAD", "same"]
    assert shown[2].split()[-1] == "worse"
    # A revision that is no experiment of HEAD.
    few = compare(experiments, "--all", "few")
    assert re.search(r"^few +0\.2500 +compared with", few, re.MULTILINE)
    assert "[compare-missing]" in compare(experiments, "--all", "lost", expected=2)
    assert "[compare-score] 'beauty'" in compare(experiments, "--all", "--score", "beauty", expected=2)
    for wrong in (("--all", "few", "many"), ("--all", "--fail-if-worse", "nll"), ("--score", "nll", "few"), ()):
        assert "usage: " in compare(experiments, *wrong, expected=2)


def test_where_nothing_is_at_hand_each_reason_is_listed(experiments: Path, tmp_path: Path) -> None:
    run(tmp_path, "git", "clone", "--quiet", str(experiments), "clone")
    shown = compare(tmp_path / "clone", "--all", expected=2)
    assert "[compare-nothing]" in shown
    assert "  HEAD: data/predictions/tuned.jsonl of HEAD is not at hand" in shown
    assert "[compare-revision]" in compare(tmp_path, "--all", expected=2)
