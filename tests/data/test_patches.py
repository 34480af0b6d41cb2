"""Oracles: timm's own forward_features pooled by hand, and properties of pictures made here."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from acebert.data.patches import PatchCNN, dead_leaves
from acebert.errors import UserError

SIDE = 128


@pytest.fixture(scope="module")
def cnn() -> PatchCNN:
    torch.set_num_threads(1)
    return PatchCNN("resnet18", "random", SIDE, batch_size=3)


def by_hand(cnn: PatchCNN, crops: np.ndarray) -> np.ndarray:
    """16 means over the feature map of timm's model, one crop at a time, float32 [B, 16, D1]."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    rows = []
    for crop in crops:
        x = torch.from_numpy(((crop / 255.0 - mean) / std).astype(np.float32)).permute(2, 0, 1)
        with torch.inference_mode(), cnn.autocast:
            fmap = cnn.model.forward_features(x[None]).float()[0].numpy()  # [D1, h, w]
        h = fmap.shape[1] // 4
        cells = [
            fmap[:, r * h : (r + 1) * h, c * h : (c + 1) * h] for r in range(4) for c in range(4)
        ]
        rows.append([cell.mean(axis=(1, 2)) for cell in cells])
    return np.array(rows)


@pytest.mark.parametrize("side", [128, 256])
def test_patch_features_are_16_means_over_timms_feature_map(side: int) -> None:
    cnn = PatchCNN("resnet18", "random", side, batch_size=2)
    crops = dead_leaves(5, side)
    features = cnn(crops)
    assert features.shape == (5, 16, 512)
    assert features.dtype == np.float16
    expected = by_hand(cnn, crops)
    error = np.abs(features - expected).mean() / np.abs(expected).mean()
    assert error < 0.02  # bf16 keeps 8 bits, and sums differently for other batch sizes


def test_a_random_cnn_trains_with_the_momenta_of_timms_model(cnn: PatchCNN) -> None:
    def momenta(model: torch.nn.Module) -> list[float | None]:
        return [m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]

    assert momenta(cnn.model) == momenta(timm.create_model("resnet18"))
    assert len(momenta(cnn.model)) == 20


def test_without_bf16_patch_features_are_exact_to_fp16(cnn: PatchCNN) -> None:
    exact = PatchCNN("resnet18", "random", SIDE)
    exact.autocast = torch.autocast("cpu", enabled=False)
    crops = dead_leaves(2, SIDE)
    np.testing.assert_allclose(exact(crops), by_hand(exact, crops), rtol=2e-3, atol=2e-3)


def test_cells_are_row_major() -> None:
    cnn = PatchCNN("resnet18", "random", 256)
    plain = np.full((256, 256, 3), 255, np.uint8)
    base = cnn(plain[None])[0].astype(float)
    for cell in range(16):
        y, x = 64 * np.array(divmod(cell, 4))
        lit = plain.copy()
        lit[y : y + 48, x : x + 48] = dead_leaves(1, 48)[
            0
        ]  # clear of the next cell's field of view
        change = np.abs(cnn(lit[None])[0] - base).sum(axis=1)
        assert change.argmax() == cell


def test_random_features_tell_photos_and_cells_apart(cnn: PatchCNN) -> None:
    features = cnn(dead_leaves(24, SIDE)).astype(float)
    assert np.isfinite(features).all()
    assert features.std(axis=0).mean() > 0.2  # photos
    assert features.std(axis=1).mean() > 0.2  # cells
    assert (features.reshape(-1, 512).std(axis=0) > 1e-3).all()  # no dead dimension


def test_random_weights_are_the_same_twice_and_leave_the_callers_seed_alone(cnn: PatchCNN) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    again = PatchCNN("resnet18", "random", SIDE, batch_size=3)
    assert torch.equal(torch.rand(1), expected)
    crops = dead_leaves(2, SIDE)
    np.testing.assert_array_equal(again(crops), cnn(crops))


def test_values_beyond_float16_are_clipped_and_counted() -> None:
    cnn = PatchCNN("resnet18", "random", SIDE)
    cnn.model.layer4[-1].bn2.bias += 1e6
    features = cnn(dead_leaves(1, SIDE))
    assert np.isfinite(features).all()
    assert features.max() == np.finfo(np.float16).max
    assert cnn.clipped == 16 * 512


def test_a_weights_file_gives_the_same_features_as_the_model_it_came_from(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = timm.create_model("resnet18", pretrained=False)  # with its classifier, as files have it
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    cnn = PatchCNN("resnet18", str(path), SIDE)
    for name, tensor in cnn.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert str(path) in cnn.weights_name


def test_weights_of_another_model_are_refused_naming_keys(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("resnet34", pretrained=False).state_dict(), path)
    with pytest.raises(UserError, match=r"weights\.safetensors.*unknown \(layer1\.2\.bn1"):
        PatchCNN("resnet18", str(path), SIDE)
    save_file({"conv1.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(UserError, match=r"missing.*wrong shape \(conv1\.weight \(64, 3, 3, 3\)"):
        PatchCNN("resnet18", str(path), SIDE)


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("resnet18", pretrained=False).state_dict()
    state["conv1.weight"][0] = torch.nan
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="NaN"):
        PatchCNN("resnet18", str(tmp_path / "weights.safetensors"), SIDE)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet19", "random", "did you mean.*resnet18"),
        ("vit_tiny_patch16_224", "random", "not a CNN"),
        ("swin_tiny_patch4_window7_224", "random", "not a CNN"),
        ("resnet18", "weights.pth", "neither hub nor random nor a .safetensors file"),
        ("resnet18", "nowhere.safetensors", "no such file"),
        ("resnet18", __file__ + ".safetensors", "no such file"),
    ],
)
def test_what_cannot_be_used_is_said(name: str, weights: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PatchCNN(name, weights, SIDE)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"not tensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        PatchCNN("resnet18", str(path), SIDE)


def test_without_a_hub_the_error_says_what_works_offline() -> None:
    # tests/conftest.py sets HF_HUB_OFFLINE
    with pytest.raises(UserError, match=r"image\.cnn_weights hub.*--image\.cnn_weights FILE"):
        PatchCNN("resnet18", "hub", SIDE)
