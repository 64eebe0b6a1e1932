"""Answers of a model to prompts: batched, sorted by length, cut where a turn ends."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora.params.predict import PredictParams


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    stopped: bool
    """Whether the model ended its turn, rather than being cut."""
    tokens: int
    """Without the one that ended it."""


def batches_of(prompts: Sequence[Sequence[int]], batch_size: int, most: int | None = None) -> list[list[int]]:
    """Numbers of the prompts that are answered together: the longest first, so that little is padded and memory runs out at once or never.

    Args:
        most: Tokens of a prompt that leaves room for a whole answer; a longer one is answered alone, up to the end of the context. None: all do.
    """
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    alone = [[index] for index in order if most is not None and len(prompts[index]) > most]
    return alone + [order[start : start + batch_size] for start in range(len(alone), len(order), batch_size)]


def answer_config(params: PredictParams, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> GenerationConfig:
    """How the params say that answers are made, but for where they are cut: evaluation, chat and a served model have it from here."""
    return GenerationConfig(
        do_sample=params.do_sample,
        # Without sampling transformers warns of values that it would not read.
        temperature=params.temperature if params.do_sample else None,
        top_p=params.top_p if params.do_sample else None,
        top_k=0 if params.do_sample else None,
        eos_token_id=list(stop_ids),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batches: Mapping[int, Sequence[int]],
    params: PredictParams,
    *,
    seed: int,
    stop_ids: Sequence[int],
    context: int,
    content_of: Callable[[Sequence[int]], str],
    done: Callable[[int], object],
) -> dict[int, Answer]:
    """The answers to the prompts of these batches, by the number of the prompt.

    Prompts of a batch are padded on the left and masked. An answer ends at its first stop token, after max_new_tokens, or where the model's
    context ends, whatever its batch goes on to do. A drawn answer depends on the seed and its batch, not on which other batches
    this process answers.

    Args:
        batches: Prompts answered together, by the number of the batch. The longest of each says where its context ends: see batches_of.
        stop_ids: Tokens that end an answer.
        context: Most tokens of prompt and answer together.
        content_of: Makes text of an answer's tokens.
        done: Called with the number of prompts answered, after each batch.
    """
    config = answer_config(params, tokenizer, stop_ids)
    # What this config leaves open, generate would take from the model's own: a repetition penalty, say, that no param shows.
    model.generation_config = config
    answers: dict[int, Answer] = {}
    for number, batch in batches.items():
        torch.manual_seed((seed << 20) + number)
        config.max_new_tokens = min(params.max_new_tokens, context - max(len(prompts[index]) for index in batch))
        new_ids = _generate_batch(model, [prompts[index] for index in batch], config)
        answers |= {index: answer_of(content_of, ids, set(stop_ids)) for index, ids in zip(batch, new_ids, strict=True)}
        done(len(batch))
    return answers


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


def answer_of(content_of: Callable[[Sequence[int]], str], ids: Sequence[int], stop_ids: Collection[int]) -> Answer:
    """New token ids as an answer: cut at the first stop token."""
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    return Answer(content_of(ids[:end]), stopped=end is not None, tokens=len(ids) if end is None else end)
