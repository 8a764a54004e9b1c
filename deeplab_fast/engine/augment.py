"""Colour changes of training photos; their labels stay as they are."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["ColourJitter"]

# ITU-R BT.601, as Pillow's and torchvision's grey.
_GREY = torch.tensor((0.299, 0.587, 0.114), dtype=torch.float32, device="cpu")


class ColourJitter:
    """Random brightness, contrast, saturation and hue, in a random order.

    With f drawn evenly from [1 - strength, 1 + strength] and x in 0..255:

        brightness  f x
        contrast    f x + (1 - f) mean of the grey photo
        saturation  f x + (1 - f) grey of the pixel
        hue         rotation in the chroma plane of YIQ by [-hue, hue] of a turn

    Values are clipped to 0..255 after each and rounded at the end.

    Args:
        brightness, contrast, saturation: strengths, 0 to 1; 0 leaves out.
        hue: 0 to 0.5.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
    ) -> None:
        for name, value, top in (
            ("brightness", brightness, 1.0),
            ("contrast", contrast, 1.0),
            ("saturation", saturation, 1.0),
            ("hue", hue, 0.5),
        ):
            if not 0 <= value <= top:
                raise ValueError(f"{name} is {value}, expected 0 to {top}")
        self.strengths = (brightness, contrast, saturation, hue)

    def __call__(
        self, image: np.ndarray, label: np.ndarray, generator: torch.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        draws = torch.rand(4, generator=generator, dtype=torch.float64)
        order = torch.randperm(4, generator=generator).tolist()
        steps = [i for i in order if self.strengths[i] > 0]
        if not steps:
            return image, label
        x = torch.from_numpy(np.ascontiguousarray(image)).to(torch.float32)
        for i in steps:
            change = float(2 * draws[i] - 1) * self.strengths[i]
            if i == 0:
                x = x * (1 + change)
            elif i == 1:
                x = x * (1 + change) - change * (x @ _GREY).mean()
            elif i == 2:
                x = x * (1 + change) - change * (x @ _GREY)[..., None]
            else:
                x = x @ _hue_rotation(change).T
            x = x.clamp_(0, 255)
        return x.round_().to(torch.uint8).numpy(), label

    def __repr__(self) -> str:
        names = ("brightness", "contrast", "saturation", "hue")
        given = [f"{n}={v}" for n, v in zip(names, self.strengths, strict=True) if v]
        return f"ColourJitter({', '.join(given)})"


def _hue_rotation(turns: float) -> torch.Tensor:
    """RGB -> YIQ, a rotation of (I, Q), and back: [3, 3]."""
    angle = torch.tensor(2 * torch.pi * turns, dtype=torch.float64, device="cpu")
    cos, sin = float(angle.cos()), float(angle.sin())
    # FCC's NTSC matrix.
    to_yiq = torch.tensor(
        ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)),
        dtype=torch.float64,
        device="cpu",
    )
    turn = torch.tensor(
        ((1, 0, 0), (0, cos, -sin), (0, sin, cos)), dtype=torch.float64, device="cpu"
    )
    return (torch.linalg.inv(to_yiq) @ turn @ to_yiq).to(torch.float32)
