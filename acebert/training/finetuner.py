"""One rank's model, adversary and optimisers, and the two kinds of step that train them.

A batch with more than `train.micro_batch` rows on a side goes through the encoders in parts
(gradient_cache.py); the loss, the adversary and the optimiser see the whole of it.

The domain classifier's step takes the embeddings of the last encoder step, detached: it costs no
forward of the encoder.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from acebert.config import Settings
from acebert.models.domain import DomainClassifier, domain_accuracy, domain_loss, encoder_term
from acebert.models.dual import ROWS_OF_ONE_LENGTH, DualEncoder, truncated
from acebert.models.losses import semantic_matching_loss
from acebert.models.parameters import adamw_groups
from acebert.training.flops import matrix_peak, step_flops
from acebert.training.gradient_cache import backward_parts, embed_parts
from acebert.training.pairs import Part, TrainBatch
from acebert.training.schedule import lr_factor
from acebert.training.step_timer import StepTimer

SPEED = (
    *("seconds_data", "seconds_forward", "seconds_backward", "seconds_optimizer"),
    *("pairs_per_second", "flops", "peak", "peak_share"),
)
"""metrics of a step that no step repeats"""


class Finetuner:
    """Model, adversary and their optimisers on one rank."""

    def __init__(
        self, settings: Settings, model: DualEncoder, device: torch.device, rank: int, world: int
    ) -> None:
        self.settings = settings
        self.device = device
        self.rank, self.world = rank, world
        self.model = model.to(device)
        self.encoders: nn.Module = self.model
        if settings.train.compile:
            self.encoders = torch.compile(self.model)  # type: ignore[assignment]
            if settings.train.micro_batch is not None:
                # DDP would cut the graph into its buckets, and the pass without gradients, which is
                # not cut, would draw other dropout on a GPU.
                torch._dynamo.config.optimize_ddp = False
        self.parallel = self.encoders
        if world > 1:
            with warnings.catch_warnings():  # the name that replaces it is newer than torch 2.13
                warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
                self.parallel = DistributedDataParallel(
                    self.encoders,
                    device_ids=[device] if device.type == "cuda" else None,
                    broadcast_buffers=False,  # they are constants
                    gradient_as_bucket_view=True,
                )
        train = settings.train
        self.optimizer = torch.optim.AdamW(
            adamw_groups(
                model, model.new_parameters, train.lr, train.new_layer_lr_factor, train.weight_decay
            ),
            fused=True,
        )
        self._peak_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.adversary = settings.adversary
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.domain = DomainClassifier(settings.model.embedding_dim, self.adversary.hidden)
        self.domain.to(device)
        self.domain_optimizer = torch.optim.Adam(
            self.domain.parameters(), lr=self.adversary.lr, fused=True
        )
        self.timer = StepTimer(device)
        self.peak: float | None = None  # FLOP/s, measured at the first batch

    def encoder_step(
        self, batch: TrainBatch, step: int, share: float
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """One update of the encoders; the classifier's parameters stay as they are.

        Returns the step's metrics and the embeddings of query and product [b, d], detached. The
        metrics hold the loss's own (`semantic_matching_loss`), those of the optimiser, and SPEED's
        (`StepTimer.record`).
        """
        flops = step_flops(self.model, batch, self.world)
        if self.peak is None:
            self.peak = self._matrix_peak(batch)
        self.timer.start()
        metrics, v_q, v_p = self._gradients(batch, step)
        factor = lr_factor(self.settings.train, step, share)
        for group, peak in zip(self.optimizer.param_groups, self._peak_lr, strict=True):
            group["lr"] = peak * factor
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.timer.mark("optimizer")
        values = {
            "lr": self.settings.train.lr * factor,
            **self.timer.record(
                "pairs", self.settings.train.batch_size, batch.waited, flops, self.peak
            ),
        }
        on_device = torch.tensor(list(values.values())).to(self.device, non_blocking=True)
        metrics |= dict(zip(values, on_device.unbind(), strict=True))
        metrics["grad_norm"] = norm.detach()
        gamma = torch.as_tensor(self.model.gamma).detach()
        metrics["gamma"] = gamma.to(self.device, non_blocking=True)
        return metrics, v_q, v_p

    def _gradients(
        self, batch: TrainBatch, step: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Forward and backward, in one part or by gradient caching."""

        def encode(module: nn.Module, part: Part, i: int) -> tuple[torch.Tensor, torch.Tensor]:
            torch.manual_seed(hash((self.settings.seed, step, self.rank, i)))
            bf16 = self.settings.train.precision == "bf16"
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                return module(*part)

        micro_batch, b = self.settings.train.micro_batch, len(batch.query.pair_row)
        parts = batch.parts(micro_batch)
        # By the most rows that b pairs may have, which is the same on all ranks, and not by those
        # they have: the order of collectives must be.
        most = b * (1 + self.settings.loss.hard_negatives)
        cached = micro_batch is not None and micro_batch < most
        if cached:
            queries, products = embed_parts(encode, self.encoders, parts)
        else:
            queries, products = encode(self.parallel, parts[0], 0)
        gamma = self.model.gamma
        if cached and isinstance(gamma, torch.Tensor):
            gamma = gamma.detach().requires_grad_()
        v_q, v_p = queries[batch.query.pair_row], products[batch.product.pair_row]
        v_mined = None if batch.mined_row is None else products[batch.mined_row]
        loss, metrics = self._match(v_q, v_p, v_mined, gamma, batch)
        for dims in self.settings.loss.matryoshka_dims:
            shorter, of = self._match(
                truncated(v_q, dims),
                truncated(v_p, dims),
                None if v_mined is None else truncated(v_mined, dims),
                gamma,
                batch,
            )
            loss = loss + shorter
            metrics[f"loss_{dims}"] = of["loss"]
        if self.adversary.form != "off":
            ramp = min(1.0, (step + 1) / max(1, self.adversary.ramp_steps))
            term = encoder_term(self.adversary.form, self.domain, v_q, v_p)
            loss = loss + self.adversary.weight * ramp * term
            metrics["adversary"] = term.detach()
        self.timer.mark("forward")
        loss.backward()
        if cached:
            others = []
            if isinstance(gamma, torch.Tensor):
                assert gamma.grad is not None
                others.append((torch.as_tensor(self.model.gamma), gamma.grad))
            backward_parts(encode, self.parallel, parts, queries, products, others)
        self.timer.mark("backward")
        return metrics, v_q.detach(), v_p.detach()

    def _match(
        self,
        v_q: torch.Tensor,
        v_p: torch.Tensor,
        v_mined: torch.Tensor | None,
        gamma: torch.Tensor | float,
        batch: TrainBatch,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return semantic_matching_loss(
            v_q,
            v_p,
            gamma,
            v_mined=v_mined,
            query_mask=batch.query_mask,
            product_mask=batch.product_mask,
            product_log_share=batch.product_log_share,
        )

    def _matrix_peak(self, batch: TrainBatch) -> float:
        """Of products as large as this batch's are, on average [FLOP/s]."""
        config = self.model.tower.encoder.config
        text = int(batch.query.tokens.sum() + batch.product.tokens.sum())
        image = int(batch.product.has_image.sum()) * config.image_tokens
        rows = len(batch.query) + len(batch.product)
        together = self.settings.train.micro_batch or self.settings.train.batch_size
        if self.device.type == "cpu":
            together = min(together, ROWS_OF_ONE_LENGTH)
        bf16 = self.settings.train.precision == "bf16"
        return matrix_peak(
            config,
            max(1, together * (text + image) // rows),
            self.device,
            torch.bfloat16 if bf16 else torch.float32,
        )

    def domain_step(self, v_q: torch.Tensor, v_p: torch.Tensor) -> dict[str, torch.Tensor]:
        """One update of the domain classifier on embeddings [b, d] that carry no gradient."""
        loss = domain_loss(self.domain, v_q, v_p)
        self.domain_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.world > 1:
            for parameter in self.domain.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world
        self.domain_optimizer.step()
        accuracy = domain_accuracy(self.domain, v_q, v_p)
        self.timer.mark("optimizer")  # on a GPU; a CPU's record is made before
        return {"domain_loss": loss.detach(), "domain_accuracy": accuracy}

    def state(self) -> dict[str, Any]:
        """Weights and optimiser states, on the device; equal on all ranks."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "domain": self.domain.state_dict(),
            "domain_optimizer": self.domain_optimizer.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.domain.load_state_dict(state["domain"])
        self.domain_optimizer.load_state_dict(state["domain_optimizer"])
