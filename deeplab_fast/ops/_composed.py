"""What PyTorch alone runs for a layer, in channels_last, its fastest layout."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cudnn

# PyTorch's batch norm takes no eps of 0 (2.11); this one is lost beside any variance of examples.
EPS = 1e-12
_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "relu": torch.relu_,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}


def activated(y: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
    """act(y + residual); y may be changed."""
    return _ACTIVATIONS[act](y if residual is None else y.add_(residual))


def norm_of(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * y + shift by a batch norm."""
    zero = torch.zeros_like(scale)
    return F.batch_norm(y, zero, torch.ones_like(scale), scale, shift, False, 0.0, EPS)


def fused_layer(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    residual: Tensor | None = None,
    act: str | None = "relu",
) -> Callable[[Tensor], Tensor]:
    """cuDNN's convolution, fused where it can, with weights folded beforehand."""
    folded, one = _cudnn.fold(weight, scale), torch.ones_like(scale)
    geometry = (stride, padding, dilation, 1)
    return lambda x: _cudnn.conv_bn_act(x, folded, one, shift, *geometry, residual, act)
