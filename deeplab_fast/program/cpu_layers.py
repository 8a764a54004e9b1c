"""The layers of a program in fp32 on the CPU: weights are prepared when it is made."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _ext
from ..dispatch import limits
from ..ops.prepared import Plan, PreparedConv, activate_
from ..ops.prepared_aspp import PreparedAspp, PreparedProject
from ..ops.prepared_bf16 import Bf16Conv
from ..ops.prepared_bf16_aspp import Bf16Aspp, Bf16Project
from ..ops.prepared_inverted_residual import Folded, PreparedInvertedResidual
from . import functional, match
from .functional import Function, cast
from .layers import (
    AtenLayer,
    ConvSpec,
    InvertedResidualSpec,
    Layer,
    MapLayer,
    PlainLayer,
    Program,
    SamePadding,
    ScalingLayer,
    SqueezeSpec,
    spread,
)
from .staleness import is_dense

Prepared = (
    PreparedConv
    | PreparedAspp
    | PreparedProject
    | PreparedInvertedResidual
    | Bf16Conv
    | Bf16Aspp
    | Bf16Project
)


class CpuForms:
    """`inference.Forms` of fp32 weights on the CPU."""

    what = "dense float32 on the CPU"
    keeps_values = True

    def takes(self, tensor: Tensor) -> bool:
        return is_dense(tensor) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"

    takes_vector = takes

    def conv(self, spec: ConvSpec, max_extra_bytes: int | None) -> MapLayer:
        return ConvLayer(spec, max_extra_bytes)

    def aspp(self, name: str, specs: Sequence[ConvSpec], max_extra_bytes: int | None) -> MapLayer:
        return AsppLayer(name, specs, max_extra_bytes)

    def pooled(self, spec: ConvSpec) -> Layer:
        return PooledLayer(spec)

    def project(self, spec: ConvSpec, channels: int, max_extra_bytes: int | None) -> MapLayer:
        wide = ProjectLayer if spec.is_pointwise else WideProjectLayer
        return wide(spec, channels, max_extra_bytes)

    def squeeze_excitation(self, spec: SqueezeSpec) -> ScalingLayer:
        return SqueezeExcitationLayer(spec)

    def inverted_residual(
        self, spec: InvertedResidualSpec, max_extra_bytes: int | None
    ) -> MapLayer | None:
        # Forms whose convolutions are others than those here have no such block.
        own = type(self).conv is CpuForms.conv
        return InvertedResidualLayer(spec, max_extra_bytes) if own else None

    def free(self, name: str, module: nn.Module) -> Layer:
        if MaxPoolLayer.takes(module):
            return MaxPoolLayer(name, module)
        return AtenLayer(name, module)

    def plain(self, name: str, module: nn.Module) -> PlainLayer:
        return PlainLayer(name, module)

    def finish(self, model: Any, program: Program) -> None:
        pass


class _Layer(Layer):
    def __init__(
        self, name: str, weights: Sequence[Tensor] = (), prepared: Sequence[Prepared] = ()
    ) -> None:
        super().__init__(name, weights)
        self._prepared = tuple(prepared)

    @property
    def extra_bytes(self) -> int:
        return sum(each.extra_bytes for each in self._prepared)


class ConvLayer(_Layer, MapLayer):
    """act(scale * conv(x) + shift [+ residual]).

    Attributes:
        kind: of the convolutions.
        convs: one, or one for each padding that the size of a map may ask for.
    """

    kind: type[PreparedConv] | type[Bf16Conv] = PreparedConv

    def __init__(self, spec: ConvSpec, max_extra_bytes: int | None) -> None:
        kernel = spec.weight.shape[2:]
        same = SamePadding(kernel, spec.stride, spec.dilation)
        self._same = same if spec.padding == "same" and same.can_be_uneven else None
        if self._same is not None and max_extra_bytes is not None:
            max_extra_bytes //= 2
        scale, shift = affine(spec)

        def prepare(padding: int | Sequence[int]) -> PreparedConv | Bf16Conv:
            return self.kind(
                spec.weight,
                scale,
                shift,
                stride=spec.stride,
                padding=padding,
                dilation=spec.dilation,
                groups=spec.groups,
                act=spec.act,
                max_extra_bytes=max_extra_bytes,
            )

        self._conv = prepare(same.halves if isinstance(spec.padding, str) else spec.padding)
        self._uneven = None if self._same is None else prepare(0)
        # A photo is gathered from as it lies.
        self.takes_any_format = self._conv.takes_any_format
        both = (self._conv, self._uneven)
        self.convs = [conv for conv in both if conv is not None]
        super().__init__(spec.name, [spec.weight] * len(self.convs), self.convs)

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        sides = None if self._same is None else self._same.sides(x.shape)
        conv = self._conv
        if sides is not None:
            assert self._uneven is not None
            conv, x = self._uneven, F.pad(x, sides)
        return conv(x, residual, out=out, overwrite_residual=self.overwrites_residual)

    def function(self) -> Function:
        conv = functional.Conv.of(self._conv)
        same = self._same

        def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
            return conv(x, residual, None if same is None else same.sides(x.shape))

        return run

    def writes_into(self, shape: Sequence[int], residual: object = None) -> bool:
        conv, shape = self._at(shape)
        return conv.writes_into(shape)

    def output_shape(self, shape: Sequence[int], residual: object = None) -> tuple[int, ...]:
        conv, shape = self._at(shape)
        size = conv._output_size(shape[2], shape[3])
        return (shape[0], conv.out_channels, *size)

    def plans(self, shape: Sequence[int], residual: object = None) -> tuple[Plan, ...]:
        conv, shape = self._at(shape)
        return (conv.plan(shape),)

    def _at(self, shape: Sequence[int]) -> tuple[PreparedConv | Bf16Conv, tuple[int, ...]]:
        sides = None if self._same is None else self._same.sides(shape)
        if sides is None:
            return self._conv, tuple(shape)
        assert self._uneven is not None
        left, right, top, bottom = sides
        n, c, height, width = shape
        return self._uneven, (n, c, height + top + bottom, width + left + right)


class InvertedResidualLayer(_Layer, MapLayer):
    """project(scaled(depthwise(expand(x)))), with x added where the block is a residual one."""

    def __init__(self, spec: InvertedResidualSpec, max_extra_bytes: int | None) -> None:
        depthwise, squeeze = spec.depthwise, spec.squeeze
        same = SamePadding(depthwise.weight.shape[2:], depthwise.stride, depthwise.dilation)
        self._same = same if depthwise.padding == "same" and same.can_be_uneven else None
        self._adds = spec.adds
        padding = same.halves if isinstance(depthwise.padding, str) else depthwise.padding
        rows_columns = (depthwise.stride, padding, depthwise.dilation)
        stride, padding, dilation = ((rows, columns) for rows, columns in rows_columns)
        self._block = PreparedInvertedResidual(
            None if spec.expand is None else _folded(spec.expand),
            _folded(depthwise),
            _folded(spec.project),
            stride=stride,
            padding=padding,
            dilation=dilation,
            squeeze=None if squeeze is None else _Squeeze(squeeze),
            max_extra_bytes=max_extra_bytes,
        )
        super().__init__(spec.name, [conv.weight for conv in spec.convs], [self._block])

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self._block(x, x if self._adds else None, out=out, sides=self._sides(x.shape))

    def function(self) -> Function:
        first, depthwise, last = (
            None if conv is None else functional.Conv.of(conv) for conv in self._block.parts
        )
        assert depthwise is not None and last is not None
        squeeze = self._block.squeeze

        def run(x: Tensor) -> Tensor:
            y = x if first is None else first(x)
            y = depthwise(y, None, self._sides(x.shape))
            if squeeze is not None:
                y = y * squeeze(y.mean((2, 3)))[..., None, None]
            return last(y, x if self._adds else None)

        return run

    def writes_into(self, shape: Sequence[int]) -> bool:
        return self._block.writes_into(shape)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return self._block.output_shape(shape, self._sides(shape))

    def plans(self, shape: Sequence[int]) -> tuple[Plan, ...]:
        return self._block.plan(shape, self._sides(shape))

    def _sides(self, shape: Sequence[int]) -> list[int] | None:
        return None if self._same is None else self._same.sides(shape)


class AsppLayer(_Layer, MapLayer):
    """The branches of an ASPP: [N, C, H, W] -> [N, sum K, H, W]."""

    kind: type[PreparedAspp] | type[Bf16Aspp] = PreparedAspp

    def __init__(self, name: str, specs: Sequence[ConvSpec], max_extra_bytes: int | None) -> None:
        affines = [affine(s) for s in specs]
        self._aspp = self.kind(
            [s.weight for s in specs],
            [_or(scale, s, 1.0) for s, (scale, _) in zip(specs, affines, strict=True)],
            [_or(shift, s, 0.0) for s, (_, shift) in zip(specs, affines, strict=True)],
            [s.dilation[0] for s in specs],
            max_extra_bytes=max_extra_bytes,
        )
        super().__init__(name, [s.weight for s in specs], [self._aspp])

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self._aspp(x, out=out)

    def function(self) -> Function:
        convs = [functional.Conv.of(branch) for branch in self._aspp.branches]
        return functional.branches(convs, [branch.dilation[0] for branch in self._aspp.branches])

    def writes_into(self, shape: Sequence[int]) -> bool:
        return True

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[0], self._aspp.out_channels, *shape[2:])

    def plans(self, shape: Sequence[int]) -> tuple[Plan, ...]:
        return self._aspp.plan(shape)


class ProjectLayer(_Layer, MapLayer):
    """The projection of the branches and the pooled vector, without their concat."""

    kind: type[PreparedProject] | type[Bf16Project] = PreparedProject

    def __init__(self, spec: ConvSpec, branch_channels: int, max_extra_bytes: int | None) -> None:
        self._project = self.kind(
            spec.weight,
            *affine(spec),
            branch_channels=branch_channels,
            act=spec.act,
            max_extra_bytes=max_extra_bytes,
        )
        super().__init__(spec.name, [spec.weight], [self._project])

    def __call__(self, branches: Tensor, pooled: Tensor, out: Tensor | None = None) -> Tensor:
        return self._project(branches, pooled, out=out)

    def function(self) -> Function:
        return functional.project(*self._project.folded(), self._project.act)

    def writes_into(self, branches: Sequence[int], pooled: object) -> bool:
        return True

    def output_shape(self, branches: Sequence[int], pooled: object) -> tuple[int, ...]:
        return (branches[0], self._project.out_channels, *branches[2:])

    def plans(self, branches: Sequence[int], pooled: object) -> tuple[Plan, ...]:
        return (self._project.plan(branches),)


class WideProjectLayer(_Layer, MapLayer):
    """A projection with a kernel above 1x1: the pooled vector's part is a map of few values.

    Zero padding makes that part differ at the border only. It is computed on a map of one kernel's
    size, whose middle row and column are then repeated, and enters as a residual.
    """

    kind: type[PreparedConv] | type[Bf16Conv] = PreparedConv

    def __init__(self, spec: ConvSpec, branch_channels: int, max_extra_bytes: int | None) -> None:
        def prepare(
            part: ConvSpec, kind: type[PreparedConv] | type[Bf16Conv]
        ) -> PreparedConv | Bf16Conv:
            bound = max_extra_bytes
            if bound is not None:
                bound = bound * part.weight.shape[1] // spec.weight.shape[1]
            # A square odd kernel.
            padding = part.weight.shape[2] // 2
            return kind(
                part.weight, *affine(part), padding=padding, act=part.act, max_extra_bytes=bound
            )

        to_branches, to_pooled = spec.split(branch_channels)
        self._branches = prepare(to_branches, self.kind)
        self._pooled = prepare(to_pooled, PreparedConv)
        self._kernel = tuple(spec.weight.shape[2:])
        super().__init__(spec.name, [spec.weight], [self._branches, self._pooled])

    def __call__(self, branches: Tensor, pooled: Tensor, out: Tensor | None = None) -> Tensor:
        height, width = branches.shape[2:]
        rows, columns = self._kernel
        constant = pooled[:, :, None, None].expand(-1, -1, min(rows, height), min(columns, width))
        few = spread(self._pooled(constant).to(self.result_dtype), rows, 2, height)
        return self._branches(branches, spread(few, columns, 3, width), out=out)

    def function(self) -> Function:
        return functional.wide_project(functional.Conv.of(self._branches), self._pooled.folded()[0])

    def writes_into(self, branches: Sequence[int], pooled: object) -> bool:
        return self._branches.writes_into(branches)

    def output_shape(self, branches: Sequence[int], pooled: object) -> tuple[int, ...]:
        return (branches[0], self._branches.out_channels, *branches[2:])

    def plans(self, branches: Sequence[int], pooled: object) -> tuple[Plan, ...]:
        return (self._branches.plan(branches),)


class PooledLayer(_Layer):
    """act(linear(mean of x over its pixels)): [N, C, H, W] -> [N, K]."""

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__(spec.name, [spec.weight])
        self._linear = _Linear(spec)

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x.mean((2, 3)))

    def function(self) -> Function:
        return lambda x: self._linear(means(x))

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[0], self._linear.weight.shape[1])


class SqueezeExcitationLayer(_Layer, ScalingLayer):
    """Squeeze-excitation, in place on x where it is the program's own."""

    def __init__(self, spec: SqueezeSpec) -> None:
        super().__init__(spec.name, [spec.fc1.weight, spec.fc2.weight])
        self._factors = _Squeeze(spec)

    def __call__(self, x: Tensor) -> Tensor:
        scale = self._factors(x.mean((2, 3)))[:, :, None, None]
        return x.mul_(scale) if self.in_place else x * scale

    def function(self) -> Function:
        return lambda x: x * cast(self._factors(means(x))[..., None, None], x.dtype)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)


class _Squeeze:
    """The factors of channels by their means: gate(fc2(hidden(fc1(means))))."""

    def __init__(self, spec: SqueezeSpec) -> None:
        self._fc1, self._fc2 = _Linear(spec.fc1), _Linear(spec.fc2)
        self._hidden, self._gate = copy.deepcopy(spec.hidden), copy.deepcopy(spec.gate)

    def __call__(self, means: Tensor) -> Tensor:
        vector = self._fc1(means)
        return self._gate(self._fc2(vector if self._hidden is None else self._hidden(vector)))


class MaxPoolLayer(AtenLayer):
    """Maxima over windows, without the indices that PyTorch's function gives too."""

    def __init__(self, name: str, module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(name, module)
        self.result_dtype = dtype

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether it stands for a module."""
        return (
            type(module) is nn.MaxPool2d
            and not module.return_indices
            and not limits.extension(_ext.CPU, "_max_pool_cpu")
        )

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        pool = self._module
        if out is None:
            out = torch.empty(
                self.output_shape(x.shape), dtype=x.dtype, memory_format=torch.channels_last
            )
        stride = pool.kernel_size if pool.stride is None else pool.stride
        options = (pool.kernel_size, stride, pool.padding, pool.dilation)
        torch.ops.deeplab_fast._max_pool_cpu(
            x.contiguous(memory_format=torch.channels_last), *map(match.pair, options), out
        )
        return out

    def function(self) -> Function:
        return self._module

    def writes_into(self, *shapes: object) -> bool:
        return True


class _Linear:
    """A 1x1 convolution on vectors [N, C], with its batch norm and activation."""

    def __init__(self, spec: ConvSpec) -> None:
        scale, shift = affine(spec)
        with torch.inference_mode(False), torch.no_grad():
            weight = spec.weight.detach()[:, :, 0, 0]
            if scale is not None:
                weight = weight * scale[:, None]
            self.weight = weight.t().clone(memory_format=torch.contiguous_format)
            self.bias = _or(shift, spec, 0.0).clone()
        self.act = spec.act

    def __call__(self, x: Tensor) -> Tensor:
        return activate_(torch.addmm(self.bias, x, self.weight), self.act)


def means(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C], the means over the pixels in fp32."""
    return x.mean((2, 3), dtype=torch.float32)


def affine(spec: ConvSpec) -> tuple[Tensor | None, Tensor | None]:
    """scale = weight / sqrt(variance + eps), shift = bias + (conv's bias - mean) * scale, [K] each.

    Computed in fp64 and rounded once; None for one and zero.
    """
    norm = spec.norm
    if norm is None:
        return None, spec.bias
    scale = torch.rsqrt(norm.variance.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = None
    if norm.mean is not None or spec.bias is not None:
        mean = 0.0 if norm.mean is None else norm.mean.double()
        shift = ((0.0 if spec.bias is None else spec.bias.double()) - mean) * scale
    if norm.bias is not None:
        shift = norm.bias.double() if shift is None else shift + norm.bias.double()
    return scale.float(), None if shift is None else shift.float()


def _folded(spec: ConvSpec) -> Folded:
    return Folded(spec.weight, *affine(spec), spec.act)


def _or(value: Tensor | None, spec: ConvSpec, default: float) -> Tensor:
    return spec.weight.new_full((spec.weight.shape[0],), default) if value is None else value
