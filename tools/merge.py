"""Merge the adapter into the base model, and measure that the merged model answers as the adapter does.

    python -m tools.merge                              models/merged in bfloat16: weights, config, tokenizer, chat template, merge.json
    python -m tools.merge --dtype float32              the same sums to the last digits, twice the size
    python -m tools.merge --max-kl 0.05                needed for an adapter that was trained on 4-bit weights: there is no default for it
    python -m tools.merge --gguf path/to/llama.cpp     a GGUF file besides, by its converter
    python -m tools.merge --compare --device cpu       compares what an earlier run wrote, merges nothing

The adapter on the base model as it was trained on is compared with the merged model, loaded from disk, over the test conversations, one model
loaded at a time. The numbers go to metrics/merge.json, a file that no stage reads or writes. Until they are within --max-kl (mean nats per token)
the merged model waits in models/merged.pending: above it the numbers say `accepted: false` and the exit code is 4; when the comparison does not end,
for want of memory or by a signal, they say `compared: false` and the exit code is 3. models/merged/merge.json says what the model was made of, by
sha256 and by the md5 of dvc.lock.
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
from qlora.core.conversation import Conversation, read_conversations
from qlora.core.dvc_lock import require_recorded
from qlora.core.errors import InputError, MachineError, StoppedError, UserFacingError, translate_errors
from qlora.core.files import is_abandoned, read_record, write_json
from qlora.core.text import in_shell
from qlora.delivery.ownership import require_replaceable, require_replaceable_folder, write_own_json
from qlora.params import Params
from qlora.runtime import command

if TYPE_CHECKING:
    from qlora.delivery.equivalence import Equivalence
    from qlora.model.base import BaseModel
    from qlora.params.hardware import HardwareParams

ADAPTER = Path("models/adapter")
MANIFESTS = Path("models/base")
TEST = Path("data/prepared/test.jsonl")
REPORT = Path("metrics/merge.json")
RECORD = "merge.json"
GGUF = "model.gguf"
BATCH_TOKENS = 4096
"""Of prompts answered together: the merged model in 16 bits may fill most of the card that trained on 4 bits."""
LESS_MEMORY = "--batch-tokens 1 (one prompt after another), --num-examples 50, --device cpu"
UNLIKE = 4
"""Exit code when the merged model is too far from the adapter."""
MAX_KL = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}
"""Mean nats per token that rounding alone may make."""


def merge(values: Params, arguments: argparse.Namespace) -> "Equivalence":
    """Make the merged model, or find the one that an earlier run wrote, measure it, and put it in place if it is near enough.

    Raises:
        InputError: adapter or test set is not what dvc.lock records, or base model, adapter, merged model and params do not belong together; or
            where it would write lies what no merge wrote.
        MachineError: no room, no GPU or no converter, or the comparison did not end: the merged model then waits in its folder.
    """
    from qlora.delivery import gguf  # noqa: PLC0415 - seconds that --help need not take
    from qlora.delivery import merge as merging  # noqa: PLC0415
    from qlora.model.base import open_base_model  # noqa: PLC0415

    hardware = _hardware(values, arguments)
    require_replaceable(REPORT, own=True)
    for place in () if arguments.compare else (arguments.out, _pending(arguments.out)):
        _require_replaceable_model(place)
    manifest = MANIFESTS / f"{values.base_model.name}.json"
    adapter_md5 = merging.require_recorded_adapter(values, manifest, ADAPTER)
    require_recorded([TEST])
    conversations = read_conversations(TEST)
    converter = None if arguments.gguf is None else gguf.find_converter(arguments.gguf)
    base = open_base_model(values, MANIFESTS)
    made_of = merging.chain(values, manifest, ADAPTER, adapter_md5, arguments.dtype)
    folder = place_of(arguments) if arguments.compare else _pending(arguments.out)
    record = merging.require_written(folder, made_of) if arguments.compare else _write(values, base, folder, made_of, arguments)
    with _kept_when_it_fails(folder, arguments):
        found = _measure(values, base, folder, conversations, hardware, arguments)
    accepted = found.within(arguments.max_kl)
    equivalence = {**found.record(), "max_kl": arguments.max_kl if math.isfinite(arguments.max_kl) else None, "accepted": accepted}
    if accepted:
        write_json(folder / merging.RECORD, {**record, "equivalence": equivalence})
        if folder != arguments.out:
            _require_replaceable_model(arguments.out)
            shutil.rmtree(arguments.out, ignore_errors=True)
            folder.rename(arguments.out)
    # After the rename: no numbers of an accepted model that is not there.
    write_own_json(REPORT, {**equivalence, "compared": True, "ran_on": made_of})
    if accepted and converter:
        _add_gguf(converter, arguments)
    return found


def place_of(arguments: argparse.Namespace) -> Path:
    """Of a model that an earlier run wrote: the one that waits, else the one in place.

    Raises:
        InputError: there is neither.
    """
    for folder in (_pending(arguments.out), arguments.out):
        if (folder / RECORD).is_file():
            return folder
    raise InputError("merge-missing", f"neither {_pending(arguments.out)} nor {arguments.out} holds a merged model: run it without --compare")


def _pending(out: Path) -> Path:
    return out.with_name(f"{out.name}.pending")


def _hardware(values: Params, arguments: argparse.Namespace) -> "HardwareParams":
    """Where the models are compared. A flag and no param: another hardware.device would make the stages stale.

    Raises:
        MachineError: on a GPU, and there is none.
    """
    from qlora.runtime import gpus  # noqa: PLC0415

    hardware = values.hardware.model_copy(update={"device": arguments.device or values.hardware.device})
    try:
        gpus.require_gpu(hardware)
    except MachineError as error:
        raise MachineError(error.code, "the models would be compared on a GPU, but torch sees none here: give --device cpu, params stay") from None
    return hardware


def _write(values: Params, base: "BaseModel", folder: Path, made_of: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The merged model in the folder where it waits to be compared, and its record; the report says that it was not compared yet."""
    from qlora.delivery import merge as merging  # noqa: PLC0415

    merging.require_room(base.folder, arguments.out, arguments.dtype)
    with _aside(arguments.out) as partial:
        model = merging.merged_model(values, base.folder, ADAPTER, arguments.dtype)
        merging.write(model, base.template, values, ADAPTER, partial)
        record = {**made_of, "equivalence": None, "files": merging.files_of(partial)}
        write_json(partial / merging.RECORD, record)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    write_own_json(REPORT, {"accepted": None, "compared": False, "ran_on": made_of})
    return record


@contextmanager
def _kept_when_it_fails(folder: Path, arguments: argparse.Namespace) -> Iterator[None]:
    """Say that the folder keeps the merged model when it can't be compared.

    Raises:
        MachineError: memory ran out or a signal came; with the command that goes on from there.
        InputError: the test set or one of the models can't be measured.
    """
    from qlora.model import device  # noqa: PLC0415

    try:
        yield
    except InputError as error:
        raise InputError(error.code, f"{error.message}. {folder} keeps the merged model, which was not compared") from error
    except (UserFacingError, RuntimeError, MemoryError, OSError) as error:
        # What answers prompts names a param in its own message.
        cause = error.__cause__ if isinstance(error, MachineError) and error.__cause__ else error
        out_of_memory = device.out_of_memory(cause)
        if not out_of_memory and not isinstance(error, UserFacingError | OSError):
            raise
        # The message of a signal says that nothing was written.
        reason = out_of_memory or ("a signal came" if isinstance(error, StoppedError) else str(error))
        less = f"What saves memory: {LESS_MEMORY}. " if out_of_memory else ""
        raise MachineError(
            "merge-not-compared",
            f"{folder} keeps the merged model, which was not compared: {reason}. {less}No param has to change; to continue: "
            f"`python -m tools.merge --compare{_flags(arguments)}`",
        ) from error


def _flags(arguments: argparse.Namespace) -> str:
    """Those of this call that a comparison reads, as they are typed."""
    names = ("out", "num_examples", "batch_tokens", "device", "gguf")
    given = {"max_kl": repr(arguments.max_kl), **{name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}}
    return "".join(f" --{name.replace('_', '-')}" + (f" {in_shell(str(value))}" if value else "") for name, value in given.items())


def _add_gguf(converter: Path, arguments: argparse.Namespace) -> None:
    """A GGUF file in the folder of the merged model, and in its record.

    Raises:
        MachineError: the converter failed; the model stays in place without it.
    """
    from qlora.delivery import gguf  # noqa: PLC0415
    from qlora.delivery import merge as merging  # noqa: PLC0415

    out, partial = arguments.out, arguments.out / f"{GGUF}.partial"
    try:
        gguf.convert(converter, out, partial, arguments.dtype)
        partial.rename(out / GGUF)
    except MachineError as error:
        again = f"`python -m tools.merge --compare{_flags(arguments)}` tries again"
        raise MachineError(error.code, f"{error.message}\n{out} holds the merged model without a GGUF file; {again}") from None
    finally:
        partial.unlink(missing_ok=True)
    record = read_record(out / merging.RECORD)
    write_json(out / merging.RECORD, {**record, "files": merging.files_of(out)})


def _require_replaceable_model(folder: Path) -> None:
    """Raises InputError unless nothing is there, or a merged model as a merge wrote it."""
    # The GGUF file of a converter that was killed is in no record.
    require_replaceable_folder(folder, read_record(folder / RECORD).get("files", {}), RECORD, f"{GGUF}.partial")


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder beside the place, gone at the end unless it was put there; those of killed processes go too."""
    for abandoned in out.parent.glob(f"{out.name}.*.partial"):
        if is_abandoned(abandoned):
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
    folder: Path,
    conversations: Sequence[Conversation],
    hardware: "HardwareParams",
    arguments: argparse.Namespace,
) -> "Equivalence":
    """The adapter on the base model as it was trained on against the merged model from disk, one after the other on one device."""
    from qlora.delivery import equivalence  # noqa: PLC0415
    from qlora.delivery import merge as merging  # noqa: PLC0415
    from qlora.model import adapter, device, loading  # noqa: PLC0415

    place = device.set_up_device(hardware, deterministic=False)
    progress, device_map = values.runtime.progress, hardware.device_map if place.type == "cuda" else None

    tried = values.base_model
    if place.type == "cpu" and tried.attn_implementation not in ("varlen", "sdpa", "eager"):
        tried = tried.model_copy(update={"attn_implementation": "sdpa"})

    def adapted() -> Any:
        trained_on = loading.load_model(tried, base.folder, place, progress=progress, device_map=device_map)
        return adapter.load_adapter(trained_on, ADAPTER, values.base_model.name)

    def merged() -> Any:
        plain = tried.model_copy(update={"load_in_4bit": False, "load_in_8bit": False, "dtype": arguments.dtype})
        return loading.load_model(plain, folder, place, progress=progress, device_map=device_map)

    num_examples = arguments.num_examples or values.predict.num_examples
    batch_tokens = arguments.batch_tokens or min(BATCH_TOKENS, values.predict.batch_tokens)
    chosen = values.predict.model_copy(update={"num_examples": num_examples, "batch_tokens": batch_tokens})
    own = merging.own_template(folder, values)
    return equivalence.compare(adapted, merged, base.template, own, conversations, chosen, place, scratch=folder.parent, progress=progress)


def distance(text: str) -> float:
    number = float(text)
    if not number >= 0:
        raise ValueError
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=sorted(MAX_KL), help="of the merged weights (bfloat16)")
    parser.add_argument("--out", type=Path, default=Path("models/merged"), help="folder of the merged model (models/merged)")
    parser.add_argument("--compare", action="store_true", help="merge nothing: compare the model that waits beside --out, else the one there")
    parser.add_argument(
        "--max-kl", type=distance, help="greatest mean KL in nats per token; inf: measure only (float32 1e-6, float16 1e-3, bfloat16 5e-3)"
    )
    parser.add_argument("--num-examples", type=command.positive_int, help="test conversations measured (predict.num_examples)")
    parser.add_argument(
        "--batch-tokens", type=command.positive_int, help=f"budget of prompts answered together ({BATCH_TOKENS}, or predict.batch_tokens if less)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where the models are compared (hardware.device); merging itself uses the CPU")
    parser.add_argument("--gguf", nargs="?", const="", metavar="LLAMA_CPP", help="also write model.gguf; folder of llama.cpp, or its converter")
    return parser


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.compare and arguments.dtype:
        parser.error("--dtype does not go with --compare: the model is there already")
    values = params.load(Path("params.yaml"))
    if arguments.compare:
        place = place_of(arguments) / RECORD
        with translate_errors("merge-changed", place, "is not what a merge wrote", "run `python -m tools.merge`"):
            arguments.dtype = read_record(place)["merged"]["dtype"]
            _ = MAX_KL[arguments.dtype]
    arguments.dtype = arguments.dtype or "bfloat16"
    if arguments.max_kl is None:
        if values.base_model.is_quantised:
            raise InputError(
                "merge-max-kl",
                "the adapter was trained on quantised weights and is merged into the unquantised ones, which answer somewhat otherwise: only you can "
                "say how much is too much. Give --max-kl NATS (mean per token), or --max-kl inf to measure it first",
            )
        arguments.max_kl = MAX_KL[arguments.dtype]
    found = merge(values, arguments)
    command.say(found.table())
    if not found.within(arguments.max_kl):
        reason = f"exceeds {arguments.max_kl:.3g}" if math.isfinite(found.kl_mean) else "is not finite: one of the two models overflows"
        kept = _pending(arguments.out)
        rest = (
            f"; {kept} keeps the model: --compare with another --max-kl takes it, else remove it"
            if kept.exists()
            else f"; {arguments.out} stays as it was"
        )
        print(f"\nnot put in place: a mean KL of {found.kl_mean:.3g} {reason}; {REPORT} holds the numbers{rest}", file=sys.stderr)
        sys.exit(UNLIKE)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    command.say(f"\n{arguments.out}: {arguments.dtype}, {size / 1e6:,.1f} MB; {arguments.out / 'merge.json'} says of what, {REPORT} how near")


if __name__ == "__main__":
    command.run(main)
