"""A model that was tuned on a family's template ends its answers by itself."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.model.chat_template import ChatTemplate
from qlora.model.loading import stop_token_ids
from qlora.params import Params
from qlora.prediction.generation import batches_of, generate
from qlora.training.tokenization import encode_split
from tests.families import settings_of, stand_in, stock, talk
from tests.helpers import chat_params
from tests.unit.trainings import changed

WORDS = ("red", "one two", "東京", "- a\n- b", "x = 1\ny = 2")


@pytest.mark.parametrize(
    ("name", "values", "rows_per_talk"),
    [
        ("qwen2_5", {}, 1),
        ("gemma", {}, 1),
        ("llama3_1", {}, 1),
        ("mistral_v7", {}, 1),
        ("glm4moe", {}, 1),
        ("qwen3", {}, 2),
        ("qwen3_5_think", {"enable_thinking": False}, 2),
        ("gptoss", {"strftime_now": "26 Jul 2024"}, 2),
    ],
)
def test_greedy_answers_end_by_themselves(default_params: Params, name: str, values: dict[str, Any], rows_per_talk: int) -> None:
    source = stock()[name]
    tokenizer = stand_in(name, source)
    template = ChatTemplate(tokenizer, chat_params(template_kwargs={**settings_of(source), **values}))
    # A second answer follows the first: for a family that shows earlier answers otherwise it is a row of its own.
    talks = [talk(f"Say {word}.", word, f"And {other}?", other) for word, other in zip(WORDS, WORDS[::-1], strict=True)]
    made = encode_split(talks, template, changed(default_params, sequence__max_length=1024).sequence, "train")
    assert len(made.examples) == rows_per_talk * len(talks)
    model = tuned(tokenizer, made.examples)
    prompts = [row.ids[: span[0]] for conversation in talks for row, span in template.encode(conversation).answers()]
    answers = generate(
        model,
        tokenizer,
        prompts,
        dict(enumerate(batches_of(prompts, 1000, 40))),
        changed(default_params, predict__max_new_tokens=40).predict,
        seed=0,
        stop_ids=stop_token_ids(model, tokenizer, template.stop_ids),
        context=1024,
        content_of=template.content_of,
        done=lambda _: None,
    )
    assert sum(answer.stopped for answer in answers.values()) >= 0.95 * len(prompts)
    expected = [conversation.messages[place]["content"] for conversation in talks for place in (1, 3)]
    assert [answers[number].text for number in range(len(prompts))] == expected


def tuned(tokenizer: Any, examples: Any) -> LlamaForCausalLM:
    """A model of a hundred thousand weights that knows the examples by heart."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=1024))
    longest = max(len(example.ids) for example in examples)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([example.ids + [pad] * (longest - len(example.ids)) for example in examples])
    labels = torch.tensor([example.labels + [-100] * (longest - len(example.ids)) for example in examples])
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(400):
        loss = model(input_ids=ids, attention_mask=(ids != pad).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 5e-3:
            break
    return model.eval()
