"""Answers of a model to prompts: batched by a budget of tokens, sorted by length, cut where a turn ends."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora.core.errors import MachineError
from qlora.model.device import out_of_memory
from qlora.params.predict import PredictParams


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    stopped: bool
    """Whether the model ended its turn, rather than being cut."""
    tokens: int
    """Without the one that ended it."""


def batches_of(prompts: Sequence[Sequence[int]], batch_tokens: int, max_new_tokens: int, context: int | None = None) -> list[list[int]]:
    """Numbers of the prompts that are answered together: the longest first, so that little is padded and memory runs out at once or never.

    Args:
        batch_tokens: Most tokens of a batch: rows x (longest prompt + max_new_tokens). A prompt that alone exceeds it is answered alone.
        max_new_tokens: Most tokens of an answer.
        context: Most tokens of prompt and answer together. A prompt that leaves fewer than max_new_tokens is answered alone. None: no limit.
    """
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    batches: list[list[int]] = []
    while order:
        tokens = len(prompts[order[0]]) + max_new_tokens
        rows = 1 if context is not None and tokens > context else max(1, batch_tokens // tokens)
        batches.append(order[:rows])
        order = order[rows:]
    return batches


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
    done: Callable[[dict[int, Answer]], object],
) -> dict[int, Answer]:
    """The answers to the prompts of these batches, by the number of the prompt.

    Prompts of a batch are padded on the left and masked. An answer ends at its first stop token, after max_new_tokens, or where the model's context
    ends, whatever its batch goes on to do. A drawn answer depends on the seed and its batch, not on which other batches this process answers.

    Args:
        batches: Prompts answered together, by the number of the batch. The longest of each says where its context ends: see batches_of.
        stop_ids: Tokens that end an answer.
        context: Most tokens of prompt and answer together.
        content_of: Makes text of an answer's tokens.
        done: Called after each batch with its answers, by the number of the prompt.

    Raises:
        MachineError: no memory is left; the message gives a smaller `predict.batch_tokens`.
    """
    # What this config leaves open, generate would take from the model's own: a repetition penalty, say, that no param shows.
    config = model.generation_config = answer_config(params, tokenizer, stop_ids)
    answers: dict[int, Answer] = {}
    for number, batch in batches.items():
        torch.manual_seed((seed << 20) + number)
        longest = max(len(prompts[index]) for index in batch)
        config.max_new_tokens = min(params.max_new_tokens, context - longest)
        try:
            new_ids = _generate_batch(model, [prompts[index] for index in batch], config)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if reason := out_of_memory(error):
                raise _too_large(reason, len(batch), longest, params) from error
            raise
        made = {index: answer_of(content_of, ids, set(stop_ids)) for index, ids in zip(batch, new_ids, strict=True)}
        done(made)
        answers |= made
    return answers


def _too_large(reason: str, rows: int, longest: int, params: PredictParams) -> MachineError:
    """Half the rows of the batch that failed take half its memory beside the weights."""
    tokens = longest + params.max_new_tokens
    batch = f"{reason}. It ran out while {rows} prompt(s) of up to {longest:,} tokens were answered with up to {params.max_new_tokens:,} more."
    if rows == 1:
        return MachineError(
            "out-of-memory",
            f"{batch} No predict.batch_tokens makes a batch smaller than that: lower predict.max_new_tokens, or load the base model in fewer bits",
        )
    return MachineError(
        "out-of-memory",
        f"{batch} predict.batch_tokens is {params.batch_tokens}; half of that batch should fit: "
        f"`dvc exp run -S predict.batch_tokens={rows // 2 * tokens}` answers with both models in such batches.",
    )


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
