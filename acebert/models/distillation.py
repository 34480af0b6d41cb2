"""What a query-side student learns: the teacher's vector, and how it scores products."""

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_losses(
    v: Tensor, teacher: Tensor, best: Tensor, others: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) of the score distributions softmax(γ·cos), and 1 − cos(v, teacher).

    Args:
        v, teacher: the student's and the teacher's vectors of B queries, float32 [B, d], length 1
        best: vectors of each query's own candidates, the teacher's first K, [B, K, d]
        others: vectors of candidates that all queries share, [R, d]; one that is among a query's
            own counts twice, for teacher and student alike
        gamma: γ of Eq. 4 that the teacher was trained with

    Returns:
        Both [B]. The KL is in nats; zero where the student is the teacher.
    """

    def log_probabilities(x: Tensor) -> Tensor:
        own = torch.einsum("bd,bkd->bk", x, best)
        return F.log_softmax(gamma * torch.cat([own, x @ others.T], dim=1), dim=1)

    with torch.autocast(v.device.type, enabled=False):  # γ would magnify bf16's rounding
        target = log_probabilities(teacher)
        kl = (target.exp() * (target - log_probabilities(v))).sum(dim=1)
        return kl, 1 - (v * teacher).sum(dim=1)
