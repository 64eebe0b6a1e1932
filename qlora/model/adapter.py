"""The published adapter: a folder of safetensors and text with the same bytes for the same weights."""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qlora.core.errors import InputError, machine_error, translate_errors
from qlora.core.files import write_json
from qlora.model.chat_template import ChatTemplate
from qlora.model.config import load_tokenizer

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NAME = re.compile(r"[\w.-]+")
"""Of a layer, or of its last part."""


START = "start_of_training"


def remember_start(model: PeftModel) -> None:
    """Keep the adapter's first weights with the model.

    PiSSA and OLoRA take them out of the base model's weights: `publish` needs them to write an adapter of the base model as it is pinned.
    """
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    setattr(model, START, {name: weight.detach().clone() for name, weight in weights.items() if _is_a(name) or _is_b(name)})


def _is_a(name: str) -> bool:
    return name.endswith(".lora_A.weight")


def _is_b(name: str) -> bool:
    return name.endswith(".lora_B.weight")


def publish(model: PeftModel, template: ChatTemplate, folder: Path, base_name: str) -> None:
    """Write adapter, tokenizer and chat template; the folder appears whole or not at all.

    PEFT writes target_modules in the order of a set, the absolute path of the base model and a README: the first is sorted,
    the second becomes the path from the repository's root, where AutoPeftModelForCausalLM finds it, the third is removed.
    An adapter that began as a part of the base model's weights becomes one of the whole weights.

    Raises:
        InputError: the saved tokenizer and template give other tokens than those that were trained on.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, safe_serialization=True, save_embedding_layers=False)
        template.tokenizer.save_pretrained(partial)
    except (SafetensorError, OSError) as error:
        raise machine_error(error, partial) or error from None
    try:
        _require_same(template, partial)
    except InputError:
        shutil.rmtree(partial)
        raise
    (partial / "README.md").unlink(missing_ok=True)
    config = json.loads((partial / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = _path_of(base_name)
    config["target_modules"] = sorted(config["target_modules"])
    if start := getattr(model, START, None):
        config |= _convert(partial / WEIGHTS, start, config)
    write_json(partial / CONFIG, config)
    make_readable(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def make_readable(folder: Path) -> None:
    """Give every file of a folder that this process made the permissions that its umask leaves; safetensors writes files for their owner alone."""
    permissions = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        path.chmod(permissions)


def _convert(path: Path, start: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """Rewrite the weights of an adapter of W - s B0 A0 as one of W, of twice the rank, and return what changes in its config.

    With scale s, the trained model is W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]. PEFT's path_initial_model_for_weight_conversion does the
    same by way of a second adapter on disk.

    Args:
        start: A0, shape (r, inputs), and B0, shape (outputs, r), of each layer, by their names in the file.
    """
    weights = load_file(path)
    for name, first in start.items():
        first = first.to("cpu", weights[name].dtype)
        weights[name] = torch.cat([weights[name], first], dim=0) if _is_a(name) else torch.cat([weights[name], -first], dim=1)
    save_file(weights, path, metadata={"format": "pt"})
    # The scale is lora_alpha / r, or lora_alpha / sqrt(r): it stays.
    alpha = config["lora_alpha"] * (math.sqrt(2) if config["use_rslora"] else 2)
    return {"r": 2 * config["r"], "lora_alpha": alpha, "init_lora_weights": True}


def _path_of(base_name: str) -> str:
    """Of a base model, from the repository's root."""
    return f"models/base/{base_name}"


def require_saveable(template: ChatTemplate) -> None:
    """Raises InputError when the tokenizer, saved and loaded again, gives other tokens: known before the training rather than after it."""
    with tempfile.TemporaryDirectory() as folder:
        with translate_errors("tokenizer-unloadable", template.tokenizer.name_or_path, "holds a tokenizer that can't be saved", "pin another one"):
            template.tokenizer.save_pretrained(folder)
        _require_same(template, Path(folder))


def _require_same(template: ChatTemplate, folder: Path) -> None:
    template.require_same(ChatTemplate.saved(load_tokenizer(folder)))


def require_safetensors(folder: Path) -> None:
    """Raises InputError when the folder holds no adapter_model.safetensors: PEFT would unpickle adapter_model.bin, or ask the Hub."""
    if not (folder / WEIGHTS).is_file():
        raise InputError(
            "adapter-not-safetensors", f"{folder} holds no {WEIGHTS}: only safetensors weights are loaded, never a pickle. Run `dvc repro train`."
        )


def _require_names(config: Mapping[str, Any]) -> None:
    """Raises ValueError where PEFT would search the names of all layers by a pattern of the config, which may take for ever: names are enough."""
    for key in ("target_modules", "exclude_modules", "layers_pattern", "target_parameters", "rank_pattern", "alpha_pattern"):
        value = config.get(key)
        if value and not all(isinstance(name, str) and NAME.fullmatch(name) for name in ([value] if isinstance(value, str) else value)):
            raise ValueError(f"{key} of {CONFIG} holds something else than names of layers")


def load_adapter(base: PreTrainedModel, folder: Path, base_name: str) -> PeftModel:
    """The base model, which is models/base/`base_name`, with the adapter on it.

    Raises:
        InputError: the folder holds no LoRA adapter in safetensors, or one of another base model.
    """
    if not (folder / CONFIG).is_file():
        raise InputError("adapter-missing", f"{folder} holds no {CONFIG}: run `dvc repro train`")
    require_safetensors(folder)
    with translate_errors("adapter-unloadable", folder, "does not fit this base model, or is damaged", "run `dvc repro`"):
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        # Other kinds name further adapters to load, and megatron_config a module to import.
        if config["peft_type"] != "LORA" or config.get("megatron_config"):
            raise ValueError(f"{CONFIG} is not that of a plain LoRA adapter")
        _require_names(config)
        # Two base models of one shape would take each other's adapters without a word.
        trained_on = config["base_model_name_or_path"]
        model = PeftModel.from_pretrained(base, folder)
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            stored = set(weights.keys())
        # PEFT warns of weights that are not there, and leaves those as they were made.
        if missing := sorted(get_peft_model_state_dict(model, save_embedding_layers=False).keys() - stored):
            raise ValueError(f"{WEIGHTS} lacks {len(missing)} weights, such as {missing[0]}")
    if trained_on != _path_of(base_name):
        raise InputError(
            "adapter-foreign", f"{folder} was trained on {trained_on}, base_model.name is {base_name!r}: run `dvc repro`, or set base_model.name"
        )
    return model
