"""The dual encoder: what its sides share, what learns how fast, what survives a round trip."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertModel, BertPreTrainedModel

from acebert.config import ModelSettings
from acebert.errors import UserError
from acebert.models.dual import DualEncoder
from acebert.models.encoder import ImageInputs, TextInputs
from acebert.models.parameters import adamw_groups

D1, S, B = 8, 14, 4


def dual(backbone: Path | None = None, shared: bool = True, **kwargs: object) -> DualEncoder:
    settings = ModelSettings(
        backbone=None if backbone is None else str(backbone),
        layers=2,
        width=32,
        heads=4,
        embedding_dim=12,
        dropout=0.0,
        shared_towers=shared,
    )
    sizes = {"vocab_size": 50, "sep_token_id": 3, "patch_dim": D1, "pixel_side": S}
    return DualEncoder.new(settings, **{**sizes, **kwargs})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def backbone(saved_bert: Callable[[type[BertPreTrainedModel]], Path]) -> Path:
    return saved_bert(BertModel)


def inputs(seed: int = 0) -> tuple[TextInputs, TextInputs, ImageInputs]:
    torch.manual_seed(seed)

    def text(L: int, segment: int) -> TextInputs:
        mask = torch.arange(L)[None] < torch.randint(2, L + 1, (B, 1))
        ids = torch.randint(4, 50, (B, L)) * mask
        return TextInputs(ids, mask, torch.full((B, L), segment))

    image = ImageInputs(
        torch.tensor([True, False, True, True]),
        torch.rand(B, 16, D1).half(),
        torch.randint(0, 256, (B, S, S, 3), dtype=torch.uint8),
    )
    return text(5, 1), text(9, 0), image


def test_embeddings_are_the_normalised_projection_of_cls() -> None:
    model = dual().eval()
    query, product, image = inputs()
    v_q, v_p = model(query, product, image)
    for v, text, photo in ((v_q, query, None), (v_p, product, image)):
        raw = model.tower.projection(model.tower.encoder(text, photo)[:, 0])
        expected = raw / raw.square().sum(1, keepdim=True).sqrt()
        torch.testing.assert_close(v, expected)
    torch.testing.assert_close(model.encode_queries(query), v_q)
    torch.testing.assert_close(model.encode_products(product, image), v_p)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_rows_grouped_by_length_give_the_whole_batchs_embeddings_and_gradients(
    pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, product, image = inputs()
    model = dual().eval()
    model.tower.encoder.config.pooling = pooling

    def run() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        model.zero_grad()
        vectors = model(query, product, image)
        (vectors[0] * torch.arange(12) + vectors[1] @ torch.ones(12, 12)).sum().backward()
        return list(vectors), [p.grad for p in model.parameters() if p.grad is not None]

    whole = run()
    monkeypatch.setattr("acebert.models.dual.ROWS_OF_ONE_LENGTH", 1)
    torch.testing.assert_close(run(), whole, atol=1e-5, rtol=1e-4)


def test_embeddings_have_length_one_in_fp32_under_bf16_autocast() -> None:
    model = dual().eval()
    with torch.autocast("cpu", torch.bfloat16):
        v_q, v_p = model(*inputs())
    for v in (v_q, v_p):
        assert v.dtype == torch.float32
        torch.testing.assert_close(v.norm(dim=1), torch.ones(B))
    exact, _ = model(*inputs())
    assert (v_q * exact).sum(1).min() > 0.999


def test_shared_towers_are_one_and_own_towers_two_from_the_same_start() -> None:
    query, _, _ = inputs()
    shared, own = dual(shared=True).eval(), dual(shared=False).eval()
    for model in (shared, own):
        torch.testing.assert_close(model.encode_queries(query), model.encode_products(query))
    assert own.query_tower is not None
    with torch.no_grad():
        own.query_tower.projection.weight.neg_()
    assert not torch.allclose(own.encode_queries(query), own.encode_products(query))


@pytest.mark.parametrize("shared", [True, False])
def test_every_parameter_takes_part_in_one_forward(shared: bool) -> None:
    """What DDP needs where it does not search for unused parameters."""
    model = dual(shared=shared, gamma_learned=True)
    v_q, v_p = model(*inputs())
    (model.gamma * (v_q * v_p).sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_save_and_load_give_identical_embeddings(
    tmp_path: Path, shared: bool, learned: bool
) -> None:
    model = dual(shared=shared, gamma=13.0, gamma_learned=learned).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again = DualEncoder.load(tmp_path).eval()
    for got, expected in zip(again(*inputs()), model(*inputs()), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(torch.as_tensor(again.gamma), torch.as_tensor(model.gamma))


def test_loading_leaves_the_global_random_state(tmp_path: Path) -> None:
    dual().save(tmp_path)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    DualEncoder.load(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_directory_that_holds_no_model_is_refused_by_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json there"):
        DualEncoder.load(tmp_path)
    dual().save(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"config\.json: not a dual encoder's"):
        DualEncoder.load(tmp_path)
    (tmp_path / "config.json").write_text(config.replace('"patch_dim": 8', '"patch_dim": 9'))
    with pytest.raises(UserError, match=r"model\.safetensors: not the weights"):
        DualEncoder.load(tmp_path)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"\x00\x01")
    with pytest.raises(UserError, match=r"model\.safetensors: not the weights"):
        DualEncoder.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors there"):
        DualEncoder.load(tmp_path)


def test_config_json_says_what_the_model_is(tmp_path: Path) -> None:
    dual(gamma=17.0).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["embedding_dim"] == 12
    assert config["gamma"] == 17.0
    assert config["query_encoder"] is None
    assert config["encoder"]["patch_dim"] == D1
    assert config["encoder"]["pixel_side"] == S
    assert config["encoder"]["num_hidden_layers"] == 2


def test_parameter_groups_hold_every_parameter_once_with_its_rate_and_decay(
    backbone: Path,
) -> None:
    model = dual(backbone, gamma_learned=True)
    groups = adamw_groups(model, model.new_parameters, 1e-3, 10, 0.01)
    found = {id(p): group for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    assert len(found) == sum(len(g["params"]) for g in groups) == len(list(model.parameters()))  # type: ignore[arg-type]

    def rates(name: str) -> tuple[object, object]:
        group = found[id(model.get_parameter(name))]
        return group["lr"], group["weight_decay"]

    layer = "tower.encoder.encoder.layer.1."
    embeddings = "tower.encoder.embeddings."
    assert rates(layer + "attention.self.query.weight") == (1e-3, 0.01)
    assert rates(layer + "attention.self.query.bias") == (1e-3, 0.0)
    assert rates(layer + "output.LayerNorm.weight") == (1e-3, 0.0)
    assert rates(embeddings + "word_embeddings.weight") == (1e-3, 0.0)
    assert rates(embeddings + "patch_projection.weight") == (1e-2, 0.01)
    assert rates(embeddings + "patch_position_embeddings.weight") == (1e-2, 0.0)
    assert rates("tower.projection.weight") == (1e-2, 0.01)
    assert rates("log_gamma") == (1e-2, 0.0)
    torch.optim.AdamW(groups)


def test_gamma_is_a_constant_or_learned_in_log_space_up_to_100() -> None:
    assert dual(gamma=7.0).gamma == 7.0
    model = dual(gamma=7.0, gamma_learned=True)
    assert isinstance(model.gamma, torch.Tensor)
    assert model.gamma.item() == pytest.approx(7.0)
    assert model.log_gamma is not None
    model.log_gamma.data.fill_(math.log(300.0))  # where an optimiser's step may take it
    model(*inputs())
    assert model.gamma.item() == pytest.approx(100.0)
    model.gamma.backward()  # type: ignore[union-attr]
    assert model.log_gamma.grad == pytest.approx(100.0)  # it can come back


def test_new_weights_come_from_the_seed_alone() -> None:
    first = dual(seed=5).state_dict()
    torch.manual_seed(99)
    again, other = dual(seed=5).state_dict(), dual(seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["tower.projection.weight"], other["tower.projection.weight"])
