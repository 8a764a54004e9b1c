"""What DeepLabv3 code in use today runs for ops, as modules, and the same through our ops.

PyTorch's side is convolution, batch norm and ReLU modules, a concatenation, interpolation to full
size and then argmax, loss or softmax. Each of its modules says what it is called with and what ours
is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_fast import ops
from deeplab_fast.dispatch.examples import IGNORED, Size
from deeplab_fast.plan.packing import PackedBranches

from .registry import folded


class Plain(nn.Module):
    """PyTorch's modules for an op.

    Attributes:
        inputs: which of the tensors of an example of the op they are called with.
    """

    inputs: tuple[int, ...] = (0,)

    def fused(self, dtype: torch.dtype) -> nn.Module:
        """The same through `deeplab_fast.ops`, with weights in a dtype."""
        raise NotImplementedError

    def exact(self) -> nn.Module:
        """What gives the exact result; logits where the result is labels."""
        return self


class ConvBnAct(Plain):
    """Convolution without bias, batch norm, optional residual, ReLU, as modules."""

    def __init__(
        self, c: int, k: int, size: int, stride: int = 1, padding: int = 0, dilation: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, k, size, stride, padding, dilation, bias=False)
        self.bn = nn.BatchNorm2d(k)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        if residual is not None:
            y += residual
        return self.relu(y)

    def fused(self, dtype: torch.dtype) -> nn.Module:
        return FusedConv(self.conv, self.bn, dtype)


class Branches(Plain):
    """The 1x1 and the atrous 3x3 branches of the ASPP, concatenated."""

    def __init__(self, channels: int, rates: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([ConvBnAct(channels, out_channels, 1)])
        for rate in rates:
            self.branches.append(ConvBnAct(channels, out_channels, 3, 1, rate, rate))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)

    def fused(self, dtype: torch.dtype) -> nn.Module:
        return FusedBranches([(b.conv, b.bn) for b in self.branches], dtype)


class Project(Plain):
    """Concatenation with the image-pooling branch spread over the map, projection."""

    inputs = (0, 1)

    def __init__(self, channels: int, pooled: int, out_channels: int) -> None:
        super().__init__()
        self.project = ConvBnAct(channels + pooled, out_channels, 1)

    def forward(self, branches: Tensor, pooled: Tensor) -> Tensor:
        size = branches.shape[-2:]
        pooled = F.interpolate(
            pooled[:, :, None, None], size=size, mode="bilinear", align_corners=False
        )
        return self.project(torch.cat([branches, pooled], 1))

    def fused(self, dtype: torch.dtype) -> nn.Module:
        return FusedProject(self.project.conv, self.project.bn, dtype)


class _Upsample(Plain):
    """Base of PyTorch's compositions on interpolated logits."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def full(self, logits: Tensor) -> Tensor:
        return F.interpolate(logits, size=self.size, mode="bilinear", align_corners=False)


class _FullLogits(_Upsample):
    def forward(self, logits: Tensor) -> Tensor:
        return self.full(logits)


class _Argmax(_Upsample):
    def forward(self, logits: Tensor) -> Tensor:
        return self.full(logits).argmax(1)

    def fused(self, dtype: torch.dtype) -> nn.Module:
        return _Op(ops.upsample_argmax, size=self.size)

    def exact(self) -> nn.Module:
        return _FullLogits(self.size)


class _CrossEntropy(_Upsample):
    inputs = (0, 1)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.full(logits), target, ignore_index=IGNORED)

    def fused(self, dtype: torch.dtype) -> nn.Module:
        return _Op(ops.upsample_cross_entropy, ignore_index=IGNORED)


class _Confusion(_Upsample):
    """torchvision's ConfusionMatrix.update on the argmax of the interpolated logits."""

    inputs = (0, 1)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        classes = logits.shape[1]
        a, b = target.flatten(), self.full(logits).argmax(1).flatten()
        valid = (a >= 0) & (a < classes)
        pairs = classes * a[valid] + b[valid]
        return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def fused(self, dtype: torch.dtype) -> nn.Module:
        return _Op(ops.upsample_confusion, ignore_index=IGNORED)


class _SoftmaxAdd(_Upsample):
    inputs = (0, 1)

    def __init__(self, size: tuple[int, int], flip: bool) -> None:
        super().__init__(size)
        self.flip = flip

    def forward(self, accumulator: Tensor, logits: Tensor) -> Tensor:
        full = self.full(logits).softmax(1)
        accumulator += full.flip(-1) if self.flip else full
        return accumulator

    def fused(self, dtype: torch.dtype) -> nn.Module:
        return _Op(ops.upsample_softmax_add, flip=self.flip)


class _Fold(Plain):
    """Filters times the scales of their batch norms, layer by layer, in the filters' dtype."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        # The filters, then all scales.
        self.inputs = tuple(range(layers + 1))

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        *weights, scale = tensors
        return [
            torch.mul(
                weight,
                factor[:, None, None, None],
                out=torch.empty_like(weight, memory_format=torch.channels_last),
            )
            for weight, factor in zip(
                weights, scale.split([w.shape[0] for w in weights]), strict=True
            )
        ]

    def fused(self, dtype: torch.dtype) -> nn.Module:
        return _Op(lambda *tensors: ops.fold_filters(tensors[:-1], tensors[-1], tensors[0].dtype))


class _Op(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any], **options: object) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, **self.options)


def _conv_bn_act(s: Size, form: str) -> ConvBnAct:
    (rate,) = s.rates or (0,)
    module = ConvBnAct(s.c, s.filters, 3 if rate else 1, s.stride, rate, rate or 1)
    if "residual" in form:
        # Behind the weight, scale and shift.
        module.inputs = (0, 4)
    return module


# By the op and the form that its modules compute.
PLAIN: dict[str, Callable[[Size, str], Plain]] = {
    "upsample_argmax": lambda s, form: _Argmax((s.height, s.width)),
    "upsample_cross_entropy": lambda s, form: _CrossEntropy((s.height, s.width)),
    "upsample_confusion": lambda s, form: _Confusion((s.height, s.width)),
    "upsample_softmax_add": lambda s, form: _SoftmaxAdd((s.height, s.width), form == "flip"),
    "aspp_branches": lambda s, form: Branches(s.c, s.rates, s.filters),
    "aspp_project": lambda s, form: Project(s.c, s.pooled, s.filters),
    "conv_bn_act": _conv_bn_act,
    "fold_filters": lambda s, form: _Fold(len(s.layers)),
}


class _Folded(nn.Module):
    """A convolution's weight in a dtype and its folded batch norm in fp32 (fp64 for fp64)."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype) -> None:
        super().__init__()
        layout = torch.channels_last
        weight = conv.weight.detach().to(dtype).contiguous(memory_format=layout)
        wide = torch.promote_types(dtype, torch.float32)
        scale, shift = (t.to(wide) for t in folded(norm))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)


class FusedBranches(nn.Module):
    """`ops.aspp_branches` with the weights of convolutions and batch norms."""

    def __init__(self, convs: list[tuple[nn.Conv2d, nn.BatchNorm2d]], dtype: torch.dtype) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_Folded(conv, norm, dtype) for conv, norm in convs)
        self.dilations = [conv.dilation[0] for conv, _ in convs]
        if self.convs[0].weight.is_cuda:
            self._pack()

    def _pack(self) -> None:
        """Make the weights views of the layout that the GPU kernels read, as a model would."""
        packed = PackedBranches.pack(*self._lists(), self.dilations)
        for i, conv in enumerate(self.convs):
            conv.weight, conv.scale, conv.shift = (
                views[i] for views in (packed.weights, packed.scales, packed.shifts)
            )

    def _lists(self) -> list[list[Tensor]]:
        return [[getattr(c, name) for c in self.convs] for name in ("weight", "scale", "shift")]

    def forward(self, x: Tensor) -> Tensor:
        return ops.aspp_branches(x, *self._lists(), self.dilations)


class FusedProject(_Folded):
    """`ops.aspp_project` with the weights of a convolution and its batch norm."""

    def forward(self, branches: Tensor, pooled: Tensor) -> Tensor:
        return ops.aspp_project(branches, pooled, self.weight, self.scale, self.shift)


class FusedConv(_Folded):
    """`ops.conv_bn_act` with the weights of a convolution and its batch norm."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype) -> None:
        super().__init__(conv, norm, dtype)
        self.options = {
            "stride": conv.stride[0],
            "padding": conv.padding[0],
            "dilation": conv.dilation[0],
        }

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        weights = self.weight, self.scale, self.shift
        return ops.conv_bn_act(x, *weights, **self.options, residual=residual)
