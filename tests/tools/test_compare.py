"""Two revisions of a real repository, read from DVC's cache."""

import contextlib
import hashlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora.core.conversation import Conversation
from qlora.core.errors import InputError, UserFacingError
from qlora.core.files import json_line, write_jsonl
from qlora.scoring.measures import scored
from tests.helpers import verdicts
from tests.pipeline.clone import ENVIRONMENT
from tools import compare as tool
from tools.compare import PREDICTIONS, TEST, WORSE, Side, ranked

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
            **{"answer": f"this is answer number {place}" if place < right else "no", "answer_tokens": 2, "stopped": True},
        }
        for place in range(count)
    ]


def conversations(right: int = 40) -> list[dict[str, Any]]:
    """40 conversations; the references of those from `right` on are "no"."""
    contents = [f"this is answer number {place}" if place < right else "no" for place in range(40)]
    return [
        {"id": f"{place:04}", "category": "c", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]}
        for place, content in enumerate(contents)
    ]


def with_scores(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return scored(rows, [Conversation.from_record(record) for record in conversations()])


def run(folder: Path, *command: str, expected: int = 0) -> str:
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == expected, done.stdout
    return done.stdout


def compare(folder: Path, *arguments: str, expected: int = 0) -> str:
    """What the tool prints in this folder, run in this process: its imports take seconds."""
    code = 0
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as shown, contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["compare", *arguments])
        try:
            tool.main()
        except UserFacingError as error:
            code = error.exit_code
            print(f"error: {error}")
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = shown.getvalue()
    assert code == expected, said
    return said


def write(folder: Path, rows: list[dict[str, Any]], test: list[dict[str, Any]] | None = None) -> None:
    """Predictions, a test set (as `conversations()`) and params in this folder."""
    for path, lines in ((PREDICTIONS, rows), (TEST, test or conversations())):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / path, lines)
    if not (folder / "params.yaml").exists():
        shutil.copy(ROOT / "params.yaml", folder)


def add(folder: Path, path: Path) -> None:
    """What `dvc add` does, which takes a second to begin."""
    content = (folder / path).read_bytes()
    md5 = hashlib.md5(content).hexdigest()
    (folder / f"{path}.dvc").write_text(f"outs:\n- md5: {md5}\n  size: {len(content)}\n  hash: md5\n  path: {path.name}\n", encoding="utf-8")
    (folder / path).with_name(".gitignore").write_text(f"/{path.name}\n", encoding="utf-8")
    cached = cached_file(folder, path)
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_bytes(content)


def cached_file(folder: Path, path: Path) -> Path:
    """Where DVC's cache has the content that the pointer of this path names."""
    (md5,) = re.findall(r"md5: (\w{32})", (folder / f"{path}.dvc").read_text(encoding="utf-8"))
    return folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:]


def commit(folder: Path, message: str) -> None:
    for path in (PREDICTIONS, TEST):
        add(folder, path)
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", message)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tags `few`, `many`, `shorter`, `retokenised` and `corrected` (as few, with another test set); the workspace is as `many`."""
    folder = tmp_path_factory.mktemp("repository")
    run(folder, "git", "init", "--quiet")
    run(folder, "dvc", "init", "--quiet")
    retokenised = [{**row, "tokens": 8} for row in answers(10)]
    made = {"few": answers(10), "shorter": answers(10, count=39), "retokenised": retokenised, "corrected": answers(10), "many": answers(35)}
    for tag, rows in made.items():
        write(folder, rows, conversations(10) if tag == "corrected" else None)
        commit(folder, tag)
        run(folder, "git", "tag", tag)
    return folder


def test_it_is_a_program_with_exit_codes(repository: Path) -> None:
    worse = ("many", "few", "--fail-if-worse", "exact_match")
    assert "worse: exact_match\n" in run(repository, sys.executable, "-m", "tools.compare", *worse, expected=WORSE)
    assert "error: [compare-revision]" in run(repository, sys.executable, "-m", "tools.compare", "nothing", expected=2)


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
    assert f"error: [{code}]" in compare(repository, *arguments, expected=2)


def test_each_revision_is_scored_with_its_own_test_set(repository: Path) -> None:
    shown = compare(repository, "few", "corrected")
    row = next(line.split() for line in shown.splitlines() if line.split()[:1] == ["exact_match"])
    assert row[1:4] == ["0.2500", "1.0000", "+0.7500"]
    assert verdicts(shown)["nll"] == "no difference shown"


def test_answers_that_are_not_at_hand_say_how_to_get_them(repository: Path, tmp_path: Path) -> None:
    run(tmp_path, "git", "clone", "--quiet", str(repository), "clone")
    assert "[compare-missing]" in compare(tmp_path / "clone", "few", "many", expected=2)
    assert "[compare-missing]" in compare(tmp_path / "clone", "workspace", expected=2)


def test_what_another_tokenizer_made_is_compared_without_what_counts_tokens(repository: Path) -> None:
    shown = compare(repository, "few", "retokenised")
    assert "nll and perplexity can't be compared" in shown
    assert verdicts(shown)["bits_per_byte"] == "no difference shown"


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (PREDICTIONS, b'{"id":"1","turn":0,"exact_match":1.0}\n'),
        (PREDICTIONS, b""),
        (PREDICTIONS, b'{"id": "1", "tur'),
        (PREDICTIONS, json_line({name: value for name, value in answers(1)[0].items() if name != "stop_nll"})),
        (TEST, b'{"id": "1", "tur'),
        (TEST, b'{"id":"1","turns":[]}\n'),
        (TEST, json_line(conversations()[1])),
    ],
    ids=["older", "empty", "cut off", "a value less", "test set cut off", "test set older", "another test set"],
)
def test_answers_that_are_damaged_or_of_another_version_are_named(path: Path, content: bytes, tmp_path: Path) -> None:
    write(tmp_path, answers(1))
    (tmp_path / path).write_bytes(content)
    shown = compare(tmp_path, "workspace", expected=2)
    assert "[compare-format]" in shown
    assert f"{PREDICTIONS} or {TEST} of workspace" in shown


def test_a_score_that_is_not_defined_is_said_to_be_so(tmp_path: Path) -> None:
    """No answer has four words, so BLEU has nothing to count."""
    write(tmp_path, answers(0))
    shown = compare(tmp_path, "workspace")
    assert next(line.split() for line in shown.splitlines() if line.startswith("bleu")) == ["bleu", *"––––", "not", "defined"]
    assert verdicts(shown)["exact_match"] == "no difference shown"
    with pytest.raises(InputError, match="bleu is not defined for its answers"):
        ranked([Side("HEAD", "", with_scores(answers(0)))], "bleu", None, resamples=1000)
    long = [{**row, "answer": "one two three four"} for row in answers(0)]
    sides = [Side("HEAD", "", with_scores(answers(0))), Side("long", "", with_scores(long))]
    with pytest.raises(InputError, match="bleu is not defined for the answers of HEAD"):
        ranked(sides, "bleu", "HEAD", resamples=1000)
    assert "[compare-score] bleu is not defined" in compare(tmp_path, "workspace", "--fail-if-worse", "bleu", expected=2)


def test_few_conversations_are_said_to_be_few(tmp_path: Path) -> None:
    write(tmp_path, answers(3, count=5))
    assert "fewer than 12 conversations" in compare(tmp_path, "workspace")


@pytest.fixture(scope="module")
def experiments(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experiments of `many`, as `dvc exp run` leaves them: a commit under a reference that names HEAD; the answers of one are nowhere."""
    folder = tmp_path_factory.mktemp("experiments") / "clone"
    shutil.copytree(repository, folder)
    write(folder, answers(30))
    commit(folder, "baseline")
    head = run(folder, "git", "rev-parse", "HEAD").strip()
    made = {"good": answers(38), "same": answers(30), "other-set": answers(39, count=39), "lost": answers(5)}
    params = (folder / "params.yaml").read_text(encoding="utf-8")
    for number, (name, rows) in enumerate(made.items(), start=1):
        (folder / "params.yaml").write_text(params.replace("  r: 16\n", f"  r: {number}\n"), encoding="utf-8")
        write(folder, rows)
        commit(folder, name)
        run(folder, "git", "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", "HEAD")
        if name == "lost":
            cached_file(folder, PREDICTIONS).unlink()
        run(folder, "git", "reset", "--quiet", "--hard", head)
    write(folder, answers(30))
    assert run(folder, "dvc", "status", "--quiet") == "", "the pointers are those of DVC"
    return folder


def test_all_experiments_are_ranked_and_none_is_lost(experiments: Path) -> None:
    shown = compare(experiments, "--all").split("\n")
    assert shown[0].split() == ["exact_match", "difference", "95", "%", "interval", "params"]
    assert [line.split()[0] for line in shown[1:4]] == ["good", "HEAD", "same"]
    assert shown[1].split() == ["good", "0.9500", "compared", "with", "lora.r=1"]
    assert [line.split()[2] for line in shown[2:4]] == ["-0.2000", "-0.2000"]
    assert shown[5].startswith("40 conversations; ")
    assert re.search(r"^  other-set: the predictions are not of the same turns: 1 are in one of them alone", "\n".join(shown[5:]), re.MULTILINE)
    shown = compare(experiments, "--all", "HEAD").split("\n")
    assert [line.split()[0] for line in shown[1:4]] == ["good", "HEAD", "same"]
    assert shown[1].split()[1:3] == ["0.9500", "+0.2000"]
    assert shown[1].split()[-2:] == ["better", "lora.r=1"]
    assert shown[2].split() == ["HEAD", "0.7500", "compared", "with"]
    assert re.search(r"same +0.7500 +\+0.0000 +\+0.0000 to \+0.0000 +no difference shown +lora.r=2$", shown[3])
    below = "\n".join(shown[4:])
    assert re.search(r"^  other-set: the predictions are not of the same turns: 1 are in one of them alone", below, re.MULTILINE)
    assert re.search(r"^  lost: data/predictions/tuned.jsonl of lost is not here .*`dvc fetch --all-commits`", below, re.MULTILINE)


def test_the_best_is_of_what_head_was_measured_on() -> None:
    few, same = Side("HEAD", "", with_scores(answers(3, count=5))), Side("same", "", with_scores(answers(2, count=5)))
    many = Side("many", "", with_scores(answers(40)))
    shown, left_out, conversations = ranked([few, same, many], "exact_match", None, resamples=1000)
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["HEAD", "same"]
    assert [line.split(":")[0] for line in left_out] == ["many"]
    assert conversations == 5, "so few that it is said"
    # Without HEAD's answers: what most were measured on.
    shown, left_out, _ = ranked([Side("HEAD", "", [], "not at hand"), few._replace(name="a"), same, many], "exact_match", None, resamples=1000)
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["a", "same"]
    assert [line.split(":")[0] for line in left_out] == ["HEAD", "many"]


def test_a_score_per_token_is_ranked_among_those_of_heads_tokens() -> None:
    other = Side("other", "", with_scores([{**row, "tokens": 8} for row in answers(30)]))
    for score, expected in (("nll", ["HEAD"]), ("bits_per_byte", ["HEAD", "other"])):
        shown, _, _ = ranked([Side("HEAD", "", with_scores(answers(30))), other], score, None, resamples=1000)
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
    assert "  HEAD: data/predictions/tuned.jsonl of HEAD is not here" in shown
    assert "[compare-revision]" in compare(tmp_path, "--all", expected=2)
