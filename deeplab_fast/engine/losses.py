"""Losses of low-resolution logits against full-resolution labels, and class weights from counts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..ops.common import check_map, check_target

__all__ = ["LossKind", "SegmentationLoss", "class_weights_from_counts"]

LossKind = Literal["cross_entropy", "hard_pixels", "focal", "dice", "cross_entropy+dice"]
LabelSize = Literal["full", "downsampled"]
WeightMethod = Literal["median_frequency", "inverse_log"]

_OPTIONS = (
    "kind",
    "ignore_index",
    "label_smoothing",
    "top_k",
    "min_kept",
    "focal_gamma",
    "dice_weight",
    "labels",
    "align_corners",
)
# ENet's constant: it bounds the weights by 1 / ln 1.02 = 50.5.
_INVERSE_LOG_OFFSET = 1.02


class SegmentationLoss(nn.Module):
    """The training loss of a segmentation: scalar from logits [N, C, h, w] and labels [N, H, W].

    With z the logits upsampled bilinearly to (H, W), p = softmax(z), y the labels, w the class
    weights and V the pixels that are not ignored, over all images of the batch (of this process):

        l_i            = -w_y(i) log p_i,y(i)           (with label smoothing as PyTorch defines it)
        cross_entropy  = sum_V l_i / sum_V w_y(i)
        hard_pixels    = mean of the k largest l_i of V,
                         k = min(|V|, max(1, round(top_k |V|), min_kept))
        focal          = sum_V (1 - p_i,y(i))^gamma l_i / sum_V w_y(i)
        D_c            = 2 sum_V p_i,c [y(i) = c] / (sum_V p_i,c^2 + sum_V [y(i) = c])
        dice           = 1 - mean of D_c over the classes in the labels of V
        cross_entropy+dice = cross_entropy + dice_weight * dice

    A class that is not in the labels has D_c = 0 and no gradient whatever is predicted, so it is
    left out of the mean. One class has one logit z, which is the pair of logits (0, z): p_1 =
    sigmoid(z), labels are 0 (background) and 1, cross entropy is binary cross entropy, weights are
    two, and Dice is the mean over background and class. Where every pixel is ignored each kind is
    nan, as PyTorch's mean is, and its gradient is 0.

    Cross entropy, hard pixels and focal use `ops.upsample_cross_entropy`, which never holds logits
    at full resolution; the last two keep fp32 losses a pixel. Dice is made of PyTorch's interpolate
    and softmax and holds several tensors [N, C, H, W] in fp32 for its gradient.

    Args:
        kind: one of the five formulas.
        ignore_index: label whose pixels count for nothing.
        class_weights: C weights (of one class 2) of 0 or more, or None for ones; kept on the
            module's device as a buffer that is not in the state_dict. They act on l_i; hard pixels
            are ranked by the weighted loss, and their mean is over k.
        label_smoothing: in [0, 1), for l_i (not focal, whose p is of the label alone).
        top_k: fraction in (0, 1] of V that counts (hard_pixels).
        min_kept: least number of pixels that count (hard_pixels).
        focal_gamma: exponent, 0 or more (focal).
        dice_weight: factor of Dice in "cross_entropy+dice".
        labels: "full" upsamples the logits to the labels; "downsampled" takes for each logit the
            label nearest to its place in the image (as interpolate's "nearest-exact" does; with
            align_corners nearest to i (H - 1) / (h - 1)) and applies the formulas at [h, w], as
            DeepLabv2 did.
        align_corners: as in torch.nn.functional.interpolate; the model's own.

    Options are fixed once made. Raises ValueError for one out of range, and for class weights or
    label smoothing with a kind that does not have them.

    Source: arXiv 1706.05587, section 4.1 (upsampled logits; DeepLabv2's way for comparison);
    arXiv 1604.03540 (online hard example mining), here by pixel as the bootstrapped cross entropy
    of arXiv 1611.08323; arXiv 1708.02002, section 3 (focal loss, its alpha as class weights);
    arXiv 1606.04797, section 3 (Dice with squares).
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        kind: LossKind = "cross_entropy",
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        top_k: float = 0.25,
        min_kept: int = 0,
        focal_gamma: float = 2.0,
        dice_weight: float = 1.0,
        labels: LabelSize = "full",
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        _check_choice("kind", kind, get_args(LossKind))
        _check_choice("labels", labels, get_args(LabelSize))
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if not 0.0 < top_k <= 1.0:
            raise ValueError(f"top_k is a fraction of the pixels in (0, 1], got {top_k}")
        if min_kept < 0:
            raise ValueError(f"min_kept is a number of pixels, 0 or more, got {min_kept}")
        if not 0.0 <= focal_gamma < math.inf:
            raise ValueError(f"focal_gamma must be 0 or more and finite, got {focal_gamma}")
        if not 0.0 <= dice_weight < math.inf:
            raise ValueError(f"dice_weight must be 0 or more and finite, got {dice_weight}")
        if kind == "dice" and (class_weights is not None or label_smoothing):
            raise ValueError(
                "kind 'dice' has no class_weights and no label_smoothing; leave them out, or use "
                "'cross_entropy+dice', where they act on the cross entropy"
            )
        if kind == "focal" and label_smoothing:
            raise ValueError(
                "kind 'focal' has no label_smoothing; leave it out, or use 'cross_entropy'"
            )
        self.kind = kind
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.top_k = top_k
        self.min_kept = min_kept
        self.focal_gamma = focal_gamma
        self.dice_weight = dice_weight
        self.labels = labels
        self.align_corners = align_corners
        weights = None if class_weights is None else _weight_vector(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OPTIONS and name in self.__dict__:
            raise AttributeError(f"{name} is fixed; make a new SegmentationLoss to change it")
        super().__setattr__(name, value)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            logits: [N, C, h, w] before upsampling, fp16, bf16, fp32 or fp64, any strides.
            target: labels [N, H, W], uint8, int32 or int64; of one class 0, 1 and ignore_index.

        Returns:
            Scalar, fp32 (fp64 for fp64 logits).

        Raises:
            ValueError, TypeError: shapes, dtypes or devices that do not fit, another number of
                class weights than C, or a label that is neither in [0, C) nor ignore_index, with
                its position. On CUDA such a label counts as ignored (`ops.upsample_cross_entropy`
                says how to have it raise), and so it does in kind "dice" under torch.compile.
        """
        name = type(self).__name__
        check_map(name, "logits", logits)
        check_target(name, logits, target)
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        weights = self.class_weights
        if weights is not None and len(weights) != logits.shape[1]:
            raise ValueError(
                f"class_weights has {len(weights)} weights for logits of {logits.shape[1]} "
                "classes; give one weight a class (of one class two: background, class)"
            )
        if self.labels == "downsampled":
            target = _nearest_labels(target, logits.shape[-2:], self.align_corners)
        if self.kind == "hard_pixels":
            return self._hard_pixels(logits, target)
        if self.kind == "focal":
            return self._focal(logits, target)
        if self.kind == "dice":
            if target.device.type == "cpu" and not torch.compiler.is_compiling():
                reference.check_labels(_wide(target), logits.shape[1], self.ignore_index)
            return self._dice(logits, target)
        loss = self._cross_entropy(logits, target, "mean")
        if self.kind == "cross_entropy+dice":
            loss = loss + self.dice_weight * self._dice(logits, target)
        return loss

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in _OPTIONS)

    def _cross_entropy(
        self, logits: Tensor, target: Tensor, reduction: str, weighted: bool = True
    ) -> Tensor:
        return ops.upsample_cross_entropy(
            logits,
            target,
            weight=self.class_weights if weighted else None,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=reduction,
            align_corners=self.align_corners,
        )

    def _hard_pixels(self, logits: Tensor, target: Tensor) -> Tensor:
        # 0 at ignored pixels, which no other loss is below.
        losses = self._cross_entropy(logits, target, "none").flatten()
        # k is known on the device only. A slice of the largest k that any labels of this size give
        # keeps the host from waiting for it.
        pixels = target.numel()
        most = min(pixels, max(1, round(self.top_k * pixels), self.min_kept))
        largest = losses.topk(most).values
        count = _valid(logits, target, self.ignore_index).sum()
        # fp64: fp32 has no room for the pixel count of a large batch.
        kept = (self.top_k * count.double()).round().long().clamp_min(max(1, self.min_kept))
        kept = torch.minimum(kept, count)
        counts = torch.arange(most, device=largest.device) < kept
        return torch.where(counts, largest, 0.0).sum() / kept

    def _focal(self, logits: Tensor, target: Tensor) -> Tensor:
        # 0 at ignored pixels, where the factor is 0 too.
        losses = self._cross_entropy(logits, target, "none", weighted=False)
        valid = _valid(logits, target, self.ignore_index)
        weights = valid.to(losses.dtype)
        if self.class_weights is not None:
            labels = torch.where(valid, _wide(target), 0).long()
            weights = weights * self.class_weights.to(losses.dtype)[labels]
        # 1 - p without cancellation near p = 1; the clamp keeps the slope of a fraction of a power
        # finite at 0.
        missing = (-torch.expm1(-losses)).clamp_min(torch.finfo(losses.dtype).tiny)
        return (missing**self.focal_gamma * losses * weights).sum() / weights.sum()

    def _dice(self, logits: Tensor, target: Tensor) -> Tensor:
        target = _wide(target)
        full = reference.upsample(logits, target.shape[-2:], self.align_corners)
        valid = _valid(logits, target, self.ignore_index)
        p = full.softmax(1) * valid[:, None]
        classes = torch.arange(logits.shape[1], device=target.device)[:, None, None]
        truth = (target[:, None] == classes) & valid[:, None]
        pixels = (0, 2, 3)
        count = truth.sum(pixels)
        present = count > 0
        overlap = 2.0 * (p * truth).sum(pixels)
        # Below 1 only for classes that are left out, which must not divide by 0.
        dice = overlap / ((p * p).sum(pixels) + count).clamp_min(1.0)
        return torch.where(present, 1.0 - dice, 0.0).sum() / present.sum()


def class_weights_from_counts(
    pixel_counts: Sequence[int], method: WeightMethod = "median_frequency"
) -> tuple[float, ...]:
    """Class weights from the number of pixels n_c of each class in the training set.

        median_frequency: w_c = median(n) / n_c, the median over the classes with n_c > 0
        inverse_log:      w_c = 1 / ln(1.02 + n_c / sum(n))

    A class without pixels has weight 1 by median frequency (that of the median class), and
    1 / ln 1.02 by the other formula.

    Args:
        pixel_counts: C counts of 0 or more, ignored pixels not counted (`DataReport.pixels` of
            `deeplab_fast.data.check`).
        method: which formula.

    Returns:
        C weights, for `SegmentationLoss(class_weights=...)`.

    Raises:
        ValueError: no class, a negative count, nothing counted, or another method.

    Source: arXiv 1511.00561 (SegNet: median frequency balancing, frequencies over the whole
    training set); arXiv 1606.02147 (ENet).
    """
    _check_choice("method", method, get_args(WeightMethod))
    counts = [int(n) for n in pixel_counts]
    if not counts or min(counts) < 0 or not any(counts):
        raise ValueError(
            f"pixel_counts must be one count of 0 or more for each class, not all 0, got {counts}"
        )
    if method == "median_frequency":
        median = statistics.median([n for n in counts if n])
        return tuple(median / n if n else 1.0 for n in counts)
    total = sum(counts)
    return tuple(1.0 / math.log(_INVERSE_LOG_OFFSET + n / total) for n in counts)


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _weight_vector(weights: Sequence[float]) -> Tensor:
    vector = torch.as_tensor(weights, dtype=torch.float32).detach().clone()
    if vector.dim() != 1 or not len(vector):
        raise ValueError(
            f"class_weights must be one weight for each class, got shape {list(vector.shape)}"
        )
    if not bool(torch.isfinite(vector).all()) or bool((vector < 0).any()) or not vector.any():
        raise ValueError(
            f"class_weights must be finite, 0 or more and not all 0, got {vector.tolist()}"
        )
    return vector


def _valid(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Pixels that count; labels out of range do not, as in the CUDA kernels."""
    target = _wide(target)
    return (target != ignore_index) & (target >= 0) & (target < logits.shape[1])


def _wide(target: Tensor) -> Tensor:
    """Labels in a dtype in which a comparison with a number outside 0..255 does not wrap around."""
    return target.int() if target.dtype == torch.uint8 else target


def _nearest_labels(target: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """The labels [N, H, W] nearest to the places of [h, w] logits; the higher index at a tie."""
    for dim, count in zip((1, 2), size, strict=True):
        length = target.shape[dim]
        i = torch.arange(count, device=target.device)
        # Whole numbers: interpolate's fp32 scale picks a neighbour at some ratios.
        if not align_corners:
            nearest = (2 * i + 1) * length // (2 * count)
        elif count > 1:
            nearest = (2 * i * (length - 1) + count - 1) // (2 * (count - 1))
        else:
            nearest = i
        target = target.index_select(dim, nearest)
    return target
