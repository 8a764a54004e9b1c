"""The ASPP's branches and its projection, in Triton: the launchers.

`aspp_branches` and `aspp_project` take what the references of the same names in
`deeplab_fast.reference` take, already validated. The kernels, how they share out the work and what
they cost are in `aspp_kernels.py` and `conv_kernels.py`; importing this module does not import
Triton.

The branches' kernel reads filters from one matrix. `PackedBranches` makes it once; its `weights`,
`scales` and `shifts` are views of it in the shapes that the ops take, and an op called with them
finds the matrix again without a copy. Other weights are packed at every call.

Tile lists are copied to the device at the first call for a shape. That cannot happen while a CUDA
graph is captured: call once before capturing, as torch.cuda.graphs asks for anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.aspp_tiles import Branch, Int32, Schedule, schedule
from . import _compat, configs
from .configs import GemmConfig
from .conv import (
    arithmetic,
    channels_inside,
    device_of,
    fp32,
    grid,
    is_longest,
    launch_options,
    pointwise,
    precision,
    vector,
)

# Rows of a cut tile that one program adds up.
_SUM_ROWS = 16
_SHIFT_FILTERS = 16
_SHIFT_CHANNELS = 128


@dataclass(frozen=True)
class PackedBranches:
    """Filters, scales and shifts of all branches as the kernel reads them.

    Attributes:
        weight: [sum taps K, C], contiguous; rows in the order branch, tap, filter.
        scale, shift: [sum K] fp32, contiguous.
        branches: geometry of the branches.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    branches: tuple[Branch, ...]

    @classmethod
    @torch.no_grad()
    def pack(
        cls,
        weights: Sequence[Tensor],
        scales: Sequence[Tensor],
        shifts: Sequence[Tensor],
        dilations: Sequence[int],
    ) -> PackedBranches:
        """Pack the arguments of `ops.aspp_branches`; views of an earlier pack are not copied.

        Args:
            weights: for each branch [K_b, C, 1, 1] or [K_b, C, 3, 3], one dtype and device.
            scales, shifts: for each branch [K_b].
            dilations: for each branch an int.
        """
        branches = tuple(
            Branch(w.shape[0], w.shape[-1], int(d)) for w, d in zip(weights, dilations, strict=True)
        )
        return cls(pack_weights(weights), _vector(scales), _vector(shifts), branches)

    @property
    def weights(self) -> list[Tensor]:
        """For each branch its filters [K, C, kernel, kernel], a view."""
        return unpack_weights(self.weight, self.branches)

    @property
    def scales(self) -> list[Tensor]:
        """For each branch its scale [K], a view."""
        return list(self.scale.split([b.channels for b in self.branches]))

    @property
    def shifts(self) -> list[Tensor]:
        """For each branch its shift [K], a view."""
        return list(self.shift.split([b.channels for b in self.branches]))

    @property
    def dilations(self) -> list[int]:
        """For each branch its dilation."""
        return [b.dilation for b in self.branches]


def pack_weights(weights: Sequence[Tensor]) -> Tensor:
    """Filters of all branches as one matrix; views of an earlier one are not copied.

    Args:
        weights: for each branch [K_b, C, kernel, kernel], one dtype and device.

    Returns:
        [sum taps K, C], contiguous; rows in the order branch, tap, filter.
    """
    # Tap by tap a matrix [K, C] in which channels are contiguous.
    matrices = [w.permute(2, 3, 0, 1) for w in weights]
    weight = _joined(matrices)
    if weight is None:
        weight = weights[0].new_empty(sum(m.numel() for m in matrices))
        # Each is read and written once; a concatenation would copy them to make them dense.
        for part, m in zip(weight.split([m.numel() for m in matrices]), matrices, strict=True):
            part.view(m.shape).copy_(m)
    return weight.view(-1, weights[0].shape[1])


def unpack_weights(matrix: Tensor, branches: Sequence[Branch]) -> list[Tensor]:
    """For each branch its filters [K, C, kernel, kernel], a view of `pack_weights`'s matrix."""
    return [
        part.view(b.kernel, b.kernel, b.channels, -1).permute(2, 3, 0, 1)
        for part, b in zip(
            matrix.split([b.taps * b.channels for b in branches]), branches, strict=True
        )
    ]


def _vector(parts: Sequence[Tensor]) -> Tensor:
    """The parts one behind the other, in fp32."""
    joined = _joined(parts) if parts[0].dtype == torch.float32 else None
    return torch.cat([fp32(p) for p in parts]) if joined is None else joined


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensors as one [elements] view, where they lie in one storage without gaps, in order."""
    first = parts[0]
    storage = first.untyped_storage().data_ptr()
    end = first.storage_offset()
    for part in parts:
        apart = part.storage_offset() != end or part.untyped_storage().data_ptr() != storage
        if apart or part.dtype != first.dtype or not part.is_contiguous():
            return None
        end += part.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))


@dataclass(frozen=True)
class Tables:
    """`aspp_tiles.Schedule` on a device, and in `more` what belongs to it."""

    classes: Tensor
    parts: Tensor
    sums: Tensor
    starts: Tensor
    slots: int
    more: tuple[Tensor, ...] = ()


# Never emptied: a captured CUDA graph reads the tables through raw pointers for as long as it
# lives. An entry holds 32 bytes a tile.
_tables: dict[tuple[Any, ...], Tables] = {}


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
        config: None for the choice of `configs.aspp_branches_config`.

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
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    elif tuple(out.shape) != shape or out.dtype != x.dtype or (out.stride(1) != 1 and filters > 1):
        raise ValueError(
            f"aspp_branches: out is {out.dtype} {list(out.shape)} with strides {out.stride()}; "
            f"expected {x.dtype} {list(shape)} with neighbouring channels (channels_last)"
        )
    if n == 0:
        return out
    kernels = _compat.device_module("aspp_kernels")
    device = device_of(x)
    x = channels_inside(x)
    x_strides = map_strides(x)
    y_strides = map_strides(out)
    vec_x = min(vector(x, channels, *x_strides), vector(packed.weight))
    vec_y = vector(out, *y_strides, *(b.channels for b in packed.branches))
    if config is None:
        config = configs.aspp_branches_config(
            n, height, width, channels, packed.branches, arithmetic(x), device,
            aligned=is_longest(x, vec_x, vec_y),
        )  # fmt: skip
    tables = device_tables(x, packed.branches, config, device.multiprocessors * config.occupancy)
    y_steps = [s // vec_y for s in y_strides]
    partial = x.new_empty((tables.slots, config.block_m, config.block_n), dtype=torch.float32)
    with _compat.on_device(x):
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
        config: None for the choice of `configs.pointwise_config`.

    Returns:
        [N, K, H, W], or [N, classes, H, W], channels_last.

    Raises:
        ValueError: with a classifier, more filters than a tile holds.
    """
    n, channels, height, width = branches.shape
    matrix = weight.flatten(1)
    filters = matrix.shape[0]
    outputs = filters
    if classifier is not None:
        outputs = classifier[0].shape[0]
        classifier = classifier[0].flatten(1), fp32(classifier[1])
    y = torch.empty(
        (n, outputs, height, width),
        dtype=branches.dtype,
        device=branches.device,
        memory_format=torch.channels_last,
    )
    if n == 0:
        return y
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    scale, shift = fp32(scale), fp32(shift)
    shifts = scale.new_empty((n, filters))
    tiles = -(-filters // _SHIFT_FILTERS)
    kernels = _compat.device_module("conv_kernels")
    with _compat.on_device(branches):
        kernels.image_shift_kernel[grid(n * tiles)](
            pooled, matrix[:, channels:], scale, shift, shifts,
            pooled.shape[1], filters, tiles, *pooled.stride(), matrix.stride(0),
            BLOCK_K=_SHIFT_FILTERS, BLOCK_P=_SHIFT_CHANNELS, num_warps=4,
        )  # fmt: skip
    pointwise(branches, matrix, scale, shifts, y, classifier=classifier, config=config)
    return y


def map_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of image, row and column; 0 for a dimension of one entry."""
    image, _, row, col = x.stride()
    n, _, height, width = x.shape
    return image * (n > 1), row * (height > 1), col * (width > 1)


def device_tables(
    x: Tensor,
    branches: tuple[Branch, ...],
    config: GemmConfig,
    programs: int,
    make: Callable[..., Schedule] = schedule,
    more: Callable[[Any, int], Sequence[Int32]] | None = None,
) -> Tables:
    """The tile list of a call on the device of x, copied there at the first call.

    Args:
        x: [N, C, H, W], the branches' input.
        branches: the branches.
        config: tiles, and whether they are cut.
        programs: thread blocks that run at the same time.
        make: a function of `aspp_tiles` with the arguments of `schedule`.
        more: int32 tables that follow from the list and the pixels of a tile, or None.

    Raises:
        RuntimeError: the shape is new and a CUDA graph is being captured.
    """
    n, channels, height, width = x.shape
    shape = (n, height, width, channels, branches)
    block = (config.block_m, config.block_n, config.block_c)
    key = (*shape, *block, programs, config.split, make, more, x.device)
    tables = _tables.get(key)
    if tables is not None:
        return tables
    if _compat.capturing(x):
        raise RuntimeError(
            f"the tile list for {list(x.shape)} is not on {x.device} yet and cannot be copied "
            "there while a CUDA graph is captured; run the op once at this size before"
        )
    work = make(*shape, *block, programs, config.split)
    others = more(work, config.block_m) if more else ()
    arrays = [work.classes, work.parts, work.sums, work.starts, *others]
    # One copy for all of them, each from a multiple of 16 bytes on.
    sizes = [-(-a.size // 4) * 4 for a in arrays]
    joined = np.zeros(sum(sizes), np.int32)
    for part, a in zip(np.split(joined, np.cumsum(sizes)), arrays, strict=False):
        part[: a.size] = a.ravel()
    packed = torch.from_numpy(joined).to(x.device)
    if packed.is_cuda:
        # The tables outlive this stream's order: any later call may come on another stream.
        torch.cuda.current_stream(x.device).synchronize()
    classes, tiles, sums, starts, *rest = (
        part[: a.size].view(a.shape) for part, a in zip(packed.split(sizes), arrays, strict=True)
    )
    tables = Tables(classes, tiles, sums, starts, work.slots, tuple(rest))
    _tables[key] = tables
    return tables
