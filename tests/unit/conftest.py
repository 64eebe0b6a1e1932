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
    from qlora.model.loading import load_tokenizer

    return load_tokenizer(TINY)


@pytest.fixture
def template(tokenizer: Any, default_params: Params) -> Any:
    from qlora.model.chat_template import ChatTemplate

    return ChatTemplate(tokenizer, default_params.chat)


@pytest.fixture
def tiny_model(default_params: Params) -> Any:
    import torch

    from qlora.model.loading import load_model

    return load_model(default_params.base_model, TINY, torch.device("cpu"), progress=False)


@pytest.fixture
def few_steps(default_params: Params) -> Params:
    from tests.unit.trainings import changed

    return changed(
        default_params,
        train__max_steps=3,
        train__batch_size=2,
        train__logging_steps=1,
        train__warmup_steps=0,
        sequence__max_length=128,
        runtime__progress=False,
    )


@pytest.fixture
def examples(template: Any, few_steps: Params) -> Any:
    from qlora.core.conversation import Conversation, Message
    from qlora.training.tokenization import encode_split

    conversations = [
        Conversation(
            str(number),
            "c",
            [Message(role="user", content=f"What is {number} + 1?" + " please" * (number % 4)), Message(role="assistant", content=str(number + 1))],
        )
        for number in range(10, 30)
    ]
    return encode_split(conversations, template, few_steps.sequence, "train").examples
