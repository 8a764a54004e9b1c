"""From a photo to a network's input tensor: resize, scale to 0..1, normalise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import torch
import torch.nn.functional as F

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MOST_PIXELS",
    "MOST_TILED_PIXELS",
    "InputSizeError",
    "Preprocess",
    "PreprocessBGR",
    "allowed_pixels",
    "check_input_size",
    "in_millions",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MOST_PIXELS = 1 << 24
"""Pixels that any picture may be resized to; a larger one to four times its own.

Of a picture whose shorter side becomes 520 pixels the longer one may be 62 times that; panoramas
and line scans stay below 30. Four times is what a scale of 2 makes of a picture run at its own
size, and the paper's largest scale is 1.75.
"""

MOST_TILED_PIXELS = 1 << 28
"""As ``MOST_PIXELS`` of a picture that sliding windows cover: about 2000 of 513x513."""

_MOST_TIMES = 4

# Along a side; a larger size would be that of no picture.
_LONGEST_SIDE = 1_000_000

# Rows of a photo that are floats at a time where it is resized in strips.
_FLOAT_ROWS = 256


class InputSizeError(ValueError):
    """A picture of a size that a network or an exported file does not take."""


def allowed_pixels(own: tuple[int, int], most: int = MOST_PIXELS) -> int:
    """Pixels that a picture of (height, width) ``own`` may be resized to: ``max(most, 4 * own)``.

    A file of a few hundred bytes may hold a picture of one pixel by thousands, whose shorter side
    is brought to the network's input size: the longer one would be millions.
    """
    return max(most, _MOST_TIMES * own[0] * own[1])


def check_input_size(
    own: tuple[int, int],
    size: tuple[float, float],
    *,
    cure: str = "a smaller size (preprocess.size, --size, --input-size)",
) -> None:
    """Raises InputSizeError where a picture of (height, width) ``own`` is not to be resized to
    ``size``: where that is larger than itself and than :func:`allowed_pixels`.

    Args:
        cure: what to use beside cutting the picture.
    """
    pixels, allowed = size[0] * size[1], allowed_pixels(own)
    if pixels <= allowed:
        return
    raise InputSizeError(
        f"a picture of {own[0]}x{own[1]} pixels (height x width) would be resized to "
        f"{size[0]:.8g}x{size[1]:.8g}, {in_millions(pixels)}; allowed are "
        f"{in_millions(allowed)} (2^24, or 4 times its own where that is more): cut it into "
        f"parts, or use {cure}"
    )


def in_millions(pixels: float) -> str:
    """ "16.8 million pixels"."""
    return f"{pixels / 1e6:.4g} million pixels"


@dataclass(frozen=True)
class Preprocess:
    """``y = (resize(image) / 255 - mean) / std`` on uint8 RGB, a plain picklable value.

    The defaults are those of torchvision's ``SemanticSegmentation`` preset; with ``size=520`` the
    result equals ``DeepLabV3_ResNet50_Weights.transforms()`` on a uint8 tensor bit for bit.
    TensorFlow DeepLab's ``RGB / 127.5 - 1`` is ``mean=(0.5,) * 3, std=(0.5,) * 3``.

    Args:
        mean, std: per channel R, G, B, in units of the 0..1 image.
        size: None keeps the photo's size; an int is the length of the shorter side, the other one
            is ``int(size * longer / shorter)``; ``(h, w)`` is exact and may change the aspect.

    Resizing is bilinear with antialiasing, half-pixel centres, and rounds to whole levels 0..255
    before the division, as torchvision's tensor path does. No picture is resized to more than
    ``max(2^24, 4 H W)`` pixels (:func:`allowed_pixels`).

    Raises:
        ValueError: a mean or std that is not three finite numbers, a std of 0, a bad size.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, _three_floats(name, getattr(self, name)))
        if any(value <= 0 for value in self.std):
            raise ValueError(f"std is {self.std}, expected three numbers above 0")
        object.__setattr__(self, "size", _checked_size(self.size))

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """The network's input size (h, w) for a photo of height x width pixels."""
        if self.size is None:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        # torchvision's rule, its truncation included.
        if width <= height:
            return int(self.size * height / width), self.size
        return self.size, int(self.size * width / height)

    def __call__(
        self, image: np.ndarray, *, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """uint8 RGB array [H, W, 3] -> float32 tensor [1, 3, h, w], NCHW contiguous.

        Raises:
            ValueError: another shape or dtype (``data.as_rgb_array`` converts other pictures).
            InputSizeError: it would become too large (a ValueError too).
        """
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(
                f"expected a uint8 array [H,W,3], got {kind}; convert it with "
                "deeplab_fast.data.as_rgb_array"
            )
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f"expected a uint8 array [H,W,3], got shape {list(image.shape)}; convert it with "
                "deeplab_fast.data.as_rgb_array"
            )
        return self.batch(_as_nchw(image), device=device)

    def batch(
        self,
        pixels: torch.Tensor,
        *,
        size: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """uint8 tensor [N, 3, H, W] -> float32 tensor [N, 3, h, w] on ``device``.

        The bytes move to the device first, everything else runs there.

        Args:
            pixels: uint8 RGB, any memory format.
            size: overrides :meth:`target_size`.
            device: None keeps the tensor's own.

        Raises:
            ValueError: another shape or dtype.
            InputSizeError: a picture would become too large (a ValueError too).
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(
                f"expected a uint8 tensor [N,3,H,W], got {pixels.dtype} {list(pixels.shape)}"
            )
        height, width = pixels.shape[-2:]
        target = self.target_size(height, width) if size is None else tuple(size)
        check_input_size((height, width), (target[0], target[1]))
        if device is not None:
            pixels = pixels.to(device)
        # One layout for all inputs: another one rounds differently in the last bit, which moves
        # values that lie half-way between two levels.
        values = pixels.contiguous().to(torch.float32)
        if target != (height, width):
            values = F.interpolate(
                values, size=target, mode="bilinear", align_corners=False, antialias=True
            ).round_()
        mean = values.new_tensor(self.mean).view(1, 3, 1, 1)
        std = values.new_tensor(self.std).view(1, 3, 1, 1)
        return values.div_(255).sub_(mean).div_(std)

    def resized_rows(
        self,
        pixels: torch.Tensor,
        size: tuple[int, int],
        top: int,
        height: int,
        *,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Rows ``top`` to ``top + height`` of what :meth:`batch` resizes pictures to.

            y[i] = sum_j w[i, j] x[j] / sum_j w[i, j],  w = max(0, 1 - |j + 1/2 - c_i| / max(s, 1))

        with s = H / h and c_i = (i + 1/2) s, and the same along the columns: whole levels, which
        differ from ``batch``'s only where a sum lies at a half. No more of the photo is held in
        floats than about 256 rows.

        Args:
            pixels: uint8 [N, 3, H, W], any memory format.
            size: (h, w) of the whole resized picture.
            top, height: rows of that.
            device: where this is computed; None is the tensor's own.

        Returns:
            uint8 [N, 3, height, w] on ``device``.

        Raises:
            InputSizeError: these rows would become too large (a ValueError too).
        """
        device = pixels.device if device is None else torch.device(device)
        have, want = pixels.shape[-2:], tuple(size)
        check_input_size((have[0], have[1]), (height, want[1]))
        if want == tuple(have):
            return pixels[..., top : top + height, :].to(device)
        scale = have[0] / want[0]
        reach = max(1.0, scale)
        rows = torch.empty((*pixels.shape[:2], height, want[1]), dtype=torch.uint8, device=device)
        step = max(1, int(_FLOAT_ROWS / scale) - 2)
        for first in range(0, height, step):
            last = min(first + step, height)
            centres = (torch.arange(top + first, top + last, dtype=torch.float64) + 0.5) * scale
            begin = max(0, math.floor(float(centres[0]) - reach))
            end = min(have[0], math.ceil(float(centres[-1]) + reach))
            places = torch.arange(begin, end, dtype=torch.float64) + 0.5
            weights = (1 - (places - centres[:, None]).abs() / reach).clamp_(min=0)
            weights = (weights / weights.sum(1, keepdim=True)).to(device, torch.float32)
            strip = pixels[..., begin:end, :].to(device).contiguous().to(torch.float32)
            if want[1] != have[1]:
                strip = F.interpolate(
                    strip,
                    size=(end - begin, want[1]),
                    mode="bilinear",
                    align_corners=False,
                    antialias=True,
                )
            rows[..., first:last, :] = (weights @ strip).round_().clamp_(0, 255)
        return rows


@dataclass(frozen=True)
class PreprocessBGR(Preprocess):
    """``Preprocess`` for networks that read B, G, R; ``mean`` and ``std`` are in that order.

    fregu856's scripts read photos with OpenCV and apply the means of R, G, B to B, G, R.
    Hugging Face's MobileViT reads B, G, R in 0..1: ``mean=(0,) * 3, std=(1,) * 3``.
    """

    def batch(
        self,
        pixels: torch.Tensor,
        *,
        size: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        bgr = pixels.flip(1) if pixels.ndim == 4 else pixels
        return super().batch(bgr, size=size, device=device)


def _as_nchw(image: np.ndarray) -> torch.Tensor:
    # torch cannot share memory with read-only or negatively strided arrays.
    if not image.flags.writeable or min(image.strides) < 0:
        image = image.copy()
    return torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)


def _three_floats(name: str, value: Iterable[float]) -> tuple[float, float, float]:
    try:
        numbers = tuple(float(item) for item in value)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{name} is {value!r}, expected three finite numbers (R, G, B)")
    return numbers


def _checked_size(size: object) -> int | tuple[int, int] | None:
    if size is None:
        return None
    if _is_side(size):
        return size
    if isinstance(size, Sequence) and len(size) == 2 and all(_is_side(n) for n in size):
        return (size[0], size[1])
    raise ValueError(
        f"size is {size!r:.200}, expected None, the shorter side as an int > 0, or (height, "
        f"width); sides of at most {_LONGEST_SIDE} pixels"
    )


def _is_side(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LONGEST_SIDE
