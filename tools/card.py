"""The model card of the adapter: reports/model_card.md, computed from dvc.lock, manifests, params, metrics and Git.

    python -m tools.card              writes it
    python -m tools.card --check      computes it again; exit code 2, with the lines that differ, when the written one says anything else

Typed by hand are intended use, languages and licence alone, in models/card.yaml. What the numbers come from must be committed. The environment of
the run is frozen in reports/environment.json, from which --check computes.
"""

import argparse
import difflib
from pathlib import Path

from qlora.core.errors import InputError, translate_errors
from qlora.core.files import atomic_writers, json_document, read_record
from qlora.delivery.card import render
from qlora.delivery.card.sources import read_sources
from qlora.delivery.ownership import note, require_replaceable
from qlora.delivery.reproduction import FROZEN_ENVIRONMENT, read_environment
from qlora.runtime import command

CARD = Path("reports/model_card.md")
LINES_SHOWN = 20


def check(written: str, computed: str) -> None:
    """Raises InputError with the lines that differ."""
    if written == computed:
        return
    lines = [
        line
        for line in difflib.unified_diff(written.splitlines(), computed.splitlines(), lineterm="", n=0)
        if not line.startswith(("---", "+++", "@@"))
    ]
    shown = "\n".join(f"  {line}" for line in lines[:LINES_SHOWN]) + (f"\n  and {len(lines) - LINES_SHOWN} more" if len(lines) > LINES_SHOWN else "")
    raise InputError("card-differs", f"{CARD} (-) is not what is computed (+); write it again with `python -m tools.card`:\n{shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the written card with what is computed")
    arguments = parser.parse_args()
    if arguments.check and not CARD.is_file():
        raise InputError("card-missing", f"{CARD} does not exist: `python -m tools.card` writes it")
    if not arguments.check:
        for path in (CARD, FROZEN_ENVIRONMENT):
            require_replaceable(path, own=True)
    environment = read_record(FROZEN_ENVIRONMENT) if arguments.check else read_environment()
    with translate_errors("card-damaged", CARD, "can't be computed", "a report, a note or a manifest is damaged: `git status`, or `dvc repro`"):
        computed = render(read_sources(environment))
        content, frozen_content = computed.encode(), json_document(environment)
    if arguments.check:
        check(CARD.read_text(encoding="utf-8", errors="replace"), computed)
        command.say(f"{CARD} says what is computed")
        return
    with atomic_writers([CARD, FROZEN_ENVIRONMENT]) as (card, frozen):
        card.write(content)
        frozen.write(frozen_content)
    for path in (CARD, FROZEN_ENVIRONMENT):
        note(path)
    command.say(f"{CARD}: written, with {FROZEN_ENVIRONMENT}: commit both; read the card before you publish it")


if __name__ == "__main__":
    command.run(main)
