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
    from qlora.model.config import load_tokenizer

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
    """Twenty: of whole conversations, and of answers that stand alone after a history that the template shows otherwise."""
    from qlora.core.conversation import Conversation, Message
    from qlora.model.chat_template import ChatTemplate
    from qlora.model.config import load_tokenizer
    from qlora.training.tokenization import encode_split

    def turns(number: int) -> list[Message]:
        question = f"What is {number} + 1?" + " please" * (number % 4)
        return [Message(role="user", content=question), Message(role="assistant", content=str(number + 1))]

    whole = [Conversation(str(number), "c", turns(number)) for number in range(10, 26)]
    rewriting = load_tokenizer(TINY)
    source = str(rewriting.chat_template)
    rewriting.chat_template = source.replace(
        "generation %}{{- message['content'] | trim", "generation %}{{- message['content'] | trim + ('' if loop.last else ' ok')"
    )
    assert rewriting.chat_template != source
    alone = [Conversation(str(number), "c", turns(number) + turns(number + 1)) for number in (26, 28)]
    one_by_one = encode_split(alone, ChatTemplate(rewriting, few_steps.chat), few_steps.sequence, "train")
    assert one_by_one.one_by_one == len(alone)
    return encode_split(whole, template, few_steps.sequence, "train").examples + one_by_one.examples
