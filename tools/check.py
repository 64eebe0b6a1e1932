"""Look for what a run would refuse, before DVC removes any output for it.

    python -m tools.check                                    params.yaml as it is; `make repro` begins with it
    python -m tools.check -S train.learning_rate=1e-5        with the values that `dvc exp run -S` would set

Looks at the params, the installed packages, the raw data, the base model (every file against its manifest, its vocabulary), and with
hardware.device: cuda for a GPU. Ends with 0, or with every message and the exit code of the first. Other options of `dvc exp run` are passed over,
so that a shell function can hand all of them to both; docs/experiments.md has one.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ruamel.yaml import YAML

from qlora import params
from qlora.core import environment
from qlora.core.errors import InputError, UserFacingError
from qlora.model.manifest import verified_folder
from qlora.params import Params
from qlora.runtime import command
from qlora.runtime.gpus import require_gpu

PARAMS, REQUIREMENTS, MANIFESTS = Path("params.yaml"), Path("requirements.txt"), Path("models/base")


def with_values(overrides: Sequence[str]) -> Iterator[Params]:
    """params.yaml with these values, as DVC sets them; several where one names several, as `dvc exp run --queue` takes it.

    Raises:
        InputError: DVC refuses a value, or the params are wrong then.
    """
    if not overrides:
        yield params.load(PARAMS)
        return
    from dvc.exceptions import DvcException  # noqa: PLC0415 - a second that a check without values need not take
    from dvc.utils.cli_parse import to_path_overrides  # noqa: PLC0415
    from dvc.utils.hydra import apply_overrides, get_hydra_sweeps  # noqa: PLC0415

    try:
        for sweep in get_hydra_sweeps(to_path_overrides(overrides)):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / PARAMS.name
                shutil.copy(PARAMS, path)
                apply_overrides(path, sweep.get(str(PARAMS), []))
                yield params.check(params.parse(path, YAML(typ="safe", pure=True)), f"{PARAMS} with these values")
    except DvcException as error:
        raise InputError("check-value", f"dvc does not take -S {' -S '.join(overrides)}: {error}") from None


def problems(values: Params) -> Iterator[UserFacingError]:
    """What a run with these values would refuse, as far as it shows without a model."""
    from qlora.data.readers import files_of  # noqa: PLC0415 - pyarrow, which wrong params need not load

    paths = dict.fromkeys((values.data.train_file, values.data.test_file))
    checks: list[Callable[[], object]] = [
        lambda: environment.require_pinned_versions(REQUIREMENTS, allow_other=values.runtime.allow_other_versions),
        *(lambda path=path: files_of(Path(path)) for path in paths),
        lambda: verified_folder(values.base_model, MANIFESTS),
        lambda: require_gpu(values.hardware),
    ]
    for check in checks:
        try:
            check()
        except UserFacingError as error:
            yield error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("-S", "--set-param", action="append", default=[], metavar="NAME=VALUE", help="as `dvc exp run` takes it")
    arguments, _ = parser.parse_known_args()
    found: dict[str, UserFacingError] = {}
    for values in with_values(arguments.set_param):
        found |= {str(error): error for error in problems(values)}
    if found:
        command.say("\n".join(f"error: {message}" for message in found))
        sys.exit(next(iter(found.values())).exit_code)
    command.say("checked: params, packages, data and base model")


if __name__ == "__main__":
    command.run(main)
