"""The base model that params.yaml names, verified: its folder, its config and its chat template."""

from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig

from qlora.model.chat_template import ChatTemplate
from qlora.model.config import load_config, load_tokenizer
from qlora.model.manifest import verified_folder
from qlora.params import Params


class BaseModel(NamedTuple):
    folder: Path
    """Of the weights, every file of which has the sha256 of the manifest."""
    config: PretrainedConfig
    template: ChatTemplate
    """With the base model's tokenizer."""


def open_base_model(values: Params, manifests: Path) -> BaseModel:
    """Find and verify the base model without loading its weights.

    Args:
        manifests: Folder of NAME.json.

    Raises:
        InputError: it is not pinned, not there, not the pinned one, or its tokenizer or chat template can't be used.
    """
    folder = verified_folder(values.base_model, manifests)
    return BaseModel(folder, load_config(folder), ChatTemplate(load_tokenizer(folder), values.chat, on_invalid=values.data.on_invalid))
