"""The layers of a program in int8 on the CPU: most convolutions of 8-bit maps, the rest in fp32.

In 8 bits run convolutions and depthwise convolutions of more than 32 channels whose input has a
known range. The first convolution, the last of each head, narrower ones, pooled vectors and
squeeze-excitation stay in fp32: together they are a small part of the time, and of a segmentation
model on CamVid they gave 0.2 points of mIoU and 0.4 % of the labels. Inverted residuals that are
projected to few channels stay whole: in strips in fp32 two of an EfficientNet-Lite0 at 520x520 took
10.8 ms, their convolutions in 8 bits 14.1 ms (one thread of an AMD EPYC of the third generation).
3x3 convolutions that tiles run by fewer multiplications stay in fp32 on processors that add
products in 16 bits: there tiles in fp32 take 0.65 of the time of 8 bits.

What is between two layers is a `Quantised` map where the one makes and the other reads 8 bits, else
an fp32 map. `Int8Forms.finish` decides which, once the whole program is known.

An 8-bit map cannot hold nan or infinity. A layer that is given an fp32 map with one, where it reads
8 bits, computes this call in fp32 with its weights and gives an fp32 map on; so do those behind it.
That goes for all images of a batch.

A portable program is made to be exported for other machines: what runs in 8 bits depends on the
model alone, and weights have 7 bits, whose sums of two products any processor holds in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ext
from ..dispatch import limits
from ..ops.prepared import Plan, PreparedConv, empty
from ..ops.quantized import (
    Affine,
    Quantised,
    QuantizedConv,
    empty_bytes,
    quantise_into,
    quantised,
    weight_limit,
)
from . import functional
from .calibration import Calibration
from .cpu_layers import (
    AsppLayer,
    ConvLayer,
    CpuForms,
    InvertedResidualLayer,
    PooledLayer,
    ProjectLayer,
    affine,
)
from .functional import Function, Map
from .layers import ConvSpec, InvertedResidualSpec, Layer, MapLayer, Program, SamePadding
from .network import Network

# Convolutions of at most so many channels stay in fp32.
NARROW = 32
# 2 * 255 * 64 fits into 16 bits.
_PORTABLE_LIMIT = 64


class Int8Forms(CpuForms):
    """`inference.Forms` of int8 on the CPU.

    Args:
        calibration: the ranges of the model's maps.
        portable: for export to other machines: nothing depends on this one's processor.
    """

    def __init__(self, calibration: Calibration, portable: bool = False) -> None:
        self._calibration, self._portable = calibration, portable

    def conv(self, spec: ConvSpec, max_extra_bytes: int | None) -> MapLayer:
        return Int8ConvLayer(spec, max_extra_bytes, self._portable)

    def aspp(self, name: str, specs: Sequence[ConvSpec], max_extra_bytes: int | None) -> MapLayer:
        return Int8AsppLayer(name, specs, max_extra_bytes, self._portable)

    def inverted_residual(
        self, spec: InvertedResidualSpec, max_extra_bytes: int | None
    ) -> MapLayer | None:
        if self._portable or spec.project.weight.shape[0] > NARROW:
            return None
        # Ranges are known by convolutions.
        return Int8BlockLayer(replace(spec, name=spec.project.name), max_extra_bytes)

    def pooled(self, spec: ConvSpec) -> Layer:
        return Int8PooledLayer(spec)

    def project(self, spec: ConvSpec, channels: int, max_extra_bytes: int | None) -> MapLayer:
        if spec.is_pointwise:
            return Int8ProjectLayer(spec, channels, max_extra_bytes, self._portable)
        return super().project(spec, channels, max_extra_bytes)

    def finish(self, model: Network, program: Program) -> None:
        """Decide which layers run in 8 bits, and prepare them.

        Raises:
            CalibrationError: the model has other weights than were calibrated.
        """
        self._calibration.check(model)
        # What reads a result is known before what makes it.
        for call in reversed(_calls(program)):
            if isinstance(call.layer, _Int8Layer):
                sources = [self._affine(source) for source in call.sources]
                call.layer.prepare(sources, self._result(call), call.is_last)

    def _affine(self, call: _Call | None) -> Affine | None:
        """Of a layer's result, None where its range is not known."""
        if call is None or call.layer is None:
            return None
        try:
            return Affine.of_range(*self._calibration.ranges[call.layer.name])
        except (KeyError, ValueError):
            return None

    def _result(self, call: _Call) -> Affine | None:
        """Of a layer's result in 8 bits, None where it is to be in fp32."""
        takes = [
            use.layer.takes_bytes(place) if isinstance(use.layer, _Int8Layer) else False
            for use, place in call.uses
        ]
        if call.is_result or False in takes or True not in takes:
            return None
        return self._affine(call)


@dataclass(eq=False)
class _Call:
    """A layer's call in a program; without a layer the program's input.

    Attributes:
        sources: what made its inputs, None for an input that is left out.
        uses: who reads its result, as which input.
        is_result: its result is one of the program's.
    """

    layer: Layer | None
    sources: list[_Call | None] = field(default_factory=list)
    uses: list[tuple[_Call, int]] = field(default_factory=list)
    is_result: bool = False

    @property
    def is_last(self) -> bool:
        """Nothing comes between it and a result but sums."""
        return self.is_result or any(place == 1 and use.is_last for use, place in self.uses)

    def __getitem__(self, name: str) -> _Call:
        # A module that is run as it is may give features by name.
        return self


def _calls(program: Program) -> list[_Call]:
    """The calls of a program, in the order in which they run."""
    calls: list[_Call] = []

    def run(layer: Layer, *sources: Any) -> Any:
        call = _Call(layer, list(sources))
        for place, source in enumerate(sources):
            if source is not None:
                source.uses.append((call, place))
        calls.append(call)
        return call

    results: dict[str, Any] = program.maps(_Call(None), run)
    for call in results.values():
        call.is_result = True
    return calls


class _Int8Layer(MapLayer):
    """A layer that may read and make maps of 8 bits."""

    def takes_bytes(self, place: int) -> bool | None:
        """Whether an input is wanted in 8 bits; None where either will do."""

    def prepare(self, sources: Sequence[Affine | None], into: Affine | None, last: bool) -> None:
        """Prepare the weights.

        Args:
            sources: of the inputs in 8 bits, None where that is not possible.
            into: of the result, if the layer runs in 8 bits and shall give them; None for fp32.
            last: it gives logits.
        """


class Int8ConvLayer(_Int8Layer):
    """act(scale * conv(x) + shift [+ residual])."""

    def __init__(self, spec: ConvSpec, max_extra_bytes: int | None, portable: bool = False) -> None:
        super().__init__(spec.name)
        self._spec: ConvSpec | None = spec
        self._max_extra_bytes, self._portable = max_extra_bytes, portable
        self._fp32: ConvLayer | None = None
        self._conv: QuantizedConv | None = None
        self._same: SamePadding | None = None
        self._sources: list[Affine | None] = []
        self._into: Affine | None = None

    def takes_bytes(self, place: int) -> bool | None:
        if self._conv is None:
            return None
        return place == 0 or (True if self._into is not None else None)

    def prepare(self, sources: Sequence[Affine | None], into: Affine | None, last: bool) -> None:
        spec, self._spec = self._spec, None
        assert spec is not None
        self._sources = list(sources)
        source = sources[0]
        sums = len(sources) > 1
        suits = source is not None and not last and _suits(spec, self._portable)
        if source is None or not suits or (sums and spec.act not in (None, "relu")):
            self._fp32 = ConvLayer(spec, self._max_extra_bytes)
            self._fp32.overwrites_residual = self.overwrites_residual
            self.held = self._fp32.held
            return
        # A summand is read in the precision of the sum.
        self._into = None if sums and sources[1] is None else into
        padding = spec.padding
        if isinstance(padding, str):
            same = SamePadding(spec.weight.shape[2:], spec.stride, spec.dilation)
            self._same = same if same.can_be_uneven else None
            padding = (0, 0) if same.can_be_uneven else same.halves
        self._conv = _quantized(spec, source, padding, self._portable)
        self.held = self._conv.held

    def __call__(self, x: Map, residual: Map | None = None, out: Tensor | None = None) -> Any:
        if self._fp32 is not None:
            return self._fp32(_fp32(x), None if residual is None else _fp32(residual), out)
        assert self._conv is not None
        q = _bytes(x, self._sources[0])
        total: Map | None = residual
        if residual is not None:
            total = _fp32(residual) if self._into is None else _bytes(residual, self._sources[1])
        if q is None or (residual is not None and total is None):
            residual = None if residual is None else _fp32(residual)
            return _in_fp32(self._conv)(self._padded(_fp32(x), 0), residual)
        q = Quantised(self._padded(q.values, q.affine.zero_point), q.affine)
        overwrite = self.overwrites_residual or total is not residual
        return self._conv(q, total, into=self._into, overwrite_residual=overwrite)

    def function(self) -> Function:
        if self._fp32 is not None:
            return _of_fp32(self._fp32.function())
        assert self._conv is not None
        conv, same, into = functional.QuantizedConv(self._conv), self._same, self._into

        def run(x: Map, residual: Map | None = None) -> Map:
            total = residual
            if total is not None and into is not None:
                assert self._sources[1] is not None
                total = functional.quantised(total, self._sources[1])
            sides = None if same is None else self._sides(x.shape)
            summand = None if total is None else functional.dequantised(total)
            return conv(x, summand, into=into, sides=sides)

        return run

    def writes_into(self, shape: Sequence[int], residual: Sequence[int] | None = None) -> bool:
        # The residual may be no fp32 map, whose memory could take the result.
        return self._fp32 is not None and residual is None and self._fp32.writes_into(shape)

    def output_shape(self, shape: Sequence[int], residual: object = None) -> tuple[int, ...]:
        if self._fp32 is not None:
            return self._fp32.output_shape(shape)
        assert self._conv is not None
        return self._conv.output_shape(self._padded_shape(shape))

    def plans(self, shape: Sequence[int], residual: object = None) -> tuple[Plan, ...]:
        if self._fp32 is not None:
            return self._fp32.plans(shape)
        assert self._conv is not None
        return (self._conv.plan(self._padded_shape(shape)),)

    @property
    def extra_bytes(self) -> int:
        prepared = self._fp32 or self._conv
        return 0 if prepared is None else prepared.extra_bytes

    def _sides(self, shape: Sequence[int]) -> list[int]:
        assert self._same is not None
        rows, columns = self._same.halves
        return self._same.sides(shape) or [columns, columns, rows, rows]

    def _padded(self, x: Tensor, value: int) -> Tensor:
        return x if self._same is None else F.pad(x, self._sides(x.shape), value=value)

    def _padded_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        if self._same is None:
            return tuple(shape)
        left, right, top, bottom = self._sides(shape)
        return (*shape[:2], shape[2] + top + bottom, shape[3] + left + right)


class Int8BlockLayer(InvertedResidualLayer, _Int8Layer):
    """An inverted residual that is projected to few channels, in fp32."""

    def __call__(self, x: Map, out: Tensor | None = None) -> Tensor:
        return super().__call__(_fp32(x), out)

    def function(self) -> Function:
        return _of_fp32(super().function())


class Int8AsppLayer(_Int8Layer):
    """The branches of an ASPP: [N, C, H, W] -> [N, sum K, H, W]."""

    def __init__(
        self,
        name: str,
        specs: Sequence[ConvSpec],
        max_extra_bytes: int | None,
        portable: bool = False,
    ) -> None:
        super().__init__(name)
        self._specs: Sequence[ConvSpec] = specs
        self._max_extra_bytes, self._portable = max_extra_bytes, portable
        self._fp32: AsppLayer | None = None
        self._branches: list[QuantizedConv | PreparedConv] = []
        self._source: Affine | None = None
        self._into: Affine | None = None

    def takes_bytes(self, place: int) -> bool | None:
        return True if self._fp32 is None else None

    def prepare(self, sources: Sequence[Affine | None], into: Affine | None, last: bool) -> None:
        specs, self._specs = self._specs, ()
        self._source = sources[0]
        if self._source is None or not any(_suits(spec, self._portable) for spec in specs):
            self._fp32 = AsppLayer(self.name, specs, self._max_extra_bytes)
            self.held = self._fp32.held
            return
        self._into = into
        self._branches = [self._branch(spec, self._source, len(specs)) for spec in specs]
        self.held = sum(
            branch.held if isinstance(branch, QuantizedConv) else spec.weight.nbytes
            for spec, branch in zip(specs, self._branches, strict=True)
        )

    def _branch(self, spec: ConvSpec, source: Affine, count: int) -> QuantizedConv | PreparedConv:
        padding = spec.dilation[0] * (spec.weight.shape[-1] // 2)
        if _suits(spec, self._portable):
            return _quantized(spec, source, padding, self._portable)
        bound = self._max_extra_bytes
        return PreparedConv(
            spec.weight,
            *affine(spec),
            padding=padding,
            dilation=spec.dilation,
            max_extra_bytes=None if bound is None else bound // count,
            # As in `PreparedAspp`: few layers follow.
            coarse=True,
        )

    def __call__(self, x: Map, out: Tensor | None = None) -> Any:
        if self._fp32 is not None:
            return self._fp32(_fp32(x), out)
        q = _bytes(x, self._source)
        if q is not None and self._into is not None:
            found = self._in_bytes(x, q, self._into)
            if found is not None:
                return found
        y = empty(self.output_shape(x.shape))
        whole = None if all(isinstance(b, QuantizedConv) for b in self._branches) else _fp32(x)
        offset = 0
        for branch in self._branches:
            if isinstance(branch, PreparedConv):
                branch(_fp32(x) if whole is None else whole, out=y, channel_offset=offset)
            elif q is None:
                _in_fp32(branch)(_fp32(x), out=y, channel_offset=offset)
            else:
                y.narrow(1, offset, branch.out_channels).copy_(branch(q))
            offset += branch.out_channels
        return y

    def function(self) -> Function:
        if self._fp32 is not None:
            return _of_fp32(self._fp32.function())
        into = self._into
        convs = [
            functional.QuantizedConv(branch)
            if isinstance(branch, QuantizedConv)
            else functional.Conv.of(branch)
            for branch in self._branches
        ]
        source = self._source
        assert source is not None

        def run(x: Map) -> Map:
            q = functional.quantised(x, source)
            maps: list[Map] = []
            for conv in convs:
                if isinstance(conv, functional.QuantizedConv):
                    maps.append(conv(q, into=into))
                else:
                    y = conv(functional.dequantised(x))
                    maps.append(y if into is None else functional.quantised(y, into))
            y = torch.cat([y.values if isinstance(y, Quantised) else y for y in maps], 1)
            return y if into is None else Quantised(y, into)

        return run

    def _in_bytes(self, x: Map, q: Quantised, into: Affine) -> Quantised | None:
        """The branches in 8 bits, None where one is not finite."""
        y = empty_bytes(self.output_shape(x.shape))
        whole = None
        offset = 0
        for branch in self._branches:
            if isinstance(branch, QuantizedConv):
                y.narrow(1, offset, branch.out_channels).copy_(branch(q, into=into).values)
            else:
                whole = _fp32(x) if whole is None else whole
                if not quantise_into(branch(whole), into, y, offset):
                    return None
            offset += branch.out_channels
        return Quantised(y, into)

    def writes_into(self, shape: Sequence[int]) -> bool:
        return self._fp32 is not None and self._fp32.writes_into(shape)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        if self._fp32 is not None:
            return self._fp32.output_shape(shape)
        return (shape[0], sum(b.out_channels for b in self._branches), *shape[2:])

    def plans(self, shape: Sequence[int]) -> tuple[Plan, ...]:
        if self._fp32 is not None:
            return self._fp32.plans(shape)
        return tuple(branch.plan(shape) for branch in self._branches)

    @property
    def extra_bytes(self) -> int:
        if self._fp32 is not None:
            return self._fp32.extra_bytes
        return sum(branch.extra_bytes for branch in self._branches)


class Int8ProjectLayer(_Int8Layer):
    """The projection of the branches and the pooled vector, which enters as a shift."""

    def __init__(
        self,
        spec: ConvSpec,
        branch_channels: int,
        max_extra_bytes: int | None,
        portable: bool = False,
    ) -> None:
        super().__init__(spec.name)
        self._spec: ConvSpec | None = spec
        self._channels = branch_channels
        self._max_extra_bytes, self._portable = max_extra_bytes, portable
        self._fp32: ProjectLayer | None = None
        self._conv: QuantizedConv | None = None
        self._to_pooled: Tensor | None = None
        self._source: Affine | None = None
        self._into: Affine | None = None

    def takes_bytes(self, place: int) -> bool | None:
        if place == 1:
            return False
        return None if self._conv is None else True

    def prepare(self, sources: Sequence[Affine | None], into: Affine | None, last: bool) -> None:
        spec, self._spec = self._spec, None
        assert spec is not None
        source = sources[0]
        if last or source is None or not _suits(spec, self._portable):
            self._fp32 = ProjectLayer(spec, self._channels, self._max_extra_bytes)
            self.held = self._fp32.held
            return
        self._source, self._into = source, into
        to_branches, to_pooled = spec.split(self._channels)
        self._conv = _quantized(to_branches, source, 0, self._portable)
        scale, _ = affine(to_pooled)
        with torch.inference_mode(False), torch.no_grad():
            weight = to_pooled.weight.detach()[:, :, 0, 0]
            weight = weight if scale is None else weight * scale[:, None]
            self._to_pooled = weight.t().clone(memory_format=torch.contiguous_format)
        self.held = self._conv.held + self._to_pooled.nbytes

    def __call__(self, branches: Map, pooled: Tensor, out: Tensor | None = None) -> Any:
        if self._fp32 is not None:
            return self._fp32(_fp32(branches), pooled, out)
        assert self._conv is not None and self._to_pooled is not None
        shifts = torch.addmm(self._conv.shift, pooled, self._to_pooled)
        q = _bytes(branches, self._source)
        if q is None or not math.isfinite(shifts.sum().item()):
            return _in_fp32(self._conv).shifted(_fp32(branches), shifts)
        return self._conv(q, into=self._into, shift=shifts)

    def function(self) -> Function:
        if self._fp32 is not None:
            return _of_fp32(self._fp32.function())
        assert self._conv is not None and self._to_pooled is not None
        conv, to_pooled = functional.QuantizedConv(self._conv), self._to_pooled

        def run(branches: Map, pooled: Tensor) -> Map:
            shifts = torch.addmm(conv.shift, pooled, to_pooled)
            return conv(branches, into=self._into, shifts=shifts)

        return run

    def writes_into(self, branches: Sequence[int], pooled: object) -> bool:
        return self._fp32 is not None and self._fp32.writes_into(branches, pooled)

    def output_shape(self, branches: Sequence[int], pooled: object) -> tuple[int, ...]:
        if self._fp32 is not None:
            return self._fp32.output_shape(branches, pooled)
        assert self._conv is not None
        return self._conv.output_shape(branches)

    def plans(self, branches: Sequence[int], pooled: object) -> tuple[Plan, ...]:
        if self._fp32 is not None:
            return self._fp32.plans(branches, pooled)
        assert self._conv is not None
        return (self._conv.plan(branches),)

    @property
    def extra_bytes(self) -> int:
        prepared = self._fp32 or self._conv
        return 0 if prepared is None else prepared.extra_bytes


class Int8PooledLayer(PooledLayer):
    """act(linear(mean of x over its pixels)): [N, C, H, W] in either precision -> [N, K]."""

    def __call__(self, x: Map) -> Tensor:
        return self._linear(x.mean() if isinstance(x, Quantised) else x.mean((2, 3)))

    def function(self) -> Function:
        return _of_fp32(super().function())


def _fp32(x: Map) -> Tensor:
    return x.dequantised() if isinstance(x, Quantised) else x


def _of_fp32(function: Function) -> Function:
    """A function of fp32 maps, of maps in either precision."""
    return lambda *maps: function(*(None if x is None else functional.dequantised(x) for x in maps))


def _bytes(x: Map, affine: Affine | None) -> Quantised | None:
    """A map in 8 bits, None where it is not finite."""
    assert affine is not None
    return x if isinstance(x, Quantised) else quantised(x, affine)


def _quantized(
    spec: ConvSpec, source: Affine, padding: int | Sequence[int], portable: bool
) -> QuantizedConv:
    return QuantizedConv(
        spec.weight,
        *affine(spec),
        source=source,
        stride=spec.stride,
        padding=padding,
        dilation=spec.dilation,
        groups=spec.groups,
        act=spec.act,
        limit=_PORTABLE_LIMIT if portable else None,
    )


def _in_fp32(conv: QuantizedConv) -> PreparedConv:
    """Its weights for one call on an fp32 map."""
    return PreparedConv(
        conv.dequantised_weight(),
        None,
        conv.shift,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        act=conv.act,
        reuse=False,
    )


def _suits(spec: ConvSpec, portable: bool = False) -> bool:
    """Whether a convolution is to run in 8 bits by what it is, and on this processor."""
    outputs, channels = spec.weight.shape[:2]
    depthwise = spec.groups == outputs and channels == 1
    scale, shift = affine(spec)
    return (
        outputs > NARROW
        and (spec.groups == 1 or depthwise)
        and (portable or not _tiles_are_faster(spec))
        and _is_finite(t for t in (spec.weight, scale, shift) if t is not None)
    )


def _is_finite(tensors: Iterable[Tensor]) -> bool:
    return all(math.isfinite(t.abs().amax().item()) for t in tensors)


def _tiles_are_faster(spec: ConvSpec) -> bool:
    same = SamePadding(spec.weight.shape[2:], spec.stride, spec.dilation)
    padding = same.halves if isinstance(spec.padding, str) else spec.padding
    return (
        spec.groups == 1
        and tuple(spec.weight.shape[2:]) == (3, 3)
        and spec.stride == (1, 1)
        and padding == spec.dilation
        and len(set(spec.dilation)) == 1
        and not limits.extension(_ext.CPU, "_conv_tiles_cpu")
        and weight_limit(False) < 127
    )
