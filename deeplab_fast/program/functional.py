"""A program as torch.export traces it: without memory of its own, by ops that change nothing.

Convolutions are nodes of this package's ops where these have such a one, else PyTorch's. Weights
are the prepared ones in the model's order, constants of the exported program. What runs in 8 bits
is PyTorch's convolution of maps and weights that are dequantised before it, and quantised behind
it where its result is held in 8 bits: the form that other runtimes know (ONNX's QuantizeLinear and
DequantizeLinear).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import quantized
from ..ops.prepared import PreparedConv
from ..ops.prepared_bf16 import Bf16Conv
from ..ops.quantized import LEVELS, Affine, Quantised

Function = Callable[..., Any]
Map = Tensor | Quantised

_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}


def activated(y: Tensor, act: str | None) -> Tensor:
    """act(y), a new map."""
    return _ACTIVATIONS[act](y)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype; one that has it leaves no node."""
    return x if x.dtype == dtype else x.to(dtype)


class Conv:
    """act(conv(x) + shift + residual), in the dtype of the weight.

    Attributes:
        reads: x is rounded to this dtype.

    Args:
        weight: [K, C / groups, R, S].
        shift: [K].
        stride, padding, dilation: (rows, columns).
        groups: as in torch.nn.functional.conv2d.
        act: "relu", "relu6", "hardswish", or None for the identity.
    """

    def __init__(
        self,
        weight: Tensor,
        shift: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        act: str | None,
    ) -> None:
        self.weight, self.shift, self.act = weight, shift, act
        self.reads = weight.dtype
        self._geometry = (list(stride), list(padding), list(dilation), groups)

    @classmethod
    def of(cls, conv: PreparedConv | Bf16Conv) -> Conv:
        """With the weights of a prepared convolution."""
        weight, shift = conv.folded()
        own = cls(weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups, conv.act)
        if isinstance(conv, Bf16Conv) and conv.out_dtype != weight.dtype:
            # Products of bf16 are exact in fp32.
            own.weight = weight.to(conv.out_dtype)
        return own

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, sides: Sequence[int] | None = None
    ) -> Tensor:
        """Of x [N, C, H, W]; sides: what is padded, (left, right, top, bottom), in place of the
        padding."""
        stride, padding, dilation, groups = self._geometry
        if sides is not None:
            x, padding = F.pad(x, list(sides)), [0, 0]
        x = cast(cast(x, self.reads), self.weight.dtype)
        pairs = (stride, padding, dilation)
        if self.act in ("relu", None) and all(rows == columns for rows, columns in pairs):
            square = [rows for rows, _ in pairs]
            return torch.ops.deeplab_fast.conv_bn_act(
                x, self.weight, None, self.shift, residual, *square, groups, self.act
            )
        y = F.conv2d(x, self.weight, cast(self.shift, x.dtype), *pairs, groups)
        return activated(y if residual is None else y + residual, self.act)


def branches(convs: Sequence[Conv], dilations: Sequence[int]) -> Function:
    """The branches of an ASPP, x [N, C, H, W] -> [N, sum K, H, W]."""
    weights, shifts = [conv.weight for conv in convs], [conv.shift for conv in convs]

    def run(x: Tensor) -> Tensor:
        return torch.ops.deeplab_fast.aspp_branches(
            cast(x, weights[0].dtype), weights, [], shifts, list(dilations)
        )

    return run


def project(weight: Tensor, shift: Tensor, act: str | None) -> Function:
    """The projection of branches [N, B, H, W] and a pooled vector [N, P].

    Args:
        weight: [K, B + P, 1, 1].
        shift: [K].
        act: as for `Conv`.
    """

    def run(maps: Tensor, pooled: Tensor) -> Tensor:
        maps, pooled = cast(maps, weight.dtype), cast(pooled, weight.dtype)
        if act == "relu":
            return torch.ops.deeplab_fast.aspp_project(maps, pooled, weight, None, shift)
        channels = maps.shape[1]
        y = F.conv2d(maps, weight[:, :channels], cast(shift, maps.dtype))
        return activated(y + F.linear(pooled, weight[:, channels:, 0, 0])[..., None, None], act)

    return run


def wide_project(conv: Conv, to_pooled: Tensor) -> Function:
    """As `project` with a kernel above 1x1: the pooled vector becomes a map of the branches' size,
    which may be any.

    Args:
        conv: of the branches.
        to_pooled: [K, P, R, S].
    """
    conv.weight = torch.cat([conv.weight, to_pooled.to(conv.weight.dtype)], 1)

    def run(maps: Tensor, pooled: Tensor) -> Tensor:
        dtype = conv.weight.dtype
        constant = cast(pooled, dtype)[..., None, None].expand(-1, -1, *maps.shape[2:])
        return conv(torch.cat([cast(maps, dtype), constant], 1))

    return run


class QuantizedConv:
    """act(conv(x) + shift + residual) of an 8-bit map and 8-bit weights.

    Args:
        conv: has them.
    """

    def __init__(self, conv: quantized.QuantizedConv) -> None:
        self.source, self.shift, self._act = conv.source, conv.shift, conv.act
        self._weight, self._scale = conv.weight, conv.weight_scale
        self._geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)

    def __call__(
        self,
        x: Map,
        residual: Tensor | None = None,
        *,
        into: Affine | None,
        shifts: Tensor | None = None,
        sides: Sequence[int] | None = None,
    ) -> Map:
        """Of x [N, C, H, W].

        Args:
            x: in 8 bits, or fp32 that is quantised.
            residual: of the result's shape, fp32.
            into: scale and zero point of the result; None for fp32.
            shifts: [N, K] in place of the own shift.
            sides: as for `Conv`.
        """
        q = quantised(x, self.source)
        if sides is not None:
            q = Quantised(F.pad(q.values, list(sides), value=q.affine.zero_point), q.affine)
        weight = _ops().dequantize_per_channel(
            self._weight, self._scale, None, 0, -127, 127, torch.int8
        )
        own = self.shift if shifts is None else None
        y = F.conv2d(dequantised(q), weight, own, *self._geometry)
        y = y if shifts is None else y + shifts[..., None, None]
        y = activated(y if residual is None else y + residual, self._act)
        return y if into is None else quantised(y, into)


def quantised(x: Map, affine: Affine) -> Quantised:
    """A map in 8 bits."""
    if isinstance(x, Quantised):
        return x
    parts = (affine.scale, affine.zero_point, 0, LEVELS, torch.uint8)
    return Quantised(_ops().quantize_per_tensor(x, *parts), affine)


def dequantised(x: Map) -> Tensor:
    """A map in fp32."""
    if not isinstance(x, Quantised):
        return x
    parts = (x.affine.scale, x.affine.zero_point, 0, LEVELS, torch.uint8)
    return _ops().dequantize_per_tensor(x.values, *parts)


def _ops() -> Any:
    # Which defines them.
    import torch.ao.quantization.fx._decomposed

    return torch.ops.quantized_decomposed


class Tracer:
    """The `run` of a program in a trace.

    Args:
        function_of: what a layer computes, with weights of its own.
    """

    def __init__(self, function_of: Callable[[Any], Function]) -> None:
        self._function_of = function_of
        self._functions: dict[Any, Function] = {}

    def __call__(self, layer: Any, *tensors: Any) -> Any:
        function = self._functions.get(layer)
        if function is None:
            # What a trace records belongs to its thread; weights are made before it.
            with ThreadPoolExecutor(1) as other:
                function = other.submit(self._made, layer).result()
            self._functions[layer] = function
        return function(*tensors)

    def _made(self, layer: Any) -> Function:
        with torch.no_grad():
            return self._function_of(layer)
