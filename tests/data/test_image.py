"""Decoding against Pillow, the RoI against boxes that are known."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from acebert.data.demo_catalogue import KINDS
from acebert.data.demo_pictures import COLOURS, PATTERNS, Look, Picture, draw
from acebert.data.image import Box, BrokenImage, crop_resize, decode, draw_roi, find_roi


def photo(width: int = 64, height: int = 48) -> Image.Image:
    """Smooth, so that JPEG keeps it within a few grey levels; no symmetry, so turns show."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray(np.stack([255 * x, 255 * y, 255 * x * y], 2).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def iou(a: Box, b: Box) -> float:
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area_a + area_b - width * height)


def reason(data: bytes, max_megapixels: float = 50) -> str:
    with pytest.raises(BrokenImage) as caught:
        decode(data, max_megapixels)
    return caught.value.reason


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_of_any_mode_decodes_as_pillow_decodes_it(mode: str, progressive: bool) -> None:
    data = encoded(photo().convert(mode), "JPEG", quality=95, progressive=progressive)
    ours = decode(data, 50)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert ours.shape == (48, 64, 3)
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - theirs).max() <= 3


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_decode_as_pillow_decodes_them(form: str) -> None:
    data = encoded(photo(), form)
    np.testing.assert_array_equal(
        decode(data, 50), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )


def test_a_palette_decodes_to_its_colours() -> None:
    image = photo().quantize(16)
    np.testing.assert_array_equal(
        decode(encoded(image, "PNG"), 50), np.asarray(image.convert("RGB"))
    )


def test_transparency_becomes_white_and_half_of_it_half_white() -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = (0, 0, 0, 0)  # as cut-out photos have it: black under full transparency
    pixels[:, 4:] = (200, 0, 0, 128)
    ours = decode(encoded(Image.fromarray(pixels), "PNG"), 50)
    assert (ours[:, :4] == 255).all()
    expected = np.array([200, 0, 0]) * 128 / 255 + 255 * 127 / 255
    assert np.abs(ours[0, 7] - expected).max() <= 1


def test_grey_with_transparency_is_laid_on_white() -> None:
    image = Image.merge("LA", (Image.new("L", (8, 8), 90), Image.new("L", (8, 8), 0)))
    assert (decode(encoded(image, "PNG"), 50) == 255).all()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = np.linspace(0, 65535, 64 * 4).reshape(4, 64).astype(np.uint16)
    ours = decode(encoded(Image.fromarray(grey), "PNG"), 50)
    assert np.abs(ours[:, :, 1] - grey / 257).max() <= 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(form: str, orientation: int) -> None:
    turn = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = {"quality": 95} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    data = encoded(photo(), form, exif=exif, **plain)
    expected = turn(np.asarray(photo()))
    ours = decode(data, 50)
    assert ours.shape == expected.shape
    assert np.abs(ours.astype(int) - expected).max() <= 12


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_file_cut_off_is_refused(form: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    data = encoded(Image.fromarray(noise), form)
    assert reason(data[: int(len(data) * kept)]) in {"truncated", "corrupt"}


def test_a_cut_jpeg_is_told_from_one_whose_thumbnail_is_whole() -> None:
    thumbnail = encoded(photo(32, 24), "JPEG")  # ends in an end-of-image marker of its own
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail
    data = encoded(photo(400, 300), "JPEG", exif=exif, quality=95)
    assert decode(data, 50).shape == (300, 400, 3)
    assert reason(data[: len(data) * 3 // 4]) == "truncated"


def test_bytes_after_the_end_of_a_jpeg_do_no_harm() -> None:
    assert decode(encoded(photo(), "JPEG") + b"\0" * 100, 50).shape == (48, 64, 3)


@pytest.mark.parametrize("size", [(100_000, 100_000), (12_000, 12_000), (8_000, 8_000)])
def test_a_decompression_bomb_is_refused_by_what_it_claims(size: tuple[int, int]) -> None:
    assert reason(png_claiming(*size), max_megapixels=50) == "too large"


def test_the_largest_size_allowed_is_allowed() -> None:
    data = encoded(Image.new("RGB", (1000, 1000)), "JPEG")
    assert decode(data, 1.0).shape == (1000, 1000, 3)
    assert reason(data, 0.999) == "too large"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_what_is_no_photo_is_named(data: bytes, why: str) -> None:
    assert reason(data) == why


def test_no_bytes_whatever_raise_anything_but_brokenimage() -> None:
    rng = np.random.default_rng(0)
    whole = [encoded(photo(), form) for form in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")]
    refused = 0
    for trial in range(300):
        data = bytearray(whole[trial % len(whole)])
        for at in rng.integers(0, len(data), 12):
            data[at] = rng.integers(256)
        try:
            image = decode(bytes(data), 50)
        except BrokenImage:
            refused += 1
        else:
            assert image.ndim == 3
            assert image.dtype == np.uint8
    assert refused > 0


def test_the_broken_photos_of_the_fashion_catalogue_are_found(fashion_small: Path) -> None:
    column = pq.read_table(fashion_small / "products.parquet", columns=["image"])["image"]
    found = 0
    for data in column.to_pylist():
        if data is None:
            continue
        try:
            with Image.open(io.BytesIO(data)) as picture:
                picture.load()  # the oracle: Pillow refuses truncated data
        except OSError:
            found += 1
            assert reason(data) == "truncated"
        else:
            decode(data, 50)
    assert found > 0


def non_white_box(image: np.ndarray) -> Box:
    x, y, w, h = cv2.boundingRect((image.min(axis=2) < 240).astype(np.uint8))
    return x, y, x + w, y + h


def sample_pictures(n: int, side: int, background: str) -> list[Picture]:
    """`n` pictures with their true boxes, of all types, colours and patterns in turn, before one
    kind of background ('plain', 'shaded', 'cluttered')."""
    rng = np.random.default_rng([0, 4])
    kinds, colours = list(KINDS), list(COLOURS)
    return [
        draw(
            Look(
                kinds[i % len(kinds)],
                colours[rng.integers(len(colours))],
                PATTERNS[rng.integers(len(PATTERNS))],
                background,
            ),
            side,
            rng,
        )
        for i in range(n)
    ]


@pytest.mark.parametrize(("side", "pictures_drawn"), [(64, 240), (160, 240), (480, 60)])
@pytest.mark.parametrize("background", ["plain", "shaded", "cluttered"])
def test_roi_finds_the_product_better_than_non_white_pixels(
    background: str, side: int, pictures_drawn: int
) -> None:
    pictures = sample_pictures(pictures_drawn, side, background)
    ours = np.array([iou(find_roi(p.image)[0], p.box) for p in pictures])
    rival = np.array([iou(non_white_box(p.image), p.box) for p in pictures])
    assert np.median(ours) >= 0.8
    assert np.quantile(ours, 0.1) >= 0.6
    assert np.median(ours) > np.median(rival)
    assert np.quantile(ours, 0.1) > np.quantile(rival, 0.1)


@pytest.mark.parametrize("background", [(255, 255, 255), (90, 130, 90)])
@pytest.mark.parametrize("size", [(60, 80), (224, 224), (600, 800)])
def test_roi_of_a_rectangle_is_the_rectangle(
    size: tuple[int, int], background: tuple[int, int, int]
) -> None:
    width, height = size
    image = np.full((height, width, 3), background, np.uint8)
    true = (width // 4, height // 5, width * 4 // 5, height // 2)
    image[true[1] : true[3], true[0] : true[2]] = (200, 40, 40)
    box, found = find_roi(image)
    assert found
    assert iou(box, true) > 0.85


def test_roi_sees_edges_that_have_no_brightness() -> None:
    image = np.full((128, 128, 3), (110, 110, 110), np.uint8)
    image[40:90, 30:100] = (180, 70, 127)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    assert abs(int(grey[60, 60]) - int(grey[5, 5])) < 5  # grey alone would not find it
    box, found = find_roi(image)
    assert found
    assert iou(box, (30, 40, 100, 90)) > 0.85


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 2), (80, 60)])
def test_nothing_to_see_gives_the_whole_image(shape: tuple[int, int]) -> None:
    assert find_roi(np.full((*shape, 3), 255, np.uint8)) == ((0, 0, shape[1], shape[0]), False)


def test_a_speck_is_no_product() -> None:
    image = np.full((400, 400, 3), 255, np.uint8)
    image[100:112, 100:112] = 0
    assert find_roi(image) == ((0, 0, 400, 400), False)


def test_crop_resize_keeps_what_is_in_the_box_and_nothing_else() -> None:
    image = np.zeros((60, 80, 3), np.uint8)
    image[10:30, 20:60] = 200
    for side in (8, 128):  # shrinks, grows
        square = crop_resize(image, (20, 10, 60, 30), side)
        assert square.shape == (side, side, 3)
        assert (square == 200).all()


def test_shrinking_averages_every_pixel_of_a_cell() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
    cells = image.reshape(8, 8, 8, 16, 3).mean(axis=(1, 3))
    assert np.abs(crop_resize(image, (0, 0, 128, 64), 8) - cells).max() <= 1


def test_draw_roi_marks_the_box_and_leaves_the_photo_alone() -> None:
    image = np.full((200, 160, 3), 255, np.uint8)
    drawn = draw_roi(image, (40, 60, 121, 141))
    assert (image == 255).all()
    changed = (drawn != 255).any(axis=2)
    assert changed[60, 40]
    assert changed[140, 120]
    assert changed[100, 80]  # the middle line of the cells
    assert not changed[:50].any()
    assert not changed[70, 50]


def test_a_small_photo_is_enlarged_before_its_roi_is_drawn() -> None:
    image = np.full((40, 50, 3), 255, np.uint8)
    drawn = draw_roi(image, (10, 0, 50, 20))
    assert drawn.shape == (240, 300, 3)
    changed = (drawn != 255).any(axis=2)
    assert changed[0, 60]
    assert changed[119, 299]
    assert not changed[:, :50].any()
    assert not changed[130:].any()
