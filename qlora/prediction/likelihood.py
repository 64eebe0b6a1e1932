"""How probable a model finds the reference answers."""

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor

from qlora.model.chat_template import Encoded

PLACES = 1024
"""Supervised places whose losses are computed at once."""

# Shape suffixes: B batch, T tokens of a row, S supervised tokens, V vocabulary.


@torch.inference_mode()
def turn_nlls(model: torch.nn.Module, encoded: Encoded, device: torch.device) -> list[tuple[float, float]]:
    """For every assistant turn, in nats, the negative log-likelihood of it with its end-of-turn token, and of that token alone.

    One conversation at a time and unpacked, so that no figure depends on a batch; the head runs at supervised places only. Several padded to one
    length would change the last bits: see docs/design.md for what was measured.
    """
    ids_BT = torch.tensor([encoded.ids], device=device)
    places = [place for start, end in encoded.spans for place in range(start, end)]
    # The token at a place is predicted by the place before it.
    before = [place - 1 for place in places]
    # As numbers, not as a tensor: of a model spread over several GPUs the head is on another one than the tokens.
    logits_BSV: Tensor = model(input_ids=ids_BT, use_cache=False, logits_to_keep=before).logits
    # Some places at a time: a second copy of all logits in float32 would be the most that an evaluation ever holds.
    losses_S = torch.cat(
        [
            F.cross_entropy(logits_SV.float(), targets_S, reduction="none").double()
            for logits_SV, targets_S in zip(logits_BSV[0].split(PLACES), ids_BT[0, places].split(PLACES), strict=True)
        ]
    )
    return [(float(part.sum()), float(part[-1])) for part in losses_S.split([end - start for start, end in encoded.spans])]
