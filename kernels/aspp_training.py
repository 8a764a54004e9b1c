"""The convolutions of the ASPP in training, in Triton: the launchers.

`aspp_convs` and `aspp_convs_backward` take what the references of the same names in
`deeplab_fast.reference` take, already validated. The kernels, how they share out the work and what
they cost are in `aspp_training_kernels.py`; importing this module does not import Triton.

The kernels read filters from one matrix and write their gradients to one, `packing.pack_weights`.
Weights change at every step of training, so the matrix is made at every call, but from views of
such a matrix. Tile lists are copied to the device as `plan/tables.py` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..plan.gemm import GemmConfig
from ..plan.gradients import DgradSchedule, dgrad_schedule, wgrad_schedule
from ..plan.packing import branches_of, channels_inside, empty_map, pack_weights, unpack_weights
from ..plan.rules import dgrad_rule, wgrad_rule
from ..plan.schedule import Int32, Schedule, schedule, stats_table
from ..plan.taps import Branch, tap_rectangles
from . import launch
from .aspp import branches_config, work
from .launch import grid, is_longest, launch_options, map_strides, precision, vector

# Rows of a cut tile that one program adds up; columns where it takes all rows.
_SUM_ROWS = 16
_SUM_COLS = 32
# Blocks of pixels whose statistics a program reads side by side, and its channels.
_STATS_ENTRIES = 64
_STATS_COLS = 16


def aspp_convs(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    stats: bool,
    config: GemmConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = concat over branches b of conv(x, weight_b, dilation_b), and the statistics of y.

    Args:
        x: [N, C, H, W] fp16, bf16 or fp32; a layout other than channels_last is copied.
        weights: for each branch [K_b, C, 1, 1] or [K_b, C, 3, 3], the dtype of x.
        dilations: for each branch an int of at least 1.
        stats: whether mean and variance are asked for.
        config: None for the choice of `rules.BRANCHES`.

    Returns:
        y [N, sum K_b, H, W], channels_last, accumulated in fp32 and rounded once; mean and biased
        variance of the rounded values of each channel, [sum K_b] fp32, 0 without values, or empty.

    Raises:
        RuntimeError: the shape is new and a CUDA graph is being captured.
    """
    n, channels, height, width = x.shape
    branches = branches_of(weights, dilations)
    filters = sum(b.channels for b in branches)
    y = empty_map(x, filters)
    make = x.new_zeros if n == 0 else x.new_empty
    mean, variance = (make(filters if stats else 0, dtype=torch.float32) for _ in range(2))
    if n == 0:
        return y, mean, variance
    kernels = launch.device_module("aspp_training_kernels")
    matrix = pack_weights(weights)
    x = channels_inside(x)
    x_strides, y_strides = map_strides(x), map_strides(y)
    vec_x = min(vector(x, channels, *x_strides), vector(matrix))
    vec_y = vector(y, *y_strides, *(b.channels for b in branches))
    aligned = is_longest(x, vec_x, vec_y)
    config, tables, partial = work(
        x, branches, aligned, config, branches_config, schedule, _stats_tables
    )
    first, counts, ranges, first_channels = tables.more
    widest = max(b.channels for b in branches)
    y_steps = [s // vec_y for s in y_strides]
    tiles = x.new_empty((counts.numel() if stats else 0, 2, widest), dtype=torch.float32)
    with launch.on_device(x):
        kernels.aspp_convs_kernel[grid(tables.starts.numel() - 1)](
            x, matrix, y, partial, tiles, tables.classes, tables.parts, tables.starts,
            first, widest,
            channels // vec_x, *(s // vec_x for s in x_strides), *y_steps,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_C=config.block_c,
            VEC_X=vec_x, VEC_Y=vec_y, EVEN_C=channels % config.block_c == 0,
            SPLIT=tables.slots > 0, STATS=stats, PRECISION=precision(x),
            **launch_options(config),
        )  # fmt: skip
        if tables.slots:
            cols = min(_SUM_COLS, config.block_n)
            kernels.aspp_convs_sum_kernel[grid(tables.sums.shape[0] * (config.block_n // cols))](
                partial, y, tiles, tables.classes, tables.sums, first, widest, *y_steps,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, COLS=cols, VEC_Y=vec_y,
                STATS=stats, num_warps=4,
            )  # fmt: skip
        if stats:
            blocks = -(-widest // _STATS_COLS)
            kernels.aspp_stats_kernel[grid(len(branches) * blocks)](
                tiles, counts, ranges, first_channels, mean, variance,
                widest, blocks, n * height * width,
                ENTRIES=_STATS_ENTRIES, COLS=_STATS_COLS, num_warps=4,
            )  # fmt: skip
    return y, mean, variance


def aspp_convs_backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    to_x: bool,
    to_weights: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of `aspp_convs` to x (empty if not `to_x`) and the weights (none if not asked).

    Args:
        grad: [N, sum K_b, H, W], the gradient to y, in the dtype of x.
        x, weights, dilations: as for `aspp_convs`.

    Returns:
        dx [N, C, H, W], channels_last, and for each branch [K_b, C, kernel, kernel], of any
        strides; the dtype of x, accumulated in fp32 and rounded once.

    Raises:
        RuntimeError: the shape is new and a CUDA graph is being captured.
    """
    branches = branches_of(weights, dilations)
    grad = channels_inside(grad)
    dx = dgrad(grad, pack_weights(weights), branches) if to_x else x.new_empty(0)
    dw = unpack_weights(wgrad(grad, x, branches), branches) if to_weights else []
    return dx, dw


def dgrad(
    grad: Tensor, matrix: Tensor, branches: tuple[Branch, ...], config: GemmConfig | None = None
) -> Tensor:
    """dx[p] = sum over branches b and live taps t of W_b[t]^T grad_b[p - t d_b].

    Args:
        grad: [N, sum K_b, H, W] fp16, bf16 or fp32; other layouts than channels_last are copied.
        matrix: [sum taps K, C], `packing.pack_weights` of the filters, the dtype of grad.
        branches: the branches.
        config: None for the choice of `rules.dgrad_rule`.

    Returns:
        [N, C, H, W], channels_last.
    """
    n, _, height, width = grad.shape
    channels = matrix.shape[1]
    dx = empty_map(grad, channels)
    if n == 0:
        return dx
    kernels = launch.device_module("aspp_training_kernels")
    grad = channels_inside(grad)
    g_strides, x_strides = map_strides(grad), map_strides(dx)
    vec_g = vector(grad, *g_strides, *(b.channels for b in branches))
    vec_x = min(vector(dx, channels, *x_strides), vector(matrix))
    aligned = is_longest(grad, vec_g, vec_x)
    config, tables, partial = work(
        dx, branches, aligned, config, dgrad_rule, dgrad_schedule, _dgrad_tables
    )
    steps, pixels = tables.more
    sizes = n * height * width, height, width
    x_steps = [s // vec_x for s in x_strides]
    with launch.on_device(grad):
        kernels.aspp_dgrad_kernel[grid(tables.starts.numel() - 1)](
            grad, matrix, dx, partial, tables.classes, steps, pixels, tables.parts, tables.starts,
            *sizes, channels // vec_x, *(s // vec_g for s in g_strides), *x_steps,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_C=config.block_c,
            VEC_G=vec_g, VEC_X=vec_x,
            EVEN_K=all(b.channels % config.block_c == 0 for b in branches),
            EVEN_C=channels % config.block_n == 0,
            SPLIT=tables.slots > 0, PRECISION=precision(grad),
            **launch_options(config),
        )  # fmt: skip
        if tables.slots:
            rows = min(_SUM_ROWS, config.block_m)
            kernels.aspp_dgrad_sum_kernel[grid(tables.sums.shape[0] * (config.block_m // rows))](
                partial, dx, pixels, tables.sums, *sizes, channels // vec_x, *x_steps,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, ROWS=rows, VEC_X=vec_x,
                num_warps=4,
            )  # fmt: skip
    return dx


def wgrad(
    grad: Tensor, x: Tensor, branches: tuple[Branch, ...], config: GemmConfig | None = None
) -> Tensor:
    """dW_b[t] = sum of grad_b[p]^T x[p + t d_b] over the pixels p for which p + t d_b is inside.

    Args:
        grad: [N, sum K_b, H, W] fp16, bf16 or fp32; other layouts than channels_last are copied.
        x: [N, C, H, W], the dtype of grad, likewise.
        branches: the branches.
        config: None for the choice of `rules.wgrad_rule`.

    Returns:
        [sum taps K, C], contiguous; `packing.unpack_weights` makes the filters' gradients of it.
        Taps that never touch the map are 0.
    """
    n, channels, height, width = x.shape
    size = (sum(b.taps * b.channels for b in branches), channels)
    live = len(tap_rectangles(height, width, branches))
    if n == 0 or live < sum(b.taps for b in branches):
        dw = grad.new_zeros(size)
    else:
        dw = grad.new_empty(size)
    if n == 0:
        return dw
    kernels = launch.device_module("aspp_training_kernels")
    grad, x = channels_inside(grad), channels_inside(x)
    g_strides, x_strides = map_strides(grad), map_strides(x)
    vec_g = vector(grad, *g_strides, *(b.channels for b in branches))
    vec_x = min(vector(x, channels, *x_strides), vector(dw))
    aligned = is_longest(x, vec_g, vec_x)
    config, tables, partial = work(x, branches, aligned, config, wgrad_rule, wgrad_schedule)
    with launch.on_device(x):
        kernels.aspp_wgrad_kernel[grid(tables.starts.numel() - 1)](
            grad, x, dw, partial, tables.classes, tables.parts, tables.starts,
            channels // vec_x, *(s // vec_g for s in g_strides), *(s // vec_x for s in x_strides),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_C=config.block_c,
            VEC_G=vec_g, VEC_X=vec_x, WIDE=_is_wide(grad, vec_g) or _is_wide(x, vec_x),
            SPLIT=tables.slots > 0, PRECISION=precision(x),
            **launch_options(config),
        )  # fmt: skip
        if tables.slots:
            rows = min(_SUM_ROWS, config.block_m)
            kernels.aspp_wgrad_sum_kernel[grid(tables.sums.shape[0] * (config.block_m // rows))](
                partial, dw, tables.classes, tables.sums, channels // vec_x,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, ROWS=rows, VEC_X=vec_x,
                num_warps=4,
            )  # fmt: skip
    return dw


def _is_wide(x: Tensor, vec: int) -> bool:
    """Whether a pixel is so far from the first that its distance in units takes 64 bits."""
    sizes = zip((x.shape[0], *x.shape[2:]), map_strides(x), strict=True)
    return sum((size - 1) * stride for size, stride in sizes) // vec >= 2**31


def _stats_tables(work: Schedule, block_m: int) -> Sequence[Int32]:
    table = stats_table(work, block_m)
    return table.first, table.counts, table.ranges, table.channels


def _dgrad_tables(work: DgradSchedule, block_m: int) -> Sequence[Int32]:
    return work.steps, work.pixels
