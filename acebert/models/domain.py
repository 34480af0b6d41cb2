"""The domain classifier D and its game with the encoder (paper section 3.3, Eq. 6-8).

D tells query embeddings (1) from product embeddings (0). Two players, two functions: `domain_loss`
is D's step and sends no gradient to the embeddings, `encoder_term` is the encoder's and sends none
to D. All losses are means over the rows given, so that the average over equal shards is the mean
over the global batch.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

QUERY, PRODUCT = 1.0, 0.0


class DomainClassifier(nn.Module):
    """D: d → hidden → 1, leaky ReLU between; logits of 'this is a query'."""

    def __init__(self, embedding_dim: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(embedding_dim, hidden), nn.LeakyReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, v: Tensor) -> Tensor:
        """Embeddings [B, d] → logits [B], in fp32 whatever the autocast."""
        with torch.autocast(v.device.type, enabled=False):
            return self.layers(v.float()).squeeze(-1)


def domain_loss(domain: nn.Module, v_q: Tensor, v_p: Tensor) -> Tensor:
    """L_adv of Eq. 6 for D's step (Eq. 8): its gradient reaches D alone.

    Args:
        domain: D
        v_q, v_p: embeddings of queries and products [b, d]
    """
    logits_q, logits_p = _logits(domain, v_q.detach(), v_p.detach())
    return _cross_entropy(logits_q, logits_p, QUERY, PRODUCT)


def encoder_term(
    form: Literal["minimax", "confusion"], domain: nn.Module, v_q: Tensor, v_p: Tensor
) -> Tensor:
    """What the encoder's step adds to L_main, before the weight λ; its gradient reaches the
    embeddings alone, D's parameters take part as constants.

    Args:
        form: 'minimax' is −L_adv (Eq. 7), which has no floor; 'confusion' is the cross-entropy of
            both domains to ½, which has one, 2·log 2
        domain: D
        v_q, v_p: embeddings of queries and products [b, d]
    """
    frozen = {name: parameter.detach() for name, parameter in domain.named_parameters()}
    logits = functional_call(domain, frozen, (torch.cat([v_q, v_p]),))
    logits_q, logits_p = logits.split([len(v_q), len(v_p)])
    if form == "minimax":
        return -_cross_entropy(logits_q, logits_p, QUERY, PRODUCT)
    return _cross_entropy(logits_q, logits_p, 0.5, 0.5)


@torch.no_grad()
def domain_accuracy(domain: nn.Module, v_q: Tensor, v_p: Tensor) -> Tensor:
    """Share of the rows that D puts on the right side; a scalar on the device."""
    logits_q, logits_p = _logits(domain, v_q, v_p)
    return torch.cat([logits_q > 0, logits_p <= 0]).float().mean()


def _logits(domain: nn.Module, v_q: Tensor, v_p: Tensor) -> tuple[Tensor, Tensor]:
    """One forward for both."""
    logits_q, logits_p = domain(torch.cat([v_q, v_p])).split([len(v_q), len(v_p)])
    return logits_q, logits_p


def _cross_entropy(logits_q: Tensor, logits_p: Tensor, target_q: float, target_p: float) -> Tensor:
    """The two terms of Eq. 6, each a mean over its rows, summed (not halved)."""
    return F.binary_cross_entropy_with_logits(
        logits_q, torch.full_like(logits_q, target_q)
    ) + F.binary_cross_entropy_with_logits(logits_p, torch.full_like(logits_p, target_p))
