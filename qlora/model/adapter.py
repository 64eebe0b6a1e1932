"""The published adapter: a folder of safetensors and text with the same bytes for the same weights."""

import json
import shutil
import tempfile
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from qlora.core.errors import InputError
from qlora.core.files import write_json
from qlora.model.chat_template import ChatTemplate
from qlora.model.loading import load_tokenizer

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def publish(model: PeftModel, template: ChatTemplate, folder: Path, base_name: str) -> None:
    """Write adapter, tokenizer and chat template; the folder appears whole or not at all.

    PEFT writes target_modules in the order of a set, the absolute path of the base model and a README: the first is sorted,
    the second becomes the path from the repository's root, where AutoPeftModelForCausalLM finds it, the third is removed.

    Raises:
        InputError: the saved tokenizer and template give other tokens than those that were trained on.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, safe_serialization=True, save_embedding_layers=False)
    template.tokenizer.save_pretrained(partial)
    try:
        _require_same(template, partial)
    except InputError:
        shutil.rmtree(partial)
        raise
    (partial / "README.md").unlink(missing_ok=True)
    config = json.loads((partial / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = _path_of(base_name)
    config["target_modules"] = sorted(config["target_modules"])
    write_json(partial / CONFIG, config)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _path_of(base_name: str) -> str:
    """Of a base model, from the repository's root."""
    return f"models/base/{base_name}"


def require_saveable(template: ChatTemplate) -> None:
    """Raises InputError when the tokenizer, saved and loaded again, gives other tokens: known before the training rather than after it."""
    with tempfile.TemporaryDirectory() as folder:
        template.tokenizer.save_pretrained(folder)
        _require_same(template, Path(folder))


def _require_same(template: ChatTemplate, folder: Path) -> None:
    template.require_same(ChatTemplate.saved(load_tokenizer(folder)))


def load_adapter(base: PreTrainedModel, folder: Path, base_name: str) -> PeftModel:
    """The base model, which is models/base/`base_name`, with the adapter on it.

    Raises:
        InputError: the folder holds no adapter, or one of another base model.
    """
    if not (folder / CONFIG).is_file():
        raise InputError("adapter-missing", f"{folder} holds no {CONFIG}: run `dvc repro train`")
    try:
        # Two base models of one shape would take each other's adapters without a word.
        trained_on = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        model = PeftModel.from_pretrained(base, folder)
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise InputError("adapter-unloadable", f"{folder} does not fit this base model, or is damaged: {error}: run `dvc repro`") from None
    if trained_on != _path_of(base_name):
        raise InputError(
            "adapter-foreign", f"{folder} was trained on {trained_on}, base_model.name is {base_name!r}: run `dvc repro`, or set base_model.name"
        )
    return model
