"""Patch features: 16 vectors a photo from one forward of a CNN (paper section 2.1, `x_p1`).

    cnn = PatchCNN("resnet18", weights="random", side=128).to(best_device())
    features = cnn(crops)  # uint8 [B, side, side, 3] → float16 [B, 16, D1]

* The paper cuts the RoI in 4×4 patches and runs the CNN on each. Here it runs once on the whole
  RoI and its last feature map [B, D1, h, w] is averaged in 4×4 cells: the side is a multiple of
  128 and the stride is 32, so h and w are multiples of 4 and every position falls in one cell.
* Random weights are for tests and first tries without a hub. As timm initialises them, BatchNorm
  passes the activations on unscaled and features are nearly the same for every photo; one forward
  on dead-leaves pictures sets its statistics. These pictures are the same for everybody, so the
  features of a photo never depend on the catalogue around it.
"""

import difflib
import logging
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from acebert.errors import UserError

log = logging.getLogger(__name__)

GRID = 4
N_PATCHES = GRID * GRID
"""N of the paper; cells are row-major: cell 0 is top left, cell 3 top right."""
STRIDE = 32
FP16_MAX = float(np.finfo(np.float16).max)
SEED = 0  # of the random weights and the dead leaves; apart from the training seed on purpose


class PatchCNN:
    """A timm CNN as a function from crops to patch features.

    Attributes:
        patch_dim: D1, channels of its last feature map.
        weights_name: where the weights come from, in words.
        clipped: values so far that float16 could not hold and that were set to its limit.
    """

    def __init__(
        self,
        name: str,
        weights: str,
        side: int,
        batch_size: int = 16,
        setting: str = "image.cnn_weights",
    ) -> None:
        """
        Args:
            name: timm model name, with or without a tag (`resnet18`, `resnet18.a1_in1k`).
            weights: `hub`, `random`, or the path of a .safetensors file with timm's names.
            side: height and width of the crops [px], a multiple of 128.
            batch_size: crops in one forward.
            setting: where `weights` comes from, for errors to name.

        Raises:
            UserError: unknown model, not a CNN, weights that cannot be had or do not fit.
        """
        if side % (GRID * STRIDE):
            raise UserError(f"image.cnn_side: {side} is not a multiple of {GRID * STRIDE}")
        self.side, self.batch_size = side, batch_size
        self.model, self.weights_name = _load(name, weights, setting)
        self.model.eval().requires_grad_(False)
        self.model.to(memory_format=torch.channels_last)
        config = self.model.pretrained_cfg
        self._mean = 255 * torch.tensor(config["mean"], dtype=torch.float32).view(1, 3, 1, 1)
        self._std = 255 * torch.tensor(config["std"], dtype=torch.float32).view(1, 3, 1, 1)
        self.to(torch.device("cpu"))
        self.patch_dim = self._probe(name)
        if weights == "random":
            self._calibrate()
        self.clipped = 0
        log.info("patch CNN: %s at %d px, %s, D1=%d", name, side, self.weights_name, self.patch_dim)

    def to(self, device: torch.device) -> Self:
        self.device = device
        self.model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=_has_fast_bf16(device))
        return self

    def __call__(self, crops: np.ndarray) -> np.ndarray:
        """RGB uint8 [B, side, side, 3] → float16 [B, 16, D1], cells row-major."""
        features = np.empty((len(crops), N_PATCHES, self.patch_dim), np.float16)
        for start in range(0, len(crops), self.batch_size):
            part = slice(start, start + self.batch_size)
            cells = self._forward(crops[part])
            self.clipped += int((cells.abs() > FP16_MAX).sum())
            features[part] = cells.clamp(-FP16_MAX, FP16_MAX).half().cpu().numpy()
        return features

    def _forward(self, crops: np.ndarray) -> torch.Tensor:
        """float32 [B, 16, D1]"""
        with torch.inference_mode(), self.autocast:
            maps = self.model.forward_features(self._normalised(crops))  # [B, D1, h, w]
            return F.adaptive_avg_pool2d(maps.float(), GRID).flatten(2).transpose(1, 2)

    def _normalised(self, crops: np.ndarray) -> torch.Tensor:
        """float32 [B, 3, side, side], channels last as the crops are."""
        # A copy: Ray hands out read-only arrays, which torch warns of.
        pixels = torch.from_numpy(np.array(crops)).to(self.device).permute(0, 3, 1, 2)
        return (pixels.float() - self._mean) / self._std

    def _calibrate(self) -> None:
        """Set the running statistics of every BatchNorm layer from one batch of dead leaves.

        The scale weights stay as they are initialised: reviving the residual branches that timm
        starts at zero makes the features of a deep random network less telling, not more.
        """
        layers = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the batch's own statistics, not a moving average
            layer.train()
        with torch.inference_mode():
            self.model.forward_features(self._normalised(dead_leaves(32, self.side)))
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum  # of a training from here
        self.model.eval()

    def _probe(self, name: str) -> int:
        """D1, from one forward that shows whether this is a CNN of stride 32 with sound weights."""
        refused = (
            f"image.cnn {name}: not a CNN of stride {STRIDE} with a [channels, height, width] "
            "feature map, so it has no 4×4 cells; try resnet18 or resnext101_32x8d"
        )
        picture = self._normalised(dead_leaves(1, self.side))
        try:
            with torch.inference_mode():
                maps = self.model.forward_features(picture)
        except Exception as error:  # transformers refuse the size, each in its own words
            raise UserError(f"{refused} ({error})") from error
        size = self.side // STRIDE
        if not isinstance(maps, torch.Tensor) or maps.ndim != 4 or maps.shape[2:] != (size, size):
            raise UserError(refused)
        if not torch.isfinite(maps).all():
            raise UserError(f"image.cnn {name}: {self.weights_name} give NaN or infinite features")
        return maps.shape[1]


def best_device() -> torch.device:
    """The GPU where this process sees one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dead_leaves(count: int, side: int) -> np.ndarray:
    """Pictures of overlapping discs in random colours: RGB uint8 [count, side, side, 3].

    With radii r drawn from a density ~ r^-3 they have the scale invariance of photos (Lee,
    Mumford and Huang, 2001).
    """
    rng = np.random.default_rng(SEED)
    pictures = np.full((count, side, side, 3), 255, np.uint8)
    smallest, largest = 2.0, side / 2
    for picture in pictures:
        radii = rng.uniform(largest**-2, smallest**-2, size=200) ** -0.5
        centres = rng.integers(0, side, size=(200, 2))
        colours = rng.integers(0, 256, size=(200, 3))
        for radius, centre, colour in zip(radii, centres, colours, strict=True):
            cv2.circle(picture, centre.tolist(), int(radius), colour.tolist(), thickness=-1)
    return pictures


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _load(name: str, weights: str, setting: str) -> tuple[Any, str]:
    """The model, and where its weights come from in words."""
    if not timm.is_model(name):
        known = timm.list_models()
        close = difflib.get_close_matches(name.split(".")[0], known, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise UserError(f"image.cnn {name}: timm knows no such model; {hint}")
    if weights == "hub":
        return _from_hub(name, setting)
    # Seeds torch for these weights alone: the caller's random state is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = timm.create_model(name, pretrained=False, num_classes=0)
    if weights == "random":
        return model, "random weights (untrained)"
    _fill_from_file(model, name, weights, setting)
    return model, f"weights of {weights}"


def _from_hub(name: str, setting: str) -> tuple[Any, str]:
    try:
        model: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # no network, no such tag, no weights published: many types
        raise UserError(
            f"{setting} hub: no weights for {name} ({type(error).__name__}: {error}). "
            f"Offline: --{setting} FILE.safetensors (timm's own names), or "
            f"--{setting} random to try things out"
        ) from error
    config = model.pretrained_cfg
    return model, f"hub weights {config['architecture']}.{config['tag']}"


def _fill_from_file(model: Any, name: str, path: str, setting: str) -> None:
    where = f"{setting} {path}"
    if not path.endswith(".safetensors"):
        raise UserError(f"{where}: neither hub nor random nor a .safetensors file")
    if not Path(path).is_file():
        raise UserError(f"{where}: no such file")
    try:
        given = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where}: not a readable safetensors file ({error})") from error
    wanted = model.state_dict()
    classifier = model.pretrained_cfg.get("classifier") or ()  # a name, or several
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    body = {key: t for key, t in given.items() if not key.startswith(tuple(f"{h}." for h in heads))}
    # Older files lack BatchNorm's step counter, which nothing reads in eval mode.
    missing = [k for k in wanted if k not in body and not k.endswith("num_batches_tracked")]
    unknown = [key for key in body if key not in wanted]
    misshapen = [
        f"{key} {tuple(body[key].shape)} for {tuple(wanted[key].shape)}"
        for key in wanted
        if key in body and body[key].shape != wanted[key].shape
    ]
    found = {"missing": missing, "unknown": unknown, "of a wrong shape": misshapen}
    problems = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for kind, keys in found.items()
        if keys
    ]
    if problems:
        raise UserError(f"{where}: not the weights of {name}: {'; '.join(problems)}")
    model.load_state_dict(body, strict=False)
