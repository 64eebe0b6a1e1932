"""Answers of a model to prompts: batched, sorted by length, cut where a turn ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora.params.evaluate import EvaluateParams


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    stopped: bool
    """Whether the model ended its turn, rather than being cut."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    params: EvaluateParams,
    *,
    stop_ids: Sequence[int],
    context: int,
    done: Callable[[int], object],
) -> list[Answer]:
    """One answer per prompt, in the order of the prompts.

    Prompts are answered longest first in batches of params.batch_size, padded on the left and masked. A row's answer ends
    at its first stop token, after max_new_tokens, or where the model's context ends, whatever its batch goes on to do.

    Args:
        stop_ids: Tokens that end an answer.
        context: Most tokens of prompt and answer together.
        done: Called with the number of prompts answered, after each batch.
    """
    config = GenerationConfig(
        max_new_tokens=params.max_new_tokens,
        do_sample=params.do_sample,
        # Without sampling transformers warns of values that it would not read.
        temperature=params.temperature if params.do_sample else None,
        top_p=params.top_p if params.do_sample else None,
        top_k=0 if params.do_sample else None,
        eos_token_id=list(stop_ids),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    # What this config leaves open, generate would take from the model's own: a repetition penalty, say, that no param shows.
    model.generation_config = config
    torch.manual_seed(params.seed)
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    for start in range(0, len(order), params.batch_size):
        batch = order[start : start + params.batch_size]
        new_ids = _generate_batch(model, [prompts[index] for index in batch], config)
        for index, ids in zip(batch, new_ids, strict=True):
            budget = min(params.max_new_tokens, context - len(prompts[index]))
            answers[index] = _answer(tokenizer, ids[:budget], set(stop_ids))
        done(len(batch))
    return [answers[index] for index in range(len(prompts))]


@torch.inference_mode()
def _generate_batch(model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[list[int]]:
    """New token ids of each prompt, padding included."""
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[config.pad_token_id] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)], device=model.device)
    mask = torch.tensor([[0] * pad + [1] * len(prompt) for pad, prompt in zip(padding, prompts, strict=True)], device=model.device)
    generate: Any = model.generate
    made = generate(input_ids=ids, attention_mask=mask, generation_config=config)
    new_ids: list[list[int]] = made[:, width:].tolist()
    return new_ids


def _answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_ids: set[int]) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    text = tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
    return Answer(str(text).strip(), stopped=end is not None)
