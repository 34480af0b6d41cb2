"""One rank's model, adversary and optimisers, and the two kinds of step that train them.

The domain classifier's step takes the embeddings of the last encoder step, detached: it costs no
forward of the encoder.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from acebert.config import Settings
from acebert.models.domain import DomainClassifier, domain_accuracy, domain_loss, encoder_term
from acebert.models.dual import DualEncoder
from acebert.models.losses import semantic_matching_loss
from acebert.training.pairs import TrainBatch
from acebert.training.schedule import lr_factor


class Finetuner:
    """Model, adversary and their optimisers on one rank."""

    def __init__(
        self, settings: Settings, model: DualEncoder, device: torch.device, rank: int, world: int
    ) -> None:
        self.settings = settings
        self.device = device
        self.rank, self.world = rank, world
        self.model = model.to(device)
        forward: nn.Module = self.model
        if settings.train.compile:
            forward = torch.compile(forward)  # type: ignore[assignment]
        if world > 1:
            ids = [device] if device.type == "cuda" else None
            forward = DistributedDataParallel(forward, device_ids=ids)
        self.forward = forward
        train = settings.train
        self.optimizer = torch.optim.AdamW(
            model.parameter_groups(train.lr, train.new_layer_lr_factor, train.weight_decay),
            fused=True,
        )
        self._peak = [group["lr"] for group in self.optimizer.param_groups]
        self.adversary = settings.adversary
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.domain = DomainClassifier(settings.model.embedding_dim, self.adversary.hidden)
        self.domain.to(device)
        self.domain_optimizer = torch.optim.Adam(self.domain.parameters(), lr=self.adversary.lr)

    def encoder_step(
        self, batch: TrainBatch, step: int, share: float
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """One update of the encoders; the classifier's parameters stay as they are.

        Returns the step's metrics and the embeddings of query and product [b, d], detached.
        """
        torch.manual_seed(hash((self.settings.seed, step, self.rank)))
        bf16 = self.settings.train.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            v_q, v_p = self.forward(batch.query, batch.product, batch.image)
        main, metrics = semantic_matching_loss(
            v_q,
            v_p,
            self.model.gamma,
            query_mask=batch.query_mask,
            product_mask=batch.product_mask,
            product_log_share=batch.product_log_share,
        )
        loss = main
        if self.adversary.form != "off":
            ramp = min(1.0, (step + 1) / max(1, self.adversary.ramp_steps))
            term = encoder_term(self.adversary.form, self.domain, v_q, v_p)
            loss = main + self.adversary.weight * ramp * term
            metrics["adversary"] = term.detach()
        factor = lr_factor(self.settings.train, step, share)
        for group, peak in zip(self.optimizer.param_groups, self._peak, strict=True):
            group["lr"] = peak * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.train.max_grad_norm)
        self.optimizer.step()
        metrics["grad_norm"] = norm.detach()
        metrics["lr"] = norm.new_tensor(self.settings.train.lr * factor)
        metrics["gamma"] = torch.as_tensor(self.model.gamma, device=norm.device).detach()
        return metrics, v_q.detach(), v_p.detach()

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
