"""The embedded base model and its tokenizer."""

from pathlib import Path
from typing import Any

import pytest

from qlora import params
from qlora.params import Params

TINY = Path(__file__).parents[2] / "models" / "base" / "tiny"


@pytest.fixture(scope="session")
def default_params() -> Params:
    return params.load(Path(__file__).parents[2] / "params.yaml")


@pytest.fixture
def tokenizer() -> Any:
    from qlora.base_model import load_tokenizer

    return load_tokenizer(TINY)


@pytest.fixture
def template(tokenizer: Any, default_params: Params) -> Any:
    from qlora.chat_template import ChatTemplate

    return ChatTemplate(tokenizer, default_params.chat)


@pytest.fixture
def tiny_model(default_params: Params) -> Any:
    import torch

    from qlora.base_model import load_model

    return load_model(default_params.base_model, TINY, torch.device("cpu"), progress=False)
