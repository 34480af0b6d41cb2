"""Product photos: bytes → pixels → region of interest (paper section 2.1, Fig. 1b).

    image = decode(data, max_megapixels=50)
    box, found = find_roi(image)
    square = crop_resize(image, box, side=256)

Plain NumPy and OpenCV, so that it runs the same in a Ray worker, a server and a test.

* Pillow reads the header (size, format, mode) before anything is decoded; OpenCV then decodes
  JPEGs, which it does up to 3.5 times faster. All else is rare and left to Pillow.
* OpenCV decodes a JPEG that was cut off in the middle without an error, the lower part grey; such
  a file has no end-of-image marker, which is looked for instead.
"""

import io
import math

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels, x1 and y1 exclusive."""

# Preprocessing runs one process a core; OpenCV's own threads would only fight over those cores.
cv2.setNumThreads(1)

# No others: some of Pillow's readers start programs (EPS) or follow references.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
JPEG_END = b"\xff\xd9"

WORK_SIDE = 128  # longest side on which edges are looked for [px]
SPREAD = 2  # blur and dilation move an outline outwards by this much [px of the small image]
MARGIN = 0.01  # added around the box, of its longer side
MIN_AREA = 0.01  # a box that covers less of the photo is no product
BORDER = 8  # width of the frame in which the background is looked at [px of the small image]
MIN_GRADIENT = 40.0  # Canny's high threshold is never below: JPEG artefacts on a white wall
LARGE = 0.15  # a contour is large if it has this share of the largest one's edge


class BrokenImage(ValueError):  # noqa: N818 - what it is, not what went wrong in the code
    """Bytes that are no usable photo.

    `reason` is one of a few fixed strings, to be counted: 'empty', 'not an image', 'truncated',
    'too large', 'corrupt'.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def decode(data: bytes, max_megapixels: float) -> np.ndarray:
    """The photo as RGB uint8 [H, W, 3], upright (EXIF), transparency on white.

    Pillow's own limit of 179 megapixels holds as well.

    Raises:
        BrokenImage: no image in a known format, a claimed size above `max_megapixels` [10^6 px]
            (refused before any of it is decoded), or a file that ends too early.
    """
    if not data:
        raise BrokenImage("empty")
    stream = io.BytesIO(data)
    try:
        header = Image.open(stream, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BrokenImage("too large", str(error)) from error
    except UnidentifiedImageError as error:
        raise BrokenImage("not an image") from error
    except Exception as error:  # Pillow's readers raise what struct, zlib, … raise
        raise BrokenImage("corrupt", str(error)) from error
    width, height = header.size
    if width * height > max_megapixels * 1e6:
        raise BrokenImage("too large", f"{width}x{height} px")
    if header.format in ("JPEG", "MPO"):
        # From the scan on: an EXIF thumbnail ahead of it has an end marker of its own.
        if data.find(JPEG_END, stream.tell()) < 0:
            raise BrokenImage("truncated", f"{width}x{height} px")
        if header.mode != "CMYK":  # OpenCV does not know Adobe's inverted CMYK
            return _decode_jpeg(data)
    return _decode_any(header)


def _decode_jpeg(data: bytes) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise BrokenImage("corrupt", str(error)) from error
    if image is None:
        raise BrokenImage("corrupt")
    return image


def _decode_any(picture: Image.Image) -> np.ndarray:
    try:
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I;16"):  # convert() would clip to 255, not scale
            grey = (np.asarray(upright) >> 8).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if upright.has_transparency_data:
            layer = upright.convert("RGBA")
            white = Image.new("RGBA", layer.size, "white")
            upright = Image.alpha_composite(white, layer)
        return np.array(upright.convert("RGB"))
    except Exception as error:  # as above
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise BrokenImage(reason, str(error)) from error


def find_roi(image: np.ndarray) -> tuple[Box, bool]:
    """The box of the product in RGB uint8 [H, W, 3], and whether one was found.

    Edges (blur, Canny), joined by dilation; the joint box of the large contours with a small
    margin. The whole image, and False, where there are no edges or their box covers almost
    nothing.
    """
    H, W = image.shape[:2]
    scale = WORK_SIDE / max(H, W)
    small = _shrink(image, max(1, round(W * scale)), max(1, round(H * scale)))
    box = _large_contours(*_edges(small))
    if box is None:
        return (0, 0, W, H), False
    x0, y0, x1, y1 = (corner / scale for corner in box)
    margin = MARGIN * max(x1 - x0, y1 - y0)
    roi = (
        max(0, math.floor(x0 - margin)),
        max(0, math.floor(y0 - margin)),
        min(W, math.ceil(x1 + margin)),
        min(H, math.ceil(y1 + margin)),
    )
    if (roi[2] - roi[0]) * (roi[3] - roi[1]) < MIN_AREA * W * H:
        return (0, 0, W, H), False
    return roi, True


def _shrink(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resized to width × height: averaged over whole pixels first, which is many times faster than
    INTER_AREA by a fraction, then by the remaining factor of less than two."""
    step = max(1, min(image.shape[1] // width, image.shape[0] // height))
    if step > 1:
        whole = image.shape[1] // step * step, image.shape[0] // step * step
        image = cv2.resize(
            image[: whole[1], : whole[0]],
            (whole[0] // step, whole[1] // step),
            interpolation=cv2.INTER_AREA,
        )
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def _edges(small: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Canny's edges, uint8 0/255, and the gradient's strength, int16, both [h, w].

    A colour edge need not be one of brightness, so at each pixel the channel counts in which the
    gradient is steepest. The thresholds follow the photo: well above what its border shows, so
    that a faint outline counts on a plain wall and furniture does not, and between 0.1 and 0.5 of
    its strong edges, for the product is in focus.
    """
    blurred = cv2.GaussianBlur(small, (5, 5), 0)
    dx, dy, strength = _gradient(blurred[:, :, 0])
    for channel in (1, 2):
        other_dx, other_dy, other = _gradient(blurred[:, :, channel])
        steeper = other > strength
        np.copyto(dx, other_dx, where=steeper)
        np.copyto(dy, other_dy, where=steeper)
        np.copyto(strength, other, where=steeper)
    frame = np.ones(strength.shape, bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    strong, behind = _quantile(strength.ravel(), 0.98), _quantile(strength[frame], 0.95)
    high = max(MIN_GRADIENT, 0.1 * strong, min(0.5 * strong, 6 * behind))
    return cv2.Canny(dx, dy, 0.3 * high, high), strength


def _gradient(channel: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    dx, dy = cv2.spatialGradient(np.ascontiguousarray(channel))
    return dx, dy, np.abs(dx) + np.abs(dy)


def _quantile(values: np.ndarray, q: float) -> float:
    """As np.quantile without interpolation, at a tenth of its cost on so few values."""
    rank = int(q * (values.size - 1))
    return float(np.partition(values, rank)[rank])


def _large_contours(edges: np.ndarray, strength: np.ndarray) -> Box | None:
    """x0, y0, x1, y1 of the joint box of the large contours, in pixels of `edges`.

    Large is told by length times strength, so that neither a small thing in focus nor large
    furniture out of focus counts.
    """
    joined = cv2.dilate(edges, np.ones((3, 3), np.uint8))
    count, labels = cv2.connectedComponents(joined, connectivity=8)
    if count < 2:
        return None
    on = edges > 0
    weight = np.bincount(labels[on], strength[on], minlength=count)
    large = weight >= LARGE * weight.max()
    large[0] = False  # the ground between the contours
    x, y, w, h = cv2.boundingRect(large[labels].view(np.uint8))
    if min(w, h) <= 2 * SPREAD:
        return None
    return x + SPREAD, y + SPREAD, x + w - SPREAD, y + h - SPREAD


def crop_resize(image: np.ndarray, box: Box, side: int) -> np.ndarray:
    """The box of RGB uint8 [H, W, 3], resized (not padded) to uint8 [side, side, 3]."""
    x0, y0, x1, y1 = box
    crop = image[y0:y1, x0:x1]
    shrinks = crop.shape[0] * crop.shape[1] > side * side
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(crop, (side, side), interpolation=method)


def draw_roi(image: np.ndarray, box: Box) -> np.ndarray:
    """A copy of RGB uint8 [H, W, 3] with the RoI (green) and its 4×4 cells drawn on it.

    A small image is enlarged by a whole number, so that the lines hide little of it.
    """
    zoom = max(1, 300 // max(image.shape))
    drawn = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
    x0, y0, x1, y1 = (zoom * edge for edge in box)
    x1, y1 = x1 - 1, y1 - 1
    width = max(1, max(drawn.shape) // 200)
    for part in range(1, 4):
        x, y = x0 + (x1 - x0) * part // 4, y0 + (y1 - y0) * part // 4
        cv2.line(drawn, (x, y0), (x, y1), (255, 160, 0), width)
        cv2.line(drawn, (x0, y), (x1, y), (255, 160, 0), width)
    cv2.rectangle(drawn, (x0, y0), (x1, y1), (0, 180, 60), 2 * width)
    return drawn
