"""Named set-ups: overlays of params.yaml in recipes/.

python -m tools.recipes list           every recipe and what it is for
python -m tools.recipes show NAME      its values
python -m tools.recipes use NAME       write them into params.yaml; comments and all other values stay
python -m tools.recipes flags NAME     as -S arguments: dvc exp run $(...) is then a run of its own
"""

import argparse
import io
import json
import re
import shlex
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from qlora import params
from qlora.core.errors import InputError, translate_errors
from qlora.core.files import atomic_writers, require_file
from qlora.core.text import in_shell
from qlora.model.manifest import find_weights, read_manifest
from qlora.params import Params
from qlora.params.section import unknown_key
from qlora.runtime import command

FOLDER = Path("recipes")
PARAMS = Path("params.yaml")
BASE_MODELS = Path("models/base")


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def path_of(name: str) -> Path:
    """Raises InputError for an unknown recipe."""
    if name not in names():
        close = get_close_matches(name, names(), n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names())}"
        raise InputError("recipe-unknown", f"there is no recipe {name!r} in {FOLDER}/; {hint}")
    return FOLDER / f"{name}.yaml"


def summary(path: Path) -> str:
    """The recipe's first comment line: what it is for."""
    return text_of(path).partition("\n")[0].removeprefix("#").strip()


def text_of(path: Path) -> str:
    """Raises InputError when it is no text."""
    with translate_errors("recipe-unreadable", path, "can't be read", f"see `git diff {in_shell(path)}`"):
        require_file(path)
        return path.read_text(encoding="utf-8")


def compose(base: Path, overlay: Path) -> str:
    """The text of `base` with the overlay's values in place, its comments kept.

    Raises:
        InputError: the overlay names an unknown key, or the result is not a valid params.yaml.
    """
    yaml = YAML()
    yaml.width = 4096
    yaml.representer.add_representer(type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null"))
    document = params.parse(base, yaml)
    for section, key, value in values_of(overlay):
        if section not in document or key not in document[section]:
            known = [f"{name}.{one}" for name, values in document.items() for one in values]
            raise InputError("recipe-key", f"{overlay}: {unknown_key(f'{section}.{key}', known)}")
        document[section][key] = value
    text = io.StringIO()
    yaml.dump(document, text)
    params.check(YAML(typ="safe").load(text.getvalue()), f"{base} with {overlay}")
    return text.getvalue()


def values_of(overlay: Path) -> Iterator[tuple[str, str, Any]]:
    """(section, key, value) in the order of the file, each number as it is spelled there."""
    record = params.parse(overlay, YAML())
    return ((section, key, value) for section, values in record.items() for key, value in values.items())


def fetch_command(path: str) -> str | None:
    """How to fetch the dataset that a file below data/raw belongs to, by the recipes' comments; None where none of them says it.

    >>> fetch_command("data/raw/no_robots/data/train-00000-of-00001.parquet")
    'python -m tools.fetch HuggingFaceH4/no_robots --revision e6f9a4ac5c37faeb744ba9ecf0473184d7f8105b'
    """
    parts = Path(path).parts
    return _commands("fetch").get(parts[2]) if parts[:2] == ("data", "raw") and len(parts) > 2 else None


def pin_command(name: str) -> str | None:
    """How to download and pin a base model, by the recipes' comments; None where none of them says it."""
    return _commands("pin").get(name)


def downloads(values: Params) -> list[str]:
    """The commands by which the recipes say to download what these params name and this checkout lacks."""
    data = [fetch_command(path) for path in (values.data.train_file, values.data.test_file) if not Path(path).exists()]
    name = values.base_model.name
    try:
        find_weights(name, read_manifest(BASE_MODELS / f"{name}.json"))
        model = None
    except InputError:
        model = pin_command(name)
    return [found for found in dict.fromkeys([*data, model]) if found]


def _commands(tool: str) -> dict[str, str]:
    """The lines `#   python -m tools.TOOL ...` of all recipes, by the name of what each makes: a folder in data/raw or a base model."""
    pattern = re.compile(rf"^#\s+(python -m tools\.{tool} .+)$", re.MULTILINE)
    found = {}
    for name in names():
        for command_line in pattern.findall(text_of(FOLDER / f"{name}.yaml")):
            try:
                words = shlex.split(command_line)
                # `--name NAME` of a dataset, else the last part of ORG/NAME; a base model's name is the first argument.
                made = words[words.index("--name") + 1] if "--name" in words else words[3].rpartition("/")[2]
            except (ValueError, IndexError):
                # A sentence that begins like a command.
                continue
            # One command of these words for a shell, whatever else the comment says: `; rm -rf ~` becomes words too.
            found[made] = shlex.join(words)
    return found


def use(name: str) -> None:
    text = compose(PARAMS, path_of(name))
    # Where a link leads to, with its mode.
    path = PARAMS.resolve()
    mode = path.stat().st_mode
    with atomic_writers([path]) as (file,):
        file.write(text.encode())
    path.chmod(mode)


def flags(name: str) -> str:
    """-S arguments, quoted for a shell. A text is quoted again, so that `-S` does not split it."""

    def literal(value: Any) -> str:
        # Not json for numbers: it would write 1e-05, which DVC reads as well, but people compare with the recipe.
        return json.dumps(value) if isinstance(value, str | list | bool) or value is None else str(value)

    return " ".join(f"-S {shlex.quote(f'{section}.{key}={literal(value)}')}" for section, key, value in values_of(path_of(name)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["list", "show", "use", "flags"])
    parser.add_argument("name", nargs="?")
    arguments = parser.parse_args()
    if arguments.action == "list":
        for name in names():
            command.say(f"{name:20} {summary(FOLDER / f'{name}.yaml')}")
        return
    if arguments.name is None:
        raise InputError("recipe-name", f"`{arguments.action}` needs the name of a recipe: {', '.join(names())}")
    if arguments.action == "show":
        command.say(text_of(path_of(arguments.name)).rstrip("\n"))
    elif arguments.action == "flags":
        command.say(flags(arguments.name))
    else:
        use(arguments.name)
        needed = "".join(f"\n    {line}" for line in downloads(params.load(PARAMS)))
        download = f"Download what it needs:{needed}\nThen" if needed else "Now"
        command.say(f"{PARAMS} now holds {arguments.name}; see `git diff {PARAMS}`. {download} `dvc repro`.")


if __name__ == "__main__":
    command.run(main)
