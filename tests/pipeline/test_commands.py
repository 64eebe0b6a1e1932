"""Every command of both READMEs that needs no GPU, network or hours, in one clone, in the order of the page."""

import re
import subprocess
import sys

import pytest

from tests.helpers import queue_tasks
from tests.pipeline.clone import ROOT, TRIED, Clone

NOT_RUN = {
    "make repro": "tests of the fresh clone in .ci/run run it",
    "make test": "it is what runs this",
    "python -m tools.fetch HuggingFaceH4/no_robots --revision e6f9a4ac5c37faeb744ba9ecf0473184d7f8105b": "needs the Hub: tests/tools/test_fetch.py",
    "python -m tools.pin llama3-8b-instruct --repo-id meta-llama/Meta-Llama-3-8B-Instruct --revision 8afb486c1db24fe5011ec46dfbe5b5dccdb575c2": (
        "needs the Hub: tests/tools/test_pin_hub.py"
    ),
    "python -m tools.recipes use llama3-8b-rtx4090 && dvc repro": "needs a GPU",
    "python -m tools.benchmark --tasks gsm8k arc_easy": "needs the Hub: tests/pipeline/test_benchmark.py",
    "export HF_TOKEN=...": "a token is nobody's but the reader's",
    TRIED: "the clone of these tests, `tried`, is where it ran",
}
FILLED = {"python -m tools.pin NAME --path DIR": "python -m tools.pin mine --path models/base/tiny"}
"""Commands with a place to be filled in."""
STARTED = " && dvc queue start"
"""How a command goes on that test_grid.py and test_doctor.py run, each with experiments of its own; what it queues is taken out again."""


def commands(page: str) -> list[str]:
    """The indented lines of a page that begin with a program, without their comments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = re.findall(r"^    ((?:make|dvc|python|export) .+)$", text, re.MULTILINE)
    return [re.split(r"\s+#\s", line)[0].strip() for line in lines]


def run(clone: Clone, command: str) -> None:
    if command.startswith("python -m tools.card"):
        clone.commit("what the card is about")
    if command.endswith(STARTED):
        clone.run("bash", "-c", command.removesuffix(STARTED))
        assert queue_tasks(clone) == ["Queued"] * 2
        clone.run("dvc", "queue", "remove", "--all")
        return
    clone.run("bash", "-c", FILLED.get(command, command))


@pytest.mark.slow
def test_every_command_of_the_readmes_runs(tried: Clone) -> None:
    english, chinese = commands("README.md"), commands("README.zh-CN.md")
    assert len(english) > 25
    assert len(chinese) > 10
    assert set(NOT_RUN) <= {*english, *chinese}, "a command that is not run is one of a page"
    # `.ci/run tutorial` runs these, word for word; later commands need two of them.
    tutorial = set(re.findall(r"^\$ (.+)$", (ROOT / "docs/tutorial.md").read_text(encoding="utf-8"), re.MULTILINE))
    elsewhere = tutorial - {"dvc repro", "python -m tools.card"}
    assert len(elsewhere & {*english, *chinese}) > 5
    # Make would make and fill an environment in the clone otherwise, a minute of a core and a download.
    tried.environment["VENV"] = sys.prefix
    for command in dict.fromkeys([*english, *chinese]):
        if command not in NOT_RUN and command not in elsewhere:
            run(tried, command)
    assert "nothing found" in tried.run("python", "-m", "tools.doctor")


def test_every_tool_of_the_tutorial_has_the_flags_that_it_uses() -> None:
    """`docs/paste.py docs/tutorial.md --check` runs the page; .ci/run tutorial does."""
    text = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    used = re.findall(r"^\$ python -m tools\.(\w+)(.*)$", text, re.MULTILINE)
    assert len(used) > 8
    helps: dict[str, str] = {}
    for tool, arguments in used:
        if tool not in helps:
            command = [sys.executable, "-m", f"tools.{tool}", "--help"]
            helps[tool] = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert [flag for flag in re.findall(r"--[a-z-]+", arguments) if flag not in helps[tool]] == [], tool
