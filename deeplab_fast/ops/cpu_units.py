"""The units of work into which the C++ code cuts a convolution by tiles, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ._cpu_forms import tile_forms
from .cpu_rates import rates


@dataclass(frozen=True)
class Unit:
    """What one thread does without looking up.

    Attributes:
        stage: its number; a stage begins when all units of the one before are done.
        seconds: predicted, of one thread.
    """

    stage: int
    seconds: float


def tile_units(
    shape: Sequence[int],
    outputs: int,
    dilation: int,
    threads: int,
    *,
    coarse: bool = False,
    cache_bytes: int = 0,
) -> list[Unit]:
    """The units of the fastest form of a 3x3 convolution with stride 1 and padding = dilation.

    Args:
        shape: of the input, [N, C, H, W].
        outputs: channels of the result.
        dilation: of the filter.
        threads: that share the work.
        coarse: as for `PreparedConv`.
        cache_bytes: of the third-level cache; 0 for this processor's.

    Returns:
        The units in the order in which threads take them.
    """
    n, channels, height, width = shape
    form = tile_forms(n, channels, outputs, height, width, dilation, threads, True, coarse)[0]
    axes = ([a.long.number, a.short.number] for a in (form.rows, form.columns))
    found = torch.ops.deeplab_fast._conv_tile_units(
        list(shape), outputs, dilation, *axes, threads, cache_bytes
    )
    by = rates()
    return [
        Unit(stage, macs / by.multiply + lines * by.line_seconds)
        for stage, macs, lines in found.tolist()
    ]
