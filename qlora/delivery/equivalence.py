"""How near a merged model is to the adapter on the base model that it was trained on."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora.core.conversation import Conversation
from qlora.model.chat_template import ChatTemplate, Encoded
from qlora.params.predict import PredictParams
from qlora.prediction import test_set

PLACES = 128
"""Supervised places compared at once: two tensors of a vocabulary of 128,256 in float64 are 263 MB."""

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
    adapted: PreTrainedModel,
    merged: PreTrainedModel,
    template: ChatTemplate,
    merged_template: ChatTemplate,
    conversations: Sequence[Conversation],
    params: PredictParams,
    device: torch.device,
    *,
    progress: bool,
) -> Equivalence:
    """Both models on the test set, as `predict` answers it, with greedy answers.

    Raises:
        InputError: no conversation fits the model's context.
    """
    greedy = params.model_copy(update={"do_sample": False, "generation_seeds": [0]})
    sides = [test_set.predict(model, template, conversations, greedy, device, progress=progress).predictions for model in (adapted, merged)]
    measured = {row["id"] for row in sides[0]}
    rows = [(conversation, template.encode(conversation)) for conversation in conversations if conversation.id in measured]
    encoded = [row for _, encoding in rows for row in encoding.rows]
    kls, same = _distances(adapted, merged, encoded, device)
    answered = [(ours, theirs) for ours, theirs in zip(*sides, strict=True) if ours["answer"] is not None]
    equal = sum((ours["answer"], ours["stopped"]) == (theirs["answer"], theirs["stopped"]) for ours, theirs in answered)
    nlls = [math.fsum(row["nll_sum"] for row in side) / sum(row["tokens"] for row in side) for side in sides]
    return Equivalence(
        conversations=len(rows),
        tokens=len(kls),
        kl_mean=float(kls.mean()),
        kl_max=float(kls.max()),
        argmax_agreement=float(same.double().mean()),
        answers=len(answered),
        answers_equal=equal / len(answered),
        nll_adapter=nlls[0],
        nll_merged=nlls[1],
        template_equal=sum(merged_template.encode(conversation) == row for conversation, row in rows) / len(rows),
    )


def _distances(adapted: PreTrainedModel, merged: PreTrainedModel, encoded: Iterable[Encoded], device: torch.device) -> tuple[Tensor, Tensor]:
    """For each supervised token the KL divergence in nats, and whether the likeliest token is the same, both (S,)."""
    parts = [
        distances(ours_SV, theirs_SV.to(ours_SV.device))
        for row in encoded
        for ours_SV, theirs_SV in zip(*(_logits(model, row, device).split(PLACES) for model in (adapted, merged)), strict=True)
    ]
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
