"""A model on the test set: the same measurement for the base model and for the adapter."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from qlora import base_model
from qlora.chat_template import ChatTemplate, Encoded
from qlora.conversation import Conversation
from qlora.errors import InputError
from qlora.generation import generate
from qlora.likelihood import mean_nll, perplexity, turn_nlls
from qlora.params.evaluate import EvaluateParams
from qlora.scoring import SCORES

Prediction = dict[str, Any]
"""One line of data/predictions/*.jsonl: one assistant turn of the test set."""


def predict(
    model: PreTrainedModel,
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    params: EvaluateParams,
    device: torch.device,
    *,
    progress: bool,
) -> tuple[list[Prediction], dict[str, int]]:
    """Every assistant turn, after its true history: how likely its reference is, and what the model answers instead.

    Returns:
        The predictions in the order of the test set, and the counts of conversations by what became of them.

    Raises:
        InputError: a conversation is longer than the model's context and on_too_long is error, or none is left.
    """
    model.eval()
    context = base_model.context_length(model.config)
    encoded = [template.encode(conversation) for conversation in conversations]
    whole = [(conversation, row) for conversation, row in zip(conversations, encoded, strict=True) if row is not None]
    kept = [(conversation, row) for conversation, row in whole if _fits(conversation, row, context, params)]
    counts = {"conversations": len(conversations), "control_token": len(conversations) - len(whole), "too_long": len(whole) - len(kept)}
    if not kept:
        raise InputError("test-all-dropped", f"no test conversation is left to answer; the model's context is {context} tokens; counts: {counts}")
    hidden = None if progress else True
    nlls = [turn_nlls(model, row, device) for _, row in tqdm(kept, desc="likelihood", unit=" conversations", delay=1, disable=hidden)]
    prompts = [row.ids[:start] for _, row in kept for start, _ in row.spans]
    with tqdm(total=len(prompts), desc="answers", unit=" turns", delay=1, disable=hidden) as bar:
        stops = base_model.stop_token_ids(model, template.tokenizer, template.end_of_turn)
        answers = iter(generate(model, template.tokenizer, prompts, params, stop_ids=stops, context=context, done=bar.update))
    predictions = []
    for (conversation, row), turn_sums in zip(kept, nlls, strict=True):
        for turn, ((start, end), nll_sum, place) in enumerate(zip(row.spans, turn_sums, conversation.assistant_turns(), strict=True)):
            answer, reference = next(answers), conversation.messages[place]["content"]
            predictions.append(
                {
                    "id": conversation.id,
                    "turn": turn,
                    "category": conversation.category,
                    "nll_sum": nll_sum,
                    "tokens": end - start,
                    "bytes": len(reference.encode()),
                    "answer": answer.text,
                    "stopped": answer.stopped,
                    **{name: score(answer.text, reference) for name, score in SCORES.items()},
                }
            )
    return predictions, counts


def _fits(conversation: Conversation, row: Encoded, context: int, params: EvaluateParams) -> bool:
    if len(row.ids) <= context:
        return True
    if params.on_too_long == "error":
        raise InputError(
            "test-too-long",
            f"test conversation {conversation.id} has {len(row.ids)} tokens, the model's context {context}: "
            "set evaluate.on_too_long to drop, or take it out of the test file",
        )
    return False


def summarise(predictions: Sequence[Prediction], counts: Mapping[str, int]) -> dict[str, Any]:
    """The metrics of one model: likelihood as sums over counts, scores as means over assistant turns, also by category."""
    by_category = defaultdict(list)
    for prediction in predictions:
        by_category[prediction["category"]].append(prediction)
    return {
        **_means(predictions),
        "counts": {**counts, "turns": len(predictions), "tokens": sum(prediction["tokens"] for prediction in predictions)},
        "by_category": {category: {**_means(rows), "turns": len(rows)} for category, rows in sorted(by_category.items())},
    }


def _means(predictions: Sequence[Prediction]) -> dict[str, float]:
    nll = mean_nll([row["nll_sum"] for row in predictions], [row["tokens"] for row in predictions])
    means = {name: math.fsum(row[name] for row in predictions) / len(predictions) for name in SCORES}
    stop_rate = Counter(row["stopped"] for row in predictions)[True] / len(predictions)
    return {"nll": nll, "perplexity": perplexity(nll), "stop_rate": stop_rate, **means}


COMPARED = ("nll", "perplexity", "stop_rate", *SCORES)


def deltas(tuned: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """Tuned minus base for every number that both have."""
    return {name: tuned[name] - base[name] for name in COMPARED}
