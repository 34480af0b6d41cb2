"""One rank's model and optimiser in pre-training, and the step that trains them."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from acebert.config import Settings
from acebert.models.encoder import ROWS_OF_ONE_LENGTH
from acebert.models.parameters import adamw_groups
from acebert.models.pretraining import (
    CEBertForPreTraining,
    PretrainOutputs,
    adaptive_weights,
    mlm_loss,
    mpm_loss,
    tip_loss,
)
from acebert.training.flops import matrix_peak, pretraining_flops
from acebert.training.pretrain_batches import PretrainBatch
from acebert.training.schedule import lr_factor
from acebert.training.step_timer import StepTimer


class Pretrainer:
    """Model and optimiser on one rank."""

    def __init__(
        self,
        settings: Settings,
        model: CEBertForPreTraining,
        device: torch.device,
        rank: int,
        world: int,
    ) -> None:
        self.settings = settings
        self.device, self.rank, self.world = device, rank, world
        self.model = model.to(device)  # type: ignore[arg-type]
        self.forward: nn.Module = self.model
        if world > 1:
            ids = [device] if device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.model, device_ids=ids)
        own = settings.pretrain
        self.optimizer = torch.optim.AdamW(
            adamw_groups(
                model, model.new_parameters, own.lr, own.new_layer_lr_factor, own.weight_decay
            ),
            fused=True,
        )
        self._peak_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.timer = StepTimer(device)
        self.peak: float | None = None  # FLOP/s, measured at the first batch

    def step(self, batch: PretrainBatch, step: int, share: float) -> dict[str, torch.Tensor]:
        """One update on this rank's rows; the step's metrics, whose mean over the ranks is the
        whole batch's, and `StepTimer.record`'s."""
        config, bf16 = self.model.config, self.settings.train.precision == "bf16"
        if self.peak is None:
            rows, padded = batch.inputs.text.input_ids.shape
            together = min(rows, ROWS_OF_ONE_LENGTH) if self.device.type == "cpu" else rows
            dtype = torch.bfloat16 if bf16 else torch.float32
            tokens = together * (padded + config.image_tokens)
            self.peak = matrix_peak(config, tokens, self.device, dtype)
        flops = pretraining_flops(
            config,
            batch.tokens,
            batch.has_photo,
            len(batch.inputs.word_rows),
            len(batch.inputs.patch_rows),
        )
        self.timer.start()
        torch.manual_seed(hash((self.settings.pretrain.seed, step, self.rank)))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            outputs: PretrainOutputs = self.forward(batch.inputs)
        losses, metrics = self._losses(outputs, batch)
        if self.settings.pretrain.adaptive_loss:
            weights = adaptive_weights(self._global(torch.stack(list(losses.values()))))
            loss = sum(w * value for w, value in zip(weights, losses.values(), strict=True))
            metrics |= {f"{name}_weight": w for name, w in zip(losses, weights, strict=True)}
        else:
            loss = sum(losses.values())
        assert isinstance(loss, torch.Tensor)
        self.timer.mark("forward")
        factor = lr_factor(self.settings.pretrain, step, share)
        for group, peak in zip(self.optimizer.param_groups, self._peak_lr, strict=True):
            group["lr"] = peak * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.timer.mark("backward")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.train.max_grad_norm)
        self.optimizer.step()
        self.timer.mark("optimizer")
        texts = self.settings.pretrain.batch_size
        speed = self.timer.record("texts", texts, batch.waited, flops, self.peak)
        host = {"lr": self.settings.pretrain.lr * factor, **speed}
        on_device = torch.tensor(list(host.values())).to(self.device, non_blocking=True).unbind()
        metrics |= {"loss": loss.detach(), "grad_norm": norm.detach()}
        return metrics | dict(zip(host, on_device, strict=True))

    def _losses(
        self, outputs: PretrainOutputs, batch: PretrainBatch
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The losses of section 2.2, scaled so that DDP's mean over the ranks is the mean over the
        whole batch; and their values with the accuracies, scaled alike."""

        def mean(values: torch.Tensor, everywhere: int) -> torch.Tensor:
            return values.sum() * (self.world / max(1, everywhere))

        losses = {"mlm": mean(mlm_loss(outputs.words, batch.words), batch.all_words)}
        hits = outputs.words.argmax(dim=-1) == batch.words
        right = {"mlm_accuracy": mean(hits.float(), batch.all_words)}
        if outputs.patches is not None and outputs.features is not None:
            kl = mpm_loss(
                outputs.patches, outputs.features, self.settings.pretrain.patch_temperature
            )
            losses["mpm"] = mean(kl, batch.all_patches)
        if outputs.match is not None:
            pairs = self._global(batch.paired.sum()).clamp(min=1 / self.world)
            losses["tip"] = (tip_loss(outputs.match, batch.matched) * batch.paired).sum() / pairs
            agrees = ((outputs.match > 0) == (batch.matched > 0)) * batch.paired
            right["tip_accuracy"] = agrees.sum() / pairs
        metrics = {name: loss.detach() for name, loss in losses.items()} | right
        return losses, metrics

    def _global(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the ranks, detached."""
        values = values.detach().clone()
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def state(self) -> dict[str, Any]:
        """Weights and optimiser state, on the device; equal on all ranks."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
