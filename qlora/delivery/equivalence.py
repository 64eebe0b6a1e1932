"""How near a merged model is to the adapter on the base model that it was trained on.

One model is loaded at a time, so that a card on which the adapter was trained compares it too: what the first one says of each token waits in a
file for the second.
"""

import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora.core.conversation import Conversation
from qlora.model.chat_template import ChatTemplate, Encoded, Encoding
from qlora.params.predict import PredictParams
from qlora.prediction import test_set

PLACES = 128
"""Supervised places compared at once: two tensors of a vocabulary of 128,256 in float64 are 263 MB."""
LOGITS_BYTES = 4 * 10**9
"""Size of the file of logits. It holds 15,600 tokens of a vocabulary of 128,256 in 16 bits; the KL of more is that of some conversations."""

# Shape suffixes: T tokens of a row, S supervised tokens, V vocabulary.


@dataclass(frozen=True, slots=True)
class Equivalence:
    """Of a merged model against the adapter, over the supervised tokens of the test conversations."""

    conversations: int
    tokens: int
    kl_mean: float
    """Nats per token by which the merged model's next-token distribution departs from the adapter's; 0 is the same."""
    kl_max: float
    argmax_agreement: float
    """Share of tokens for which both find the same next token likeliest, each after the true text."""
    answers: int
    answers_equal: float
    """Share of whole greedy answers that are the same."""
    nll_adapter: float
    """Nats per token of the reference answers."""
    nll_merged: float
    template_equal: float
    """Share of conversations that both tokenizers and chat templates make the same tokens of."""

    def within(self, max_kl: float) -> bool:
        """Whether the mean KL is a finite number that does not exceed `max_kl`."""
        return math.isfinite(self.kl_mean) and self.kl_mean <= max_kl

    def record(self) -> dict[str, Any]:
        """For JSON, which knows no number that is not finite: None in its place."""
        fields = {name: getattr(self, name) for name in self.__slots__} | {"nll_delta": self.nll_merged - self.nll_adapter}
        return {name: value if math.isfinite(value) else None for name, value in fields.items()}

    def table(self) -> str:
        rows = [
            ("KL per token, mean", f"{self.kl_mean:.3g} nats"),
            ("KL per token, greatest", f"{self.kl_max:.3g} nats"),
            ("likeliest token the same", f"{self.argmax_agreement:.2%} of {self.tokens:,} tokens"),
            ("greedy answers the same", f"{self.answers_equal:.2%} of {self.answers:,}"),
            ("nll of adapter and merged", f"{self.nll_adapter:.6f}  {self.nll_merged:.6f}  ({self.nll_merged - self.nll_adapter:+.2g})"),
            ("template's tokens the same", f"{self.template_equal:.2%} of {self.conversations:,} conversations"),
        ]
        return "\n".join(f"{name.ljust(26)}  {value}" for name, value in rows)


def compare(
    load_adapted: Callable[[], PreTrainedModel],
    load_merged: Callable[[], PreTrainedModel],
    template: ChatTemplate,
    merged_template: ChatTemplate,
    conversations: Sequence[Conversation],
    params: PredictParams,
    device: torch.device,
    *,
    scratch: Path,
    progress: bool,
) -> Equivalence:
    """Both models on the test set, as `predict` answers it, with greedy answers.

    Args:
        load_adapted: Loads the adapter on its base model; called once, and what it returns is freed before `load_merged` is called.
        scratch: Folder for a file of at most LOGITS_BYTES.

    Raises:
        InputError: no conversation fits the model's context.
    """
    greedy = params.model_copy(update={"do_sample": False, "generation_seeds": [0]})

    def side(model: PreTrainedModel) -> list[dict[str, Any]]:
        return test_set.predict(model, template, conversations, greedy, device, progress=progress).predictions

    with tempfile.TemporaryFile(dir=scratch) as file:
        model = load_adapted()
        ours = side(model)
        measured = {row["id"] for row in ours}
        rows = [(conversation, template.encode(conversation)) for conversation in conversations if conversation.id in measured]
        chosen = _within(rows, LOGITS_BYTES // (int(model.config.get_text_config().vocab_size) * model.dtype.itemsize))
        kept = _Logits(file)
        for row in chosen:
            kept.add(_logits(model, row, device))
        del model
        _free()
        model = load_merged()
        theirs = side(model)
        kls, same = _distances(kept, model, chosen, device)
    template_equal = sum(merged_template.encode(conversation) == encoding for conversation, encoding in rows) / len(rows)
    return _equivalence(ours, theirs, kls, same, conversations=len(rows), template_equal=template_equal)


def _equivalence(
    ours: Sequence[dict[str, Any]],
    theirs: Sequence[dict[str, Any]],
    kls: Tensor,
    same: Tensor,
    *,
    conversations: int,
    template_equal: float,
) -> Equivalence:
    answered = [(one, other) for one, other in zip(ours, theirs, strict=True) if one["answer"] is not None]
    equal = sum((one["answer"], one["stopped"]) == (other["answer"], other["stopped"]) for one, other in answered)
    nlls = [math.fsum(row["nll_sum"] for row in side) / sum(row["tokens"] for row in side) for side in (ours, theirs)]
    return Equivalence(
        conversations=conversations,
        tokens=len(kls),
        kl_mean=float(kls.mean()),
        kl_max=float(kls.max()),
        argmax_agreement=float(same.double().mean()),
        answers=len(answered),
        answers_equal=equal / len(answered),
        nll_adapter=nlls[0],
        nll_merged=nlls[1],
        template_equal=template_equal,
    )


def _free() -> None:
    """What a model that nobody holds any more takes: PEFT's parts refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _within(rows: Sequence[tuple[Conversation, Encoding]], most: int) -> list[Encoded]:
    """Rows of the conversations of the smallest ids, which are hashes, with as many supervised tokens together; of one at least."""
    chosen: set[int] = set()
    tokens = 0
    for place in sorted(range(len(rows)), key=lambda place: (rows[place][0].id, place)):
        tokens += sum(end - start for row in rows[place][1].rows for start, end in row.spans)
        if chosen and tokens > most:
            break
        chosen.add(place)
    return [row for place in sorted(chosen) for row in rows[place][1].rows]


class _Logits:
    """Logits in a file, read in the order in which they were written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []

    def add(self, logits: Tensor) -> None:
        """Append those of one row, (S, V)."""
        self._kinds.append((logits.shape, logits.dtype))
        self._file.write(logits.cpu().contiguous().view(torch.uint8).numpy().data)

    def parts(self) -> Iterator[Tensor]:
        self._file.seek(0)
        for shape, dtype in self._kinds:
            content = bytearray(self._file.read(shape.numel() * dtype.itemsize))
            yield torch.frombuffer(content, dtype=dtype).view(shape)


def _distances(kept: _Logits, merged: PreTrainedModel, encoded: Sequence[Encoded], device: torch.device) -> tuple[Tensor, Tensor]:
    """For each supervised token the KL divergence in nats, and whether the likeliest token is the same, both (S,)."""
    parts = []
    for row, ours_SV in zip(encoded, kept.parts(), strict=True):
        theirs_SV = _logits(merged, row, device)
        pairs = zip(ours_SV.split(PLACES), theirs_SV.split(PLACES), strict=True)
        parts += [distances(ours.to(theirs.device), theirs) for ours, theirs in pairs]
    kls, same = zip(*parts, strict=True)
    return torch.cat(kls), torch.cat(same)


@torch.inference_mode()
def _logits(model: PreTrainedModel, encoded: Encoded, device: torch.device) -> Tensor:
    """(S, V); the token at a place is predicted by the place before it, and the head runs at those places only."""
    before = [place - 1 for start, end in encoded.spans for place in range(start, end)]
    forward: Any = model
    logits_SV: Tensor = forward(input_ids=torch.tensor([encoded.ids], device=device), use_cache=False, logits_to_keep=before).logits[0]
    return logits_SV


def distances(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """KL(ours || theirs) of each row of logits (S, V) in nats, and whether the greatest stands at the same place, both (S,).

    In float64, whose rounding is far below the threshold of a 32-bit merge.
    """
    ours_SV, theirs_SV = (logits.double().log_softmax(-1) for logits in (ours, theirs))
    kls_S = (ours_SV.exp() * (ours_SV - theirs_SV)).sum(-1).clamp(min=0)
    return kls_S.cpu(), (ours.argmax(-1) == theirs.argmax(-1)).cpu()
