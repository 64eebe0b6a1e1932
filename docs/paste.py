"""Run the ```console blocks of a page in one shell, one after the other, and paste what they print.

    python docs/paste.py docs/tutorial.md             writes the outputs into the page
    python docs/paste.py docs/tutorial.md --check     runs the commands and writes nothing; ends with 1 at the first that fails

Lines that begin with `$ ` are commands, `> ` goes on with one. ```console tail=9 keeps the last nine lines of each output, ```console head=4 the
first four. Other blocks are not run: what needs a GPU, an account or hours stands in ```sh blocks.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(r"^```console(?P<options>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "-- the command ended with"
CUT = "[...]"
BAR = "%|"
"""Stands in a progress bar, which a terminal would have drawn over."""


class Failed(Exception):  # noqa: N818 - what happened
    """A command ended with another status than 0."""


class Command(NamedTuple):
    lines: Sequence[str]
    """As they stand in the page, with their `$ ` or `> `."""

    @property
    def text(self) -> str:
        return "\n".join(line[2:] for line in self.lines)


def commands_of(body: str) -> Iterator[Command]:
    lines: list[str] = []
    for line in body.splitlines():
        if lines and not line.startswith("> "):
            yield Command(lines)
            lines = []
        if line.startswith("$ ") or (lines and line.startswith("> ")):
            lines.append(line)
    if lines:
        yield Command(lines)


class Shell:
    """One bash for a whole page: folders, variables and background processes stay."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, command: Command) -> list[str]:
        """The lines that it prints, as a terminal would show them at the end.

        Raises:
            Failed: it ended with another status than 0.
        """
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f'{{ {command.text}\n}} < /dev/null\necho "\n{MARK} $?"\n')
        self._process.stdin.flush()
        lines = []
        for line in self._process.stdout:
            if line.startswith(MARK):
                while lines and not lines[-1].strip():
                    lines.pop()
                if line.split()[-1] != "0":
                    raise Failed("\n".join(["$ " + command.text, *lines, line.strip()]))
                return lines
            text = line.rstrip("\n").split("\r")[-1].rstrip()
            if BAR not in text and (text or (lines and lines[-1])):
                lines.append(text)
        raise Failed(f"the shell ended in {command.text!r}")


def shortened(lines: Sequence[str], options: str) -> list[str]:
    kept = dict(re.findall(r"(head|tail)=(\d+)", options))
    head, tail = (int(kept.get(side, 0)) for side in ("head", "tail"))
    if not kept or len(lines) <= head + tail + 1:
        return list(lines)
    return [*lines[:head], CUT, *lines[len(lines) - tail :]]


def pasted(page: str, shell: Shell) -> str:
    """The page with each output replaced by what the command prints now."""

    def block(found: re.Match[str]) -> str:
        lines = []
        for command in commands_of(found["body"]):
            print(f"$ {command.text}", file=sys.stderr, flush=True)
            lines += [*command.lines, *shortened(shell.run(command), found["options"])]
        body = "\n".join(lines)
        return f"```console{found['options']}\n{body}\n```"

    return BLOCK.sub(block, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    try:
        page = pasted(arguments.page.read_text(encoding="utf-8"), Shell())
    except Failed as error:
        sys.exit(f"{arguments.page}: {error}")
    if not arguments.check:
        arguments.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
