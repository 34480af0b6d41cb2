"""The dual encoder (paper section 3.1): queries and products as points on one unit sphere.

A tower is CE-BERT and a linear layer on its pooled state; v is that, normalised in fp32 whatever
the autocast. Both sides share one tower (paper), or have one each from the same start; the query
side's own tower is then text only, for it never sees an image.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from acebert.config import MAX_LEARNED_GAMMA, ModelSettings
from acebert.errors import UserError
from acebert.models.encoder import (
    ROWS_OF_ONE_LENGTH,
    CEBertConfig,
    CEBertModel,
    ImageInputs,
    TextInputs,
    load_backbone,
    seeded,
)

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class Tower(nn.Module):
    """One side: tokens → v, float32 [B, d] of length 1."""

    def __init__(self, encoder: CEBertModel, embedding_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Linear(encoder.config.hidden_size, embedding_dim)

    def forward(self, text: TextInputs, image: ImageInputs | None = None) -> Tensor:
        if not len(text.input_ids):
            return self.projection.weight.new_zeros(0, self.projection.out_features)
        if text.input_ids.device.type != "cpu" or len(text.input_ids) < 2 * ROWS_OF_ONE_LENGTH:
            return self._encode(text, image)
        # A core does padding at the price of words: rows of about one length go together.
        order = text.attention_mask.sum(dim=1).argsort()
        if torch.is_grad_enabled():
            text = self.encoder.embeddings.look_up(text)
        parts = [
            self._encode(text.rows(rows), None if image is None else image.rows(rows))
            for rows in order.split(ROWS_OF_ONE_LENGTH)
        ]
        return torch.cat(parts)[order.argsort()]

    def _encode(self, text: TextInputs, image: ImageInputs | None) -> Tensor:
        state = self.encoder.pooled(text, image)
        with torch.autocast(state.device.type, enabled=False):
            return F.normalize(self.projection(state.float()), dim=-1)


def truncated(v: Tensor, dims: int) -> Tensor:
    """The first `dims` of d dimensions as embeddings of length 1: [B, d] → [B, dims]."""
    return F.normalize(v[:, :dims], dim=-1)


class DualEncoder(nn.Module):
    """Query and product encoder with the smoothing γ of Eq. 4.

    Attributes:
        tower: both sides', or the product side's where `query_tower` is there
        query_tower: the query side's own, or None
        log_gamma: log γ where it is learned, else None
        new_parameters: names of the parameters that did not come from a backbone
    """

    def __init__(
        self,
        tower: Tower,
        query_tower: Tower | None = None,
        *,
        gamma: float = 20.0,
        gamma_learned: bool = False,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.query_tower = query_tower
        self._gamma = gamma
        self.log_gamma = nn.Parameter(torch.tensor(math.log(gamma))) if gamma_learned else None
        self.new_parameters: frozenset[str] = frozenset()

    @classmethod
    def new(
        cls,
        model: ModelSettings,
        *,
        vocab_size: int,
        sep_token_id: int,
        patch_dim: int = 0,
        pixel_side: int = 0,
        gamma: float = 20.0,
        gamma_learned: bool = False,
        seed: int = 0,
    ) -> "DualEncoder":
        """The dual encoder at its start weights (see `load_backbone` for the arguments, and for
        the UserErrors that it raises). New weights depend on the seed alone."""

        def tower(patch_dim: int, pixel_side: int) -> Tower:
            encoder = load_backbone(
                model.backbone,
                layers=model.layers,
                width=model.width,
                heads=model.heads,
                dropout=model.dropout,
                vocab_size=vocab_size,
                sep_token_id=sep_token_id,
                patch_dim=patch_dim,
                pixel_side=pixel_side,
                image_attention_bias=model.image_attention_bias,
                pooling=model.pooling,
                seed=seed,
            )
            with seeded(seed):
                return Tower(encoder, model.embedding_dim)

        product = tower(patch_dim, pixel_side)
        encoders = {"tower": product.encoder}
        query = None
        if not model.shared_towers:
            query = tower(0, 0)
            encoders["query_tower"] = query.encoder
            same = {k: v for k, v in product.state_dict().items() if k in query.state_dict()}
            query.load_state_dict(same)
        dual = cls(product, query, gamma=gamma, gamma_learned=gamma_learned)
        loaded = {
            f"{side}.encoder.{name}"
            for side, encoder in encoders.items()
            for name, _ in encoder.named_parameters()
            if name not in encoder.new_parameters
        }
        dual.new_parameters = frozenset(dict(dual.named_parameters()).keys() - loaded)
        return dual

    @property
    def device(self) -> torch.device:
        return self.tower.projection.weight.device

    @property
    def gamma(self) -> Tensor | float:
        """γ of Eq. 4: a tensor with a gradient where it is learned."""
        return self._gamma if self.log_gamma is None else self.log_gamma.exp()

    def encode_queries(self, text: TextInputs) -> Tensor:
        """v of B queries: float32 [B, d], length 1."""
        return (self.query_tower or self.tower)(text)

    def encode_products(self, text: TextInputs, image: ImageInputs | None = None) -> Tensor:
        """v of B products: float32 [B, d], length 1."""
        return self.tower(text, image)

    def forward(
        self,
        query_text: TextInputs,
        product_text: TextInputs,
        product_image: ImageInputs | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(v_q, v_p), each [B, d]; one forward of both sides, as DDP wants it."""
        if self.log_gamma is not None and self.training:
            with torch.no_grad():  # after the optimiser's last step, before this one
                self.log_gamma.clamp_(max=math.log(MAX_LEARNED_GAMMA))
        return self.encode_queries(query_text), self.encode_products(product_text, product_image)

    def save(self, directory: Path) -> None:
        """Write config.json and model.safetensors, all that `load` needs."""
        config = {
            "model_type": "ace_bert_dual_encoder",
            "embedding_dim": self.tower.projection.out_features,
            "gamma": self._gamma,
            "gamma_learned": self.log_gamma is not None,
            "encoder": self.tower.encoder.config.to_dict(),
            "query_encoder": self.query_tower and self.query_tower.encoder.config.to_dict(),
        }
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, directory / WEIGHTS_FILE, metadata={"format": "pt"})

    @classmethod
    def load(cls, directory: Path) -> "DualEncoder":
        """What `save` wrote, on the CPU.

        Raises:
            UserError: a file is missing, is broken or does not fit the other.
        """
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (directory / name).is_file():
                raise UserError(
                    f"{directory}: no {name} there; it has to be the directory of a trained model"
                )
        try:
            config = json.loads((directory / CONFIG_FILE).read_text())
            with seeded(0):  # overwritten below
                towers = [
                    Tower(CEBertModel(CEBertConfig(**tree)), config["embedding_dim"])
                    for tree in (config["encoder"], config["query_encoder"])
                    if tree is not None
                ]
            model = cls(*towers, gamma=config["gamma"], gamma_learned=config["gamma_learned"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{directory / CONFIG_FILE}: not a dual encoder's configuration: {error!r}"
            ) from error
        try:
            model.load_state_dict(load_file(directory / WEIGHTS_FILE))
        except (SafetensorError, RuntimeError) as error:
            raise UserError(
                f"{directory / WEIGHTS_FILE}: not the weights that {CONFIG_FILE} beside it "
                f"describes: {error}"
            ) from error
        return model
