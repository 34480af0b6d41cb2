"""CE-BERT with the heads and losses of its pre-training (paper section 2.2, Eq. 1-3).

* MLM: BERT's head, its output tied to the word embeddings. Only masked words go through it.
* MPM: BERT's transform and a linear layer to D1. A masked patch's features are zeros before the
  FC; the head's softmax is to be the softmax of the raw features (Eq. 2).
* TIP: a two-layer head on the pooled state: does the photo belong to the title?

Letters: B rows, L text length, N patches, D width, M masked words, K masked patches.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertForMaskedLM
from transformers.models.bert.modeling_bert import (
    BertOnlyMLMHead,
    BertPredictionHeadTransform,
    BertPreTrainedModel,
)

from acebert.models.encoder import (
    NUM_PATCHES,
    ROWS_OF_ONE_LENGTH,
    CEBertConfig,
    CEBertModel,
    ImageInputs,
    TextInputs,
    backbone_config,
    grouped_names,
    read_backbone,
    seeded,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainInputs:
    """Rows of a batch, ascending by text length, with what is to be predicted.

    Attributes:
        text: masked tokens [B, L]
        image: the distinct photos of the batch, or None for a text-only model
        photo: which of them a row takes, int64 [B]; any where `has_photo` is False
        has_photo: bool [B]
        masked_patches: bool [B, N]
        word_rows, word_columns: where the predicted words stand, int64 [M], ascending by row
        patch_rows, patch_columns: which patches are predicted, int64 [K], ascending by row
    """

    text: TextInputs
    image: ImageInputs | None
    photo: Tensor
    has_photo: Tensor
    masked_patches: Tensor
    word_rows: Tensor
    word_columns: Tensor
    patch_rows: Tensor
    patch_columns: Tensor

    def to(self, device: torch.device | str) -> "PretrainInputs":
        def move(x: Any) -> Any:
            return None if x is None else x.to(device, non_blocking=True)

        return PretrainInputs(*(move(x) for x in vars(self).values()))

    def part(self, start: int, stop: int) -> "PretrainInputs":
        """Rows start … stop − 1; the photos stay those of the whole batch."""
        rows = torch.arange(start, stop)
        words = slice(*torch.searchsorted(self.word_rows, torch.tensor([start, stop])).tolist())
        patches = slice(*torch.searchsorted(self.patch_rows, torch.tensor([start, stop])).tolist())
        return PretrainInputs(
            self.text.rows(rows),
            self.image,
            self.photo[start:stop],
            self.has_photo[start:stop],
            self.masked_patches[start:stop],
            self.word_rows[words] - start,
            self.word_columns[words],
            self.patch_rows[patches] - start,
            self.patch_columns[patches],
        )


@dataclass(frozen=True)
class PretrainOutputs:
    """Attributes:
    words: logits of the masked words [M, vocabulary]
    patches: logits of the masked patches [K, D1], or None for a model without patches
    features: the raw features of these patches, float32 [K, D1], or None
    match: logit of 'title and photo belong together' [B], or None for a text-only model
    """

    words: Tensor
    patches: Tensor | None
    features: Tensor | None
    match: Tensor | None


class CEBertForPreTraining(BertPreTrainedModel):
    """CE-BERT and its three heads; `save_pretrained` and `from_pretrained` as in transformers.

    A directory that it saved is a backbone too: `load_backbone` takes the encoder from it.

    Attributes:
        new_parameters: names of the parameters that did not come from a backbone
    """

    config_class = CEBertConfig
    config: CEBertConfig
    base_model_prefix = "ce_bert"
    _tied_weights_keys = {  # noqa: RUF012 - transformers' own form
        "cls.predictions.decoder.weight": "ce_bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    def __init__(self, config: CEBertConfig) -> None:
        super().__init__(config)
        D = config.hidden_size
        self.ce_bert = CEBertModel(config)
        self.cls = BertOnlyMLMHead(config)
        if config.patch_dim:
            self.patch_head = nn.Sequential(
                BertPredictionHeadTransform(config), nn.Linear(D, config.patch_dim)
            )
        if config.reads_images:
            self.match_head = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1))
        self.new_parameters: frozenset[str] = frozenset()
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.cls.predictions.decoder = new_embeddings

    def match(self, text: TextInputs, image: ImageInputs) -> Tensor:
        """TIP's logit of B titles and photos of which nothing is masked, [B]."""
        return self.match_head(self.ce_bert.pooled(text, image)).squeeze(-1)

    def forward(self, inputs: PretrainInputs) -> PretrainOutputs:
        """Logits of whatever is to be predicted, in the order of `inputs`."""
        B = len(inputs.text.input_ids)
        if inputs.text.input_ids.device.type != "cpu" or B <= ROWS_OF_ONE_LENGTH:
            return self._forward(inputs)
        # A core does padding at the price of words: rows of about one length go together.
        if torch.is_grad_enabled():
            inputs = replace(inputs, text=self.ce_bert.embeddings.look_up(inputs.text))
        parts = [
            self._forward(inputs.part(start, min(start + ROWS_OF_ONE_LENGTH, B)))
            for start in range(0, B, ROWS_OF_ONE_LENGTH)
        ]

        def join(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors)

        words = torch.cat([part.words for part in parts])
        return PretrainOutputs(words, join("patches"), join("features"), join("match"))

    def _forward(self, inputs: PretrainInputs) -> PretrainOutputs:
        config, L = self.config, inputs.text.input_ids.shape[1]
        image, features = None, None
        if inputs.image is not None:
            photos = inputs.image.rows(inputs.photo)
            patches = photos.patches
            if patches is not None:
                features = patches[inputs.patch_rows, inputs.patch_columns].float()
                patches = patches.masked_fill(inputs.masked_patches[:, :, None], 0)
            image = ImageInputs(inputs.has_photo, patches, photos.pixels)
        n = L + NUM_PATCHES if image is not None and config.patch_dim else L
        states = self.ce_bert.first_states(inputs.text, image, n)
        words = self.cls(states[inputs.word_rows, inputs.word_columns])
        if image is None:
            return PretrainOutputs(words, None, None, None)
        match = self.match_head(self.ce_bert.pool(states, inputs.text)).squeeze(-1)
        if features is None:
            return PretrainOutputs(words, None, None, match)
        masked = states[inputs.patch_rows, L + inputs.patch_columns]
        return PretrainOutputs(words, self.patch_head(masked), features, match)


def start_pretraining(
    encoder: CEBertModel, backbone: str | None, seed: int = 0
) -> CEBertForPreTraining:
    """Put the heads on an encoder that `load_backbone` made from the same `backbone`.

    A head that the backbone has is taken: BERT's MLM head, all three of a CE-BERT that
    pre-training wrote. What was taken, is new and was left out is logged by name.

    Raises:
        UserError: as `read_backbone`.
    """
    with seeded(seed):
        model = CEBertForPreTraining(encoder.config)
        weights = {} if backbone is None else _backbone_heads(backbone)
    model.ce_bert = encoder
    model.tie_weights()
    heads = {n: p for n, p in model.named_parameters() if not n.startswith("ce_bert.")}
    taken = {n for n, p in heads.items() if n in weights and weights[n].shape == p.shape}
    with torch.no_grad():
        for name in taken:
            heads[name].copy_(weights[name])
    new = heads.keys() - taken
    model.new_parameters = frozenset(new | {f"ce_bert.{name}" for name in encoder.new_parameters})
    log.info(
        "heads: from the backbone: %s. New: %s. Left out: %s",
        grouped_names(taken),
        grouped_names(set(new)),
        grouped_names(weights.keys() - taken),
    )
    return model


def _backbone_heads(backbone: str) -> dict[str, Tensor]:
    config = backbone_config(backbone)
    own = isinstance(config, CEBertConfig)
    config.num_hidden_layers = 1  # only the heads are looked at
    start, report = read_backbone(
        CEBertForPreTraining if own else BertForMaskedLM, backbone, config
    )
    body = "ce_bert." if own else "bert."
    return {
        name: parameter
        for name, parameter in start.named_parameters()
        if not name.startswith(body) and name not in report["missing_keys"]
    }


def mlm_loss(logits: Tensor, words: Tensor) -> Tensor:
    """Eq. 1 for each masked word: logits [M, vocabulary], words int64 [M] → float32 [M]."""
    return F.cross_entropy(logits.float(), words, reduction="none")


def mpm_loss(logits: Tensor, features: Tensor, temperature: float) -> Tensor:
    """Eq. 2 for each masked patch: KL(softmax(features / T) ‖ softmax(logits)), ≥ 0 [nats].

    Args:
        logits: of the head [K, D1]
        features: raw patch features [K, D1]
        temperature: T
    """
    p = F.log_softmax(features.float() / temperature, dim=-1)
    q = F.log_softmax(logits.float(), dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


def tip_loss(logits: Tensor, matched: Tensor) -> Tensor:
    """Eq. 3 for each pair of a title and a photo: logits [T], matched 1 or 0 [T] → [T]."""
    return F.binary_cross_entropy_with_logits(logits.float(), matched.float(), reduction="none")


def adaptive_weights(losses: Tensor) -> Tensor:
    """FashionBERT's weights of its three losses [3] (Gao et al. 2020), without a gradient.

    w_i = (3 − n_i)^-1 / Σ_k (3 − n_k)^-1 with n = softmax(L)²: the larger a loss, the more it
    weighs.
    """
    n = losses.detach().softmax(dim=0) ** 2
    inverse = 1 / (3 - n)
    return inverse / inverse.sum()
