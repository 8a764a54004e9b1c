"""The ASPP's branches and its projection, in Triton: the launchers.

`aspp_branches` and `aspp_project` take what the references of the same names in
`deeplab_fast.reference` take, already validated. The kernels, how they share out the work and what
they cost are in `aspp_kernels.py` and `conv_kernels.py`; importing this module does not import
Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..plan.device import Device
from ..plan.gemm import GemmConfig
from ..plan.packing import PackedBranches, channels_inside, empty_map, fp32
from ..plan.rules import BRANCHES, BranchesKey
from ..plan.schedule import Int32, schedule
from ..plan.tables import AnySchedule, Tables, device_tables, workspace
from ..plan.taps import Branch, Problem
from . import launch
from .conv import pointwise
from .launch import arithmetic, grid, is_longest, launch_options, map_strides, precision, vector
from .tuned import choose

# Rows of a cut tile that one program adds up.
_SUM_ROWS = 16
_SHIFT_FILTERS = 16
_SHIFT_CHANNELS = 128


def aspp_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    dilations: Sequence[int],
) -> Tensor:
    """y = concat over branches b of relu(scale_b * conv(x, weight_b, dilation_b) + shift_b).

    Args:
        x: [N, C, H, W] fp16, bf16 or fp32; a layout other than channels_last is copied.
        weights: for each branch [K_b, C, 1, 1] or [K_b, C, 3, 3], the dtype of x.
        scales, shifts: for each branch [K_b], any float dtype; used in fp32.
        dilations: for each branch an int of at least 1.

    Returns:
        [N, sum K_b, H, W], channels_last, accumulated in fp32 and rounded once.
    """
    return aspp_branches_packed(x, PackedBranches.pack(weights, scales, shifts, dilations))


def aspp_branches_packed(
    x: Tensor,
    packed: PackedBranches,
    out: Tensor | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """`aspp_branches` with packed weights.

    Args:
        x: [N, C, H, W], the dtype and device of packed.weight.
        packed: the branches.
        out: [N, sum K_b, H, W], the dtype of x, or None for a new tensor; may be a slice of the
            channels of a larger one, channels_last but for that.
        config: None for the choice of `rules.BRANCHES`.

    Returns:
        out, or the new tensor in channels_last.

    Raises:
        ValueError: out has another shape or dtype, or its channels are not next to each other.
        RuntimeError: the shape is new and a CUDA graph is being captured.
    """
    n, channels, height, width = x.shape
    filters = sum(b.channels for b in packed.branches)
    shape = (n, filters, height, width)
    if out is None:
        out = empty_map(x, filters)
    elif tuple(out.shape) != shape or out.dtype != x.dtype or (out.stride(1) != 1 and filters > 1):
        raise ValueError(
            f"aspp_branches: out is {out.dtype} {list(out.shape)} with strides {out.stride()}; "
            f"expected {x.dtype} {list(shape)} with neighbouring channels (channels_last)"
        )
    if n == 0:
        return out
    kernels = launch.device_module("aspp_kernels")
    x = channels_inside(x)
    x_strides = map_strides(x)
    y_strides = map_strides(out)
    vec_x = min(vector(x, channels, *x_strides), vector(packed.weight))
    vec_y = vector(out, *y_strides, *(b.channels for b in packed.branches))
    aligned = is_longest(x, vec_x, vec_y)
    config, tables, partial = work(x, packed.branches, aligned, config, branches_config, schedule)
    y_steps = [s // vec_y for s in y_strides]
    with launch.on_device(x):
        kernels.aspp_branches_kernel[grid(tables.starts.numel() - 1)](
            x, packed.weight, packed.scale, packed.shift, out, partial,
            tables.classes, tables.parts, tables.starts,
            channels // vec_x, *(s // vec_x for s in x_strides), *y_steps,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_C=config.block_c,
            VEC_X=vec_x, VEC_Y=vec_y, EVEN_C=channels % config.block_c == 0,
            # Compiled for whole tiles alone, those of 128x256 spill in TF32 (Triton 3.7, 9.0).
            SPLIT=tables.slots > 0 or precision(x) == "tf32", PRECISION=precision(x),
            **launch_options(config),
        )  # fmt: skip
        if tables.slots:
            rows = min(_SUM_ROWS, config.block_m)
            blocks = config.block_m // rows
            kernels.aspp_sum_kernel[grid(tables.sums.shape[0] * blocks)](
                partial, packed.scale, packed.shift, out, tables.classes, tables.sums, *y_steps,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, ROWS=rows, VEC_Y=vec_y,
                num_warps=4,
            )  # fmt: skip
    return out


def aspp_project(
    branches: Tensor,
    pooled: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    classifier: tuple[Tensor, Tensor] | None = None,
    config: GemmConfig | None = None,
) -> Tensor:
    """y = relu(scale * (W_branches . branches + W_pooled . pooled) + shift), or its class scores.

    The pooled branch becomes a shift for each image, in fp32. With a classifier (the head of the
    paper: a 1x1 convolution behind the projection) y is rounded to its dtype, as if it were stored,
    and only class_weight . y + class_bias leaves.

    Args:
        branches: [N, B, H, W] fp16, bf16 or fp32; a layout other than channels_last is copied.
        pooled: [N, P], the dtype of branches.
        weight: [K, B + P, 1, 1], the dtype of branches.
        scale, shift: [K], any float dtype; used in fp32.
        classifier: ([classes, K, 1, 1] in the dtype of branches, [classes] any float dtype).
        config: None for the choice of `rules.POINTWISE`.

    Returns:
        [N, K, H, W], or [N, classes, H, W], channels_last.

    Raises:
        ValueError: with a classifier, more filters than a tile holds.
    """
    n, channels, _, _ = branches.shape
    matrix = weight.flatten(1)
    filters = matrix.shape[0]
    outputs = filters
    if classifier is not None:
        outputs = classifier[0].shape[0]
        classifier = classifier[0].flatten(1), fp32(classifier[1])
    y = empty_map(branches, outputs)
    if n == 0:
        return y
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    scale, shift = fp32(scale), fp32(shift)
    shifts = scale.new_empty((n, filters))
    tiles = -(-filters // _SHIFT_FILTERS)
    kernels = launch.device_module("conv_kernels")
    with launch.on_device(branches):
        kernels.image_shift_kernel[grid(n * tiles)](
            pooled, matrix[:, channels:], scale, shift, shifts,
            pooled.shape[1], filters, tiles, *pooled.stride(), matrix.stride(0),
            BLOCK_K=_SHIFT_FILTERS, BLOCK_P=_SHIFT_CHANNELS, num_warps=4,
        )  # fmt: skip
    pointwise(branches, matrix, scale, shifts, y, classifier=classifier, config=config)
    return y


def branches_config(key: BranchesKey, device: Device) -> GemmConfig:
    """The choice for a product of the branches."""
    return choose(BRANCHES, key, device)


def work(
    x: Tensor,
    branches: tuple[Branch, ...],
    aligned: bool,
    config: GemmConfig | None,
    rule: Callable[[BranchesKey, Device], GemmConfig],
    make: Callable[[Problem, GemmConfig, int], AnySchedule],
    more: Callable[[AnySchedule, int], Sequence[Int32]] | None = None,
) -> tuple[GemmConfig, Tables, Tensor]:
    """(configuration, tile list, workspace for cut tiles) of a call.

    Args:
        x: [N, C, H, W], the branches' input or its gradient.
        branches: the branches.
        aligned: operands and result allow accesses of 16 bytes.
        config: None for the choice of `rule`.
        rule: (key, device) -> configuration.
        make, more: as for `tables.device_tables`.

    Raises:
        RuntimeError: the shape is new and a CUDA graph is being captured.
    """
    device = launch.device_of(x)
    if config is None:
        n, channels, height, width = x.shape
        key = BranchesKey(n, height, width, channels, branches, arithmetic(x), aligned)
        config = rule(key, device)
    programs = device.multiprocessors * config.occupancy
    tables = device_tables(x, branches, config, programs, make, more)
    return config, tables, workspace(x, tables, config)
