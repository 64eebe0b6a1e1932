"""Merge the adapter into the base model, and measure that the merged model answers as the adapter does.

    python -m tools.merge                              models/merged in bfloat16: weights, config, tokenizer, chat template, merge.json
    python -m tools.merge --dtype float32              the same sums to the last digits, twice the size
    python -m tools.merge --max-kl 0.05                needed for an adapter that was trained on 4-bit weights: there is no default for it
    python -m tools.merge --gguf path/to/llama.cpp     a GGUF file besides, by its converter

The adapter on the base model as it was trained on is compared with the merged model, loaded from disk, over the test conversations. The
numbers go to metrics/merge.json, a file that no stage reads or writes. Above --max-kl (mean nats per token) nothing is put in place, the
numbers say `accepted: false` and the exit code is 4. models/merged/merge.json says what the model was made of, by sha256 and by the md5 of dvc.lock.
"""

import argparse
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import params
from qlora.core.conversation import Conversation
from qlora.core.dvc_lock import require_recorded
from qlora.core.errors import InputError
from qlora.core.files import read_jsonl, write_json
from qlora.params import Params
from qlora.runtime import command

if TYPE_CHECKING:
    from qlora.delivery.equivalence import Equivalence
    from qlora.model.base import BaseModel

ADAPTER = Path("models/adapter")
MANIFESTS = Path("models/base")
TEST = Path("data/prepared/test.jsonl")
REPORT = Path("metrics/merge.json")
GGUF = "model.gguf"
UNLIKE = 4
"""Exit code when the merged model is too far from the adapter."""
MAX_KL = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}
"""Mean nats per token that rounding alone may make."""


def merge(values: Params, arguments: argparse.Namespace) -> "Equivalence":
    """Make the merged model, measure it, and put it in place if it is near enough.

    Raises:
        InputError: adapter or test set is not what dvc.lock records, or base model, adapter and params do not belong together.
        MachineError: no room, or no converter.
    """
    from qlora.delivery import gguf  # noqa: PLC0415 - seconds that --help need not take
    from qlora.delivery import merge as merging  # noqa: PLC0415
    from qlora.model.base import open_base_model  # noqa: PLC0415

    manifest = MANIFESTS / f"{values.base_model.name}.json"
    adapter_md5 = merging.require_recorded_adapter(values, manifest, ADAPTER)
    require_recorded([TEST])
    conversations = [Conversation.from_record(record) for record in read_jsonl(TEST)]
    converter = None if arguments.gguf is None else gguf.find_converter(arguments.gguf)
    base = open_base_model(values, MANIFESTS)
    merging.require_room(base.folder, arguments.out, arguments.dtype)
    with _aside(arguments.out) as partial:
        model = merging.merged_model(values, base.folder, ADAPTER, arguments.dtype)
        merging.write(model, base.template, values, ADAPTER, partial)
        # Before two others are loaded.
        del model
        found = _measure(values, base, partial, conversations, arguments)
        accepted = found.within(arguments.max_kl)
        made_of = merging.chain(values, manifest, ADAPTER, adapter_md5, arguments.dtype)
        equivalence = {**found.record(), "max_kl": arguments.max_kl if math.isfinite(arguments.max_kl) else None, "accepted": accepted}
        if accepted:
            if converter:
                gguf.convert(converter, partial, partial / GGUF, arguments.dtype)
            write_json(partial / merging.RECORD, {**made_of, "equivalence": equivalence, "files": merging.files_of(partial)})
            shutil.rmtree(arguments.out, ignore_errors=True)
            partial.rename(arguments.out)
        # Last: a failed conversion or rename leaves no numbers of a model that is not there.
        write_json(REPORT, {**equivalence, "ran_on": made_of})
    return found


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder beside the place, gone at the end unless it was put there; those of killed processes go too.

    Raises:
        InputError: at the place lies what no merge wrote.
    """
    if out.exists() and not (out / "merge.json").is_file():
        raise InputError("merge-occupied", f"{out} holds something else than a merged model: move it away, or give another --out")
    for abandoned in out.parent.glob(f"{out.name}.*.partial"):
        process = abandoned.name.split(".")[-2]
        if Path("/proc").exists() and not Path("/proc", process).exists():
            shutil.rmtree(abandoned, ignore_errors=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _measure(
    values: Params,
    base: "BaseModel",
    partial: Path,
    conversations: Sequence[Conversation],
    arguments: argparse.Namespace,
) -> "Equivalence":
    """The adapter on the base model as it was trained on against the merged model from disk, both on one device."""
    from qlora.delivery import equivalence  # noqa: PLC0415
    from qlora.delivery import merge as merging  # noqa: PLC0415
    from qlora.model import adapter, device, loading  # noqa: PLC0415

    place = device.set_up_device(values.hardware.model_copy(update={"device": arguments.device or values.hardware.device}), deterministic=False)
    progress, device_map = values.runtime.progress, values.hardware.device_map
    trained_on = loading.load_model(values.base_model, base.folder, place, progress=progress, device_map=device_map)
    adapted: Any = adapter.load_adapter(trained_on, ADAPTER, values.base_model.name)
    plain = values.base_model.model_copy(update={"load_in_4bit": False, "load_in_8bit": False, "dtype": arguments.dtype})
    merged = loading.load_model(plain, partial, place, progress=progress, device_map=device_map)
    chosen = values.predict.model_copy(update={"num_examples": arguments.num_examples or values.predict.num_examples})
    with device.translate_out_of_memory(device.PREDICTION_SETTINGS, values):
        merged_template = merging.own_template(partial, values)
        return equivalence.compare(adapted, merged, base.template, merged_template, conversations, chosen, place, progress=progress)


def distance(text: str) -> float:
    number = float(text)
    if not number >= 0:
        raise ValueError
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=sorted(MAX_KL), default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("models/merged"), help="folder of the merged model (models/merged)")
    parser.add_argument(
        "--max-kl", type=distance, help="greatest mean KL in nats per token; inf: measure only (float32 1e-6, float16 1e-3, bfloat16 5e-3)"
    )
    parser.add_argument("--num-examples", type=command.positive_int, help="test conversations measured (predict.num_examples)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where both models are compared (hardware.device); merging itself uses the CPU")
    parser.add_argument("--gguf", nargs="?", const="", metavar="LLAMA_CPP", help="also write model.gguf; folder of llama.cpp, or its converter")
    arguments = parser.parse_args()
    values = params.load(Path("params.yaml"))
    if arguments.max_kl is None:
        if values.base_model.is_quantised:
            raise InputError(
                "merge-max-kl",
                "the adapter was trained on quantised weights and is merged into the unquantised ones, which answer somewhat otherwise: only you can "
                "say how much is too much. Give --max-kl NATS (mean per token), or --max-kl inf to measure it first",
            )
        arguments.max_kl = MAX_KL[arguments.dtype]
    found = merge(values, arguments)
    print(found.table())
    if not found.within(arguments.max_kl):
        reason = f"exceeds {arguments.max_kl:.3g}" if math.isfinite(found.kl_mean) else "is not finite: one of the two models overflows"
        print(f"\nnot put in place: a mean KL of {found.kl_mean:.3g} {reason}; {REPORT} holds the numbers", file=sys.stderr)
        sys.exit(UNLIKE)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"\n{arguments.out}: {arguments.dtype}, {size / 1e6:,.1f} MB; {arguments.out / 'merge.json'} says of what, {REPORT} how near")


if __name__ == "__main__":
    command.run(main)
