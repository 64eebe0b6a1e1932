"""Look for what a run would refuse, before DVC removes any output for it.

    python -m tools.check                                    params.yaml as it is; `make repro` begins with it
    python -m tools.check -S train.learning_rate=1e-5        with the values that `dvc exp run -S` would set

Looks at the params, the installed packages, the raw data, the base model (every file against its manifest, its vocabulary), and with
hardware.device: cuda for a GPU; what only stages need that would not run is passed over. Ends with 0, or with every message and the exit code of
the first. Other options of `dvc exp run` are ignored, so that a shell function can pass all of them to both (docs/experiments.md).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ruamel.yaml import YAML

from qlora import params
from qlora.core import environment
from qlora.core.dvc_lock import outputs_of, pipeline_stages, recorded
from qlora.core.errors import InputError, StoppedError, UserFacingError
from qlora.model.manifest import verified_folder
from qlora.params import Params
from qlora.runtime import command
from qlora.runtime.gpus import require_gpu
from tools.recipes import downloads

PARAMS, REQUIREMENTS, MANIFESTS = Path("params.yaml"), Path("requirements.txt"), Path("models/base")
READS_DATA, USES_MODEL = frozenset({"prepare"}), frozenset({"baseline", "train", "predict"})
"""Stages."""


def problems(overrides: Sequence[str], *, in_copy: bool) -> list[UserFacingError]:
    """What a run would refuse, as far as it shows without loading a model.

    Args:
        overrides: NAME=VALUE, as `dvc exp run -S` takes them; several values of one name are so many runs.
        in_copy: Whether the run is in a copy of the workspace, for which DVC takes raw data from its cache.
    """
    found: dict[str, tuple[frozenset[str], UserFacingError]] = {}
    for load in _params_of(overrides):
        for stages, check in _checks(load, in_copy=in_copy):
            try:
                check()
            except StoppedError:
                raise
            except UserFacingError as error:
                found[str(error)] = stages, error
    # What would run takes a second to learn, and matters only now.
    running = stages_to_run(overrides) if any(stages for stages, _ in found.values()) else frozenset()
    return [error for stages, error in found.values() if not stages or stages & running]


def _params_of(overrides: Sequence[str]) -> Iterator[Callable[[], Params]]:
    """For each run the function that reads its params, and raises what is wrong with them."""
    if not overrides:
        yield lambda: params.load(PARAMS)
        return
    from dvc.exceptions import DvcException  # noqa: PLC0415 - a second that a check without values need not take
    from dvc.utils.cli_parse import to_path_overrides  # noqa: PLC0415
    from dvc.utils.hydra import apply_overrides, get_hydra_sweeps  # noqa: PLC0415

    for sweep in get_hydra_sweeps(to_path_overrides(overrides)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / PARAMS.name
            shutil.copy(PARAMS, path)
            try:
                apply_overrides(path, sweep.get(str(PARAMS), []))
            except DvcException as error:
                raise InputError("check-value", f"dvc does not take -S {' -S '.join(overrides)}: {error}") from None
            yield lambda path=path: params.check(params.parse(path, YAML(typ="safe", pure=True)), f"{PARAMS} with these values")  # type: ignore[misc]


def _checks(load: Callable[[], Params], *, in_copy: bool) -> Iterator[tuple[frozenset[str], Callable[[], object]]]:
    """Functions that raise what is wrong, each with the stages that it matters to; none: to all of them."""
    from qlora.data.readers import files_of  # noqa: PLC0415 - pyarrow, which wrong params need not load

    try:
        values = load()
    except UserFacingError:
        # Raised once more, where it is counted.
        yield frozenset(), load
        return
    yield frozenset(), lambda: environment.require_pinned_versions(REQUIREMENTS, allow_other=values.runtime.allow_other_versions)
    for path in dict.fromkeys((Path(values.data.train_file), Path(values.data.test_file))):
        if not (in_copy and _is_in_dvc(path)):
            yield READS_DATA, lambda path=path: files_of(path)  # type: ignore[misc]
    yield USES_MODEL, lambda: verified_folder(values.base_model, MANIFESTS)
    yield USES_MODEL, lambda: require_gpu(values.hardware)


def downloads_of(overrides: Sequence[str]) -> list[str]:
    """The recipes' commands for data and base models of these runs that are not here."""
    found: dict[str, None] = {}
    for load in _params_of(overrides):
        with suppress(InputError):
            found |= dict.fromkeys(downloads(load()))
    return list(found)


def _is_in_dvc(path: Path) -> bool:
    return any(Path(f"{place}.dvc").is_file() for place in (path, *path.parents))


def stages_to_run(overrides: Sequence[str]) -> frozenset[str]:
    """Stages that `dvc repro` would run with these values: those that are changed or whose params are set, and what depends on them.

    Raises:
        InputError: `dvc status` fails, or dvc.yaml can't be read.
    """
    done = subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        raise InputError("check-status", f"`dvc status` fails: {done.stderr.strip()[-1000:]}")
    pipeline = pipeline_stages()
    never_ran = pipeline.keys() - {entry.stage for entry in recorded()}
    names = [override.partition("=")[0].lstrip("+~").rpartition(":")[2] for override in overrides]
    running = {*json.loads(done.stdout), *never_ran}
    running |= {stage for stage, wired in pipeline.items() if any(_is_part(name, param) for name in names for param in wired["params"])}
    while True:
        made = {output for stage in running & pipeline.keys() for output in outputs_of(pipeline[stage])}
        more = {stage for stage, wired in pipeline.items() if made & {*wired["deps"]}} - running
        if not more:
            return frozenset(running)
        running |= more


def _is_part(name: str, param: str) -> bool:
    """Whether one of two dotted names is the other, or a part of it."""
    return f"{name}.".startswith(f"{param}.") or f"{param}.".startswith(f"{name}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("-S", "--set-param", action="append", default=[], metavar="NAME=VALUE", help="as `dvc exp run` takes it")
    parser.add_argument("--temp", "--queue", dest="in_copy", action="store_true", help="as `dvc exp run` takes them")
    arguments, _ = parser.parse_known_args()
    if not PARAMS.is_file():
        raise InputError("params-missing", f"{PARAMS} does not exist: run from the repository's root")
    found = problems(arguments.set_param, in_copy=arguments.in_copy)
    for error in found:
        command.say(f"error: {error}", as_error=True)
    if found:
        if commands := downloads_of(arguments.set_param):
            command.say("\n  ".join(["What downloads it:", *commands]), as_error=True)
        sys.exit(found[0].exit_code)
    command.say("checked: params, packages, data and base model")


if __name__ == "__main__":
    command.run(main)
