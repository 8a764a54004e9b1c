"""Convolutions of 8-bit maps on the CPU, by oneDNN, and maps between fp32 and 8 bits.

    to = Affine.of_range(0.0, 6.0)
    conv = QuantizedConv(weight, scale, shift, source=to, padding=1)
    y = conv(quantised(x, to), into=to)        # relu(scale * conv2d(x, weight) + shift), in 8 bits
    print(y.dequantised())

A value x of a map is held as q = clamp(round(x / scale) + zero_point, 0, 255), uint8, one scale and
zero point a map. Weights are int8 with a scale for each output channel, and symmetric: zero is
zero. Sums of products are exact, in 32 bits; they are scaled, shifted, added to the residual and
activated in fp32 and rounded once, so that a result is the integers' result within one step.

Processors without an instruction for sums of four products (AVX-VNNI, AVX-512 VNNI) add two
products in 16 bits, where 2 * 255 * 127 does not fit but 2 * 255 * 64 does: there weights have 7
bits. `weight_limit` asks the processor by a product whose sums would saturate.

An 8-bit map holds no nan and no infinity: `quantised` gives None for a map that has one, and
weights that are not finite are refused.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ext
from ..dispatch import limits
from ..plan.taps import live_taps, output_size
from ..reference import convolution, is_safe
from .prepared import ACTIVATIONS, Plan, activate_, check_fp32_cpu, check_weight, fold, pair

LEVELS = 255
# oneDNN's names and arguments of the activations.
_POST_OPS: dict[str | None, tuple[str, list[float]]] = {
    None: ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "hardswish": ("hardswish", []),
}
# Multiply-adds a second of one thread. 66 to 95 were measured for 1x1 and 3x3 convolutions of 64
# and more channels on an AMD EPYC of the third generation (AVX2), 156 to 215 on one of the fourth
# (AVX-512 VNNI), November 2026.
_RATE, _VNNI_RATE = 85e9, 180e9
_CALL_SECONDS = 80e-6


@dataclass(frozen=True)
class Affine:
    """x = (q - zero_point) * scale.

    Attributes:
        scale: positive, an fp32 number.
        zero_point: 0 to 255.
    """

    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= _SMALLEST and self.zero_point in _BYTE):
            raise ValueError(
                f"Affine: scale={self.scale} and zero_point={self.zero_point}, expected a finite "
                f"scale of at least {_SMALLEST} and a whole zero point of 0 to {LEVELS}"
            )

    @classmethod
    def of_range(cls, low: float, high: float) -> Affine:
        """The one that holds `low` to `high`, and zero exactly.

        Raises:
            ValueError: the range is not finite, or nothing but zero.
        """
        low, high = min(low, 0.0), max(high, 0.0)
        scale = _as_fp32((high - low) / LEVELS)
        if not _SMALLEST <= scale < math.inf:
            raise ValueError(f"Affine: no 8 bits for the range {low} to {high}")
        return cls(scale, min(LEVELS, max(0, round(-low / scale))))


_BYTE = range(LEVELS + 1)
# A reciprocal of less may be infinite in fp32.
_SMALLEST = 1e-37


def _as_fp32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


@dataclass(frozen=True)
class Quantised:
    """A map in 8 bits: x = (values - zero_point) * scale.

    Attributes:
        values: [N, C, H, W], uint8, in channels_last.
        affine: its scale and zero point.
    """

    values: Tensor
    affine: Affine

    @property
    def shape(self) -> torch.Size:
        """[N, C, H, W]."""
        return self.values.shape

    def dequantised(self) -> Tensor:
        """The map in fp32, [N, C, H, W] in channels_last."""
        q, affine = self.values, self.affine
        if not _has_kernels():
            return (q.float() - affine.zero_point).mul_(affine.scale)
        x = torch.empty_like(q, dtype=torch.float32, memory_format=torch.channels_last)
        torch.ops.deeplab_fast._dequantise_cpu(q, x, affine.scale, affine.zero_point)
        return x

    def mean(self) -> Tensor:
        """The mean over the pixels of each channel, [N, C], fp32."""
        height, width = self.shape[2:]
        total = self.values.sum((2, 3), dtype=torch.int32)
        return (total / (height * width) - self.affine.zero_point) * self.affine.scale


def quantised(x: Tensor, affine: Affine) -> Quantised | None:
    """An fp32 map in 8 bits, None where a value is not finite.

    Args:
        x: [N, C, H, W], fp32 on the CPU, any strides.
        affine: values beyond its range become the range's ends.

    Raises:
        ValueError: x is something else.
    """
    if x.dim() != 4:
        raise ValueError(f"quantised: x has shape {list(x.shape)}, expected [N, C, H, W]")
    out = empty_bytes(x.shape)
    return Quantised(out, affine) if quantise_into(x, affine, out, 0) else None


def quantise_into(x: Tensor, affine: Affine, out: Tensor, channel_offset: int) -> bool:
    """Write an fp32 map in 8 bits into channels of a wider one.

    Args:
        x: [N, C, H, W], fp32 on the CPU, any strides.
        affine: of the result.
        out: [N, L, H, W], uint8, contiguous in channels_last.
        channel_offset: x goes to channels [channel_offset, channel_offset + C).

    Returns:
        Whether all values of x are finite; otherwise the result is worth nothing.
    """
    check_fp32_cpu("quantised", "x", x)
    if _has_kernels():
        return torch.ops.deeplab_fast._quantise_cpu(
            x.contiguous(memory_format=torch.channels_last),
            out,
            channel_offset,
            affine.scale,
            affine.zero_point,
        )
    # No sum of what is not finite is finite; one that overflows costs a slower form.
    if not math.isfinite(x.sum().item()):
        return False
    q = (x * (1 / affine.scale)).round_().add_(affine.zero_point).clamp_(0, LEVELS)
    out.narrow(1, channel_offset, x.shape[1]).copy_(q)
    return True


def empty_bytes(shape: Sequence[int]) -> Tensor:
    """A new uint8 map in channels_last."""
    return torch.empty(tuple(shape), dtype=torch.uint8, memory_format=torch.channels_last)


def _has_kernels() -> bool:
    return not limits.extension(_ext.CPU, "_quantise_cpu")


class QuantizedConv:
    """y = act(scale * conv2d(x, weight) + shift + residual) of 8-bit maps.

    Safe to call from several threads at a time; can be deep-copied and pickled. It holds the
    weights in 8 bits only.

    Args:
        weight: [K, C / groups, R, S], fp32, on the CPU.
        scale, shift: [K] (the folded batch norm), or None for one and zero.
        source: scale and zero point of the maps that it is called with.
        stride, padding, dilation: an int for rows and columns, or a pair (rows, columns). Padding
            is zero, as the source's zero point.
        groups: as in torch.nn.functional.conv2d.
        act: "relu", "relu6", "hardswish", or None for the identity.
        limit: largest magnitude of the weights; None for `weight_limit`.

    Raises:
        ValueError: tensors or options that do not fit, or weights that are not finite.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        *,
        source: Affine,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        act: str | None = "relu",
        limit: int | None = None,
    ) -> None:
        check_weight("QuantizedConv", weight)
        if groups < 1 or weight.shape[0] % groups:
            raise ValueError(
                f"QuantizedConv: groups={groups} must divide the {weight.shape[0]} output channels"
            )
        if act not in ACTIVATIONS:
            raise ValueError(f"QuantizedConv: act must be one of {ACTIVATIONS}, got {act!r}")
        self.out_channels = weight.shape[0]
        self.in_channels = weight.shape[1] * groups
        self.source = source
        self.stride = pair("QuantizedConv: stride", stride, 1)
        self.padding = pair("QuantizedConv: padding", padding, 0)
        self.dilation = pair("QuantizedConv: dilation", dilation, 1)
        self.groups = groups
        self.act = act
        folded, self.shift = fold("QuantizedConv", weight, scale, shift)
        if limit is None:
            limit = weight_limit(groups == self.out_channels == self.in_channels)
        with torch.inference_mode(False), torch.no_grad():
            largest = folded.abs().amax((1, 2, 3))
            if not math.isfinite((largest + self.shift.abs()).sum().item()):
                raise ValueError("QuantizedConv: weight, scale or shift is not finite")
            # Of a filter of zeros any scale will do.
            self.weight_scale = torch.where(largest > _SMALLEST, largest / limit, 1.0)
            levels = (folded / self.weight_scale[:, None, None, None]).round_()
            self.weight = levels.clamp_(-limit, limit).to(torch.int8)
            self._zeros = torch.zeros(self.out_channels, dtype=torch.int8)
        self._packed: Tensor | None = None
        self._lock = threading.Lock()

    @overload
    def __call__(
        self,
        x: Quantised,
        residual: Quantised | None = ...,
        *,
        into: Affine,
        shift: Tensor | None = ...,
        overwrite_residual: bool = ...,
    ) -> Quantised: ...

    @overload
    def __call__(
        self,
        x: Quantised,
        residual: Tensor | None = ...,
        *,
        into: None = ...,
        shift: Tensor | None = ...,
        overwrite_residual: bool = ...,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        x: Quantised,
        residual: Quantised | Tensor | None = ...,
        *,
        into: Affine | None,
        shift: Tensor | None = ...,
        overwrite_residual: bool = ...,
    ) -> Quantised | Tensor: ...

    def __call__(
        self,
        x: Quantised,
        residual: Quantised | Tensor | None = None,
        *,
        into: Affine | None = None,
        shift: Tensor | None = None,
        overwrite_residual: bool = False,
    ) -> Quantised | Tensor:
        """Run the convolution.

        Args:
            x: [N, C, H, W], of the scale and zero point `source`.
            residual: [N, K, H', W'], in 8 bits of any scale with `into`, else in fp32, or None. A
                hardswish or relu6 takes none.
            into: scale and zero point of the result; None for a result in fp32.
            shift: [K] in place of the own, or [N, K] for each image; fp32, finite.
            overwrite_residual: the result may take residual's memory, where x does not lie in it.

        Returns:
            [N, K, H', W'] in channels_last, in 8 bits or fp32.

        Raises:
            ValueError: shapes, dtypes or scales that do not fit.
        """
        shape = self._check(x, residual, into)
        shift = self.shift if shift is None else shift
        if shape[0] == 0:
            return empty_bytes_or_fp32(shape, into)
        if shift.dim() == 2:
            if shape[0] > 1:
                return self._each(x, residual, into, shift)
            shift = shift[0]
        with torch.no_grad():
            q = x.values.contiguous(memory_format=torch.channels_last)
            if not is_safe(x.shape, self.weight.shape, self.stride, self.padding, self.dilation):
                return self._in_fp32(x, residual, shift, into)
            if residual is None:
                y = self._run(q, shift, into)
            else:
                y = self._run_sum(q, residual, shift, into, overwrite_residual)
        y = y.contiguous(memory_format=torch.channels_last)
        return y if into is None else Quantised(y, into)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[N, K, H', W'] of the result for an input [N, C, H, W]."""
        n, _, height, width = shape
        size = (output_size(*axis) for axis in self._axes((height, width)))
        return (n, self.out_channels, *size)

    def plan(self, shape: Sequence[int], threads: int | None = None) -> Plan:
        """What a call on an input of this shape runs; arguments as for `PreparedConv.plan`."""
        n, _, height, width = shape
        axes = self._axes((height, width))
        macs = n * self.weight.numel()
        for axis in axes:
            macs = macs * live_taps(*axis) // axis[1]
        outputs = math.prod(self.output_shape(shape))
        threads = threads or torch.get_num_threads()
        rate = _VNNI_RATE if weight_limit(False) == 127 else _RATE
        return Plan(
            "onednn",
            "int8",
            (n, self.in_channels, height, width),
            threads,
            macs,
            n * self.in_channels * height * width + outputs + self.weight.numel(),
            _CALL_SECONDS + macs / (rate * threads),
            self.weight.numel(),
        )

    def dequantised_weight(self) -> Tensor:
        """The weights that it computes with, in fp32."""
        return self.weight.float() * self.weight_scale[:, None, None, None]

    @property
    def held(self) -> int:
        """Bytes of one copy of its weights."""
        return self.weight.numel()

    @property
    def extra_bytes(self) -> int:
        """Bytes of prepared weights now held beyond these."""
        return 0 if self._packed is None else self.weight.numel()

    def __getstate__(self) -> dict[str, Any]:
        # Weights in oneDNN's layout cannot be copied, and come back on demand.
        own = ("_lock", "_packed")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._packed = None
        self._lock = threading.Lock()

    def _axes(self, size: Sequence[int]) -> list[tuple[int, int, int, int, int]]:
        kernel = self.weight.shape[2:]
        return list(zip(size, kernel, self.stride, self.padding, self.dilation, strict=True))

    def _check(
        self, x: Quantised, residual: Quantised | Tensor | None, into: Affine | None
    ) -> tuple[int, ...]:
        _, channels, height, width = x.shape
        if channels != self.in_channels or x.affine != self.source:
            raise ValueError(
                f"QuantizedConv: x {list(x.shape)} of {x.affine} does not fit, expected "
                f"{self.in_channels} channels of {self.source}"
            )
        shape = self.output_shape(x.shape)
        if min(shape[2:]) < 1:
            raise ValueError(
                f"QuantizedConv: a map of {height}x{width} is smaller than the dilated kernel of "
                f"weight {list(self.weight.shape)} with dilation={self.dilation}, "
                f"padding={self.padding}"
            )
        if residual is None:
            return shape
        if self.act not in (None, "relu"):
            raise ValueError(f"QuantizedConv: no residual goes before act={self.act!r}")
        if isinstance(residual, Quantised) != (into is not None) or residual.shape != shape:
            raise ValueError(
                f"QuantizedConv: the residual is {list(residual.shape)} in "
                f"{'8 bits' if isinstance(residual, Quantised) else 'fp32'}, expected "
                f"{list(shape)} in {'fp32' if into is None else '8 bits'} as the result"
            )
        return shape

    def _each(
        self,
        x: Quantised,
        residual: Quantised | Tensor | None,
        into: Affine | None,
        shifts: Tensor,
    ) -> Quantised | Tensor:
        """One image after another, for oneDNN takes one shift a call."""
        if residual is not None:
            raise ValueError("QuantizedConv: a residual goes with one shift for all images")
        maps: list[Tensor] = []
        for image, shift in enumerate(shifts):
            one = Quantised(x.values[image : image + 1], x.affine)
            if into is None:
                maps.append(self(one, shift=shift))
            else:
                maps.append(self(one, into=into, shift=shift).values)
        y = torch.cat(maps).contiguous(memory_format=torch.channels_last)
        return y if into is None else Quantised(y, into)

    def _in_fp32(
        self, x: Quantised, residual: Quantised | Tensor | None, shift: Tensor, into: Affine | None
    ) -> Quantised | Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        y = convolution(x.dequantised(), self.dequantised_weight(), shift, *geometry)
        if residual is not None:
            y += residual.dequantised() if isinstance(residual, Quantised) else residual
        y = activate_(y, self.act).contiguous(memory_format=torch.channels_last)
        if into is None:
            return y
        found = empty_bytes(y.shape)
        quantise_into(y, into, found, 0)
        return Quantised(found, into)

    def _run(self, q: Tensor, shift: Tensor, into: Affine | None) -> Tensor:
        post_op, arguments = _POST_OPS[self.act]
        return torch.ops.onednn.qconv2d_pointwise.default(
            *self._operands(q, shift), *_result(into), post_op, arguments, ""
        )

    def _run_sum(
        self,
        q: Tensor,
        residual: Quantised | Tensor,
        shift: Tensor,
        into: Affine | None,
        overwrite: bool,
    ) -> Tensor:
        if isinstance(residual, Quantised):
            total, scale, zero_point = residual.values, *_parts(residual.affine)
        else:
            total, scale, zero_point = residual, 1.0, 0
        total = total.contiguous(memory_format=torch.channels_last)
        # The result is written over the summand.
        if not overwrite or total.untyped_storage().data_ptr() == q.untyped_storage().data_ptr():
            total = total.clone(memory_format=torch.channels_last)
        # oneDNN's maximum would turn a nan of an fp32 residual into 0.
        fused = "none" if into is None else self.act or "none"
        y = torch.ops.onednn.qconv2d_pointwise.binary(
            *self._operands(q, shift, total),
            *_result(into),
            scale,
            zero_point,
            "sum",
            1.0,
            fused,
            [],
            "",
        )
        return F.relu_(y) if into is None and self.act else y

    def _operands(self, q: Tensor, shift: Tensor, *total: Tensor) -> tuple[Any, ...]:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        source = _parts(self.source)
        packed = self._pack()
        return (q, *source, packed, self.weight_scale, self._zeros, *total, shift, *geometry)

    def _pack(self) -> Tensor:
        if self._packed is None:
            with self._lock, torch.inference_mode(False), torch.no_grad():
                if self._packed is None:
                    self._packed = torch.ops.onednn.qconv_prepack(
                        self.weight,
                        self.weight_scale,
                        *_parts(self.source),
                        self.stride,
                        self.padding,
                        self.dilation,
                        self.groups,
                        None,
                    )
        return self._packed


def empty_bytes_or_fp32(shape: Sequence[int], into: Affine | None) -> Quantised | Tensor:
    """A new map in channels_last, in 8 bits of a scale or in fp32."""
    y = empty_bytes(shape)
    return y.float() if into is None else Quantised(y, into)


def _parts(affine: Affine) -> tuple[float, int]:
    return affine.scale, affine.zero_point


def _result(into: Affine | None) -> tuple[float, int, torch.dtype]:
    return (1.0, 0, torch.float32) if into is None else (*_parts(into), torch.uint8)


@cache
def weight_limit(depthwise: bool) -> int:
    """The largest magnitude of weights whose sums are exact here: 127, or 64.

    Args:
        depthwise: of convolutions with one channel a group, whose products are added one by one.

    Raises:
        RuntimeError: sums of 7-bit weights are wrong too.
    """
    channels = 64
    groups = channels if depthwise else 1
    one = Affine(1.0, 0)
    x = Quantised(torch.full_like(empty_bytes((1, channels, 4, 4)), LEVELS), one)
    for limit in (127, 64):
        weight = torch.full((channels, channels // groups, 3, 3), float(limit), dtype=torch.float32)
        conv = QuantizedConv(weight, None, None, source=one, groups=groups, act=None, limit=limit)
        wanted = weight[0].numel() * limit * LEVELS
        # The sums of 25 bits are rounded to fp32's 24.
        if torch.allclose(
            conv(x), torch.tensor(float(wanted), dtype=torch.float32), rtol=1e-6, atol=0.0
        ):
            return limit
    raise RuntimeError("oneDNN's 8-bit convolutions give wrong sums on this processor")
