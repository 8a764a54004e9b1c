"""Cases of single ops, and of the head that is made of them.

PyTorch's side of each is what DeepLabv3 code in use today does: convolution, batch norm and ReLU
modules, a concatenation, interpolation to full size and then argmax, loss or softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_fast import ops
from deeplab_fast.testing import import_torchvision

from .costs import Cost, UpsampleSize, fused_cost, upsample_cost
from .registry import (
    BACKWARD,
    CONVOLUTION,
    COUNTS,
    DIRECT,
    FORWARD,
    FORWARD_BACKWARD,
    GRADIENT,
    LABELS,
    VALUES,
    Arguments,
    Call,
    Case,
    folded,
    network_tolerance,
    register_case,
    shape_name,
    without_dropout,
)

IGNORED = 255
# Each compilation takes ten seconds or more on a CPU.
_NO_QUICK_COMPILE = {"quick": {"compile": "it takes long to compile; suite cpu has it"}}
_NO_CPU_COMPILE = {"cpu": {"compile": "it takes long to compile; aspp_head has its figure"}}
OS8_RATES = (12, 24, 36)
OS16_RATES = (6, 12, 18)


class ConvBnAct(nn.Module):
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


class Branches(nn.Module):
    """The 1x1 and the atrous 3x3 branches of the ASPP, concatenated."""

    def __init__(self, channels: int, rates: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([ConvBnAct(channels, out_channels, 1)])
        for rate in rates:
            self.branches.append(ConvBnAct(channels, out_channels, 3, 1, rate, rate))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Project(nn.Module):
    """Concatenation with the image-pooling branch spread over the map, projection."""

    def __init__(self, channels: int, pooled: int, out_channels: int) -> None:
        super().__init__()
        self.project = ConvBnAct(channels + pooled, out_channels, 1)

    def forward(self, branches: Tensor, pooled: Tensor) -> Tensor:
        size = branches.shape[-2:]
        pooled = F.interpolate(
            pooled[:, :, None, None], size=size, mode="bilinear", align_corners=False
        )
        return self.project(torch.cat([branches, pooled], 1))


class _Folded(nn.Module):
    """A convolution's weight in a dtype and its folded batch norm in fp32 (fp64 for fp64)."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype) -> None:
        super().__init__()
        layout = torch.channels_last
        weight = conv.weight.detach().to(dtype).contiguous(memory_format=layout)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scale, shift = (t.to(wide) for t in folded(norm))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)


class _FusedBranches(nn.Module):
    def __init__(self, convs: list[tuple[nn.Conv2d, nn.BatchNorm2d]], dtype: torch.dtype) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_Folded(conv, norm, dtype) for conv, norm in convs)
        self.dilations = [conv.dilation[0] for conv, _ in convs]
        if self.convs[0].weight.is_cuda:
            self._pack()

    def _pack(self) -> None:
        """Make the weights views of the layout that the GPU kernels read, as a model would."""
        try:
            from deeplab_fast.plan.packing import PackedBranches
        except ImportError:
            return
        _, *lists, dilations = self.arguments(torch.empty(0))
        packed = PackedBranches.pack(*lists, dilations)
        for i, conv in enumerate(self.convs):
            conv.weight, conv.scale, conv.shift = (
                views[i] for views in (packed.weights, packed.scales, packed.shifts)
            )

    def arguments(self, x: Tensor) -> tuple:
        weights, scales, shifts = (
            [getattr(c, name) for c in self.convs] for name in ("weight", "scale", "shift")
        )
        return x, weights, scales, shifts, self.dilations

    def forward(self, x: Tensor) -> Tensor:
        return ops.aspp_branches(*self.arguments(x))


class _FusedProject(_Folded):
    def arguments(self, branches: Tensor, pooled: Tensor) -> tuple:
        return branches, pooled, self.weight, self.scale, self.shift

    def forward(self, branches: Tensor, pooled: Tensor) -> Tensor:
        return ops.aspp_project(*self.arguments(branches, pooled))


class _FusedConv(_Folded):
    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype) -> None:
        super().__init__(conv, norm, dtype)
        self.options = {
            "stride": conv.stride[0],
            "padding": conv.padding[0],
            "dilation": conv.dilation[0],
        }

    def arguments(self, x: Tensor) -> tuple:
        return x, self.weight, self.scale, self.shift

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.conv_bn_act(*self.arguments(x), **self.options, residual=residual)


class _FusedHead(nn.Module):
    """torchvision's DeepLabHead out of ops."""

    def __init__(self, head: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        aspp, conv, norm, _, classifier = head
        *branches, pooling = aspp.convs
        self.branches = _FusedBranches([(b[0], b[1]) for b in branches], dtype)
        self.pooling = _FusedConv(pooling[1], pooling[2], dtype)
        self.project = _FusedProject(aspp.project[0], aspp.project[1], dtype)
        self.conv = _FusedConv(conv, norm, dtype)
        layout = torch.channels_last
        weight = classifier.weight.detach().to(dtype).contiguous(memory_format=layout)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", classifier.bias.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooling(x.mean((2, 3), keepdim=True)).flatten(1)
        y = self.conv(self.project(self.branches(x), pooled))
        return F.conv2d(y, self.weight, self.bias)


class _HeadOfAModel(nn.Module):
    """A head as it runs within a model of this package, by the fast path or the training forms."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        from deeplab_fast import DeepLabV3
        from deeplab_fast.models._backbone import IntermediateLayerGetter

        # Features that are the input, in a form that the fast path knows to leave alone: an unknown
        # backbone would get them in the default memory format.
        features = IntermediateLayerGetter(nn.Sequential(nn.Identity()), {"0": "out"})
        self.model = DeepLabV3(features, head).train(head.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_logits(x)


@dataclass(frozen=True, kw_only=True)
class _OpCase(Case):
    kind: ClassVar[str] = "op"


@dataclass(frozen=True, kw_only=True)
class AsppBranches(_OpCase):
    """All branches of the ASPP on a feature map [n, channels, h, w]."""

    n: int
    h: int
    w: int
    rates: tuple[int, ...]
    channels: int = 2048
    out_channels: int = 256

    def make_module(self) -> nn.Module:
        return Branches(self.channels, self.rates, self.out_channels).eval()

    def make_inputs(self) -> tuple[Tensor, ...]:
        return (torch.randn(self.n, self.channels, self.h, self.w).relu_(),)

    def fused(self, args: Arguments, dtype: torch.dtype) -> nn.Module:
        return _FusedBranches([(b.conv, b.bn) for b in args.module.branches], dtype)

    def calls(self, args: Arguments) -> list[Call]:
        dtype = args.inputs[0][0].dtype
        fused = self.fused(args, dtype)
        return [("aspp_branches", fused.arguments(*args.inputs[0]), {})]

    def cost(self, mode: str, itemsize: int) -> Cost:
        args = self.setup("meta", torch.float32)
        outputs = self.n * self.h * self.w * self.out_channels * (1 + len(self.rates))
        return fused_cost(args.module, args.inputs[0], outputs, itemsize)

    def tolerance(self, kind: str) -> float:
        return CONVOLUTION


@dataclass(frozen=True, kw_only=True)
class AsppProject(_OpCase):
    """The projection of branches [n, channels, h, w] and a pooled vector."""

    n: int
    h: int
    w: int
    channels: int = 1024
    pooled: int = 256
    out_channels: int = 256

    def make_module(self) -> nn.Module:
        return Project(self.channels, self.pooled, self.out_channels).eval()

    def make_inputs(self) -> tuple[Tensor, ...]:
        return (
            torch.randn(self.n, self.channels, self.h, self.w).relu_(),
            torch.randn(self.n, self.pooled).relu_(),
        )

    def fused(self, args: Arguments, dtype: torch.dtype) -> nn.Module:
        conv = args.module.project
        return _FusedProject(conv.conv, conv.bn, dtype)

    def calls(self, args: Arguments) -> list[Call]:
        dtype = args.inputs[0][0].dtype
        return [("aspp_project", self.fused(args, dtype).arguments(*args.inputs[0]), {})]

    def cost(self, mode: str, itemsize: int) -> Cost:
        pixels = self.n * self.h * self.w
        weights = (self.channels + self.pooled) * self.out_channels
        # The pooled branch is a vector: its product is made once an image, not once a pixel.
        macs = pixels * self.channels * self.out_channels
        macs += self.n * self.pooled * self.out_channels
        elements = pixels * (self.channels + self.out_channels) + self.n * self.pooled + weights
        return Cost(macs, macs, elements * itemsize, 1)


@dataclass(frozen=True, kw_only=True)
class AsppHead(_OpCase):
    """torchvision's head: feature map [n, channels, h, w] to low-resolution logits.

    Modes with a gradient run it as in training, with batch statistics and without dropout, whose
    random masks would differ between layouts.
    """

    differentiable: ClassVar[tuple[int, ...]] = (0,)

    n: int
    h: int
    w: int
    rates: tuple[int, ...]
    channels: int = 2048
    classes: int = 21

    @property
    def training(self) -> bool:
        """Whether the head is in training mode."""
        return self.modes != (FORWARD,)

    def make_module(self) -> nn.Module:
        import_torchvision()
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead

        head = DeepLabHead(self.channels, self.classes, self.rates)
        return without_dropout(head).train(self.training)

    def make_inputs(self) -> tuple[Tensor, ...]:
        return (torch.randn(self.n, self.channels, self.h, self.w).relu_(),)

    def make_cotangent(self) -> Tensor:
        return torch.randn(self.n, self.classes, self.h, self.w)

    def fused(self, args: Arguments, dtype: torch.dtype) -> nn.Module | None:
        return None if self.training else _FusedHead(args.module, dtype)

    def own(self, args: Arguments) -> nn.Module:
        from deeplab_fast.nn import DeepLabHead

        device = next(args.module.parameters()).device
        with torch.device(device):
            head = DeepLabHead(self.channels, self.classes, self.rates)
        head.load_state_dict(args.module.state_dict())
        head = without_dropout(head).train(self.training)
        return _HeadOfAModel(head)

    def calls(self, args: Arguments) -> list[Call]:
        if self.training:
            return []
        x = args.inputs[0][0]
        head = self.fused(args, x.dtype)
        k = head.project.weight.shape[0]
        pool = x.new_empty(self.n, self.channels, 1, 1)
        branches = x.new_empty(self.n, k * (1 + len(self.rates)), self.h, self.w)
        y = x.new_empty(self.n, k, self.h, self.w)
        return [
            ("aspp_branches", head.branches.arguments(x), {}),
            ("conv_bn_act", head.pooling.arguments(pool), head.pooling.options),
            ("aspp_project", head.project.arguments(branches, x.new_empty(self.n, k)), {}),
            ("conv_bn_act", head.conv.arguments(y), head.conv.options),
        ]

    def cost(self, mode: str, itemsize: int) -> Cost:
        args = self.setup("meta", torch.float32)
        outputs = self.n * self.h * self.w * self.classes
        cost = fused_cost(args.module, args.inputs[0], outputs, itemsize)
        if mode == BACKWARD:
            return cost.gradient_only()
        return cost.with_gradient() if mode == FORWARD_BACKWARD else cost

    def kinds(self, mode: str) -> tuple[str, ...]:
        return {FORWARD: (VALUES,), BACKWARD: (GRADIENT,)}.get(mode, (VALUES, GRADIENT))

    def tolerance(self, kind: str) -> float:
        # A branch, the projection, the 3x3 and the classifier lie one behind another.
        return network_tolerance(4)


@dataclass(frozen=True, kw_only=True)
class ConvBnActCase(_OpCase):
    """One layer of DeepLabv3 on ResNet-50 at 520x520 and output stride 8."""

    n: int
    h: int
    w: int
    c: int
    k: int
    size: int
    dilation: int = 1
    residual: bool = False

    def make_module(self) -> nn.Module:
        padding = self.dilation * (self.size // 2)
        return ConvBnAct(self.c, self.k, self.size, 1, padding, self.dilation).eval()

    def make_inputs(self) -> tuple[Tensor, ...]:
        x = torch.randn(self.n, self.c, self.h, self.w).relu_()
        if not self.residual:
            return (x,)
        return x, torch.randn(self.n, self.k, self.h, self.w)

    def fused(self, args: Arguments, dtype: torch.dtype) -> nn.Module:
        return _FusedConv(args.module.conv, args.module.bn, dtype)

    def calls(self, args: Arguments) -> list[Call]:
        x, *rest = args.inputs[0]
        fused = self.fused(args, x.dtype)
        options = {**fused.options, "residual": rest[0] if rest else None}
        return [("conv_bn_act", fused.arguments(x), options)]

    def cost(self, mode: str, itemsize: int) -> Cost:
        args = self.setup("meta", torch.float32)
        return fused_cost(args.module, args.inputs[0], self.n * self.k * self.h * self.w, itemsize)

    def tolerance(self, kind: str) -> float:
        return CONVOLUTION if self.size > 1 else DIRECT


class _Upsample(nn.Module):
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


class _CrossEntropy(_Upsample):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.full(logits), target, ignore_index=IGNORED)


class _Confusion(_Upsample):
    """torchvision's ConfusionMatrix.update on the argmax of the interpolated logits."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        classes = logits.shape[1]
        a, b = target.flatten(), self.full(logits).argmax(1).flatten()
        valid = (a >= 0) & (a < classes)
        pairs = classes * a[valid] + b[valid]
        return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


class _SoftmaxAdd(_Upsample):
    def forward(self, accumulator: Tensor, logits: Tensor) -> Tensor:
        accumulator += self.full(logits).softmax(1).flip(-1)
        return accumulator


class _Op(nn.Module):
    """A function as a module."""

    def __init__(self, function, **options) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, **self.options)


@dataclass(frozen=True, kw_only=True)
class _UpsampleCase(_OpCase):
    """An op on logits [n, classes, h, w], interpolated to (height, width)."""

    sizes: UpsampleSize

    def logits(self) -> Tensor:
        s = self.sizes
        return torch.randn(s.n, s.classes, s.h, s.w)

    def target(self) -> Tensor:
        """Random labels, a twentieth of them ignored."""
        s = self.sizes
        target = torch.randint(0, s.classes, (s.n, s.height, s.width))
        return torch.where(torch.rand(s.n, s.height, s.width) < 0.05, IGNORED, target)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the result."""
        return self.sizes.height, self.sizes.width

    def calls(self, args: Arguments) -> list[Call]:
        fused = self.fused(args, args.inputs[0][0].dtype)
        return [(self.op, args.inputs[0], fused.options)]


@dataclass(frozen=True, kw_only=True)
class UpsampleArgmax(_UpsampleCase):
    """Labels of interpolated logits."""

    def make_module(self) -> nn.Module:
        return _Argmax(self.size)

    def make_inputs(self) -> tuple[Tensor, ...]:
        return (self.logits(),)

    def oracle(self, module: nn.Module) -> nn.Module:
        return _FullLogits(self.size)

    def fused(self, args: Arguments, dtype: torch.dtype) -> nn.Module:
        return _Op(ops.upsample_argmax, size=self.size)

    def cost(self, mode: str, itemsize: int) -> Cost:
        return upsample_cost(self.sizes, self.sizes.logits * itemsize + self.sizes.pixels)

    def kinds(self, mode: str) -> tuple[str, ...]:
        return (LABELS,)


@dataclass(frozen=True, kw_only=True)
class UpsampleCrossEntropy(_UpsampleCase):
    """Mean cross entropy of interpolated logits, with and without its gradient."""

    differentiable: ClassVar[tuple[int, ...]] = (0,)

    def make_module(self) -> nn.Module:
        return _CrossEntropy(self.size)

    def make_inputs(self) -> tuple[Tensor, ...]:
        return self.logits(), self.target()

    def fused(self, args: Arguments, dtype: torch.dtype) -> nn.Module:
        return _Op(ops.upsample_cross_entropy, ignore_index=IGNORED)

    def cost(self, mode: str, itemsize: int) -> Cost:
        s = self.sizes
        moved = s.logits * itemsize + s.pixels * torch.int64.itemsize
        if mode == FORWARD:
            return upsample_cost(s, moved, per_pixel_class=1)
        # Softmax minus one-hot, and one factor for each pixel.
        return upsample_cost(s, moved + s.logits * itemsize, per_pixel_class=3, gradient=True)

    def kinds(self, mode: str) -> tuple[str, ...]:
        return (VALUES,)


@dataclass(frozen=True, kw_only=True)
class UpsampleConfusion(_UpsampleCase):
    """Confusion matrix of the argmax of interpolated logits."""

    def make_module(self) -> nn.Module:
        return _Confusion(self.size)

    def make_inputs(self) -> tuple[Tensor, ...]:
        return self.logits(), self.target()

    def fused(self, args: Arguments, dtype: torch.dtype) -> nn.Module:
        return _Op(ops.upsample_confusion, ignore_index=IGNORED)

    def cost(self, mode: str, itemsize: int) -> Cost:
        s = self.sizes
        moved = s.logits * itemsize + (s.pixels + s.classes**2) * torch.int64.itemsize
        return upsample_cost(s, moved)

    def kinds(self, mode: str) -> tuple[str, ...]:
        return (COUNTS,)


@dataclass(frozen=True, kw_only=True)
class UpsampleSoftmaxAdd(_UpsampleCase):
    """Softmax of interpolated logits of a mirrored image, added to an fp32 accumulator."""

    mutated: ClassVar[tuple[int, ...]] = (0,)

    def make_module(self) -> nn.Module:
        return _SoftmaxAdd(self.size)

    def make_inputs(self) -> tuple[Tensor, ...]:
        s = self.sizes
        return torch.rand(s.n, s.classes, s.height, s.width), self.logits()

    def fused(self, args: Arguments, dtype: torch.dtype) -> nn.Module:
        return _Op(ops.upsample_softmax_add, flip=True)

    def cost(self, mode: str, itemsize: int) -> Cost:
        s = self.sizes
        accumulator = 2 * s.classes * s.pixels * torch.float32.itemsize
        return upsample_cost(s, s.logits * itemsize + accumulator, per_pixel_class=1)


def _conv_cases() -> list[Case]:
    found: list[Case] = []
    for n, h, w, rates, output_stride, suites in (
        (1, 33, 33, OS16_RATES, 16, ("quick", "cpu", "gpu")),
        (1, 65, 65, OS8_RATES, 8, ("cpu", "gpu")),
        (16, 65, 65, OS8_RATES, 8, ("gpu",)),
        (16, 33, 33, OS16_RATES, 16, ("gpu",)),
        (1, 128, 256, OS8_RATES, 8, ("gpu",)),
        (1, 97, 97, OS8_RATES, 8, ("gpu",)),
    ):
        shape = shape_name(f"os{output_stride}", (h, w), f"b{n}")
        given = {"shape": shape, "suites": suites, "n": n, "h": h, "w": w}
        found += [
            AsppHead(
                op="aspp_head",
                rates=rates,
                left_out=_NO_QUICK_COMPILE,
                headline=h in (33, 65),
                **given,
            ),
            AsppBranches(op="aspp_branches", rates=rates, left_out=_NO_CPU_COMPILE, **given),
        ]
        if (h, w) != (97, 97):
            found.append(AsppProject(op="aspp_project", left_out=_NO_QUICK_COMPILE, **given))
    for n, suites, modes in (
        (16, ("gpu",), (FORWARD_BACKWARD, BACKWARD)),
        (2, ("cpu",), (FORWARD_BACKWARD,)),
    ):
        found.append(
            AsppHead(
                op="aspp_head",
                shape=f"os16-33x33-b{n}-train",
                suites=suites,
                modes=modes,
                left_out=_NO_CPU_COMPILE,
                headline=True,
                rates=OS16_RATES,
                n=n,
                h=33,
                w=33,
            )
        )
    for name, c, k, size, dilation, residual, h, w, suites in (
        ("layer3-3x3d2", 256, 256, 3, 2, False, 65, 65, ("quick", "cpu", "gpu")),
        ("layer4-3x3d4", 512, 512, 3, 4, False, 65, 65, ("cpu", "gpu")),
        ("layer4-1x1-add", 512, 2048, 1, 1, True, 65, 65, ("cpu", "gpu")),
        ("layer1-3x3", 64, 64, 3, 1, False, 130, 130, ("cpu", "gpu")),
        # Two branches of the ASPP by themselves: does cuDNN's time follow the live taps?
        ("aspp-3x3d12", 2048, 256, 3, 12, False, 65, 65, ("gpu",)),
        ("aspp-3x3d36", 2048, 256, 3, 36, False, 65, 65, ("gpu",)),
    ):
        for n in (1, 16):
            found.append(
                ConvBnActCase(
                    op="conv_bn_act",
                    shape=shape_name(f"r50-{name}", (h, w), f"b{n}"),
                    suites=suites if n == 1 else ("gpu",),
                    n=n,
                    h=h,
                    w=w,
                    c=c,
                    k=k,
                    size=size,
                    dilation=dilation,
                    residual=residual,
                )
            )
    return found


# Logits of DeepLabv3 on VOC at output stride 8, on ADE20K at 16, on Cityscapes at 8.
_UPSAMPLED = (
    (21, (65, 65), (520, 520)),
    (150, (33, 33), (513, 513)),
    (19, (128, 256), (1024, 2048)),
)


def _upsample_cases() -> list[Case]:
    found: list[Case] = []
    for position, (classes, (h, w), (height, width)) in enumerate(_UPSAMPLED):
        for n in ((1, 16), (1, 16), (1, 4))[position]:
            voc = position == 0 and n == 1
            small = ("quick", "cpu", "gpu") if voc else ("gpu",)
            given = {
                "shape": shape_name((h, w, classes), (height, width), f"b{n}"),
                "sizes": UpsampleSize(n, classes, h, w, height, width),
            }
            on_cpu = ("cpu", "gpu") if n == 1 and not voc else small
            found += [
                UpsampleArgmax(op="upsample_argmax", suites=on_cpu, headline=True, **given),
                UpsampleCrossEntropy(
                    op="upsample_cross_entropy",
                    suites=small if position == 2 else on_cpu,
                    modes=(FORWARD_BACKWARD,) if n == 1 else (FORWARD_BACKWARD, FORWARD),
                    headline=True,
                    **given,
                ),
            ]
            # The full-size accumulator of 16 images of 150 classes alone takes 2.5 GB.
            if n == 1:
                given.update(suites=small, left_out=_NO_QUICK_COMPILE, headline=voc)
                found += [
                    UpsampleConfusion(op="upsample_confusion", **given),
                    UpsampleSoftmaxAdd(op="upsample_softmax_add", **given),
                ]
    return found


for _case in (*_upsample_cases(), *_conv_cases()):
    register_case(_case)
