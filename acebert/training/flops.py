"""What a step has to compute, and what the machine could: achieved FLOP/s and its share of a peak.

Counted are the matrix products that the real tokens of the distinct rows need, forward and
backward. Padding, the second forward of gradient caching and whatever is no matrix product count as
time, not as work. Letters as in docs/architecture.md; I is the width of the feed-forward layer.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from acebert.models.dual import DualEncoder
from acebert.models.encoder import NUM_PATCHES, NUM_PIXEL_PATCHES, CEBertConfig
from acebert.training.pairs import TrainBatch

PEAK_SECONDS, MIN_ROUNDS = 0.2, 5  # for which the peak is measured at least


def step_flops(model: DualEncoder, batch: TrainBatch, world: int) -> float:
    """Floating-point operations of one encoder step on this rank: both sides, forward and
    backward, and the scores of Eq. 4 (2·3·2·b·W·d). The adversary's are left out (under 0.1 %)."""
    d = model.tower.projection.out_features
    query_tower = model.query_tower or model.tower
    b = len(batch.query.pair_row)
    return (
        tower_flops(query_tower.encoder.config, d, batch.query.tokens, batch.query.has_image)
        + tower_flops(model.tower.encoder.config, d, batch.product.tokens, batch.product.has_image)
        + 12.0 * b * b * world * d
    )


def tower_flops(
    config: CEBertConfig, d: int, tokens: NDArray[np.integer], has_image: NDArray[np.bool_]
) -> float:
    """Forward and backward of one side's rows, `_encoder_flops` of the n tokens that are pooled,
    and the head to d dimensions.

    Args:
        tokens: of each row's text [B]
        has_image: [B], whether its image tokens count
    """
    n = tokens if config.pooling == "mean" else np.ones_like(tokens)
    head = 3 * 2 * config.hidden_size * d
    return float((_encoder_flops(config, tokens, has_image, n) + head).sum())


def pretraining_flops(
    config: CEBertConfig,
    tokens: NDArray[np.integer],
    has_image: NDArray[np.bool_],
    words: int,
    patches: int,
) -> float:
    """Forward and backward of pre-training's rows and heads.

    A masked word takes 2·D² + 2·D·vocabulary in the forward, a masked patch 2·D² + 2·D·D1, a row of
    a model that reads images 2·D² + 2·D; the backward twice as much.

    Args:
        tokens, has_image: as of `tower_flops`
        words, patches: how many are predicted
    """
    D = config.hidden_size
    n = tokens + NUM_PATCHES * bool(config.patch_dim) * has_image
    heads = words * (D**2 + D * config.vocab_size) + patches * (D**2 + D * config.patch_dim)
    heads += len(tokens) * (D**2 + D) * config.reads_images
    return float(_encoder_flops(config, tokens, has_image, n).sum()) + 3 * 2.0 * heads


def _encoder_flops(
    config: CEBertConfig,
    tokens: NDArray[np.integer],
    has_image: NDArray[np.bool_],
    needed: NDArray[np.integer],
) -> NDArray[np.float64]:
    """Forward and backward of each row [B].

    A row of T tokens, n of them needed, takes in the forward, two for each multiply-add:

        a layer          8·T·D² + 4·T²·D + 4·T·D·I     projections, attention, feed-forward
        the last layer   4·T·D² + 4·n·D² + 4·n·T·D + 4·n·D·I
        the image        2·16·D1·D + 2·49·pixel_dim·D
        the mean         2·D for each token of the text, where these are averaged

    The backward takes twice as much, of the last two once: features and the weights of the mean
    need no gradient.
    """
    D, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    photo = NUM_PATCHES * config.patch_dim + NUM_PIXEL_PATCHES * config.pixel_dim
    text, n = tokens.astype(np.float64), needed.astype(np.float64)
    T = text + config.image_tokens * has_image
    layer = 8 * T * D**2 + 4 * T**2 * D + 4 * T * D * inner
    last = 4 * T * D**2 + 4 * n * D**2 + 4 * n * T * D + 4 * n * D * inner
    image = 2 * photo * D * has_image
    mean = 2 * text * D * (config.pooling == "mean")
    return 3 * ((layers - 1) * layer + last) + 2 * (image + mean)


@torch.no_grad()
def matrix_peak(
    config: CEBertConfig, tokens: int, device: torch.device, dtype: torch.dtype
) -> float:
    """FLOP/s of this machine on the products that an encoder consists of, and nothing else.

    Attention's projection [tokens, D]·[D, D] and the feed-forward layer's [tokens, D]·[D, I] and
    [tokens, I]·[I, D], again and again for 0.2 s; the fastest round counts.
    """
    D, inner = config.hidden_size, config.intermediate_size
    x = torch.randn(tokens, D, device=device, dtype=dtype)
    square, up, down = (
        torch.randn(rows, columns, device=device, dtype=dtype)
        for rows, columns in ((D, D), (inner, D), (D, inner))
    )

    def once() -> None:
        F.linear(F.linear(F.linear(x, square), up), down)

    timed = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    once()
    end = time.perf_counter() + PEAK_SECONDS
    rounds: list[float] = []
    while len(rounds) < MIN_ROUNDS or time.perf_counter() < end:
        rounds.append(timed(once))
    return 2 * tokens * (D * D + 2 * D * inner) / min(rounds)


def _cpu_seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _cuda_seconds(work: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):  # one is shorter than its launch
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / 10
