"""A model's folder without its weights: its config and its tokenizer."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from qlora.core.errors import InputError, translate_errors
from qlora.core.files import require_file
from qlora.core.text import visible

MOST_LAYERS = 1000
"""No model has as many; of a number without end, making the model would take all memory."""
UNLOADABLE = "can't be loaded as a causal language model"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises InputError when the folder holds no tokenizer that can be loaded."""
    problem = "holds no tokenizer that can be loaded"
    with translate_errors("tokenizer-unloadable", folder, problem, "pin a whole model"), shown_visibly():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # Some damage shows only when a text is read.
        tokenizer.decode(tokenizer("Hello, world.")["input_ids"])
    return tokenizer


@contextmanager
def shown_visibly() -> Iterator[None]:
    """Show what libraries in Rust write past Python, such as the name of a key that they do not know, with nothing in it that steers a terminal."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with tempfile.TemporaryFile() as said:
        before = [(number, os.dup(number)) for number in (1, 2)]
        for number, _ in before:
            os.dup2(said.fileno(), number)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, kept in before:
                os.dup2(kept, number)
                os.close(kept)
            said.seek(0)
            sys.stderr.write(visible(said.read().decode(errors="replace")))


def context_length(config: Any) -> int:
    """Most tokens of a conversation that a model of this config was made for."""
    return int(config.get_text_config().max_position_embeddings)


def load_config(folder: Path) -> PretrainedConfig:
    """Raises InputError when the folder's config.json is of no model that transformers knows."""
    with translate_errors("base-model-unloadable", folder / "config.json", UNLOADABLE, "pin another one"):
        require_file(folder / "config.json")
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        context_length(config)
        if not 0 < (layers := int(config.get_text_config().num_hidden_layers)) <= MOST_LAYERS:
            raise ValueError(f"num_hidden_layers is {layers}")
    return config


def check_context(config: PretrainedConfig, max_length: int) -> None:
    """Raises InputError when training rows would be longer than a model of this config was made for."""
    context = context_length(config)
    if max_length > context:
        raise InputError("sequence-context", f"sequence.max_length = {max_length} exceeds the base model's context of {context} tokens: lower it")
