"""Upsampling fused with what follows it, in Triton: the launchers.

Each function takes what the reference of the same name in `deeplab_fast.reference` takes, already
validated, and gives its results, in float32 arithmetic. The kernels, how they share out the work
and what they cost are in `upsample_kernels.py`; importing this module does not import Triton.

Labels outside [0, C) that are not ignore_index cannot raise on a GPU without stopping it. They are
treated as ignored and counted; `last_label_errors` gives the count of the last call, and with
DEEPLAB_FAST_STRICT_LABELS=1 every call waits for it and raises.

Index tables are copied to the device as `plan/tables.py` says.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import reference
from ..dispatch import limits
from ..dispatch.describe import OpDesc
from ..plan import tables
from ..plan import upsample as plan
from ..plan.bilinear import axis_tables
from ..plan.tunable import Tunable
from ..plan.upsample import UpsampleConfig, UpsampleKey, num_confusion_tables
from . import launch
from .launch import grid
from .tuned import choose

STRICT_LABELS = "DEEPLAB_FAST_STRICT_LABELS"
# A confusion matrix beyond this takes more memory than the logits it replaces.
_MAX_CONFUSION_CLASSES = 8192
_FINISH_BLOCK = 1024
_GATHER_CLASSES = 8
_MAX_GATHER_COLS = 64


@dataclass(frozen=True)
class _Axis:
    """`plan.bilinear.AxisTables` on a device."""

    low: Tensor
    lam: Tensor
    first: Tensor
    block_low: Tensor
    block_start: Tensor
    num_blocks: int
    most_blocks_touching: int


# Never emptied: a captured CUDA graph reads the tables through raw pointers for as long as it
# lives. An entry holds about 2 out_size + in_size words.
_axes: dict[tuple[int, int, bool, int, torch.device], _Axis] = {}
_last_label_errors: dict[torch.device, Tensor] = {}


def not_supported_reasons(desc: OpDesc) -> list[str]:
    """Why the Triton kernels cannot run the call; empty where they can.

    Args:
        desc: a call of one of the upsampling ops.
    """
    reasons = limits.triton(desc)
    if desc.params.get("accumulator_dtype") == torch.float64:
        reasons.append("adds in float32, the accumulator is float64")
    if desc.op == "upsample_confusion" and desc.shape[1] > _MAX_CONFUSION_CLASSES:
        reasons.append(f"counts at most {_MAX_CONFUSION_CLASSES} classes, got {desc.shape[1]}")
    return reasons


def last_label_errors(device: torch.device | str) -> Tensor | None:
    """Labels outside [0, C) that were not ignore_index, in the last call on a device.

    Returns:
        [1] int64 on the device, written by the kernels without a synchronisation (reading it waits
        for them); None before the first call that takes labels.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _last_label_errors.get(device)


def upsample_argmax(
    logits: Tensor, size: tuple[int, int], align_corners: bool, return_prob: bool
) -> tuple[Tensor, Tensor]:
    """Argmax over classes of the upsampled logits, and its softmax probability.

    Ties and NaN are resolved as torch.argmax does: the first of equal values, and the first NaN
    before every number.

    Args:
        logits: [N, C, h, w] fp16, bf16 or fp32, any strides.
        size: (H, W).
        align_corners: as in torch.nn.functional.interpolate.
        return_prob: also compute the probabilities.

    Returns:
        labels [N, H, W], uint8 up to 256 classes, else int64; prob [N, H, W] fp32, or empty where
        it is not asked for.
    """
    kernels = launch.device_module("upsample_kernels")
    n, classes, in_rows, in_cols = logits.shape
    rows, cols = size
    labels = logits.new_empty((n, rows, cols), dtype=reference.label_dtype(classes))
    prob = logits.new_empty((n, rows, cols) if return_prob else (0,), dtype=torch.float32)
    if n == 0:
        return labels, prob
    config, y, x, col_tiles, programs = _layout(plan.ARGMAX, logits, (rows, cols), align_corners)
    with launch.on_device(logits):
        kernels.upsample_argmax_kernel[programs](
            logits, labels, prob,
            y.first, y.block_low, y.lam, x.low, x.lam,
            classes, in_rows, in_cols, rows, cols, y.num_blocks, col_tiles,
            *logits.stride(),
            ROWS=config.rows, COLS=config.cols, WITH_PROB=return_prob,
            num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip
    return labels, prob


def upsample_confusion(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool
) -> Tensor:
    """Counts of (target, argmax of the upsampled logits); exact.

    The counts are spread over many tables and added up, so that pixels of the same two classes do
    not queue for one counter; the result does not depend on their order.

    Args:
        logits: [N, C, h, w] fp16, bf16 or fp32, any strides.
        target: [N, H, W] uint8, int32 or int64, any strides.
        ignore_index: label that is not counted.
        align_corners: as in torch.nn.functional.interpolate.

    Returns:
        [C, C] int64, rows are the target.

    Raises:
        ValueError: with DEEPLAB_FAST_STRICT_LABELS=1, a label outside [0, C) that is not
            ignore_index; otherwise such pixels are not counted.
    """
    kernels = launch.device_module("upsample_kernels")
    n, classes, in_rows, in_cols = logits.shape
    rows, cols = target.shape[-2:]
    if n == 0:
        return logits.new_zeros((classes, classes), dtype=torch.int64)
    config, y, x, col_tiles, programs = _layout(plan.CONFUSION, logits, (rows, cols), align_corners)
    num_tables = num_confusion_tables(classes, target.numel())
    # Any table may get every pixel.
    count_dtype = torch.int32 if target.numel() < 2**31 else torch.int64
    counts = logits.new_zeros((num_tables, classes, classes), dtype=count_dtype)
    bad = logits.new_empty(programs[0], dtype=torch.int32)
    with launch.on_device(logits):
        kernels.upsample_confusion_kernel[programs](
            logits, target, counts, bad,
            y.first, y.block_low, y.lam, x.low, x.lam,
            classes, in_rows, in_cols, cols, y.num_blocks, col_tiles, ignore_index, num_tables - 1,
            *logits.stride(), *target.stride(),
            ROWS=config.rows, COLS=config.cols,
            num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip
    _report(bad.sum(0, keepdim=True, dtype=torch.int64), target, classes, ignore_index)
    return counts.sum(0, dtype=torch.int64)


def upsample_softmax_add(
    accumulator: Tensor, logits: Tensor, flip: bool, align_corners: bool
) -> None:
    """accumulator += softmax of the upsampled logits, mirrored left-right if `flip`; in place.

    Args:
        accumulator: [N, C, H, W] fp32, any strides that give every element its own place.
        logits: [N, C, h, w] fp16, bf16 or fp32, any strides.
        flip: the logits are those of the mirrored image.
        align_corners: as in torch.nn.functional.interpolate.

    Raises:
        ValueError: elements of the accumulator share memory.
    """
    kernels = launch.device_module("upsample_kernels")
    steps = zip(accumulator.stride(), accumulator.shape, strict=True)
    if any(step == 0 and size > 1 for step, size in steps):
        raise ValueError(
            f"upsample_softmax_add: accumulator {list(accumulator.shape)} with strides "
            f"{list(accumulator.stride())} is an expanded tensor, whose elements share memory; "
            "pass a clone()"
        )
    n, classes, in_rows, in_cols = logits.shape
    rows, cols = accumulator.shape[-2:]
    if n == 0:
        return
    config, y, x, col_tiles, programs = _layout(
        plan.SOFTMAX_ADD, logits, (rows, cols), align_corners
    )
    with launch.on_device(logits):
        kernels.upsample_softmax_add_kernel[programs](
            logits, accumulator,
            y.first, y.block_low, y.lam, x.low, x.lam,
            classes, in_rows, in_cols, cols, y.num_blocks, col_tiles,
            *logits.stride(), *accumulator.stride(),
            ROWS=config.rows, COLS=config.cols, FLIP=flip,
            num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    align_corners: bool,
) -> Tensor:
    """Cross entropy of the upsampled logits, as torch.nn.functional.cross_entropy defines it.

    Args:
        logits: [N, C, h, w] fp16, bf16 or fp32, any strides.
        target: [N, H, W] uint8, int32 or int64, any strides.
        weight: [C] class weights, or None for ones.
        ignore_index: label whose pixels count for nothing.
        label_smoothing: in [0, 1].
        reduction: "mean", "sum" or "none".
        align_corners: as in torch.nn.functional.interpolate.

    Returns:
        fp32: the loss, or for "none" [N, H, W] with 0 at ignored pixels. "mean" of no pixel is NaN.

    Raises:
        ValueError: with DEEPLAB_FAST_STRICT_LABELS=1, a label outside [0, C) that is not
            ignore_index; otherwise such pixels are ignored.
    """
    call = _CrossEntropy(logits, target, weight, ignore_index, label_smoothing, align_corners)
    if reduction == "none":
        loss = logits.new_empty(target.shape, dtype=torch.float32)
        if logits.shape[0]:
            call.run(None, loss, None)
            call.report(call.counts[1].sum(0, keepdim=True, dtype=torch.int64))
        return loss
    if logits.shape[0] == 0:
        return _loss_of_nothing(logits, reduction)
    call.run(None, None, None)
    return call.finish(None, reduction)[0]


def upsample_cross_entropy_with_grad(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """`upsample_cross_entropy` and its gradient to the logits, in one pass over output pixels.

    Args:
        reduction: "mean" or "sum"; the rest as `upsample_cross_entropy`.

    Returns:
        loss, and d loss / d logits [N, C, h, w] contiguous. The gradient is fp32 whatever the dtype
        of the logits: it still has to be multiplied by the gradient of the loss, which loss scaling
        makes large because the product with 1 / pixels would vanish in fp16. Round the product.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    grad_logits = logits.new_empty(logits.shape, dtype=torch.float32)
    if logits.shape[0] == 0:
        return _loss_of_nothing(logits, reduction), grad_logits
    call = _CrossEntropy(logits, target, weight, ignore_index, label_smoothing, align_corners)
    partial = call.run(None, None, grad_logits)
    result = call.finish(None, reduction)
    call.gather(partial, result[1:], grad_logits)
    return result[0], grad_logits


def upsample_cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    align_corners: bool,
) -> Tensor:
    """Gradient of `upsample_cross_entropy` to the logits, times `grad`.

    Args:
        grad: gradient of the loss: scalar, or for "none" [N, H, W] with any strides.
        logits, ...: as `upsample_cross_entropy`.

    Returns:
        [N, C, h, w] contiguous in the dtype of the logits, rounded once.
    """
    grad_logits = logits.new_empty(logits.shape)
    if logits.shape[0] == 0:
        return grad_logits
    call = _CrossEntropy(logits, target, weight, ignore_index, label_smoothing, align_corners)
    if reduction == "none":
        partial = call.run(grad, None, grad_logits)
        call.report(call.counts[1].sum(0, keepdim=True, dtype=torch.int64))
        call.gather(partial, None, grad_logits)
    else:
        partial = call.run(None, None, grad_logits)
        result = call.finish(grad, reduction)
        call.gather(partial, result[1:], grad_logits)
    return grad_logits


class _CrossEntropy:
    """The launches that make up one call of the cross entropy functions, for N > 0."""

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        align_corners: bool,
    ) -> None:
        self.kernels = launch.device_module("upsample_kernels")
        self.logits = logits
        self.target = target
        self.weight = None if weight is None else weight.to(torch.float32).contiguous()
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.align_corners = align_corners

    def run(
        self, pixel_grad: Tensor | None, loss_map: Tensor | None, grad_logits: Tensor | None
    ) -> Tensor:
        """The pass over output pixels; returns the partial gradients, empty without `grad_logits`.

        Sets `sums` and `counts`. `grad_logits` only says that gradients are wanted.
        """
        logits, target = self.logits, self.target
        n, classes, in_rows, in_cols = logits.shape
        rows, cols = target.shape[-2:]
        with_grad = grad_logits is not None
        kernel = plan.LOSS_AND_GRADIENT if with_grad else plan.LOSS
        config, y, x, col_tiles, programs = _layout(
            kernel, logits, (rows, cols), self.align_corners
        )
        shape = (n, y.num_blocks, 4, classes, x.num_blocks) if with_grad else (0,)
        partial = logits.new_empty(shape, dtype=torch.float32)
        self.rows, self.cols = y, x
        self.sums = logits.new_empty((2, programs[0]), dtype=torch.float32)
        self.counts = logits.new_empty((2, programs[0]), dtype=torch.int32)
        with launch.on_device(logits):
            self.kernels.upsample_cross_entropy_kernel[programs](
                logits, target, self.weight, pixel_grad,
                loss_map, self.sums, self.counts, partial,
                y.first, y.block_low, y.lam, x.first, x.low, x.lam,
                classes, in_rows, in_cols, rows, cols, y.num_blocks, x.num_blocks, col_tiles,
                *logits.stride(),
                *target.stride(), *((0, 0, 0) if pixel_grad is None else pixel_grad.stride()),
                self.ignore_index, float(self.label_smoothing),
                ROWS=config.rows, COLS=config.cols, BLOCK_COLS=config.block_cols or config.cols,
                HAS_WEIGHT=self.weight is not None, SMOOTH=self.label_smoothing != 0.0,
                LOSS_MAP=loss_map is not None, WITH_GRAD=with_grad,
                PIXEL_GRAD=pixel_grad is not None,
                num_warps=config.num_warps, num_stages=1,
            )  # fmt: skip
        return partial

    def finish(self, grad: Tensor | None, reduction: str) -> Tensor:
        """[2] fp32: the loss, and what the gathered partials are to be multiplied by."""
        result = self.sums.new_empty(2)
        bad = self.counts.new_empty(1, dtype=torch.int64)
        with launch.on_device(result):
            self.kernels.cross_entropy_finish_kernel[(1,)](
                self.sums, self.counts, grad, result, bad, self.sums.shape[1],
                MEAN=reduction == "mean", HAS_GRAD=grad is not None, BLOCK=_FINISH_BLOCK,
                num_warps=8, num_stages=1,
            )  # fmt: skip
        self.report(bad)
        return result

    def gather(self, partial: Tensor, factor: Tensor | None, grad_logits: Tensor) -> None:
        """Sum the partial gradients of each logit into `grad_logits`, times `factor` [1]."""
        n, classes, in_rows, in_cols = grad_logits.shape
        cols = min(_MAX_GATHER_COLS, 1 << (in_cols - 1).bit_length())
        col_tiles = -(-in_cols // cols)
        class_tiles = -(-classes // _GATHER_CLASSES)
        y, x = self.rows, self.cols
        with launch.on_device(grad_logits):
            self.kernels.gradient_gather_kernel[grid(n * in_rows * class_tiles * col_tiles)](
                partial, factor, grad_logits,
                y.block_start, y.block_low, x.block_start, x.block_low,
                classes, in_rows, in_cols, y.num_blocks, x.num_blocks, col_tiles, class_tiles,
                x.most_blocks_touching,
                CLASSES=_GATHER_CLASSES, COLS=cols, HAS_FACTOR=factor is not None,
                num_warps=4, num_stages=1,
            )  # fmt: skip

    def report(self, bad: Tensor) -> None:
        _report(bad, self.target, self.logits.shape[1], self.ignore_index)


def _loss_of_nothing(logits: Tensor, reduction: str) -> Tensor:
    """The loss of a batch without images, as PyTorch has it."""
    return logits.new_full((), float("nan") if reduction == "mean" else 0.0, dtype=torch.float32)


def _report(bad: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Keep the count of bad labels; in strict mode read it, and raise where there are any."""
    _last_label_errors[bad.device] = bad
    # A capture cannot wait for a result; what it records can be checked through the kept count.
    strict = os.environ.get(STRICT_LABELS) == "1" and not tables.capturing(bad)
    if strict and bad.item():
        reference.check_labels(target, num_classes, ignore_index)


def _layout(
    tunable: Tunable[UpsampleKey, UpsampleConfig],
    logits: Tensor,
    out_size: tuple[int, int],
    align_corners: bool,
) -> tuple[UpsampleConfig, _Axis, _Axis, int, tuple[int]]:
    """(configuration, rows, columns, programs side by side, grid) of a pass over output pixels."""
    n, classes, *in_size = logits.shape
    dtype = str(logits.dtype).removeprefix("torch.")
    sizes = ((in_size[0], in_size[1]), out_size, bool(align_corners))
    config = choose(tunable, UpsampleKey(n, classes, *sizes, dtype), launch.device_of(logits))
    y = _axis(in_size[0], out_size[0], align_corners, config.rows, logits)
    x = _axis(in_size[1], out_size[1], align_corners, config.block_cols or 1, logits)
    if config.block_cols:
        col_tiles = -(-x.num_blocks // config.col_blocks)
    else:
        col_tiles = -(-out_size[1] // config.cols)
    return config, y, x, col_tiles, grid(n * y.num_blocks * col_tiles)


def _axis(in_size: int, out_size: int, align_corners: bool, block: int, like: Tensor) -> _Axis:
    """The tables of an axis on the device of `like`, copied there at the first call."""
    key = (in_size, out_size, bool(align_corners), block, like.device)
    axis = _axes.get(key)
    if axis is not None:
        return axis
    made = axis_tables(*key[:3], block)
    low, lam, first, block_low, block_start = tables.to_device(
        [made.low, made.lam.view(np.int32), made.first, made.block_low, made.block_start],
        like,
        f"the index tables for {in_size} -> {out_size} are",
    )
    axis = _Axis(
        low,
        lam.view(torch.float32),
        first,
        block_low,
        block_start,
        made.num_blocks,
        made.most_blocks_touching,
    )
    _axes[key] = axis
    return axis
