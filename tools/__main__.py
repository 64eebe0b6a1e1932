"""All tools by what one wants to do.

qlora                  this list
qlora TOOL ...         the same as `python -m tools.TOOL ...`, from any folder of the checkout
"""

import ast
import os
import runpy
import sys
from pathlib import Path

from qlora.core.errors import InputError
from qlora.runtime import command

FOLDER = Path(__file__).parent
TASKS = {
    "Begin": ("recipes", "params", "preflight", "check"),
    "Data and base model": ("fetch", "pin", "inspect"),
    "Results": ("compare", "chat", "benchmark"),
    "Trust": ("doctor", "verify"),
    "Delivery": ("merge", "card", "publish"),
}


def summary(name: str) -> str:
    """The first line of the tool's docstring. The tool is not imported."""
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def from_root(argument: str, folder: Path) -> str:
    """A path in the folder that the command was typed in, as it is from the root; anything else as it is."""
    path = folder / argument
    return os.path.relpath(path) if argument and not argument.startswith("-") and os.path.lexists(path) else argument


def main() -> None:
    name, *arguments = sys.argv[1:] or [""]
    tools = [tool for task in TASKS.values() for tool in task]
    if name in ("", "-h", "--help"):
        listed = (f"{task}\n" + "".join(f"  {tool:10} {summary(tool)}\n" for tool in names) for task, names in TASKS.items())
        command.say("\n".join(listed) + "\n`qlora TOOL --help` says more. The pipeline itself: `dvc repro`, `dvc exp run -S NAME=VALUE`.")
        return
    if name not in tools:
        raise InputError("tool-unknown", f"there is no tool {name[:100]!r}: {', '.join(tools)}")
    folder = Path(os.environ.pop("QLORA_FROM", "."))
    if folder.absolute() != Path.cwd():
        arguments = [from_root(argument, folder) for argument in arguments]
    sys.argv = [f"qlora {name}", *arguments]
    runpy.run_module(f"tools.{name}", run_name="__main__")


if __name__ == "__main__":
    command.run(main)
