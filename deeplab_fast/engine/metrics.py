"""Scores of a segmentation from its confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["ImageScore", "Metrics", "percent", "worst_and_best"]


@dataclass(frozen=True)
class Metrics:
    """Scores in 0..1 from counts M[i, j] of pixels of class i that were predicted as j.

        IoU_c = M[c,c] / (sum_j M[c,j] + sum_i M[i,c] - M[c,c])
        accuracy_c = M[c,c] / sum_j M[c,j]
        pixel_accuracy = sum_c M[c,c] / sum M
        frequency_weighted_iou = sum_c (sum_j M[c,j]) IoU_c / sum M

    ``miou`` and ``mean_accuracy`` are means over the classes where the fraction exists: a class
    that occurs neither in the labels nor in the predictions (``absent``) has no IoU and one that
    does not occur in the labels no accuracy; these are nan. A class that was predicted and does
    not occur in the labels has IoU 0 and counts. Nothing counted at all: every score is nan.
    Where labels and predictions hold one class alone of several, every pixel is right because there
    is nothing to tell apart: the means and the weighted IoU are nan. ``not_finite`` counts pixels
    whose logits are NaN or infinite, which were scored all the same: above 0 the scores are those
    of a broken run.

    Source: arXiv 1411.4038, section 5; absent classes as in mmsegmentation (nanmean).
    """

    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    frequency_weighted_iou: float
    classes: tuple[str, ...]
    iou: tuple[float, ...]
    accuracy: tuple[float, ...]
    target_pixels: tuple[int, ...]
    predicted_pixels: tuple[int, ...]
    not_finite: int = 0

    @classmethod
    def from_confusion(
        cls,
        confusion: np.ndarray | Tensor | Sequence[Sequence[int]],
        classes: Sequence[str] | None = None,
        *,
        not_finite: int = 0,
    ) -> Metrics:
        """The scores of a matrix.

        Args:
            confusion: integers [C, C], rows are the labels, columns the predictions; an array or a
                tensor on any device (as ``ops.upsample_confusion`` gives).
            classes: C names; "class 0", ... without.
            not_finite: pixels whose logits are NaN or infinite.

        Raises:
            ValueError: another shape or dtype, negative counts, or another number of names.
        """
        if isinstance(confusion, Tensor):
            confusion = confusion.detach().cpu().numpy()
        matrix = np.asarray(confusion)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
            raise ValueError(f"the confusion matrix is {list(matrix.shape)}, expected [C, C]")
        if not np.issubdtype(matrix.dtype, np.integer) or matrix.min() < 0:
            raise ValueError(
                f"the confusion matrix holds {matrix.dtype} from {matrix.min()}, expected counts "
                "(integers, 0 or more)"
            )
        count = matrix.shape[0]
        names = tuple(f"class {i}" for i in range(count)) if classes is None else tuple(classes)
        if len(names) != count:
            raise ValueError(f"{len(names)} class names for a confusion matrix of {count} classes")
        matrix = matrix.astype(np.int64)
        hits, target, predicted = np.diagonal(matrix), matrix.sum(1), matrix.sum(0)
        total = int(target.sum())
        iou = _ratio(hits, target + predicted - hits)
        accuracy = _ratio(hits, target)
        present = target > 0
        weighted = float((target[present] * iou[present]).sum())
        # Trivially 1 where one class is all there is.
        told_apart = count == 1 or np.count_nonzero(target + predicted) > 1
        return cls(
            miou=_mean(iou) if told_apart else math.nan,
            pixel_accuracy=int(hits.sum()) / total if total else math.nan,
            mean_accuracy=_mean(accuracy) if told_apart else math.nan,
            frequency_weighted_iou=weighted / total if total and told_apart else math.nan,
            classes=names,
            iou=tuple(iou.tolist()),
            accuracy=tuple(accuracy.tolist()),
            target_pixels=tuple(target.tolist()),
            predicted_pixels=tuple(predicted.tolist()),
            not_finite=int(not_finite),
        )

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the classes in neither labels nor predictions; they are in no mean."""
        return tuple(
            name for name, value in zip(self.classes, self.iou, strict=True) if math.isnan(value)
        )

    @property
    def num_scored(self) -> int:
        """Number of classes that ``miou`` is the mean of."""
        return len(self.classes) - len(self.absent)

    @property
    def note(self) -> str:
        """Why the scores say little or nothing, as text; empty where they say what they should."""
        parts = []
        if self.not_finite:
            parts.append(
                f"{self.not_finite} pixels have logits that are NaN or infinite: these are the "
                "scores of a broken run"
            )
        if self.num_scored == 1 and len(self.classes) > 1:
            name = next(n for n, iou in zip(self.classes, self.iou, strict=True) if iou == iou)
            parts.append(
                f"labels and predictions hold one class only ({name}): there is nothing to tell "
                "apart, and no mean"
            )
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, scores in 0..1; it has no nan: None instead."""
        return {
            "miou": _or_none(self.miou),
            "pixel_accuracy": _or_none(self.pixel_accuracy),
            "mean_accuracy": _or_none(self.mean_accuracy),
            "frequency_weighted_iou": _or_none(self.frequency_weighted_iou),
            "not_finite_pixels": self.not_finite,
            "note": self.note,
            "classes_scored": self.num_scored,
            "absent": list(self.absent),
            "classes": [
                {
                    "name": name,
                    "iou": _or_none(iou),
                    "accuracy": _or_none(accuracy),
                    "target_pixels": target,
                    "predicted_pixels": predicted,
                }
                for name, iou, accuracy, target, predicted in zip(
                    self.classes,
                    self.iou,
                    self.accuracy,
                    self.target_pixels,
                    self.predicted_pixels,
                    strict=True,
                )
            ],
        }

    def table(self) -> str:
        """Per class and in total as text, in percent; "-" for what does not exist."""
        total = sum(self.target_pixels)
        width = max(map(len, (*self.classes, "frequency-weighted IoU")))
        lines = [f"{'in percent':<{width}}  {'IoU':>6}  {'accuracy':>8}  {'share':>6}"]
        for name, iou, accuracy, pixels in zip(
            self.classes, self.iou, self.accuracy, self.target_pixels, strict=True
        ):
            share = pixels / total if total else math.nan
            lines.append(
                f"{name:<{width}}  {percent(iou):>6}  {percent(accuracy):>8}  {percent(share):>6}"
            )
        scored = f" (of {self.num_scored} classes)" if self.absent else ""
        for title, value in (
            ("mean IoU", self.miou),
            ("mean accuracy", self.mean_accuracy),
            ("pixel accuracy", self.pixel_accuracy),
            ("frequency-weighted IoU", self.frequency_weighted_iou),
        ):
            note = scored if title == "mean IoU" else ""
            lines.append(f"{title:<{width}}  {percent(value):>6}{note}")
        if self.note:
            lines.append(f"note: {self.note}")
        if self.absent:
            lines.append(
                "in neither labels nor predictions, left out of the mean IoU: "
                + ", ".join(self.absent)
            )
        return "\n".join(lines)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    result = np.full(part.shape, math.nan)
    np.divide(part, whole, out=result, where=whole > 0)
    return result


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def percent(value: float) -> str:
    """A score in 0..1 as percent with two digits, "-" for nan."""
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


@dataclass(frozen=True)
class ImageScore:
    """One image's scores: IoU is the mean over the classes in its labels or prediction.

    ``pixels`` counts those that are not ignored; without any the scores are nan. ``not_finite``
    counts the pixels, ignored ones too, whose logits are NaN or infinite: what was predicted there
    means nothing.
    """

    index: int
    name: str
    miou: float
    pixel_accuracy: float
    pixels: int
    not_finite: int = 0


def worst_and_best(images: Sequence[ImageScore], count: int) -> list[tuple[str, int, ImageScore]]:
    """The ``count`` worst and the ``count`` best by mIoU: kind, rank from 1, score.

    The first are the worst and the best. Of fewer than twice as many images each is one of them.
    Images without a score are left out.
    """
    ranked = [image for image in images if not math.isnan(image.miou)]
    ranked.sort(key=lambda image: (image.miou, image.index))
    worst = ranked[: min(count, (len(ranked) + 1) // 2)]
    best = ranked[len(worst) :][::-1][:count]
    return [
        (kind, rank, score)
        for kind, chosen in (("worst", worst), ("best", best))
        for rank, score in enumerate(chosen, start=1)
    ]
