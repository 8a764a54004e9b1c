"""Pixels whose logits are NaN or infinite: found without logits of full size, told by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import reference
from ..data.images import shown_name

__all__ = ["NotFiniteWarning", "describe_not_finite", "not_finite_pixels"]

# Images named in a message; the rest are counted.
_SHOWN = 10


class NotFiniteWarning(UserWarning):
    """Labels that mean nothing: ``pixels`` counts, by image, those of NaN or infinite logits."""

    def __init__(self, pixels: Mapping[str, int]) -> None:
        super().__init__(dict(pixels))
        self.pixels = dict(pixels)

    def __str__(self) -> str:
        return (
            f"the logits of {describe_not_finite(self.pixels)} are NaN or infinite, so these "
            "pixels' labels mean nothing; look for NaN in the weights and the input, and for "
            "values that overflow (fp16: use bf16 or fp32)"
        )


def describe_not_finite(pixels: Mapping[str, int]) -> str:
    """ "12 pixels of a.png, 3 pixels of b.png", the first ten images."""
    parts = [
        f"{count} pixel{'s' if count != 1 else ''} of {shown_name(name)}"
        for name, count in list(pixels.items())[:_SHOWN]
    ]
    rest = list(pixels.values())[_SHOWN:]
    more = [f"{sum(rest)} pixels of {len(rest)} more images"] if rest else []
    return ", ".join(parts + more)


def not_finite_pixels(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor | None:
    """Which pixels of the upsampled logits are NaN or infinite; None where the host sees none.

    Bilinear interpolation multiplies all of a pixel's neighbours, also by 0, so a pixel is spoiled
    by each of them; one map of NaN where a class is not finite shows which.

    Args:
        logits: [N, C, h, w].
        size: (H, W) that they are upsampled to.
        align_corners: as in torch.nn.functional.interpolate.

    Returns:
        bool [N, H, W] on the logits' device. On a GPU always, which nothing waits for; on a CPU
        None for finite logits.
    """
    # A sum reads any layout once, isfinite takes ten times as long; one that overflows is looked
    # at again.
    if logits.device.type == "cpu" and bool(torch.isfinite(logits.float().sum())):
        return None
    spoiled = ~torch.isfinite(logits).all(1, keepdim=True)
    marks = torch.zeros(spoiled.shape, device=logits.device).masked_fill_(spoiled, torch.nan)
    return torch.isnan(reference.upsample(marks, size, align_corners))[:, 0]
