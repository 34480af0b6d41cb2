"""Heads and losses against transformers, numpy and formulas by hand."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM, BertPreTrainedModel

from acebert.models.encoder import CEBertModel, ImageInputs, TextInputs, load_backbone
from acebert.models.pretraining import (
    CEBertForPreTraining,
    PretrainInputs,
    adaptive_weights,
    mlm_loss,
    mpm_loss,
    start_pretraining,
    tip_loss,
)

D1, S, SEP, MASK = 24, 14, 3, 4


@pytest.fixture(scope="module")
def bert_dir(saved_bert: Callable[[type[BertPreTrainedModel]], Path]) -> Path:
    """A BERT with its MLM head."""
    return saved_bert(BertForMaskedLM)


def model_of(backbone: Path | None, images: bool = True, layers: int = 3) -> CEBertForPreTraining:
    name = None if backbone is None else str(backbone)
    encoder = load_backbone(
        name,
        layers=layers,
        dropout=0.0,
        vocab_size=50,
        sep_token_id=SEP,
        width=32,
        heads=4,
        patch_dim=D1 if images else 0,
        pixel_side=S if images else 0,
    )
    return start_pretraining(encoder, name)


def some_inputs(B: int = 5, images: bool = True, seed: int = 1) -> PretrainInputs:
    """Rows in ascending order of length, words and patches masked by hand."""
    g = torch.manual_seed(seed)
    length = torch.randint(4, 12, (B,), generator=g).sort().values
    mask = torch.arange(int(length.max())) < length[:, None]
    ids = torch.randint(5, 50, mask.shape, generator=g) * mask
    words = (torch.rand(mask.shape, generator=g) < 0.3) & mask
    words[:, 0] = False
    masked = (torch.rand((B, 16), generator=g) < 0.2) & images
    has_photo = torch.rand(B, generator=g) < 0.8
    image = ImageInputs(
        torch.ones(3, dtype=torch.bool),
        torch.rand((3, 16, D1), generator=g).half(),
        torch.randint(0, 256, (3, S, S, 3), generator=g, dtype=torch.uint8),
    )
    return PretrainInputs(
        TextInputs(ids.masked_fill(words, MASK), mask, torch.zeros_like(ids)),
        image if images else None,
        torch.randint(0, 3, (B,), generator=g),
        has_photo & images,
        masked,
        *(x.contiguous() for x in words.nonzero(as_tuple=True)),
        *(x.contiguous() for x in (masked & has_photo[:, None]).nonzero(as_tuple=True)),
    )


def test_words_of_text_alone_are_scored_as_bert_for_masked_lm_does(bert_dir: Path) -> None:
    inputs = some_inputs(images=False)
    bert = BertForMaskedLM.from_pretrained(bert_dir).eval()
    labels = torch.full_like(inputs.text.input_ids, -100)
    where = inputs.word_rows, inputs.word_columns
    labels[where] = torch.randint(5, 50, inputs.word_rows.shape)
    with torch.no_grad():
        expected = bert(
            inputs.text.input_ids,
            attention_mask=inputs.text.attention_mask.long(),
            labels=labels,
        )
        got = model_of(bert_dir, images=False).eval()(inputs)
    torch.testing.assert_close(got.words, expected.logits[where], atol=1e-4, rtol=1e-4)
    loss = mlm_loss(got.words, labels[where]).mean()
    torch.testing.assert_close(loss, expected.loss, atol=1e-4, rtol=1e-4)


def test_the_backbones_mlm_head_is_taken_and_the_log_names_what_is_new(
    bert_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "acebert"):
        model = model_of(bert_dir)
    bert = dict(BertForMaskedLM.from_pretrained(bert_dir).named_parameters())
    for name, parameter in model.cls.named_parameters(prefix="cls"):
        if name != "cls.predictions.decoder.weight":  # tied, below
            torch.testing.assert_close(parameter, bert[name], atol=0, rtol=0)
    heads = caplog.messages[-1]
    taken, rest = heads.split("New:")
    assert "cls.predictions.transform.dense (2)" in taken
    assert "patch_head" in rest
    assert "match_head" in rest
    assert {name.split(".")[0] for name in model.new_parameters} == {
        *("patch_head", "match_head", "ce_bert")
    }


def test_the_mlm_head_is_tied_to_the_word_embeddings(bert_dir: Path) -> None:
    for model in (model_of(bert_dir), model_of(None)):
        words = model.ce_bert.embeddings.word_embeddings.weight
        assert model.cls.predictions.decoder.weight is words
        assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


def stirred(model: CEBertForPreTraining) -> CEBertForPreTraining:
    torch.manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_rows_in_parts_of_one_length_are_the_rows_in_one_part_in_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = some_inputs(B=23)
    results = []
    for rows in (64, 7):
        monkeypatch.setattr("acebert.models.pretraining.ROWS_OF_ONE_LENGTH", rows)
        model = stirred(model_of(None))
        out = model(inputs)
        (out.words.square().mean() + out.patches.square().mean() + out.match.sum()).backward()
        results.append((out, {name: p.grad for name, p in model.named_parameters()}))
    (whole, grads), (parts, part_grads) = results
    for name in ("words", "patches", "features", "match"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-4, rtol=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(part_grads[name], grad, atol=1e-4, rtol=1e-3, msg=name)


@torch.no_grad()
def test_a_masked_patch_is_read_as_zeros_and_given_back_as_it_was() -> None:
    model, inputs = stirred(model_of(None)).eval(), some_inputs()
    assert inputs.image is not None
    out = model(inputs)
    patches = inputs.image.patches[inputs.photo].float()  # type: ignore[index]
    torch.testing.assert_close(out.features, patches[inputs.patch_rows, inputs.patch_columns])
    other = inputs.image.patches.clone()  # type: ignore[union-attr]
    row, column = int(inputs.patch_rows[0]), int(inputs.patch_columns[0])
    users = inputs.photo == inputs.photo[row]
    other[inputs.photo[row], column] = 9.0
    image = ImageInputs(inputs.image.has_image, other, inputs.image.pixels)
    again = model(PretrainInputs(**{**vars(inputs), "image": image}))
    assert torch.equal(again.match[row], out.match[row])
    unmasked = users & inputs.has_photo & ~inputs.masked_patches[:, column]
    if unmasked.any():
        assert not torch.equal(again.match[unmasked], out.match[unmasked])


def test_mpm_loss_is_the_kl_of_the_two_softmaxes_and_zero_for_a_perfect_head() -> None:
    rng = np.random.default_rng(3)
    features, logits = rng.random((6, D1)) * 4, rng.normal(size=(6, D1))
    for T in (1.0, 0.25):
        p = np.exp(features / T) / np.exp(features / T).sum(axis=1, keepdims=True)
        q = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        expected = (p * np.log(p / q)).sum(axis=1)
        x, y = torch.tensor(features), torch.tensor(logits)
        np.testing.assert_allclose(mpm_loss(y, x, T), expected, rtol=1e-5)
        np.testing.assert_allclose(mpm_loss(x / T + 7, x, T), 0, atol=1e-6)


def test_tip_loss_is_eq_3() -> None:
    logits, matched = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.0])
    y = 1 / (1 + np.exp(-logits.numpy()))
    expected = -np.log([y[0], 1 - y[1], 1 - y[2]])
    np.testing.assert_allclose(tip_loss(logits, matched), expected, rtol=1e-5)


def test_adaptive_weights_are_fashionberts_closed_form_and_carry_no_gradient() -> None:
    losses = torch.tensor([6.5, 0.4, 1.2], requires_grad=True)
    e = np.exp([6.5, 0.4, 1.2])
    n = (e / e.sum()) ** 2
    w = 1 / (3 - n)
    weights = adaptive_weights(losses)
    np.testing.assert_allclose(weights, w / w.sum(), rtol=1e-6)
    assert not weights.requires_grad
    np.testing.assert_allclose(adaptive_weights(torch.ones(3)), 1 / 3, rtol=1e-6)


def test_what_pre_training_saved_is_a_backbone_with_its_image_side(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = stirred(model_of(None)).eval()
    model.save_pretrained(tmp_path)
    inputs = some_inputs()
    with caplog.at_level(logging.INFO, "acebert"):
        again = model_of(tmp_path).eval()
    assert again.new_parameters == frozenset()
    assert "New: nothing" in caplog.messages[-1]
    with torch.no_grad():
        for a, b in zip(vars(again(inputs)).values(), vars(model(inputs)).values(), strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)
    encoder = load_backbone(
        str(tmp_path), layers=2, dropout=0.0, vocab_size=50, sep_token_id=SEP, patch_dim=D1
    )
    assert isinstance(encoder, CEBertModel)
    assert encoder.new_parameters == frozenset()
    torch.testing.assert_close(
        encoder.embeddings.patch_projection.weight,
        model.ce_bert.embeddings.patch_projection.weight,
        atol=0,
        rtol=0,
    )
