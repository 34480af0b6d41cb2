"""Semantic matching with in-batch negatives, across ranks and without false negatives (Eq. 4-5).

Letters: W pairs in the global batch, b = W / ranks of them on this rank, d dimensions.

Across ranks each rank scores its own rows against everybody's, in both directions. Its loss is the
mean over its b rows, and the gathering's backward *sums* what the ranks found about an embedding.
DDP's average over ranks then is the gradient of Eq. 5 on the whole batch; to average in the
gathering, or to divide by W here, would scale it by 1 / ranks.
"""

from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def semantic_matching_loss(
    v_q: Tensor,
    v_p: Tensor,
    gamma: Tensor | float,
    *,
    query_mask: Tensor | None = None,
    product_mask: Tensor | None = None,
    product_log_share: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_main of Eq. 5: both directions, summed.

    With torch.distributed initialised, every rank of the default group has to call this with the
    same number of rows; row i of rank r is pair r·b + i of the global batch.

    Args:
        v_q, v_p: embeddings of this rank's pairs, float32 [b, d], length 1
        gamma: γ of Eq. 4
        query_mask: bool [b, W], True where a product is left out of a query's denominator
        product_mask: bool [b, W], True where a query is left out of a product's denominator
        product_log_share: float32 [W], log of the chance with which each product of the batch is
            drawn. In-batch products come as often as they are clicked, so γ·cos learns
            log p(p|q) − log p(p), which takes popularity out of the ranking; subtracted from the
            scores of products (logQ, Yi et al. 2019) it leaves γ·cos = log p(p|q) + c(q). The other
            direction fits that as it is, for its softmax is blind to a constant of the product

    Returns:
        The loss (a scalar; see the module's docstring for its scale), and, detached, this rank's
        `loss`, `accuracy` (share of queries whose product scores highest among those not masked)
        and `masked` (products masked for a query, on average).

    Raises:
        ValueError: a mask of the wrong shape.
    """
    b = len(v_q)
    with torch.autocast(v_q.device.type, enabled=False):  # γ would magnify bf16's rounding
        v_q, v_p = v_q.float(), v_p.float()
        all_q, all_p, first = gather_pairs(v_q, v_p)
        own = torch.arange(first, first + b, device=v_q.device)
        q_to_p = _scores(v_q, all_p, gamma, query_mask, "query_mask")
        if product_log_share is not None:
            q_to_p = q_to_p - product_log_share
        p_to_q = _scores(v_p, all_q, gamma, product_mask, "product_mask")
        loss = F.cross_entropy(q_to_p, own) + F.cross_entropy(p_to_q, own)
    with torch.no_grad():
        metrics = {
            "loss": loss.detach(),
            "accuracy": (q_to_p.argmax(dim=1) == own).float().mean(),
            "masked": torch.zeros((), device=v_q.device)
            if query_mask is None
            else query_mask.sum(dim=1).float().mean(),
        }
    return loss, metrics


def _scores(
    v: Tensor, others: Tensor, gamma: Tensor | float, mask: Tensor | None, name: str
) -> Tensor:
    """γ·cos [b, W], -inf where masked."""
    scores = gamma * (v @ others.T)
    if mask is None:
        return scores
    if mask.shape != scores.shape:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, scores have {tuple(scores.shape)}")
    return scores.masked_fill(mask, -torch.inf)


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


class ClickedPairs:
    """The distinct (query, product) pairs that a log has as clicked, in CSR: products by query.

    Attributes:
        offsets: int64 [queries + 1]
        products: int32 [distinct pairs]
    """

    def __init__(
        self, query: NDArray[np.integer], product: NDArray[np.integer], n_products: int
    ) -> None:
        """From the columns of pairs.parquet [n], in any order, repeats allowed."""
        keys = np.unique(query.astype(np.int64) * n_products + product)
        queries, products = np.divmod(keys, n_products)
        self.offsets = np.concatenate([[0], np.cumsum(np.bincount(queries))])
        self.products = products.astype(np.int32)

    def of(self, queries: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Their clicks: positions in `queries`, and products. Queries the log never saw have none.

        Args:
            queries: [Q]
        """
        last = len(self.offsets) - 1
        start = self.offsets[np.minimum(queries, last)]
        count = self.offsets[np.minimum(queries + 1, last)] - start
        before = np.cumsum(count) - count
        flat = np.arange(count.sum()) + np.repeat(start - before, count)
        return np.repeat(np.arange(len(queries)), count), self.products[flat]


def false_negative_mask(
    query: NDArray[np.integer],
    product: NDArray[np.integer],
    form: Literal["keep", "batch", "log"],
    clicked: ClickedPairs | None,
    rows: slice,
) -> tuple[Tensor, Tensor]:
    """Which in-batch negatives of `rows` are none, because the query and the product were clicked.

    A pair of the batch makes every combination of its query and its product a click, so rows with
    the same query or the same product are no negatives of each other in 'batch' and 'log'. A row's
    own pair is never masked.

    Args:
        query, product: ids of the whole batch [W], the same on every rank
        form: 'keep' masks nothing (paper), 'batch' what the batch shows as clicked, 'log' also what
            `clicked` has
        clicked: for 'log'
        rows: this rank's b rows

    Returns:
        bool [b, W] for queries against products, bool [b, W] for products against queries.
    """
    W = len(query)
    own_rows = np.arange(W)[rows]
    if form == "keep":
        none = torch.zeros(len(own_rows), W, dtype=torch.bool)
        return none, none
    queries, q = np.unique(query, return_inverse=True)
    products, p = np.unique(product, return_inverse=True)
    table = np.zeros((len(queries), len(products)), np.bool_)  # distinct ids: clicked?
    table[q, p] = True
    if form == "log":
        if clicked is None:
            raise ValueError("false_negative_mask: form 'log' needs the clicked pairs")
        at, clicks = clicked.of(queries)
        column = np.minimum(np.searchsorted(products, clicks), len(products) - 1)
        hit = products[column] == clicks
        table[at[hit], column[hit]] = True
    query_mask = table[q[rows]][:, p]
    product_mask = table[:, p[rows]].T[:, q]
    diagonal = np.arange(len(own_rows)), own_rows
    query_mask[diagonal] = False
    product_mask[diagonal] = False
    return torch.from_numpy(query_mask), torch.from_numpy(product_mask)
