"""Gradient caching (GradCache, Gao et al. 2021): a batch of any size in the memory of a part of it.

The loss needs all embeddings at once, but not all activations:

1. embed the batch part by part, keeping no graph;
2. loss and its gradient at the embeddings, across ranks (the embeddings are small);
3. encode each part again, now with its graph, and send its embeddings' gradients through it.

The gradients are those of one pass over the whole batch. A part is encoded alike both times: its
random numbers start from its own seed. Under DDP only the last part's backward synchronises, so
that a step has one all-reduce, overlapped with that backward. One more forward is the price.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from acebert.training.pairs import Part

Encode = Callable[[nn.Module, Part, int], tuple[Tensor, Tensor]]
"""(module, part, its number) → embeddings of the part's rows; alike each time it is called"""


def embed_parts(encode: Encode, module: nn.Module, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """Embeddings of all parts' queries and products, leaves of a graph to come: [n, d] each."""
    with torch.no_grad():
        sides = zip(*(encode(module, part, i) for i, part in enumerate(parts)), strict=True)
        queries, products = (torch.cat(side) for side in sides)
    return queries.requires_grad_(), products.requires_grad_()


def backward_parts(
    encode: Encode,
    module: nn.Module,
    parts: Sequence[Part],
    queries: Tensor,
    products: Tensor,
    others: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Adds the gradients of the module's parameters to theirs.

    Args:
        module: the one that `embed_parts` had, possibly wrapped in DDP
        queries, products: what `embed_parts` returned, with the loss's gradients in `.grad`
        others: further tensors that depend on the module's parameters, with the loss's gradients;
            they go along with the last part
    """
    assert queries.grad is not None
    assert products.grad is not None
    query_grads = queries.grad.split([len(part.query.input_ids) for part in parts])
    product_grads = products.grad.split([len(part.product.input_ids) for part in parts])
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        wait = isinstance(module, DistributedDataParallel) and not last
        with module.no_sync() if wait else nullcontext():  # type: ignore[operator]
            v_q, v_p = encode(module, part, i)
            pairs = [(v_q, query_grads[i]), (v_p, product_grads[i]), *(others if last else ())]
            roots, grads = zip(*((v, g) for v, g in pairs if v.requires_grad), strict=True)
            torch.autograd.backward(roots, grads)
