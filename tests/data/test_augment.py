"""Oracles: slices of the photo, and torchvision's functional transforms."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from acebert.data.augment import ASPECT, COLOUR, SMALLEST, Views, random_views

WHOLE = (0.0, 0.0, 1.0, 1.0)
PLAIN = (1.0, 1.0, 1.0)


def photos(count: int = 2, side: int = 32) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def seen(given: torch.Tensor, box: tuple, colours: tuple, side: int) -> np.ndarray:
    B = len(given)
    views = Views(np.tile(np.float32(box), (B, 1)), np.tile(np.float32(colours), (B, 1)))
    return random_views(given, views, side).permute(0, 2, 3, 1).numpy()


def test_the_whole_photo_at_its_own_side_is_itself():
    given = photos()
    np.testing.assert_allclose(seen(given, WHOLE, PLAIN, 32), given.numpy(), atol=1e-2)


def test_a_box_on_the_pixel_grid_is_a_slice_and_a_flipped_box_its_mirror():
    given = photos()
    box = (8 / 32, 4 / 32, 24 / 32, 20 / 32)
    slices = given.numpy()[:, 4:20, 8:24]
    np.testing.assert_allclose(seen(given, box, PLAIN, 16), slices, atol=1e-2)
    mirrored = (box[2], box[1], box[0], box[3])
    np.testing.assert_allclose(seen(given, mirrored, PLAIN, 16), slices[:, :, ::-1], atol=1e-2)


@pytest.mark.parametrize("colours", [(0.85, 1, 1), (1, 1.15, 1), (1, 1, 0.85), (1.15, 0.9, 1.1)])
def test_colours_change_as_torchvision_changes_them(colours: tuple):
    given = photos()
    expected = given.permute(0, 3, 1, 2).float() / 255
    expected = tv.adjust_brightness(expected, colours[0])
    expected = tv.adjust_contrast(expected, colours[1])
    expected = 255 * tv.adjust_saturation(expected, colours[2]).permute(0, 2, 3, 1)
    np.testing.assert_allclose(seen(given, WHOLE, colours, 32), expected.numpy(), atol=0.2)


def test_views_stay_in_the_photo_and_within_their_limits():
    views = Views.draw(np.random.default_rng(1), 4000)
    x0, y0, x1, y1 = views.boxes.T
    width, height = np.abs(x1 - x0), y1 - y0
    assert views.boxes.min() >= 0
    assert views.boxes.max() <= 1 + 1e-6
    aspect = width / height
    assert aspect.max() <= ASPECT + 1e-5
    assert aspect.min() >= 1 / ASPECT - 1e-5
    assert (width * height).min() >= SMALLEST - 1e-5
    assert np.mean(x0 > x1) == pytest.approx(0.5, abs=0.04)
    assert np.abs(views.colours - 1).max() <= COLOUR + 1e-6
    assert np.abs(views.colours - 1).max(axis=0).min() > 0.9 * COLOUR


def test_a_rank_draws_its_rows_of_the_batchs_views():
    views = Views.draw(np.random.default_rng(2), 8)
    half = views.rows(slice(4, 8))
    np.testing.assert_array_equal(half.boxes, views.boxes[4:])
    np.testing.assert_array_equal(half.colours, views.colours[4:])
