"""Will it fit, before anything is downloaded or rented? What a training by these params needs, from the base model's shape alone.

python -m tools.preflight                         of params.yaml, on this machine
python -m tools.preflight --recipe NAME           of a recipe
python -m tools.preflight --memory 24             for a card of 24 GB (22.3 GiB), wherever this runs

Ends with 3 when it does not fit, or when there is no such card here. `train` asks the same before it begins, and then makes one pass over the longest
rows. The shape is that of the pinned base model, else the one in recipes/shapes/. docs/recipes.md holds the estimates of all recipes.
"""

import argparse
import io
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import params
from qlora.core.errors import InputError, MachineError
from qlora.params import Params
from qlora.runtime import command
from tools import recipes

if TYPE_CHECKING:
    from qlora.training.memory import Estimate

MANIFESTS = Path("models/base")
SHAPES = Path("recipes/shapes")
GB, GIB, MIB = 10**9, 2**30, 2**20
BAR = 40


def of_recipe(name: str) -> Params:
    """params.yaml with the recipe in place."""
    from ruamel.yaml import YAML  # noqa: PLC0415

    return params.check(YAML(typ="safe").load(io.StringIO(recipes.compose(recipes.PARAMS, recipes.path_of(name)))), name)


def shape_of(name: str) -> Any:
    """The config of a base model, without its weights.

    Raises:
        InputError: it is neither pinned nor in recipes/shapes/.
    """
    from transformers import AutoConfig  # noqa: PLC0415 - seconds

    from qlora.model.loading import load_config  # noqa: PLC0415
    from qlora.model.manifest import find_weights, read_manifest  # noqa: PLC0415

    manifest, shape = MANIFESTS / f"{name}.json", SHAPES / f"{name}.json"
    if manifest.exists():
        return load_config(find_weights(name, read_manifest(manifest)))
    if shape.exists():
        return AutoConfig.for_model(**json.loads(shape.read_text(encoding="utf-8")))
    raise InputError(
        "base-model-missing", f"base_model.name = {name!r} is neither pinned ({manifest}) nor a known shape ({shape}): `python -m tools.pin`"
    )


def table(needed: "Estimate", memory: int | None) -> str:
    """A line for each part, and the total."""
    unit, name = (GIB, "GiB") if needed.total >= GIB else (MIB, "MiB")
    lines = [f"  {part:12}{size / unit:9.2f} {name}  {'#' * round(BAR * size / needed.total)}".rstrip() for part, size in needed.parts.items()]
    of = f" of {memory / GIB:.1f} GiB" if memory else ""
    return "\n".join([*lines, f"  {'total':12}{needed.total / unit:9.2f} {name}{of}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="a recipe in place of params.yaml")
    parser.add_argument("--memory", type=command.positive, metavar="GB", help="of the card it is for (default: this machine's)")
    arguments = parser.parse_args()
    values = of_recipe(arguments.recipe) if arguments.recipe else params.load(recipes.PARAMS)
    # torch and transformers take seconds.
    from qlora.runtime import gpus  # noqa: PLC0415
    from qlora.training import checkpoints, memory, preflight  # noqa: PLC0415

    config = shape_of(values.base_model.name)
    needed = memory.estimate(values, config)
    rows, tokens = values.hardware.per_device_train_batch_size, values.sequence.max_length
    print(
        f"{values.base_model.name}: {rows} row(s) of {tokens:,} tokens a pass, {values.gradient_accumulation_steps} pass(es) an update on each of "
        f"{values.hardware.num_processes} process(es), {needed.flops_per_token / 1e9:.3g} GFLOP a token; on each device, by estimate:"
    )
    if arguments.memory is not None:
        here = int(arguments.memory * GB)
        print(table(needed, here))
        if needed.total > here:
            raise MachineError("memory-short", preflight.too_much(needed, here, values, config))
        return
    try:
        gpus.require_devices(values.hardware)
    except MachineError:
        print(table(needed, None), flush=True)
        raise
    print(table(needed, preflight.memory_bytes(values.hardware)))
    written = checkpoints.bytes_written(needed.adapter // memory.FLOAT, values.train.optim, keep_best=values.train.keep == "best")
    print(f"  on the disk up to {written / 1e6:,.0f} MB of {shutil.disk_usage('.').free / 1e6:,.0f}: checkpoints, adapter, cache")
    preflight.check_machine(values, config)
    checkpoints.require_disk(Path.cwd(), written)


if __name__ == "__main__":
    command.run(main)
