"""What the ranks of a run tell each other between steps."""

import torch
import torch.distributed as dist


def same_on_all_ranks(share: float, max_minutes: float | None, world: int) -> float:
    """Rank 0's share of the budget where the clock counts: the learning rate must not differ
    between ranks."""
    if max_minutes is None or world == 1:
        return share
    value = torch.tensor([share])
    if dist.get_backend() == "nccl":
        value = value.cuda()
    dist.broadcast(value, 0)
    return float(value)


def rows_of_steps(
    pending: list[dict[str, torch.Tensor]], step: int, world: int
) -> list[dict[str, float]]:
    """The metrics of the last steps, averaged over the ranks: a row a step, the last is `step`."""
    if not pending:
        return []
    values = torch.stack([v.float() for metrics in pending for v in metrics.values()])
    if world > 1:
        dist.all_reduce(values)
        values /= world
    of = iter(values.tolist())
    return [
        {"step": number, **{name: next(of) for name in metrics}}
        for number, metrics in enumerate(pending, step - len(pending) + 1)
    ]
