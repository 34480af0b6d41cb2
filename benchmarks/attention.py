"""Attention of a CPU that trains: forward and backward by plain products against PyTorch's kernels.

    python benchmarks/attention.py

Milliseconds of 64 rows, 12 heads of 32, in bf16, and the error of values and gradients against
fp32 (the largest of the four, relative, in the Frobenius norm). `plain` is the encoder's own
(`acebert.models.encoder`), `math` and `fused` are PyTorch's two for CPUs. In turns; medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from acebert.models.encoder import _attend

ROWS, HEADS, WIDTH = 64, 12, 32
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return _attend(query, key, value, mask, 0.0, plain=True)


def by(kernel: SDPBackend) -> Attention:
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask.expand(-1, -1, query.shape[2], -1)
            )

    return attend


def once(attend: Attention, inputs: list[Tensor], mask: Tensor) -> tuple[float, list[Tensor]]:
    """Seconds of forward and backward; the output and the three gradients."""
    query, key, value = (x.transpose(1, 2).detach().requires_grad_() for x in inputs[:3])
    start = time.perf_counter()
    out = attend(query, key, value, mask)
    out.backward(inputs[3].transpose(1, 2))
    seconds = time.perf_counter() - start
    return seconds, [out.detach(), *(x.grad for x in (query, key, value) if x.grad is not None)]


def main(turns: int) -> None:
    kernels = {
        "plain": plain,
        "math": by(SDPBackend.MATH),
        "fused": by(SDPBackend.FLASH_ATTENTION),
    }
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for tokens in (16, 84, 112):
        exact = [torch.randn(ROWS, tokens, HEADS, WIDTH) for _ in range(4)]
        counts = torch.rand(ROWS, 1, 1, tokens) > 0.1
        counts[..., 0] = True
        mask = torch.where(counts, 0.0, -torch.inf)
        _, expected = once(by(SDPBackend.MATH), exact, mask)
        inputs, mask = [x.bfloat16() for x in exact], mask.bfloat16()
        timed: dict[str, list[float]] = {name: [] for name in kernels}
        errors = {}
        for turn in range(turns + 1):
            for name, attend in kernels.items():
                seconds, got = once(attend, inputs, mask)
                if turn:  # the first warms caches up
                    timed[name].append(seconds)
                pairs = zip(got, expected, strict=True)
                errors[name] = max(float((x.float() - y).norm() / y.norm()) for x, y in pairs)
        for name, seconds_of in timed.items():
            milliseconds = 1000 * statistics.median(seconds_of)
            print(f"{tokens:>4} tokens  {name:<6} {milliseconds:7.1f} ms  error {errors[name]:.2%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    main(parser.parse_args().turns)
