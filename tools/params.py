"""What a value of params.yaml means, what it may be, and what it is now.

python -m tools.params                     every section and its values
python -m tools.params train               one section
python -m tools.params learning_rate       one value, also by the name that another tool has for it
"""

import argparse
import ast
import inspect
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from ruamel.yaml import YAML

from qlora import params
from qlora.core.errors import InputError
from qlora.params import Params
from qlora.params.section import OTHER_NAMES
from qlora.runtime import command

PARAMS = Path("params.yaml")


class Param(NamedTuple):
    section: str
    name: str
    allowed: str
    """As the schema writes it."""
    meaning: str


def known() -> Iterator[Param]:
    """All params, in the order of their sections' schemas."""
    for section, field in Params.model_fields.items():
        assert inspect.isclass(field.annotation)
        (schema,) = ast.parse(inspect.getsource(field.annotation)).body
        assert isinstance(schema, ast.ClassDef)
        for statement, after in zip(schema.body, [*schema.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.target.id != "model_config":
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                meaning = " ".join(str(after.value.value).split()) if is_text else ""  # type: ignore[union-attr]
                limits = f" {ast.unparse(statement.value).removeprefix('Field')}" if statement.value else ""
                yield Param(section, statement.target.id, ast.unparse(statement.annotation) + limits, meaning)


def found(name: str) -> list[Param]:
    """Those of a section, those of this name, or what another tool calls so.

    Raises:
        InputError: there is none.
    """
    all_params = list(known())
    if not name:
        return all_params
    wanted = OTHER_NAMES.get(name.rpartition(".")[2], name)
    chosen = [param for param in all_params if name in (param.section, param.name, f"{param.section}.{param.name}")]
    chosen = chosen or [param for param in all_params if wanted.startswith(f"{param.section}.{param.name}")]
    if not chosen:
        close = get_close_matches(name.rpartition(".")[2], [param.name for param in all_params], n=1)
        raise InputError(
            "params-unknown",
            f"there is no section or value {name[:100]!r}" + (f"; did you mean {close[0]!r}?" if close else ": `python -m tools.params` lists all"),
        )
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="", help="a section, a value, or section.value")
    arguments = parser.parse_args()
    values = params.parse(PARAMS, YAML(typ="safe", pure=True))
    for param in found(arguments.name):
        now = values.get(param.section, {}).get(param.name, "missing")
        command.say(f"{param.section}.{param.name}: {now!r}\n    {param.allowed}" + (f"\n    {param.meaning}" if param.meaning else ""))


if __name__ == "__main__":
    command.run(main)
