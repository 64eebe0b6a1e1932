"""A model on the test set, the same way for the base model and for the adapter: likelihoods and answers, nothing scored."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from qlora.core.conversation import Conversation
from qlora.core.errors import InputError
from qlora.model import loading
from qlora.model.chat_template import DROPPED, ChatTemplate, Encoded, Encoding
from qlora.model.config import context_length
from qlora.model.distributed import gather_items, rank_and_size
from qlora.params.predict import PredictParams
from qlora.prediction.generation import Answer, batches_of, generate
from qlora.prediction.journal import Journal
from qlora.prediction.likelihood import turn_nlls
from qlora.runtime import progress as progress_bars


class Measured(NamedTuple):
    predictions: list[dict[str, Any]]
    """In the order of the test set, turn by turn, seed by seed."""
    counts: dict[str, int]
    """Conversations by what became of them."""
    batches: list[dict[str, Any]]
    """Turns, as [id of the conversation, number of the turn], that were answered together."""


class _Turn(NamedTuple):
    """One assistant turn of the test set."""

    conversation: Conversation
    row: Encoded
    span: tuple[int, int]
    """Where in the row the reference stands."""
    number: int
    place: int
    """Position of the reference among the messages."""
    is_last: bool
    """Of those that can be asked."""

    @property
    def calls_tools(self) -> bool:
        """Such a reference is no text to compare an answer with."""
        return "tool_calls" in self.conversation.messages[self.place]


def predict(
    model: PreTrainedModel,
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    params: PredictParams,
    device: torch.device,
    journal: Journal | None = None,
    *,
    progress: bool,
) -> Measured:
    """Every assistant turn, after its true history: how likely its reference is, and what the model answers instead.

    Several processes each score some conversations and answer some batches; each returns the whole.

    Args:
        journal: What an earlier run of the same has finished; it takes what this one does. None: nothing is kept.

    Raises:
        InputError: a conversation is longer than the model's context and on_too_long is error, none is left, or a likelihood is not finite.
        MachineError: no memory is left, or a process of several did not do its part.
    """
    model.eval()
    journal = journal or Journal()
    context = context_length(model.config)
    kept, counts = _kept(template, conversations, params, context)
    turns = [turn for conversation, encoding in kept for turn in _turns(conversation, encoding)]
    nlls = _nlls(model, [row for _, encoding in kept for row in encoding.rows], device, journal, progress=progress)
    asked = [turn for turn in turns if _is_asked(turn, params)]
    prompts = [turn.row.ids[: turn.span[0]] for turn in asked]
    batches = batches_of(prompts, params.batch_tokens, params.max_new_tokens, context)
    answers = {
        seed: iter(_answers(model, template, prompts, batches, params, seed, context, journal, progress=progress)) for seed in params.generation_seeds
    }
    predictions = []
    for turn, (nll_sum, stop_nll) in zip(turns, (nll for row in nlls for nll in row), strict=True):
        _require_finite(turn, nll_sum)
        start, end = turn.span
        scored = template.scored_bytes(turn.conversation.messages[turn.place], turn.row.ids[start : end - 1])
        likelihood = {"nll_sum": nll_sum, "stop_nll": stop_nll, "tokens": end - start, "bytes": scored}
        identity = {"id": turn.conversation.id, "turn": turn.number, "category": turn.conversation.category}
        for seed in params.generation_seeds:
            answer = next(answers[seed]) if _is_asked(turn, params) else None
            predictions.append({**identity, "seed": seed, **likelihood, **_answered(answer)})
    return Measured(predictions, counts, _composition(asked, batches))


def _composition(asked: Sequence[_Turn], batches: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Which turns were answered together."""
    return [
        {"batch": number, "turns": [[asked[index].conversation.id, asked[index].number] for index in batch]} for number, batch in enumerate(batches)
    ]


def _turns(conversation: Conversation, encoding: Encoding) -> list[_Turn]:
    places = list(conversation.assistant_turns())
    last = max((place for place in places if "tool_calls" not in conversation.messages[place]), default=None)
    return [
        _Turn(conversation, row, span, number, place, place == last)
        for number, (place, (row, span)) in enumerate(zip(places, encoding.answers(), strict=True))
    ]


def _is_asked(turn: _Turn, params: PredictParams) -> bool:
    """Whether the model answers it; of the others the likelihood is all that is measured."""
    return (params.turns == "all" or turn.is_last) and not turn.calls_tools


def _require_finite(turn: _Turn, nll_sum: float) -> None:
    """JSON has no number for it, and every score after it would be lost."""
    if not math.isfinite(nll_sum):
        raise InputError(
            "predict-not-finite",
            f"the likelihood of turn {turn.number} of test conversation {turn.conversation.id} is {nll_sum}: the model overflows. "
            "Set base_model.dtype to float32 or bfloat16, or train with a lower train.learning_rate",
        )


def _kept(
    template: ChatTemplate, conversations: Sequence[Conversation], params: PredictParams, context: int
) -> tuple[list[tuple[Conversation, Encoding]], dict[str, int]]:
    """Conversations that are measured, as tokens, and counts of all."""
    chosen = _chosen(conversations, params.num_examples)
    encoded = [(conversation, template.encode(conversation)) for conversation in chosen]
    kept = [(conversation, encoding) for conversation, encoding in encoded if not encoding.dropped and _fits(conversation, encoding, context, params)]
    dropped = Counter(encoding.dropped for _, encoding in encoded if encoding.dropped)
    counts: dict[str, int] = {
        "conversations": len(conversations),
        "not_chosen": len(conversations) - len(chosen),
        **{reason: dropped[reason] for reason in DROPPED},
        "too_long": len(chosen) - dropped.total() - len(kept),
        "characters": sum(encoding.characters for _, encoding in kept),
        "characters_lost": sum(encoding.lost for _, encoding in kept),
    }
    template.require_readable(counts["characters_lost"], counts["characters"], "test")
    if not kept:
        raise InputError(
            "test-all-dropped",
            f"no test conversation is left to answer; the model's context is {context} tokens; counts: {counts}"
            + (f". The first that the chat template can't show: {template.refusal}" if template.refusal else ""),
        )
    return kept, counts


def _chosen(conversations: Sequence[Conversation], num_examples: int | None) -> list[Conversation]:
    """The conversations of the smallest ids, which are hashes: another row in the file replaces one of them at most."""
    if num_examples is None or num_examples >= len(conversations):
        return list(conversations)
    order = sorted(range(len(conversations)), key=lambda place: (conversations[place].id, place))
    return [conversations[place] for place in sorted(order[:num_examples])]


def _fits(conversation: Conversation, encoding: Encoding, context: int, params: PredictParams) -> bool:
    longest = max(len(row.ids) for row in encoding.rows)
    if longest <= context:
        return True
    if params.on_too_long == "error":
        raise InputError(
            "test-too-long",
            f"test conversation {conversation.id} has {longest} tokens, the model's context {context}: "
            "set predict.on_too_long to drop, or take it out of the test file",
        )
    return False


def _nlls(
    model: PreTrainedModel, rows: Sequence[Encoded], device: torch.device, journal: Journal, *, progress: bool
) -> list[list[tuple[float, float]]]:
    rank, size = rank_and_size()
    own = range(rank, len(rows), size)
    missing = [index for index in own if index not in journal.nlls]
    with progress_bars.bar("likelihood", total=len(own), initial=len(own) - len(missing), unit="conversations", enabled=progress) as bar:
        for index in missing:
            journal.add_nlls(index, turn_nlls(model, rows[index], device))
            bar.update(1)
    return gather_items({index: journal.nlls[index] for index in own}, len(rows))


def _answers(
    model: PreTrainedModel,
    template: ChatTemplate,
    prompts: Sequence[Sequence[int]],
    batches: Sequence[Sequence[int]],
    params: PredictParams,
    seed: int,
    context: int,
    journal: Journal,
    *,
    progress: bool,
) -> list[Answer]:
    rank, size = rank_and_size()
    own = {number: batches[number] for number in range(rank, len(batches), size)}
    missing = {number: batch for number, batch in own.items() if any((seed, index) not in journal.answers for index in batch)}
    stops = loading.stop_token_ids(model, template.tokenizer, template.stop_ids)
    # In batches, which take about as long each; turns would not, the long ones being answered first.
    with progress_bars.bar("answers", total=len(own), initial=len(own) - len(missing), unit="batches", enabled=progress) as bar:

        def done(made: dict[int, Answer]) -> None:
            journal.add_answers(seed, made)
            bar.update(1)

        generate(
            model,
            template.tokenizer,
            prompts,
            missing,
            params,
            seed=seed,
            stop_ids=stops,
            context=context,
            content_of=template.content_of,
            done=done,
        )
    return gather_items({index: journal.answers[seed, index] for batch in own.values() for index in batch}, len(prompts))


def _answered(answer: Answer | None) -> dict[str, Any]:
    if answer is None:
        return {"answer": None}
    return {"answer": answer.text, "answer_tokens": answer.tokens, "stopped": answer.stopped}
