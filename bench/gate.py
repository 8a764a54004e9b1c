"""Whether a result is right: no speed-up is told of one that is not.

The error of a result is the relative 2-norm of its difference from the exact one. Labels and counts
have no such norm; theirs is brought to the same scale:

    labels   a wrong label costs the distance between the largest logit and that of the label. Two
             logits that are each off by at most six standard deviations of an error e (one in 5e8
             is further off) can be mistaken for each other up to a distance of 12 e; the error is
             the largest distance over 12 root mean squares of the logits.
    counts   logits of the same error move the pixels whose two best logits are closer than 12 e,
             about that fraction of all, since the density of the distance at 0 is about one over
             the standard deviation of the logits. The error is the fraction of moved pixels over
             12.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .registry import COUNTS, GRADIENT, LABELS, VALUES, Case

# Unit roundoff of the formats that a product's operands are rounded to.
ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11, "tf32": 2.0**-11}
# Six deviations of each of two logits.
DEVIATIONS = 12.0
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
            error = {VALUES: _norm_error, LABELS: _label_error, COUNTS: _count_error}[kind]
            found[kind] = max(found.get(kind, 0.0), error(out, ref))
    if gradients and GRADIENT not in found:
        found[GRADIENT] = _norms_error(gradients)
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


def _norm_error(out: Tensor, ref: Tensor) -> float:
    return _norms_error([(out, ref)])


def _norms_error(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    difference = size = 0.0
    for out, ref in pairs:
        # One image at a time: a float64 copy of a batch of full-size logits takes gigabytes.
        for o, r in zip(_parts(out), _parts(ref), strict=True):
            r = r.double()
            difference += float((o.double() - r).square().sum())
            size += float(r.square().sum())
    error = math.sqrt(difference / size) if size else math.sqrt(difference)
    return error if math.isfinite(error) else math.inf


def _label_error(labels: Tensor, logits: Tensor) -> float:
    worst = 0.0
    square = count = 0.0
    for label, full in zip(labels.long(), logits, strict=True):
        full = full.double()
        if bool(((label < 0) | (label >= full.shape[0])).any()):
            return math.inf
        worst = max(worst, float((full.amax(0) - full.gather(0, label[None])[0]).max()))
        square += float(full.square().sum())
        count += full.numel()
    error = worst / (DEVIATIONS * math.sqrt(square / count)) if worst else 0.0
    return error if math.isfinite(error) else math.inf


def _count_error(counts: Tensor, ref: Tensor) -> float:
    if int(counts.sum()) != int(ref.sum()):
        return math.inf
    moved = float((counts.double() - ref.double()).abs().sum()) / 2
    return moved / max(1.0, float(ref.sum())) / DEVIATIONS


def _parts(t: Tensor) -> Sequence[Tensor]:
    return t.unbind(0) if t.dim() == 4 else [t]


def outputs(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """What a call returned, as a list of tensors outside autograd."""
    found = [result] if isinstance(result, Tensor) else list(result)
    return [torch.Tensor.detach(t) for t in found]
