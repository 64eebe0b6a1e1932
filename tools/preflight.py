"""Will it fit, before anything is downloaded or rented? What a training by these params needs, from the base model's shape alone.

python -m tools.preflight                         of params.yaml, on this machine
python -m tools.preflight --recipe NAME           of a recipe
python -m tools.preflight --memory 24             for a card of 24 GB (22.3 GiB), wherever this runs

Ends with 3 when it does not fit, or when there is no such card here. `train` asks the same before it begins, and then makes one pass over the longest
rows. A line recommends predict.batch_tokens; nothing sets it from the machine, since another value can change answers. The shape is that of the
pinned base model, else the one in recipes/shapes/. docs/recipes.md holds the estimates of all recipes.
"""

import argparse
import io
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import params
from qlora.core.errors import InputError, MachineError, translate_errors
from qlora.core.text import in_shell
from qlora.params import Params
from qlora.runtime import command
from tools import recipes

if TYPE_CHECKING:
    from qlora.training.memory import Estimate

MANIFESTS = Path("models/base")
SHAPES = Path("recipes/shapes")
GB, GIB, MIB = 10**9, 2**30, 2**20
BAR = 40
SHARE = 0.8
"""Of the free memory that a batch may take by estimate: torch's allocator leaves gaps, and a longer cache is made beside the one before it."""
STEP = 1024
"""A recommended predict.batch_tokens is a multiple of it."""
LOGIT_COPIES = {False: 1, True: 6}
"""Tensors in float32 of a step's logits, greedy or drawn: sorted, as probabilities, their sums, and masks."""


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

    from qlora.model.config import load_config  # noqa: PLC0415
    from qlora.model.manifest import find_weights, read_manifest  # noqa: PLC0415

    manifest, shape = MANIFESTS / f"{name}.json", SHAPES / f"{name}.json"
    if manifest.exists():
        return load_config(find_weights(name, read_manifest(manifest)))
    if shape.exists():
        with translate_errors("base-model-unloadable", shape, "is not a config of a model", f"see `git diff {in_shell(shape)}`"):
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


def answer_bytes_per_token(values: Params, config: Any, cards: int = 1) -> float:
    """Memory of a token of a batch that is answered, on each of the cards that the layers are split over, by estimate.

    Keys and values of all layers, and what one layer and the head take for a moment.
    """
    text = config.get_text_config()
    element = 4 if values.base_model.dtype == "float32" else 2
    heads, hidden = int(text.num_attention_heads), int(text.hidden_size)
    head_dim = int(getattr(text, "head_dim", None) or hidden // heads)
    kept = 2 * int(text.num_hidden_layers) * int(getattr(text, "num_key_value_heads", None) or heads) * head_dim * element
    # sdpa repeats keys and values for each head; beside them hidden states, and the three tensors of a gated MLP.
    layer = (2 * heads * head_dim + 4 * hidden + 3 * int(getattr(text, "intermediate_size", None) or 4 * hidden)) * element
    # Of each row the logits of one token, which has this many places.
    logits = int(text.vocab_size) * (element + LOGIT_COPIES[values.predict.do_sample] * 4) / values.predict.max_new_tokens
    return kept / cards + layer + logits


def batch_tokens(values: Params, config: Any, needed: "Estimate", memory: int) -> int:
    """The predict.batch_tokens that this memory of a card should hold beside the model; 0: not STEP.

    Args:
        needed: Of a training by these params.
        memory: Bytes.
    """
    cards = 1
    if values.hardware.device_map:
        from qlora.training.memory import estimate  # noqa: PLC0415 - seconds

        # A model that a training shards is split by layers where it answers.
        cards = values.hardware.processes_per_machine
        whole = values.hardware.model_copy(update={"strategy": "ddp", "offload_params": False})
        needed = estimate(values.model_copy(update={"hardware": whole}), config)
    free = memory - needed.context - (needed.weights + needed.adapter) // cards
    return max(0, int(SHARE * free / answer_bytes_per_token(values, config, cards)) // STEP * STEP)


def recommendation(values: Params, found: int) -> str:
    """A line about baseline and predict, for which so many tokens of a batch should fit."""
    now = values.predict.batch_tokens
    if not found:
        return f"  baseline and predict: no room for a batch of {STEP:,} tokens beside the model; predict.batch_tokens is {now:,}"
    return f"  baseline and predict: predict.batch_tokens up to {found:,} should fit, by estimate; it is {now:,}" + (
        ", too large" if now > found else ""
    )


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
    command.say(
        f"{values.base_model.name}: {rows} row(s) of {tokens:,} tokens a pass, {values.gradient_accumulation_steps} pass(es) an update on each of "
        f"{values.hardware.num_processes} process(es), {needed.flops_per_token / 1e9:.3g} GFLOP a token; on each device, by estimate:"
    )
    if arguments.memory is not None:
        here = int(arguments.memory * GB)
        command.say(table(needed, here))
        command.say(recommendation(values, batch_tokens(values, config, needed, here)))
        if needed.total > here:
            raise MachineError("memory-short", preflight.too_much(needed, here, values, config))
        return
    try:
        gpus.require_devices(values.hardware)
    except MachineError:
        command.say(table(needed, None))
        raise
    here = preflight.memory_bytes(values.hardware)
    command.say(table(needed, here))
    command.say(recommendation(values, batch_tokens(values, config, needed, here)))
    written = checkpoints.bytes_written(needed.adapter // memory.FLOAT, values.train.optim, keep_best=values.train.keep == "best")
    command.say(f"  on the disk up to {written / 1e6:,.0f} MB of {shutil.disk_usage('.').free / 1e6:,.0f}: checkpoints, adapter, cache")
    preflight.check_machine(values, config)
    checkpoints.require_disk(Path.cwd(), written)


if __name__ == "__main__":
    command.run(main)
