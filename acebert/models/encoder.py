"""CE-BERT (paper section 2): a BERT encoder whose embedding layer takes three kinds of token.

    [CLS] title [SEP] (hot query [SEP] …)   16 patches [SEP]   49 pixel patches [SEP]

Each token is content + segment + position embedding, then LayerNorm and dropout, as in BERT.
Decisions:
* Parameters of the text path have BERT's names, so that BERT's weights load as they are, and on
  text alone the model is BERT.
* Image positions have tables of their own (17 and 50 rows, [SEP] included): how far the text is
  padded changes nothing.
* A row without an image keeps its image tokens but nobody attends to them: the shapes of a batch
  and the parameters that take part in a step do not depend on which products have a photo.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig, BertModel
from transformers import initialization as init
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertEncoder,
    BertLayer,
    BertPreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from acebert.errors import UserError
from acebert.models.dropout import dropout as drop
from acebert.models.dropout import use_dropout

log = logging.getLogger(__name__)

TITLE, HOT_QUERY, PATCH, PIXEL = range(4)  # segments
NUM_PATCHES = 16  # N of section 2.1: the RoI's 4×4 cells
PIXEL_GRID = 7  # section 4.4.1: 224 px in patches of 32 px
NUM_PIXEL_PATCHES = PIXEL_GRID**2
ROWS_OF_ONE_LENGTH = 64  # rows that a CPU encodes at a time
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TextInputs:
    """Padded tokens.

    Attributes:
        input_ids: int64 [B, L]
        attention_mask: bool [B, L], False on padding; a row's first token is never padding
        segment_ids: int64 [B, L], TITLE or HOT_QUERY
        words: rows of the word table [n + 1, D] that `input_ids` counts in, [SEP]'s last (see
            `CEBertEmbeddings.look_up`), or None: it counts in the table itself
    """

    input_ids: Tensor
    attention_mask: Tensor
    segment_ids: Tensor
    words: Tensor | None = None

    def rows(self, rows: Tensor) -> "TextInputs":
        """Rows [b] of the batch, without the columns that are padding in all of them."""
        mask = self.attention_mask[rows]
        columns = mask.any(dim=0)
        return replace(
            self,
            input_ids=self.input_ids[rows][:, columns],
            attention_mask=mask[:, columns],
            segment_ids=self.segment_ids[rows][:, columns],
        )

    def span(self, start: int, stop: int, L: int) -> "TextInputs":
        """Rows start … stop − 1 and their first L tokens; views, no copies."""
        return replace(
            self,
            input_ids=self.input_ids[start:stop, :L],
            attention_mask=self.attention_mask[start:stop, :L],
            segment_ids=self.segment_ids[start:stop, :L],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TextInputs":
        return TextInputs(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.attention_mask.to(device, non_blocking=non_blocking),
            self.segment_ids.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class ImageInputs:
    """Features of the products' photos.

    Attributes:
        has_image: bool [B]; where it is False the other two may be any finite numbers
        patches: floating [B, 16, D1], or None for a model without patches
        pixels: uint8 [B, S, S, 3], RGB, or None for a model without pixels
    """

    has_image: Tensor
    patches: Tensor | None = None
    pixels: Tensor | None = None

    def rows(self, rows: Tensor) -> "ImageInputs":
        """Rows [b] of the batch."""

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        return ImageInputs(self.has_image[rows], pick(self.patches), pick(self.pixels))

    def span(self, start: int, stop: int) -> "ImageInputs":
        """Rows start … stop − 1; views, no copies."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[start:stop]

        return ImageInputs(self.has_image[start:stop], cut(self.patches), cut(self.pixels))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ImageInputs":
        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=non_blocking)

        return ImageInputs(
            self.has_image.to(device, non_blocking=non_blocking),
            move(self.patches),
            move(self.pixels),
        )


class CEBertConfig(BertConfig):
    """BERT's configuration and the image side's.

    Attributes:
        patch_dim: D1, width of a patch feature; 0: the model reads no patches
        pixel_side: S, side of the pixel input [px], a multiple of 7; 0: it reads no pixels
        image_attention_bias: added to every attention score whose key is an image token
        pooling: what `pooled` makes of the last layer
        sep_token_id: the [SEP] that closes patches and pixels
    """

    model_type = "ce_bert"

    type_vocab_size: int = 4
    patch_dim: int = 0
    pixel_side: int = 0
    image_attention_bias: float = 0.0
    pooling: Literal["cls", "mean"] = "cls"
    sep_token_id: int = 102

    @property
    def pixel_dim(self) -> int:
        """Values of one pixel patch: (S/7)²·3, 3072 in the paper."""
        return (self.pixel_side // PIXEL_GRID) ** 2 * 3

    @property
    def reads_images(self) -> bool:
        return self.patch_dim > 0 or self.pixel_side > 0

    @property
    def image_tokens(self) -> int:
        """Image tokens of a row, each part's [SEP] included: 17, 50, or both."""
        patches = (NUM_PATCHES + 1) * (self.patch_dim > 0)
        return patches + (NUM_PIXEL_PATCHES + 1) * (self.pixel_side > 0)


AutoConfig.register(CEBertConfig.model_type, CEBertConfig)


class CEBertEmbeddings(BertEmbeddings):
    """Tokens of the three kinds → [B, L, D], LayerNorm and dropout shared (Fig. 2)."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: CEBertConfig) -> None:
        super().__init__(config)
        self.sep_token_id = config.sep_token_id
        D = config.hidden_size
        if config.patch_dim:
            self.patch_projection = nn.Linear(config.patch_dim, D)
            self.patch_position_embeddings = nn.Embedding(NUM_PATCHES + 1, D)
        if config.pixel_side:
            self.pixel_projection = nn.Linear(config.pixel_dim, D)
            self.pixel_position_embeddings = nn.Embedding(NUM_PIXEL_PATCHES + 1, D)
            self.register_buffer("pixel_mean", torch.tensor(IMAGENET_MEAN), persistent=False)
            self.register_buffer("pixel_std", torch.tensor(IMAGENET_STD), persistent=False)

    def look_up(self, text: TextInputs) -> TextInputs:
        """The same tokens, the rows of the word table that they need taken from it once.

        Every use of the table has a gradient as large as the table (94 MB of BERT-base's, nearly
        all of it zeros); a batch that is encoded in pieces uses it in each of them.
        """
        ids, place = text.input_ids.unique(return_inverse=True)
        sep = ids.new_tensor([self.sep_token_id])
        return replace(text, input_ids=place, words=self.word_embeddings(torch.cat([ids, sep])))

    def text(self, text: TextInputs) -> Tensor:
        """[B, L, D]"""
        if text.words is None:
            return self(input_ids=text.input_ids, token_type_ids=text.segment_ids)
        content = F.embedding(text.input_ids, text.words)
        return self(inputs_embeds=content, token_type_ids=text.segment_ids)

    def sep(self, text: TextInputs) -> Tensor:
        """Content of the [SEP] that closes image tokens, [D]."""
        words = text.words
        return self.word_embeddings.weight[self.sep_token_id] if words is None else words[-1]

    def patches(self, patches: Tensor, sep: Tensor) -> Tensor:
        """[B, 16, D1] → [B, 17, D]"""
        content = self.patch_projection(patches.to(self.patch_projection.weight.dtype))
        return self._image_tokens(content, sep, PATCH, self.patch_position_embeddings)

    def pixels(self, pixels: Tensor, sep: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] → [B, 50, D]"""
        x = (pixels / 255).sub_(self.pixel_mean).div_(self.pixel_std)
        content = self.pixel_projection(cut_pixels(x))
        return self._image_tokens(content, sep, PIXEL, self.pixel_position_embeddings)

    def _image_tokens(
        self, content: Tensor, sep: Tensor, segment: int, positions: nn.Embedding
    ) -> Tensor:
        """Content [B, n, D] and a [SEP] → tokens [B, n+1, D]."""
        x = torch.cat([content.to(sep.dtype), sep.expand(len(content), 1, -1)], dim=1)
        x = x + self.token_type_embeddings.weight[segment] + positions.weight
        return self.dropout(self.LayerNorm(x))


def cut_pixels(images: Tensor) -> Tensor:
    """[B, S, S, 3] → [B, 49, (S/7)²·3]: 7×7 patches in row-major order, each flattened row by row,
    channels last."""
    B, S = images.shape[:2]
    s = S // PIXEL_GRID
    cut = images.reshape(B, PIXEL_GRID, s, PIXEL_GRID, s, 3).transpose(2, 3)
    return cut.reshape(B, NUM_PIXEL_PATCHES, s * s * 3)


class CEBertModel(BertPreTrainedModel):
    """CE-BERT without heads; `save_pretrained` and `from_pretrained` as for any transformers model.

    Attributes:
        new_parameters: names of the parameters that did not come from a backbone
    """

    config_class = CEBertConfig
    config: CEBertConfig
    base_model_prefix = "ce_bert"
    # Attention is this module's own (`_attend`), whose masks other implementations do not take.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    def __init__(self, config: CEBertConfig) -> None:
        super().__init__(config)
        if config._attn_implementation != "sdpa":
            raise ValueError(
                f"CE-BERT attends by 'sdpa', attn_implementation is {config._attn_implementation!r}"
            )
        self.embeddings = CEBertEmbeddings(config)
        self.encoder = BertEncoder(config)
        use_dropout(self)
        self.new_parameters: frozenset[str] = frozenset()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not isinstance(module, CEBertEmbeddings):
            return
        # By fan-in: content of unit variance comes out as large as segment and position
        # embeddings. At BERT's 0.02 a token would be 2048 or 3072 terms of content, and the
        # LayerNorm would leave a few percent for what and where it is.
        if self.config.patch_dim:
            std = self.config.initializer_range / self.config.patch_dim**0.5
            init.normal_(module.patch_projection.weight, std=std)
        if self.config.pixel_side:
            std = self.config.initializer_range / self.config.pixel_dim**0.5
            init.normal_(module.pixel_projection.weight, std=std)
            init.copy_(module.pixel_mean, torch.tensor(IMAGENET_MEAN))
            init.copy_(module.pixel_std, torch.tensor(IMAGENET_STD))

    def forward(self, text: TextInputs, image: ImageInputs | None = None) -> Tensor:
        """Last hidden states [B, L_total, D]: text, 17 patch tokens, 50 pixel tokens.

        Without `image` the sequence is the text alone, and the model is BERT.

        Raises:
            UserError: text longer than the position table.
            ValueError: `image` lacks features that this model reads, or has the wrong shape.
        """
        hidden, mask = self._embed(text, image)
        for layer in self.encoder.layer:
            hidden = _first_outputs(layer, hidden, mask, hidden.shape[1])
        return hidden

    def pooled(self, text: TextInputs, image: ImageInputs | None = None) -> Tensor:
        """One state a row, [B, D]: [CLS]'s, or the mean over the text's tokens (config.pooling).

        The last layer is worked out for those tokens alone. Raises as `forward`.
        """
        n = 1 if self.config.pooling == "cls" else text.input_ids.shape[1]
        return self.pool(self.first_states(text, image, n), text)

    def pool(self, states: Tensor, text: TextInputs) -> Tensor:
        """Last states of the text's tokens, [B, ≥ L, D] (for 'cls', of the first) → [B, D]."""
        if self.config.pooling == "cls":
            return states[:, 0]
        weights = text.attention_mask.to(states.dtype)
        weights = weights / weights.sum(dim=1, keepdim=True)
        return torch.einsum("bl,bld->bd", weights, states[:, : weights.shape[1]])

    def first_states(self, text: TextInputs, image: ImageInputs | None, n: int) -> Tensor:
        """The first n of `forward`'s last hidden states, [B, n, D].

        The last layer is worked out for them alone: no other token's query, output and
        feed-forward are needed. Raises as `forward`.
        """
        hidden, mask = self._embed(text, image)
        *layers, last = self.encoder.layer
        for layer in layers:
            hidden = _first_outputs(layer, hidden, mask, hidden.shape[1])
        return _first_outputs(last, hidden, mask, n)

    def _embed(self, text: TextInputs, image: ImageInputs | None) -> tuple[Tensor, Tensor]:
        """Tokens [B, L_total, D] and the mask of `_attend` [B, 1, 1, L_total]."""
        config, (B, L) = self.config, text.input_ids.shape
        if config.max_position_embeddings < L:
            raise UserError(
                f"text of {L} tokens; the encoder has {config.max_position_embeddings} positions: "
                "lower text.title_tokens, text.query_tokens or data.hot_queries"
            )
        hidden, keys = self.embeddings.text(text), text.attention_mask.bool()
        if image is not None and config.reads_images:
            parts, sep = [hidden], self.embeddings.sep(text)
            if config.patch_dim:
                patches = _checked("patches", image.patches, (B, NUM_PATCHES, config.patch_dim))
                parts.append(self.embeddings.patches(patches, sep))
            if config.pixel_side:
                S = config.pixel_side
                pixels = _checked("pixels", image.pixels, (B, S, S, 3))
                parts.append(self.embeddings.pixels(pixels, sep))
            hidden = torch.cat(parts, dim=1)
            image_keys = image.has_image.bool()[:, None].expand(B, hidden.shape[1] - L)
            keys = torch.cat([keys, image_keys], dim=1)
        mask = keys[:, None, None, :]
        if hidden.shape[1] > L and config.image_attention_bias:
            bias = hidden.new_zeros(hidden.shape[1])
            bias[L:] = config.image_attention_bias
            mask = torch.where(mask, bias, -torch.inf)
        return hidden, mask


def _checked(name: str, x: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if x is None or tuple(x.shape) != shape:
        got = "none" if x is None else tuple(x.shape)
        raise ValueError(f"the model reads {name} of shape {shape}, the batch has {got}")
    return x


def _first_outputs(layer: BertLayer, hidden: Tensor, mask: Tensor, n: int) -> Tensor:
    """What a BERT layer makes of the first n tokens: hidden [B, L, D], mask as `_attend`'s →
    [B, n, D]."""
    attention = layer.attention.self
    first = hidden[:, :n]

    def heads(x: Tensor) -> Tensor:  # [B, l, D] → [B, heads, l, D/heads]
        return x.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    context = _attend(
        heads(attention.query(first)),
        heads(attention.key(hidden)),
        heads(attention.value(hidden)),
        mask,
        attention.dropout.p if layer.training else 0.0,
        plain=layer.training and hidden.device.type == "cpu",
    )
    attended = layer.attention.output(context.transpose(1, 2).flatten(2), first)
    return layer.feed_forward_chunk(attended)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, plain: bool
) -> Tensor:
    """Scaled dot-product attention: query [B, heads, n, d], key and value [B, heads, L, d] →
    [B, heads, n, d].

    Args:
        mask: [B, 1, 1, L], False where a key counts for nothing, or a float that is added to the
            scores; each row has a key that counts
        plain: by matrix products and a softmax. On a CPU that trains, PyTorch's kernels take
            longer (benchmarks/attention.py)
    """
    if not plain:
        mask = mask.expand(-1, -1, query.shape[2], -1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores += mask
    return drop(scores.softmax(-1), dropout) @ value


def load_backbone(
    name_or_dir: str | None,
    *,
    layers: int,
    dropout: float,
    vocab_size: int,
    sep_token_id: int,
    width: int = 768,
    heads: int = 12,
    patch_dim: int = 0,
    pixel_side: int = 0,
    image_attention_bias: float = 0.0,
    pooling: Literal["cls", "mean"] = "cls",
    seed: int = 0,
) -> CEBertModel:
    """CE-BERT from a Hugging Face BERT, or with random weights.

    From a BERT: its word, position and title-segment embeddings and its first `layers` layers; the
    hot-query segment starts as the title's; the image side is new. What was taken, what is new and
    what was left out is logged.

    Args:
        name_or_dir: hub name or local directory of a BERT (or of a CE-BERT that `save_pretrained`
            wrote, which brings its image side along); None: random weights
        layers: transformer layers
        dropout: of hidden states and of attention
        vocab_size: of the tokenizer in use, at most the backbone's
        sep_token_id: [SEP] of that tokenizer
        width, heads: of a random encoder; a backbone brings its own
        patch_dim, pixel_side, image_attention_bias, pooling: as in CEBertConfig
        seed: of whatever is new; the global random state is left as it was

    Raises:
        UserError: there is no such backbone, it is no BERT, it has fewer layers than asked for, or
            a smaller vocabulary than the tokenizer.
    """
    own: dict[str, Any] = {
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "type_vocab_size": 4,
        "patch_dim": patch_dim,
        "pixel_side": pixel_side,
        "image_attention_bias": image_attention_bias,
        "pooling": pooling,
        "sep_token_id": sep_token_id,
        "num_hidden_layers": layers,
    }
    if name_or_dir is None:
        config = CEBertConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            # BERT's 0.02 leaves a narrow encoder with a [CLS] that hardly depends on the words,
            # and all cosines at 1 (docs/decisions.md, 'Start of a random encoder').
            initializer_range=width**-0.5,
            **own,
        )
        with seeded(seed):
            model = CEBertModel(config)
        model.new_parameters = frozenset(name for name, _ in model.named_parameters())
        log.info("encoder: %d layers of width %d, random weights (seed %d)", layers, width, seed)
        return model

    start = backbone_config(name_or_dir)
    if layers > start.num_hidden_layers:
        raise UserError(
            f"--model.layers {layers}: {name_or_dir} has {start.num_hidden_layers} layers"
        )
    if vocab_size > start.vocab_size:
        raise UserError(
            f"--model.backbone {name_or_dir}: its table has {start.vocab_size} words, the "
            f"tokenizer {vocab_size}; they do not belong together"
        )
    inherited: dict[str, Any] = {
        key: getattr(start, key)
        for key in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "hidden_act",
            "max_position_embeddings",
            "initializer_range",
            "layer_norm_eps",
            "pad_token_id",
        )
    }
    with seeded(seed):
        model = CEBertModel(CEBertConfig(**inherited, **own))
        weights, left_out = _backbone_weights(name_or_dir, start, layers)
    _take(model, weights, left_out, name_or_dir)
    return model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of the CPU from `seed` inside, the global state untouched outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def backbone_config(name_or_dir: str) -> BertConfig:
    """The configuration of a BERT or CE-BERT; a UserError where it is neither."""
    try:
        config = AutoConfig.from_pretrained(_source(name_or_dir))
    except (OSError, ValueError) as error:
        raise _missing(name_or_dir, error) from error
    if not isinstance(config, BertConfig) or config.model_type not in ("bert", "ce_bert"):
        raise UserError(
            f"--model.backbone {name_or_dir}: a {config.model_type} model; it has to be a BERT "
            "(model_type 'bert' in its config.json)"
        )
    return config


def _backbone_weights(
    name_or_dir: str, config: BertConfig, layers: int
) -> tuple[dict[str, Tensor], set[str]]:
    """The backbone's tensors by CE-BERT's names, and the names of those left out."""
    config.num_hidden_layers = layers
    if isinstance(config, CEBertConfig):
        start, report = read_backbone(CEBertModel, name_or_dir, config)
    else:
        start, report = read_backbone(BertModel, name_or_dir, config, add_pooling_layer=False)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"--model.backbone {name_or_dir}: its weights lack {', '.join(missing)}")
    return dict(start.named_parameters()), set(report["unexpected_keys"])


def read_backbone(
    model_class: Any, name_or_dir: str, config: BertConfig, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """A backbone as a transformers model of this class, float32, and transformers' own report of
    `missing_keys` and `unexpected_keys`, of which nothing is printed.

    Raises:
        UserError: its weights cannot be had, or are no safetensors.
    """
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # what is left out is told by us
    transformers_logging.disable_progress_bar()
    try:
        return model_class.from_pretrained(
            _source(name_or_dir),
            config=config,
            dtype=torch.float32,
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            **kwargs,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _missing(name_or_dir, error) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _take(
    model: CEBertModel, weights: dict[str, Tensor], left_out: set[str], name_or_dir: str
) -> None:
    """Copies `weights` into the parameters of the same name and shape; the rest stays new."""
    new = set()
    segments = "embeddings.token_type_embeddings.weight"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = weights.get(name)
            if name == segments and start is not None and len(start) < len(parameter):
                parameter[TITLE] = start[0]
                parameter[HOT_QUERY] = start[0]
            elif start is None or start.shape != parameter.shape:
                new.add(name)
                continue
            else:
                parameter.copy_(start)
            del weights[name]
    model.new_parameters = frozenset(new)
    taken = {name for name, _ in model.named_parameters()} - new
    log.info(
        "encoder: %d layers of width %d. From %s: %s. New: %s. Left out: %s",
        model.config.num_hidden_layers,
        model.config.hidden_size,
        name_or_dir,
        grouped_names(taken),
        grouped_names(new),
        grouped_names(left_out | set(weights)),
    )


def grouped_names(names: set[str]) -> str:
    """'embeddings.LayerNorm (2), encoder.layer.0 (16)': parameters counted by their module."""
    groups: Counter[str] = Counter()
    for name in sorted(names):
        parts = name.split(".")
        depth = parts.index("layer") + 2 if "layer" in parts else len(parts) - 1
        groups[".".join(parts[: max(depth, 1)])] += 1
    return ", ".join(f"{group} ({count})" for group, count in groups.items()) or "nothing"


def _source(name_or_dir: str) -> str:
    directory = Path(name_or_dir).expanduser()
    return str(directory) if directory.is_dir() else name_or_dir


def _missing(name_or_dir: str, error: Exception) -> UserError:
    return UserError(
        f"--model.backbone {name_or_dir}: no BERT could be loaded from there. It has to be a local "
        "directory with config.json and model.safetensors, or a model's name on the Hugging Face "
        f"hub (which is not asked where HF_HUB_OFFLINE=1): {str(error).splitlines()[0]}"
    )
