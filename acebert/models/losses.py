"""Semantic matching with in-batch negatives, across ranks and at any batch size (Eq. 4-5).

Letters: W pairs in the global batch, b = W / ranks of them on this rank, d dimensions, H mined
products for each pair.

Across ranks each rank scores its own rows against everybody's, in both directions. Its loss is the
mean over its b rows, and the gathering's backward *sums* what the ranks found about an embedding.
DDP's average over ranks then is the gradient of Eq. 5 on the whole batch; to average in the
gathering, or to divide by W here, would scale it by 1 / ranks.

Scores that do not fit a block of `BLOCK` are made, and in the backward made again, block by block:
memory grows with W, not with its square. The d multiplications a score are nothing beside what the
encoder does for the row.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from acebert.models.false_negatives import FalseNegatives

BLOCK = 2**23  # scores held at a time, 32 MiB in fp32


def semantic_matching_loss(
    v_q: Tensor,
    v_p: Tensor,
    gamma: Tensor | float,
    *,
    v_mined: Tensor | None = None,
    query_mask: FalseNegatives | None = None,
    product_mask: FalseNegatives | None = None,
    product_log_share: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_main of Eq. 5: both directions, summed.

    With torch.distributed initialised, every rank of the default group has to call this with the
    same number of rows; row i of rank r is pair r·b + i of the global batch.

    Args:
        v_q, v_p: embeddings of this rank's pairs, float32 [b, d], length 1
        gamma: γ of Eq. 4
        v_mined: mined products, H for each of this rank's pairs, which all queries of the batch get
            as further negatives, behind the pairs' own products; float32 [b·H, d]
        query_mask: cells of [b, W + W·H] where a product is left out of a query's denominator
        product_mask: cells of [b, W] where a query is left out of a product's denominator
        product_log_share: float32 [W + W·H], log of the chance with which each product of the
            batch is drawn. In-batch products come as often as they are clicked, so γ·cos learns
            log p(p|q) − log p(p), which takes popularity out of the ranking; subtracted from the
            scores of products (logQ, Yi et al. 2019) it leaves γ·cos = log p(p|q) + c(q). The other
            direction fits that as it is, for its softmax is blind to a constant of the product

    Returns:
        The loss (a scalar; see the module's docstring for its scale), and, detached, this rank's
        `loss`, `accuracy` (share of queries whose product scores highest among those not masked)
        and `masked` (products masked for a query, on average).

    Raises:
        ValueError: a mask of other rows.
    """
    b = len(v_q)
    with torch.autocast(v_q.device.type, enabled=False):  # γ would magnify bf16's rounding
        v_q, v_p = v_q.float(), v_p.float()
        all_q, all_p, first = gather_pairs(v_q, v_p)
        if v_mined is not None:
            all_p = torch.cat([all_p, gather_rows(v_mined.float())])
        own = torch.arange(first, first + b, device=v_q.device)
        to_products, correct = _cross_entropy(v_q, all_p, own, gamma, query_mask, product_log_share)
        to_queries, _ = _cross_entropy(v_p, all_q, own, gamma, product_mask, None)
        loss = to_products + to_queries
    masked = 0.0 if query_mask is None else len(query_mask.rows) / b
    metrics = {
        "loss": loss.detach(),
        "accuracy": correct / b,
        "masked": torch.tensor(masked).to(v_q.device, non_blocking=True),
    }
    return loss, metrics


def _cross_entropy(
    v: Tensor,
    others: Tensor,
    own: Tensor,
    gamma: Tensor | float,
    mask: FalseNegatives | None,
    log_share: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One direction: the mean of -log softmax over rows of v [b, d] against others [n, d], whose
    targets are own [b]; and how many rows score their own highest."""
    b, n = len(v), len(others)
    if mask is not None and len(mask.starts) != b + 1:
        raise ValueError(f"a mask of {len(mask.starts) - 1} rows for {b} embeddings")

    def block(
        rows: Tensor, others: Tensor, gamma: Tensor | float, first: int
    ) -> tuple[Tensor, Tensor]:
        scores = (gamma * rows) @ others.T  # not γ times the scores, of which there are many more
        if log_share is not None:
            scores = scores - log_share
        if mask is not None:
            scores = mask.fill_(scores, first)
        target = own[first : first + len(rows)]
        correct = (scores.detach().argmax(dim=1) == target).sum()
        return F.cross_entropy(scores, target, reduction="sum"), correct

    r = max(1, BLOCK // n)
    if b <= r:
        total, correct = block(v, others, gamma, 0)
    else:
        sums = [
            checkpoint(
                block, rows, others, gamma, i * r, use_reentrant=False, preserve_rng_state=False
            )
            for i, rows in enumerate(v.split(r))
        ]
        total, correct = (torch.stack(column).sum() for column in zip(*sums, strict=True))
    return total / b, correct


def gather_pairs(v_q: Tensor, v_p: Tensor) -> tuple[Tensor, Tensor, int]:
    """All ranks' embeddings, with gradients, in one collective.

    Args:
        v_q, v_p: this rank's [b, d], the same b on every rank

    Returns:
        (queries [W, d], products [W, d], row of this rank's first pair). One process: its own.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return v_q, v_p, 0
    b, d = v_q.shape
    ranks = dist.get_world_size()
    gathered = _Gather.apply(torch.stack([v_q, v_p])).view(ranks, 2, b, d)
    queries, products = gathered.transpose(0, 1).reshape(2, ranks * b, d)
    return queries, products, dist.get_rank() * b


def gather_rows(v: Tensor) -> Tensor:
    """All ranks' rows, with gradients: [n, d], the same n on every rank → [ranks·n, d]."""
    return _Gather.apply(v) if dist.is_initialized() and dist.get_world_size() > 1 else v


class _Gather(torch.autograd.Function):
    """all_gather along the first dimension; backward is its transpose, a summing reduce_scatter.

    torch.distributed.nn.functional's gathers are not this: the one into a tensor refuses gloo, the
    one into a list sends each rank's gradient block by block (all_to_all) on gloo.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        out = grad.new_empty(len(grad) // dist.get_world_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous())
        return out
