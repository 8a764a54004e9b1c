"""Convolutions with the batch norm folded into filters and a shift, by the best form for each.

    y = act(conv(x, weight) + shift + residual)

    cuBLASLt     1x1 convolutions: a product of matrices with bias and ReLU in its epilogue; where
                 that makes a number of NaN, which the first call of a shape tries, ReLU is a pass
    cuDNN fused  convolution, bias, residual and ReLU in one kernel
    cuDNN, pass  the convolution, then one pass over its result by this package's `bn_act` kernel
    cuDNN        the convolution, then a pass for shift, residual and activation each
    triton       this package's 1x1 kernel

The package's kernels go first where records say that they are faster than PyTorch's, or where their
backend is asked for. Of PyTorch's forms the first that can run is taken, in the order above;
`torch.backends.cudnn.benchmark = True` has them timed at the first call of a shape. Everything is
channels_last: a 1x1 convolution's pixels are then rows of a matrix, without a copy.

Off a GPU a convolution is PyTorch's, with the same passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import limits
from ..dispatch.choice import BackendUnavailable, select, state
from ..dispatch.declare import Implementation
from ..dispatch.describe import OpDesc
from ..plan.device import device_at, least_seconds
from ..plan.tables import capturing
from ..plan.taps import live_taps, output_size
from ..reference import convolution
from . import _cudnn
from .prepared import Plan, activate_

_EPILOGUE = "cuBLASLt"
_HALVES = (torch.float16, torch.bfloat16)
# A stem of three channels: PyTorch's issue 68506 has the fused kernel 17 times slower for it.
_LEAST_CHANNELS = 8
# Rounds that are timed, and calls of a round, which do not wait for each other, as in a network.
_ROUNDS, _CALLS = 5, 8
# Shapes that a layer remembers its form for.
_MOST_CHOICES = 256


class Filters(NamedTuple):
    """What a layer multiplies and adds.

    weight: [K, C / groups, R, S], channels_last, the dtype of the map; the scale is in it.
    shift: [K], fp32.
    bias: [K], the shift rounded to the dtype of the map.
    one, zero: [K], fp32: scale and mean of kernels that take them apart.
    """

    weight: Tensor
    shift: Tensor
    bias: Tensor
    one: Tensor
    zero: Tensor


class Settings(NamedTuple):
    """What a choice depends on beside the call.

    state: what the choice of a backend does.
    tf32: whether products of matrices may round fp32 operands to TF32.
    conv_tf32: whether convolutions may.
    cudnn: whether cuDNN is switched on.
    deterministic: whether cuDNN is asked for deterministic kernels.
    benchmark: whether forms are to be timed.
    """

    state: Hashable
    tf32: bool
    conv_tf32: bool
    cudnn: bool
    deterministic: bool
    benchmark: bool

    @classmethod
    def now(cls) -> Settings:
        """Those of this moment."""
        cudnn = torch.backends.cudnn
        return cls(
            state(),
            limits.allow_tf32(),
            limits.allow_conv_tf32(),
            cudnn.enabled,
            cudnn.deterministic,
            cudnn.benchmark,
        )


@dataclass(frozen=True)
class Call:
    """What a form is chosen for."""

    shape: tuple[int, ...]
    filters: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    act: str | None
    residual: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def is_pointwise(self) -> bool:
        """A 1x1 convolution that reads every pixel once."""
        return (
            self.filters[2:] == (1, 1)
            and self.stride == (1, 1)
            and self.padding == (0, 0)
            and self.groups == 1
        )

    @property
    def output(self) -> tuple[int, int, int, int]:
        """Shape of the result."""
        axes = zip(
            self.shape[2:], self.filters[2:], self.stride, self.padding, self.dilation, strict=True
        )
        height, width = (output_size(*axis) for axis in axes)
        return self.shape[0], self.filters[0], height, width


Form = Callable[[Tensor, Filters, Tensor | None], Tensor]
T = TypeVar("T")


class Memo(Generic[T]):
    """What a layer chose, by what the choice rests on; it forgets all where it grows too large."""

    def __init__(self) -> None:
        self._chosen: dict[Hashable, T] = {}

    def get(self, key: Hashable, choose: Callable[[], T]) -> T:
        """The choice for a key, made at the first question."""
        chosen = self._chosen
        if key in chosen:
            return chosen[key]
        value = choose()
        if len(chosen) >= _MOST_CHOICES:
            chosen = self._chosen = {}
        chosen[key] = value
        return value

    def known(self, key: Hashable) -> T | None:
        """The choice for a key, None where nothing was chosen yet."""
        return self._chosen.get(key)

    def __reduce__(self) -> tuple[type[Memo[T]], tuple[()]]:
        # Kernels are chosen anew where a copy runs.
        return Memo, ()


class FoldedConv:
    """A convolution of a network; which filters it multiplies by comes with each call.

    Args:
        stride, padding, dilation: (rows, columns).
        groups: as in torch.nn.functional.conv2d.
        act: "relu", "relu6", "hardswish", or None for the identity.
    """

    def __init__(
        self,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        act: str | None,
    ) -> None:
        self.stride, self.padding, self.dilation = _pair(stride), _pair(padding), _pair(dilation)
        self.groups, self.act = groups, act
        self._choices: Memo[tuple[str, Form]] = Memo()

    def __call__(
        self, x: Tensor, filters: Filters, settings: Settings, residual: Tensor | None = None
    ) -> Tensor:
        """act(conv(x) + shift + residual).

        Args:
            x: [N, C, H, W], channels_last, fp16, bf16 or fp32.
            filters: of the same dtype.
            settings: those of now.
            residual: the shape of the result, or None.

        Returns:
            [N, K, H', W'], the dtype of x, channels_last.
        """
        key = (x.shape, x.dtype, x.device, residual is None, settings)
        chosen = self._choices.known(key)
        if chosen is None:
            call = self.call(x.shape, filters.weight.shape, residual is not None, x.dtype, x.device)
            if capturing(x):
                # Forms cannot be tried now: the last can always run. Another call decides.
                return list(forms_of(call, settings).values())[-1](x, filters, residual)
            chosen = self._choices.get(key, lambda: _choose(call, settings, x, filters, residual))
        return chosen[1](x, filters, residual)

    def plan(self, call: Call, settings: Settings) -> Plan:
        """What runs a call, and its cost: by the rule where it was not called before."""
        key = (call.shape, call.dtype, call.device, not call.residual, settings)
        known = self._choices.known(key)
        name = next(iter(forms_of(call, settings))) if known is None else known[0]
        return _plan_of(name, call, settings)

    def call(
        self,
        shape: Sequence[int],
        filters: Sequence[int],
        residual: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Call:
        """The description of a call."""
        return Call(
            tuple(shape), tuple(filters), self.stride, self.padding, self.dilation, self.groups,
            self.act, residual, dtype, device,
        )  # fmt: skip


def gpu_plan(
    name: str,
    shape: Sequence[int],
    macs: int,
    elements: int,
    dtype: torch.dtype,
    device: torch.device,
    tf32: bool,
) -> Plan:
    """A call's cost on a GPU: the least that its multiply-adds and the elements that it reads and
    writes take."""
    n, c, h, w = shape
    moved = elements * dtype.itemsize
    least = least_seconds(device_at(device), dtype, macs, moved, tf32)
    return Plan(name, "", (n, c, h, w), 1, macs, moved, least, 0)


def ours(desc: OpDesc) -> Implementation | None:
    """The package's GPU kernel that runs a call, None where PyTorch's is to."""
    try:
        found = select(desc)
    except BackendUnavailable:
        # Asked for by name: what it cannot run is PyTorch's here, as no op was called.
        return None
    return found if found.backend in ("triton", "cuda") and not found.is_pytorch else None


def has_cudnn(device: torch.device) -> bool:
    """Whether convolutions on a device are cuDNN's."""
    return device.type == "cuda" and torch.version.hip is None


def rows(x: Tensor) -> Tensor:
    """The pixels of a channels_last map [N, C, H, W] as a matrix [N H W, C], a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def as_map(matrix: Tensor, n: int, height: int, width: int) -> Tensor:
    """The map of which `matrix` are the `rows`."""
    return matrix.view(n, height, width, matrix.shape[1]).permute(0, 3, 1, 2)


def of_vectors(
    x: Tensor, weight: Tensor, bias: Tensor, act: str | None, settings: Settings
) -> Tensor:
    """act(x @ weight.T + bias), rounded as convolutions may be.

    Args:
        x: [N, C].
        weight: [K, C, 1, 1], the dtype of x.
        bias: [..., K], the dtype of x.
        act: an activation.
        settings: those of now.
    """
    if _multiplies_alike(x.dtype, settings):
        return activate_(torch.addmm(bias, x, weight.flatten(1).t()), act)
    return activate_(F.conv2d(x[:, :, None, None], weight, bias).flatten(1), act)


def _plan_of(name: str, call: Call, settings: Settings) -> Plan:
    """The cost of a call that a form runs."""
    macs = call.shape[0] * call.filters[0] * call.filters[1]
    for axis in zip(
        call.shape[2:], call.filters[2:], call.stride, call.padding, call.dilation, strict=True
    ):
        macs *= live_taps(*axis)
    elements = math.prod(call.shape) + math.prod(call.filters)
    elements += math.prod(call.output) * (1 + call.residual)
    tf32 = settings.conv_tf32 if name.startswith("cuDNN") else settings.tf32
    return gpu_plan(name, call.shape, macs, elements, call.dtype, call.device, tf32)


def _choose(
    call: Call, settings: Settings, x: Tensor, filters: Filters, residual: Tensor | None
) -> tuple[str, Form]:
    forms = forms_of(call, settings)
    if "cuDNN fused" in forms and not _cudnn.has_fused(
        x, filters.weight, filters.bias, residual, _geometry(call)
    ):
        del forms["cuDNN fused"]
    if call.act == "relu" and _EPILOGUE in forms and not _keeps_nan(forms[_EPILOGUE], x, filters):
        forms[_EPILOGUE] = _pointwise(call, in_epilogue=False)
    if settings.benchmark and len(forms) > 1 and "triton" not in forms:
        key = (call, settings)
        if key not in _fastest:
            _fastest[key] = min(
                forms, key=lambda name: _time(lambda: forms[name](x, filters, residual), x.device)
            )
        return _fastest[key], forms[_fastest[key]]
    name = next(iter(forms))
    return name, forms[name]


# By call and settings, what was measured.
_fastest: dict[tuple[Call, Settings], str] = {}


def forms_of(call: Call, settings: Settings) -> dict[str, Form]:
    """The forms that can run a call, the one to take first."""
    forms: dict[str, Form] = {}
    geometry = _geometry(call)
    on_gpu = has_cudnn(call.device)
    if pointwise := _own_pointwise(call):
        forms["triton"] = pointwise
    if call.is_pointwise and not call.residual and _multiplies_alike(call.dtype, settings):
        forms[_EPILOGUE if on_gpu else "matrix product"] = _pointwise(call)
    fused = call.act == "relu" and call.groups == 1 and call.shape[1] >= _LEAST_CHANNELS
    if on_gpu and fused and settings.cudnn and not settings.deterministic:
        forms["cuDNN fused"] = lambda x, f, residual: _cudnn.fused(
            x, f.weight, f.bias, residual, geometry
        )
    if norm := _own_pass(call):
        forms["cuDNN, pass"] = _then_pass(norm, geometry, call.act)
    forms["cuDNN" if on_gpu else "aten"] = lambda x, f, residual: activate_(
        _cudnn.in_passes(x, f.weight, f.shift, residual, geometry), call.act
    )
    return forms


def _multiplies_alike(dtype: torch.dtype, settings: Settings) -> bool:
    """Whether a product of matrices rounds its operands as a convolution may."""
    return dtype in _HALVES or settings.tf32 == settings.conv_tf32


def _pointwise(call: Call, in_epilogue: bool = True) -> Form:
    n, _, height, width = call.output

    def run(x: Tensor, f: Filters, residual: Tensor | None) -> Tensor:
        matrix, weight = rows(x), f.weight.flatten(1).t()
        if call.act == "relu" and in_epilogue:
            y = torch._addmm_activation(f.bias, matrix, weight)
        else:
            y = activate_(torch.addmm(f.bias, matrix, weight), call.act)
        return as_map(y, n, height, width)

    return run


def _keeps_nan(form: Form, x: Tensor, filters: Filters) -> bool:
    """Whether a form's ReLU gives NaN for NaN, as PyTorch's does: a maximum with 0 may not."""
    nan = torch.full_like(filters.bias, float("nan"))
    return bool(form(x, filters._replace(bias=nan), None).isnan().all())


def _own_pointwise(call: Call) -> Form | None:
    """The package's 1x1 convolution."""
    squares = (call.stride, call.padding, call.dilation)
    if call.act not in ("relu", None) or any(pair[0] != pair[1] for pair in squares):
        return None
    (stride, _), (padding, _), (dilation, _) = squares
    desc = OpDesc.on(
        "conv_bn_act",
        call.shape,
        call.dtype,
        call.device,
        weight=call.filters,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=call.groups,
        residual=call.residual,
        act=call.act,
    )
    found = ours(desc)
    if found is None:
        return None
    options = (stride, padding, dilation, call.groups)
    return lambda x, f, residual: found.run(
        x, f.weight, f.one, f.shift, *options, residual, call.act
    )


def _own_pass(call: Call) -> Implementation | None:
    """The package's pass of normalisation, residual and activation."""
    if call.act == "hardswish" and call.residual:
        return None
    return ours(
        OpDesc.on(
            "bn_act", call.output, call.dtype, call.device, act=call.act, residual=call.residual
        )
    )


def _then_pass(norm: Implementation, geometry: _cudnn.Geometry, act: str | None) -> Form:
    def run(x: Tensor, f: Filters, residual: Tensor | None) -> Tensor:
        y = convolution(x, f.weight, None, *geometry)
        return norm.run(y, f.zero, f.one, f.one, f.shift, residual, act)

    return run


def _geometry(call: Call) -> _cudnn.Geometry:
    return [*call.stride], [*call.padding], [*call.dilation], call.groups


def _time(run: Callable[[], object], device: torch.device) -> float:
    """Median seconds of calls in a row, after the first."""
    run()
    times = []
    for _ in range(_ROUNDS):
        _wait(device)
        start = time.perf_counter()
        for _ in range(_CALLS):
            run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        # Not for the device, which another thread may be capturing on.
        torch.cuda.current_stream(device).synchronize()


def _pair(value: Sequence[int]) -> tuple[int, int]:
    rows, columns = value
    return rows, columns
