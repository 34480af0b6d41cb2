"""One rank's student: its batches, the step that trains it, and how close it is to the teacher."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from acebert.config import Settings
from acebert.data.batches import TextStore
from acebert.data.tokens import Ragged, special_ids
from acebert.errors import UserError
from acebert.models.distillation import distillation_losses
from acebert.models.dual import DualEncoder
from acebert.models.encoder import TextInputs
from acebert.models.parameters import adamw_groups
from acebert.training.distill_validation import HeldOutQueries
from acebert.training.pairs import as_inputs
from acebert.training.prefetch import prefetched
from acebert.training.schedule import lr_factor
from acebert.training.teacher_targets import TeacherTargets

ROWS = 256  # queries of a forward in a validation


@dataclass
class DistillBatch:
    """One rank's b texts of a batch.

    Attributes:
        text: tokens [b, L]
        teacher: the teacher's vectors [b, d]
        best: vectors of its first products [b, K, d]
        others: vectors of random products [R, d], the same for all texts and ranks
        waited: how long training waited for this batch [s]
    """

    text: TextInputs
    teacher: Tensor
    best: Tensor
    others: Tensor
    waited: float = 0.0

    def to(self, device: torch.device) -> "DistillBatch":
        tensors = (self.teacher, self.best, self.others)
        teacher, best, others = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return DistillBatch(self.text.to(device), teacher, best, others, self.waited)


class Distiller:
    """Student, optimiser and data on one rank.

    A batch comes from (seed, epoch, step), and there is no dropout: a resumed run repeats the
    undisturbed one.
    """

    def __init__(
        self,
        settings: Settings,
        targets: Path,
        tokenizer: Path,
        student: DualEncoder,
        device: torch.device,
        rank: int,
        world: int,
    ) -> None:
        self.settings, self.own = settings, settings.distill
        self.device, self.rank, self.world = device, rank, world
        self.gamma = float(student.gamma)
        assert student.query_tower is not None
        self.model = student.query_tower.to(device)
        self.forward: nn.Module = self.model
        if world > 1:
            ids = [device] if device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.model, device_ids=ids)
        self.optimizer = torch.optim.AdamW(
            adamw_groups(self.model, (), self.own.lr, 1.0, self.own.weight_decay), fused=True
        )
        self.targets = TeacherTargets.open(targets)
        self.steps_per_epoch = self.targets.n // self.own.batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"--distill.batch_size {self.own.batch_size}: there are {self.targets.n} texts"
            )
        none, special = Ragged.from_rows([]), special_ids(tokenizer)
        self._texts = TextStore(
            none, self.targets.texts, none, special["cls"], special["sep"], special["pad"]
        )
        self._order = lru_cache(2)(self._shuffled)
        self.valid = HeldOutQueries(self.targets, self.own.valid_queries, self.own.seed)

    def stream(self, start: int, stop: int) -> Iterator[DistillBatch]:
        """This rank's batches of steps start … stop − 1."""
        return prefetched(self.batch, start, stop)

    def batch(self, step: int) -> DistillBatch:
        """This rank's rows of step `step`, counted from 0 over all epochs."""
        epoch, i = divmod(step, self.steps_per_epoch)
        W, targets = self.own.batch_size, self.targets
        first, end = (i * W + rank * W // self.world for rank in (self.rank, self.rank + 1))
        rows = self._order(epoch)[first:end]
        draw = np.random.default_rng((self.own.seed, epoch, i))
        others = draw.integers(len(targets.products), size=self.own.random_products)
        return DistillBatch(
            as_inputs(self._texts.query_batch(rows)),
            torch.from_numpy(targets.vectors[rows]),
            torch.from_numpy(targets.products[targets.best[rows]]),
            torch.from_numpy(targets.products[others]),
        )

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((self.own.seed, epoch)).permutation(self.targets.n)

    def step(self, batch: DistillBatch, step: int, share: float) -> dict[str, Tensor]:
        """One update; the step's metrics, whose mean over the ranks is the whole batch's."""
        bf16 = self.settings.train.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            v = self.forward(batch.text)
        kl, distance = distillation_losses(v, batch.teacher, batch.best, batch.others, self.gamma)
        loss = kl.mean() + self.own.embedding_weight * distance.mean()
        factor = lr_factor(self.own, step, share)
        for group in self.optimizer.param_groups:
            group["lr"] = self.own.lr * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.train.max_grad_norm)
        self.optimizer.step()
        return {
            "loss": loss.detach(),
            "kl": kl.detach().mean(),
            "cosine": 1 - distance.detach().mean(),
            "grad_norm": norm.detach(),
            "lr": torch.tensor(self.own.lr * factor, device=self.device),
            "seconds_data": torch.tensor(batch.waited, device=self.device),
        }

    def validate(self) -> dict[str, float]:
        """How close the student is to the teacher on queries of the validation day."""
        return self.valid.measure(self._encode(self.targets.n + self.valid.rows))

    @torch.inference_mode()
    def _encode(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        self.model.eval()
        parts = [
            self.model(as_inputs(self._texts.query_batch(rows[i : i + ROWS])).to(self.device)).cpu()
            for i in range(0, len(rows), ROWS)
        ]
        self.model.train()
        return torch.cat(parts).numpy()

    def state(self) -> dict[str, Any]:
        """Weights and optimiser state, on the device; equal on all ranks."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
