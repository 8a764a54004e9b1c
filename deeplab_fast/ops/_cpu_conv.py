"""The convolution ops on fp32 CPU tensors: `prepared`, with weights that are prepared for one call.

Nothing is kept between calls, so that nothing can be out of date; the time of preparing counts
where the algorithm is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ext
from ..backends import OpDesc
from .prepared import PreparedAspp, PreparedConv, PreparedProject


def reasons(desc: OpDesc) -> list[str]:
    """Why the call cannot run here; empty where it can."""
    found = []
    if desc.device != "cpu":
        found.append(f"needs CPU tensors, the input is on {desc.device}")
    if desc.dtype != torch.float32:
        dtype = str(desc.dtype).removeprefix("torch.")
        found.append(f"takes float32 only, the input is {dtype}")
    if not _ext.CPU.loaded:
        found.append(_ext.CPU.reason)
    elif not hasattr(torch.ops.deeplab_fast, "_conv_tiles_cpu"):
        found.append(
            f"{_ext.CPU.name} was compiled from older sources, without this op; rebuild it"
        )
    return found


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    residual: Tensor | None,
    act: str | None,
) -> Tensor:
    """As `ops.conv_bn_act`."""
    conv = PreparedConv(
        weight,
        scale,
        shift,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        act=act,
        reuse=False,
    )
    return conv(x, residual)


def aspp_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
) -> Tensor:
    """As `ops.aspp_branches`."""
    return PreparedAspp(weights, scales, shifts, dilations, reuse=False)(x)


def aspp_project(
    branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """As `ops.aspp_project`."""
    channels = branches.shape[1]
    project = PreparedProject(weight, scale, shift, branch_channels=channels, reuse=False)
    return project(branches, pooled)
