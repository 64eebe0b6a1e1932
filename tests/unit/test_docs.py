"""What the documents say is what the code does."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_error_code_is_explained_and_every_explained_code_exists() -> None:
    raised = set()
    for folder in ("qlora", "stages", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            raised |= set(
                re.findall(
                    r'(?:InputError|MachineError|StoppedError|NotRenderedError|InseparableError|translate_errors|super\(\).__init__)\(\s*"([a-z0-9-]+)"',
                    text,
                )
            ) | set(re.findall(r'f?"\[([a-z-]+)\] \{', text))
    explained = set(re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert explained == raised


def test_every_error_code_is_provoked_by_a_test() -> None:
    """As far as words can tell: a test names it as a code."""
    explained = re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    assert [code for code in explained if not re.search(rf"[\"\[]{code}(?:\\?\]|\"|\) )", tests)] == []


def test_the_readmes_numbers_are_those_of_the_committed_metrics() -> None:
    evaluated = json.loads((ROOT / "reports/evaluation.json").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(rows) >= 4
    for name, before, after in rows:
        assert (before, after) == tuple(f"{evaluated[model][name]:.3f}" for model in ("base", "tuned")), name


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("*.md")) + [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")])
def test_every_local_link_leads_somewhere(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{name}: {target}"


def test_every_path_of_the_readmes_tree_exists() -> None:
    tree = README.partition("## The tree")[2].partition("```")[2].partition("```")[0]
    paths = [line.split()[0] for line in tree.splitlines() if line and not line.startswith(" ")]
    assert len(paths) > 8
    assert all((ROOT / path).exists() for path in paths if path not in ("data/prepared/", "data/predictions/", "models/adapter/", "reports/"))


@pytest.mark.parametrize("module", sorted(f"tools.{path.stem}" for path in (ROOT / "tools").glob("[a-z]*.py")))
def test_every_tool_explains_itself_without_torch(module: str) -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"python -m {module}" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported
    assert "torch" not in imported


def test_the_table_of_models_is_what_the_code_does() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import models
    finally:
        sys.path.remove(str(ROOT / "docs"))
    text = models.PAGE.read_text(encoding="utf-8")
    assert text == models.page(text), "run `python docs/models.py`"


OWN_WORDS = {"log.md", "design.md"}
"""For those who build it, and of the past."""
DENIED = re.compile(
    r"\bmend(s|ed|ing)?\b|\b(goes|go|went|gone|going) on (with|from|to)\b|\b(?<!there )(is|are) no (?!longer|more)[a-z]+ (of|that|and|:)"
    r"|\b(brings?|brought)\b|\bstands? in\b|\bdata sets?\b|\bat hand\b|\blet go\b|\bbegin themselves\b|\bis no number\b",
    re.IGNORECASE,
)
"""Words that a reader has to translate: fix, resume, is not a, restore, is in, dataset, here."""
PAGES = [
    "README.md",
    "SECURITY.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in OWN_WORDS),
]


def messages(path: Path) -> Iterator[str]:
    """Texts of a module that a person may see: its strings, and of a program the docstring, which --help shows."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    is_program = path.parent.name in ("stages", "tools")
    documentation = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and not (is_program and node is tree)
        for statement in node.body
        if isinstance(statement, ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield from node.value.splitlines()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_uses_the_words_of_the_field(page: str) -> None:
    assert [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if DENIED.search(line)] == []


@pytest.mark.parametrize("folder", ["qlora", "stages", "tools"])
def test_messages_use_the_words_of_the_field(folder: str) -> None:
    paths = (ROOT / folder).rglob("*.py")
    assert [f"{path.name}: {line}" for path in paths for line in messages(path) if DENIED.search(line)] == []
