"""Features held on a device against the store they come from."""

import numpy as np
import pytest
import torch

from acebert.config import Settings
from acebert.data.features import FeatureStore
from acebert.errors import UserError
from acebert.training import device_features
from acebert.training.device_features import DeviceFeatures
from acebert.training.pairs import PairBatches, StagePaths

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)])
def test_images_on_the_device_equal_those_of_the_store(
    paths: StagePaths, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(device_features, "ROWS", 50)  # several copies, the last one short
    assert paths.features is not None
    store = FeatureStore(paths.features)
    held = DeviceFeatures(store, torch.device(device), patches=True, pixels=True)
    rows = np.random.default_rng(0).integers(0, store.n_products, 200)
    images = held.images(rows)
    assert images.patches is not None
    assert images.patches.device.type == device
    images = images.to(torch.device("cpu"))
    np.testing.assert_array_equal(images.has_image, store.has_image(rows))
    np.testing.assert_array_equal(images.patches, store.patches(rows))
    np.testing.assert_array_equal(images.pixels, store.pixels(rows))


def test_a_model_without_patches_holds_none(paths: StagePaths) -> None:
    assert paths.features is not None
    store = FeatureStore(paths.features)
    images = DeviceFeatures(store, torch.device("cpu"), False, True).images(np.arange(3))
    assert images.patches is None
    assert images.pixels is not None


@pytest.mark.parametrize("cache", ["node_disk", "node_memory", "device"])
def test_batches_are_the_same_wherever_features_lie(
    settings: Settings,
    paths: StagePaths,
    tmp_path_factory: pytest.TempPathFactory,
    cache: str,
) -> None:
    node = tmp_path_factory.mktemp("node")
    image = settings.image.model_copy(update={"feature_cache": cache, "feature_cache_dir": node})
    cached = settings.model_copy(update={"image": image})
    device = torch.device("cpu")
    one = PairBatches(settings, paths, 0, 1, device).batch(3)
    other = PairBatches(cached, paths, 0, 1, device).batch(3)
    assert one.product.image is not None
    assert other.product.image is not None
    assert torch.equal(one.product.image.patches, other.product.image.patches)  # type: ignore[arg-type]
    assert torch.equal(one.product.image.pixels, other.product.image.pixels)  # type: ignore[arg-type]
    assert torch.equal(one.product.image.has_image, other.product.image.has_image)
    assert torch.equal(one.product.pair_row, other.product.pair_row)


def test_more_than_the_card_has_is_refused_with_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20_000_000_000, 24_000_000_000))
    device_features._check_room(15_000_000_000, torch.device("cuda", 0))
    with pytest.raises(UserError, match=r"17\.0 GB of features .* 20\.0 GB free"):
        device_features._check_room(17_000_000_000, torch.device("cuda", 0))


def test_on_a_cpu_the_hosts_memory_is_the_room(
    paths: StagePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert paths.features is not None
    monkeypatch.setattr(device_features, "free_memory", lambda: 100_000)
    with pytest.raises(UserError, match=r"leave no room on cpu, which has 0\.0 GB free"):
        DeviceFeatures(FeatureStore(paths.features), torch.device("cpu"), True, True)
