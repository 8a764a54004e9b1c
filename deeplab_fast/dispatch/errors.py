"""How far a result is from the exact one.

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

from torch import Tensor

# What an fp32 result may be off: sums in another order than PyTorch's, and forms that save
# multiplications (CONTRIBUTING.md, "How far a result may be off").
DIRECT = 2e-6
SAVING = 1e-5


class Wrong(Exception):
    """A result is wrong; the message names the check.

    Attributes:
        facts: what is known beside it, for whoever keeps the answer.
    """

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts


def one_line(error: BaseException, most: int = 300) -> str:
    """An exception's type and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"


# Six deviations of each of two logits.
DEVIATIONS = 12.0


def norm_error(out: Tensor, ref: Tensor) -> float:
    """|out - ref| / |ref|, |out| where ref is 0; infinite for NaN."""
    return norms_error([(out, ref)])


def norms_error(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """As `norm_error`, of all pairs (out, ref) as one."""
    difference = size = 0.0
    for out, ref in pairs:
        # One image at a time: a float64 copy of a batch of full-size logits takes gigabytes.
        for o, r in zip(_parts(out), _parts(ref), strict=True):
            r = r.double()
            difference += float((o.double() - r).square().sum())
            size += float(r.square().sum())
    error = math.sqrt(difference / size) if size else math.sqrt(difference)
    return error if math.isfinite(error) else math.inf


def label_error(labels: Tensor, logits: Tensor) -> float:
    """Labels [N, H, W] against the logits [N, C, H, W] that they should be the largest of."""
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


def count_error(counts: Tensor, ref: Tensor) -> float:
    """A table of counts of pixels against another; infinite where their sums differ."""
    if int(counts.sum()) != int(ref.sum()):
        return math.inf
    moved = float((counts.double() - ref.double()).abs().sum()) / 2
    return moved / max(1.0, float(ref.sum())) / DEVIATIONS


def _parts(t: Tensor) -> Sequence[Tensor]:
    return t.unbind(0) if t.dim() == 4 else [t]
