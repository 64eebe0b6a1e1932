"""The adapter merged into the unquantised base model: one model in 16 or 32 bits that any program can load.

Needs the memory of one copy of the model and of three layers in float32: a copy in the numbers asked for where it is stored in those, else in
float32.
"""

import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from qlora.core.dvc_lock import locked_stages, md5_of, recorded, recorded_outputs, require_recorded
from qlora.core.errors import InputError, MachineError, translate_errors
from qlora.core.files import read_record
from qlora.core.hashing import sha256_of
from qlora.model import adapter, loading
from qlora.model.chat_template import ChatTemplate
from qlora.model.config import load_config, load_tokenizer
from qlora.model.manifest import read_manifest
from qlora.params import Params
from qlora.prediction.generation import answer_config

MergedDtype = Literal["float32", "bfloat16", "float16"]
RECORD = "merge.json"
STAGE = "train"
"""Whose dependencies dvc.lock must record as they are now."""
LINKS = ("base_model", "adapter", "chat", "lora", "merged")
"""Parts of the chain that decide what the merged weights are; the versions of the packages are not among them."""
PACKAGES = ("torch", "transformers", "peft", "safetensors")


def require_recorded_adapter(values: Params, manifest: Path, folder: Path) -> str:
    """The md5 by which dvc.lock records the adapter, which is the last link of the chain that a merged model continues.

    Raises:
        InputError: dvc.lock records no such adapter or another one, or one that was trained with another base model, template or quantisation
            than params.yaml names now.
    """
    outputs = recorded_outputs()
    if str(folder) not in outputs or not folder.is_dir():
        raise InputError("merge-unrecorded", f"dvc.lock records no {folder} that is there: `dvc repro`, or `dvc pull` where it was pushed")
    require_recorded([folder])
    trained = locked_stages()[STAGE].get("params", {}).get("params.yaml", {})
    for name in ("base_model", "chat"):
        now = getattr(values, name).model_dump()
        if differing := [key for key, value in now.items() if trained.get(name, {}).get(key) != value]:
            key = differing[0]
            raise InputError(
                "merge-stale",
                f"params.yaml says {name}.{key} = {now[key]!r}, the adapter was trained with {trained.get(name, {}).get(key)!r}: "
                "`dvc repro`, or set it back",
            )
    for entry in recorded():
        if entry.stage == STAGE and entry.path == str(manifest) and md5_of(manifest) != entry.md5:
            raise InputError("merge-stale", f"{manifest} is not the manifest that the adapter was trained with: `dvc repro`, or restore it")
    return outputs[str(folder)]


def require_room(source: Path, target: Path, dtype: MergedDtype) -> None:
    """Raises MachineError when the disk can't hold the merged model beside what is there."""
    stored = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    # Most checkpoints are in 16 bits.
    needed = stored * (2 if dtype == "float32" else 1)
    place = next(parent for parent in target.absolute().parents if parent.is_dir())
    if (free := shutil.disk_usage(place).free) < needed:
        raise MachineError(
            "disk-space", f"{place} has {free / 1e9:.1f} GB free, the merged model needs up to {needed / 1e9:.1f}: make room, or --out"
        )


def merged_model(values: Params, base_folder: Path, adapter_folder: Path, dtype: MergedDtype) -> PreTrainedModel:
    """Base model plus adapter as one model, on the CPU: every sum in float32, rounded once to `dtype`.

    Raises:
        InputError: the pinned weights are quantised, or a merged weight is not a finite number in `dtype`.
    """
    config = load_config(base_folder)
    if getattr(config, "quantization_config", None):
        raise InputError("merge-quantised", f"{base_folder} holds quantised weights, which nothing can be added to: pin the unquantised model")
    # In other numbers than those asked for, weights that the adapter replaces would be rounded twice: float32 holds them all.
    loaded = dtype if config.dtype == getattr(torch, dtype) else "float32"
    plain = values.base_model.model_copy(update={"load_in_4bit": False, "load_in_8bit": False, "dtype": loaded, "attn_implementation": "eager"})
    base = loading.load_model(plain, base_folder, torch.device("cpu"), progress=values.runtime.progress)
    model = adapter.load_adapter(base, adapter_folder, values.base_model.name)
    return _merged(model, getattr(torch, dtype))


def _merged(model: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            # PEFT loads kinds of LoRA that it can't merge.
            with translate_errors("adapter-unloadable", name, "can't be merged", "train the adapter again with `dvc repro`"):
                try:
                    _merge_layer(module, dtype)
                except ValueError as error:
                    raise InputError("merge-not-finite", f"{name}: {error}; see reports/train.json, and train again") from None
    # What was merged stays so; copies of whole layers (modules_to_save) take the place of the base model's.
    merged: Any = model.unload()
    merged.to(dtype)
    _require_finite(merged, dtype)
    _say_whether_tied(merged)
    return merged  # type: ignore[no-any-return]


def _require_finite(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The last cast may overflow, and what was not merged was not looked at."""
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and (wrong := int((~weight.isfinite()).sum())):
            raise InputError(
                "merge-not-finite",
                f"{name}: {wrong:,} of {weight.numel():,} weights are not finite in {str(dtype).removeprefix('torch.')}, which ends at "
                f"{torch.finfo(dtype).max:.3g}: --dtype bfloat16 or float32; if they are not finite there either, see reports/train.json, "
                "and train again",
            )


def _merge_layer(layer: Any, dtype: torch.dtype) -> None:
    """Merge one layer in float32.

    Its weight becomes a parameter of its own: an output head that shares the embeddings' matrix would else change those too.
    """
    base = layer.get_base_layer()
    base.weight = nn.Parameter(base.weight.detach().float(), requires_grad=False)
    layer.merge(safe_merge=True)
    base.weight = nn.Parameter(base.weight.detach().to(dtype), requires_grad=False)


def _say_whether_tied(model: PreTrainedModel) -> None:
    """An adapter of the output head or the embeddings alone parts two matrices that were one: the config must say so, or loading joins them."""
    config: Any = model.config.get_text_config()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if config.tie_word_embeddings and head is not None and head.weight is not embeddings.weight:
        for part in (config, model.config):
            part.tie_word_embeddings = False
        # Read when the model is saved.
        model.all_tied_weights_keys = {}


def write(model: PreTrainedModel, template: ChatTemplate, values: Params, adapter_folder: Path, target: Path) -> None:
    """Weights, config, and how a server ends an answer; tokenizer and chat template are the adapter's files.

    Raises:
        InputError: the tokenizer beside the adapter gives other tokens than the one that it was trained with.
    """
    stops = loading.stop_token_ids(model, template.tokenizer, template.stop_ids)
    # Beginnings that a server goes on from: greedy or drawn, and the tokens that end a turn, as the evaluation has them.
    model.generation_config = answer_config(values.predict, template.tokenizer, stops)
    model.save_pretrained(target)
    for path in sorted(adapter_folder.iterdir()):
        if path.name not in (adapter.CONFIG, adapter.WEIGHTS):
            shutil.copyfile(path, target / path.name)
    adapter.make_readable(target)
    template.require_same(own_template(target, values))


def own_template(folder: Path, values: Params) -> ChatTemplate:
    """Tokenizer and template as another program finds them in a folder."""
    return ChatTemplate.saved(load_tokenizer(folder), on_control_tokens=values.chat.on_control_tokens)


def chain(values: Params, manifest: Path, adapter_folder: Path, adapter_md5: str, dtype: MergedDtype) -> dict[str, Any]:
    """What the merged model was made of."""
    pinned = read_manifest(manifest)
    return {
        "base_model": {
            **{name: value for name, value in pinned.record().items() if name != "files"},
            "name": values.base_model.name,
            "manifest_sha256": sha256_of(manifest),
            "trained_as": values.base_model.model_dump(exclude={"name"}),
        },
        "adapter": {"dvc_md5": adapter_md5, "sha256": {path.name: sha256_of(path) for path in sorted(adapter_folder.iterdir())}},
        "chat": values.chat.model_dump(),
        "lora": values.lora.model_dump(),
        "merged": {"dtype": dtype, "into": "the unquantised base model"},
        "versions": {name: importlib.metadata.version(name).split("+")[0] for name in PACKAGES},
    }


def require_written(folder: Path, made_of: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a merged model that an earlier run wrote.

    Args:
        made_of: `chain` of what is there now, in the numbers of that model.

    Raises:
        InputError: the folder's files are not those of its record, or it was made of something else.
    """
    record = read_record(folder / RECORD)
    # As JSON has it, which knows no tuples.
    now = json.loads(json.dumps(made_of))
    if differing := [name for name in LINKS if record.get(name) != now[name]]:
        raise InputError("merge-stale", f"{folder} was merged of another {differing[0]} than is there now: run `python -m tools.merge`")
    found = files_of(folder)
    if changed := [name for name in sorted(found.keys() | record["files"].keys()) if found.get(name) != record["files"].get(name)]:
        raise InputError("merge-changed", f"{folder / changed[0]} is not what the merge wrote: run `python -m tools.merge`")
    return record


def files_of(folder: Path) -> Mapping[str, dict[str, Any]]:
    """Bytes and sha256 of every file, by its name."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir()) if path.name != RECORD}
