"""The steps of any training, with a toy to train, on three real ranks."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from acebert.config import TrainSettings
from acebert.training.checkpoint import Progress
from acebert.training.steps import Metrics, Rank, Training, train

CPU = torch.device("cpu")
STEPS, KILLED_AFTER = 8, 3
CASES = [False, True]
"""whether it is resumed"""


@dataclass
class Words:
    ids: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Self:
        return self


class Toy:
    """A model whose parameters do not fill DDP's buckets in the order of its gradients."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Embedding(1000, 64), nn.Linear(64, 257), nn.GELU(), nn.Linear(257, 10)
        )
        self.parallel = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class ToyTraining(Training[Words]):
    stage, section, unit, said = "toy", "train", "rows", ()
    own = TrainSettings(max_steps=STEPS)
    batch_size, steps_per_epoch, validates_on = 48, STEPS, "nothing"
    validate_every, checkpoint_every = STEPS, KILLED_AFTER

    def __init__(self, rank: Rank, trainer: Toy) -> None:
        self.rank = rank.rank
        self.trainer: Toy = trainer

    def stream(self, start: int, stop: int) -> Iterator[Words]:
        for step in range(start, stop):
            torch.manual_seed(100 * step + self.rank)
            yield Words(torch.randint(0, 1000, (16,)), torch.randn(16, 10))

    def step(self, batch: Words, step: int, share: float) -> Metrics:
        loss = (self.trainer.parallel(batch.ids) - batch.targets).square().mean()
        loss.backward()
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), "seconds_data": torch.tensor(0.0)}

    def validate(self, state: Progress) -> dict[str, float]:
        return {}


def one_rank(resumed: bool, rank: int) -> dict[str, Tensor]:
    """What `three_ranks` runs: the weights at the end, and the losses of the last steps."""
    saved: list[tuple[Mapping[str, Any], Progress]] = []

    def save(tensors: Mapping[str, Any], progress: Progress) -> None:
        saved.append((deepcopy(tensors), deepcopy(progress)))

    own = Rank(rank, 3, CPU, save)
    training = ToyTraining(own, Toy())
    state = train(training, own)
    if resumed:
        own = Rank(rank, 3, CPU, save, lambda: deepcopy(saved[0]))
        training = ToyTraining(own, Toy())
        state = train(training, own)
    weights = {name: tensor.clone() for name, tensor in training.trainer.model.state_dict().items()}
    assert saved[0][1].step == KILLED_AFTER < state.step == STEPS
    return {"losses": torch.tensor(state.history["loss"].to_pylist()), **weights}


def test_three_ranks_that_are_resumed_sum_their_gradients_in_the_same_order(
    three_ranks: list[list[dict[str, Tensor]]],
) -> None:
    """Bit for bit: two summands commute, three do not associate."""
    for undisturbed, resumed in zip(*three_ranks, strict=True):
        assert undisturbed.keys() == resumed.keys()
        for name, tensor in undisturbed.items():
            assert torch.equal(tensor, resumed[name]), name


class Alone(Toy):
    def __init__(self) -> None:
        self.model = self.parallel = nn.Embedding(1000, 10)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)


@pytest.mark.parametrize(("warmup", "said"), [(STEPS, True), (STEPS - 1, False)])
def test_a_warm_up_that_takes_the_whole_budget_is_said(
    warmup: int, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    own = Rank(0, 1, CPU, lambda *_: None)
    training = ToyTraining(own, Alone())
    training.own = TrainSettings(max_steps=STEPS, warmup_steps=warmup)
    train(training, own)
    assert ("the learning rate never reaches --train.lr" in caplog.text) == said
