"""Whether a result is right: no speed-up is told of one that is not.

`deeplab_fast.dispatch.errors` says what the error of a result is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deeplab_fast.dispatch.errors import count_error, label_error, norm_error, norms_error
from deeplab_fast.dispatch.examples import COUNTS, LABELS, VALUES, flat

from .registry import GRADIENT, Case

# Unit roundoff of the formats that a product's operands are rounded to. Of int8 it is half a step
# over the root mean square of the values, whose largest, 127 steps, is about four times that.
ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11, "tf32": 2.0**-11, "int8": 2.0**-6}
# Errors of a network of rounded operands may be this many times their expected size.
SAFETY = 4.0


def errors(
    case: Case, mode: str, outputs: Sequence[Tensor], expected: Sequence[Tensor]
) -> dict[str, float]:
    """The largest error of each kind of output; infinite for NaN and for wrong shapes."""
    kinds = case.kinds(mode)
    found: dict[str, float] = {}
    gradients: list[tuple[Tensor, Tensor]] = []
    if len(outputs) != len(expected):
        return dict.fromkeys(kinds, math.inf)
    for i, (out, ref) in enumerate(zip(outputs, expected, strict=True)):
        kind = kinds[min(i, len(kinds) - 1)]
        shape = (ref.shape[0], *ref.shape[2:]) if kind == LABELS else ref.shape
        if out.shape != shape:
            found[kind] = math.inf
        elif kind == GRADIENT:
            # All parameters together: the error of one whose gradient is nearly 0 says nothing.
            gradients.append((out, ref))
        else:
            error = {VALUES: norm_error, LABELS: label_error, COUNTS: count_error}[kind]
            found[kind] = max(found.get(kind, 0.0), error(out, ref))
    if gradients and GRADIENT not in found:
        found[GRADIENT] = norms_error(gradients)
    return found


def limit(
    case: Case, mode: str, kind: str, precision: str, layers: int, anchor: float | None
) -> float:
    """Largest error that a result of a kind may have.

    Args:
        case, mode, kind: what was computed.
        precision: "fp32", or the format of `ROUNDOFF` that operands are rounded to.
        layers: convolutions of the case, at least 1.
        anchor: error of PyTorch's eager result in that precision; None where there is none.

    In fp32 the case's own tolerance. Below, twice PyTorch's error and one rounding, but never more
    than what independent roundings of both operands of every convolution explain.

    A gradient came through ReLUs. In each layer about as large a fraction of activations changes
    sign as the activations are off, and each of these changes its gradient wholly: a squared
    relative error of that fraction, which adds up over layers.
    """
    roundoff = ROUNDOFF.get(precision, 0.0)
    if precision == "fp32":
        bound, anchor = case.tolerance(kind), None
    else:
        bound = SAFETY * math.sqrt(2 * layers) * roundoff
    if kind == GRADIENT:
        bound = min(1.0, math.sqrt(layers * bound))
    return bound if anchor is None else min(bound, 2 * anchor + roundoff)


@dataclass(frozen=True)
class Truth:
    """Exact labels of sets of inputs, one behind another.

    Attributes:
        labels: for each set [N, H, W].
        gaps: for each set [N, H, W], fp32: the largest logit minus the second largest, over the
            root mean square of all logits.
    """

    labels: list[Tensor]
    gaps: list[Tensor]

    def add(self, logits: Tensor) -> None:
        """Put in what logits [N, C, H, W] give."""
        best, second = logits.topk(2, 1).values.unbind(1)
        self.labels.append(logits.argmax(1))
        self.gaps.append((best - second) / logits.square().mean().sqrt())

    def equal(self, found: Sequence[Tensor]) -> float:
        """The share of pixels whose labels are the exact ones; 0 for other shapes."""
        same = pixels = 0
        for labels, exact in zip(found, self.labels, strict=True):
            if labels.shape != exact.shape:
                return 0.0
            same += int((labels.long() == exact).sum())
            pixels += exact.numel()
        return same / pixels

    def least_equal(self, error: float) -> float:
        """The share to expect where every logit has an independent normal error.

        Args:
            error: standard deviation over the root mean square of the logits.

        Two logits change places where the difference of their errors, of sqrt(2) times that
        deviation, exceeds their gap.
        """
        scale = -1 / (math.sqrt(2) * error)
        moved = sum(float(torch.special.ndtr(gaps * scale).sum()) for gaps in self.gaps)
        return 1 - moved / sum(gaps.numel() for gaps in self.gaps)


def logit_error(case: Case, precision: str, layers: int) -> float:
    """What the logits of a network are off, as `Truth.least_equal` takes it.

    Args:
        case: the network.
        precision, layers: as `limit` has them.

    In fp32 the case's tolerance. Below, independent roundings of both operands of every
    convolution, each taken at its largest. What they are on average is 0.4 of that, so that labels
    that follow from it stay two to three times nearer.
    """
    if precision == "fp32":
        return case.tolerance(LABELS)
    return math.sqrt(2 * layers) * ROUNDOFF[precision]


def outputs(result: object) -> list[Tensor]:
    """What a call returned, as a list of tensors outside autograd."""
    return [t.detach() for t in flat(result)]
