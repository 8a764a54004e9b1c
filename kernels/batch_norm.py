"""Batch norm in training, in Triton: the launchers.

Each function takes what the reference of the same name in `deeplab_fast.reference` takes, already
validated, in the order of the op's schema, and gives its results in float32 arithmetic. The kernels
and what they cost are in `batch_norm_kernels.py`; importing this module does not import Triton.

Maps are read as they are where their channels lie next to each other and their pixels at equal
distances, as in channels_last and in slices of its channels; others are copied to channels_last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import limits
from ..dispatch.describe import OpDesc
from ..plan.batch_norm import MAX_VALUES, BatchNormConfig, batch_norm_config
from ..plan.device import WARP
from ..plan.packing import channels_inside, fp32
from . import launch
from .launch import grid, pixel_strides, vector

# Channels of a program that combines partials: a sector of each row.
_COMBINED_CHANNELS = 8
# Chunks whose partials are read at a time, and partials that a thread reads at a time.
_MAX_CHUNKS = 512
_PARTIALS = 8


def not_supported_reasons(desc: OpDesc) -> list[str]:
    """Why the Triton kernels cannot run the call; empty where they can.

    Args:
        desc: a call of batch_stats, bn_act, bn_act_reduce or bn_act_backward.
    """
    return limits.triton(desc)


def batch_stats(
    x: Tensor,
    eps: float = 0.0,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = None,
    config: BatchNormConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and 1 / sqrt(variance + eps) of each channel.

    Args:
        x: [N, C, H, W] fp16, bf16 or fp32.
        running_mean, running_var: [C] contiguous fp32, updated in place as by
            `reference.update_running` where x has values, or None.
        num_batches_tracked, momentum: as there.
        config: None for the choice by rule.

    Returns:
        three [C], fp32; mean and variance 0 without values.
    """
    channels = x.shape[1]
    mean, variance, rstd = (_fp32_like(x, channels) for _ in range(3))
    if not x.numel():
        return mean.zero_(), variance.zero_(), rstd.fill_(eps).rsqrt_()
    kernels = launch.device_module("batch_norm_kernels")
    maps = _Maps(config, True, x)
    partial_mean, partial_m2 = (_fp32_like(x, maps.chunks, channels) for _ in range(2))
    with launch.on_device(x):
        kernels.batch_stats_kernel[grid(maps.chunks * maps.tiles_c)](
            *maps.tensors, partial_mean, partial_m2,
            maps.pixels, maps.units, *maps.strides, maps.tiles, maps.chunks, maps.tiles_c,
            **maps.reducing_options(),
        )  # fmt: skip
        counts = num_batches_tracked is not None
        cumulative = counts and momentum is None
        if num_batches_tracked is not None and cumulative:
            # All programs read it.
            num_batches_tracked.add_(1)
        share = 0.0 if momentum is None else momentum
        kernels.stats_combine_kernel[grid(-(-channels // _COMBINED_CHANNELS))](
            partial_mean, partial_m2, mean, variance, rstd,
            running_mean, running_var, num_batches_tracked,
            maps.pixels, channels, maps.tiles, maps.chunks, maps.config.block_p,
            float(eps), float(share), float(1 - share),
            UPDATES=running_mean is not None,
            COUNTS=counts and not cumulative, CUMULATIVE=cumulative,
            **_combining_options(maps.chunks),
        )  # fmt: skip
    return mean, variance, rstd


def bn_act(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    act: str | None,
    config: BatchNormConfig | None = None,
) -> Tensor:
    """y = act((x - mean) * (rstd * weight) + bias + residual).

    Args:
        x: [N, C, H, W] fp16, bf16 or fp32.
        mean, rstd, weight, bias: [C], any float dtype; used in fp32.
        residual: the shape and dtype of x, or None.
        act: "relu", "relu6", "hardswish" or None.
        config: None for the choice by rule.

    Returns:
        [N, C, H, W], the dtype of x, channels_last.
    """
    y = _map_like(x)
    if not x.numel():
        return y
    kernels = launch.device_module("batch_norm_kernels")
    maps = _Maps(config, False, x, residual)
    read_x, read_residual = maps.tensors
    with launch.on_device(x):
        kernels.bn_act_kernel[grid(maps.tiles * maps.tiles_c)](
            read_x, *map(fp32, (mean, rstd, weight, bias)), read_residual, y,
            maps.pixels, maps.units, *maps.strides, maps.tiles_c,
            HAS_RESIDUAL=residual is not None, ACT=act or "none",
            **maps.one_pass_options(),
        )  # fmt: skip
    return y


def bn_act_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor | None,
    act: str | None,
    config: BatchNormConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of g = grad * act'(...) and of g * (x - mean) * rstd over each channel.

    Args:
        grad, x: [N, C, H, W] fp16, bf16 or fp32, one dtype.
        mean, rstd, weight, bias: [C], any float dtype; used in fp32.
        out: the result of `bn_act`, or None to compute what the activation saw from x.
        act: as for `bn_act`.
        config: None for the choice by rule.

    Returns:
        two [C], fp32; zeros without values.
    """
    channels = x.shape[1]
    sums, sums_xhat = _fp32_like(x, channels), _fp32_like(x, channels)
    if not x.numel():
        return sums.zero_(), sums_xhat.zero_()
    kernels = launch.device_module("batch_norm_kernels")
    maps = _Maps(config, True, grad, x, out if act else None)
    read_grad, read_x, read_out = maps.tensors
    partial, partial_xhat = (_fp32_like(x, maps.chunks, channels) for _ in range(2))
    with launch.on_device(x):
        kernels.bn_act_reduce_kernel[grid(maps.chunks * maps.tiles_c)](
            read_grad, read_x, *map(fp32, (mean, rstd, weight, bias)), read_out,
            partial, partial_xhat,
            maps.pixels, maps.units, *maps.strides, maps.tiles, maps.chunks, maps.tiles_c,
            HAS_OUT=read_out is not None, ACT=act or "none",
            **maps.reducing_options(),
        )  # fmt: skip
        kernels.sums_combine_kernel[grid(-(-channels // _COMBINED_CHANNELS))](
            partial, partial_xhat, sums, sums_xhat, channels, maps.chunks,
            **_combining_options(maps.chunks),
        )  # fmt: skip
    return sums, sums_xhat


def bn_act_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor | None,
    mean_grad: Tensor | None,
    mean_grad_xhat: Tensor | None,
    act: str | None,
    to_residual: bool,
    count: float = 1.0,
    config: BatchNormConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """dx = rstd * weight * (g - mean_grad - xhat * mean_grad_xhat), and g, with the g and xhat of
    `bn_act_reduce`.

    Args:
        grad, ..., bias, out, act: as for `bn_act_reduce`.
        mean_grad, mean_grad_xhat: [C], any float dtype, used in fp32; both None for zero.
        to_residual: give g, the gradient of the residual, as well.
        count: by which both means are divided, so that sums may be given in their place.
        config: None for the choice by rule.

    Returns:
        dx and g, [N, C, H, W], the dtype of x, channels_last; g is empty without `to_residual`.
    """
    dx = _map_like(x)
    residual_grad = _map_like(x) if to_residual else x.new_empty(0)
    if not x.numel():
        return dx, residual_grad
    kernels = launch.device_module("batch_norm_kernels")
    means = None
    if mean_grad is not None and mean_grad_xhat is not None:
        means = fp32(mean_grad), fp32(mean_grad_xhat)
    needs_x = means is not None or (act is not None and out is None)
    maps = _Maps(config, False, grad, x if needs_x else None, out if act else None)
    read_grad, read_x, read_out = maps.tensors
    with launch.on_device(x):
        kernels.bn_act_backward_kernel[grid(maps.tiles * maps.tiles_c)](
            read_grad, read_x, *map(fp32, (mean, rstd, weight, bias)), read_out,
            *(means or (None, None)), dx, residual_grad if to_residual else None,
            maps.pixels, maps.units, *maps.strides, maps.tiles_c, 1.0 / count,
            HAS_OUT=read_out is not None, HAS_MEANS=means is not None, TO_RESIDUAL=to_residual,
            ACT=act or "none",
            **maps.one_pass_options(),
        )  # fmt: skip
    return dx, residual_grad


class _Maps:
    """Maps as a pass reads them, with at least one value, and its tiles.

    Attributes:
        tensors: the maps, copied where need be; None where one is not given.
        vector: channels that a thread reads at a time.
        pixels, channels: of each map.
        units: channels, in units of `vector`.
        strides: elements between neighbouring pixels of each map, in units of `vector`.
        config: the configuration.
        tiles, chunks, tiles_c: `BatchNormConfig.grid`.
    """

    def __init__(
        self, config: BatchNormConfig | None, reduces: bool, first: Tensor, *others: Tensor | None
    ) -> None:
        n, self.channels, height, width = first.shape
        self.pixels = n * height * width
        rows = [None if t is None else _rows(t) for t in (first, *others)]
        given = [row for row in rows if row is not None]
        self.vector = min(vector(t, self.channels, stride) for t, stride in given)
        self.units = self.channels // self.vector
        self.tensors = [None if row is None else row[0] for row in rows]
        self.strides = [0 if row is None else row[1] // self.vector for row in rows]
        if config is None:
            config = batch_norm_config(
                self.pixels, self.channels, len(given), self.vector, first.element_size(),
                launch.device_of(first), reduces,
            )  # fmt: skip
        elif not config.is_legal(self.vector, len(given)):
            raise ValueError(
                f"{config} does not fit {len(given)} maps read {self.vector} channels at a time: "
                "lanes * block_c must be 32 * num_warps * channels at a time, all powers of two, "
                f"with at most {MAX_VALUES} values of all maps in a thread; "
                "see plan.batch_norm.batch_norm_candidates"
            )
        self.config = config
        self.tiles, self.chunks, self.tiles_c = config.grid(self.pixels, self.channels)

    def one_pass_options(self) -> dict[str, int]:
        """Constants and launch options of a kernel that does not reduce."""
        return {"BLOCK_P": self.config.block_p, **self._options()}

    def reducing_options(self) -> dict[str, int]:
        """The same of one that does."""
        return {"ROWS": self.config.rows, "LANES": self.config.lanes, **self._options()}

    def _options(self) -> dict[str, int]:
        return {
            "BLOCK_C": self.config.block_c,
            "VEC": self.vector,
            "num_warps": self.config.num_warps,
            "num_stages": 1,
        }


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """(x, elements between neighbouring pixels), copied where these are not all the same."""
    x = channels_inside(x)
    flat, strides = pixel_strides(x)
    if flat:
        return x, strides[2]
    return x.contiguous(memory_format=torch.channels_last), x.shape[1]


def _combining_options(chunks: int) -> dict[str, int]:
    """Constants and launch options of a kernel that combines partials."""
    block = min(max(1 << (chunks - 1).bit_length(), 16), _MAX_CHUNKS)
    warps = block * _COMBINED_CHANNELS // (WARP * _PARTIALS)
    return {
        "CHUNKS": block,
        "BLOCK_C": _COMBINED_CHANNELS,
        "num_warps": min(max(warps, 1), 8),
        "num_stages": 1,
    }


def _map_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _fp32_like(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)
