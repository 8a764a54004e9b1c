"""Cases of single ops, and of the head that is made of them.

A case of an op is a call as the op's declaration makes it (`deeplab_fast.dispatch.declare`), in a
form and at a size. Any declared call makes one (`declared_cases`); those of the suites, the rows
below, are run beside PyTorch's modules (`op_modules.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_fast import backends
from deeplab_fast.dispatch import declare
from deeplab_fast.dispatch.errors import DIRECT, SAVING
from deeplab_fast.dispatch.examples import VALUES, Size, Step
from deeplab_fast.testing import import_torchvision

from .costs import Cost, fused_cost, logits, network_cost, pixels, upsample_cost
from .op_modules import PLAIN, FusedBranches, FusedConv, FusedProject
from .registry import (
    BACKWARD,
    FORWARD,
    FORWARD_BACKWARD,
    GRADIENT,
    Arguments,
    Case,
    network_tolerance,
    register_case,
    shape_name,
    without_dropout,
)

# Each compilation takes ten seconds or more on a CPU.
_NO_QUICK_COMPILE = {"quick": {"compile": "it takes long to compile; suite cpu has it"}}
_NO_CPU_COMPILE = {"cpu": {"compile": "it takes long to compile; aspp_head has its figure"}}
Names = tuple[str, ...]
OS8_RATES = (12, 24, 36)
OS16_RATES = (6, 12, 18)
# Of torchvision's branches and projection.
_FILTERS = 256


class _Composed(nn.Module):
    """PyTorch's plain form of a call, with the call's tensors as inputs."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, *tensors: Tensor) -> object:
        return next(iter(declare.pytorch_forms(self.step.of(tensors)).values()))()


class _Exact(_Composed):
    """The exact result of a call."""

    def forward(self, *tensors: Tensor) -> object:
        found = declare.exact(self.step.of(tensors))
        return [t.to(tensors[0].device) for t in found]


class _Implementation(_Composed):
    """A call of the implementation on the backend in force."""

    def forward(self, *tensors: Tensor) -> object:
        found = declare.implementations(self.step.op)[backends.current_backend()]
        return self.step.of(tensors).launch(found.run)


@dataclass(frozen=True, kw_only=True)
class DeclaredCase(Case):
    """A call of an op as it is declared, by its implementations.

    Attributes:
        size, form: of the op's examples.
        call: of those that together are a form.
    """

    kind: ClassVar[str] = "op"

    size: Size
    form: str = "plain"
    call: int = 0

    def example(self, dtype: torch.dtype, device: str = "meta", seed: int = 0) -> Step:
        """The call."""
        return declare.steps(self.op, self.form, self.size, dtype, device, seed)[self.call]

    def inputs_of(self, step: Step) -> tuple[Tensor, ...]:
        """Its tensors that are inputs."""
        return tuple(step.tensors)

    @property
    def mutated(self) -> tuple[int, ...]:
        """The input that the call changes."""
        step = self.example(torch.float32)
        changed = step.args[step.changed] if step.changed >= 0 else None
        return tuple(i for i, t in enumerate(self.inputs_of(step)) if t is changed)

    @property
    def wide(self) -> tuple[int, ...]:
        """The inputs that are in fp32 whatever the dtype."""
        inputs = self.inputs_of(self.example(torch.bfloat16))
        return tuple(i for i, t in enumerate(inputs) if t.dtype == torch.float32)

    def make_module(self) -> nn.Module:
        return _Composed(self.example(torch.float32))

    def make_inputs(self, device: str, seed: int) -> tuple[Tensor, ...]:
        return self.inputs_of(self.example(torch.float32, device, seed))

    def oracle(self, module: nn.Module) -> nn.Module:
        return _Exact(self.example(torch.float32))

    def fused(self, args: Arguments, dtype: torch.dtype) -> nn.Module:
        return _Implementation(self.example(dtype))

    def steps(self, dtype: torch.dtype) -> list[Step]:
        return [self.example(dtype)]

    def cost(self, mode: str, itemsize: int) -> Cost:
        args = self.setup("meta", torch.float32)
        given = args.inputs[0]
        cost = network_cost(args.module, given, itemsize)
        moved = sum(t.numel() for t in given) * itemsize
        return Cost(cost.dense_macs, cost.live_macs, moved, cost.convolutions)

    def kinds(self, mode: str) -> tuple[str, ...]:
        return self.example(torch.float32).kinds

    def tolerance(self, kind: str) -> float:
        # Where filters are larger than one pixel multiplications may be saved.
        return SAVING if self.size.rates else DIRECT


@dataclass(frozen=True, kw_only=True)
class OpCase(DeclaredCase):
    """A call of an op in `deeplab_fast.ops`, beside PyTorch's modules."""

    def make_module(self) -> nn.Module:
        return PLAIN[self.op](self.size, self.form).eval()

    def inputs_of(self, step: Step) -> tuple[Tensor, ...]:
        with torch.device("meta"):
            positions = PLAIN[self.op](self.size, self.form).inputs
        return tuple(step.tensors[i] for i in positions)

    def oracle(self, module: nn.Module) -> nn.Module:
        return module.exact()

    def steps(self, dtype: torch.dtype) -> list[Step]:
        return declare.steps(self.op, self.form, self.size, dtype, "meta")

    def fused(self, args: Arguments, dtype: torch.dtype) -> nn.Module:
        return args.module.fused(dtype)

    def cost(self, mode: str, itemsize: int) -> Cost:
        return _COSTS.get(self.op, _layer_cost)(self, mode, itemsize)


def _layer_cost(case: OpCase, mode: str, itemsize: int) -> Cost:
    args = case.setup("meta", torch.float32)
    outputs = args.module(*args.inputs[0]).numel()
    return fused_cost(args.module, args.inputs[0], outputs, itemsize)


def _project_cost(case: OpCase, mode: str, itemsize: int) -> Cost:
    # The pooled branch is a vector: its product is made once an image, not once a pixel.
    s = case.size
    macs = s.n * s.filters * (s.h * s.w * s.c + s.pooled)
    return Cost(macs, macs, _layer_cost(case, mode, itemsize).bytes, 1)


def _argmax_cost(case: OpCase, mode: str, itemsize: int) -> Cost:
    s = case.size
    return upsample_cost(s, logits(s) * itemsize + pixels(s))


def _cross_entropy_cost(case: OpCase, mode: str, itemsize: int) -> Cost:
    s = case.size
    moved = logits(s) * itemsize + pixels(s) * torch.int64.itemsize
    if mode == FORWARD:
        return upsample_cost(s, moved, per_pixel_class=1)
    # Softmax minus one-hot, and one factor for each pixel.
    return upsample_cost(s, moved + logits(s) * itemsize, per_pixel_class=3, gradient=True)


def _confusion_cost(case: OpCase, mode: str, itemsize: int) -> Cost:
    s = case.size
    return upsample_cost(s, logits(s) * itemsize + (pixels(s) + s.c**2) * torch.int64.itemsize)


def _softmax_add_cost(case: OpCase, mode: str, itemsize: int) -> Cost:
    s = case.size
    accumulator = 2 * s.c * pixels(s) * torch.float32.itemsize
    return upsample_cost(s, logits(s) * itemsize + accumulator, per_pixel_class=1)


def _fold_cost(case: OpCase, mode: str, itemsize: int) -> Cost:
    values = sum(prod(layer) for layer in case.size.layers)
    return Cost(0, 0, 2 * values * itemsize, 0)


# Of ops whose PyTorch modules do more than is needed, or have no convolution.
_COSTS: dict[str, Callable[[OpCase, str, int], Cost]] = {
    "aspp_project": _project_cost,
    "upsample_argmax": _argmax_cost,
    "upsample_cross_entropy": _cross_entropy_cost,
    "upsample_confusion": _confusion_cost,
    "upsample_softmax_add": _softmax_add_cost,
    "fold_filters": _fold_cost,
}


class _FusedHead(nn.Module):
    """torchvision's DeepLabHead out of ops."""

    def __init__(self, head: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        aspp, conv, norm, _, classifier = head
        *branches, pooling = aspp.convs
        self.branches = FusedBranches([(b[0], b[1]) for b in branches], dtype)
        self.pooling = FusedConv(pooling[1], pooling[2], dtype)
        self.project = FusedProject(aspp.project[0], aspp.project[1], dtype)
        self.conv = FusedConv(conv, norm, dtype)
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
        from deeplab_fast.models.backbone import IntermediateLayerGetter

        # Features that are the input, in a form that the fast path knows to leave alone: an unknown
        # backbone would get them in the default memory format.
        features = IntermediateLayerGetter(nn.Sequential(nn.Identity()), {"0": "out"})
        self.model = DeepLabV3(features, head).train(head.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_logits(x)


@dataclass(frozen=True, kw_only=True)
class AsppHead(Case):
    """torchvision's head: feature map [n, channels, h, w] to low-resolution logits.

    Modes with a gradient run it as in training, with batch statistics and without dropout, whose
    random masks would differ between layouts.
    """

    kind: ClassVar[str] = "op"

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

    def make_inputs(self, device: str, seed: int) -> tuple[Tensor, ...]:
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

    def steps(self, dtype: torch.dtype) -> list[Step]:
        if self.training:
            return []
        n, h, w, k = self.n, self.h, self.w, _FILTERS
        joined = Size(n, k * (1 + len(self.rates)), h, w, filters=k, pooled=k)
        parts = (
            ("aspp_branches", "plain", Size(n, self.channels, h, w, filters=k, rates=self.rates)),
            ("conv_bn_act", "relu", Size(n, self.channels, 1, 1, filters=k)),
            ("aspp_project", "plain", joined),
            ("conv_bn_act", "relu", Size(n, k, h, w, filters=k, rates=(1,))),
        )
        return [step for part in parts for step in declare.steps(*part, dtype, "meta")]

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


def resnet50_filters() -> tuple[tuple[int, int, int, int], ...]:
    """Shapes of the filters of DeepLabv3 on ResNet-50 that a batch norm follows."""
    found, c = [(64, 3, 7, 7)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            found += [(width, c, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            found += [(4 * width, c, 1, 1)] * (block == 0)
            c = 4 * width
    k = _FILTERS
    branches = [(k, c, 1, 1), *[(k, c, 3, 3)] * 3, (k, c, 1, 1)]
    return (*found, *branches, (k, 5 * k, 1, 1), (k, k, 3, 3))


def _row(op: str, form: str, size: Size, shape: str, suites: Names, **more: Any) -> OpCase:
    return OpCase(op=op, form=form, size=size, shape=shape, suites=suites, **more)


def _rows() -> Iterator[Case]:
    # Logits of DeepLabv3 on VOC at output stride 8, on ADE20K at 16, on Cityscapes at 8.
    for classes, (h, w), (height, width), batches in (
        (21, (65, 65), (520, 520), (1, 16)),
        (150, (33, 33), (513, 513), (1, 16)),
        (19, (128, 256), (1024, 2048), (1, 4)),
    ):
        for n in batches:
            size = Size(n, classes, h, w, height, width)
            shape = shape_name((h, w, classes), (height, width), f"b{n}")
            voc = classes == 21 and n == 1
            small: Names = ("quick", "cpu", "gpu") if voc else ("gpu",)
            on_cpu: Names = ("cpu", "gpu") if n == 1 and not voc else small
            yield _row("upsample_argmax", "plain", size, shape, on_cpu, headline=True)
            suites = small if classes == 19 else on_cpu
            modes = (FORWARD_BACKWARD,) if n == 1 else (FORWARD_BACKWARD, FORWARD)
            given = {"modes": modes, "headline": True}
            yield _row("upsample_cross_entropy", "plain", size, shape, suites, **given)
            # The full-size accumulator of 16 images of 150 classes alone takes 2.5 GB.
            if n == 1:
                given = {"left_out": _NO_QUICK_COMPILE, "headline": voc}
                yield _row("upsample_confusion", "plain", size, shape, small, **given)
                yield _row("upsample_softmax_add", "flip", size, shape, small, **given)
    k = _FILTERS
    for n, h, w, rates, output_stride, suites in (
        (1, 33, 33, OS16_RATES, 16, ("quick", "cpu", "gpu")),
        (1, 65, 65, OS8_RATES, 8, ("cpu", "gpu")),
        (16, 65, 65, OS8_RATES, 8, ("gpu",)),
        (16, 33, 33, OS16_RATES, 16, ("gpu",)),
        (1, 128, 256, OS8_RATES, 8, ("gpu",)),
        (1, 97, 97, OS8_RATES, 8, ("gpu",)),
    ):
        shape = shape_name(f"os{output_stride}", (h, w), f"b{n}")
        yield AsppHead(
            op="aspp_head",
            shape=shape,
            suites=suites,
            left_out=_NO_QUICK_COMPILE,
            headline=h in (33, 65),
            rates=rates,
            n=n,
            h=h,
            w=w,
        )
        size, left_out = Size(n, 2048, h, w, filters=k, rates=rates), _NO_CPU_COMPILE
        yield _row("aspp_branches", "plain", size, shape, suites, left_out=left_out)
        if (h, w) != (97, 97):
            size, left_out = Size(n, 4 * k, h, w, filters=k, pooled=k), _NO_QUICK_COMPILE
            yield _row("aspp_project", "plain", size, shape, suites, left_out=left_out)
    for n, suites, modes in (
        (16, ("gpu",), (FORWARD_BACKWARD, BACKWARD)),
        (2, ("cpu",), (FORWARD_BACKWARD,)),
    ):
        yield AsppHead(
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
    layers = resnet50_filters()
    size = Size(1, sum(layer[0] for layer in layers), 1, 1, layers=layers)
    yield _row("fold_filters", "half", size, "r50", ("gpu",))
    # Layers of DeepLabv3 on ResNet-50 at 520x520 and output stride 8.
    for name, form, c, k, rates, side, suites in (
        ("layer3-3x3d2", "relu", 256, 256, (2,), 65, ("quick", "cpu", "gpu")),
        ("layer4-3x3d4", "relu", 512, 512, (4,), 65, ("cpu", "gpu")),
        ("layer4-1x1-add", "relu+residual", 512, 2048, (), 65, ("cpu", "gpu")),
        ("layer1-3x3", "relu", 64, 64, (1,), 130, ("cpu", "gpu")),
        # Two branches of the ASPP by themselves: does cuDNN's time follow the live taps?
        ("aspp-3x3d12", "relu", 2048, 256, (12,), 65, ("gpu",)),
        ("aspp-3x3d36", "relu", 2048, 256, (36,), 65, ("gpu",)),
    ):
        for n in (1, 16):
            size = Size(n, c, side, side, filters=k, rates=rates)
            shape = shape_name(f"r50-{name}", (side, side), f"b{n}")
            yield _row("conv_bn_act", form, size, shape, suites if n == 1 else ("gpu",))


def declared_cases(which: Iterable[tuple[int, int]]) -> list[Case]:
    """Cases of every op, without an edit here: beside PyTorch's modules in its commonest form where
    there are any, else by its implementations.

    Args:
        which: (form, size) of those that the op is declared with, by number.
    """
    found: list[Case] = []
    for declared in declare.declared_ops():
        op, examples = declared.name, declared.examples
        for form_number, size_number in which:
            if form_number >= len(examples.forms):
                continue
            form, size = examples.forms[form_number], examples.sizes[size_number]
            calls = declare.steps(op, form, size, torch.float32, "meta")
            given = {"op": op, "form": form, "size": size, "suites": ()}
            if op in PLAIN and form_number == 0:
                # One of several functions gives the gradient.
                modes = (FORWARD, FORWARD_BACKWARD) if calls[0].method else (FORWARD,)
                found.append(OpCase(shape=f"{form} {size}", modes=modes, **given))
                continue
            for call in range(len(calls)):
                shape = f"{form} {size}" + f" call {call}" * (len(calls) > 1)
                found.append(DeclaredCase(shape=shape, call=call, **given))
    return found


for _case in _rows():
    register_case(_case)
