"""What the upsampling ops share: reasons against their implementations, bad labels, and the sizes
of their examples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ext, reference
from ..dispatch import limits
from ..dispatch.choice import current_backend
from ..dispatch.describe import OpDesc
from ..dispatch.examples import Examples, Forms, Maker, Shapes, Size, Step
from . import cpu_rates
from .common import triton_kernel

STRICT_LABELS = "DEEPLAB_FAST_STRICT_LABELS"
# Name of the sources of their GPU kernels.
SOURCES = "upsample"
_SIZES = (
    # A ratio that is no integer, odd numbers of everything.
    Size(2, 5, 5, 7, 33, 41),
    # Fewer pixels than logits.
    Size(1, 3, 9, 8, 5, 4),
    # A map of one pixel; labels next to what 16 bytes hold.
    Size(3, 19, 1, 1, 8, 17),
    # Several blocks of rows and columns, as at output stride 8.
    Size(1, 21, 17, 33, 129, 257),
    # More classes than a block of them.
    Size(1, 150, 5, 6, 33, 40),
)


def cpu_reasons(desc: OpDesc) -> list[str]:
    """Why the C++ CPU implementation cannot run the call; empty where it can.

    The automatic choice also leaves it out where it was measured to be the slower one.
    """
    reasons = limits.device(desc, "cpu")
    if not reasons:
        cpu_rates.choose_sets()
    (height, width), (out_height, out_width) = desc.shape[-2:], desc.params["size"]
    # Nothing is shared between outputs then; bench/NOTES.md has the measurement.
    if out_height * out_width <= height * width and current_backend() == "auto":
        reasons.append(
            f"PyTorch's own ops are as fast where nothing is enlarged ({height}x{width} to "
            f"{out_height}x{out_width}); use_backend('cpu') runs it all the same"
        )
    return reasons + limits.extension(_ext.CPU, f"_{desc.op}_cpu")


triton_reasons = triton_kernel("upsample", "not_supported_reasons")


def cuda_reasons(desc: OpDesc) -> list[str]:
    """Why the CUDA C++ implementation cannot run the call; empty where it can."""
    return limits.cuda(desc) + limits.extension(_ext.CUDA, f"_{desc.op}_cuda")


def report_bad_labels(count: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> None:
    """In strict mode, wait for the count of bad labels of a CUDA kernel and raise where there are.

    Args:
        count: [1] int64 on the device, from a kernel that treated those labels as ignored.
    """
    if os.environ.get(STRICT_LABELS) != "1":
        return
    # A capture cannot wait for a result.
    if not torch.cuda.is_current_stream_capturing() and count.item():
        reference.check_labels(target, num_classes, ignore_index)


def example(make: Maker, size: Size) -> tuple[Tensor, Tensor]:
    """Logits [n, c, h, w] and labels [n, height, width]."""
    logits = make.map(size.n, size.c, size.h, size.w)
    return logits, make.labels(size.n, size.height, size.width, size.c)


def examples(
    forms: tuple[str, ...],
    build: Callable[[Maker, str, Size], list[Step]],
    pytorch: Callable[[Step], Forms],
    exact: Callable[[Step], list[Tensor]] | None = None,
    capturable: bool = True,
) -> Examples:
    """Those of an upsampling op; arguments as in `Examples`."""

    def works(shapes: Shapes) -> list[tuple[str, Size]]:
        return [(form, shapes.logits) for form in forms]

    return Examples(forms, build, pytorch, _SIZES, works, exact, True, capturable)


def interpolated(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """The upsampled logits, by PyTorch."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners)
