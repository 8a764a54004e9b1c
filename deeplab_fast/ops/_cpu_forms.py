"""Which algorithm a convolution on the CPU runs: the forms, their counts and a cost model.

A 3x3 convolution with stride 1 whose padding is its dilation d falls into d * d independent maps,
its phases. Along each axis a phase is cut into tiles of a form: `line1`, `line2`, `line3` take a
whole phase of that many samples, `tile2` ... `tile6` take a tile of that many outputs of a longer
one. csrc/include/deeplab_fast/conv_forms.h has the matrices, conv_run.h the algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from .cpu_rates import Rates, rates

# Measured in November 2026 on 2 cores of an AMD EPYC of the third generation (AVX2, 512 KiB of
# second-level cache each, 32 MiB third-level); `cpu_rates` has what depends on the processor most.

# Prepared weights beyond the third-level cache's share are read again for each block of tiles.
CACHED_WEIGHTS = 12 << 20
STREAMED_TILES = 192
STREAM_RATE = 20e9
# Preparing weights: bytes written to fresh memory, and a time for each of outputs x channels.
PREPARE_RATE = 1e9
PREPARE_SECONDS = 20e-9
# Multiply-adds of the depthwise kernel, whose taps come from a first-level cache two at a time, and
# of products of few channels.
DEPTHWISE_RATE = 18e9
STRIPS_RATE = 42e9
# Of a value that is copied into a patch, and of a run of them that lie one behind another; of a
# value of a map that a pass over it reads and writes.
GATHER_SECONDS = 0.1e-9
GATHER_RUN_SECONDS = 1.7e-9
PASS_SECONDS = 0.3e-9
# Larger maps are mapped anew by malloc for every call; a page of 4 KiB that is faulted in took
# 3.2 to 3.9 us (65,507 and 16,457 faults of a MobileNetV3 at 1024x2048).
MAPPED_BYTES = 32 << 20
FAULT_SECONDS = 3.2e-6
# Of a call, and of a form within it; of a call to oneDNN.
CALL_SECONDS = 15e-6
ONEDNN_CALL_SECONDS = 80e-6
# The error of tile6 is 5e-6 (2-norm, up to 2048 channels, against float64), that of others at most
# 1.4e-6: it must be this much faster, and stands only where few layers follow. In all layers of a
# ResNet-50 it put the logits of badly conditioned networks 3.9 times as far off as PyTorch's
# (geometric mean of 8), without it they are 1.4 times as far off, and 1.3 times with oneDNN alone,
# which is what folding costs.
TILE6_HANDICAP = 1.2
# What a byte of prepared weights that stay must save, in seconds of one thread. A ResNet-50 at
# 520x520 holds 380 MB for the 101 MB of its 3x3 convolutions by it, predicted to take 407.6 ms of
# 1.45 s; 449 MB and 399.0 ms without, 298 MB and 446.6 ms at twice the price. bench/NOTES.md has
# the forms one by one, and why 1.5 times the weights are out of reach.
WEIGHT_PRICE = 0.35e-9
# Bytes of a layer without a price: what a model holds is in few large layers.
FREE_WEIGHTS = 4 << 20


@dataclass(frozen=True)
class Form:
    """Facts of a form; `number` is its place in conv_forms.h."""

    name: str
    number: int
    outputs: int
    inputs: int
    products: int
    whole_line: bool


FORMS = {
    form.name: form
    for form in (
        Form("line1", 0, 1, 1, 1, True),
        Form("line2", 1, 2, 2, 3, True),
        Form("line3", 2, 3, 3, 4, True),
        Form("tile2", 3, 2, 4, 4, False),
        Form("tile3", 4, 3, 5, 5, False),
        Form("tile4", 5, 4, 6, 6, False),
        Form("tile6", 6, 6, 8, 8, False),
    )
}
_PANEL = 16


@dataclass(frozen=True)
class Axis:
    """Forms along one axis and the number of tiles of each.

    Attributes:
        long: the form of the phases of ceil(length / dilation) samples.
        short: that of the phases that are one shorter; `long` where there are none.
        tiles: (form, tiles) of the one or two forms, `long` first.
    """

    long: Form
    short: Form
    tiles: tuple[tuple[Form, int], ...]

    def __str__(self) -> str:
        return self.long.name if self.long == self.short else f"{self.long.name}/{self.short.name}"


def phases(length: int, dilation: int) -> tuple[int, int, int]:
    """(samples, number of phases of that many, number of phases of one fewer)."""
    short, longer = divmod(length, dilation)
    return (
        (short + 1, longer, dilation - longer if short else 0) if longer else (short, dilation, 0)
    )


@lru_cache(maxsize=4096)
def axes(length: int, dilation: int) -> tuple[Axis, ...]:
    """The ways of covering one axis that can be the best one."""
    samples, long_phases, short_phases = phases(length, dilation)
    found = []
    for long in FORMS.values():
        if long.whole_line and long.outputs < samples:
            continue
        for short in FORMS.values():
            # Two sets of prepared weights pay where both phases are whole lines.
            if short != long and not (long.whole_line and short.whole_line and short_phases):
                continue
            if short != long and short.outputs != samples - 1:
                continue
            long_tiles = long_phases * _tiles(long, samples)
            short_tiles = short_phases * _tiles(short, samples - 1)
            if short == long:
                found.append(Axis(long, long, ((long, long_tiles + short_tiles),)))
            else:
                found.append(Axis(long, short, ((long, long_tiles), (short, short_tiles))))
    return tuple(found)


def _tiles(form: Form, samples: int) -> int:
    return 1 if form.whole_line else math.ceil(samples / form.outputs)


@dataclass(frozen=True)
class TileForm:
    """Forms along rows and columns, and what they cost.

    Attributes:
        macs: multiply-adds.
        weight_bytes: of the prepared weights.
        seconds: predicted.
        price: seconds that the prepared weights must save.
    """

    rows: Axis
    columns: Axis
    macs: int
    weight_bytes: int
    seconds: float
    price: float

    @property
    def pairs(self) -> Iterator[tuple[Form, Form]]:
        """The pairs of forms that need prepared weights, in the order of `_conv_tiles_cpu`."""
        return ((r, c) for r, _ in self.rows.tiles for c, _ in self.columns.tiles)

    @property
    def is_coarse(self) -> bool:
        """Whether its rounding error is that of tile6."""
        return FORMS["tile6"] in (self.rows.long, self.columns.long)

    @property
    def score(self) -> float:
        """What the choice minimises: the seconds, tile6 with a handicap, and the price."""
        return self.seconds * (TILE6_HANDICAP if self.is_coarse else 1) + self.price

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns}"


def tile_forms(
    images: int,
    channels: int,
    outputs: int,
    height: int,
    width: int,
    dilation: int,
    threads: int,
    reuse: bool,
    coarse: bool,
    dtype: str = "float32",
    by: Rates | None = None,
) -> tuple[TileForm, ...]:
    """All candidates for a 3x3 convolution with stride 1 and padding = dilation, the best first.

    Without `reuse` the time of preparing the weights counts; without `coarse` tile6 is left out.
    `by` are the rates that it reckons with, those of maps of `dtype` where it is None.
    """
    shape = (images, channels, outputs, height, width)
    return _tile_forms(*shape, dilation, threads, reuse, coarse, by or rates(dtype))


@lru_cache(maxsize=4096)
def _tile_forms(
    images: int,
    channels: int,
    outputs: int,
    height: int,
    width: int,
    dilation: int,
    threads: int,
    reuse: bool,
    coarse: bool,
    by: Rates,
) -> tuple[TileForm, ...]:
    candidates = [
        _cost(images, channels, outputs, rows, columns, threads, reuse, by)
        for rows in axes(height, dilation)
        for columns in axes(width, dilation)
    ]
    if not coarse:
        candidates = [form for form in candidates if not form.is_coarse]
    return tuple(sorted(candidates, key=lambda form: form.score))


def _cost(
    images: int,
    channels: int,
    outputs: int,
    rows: Axis,
    columns: Axis,
    threads: int,
    reuse: bool,
    by: Rates,
) -> TileForm:
    macs = weight_bytes = 0
    seconds = CALL_SECONDS
    padded_outputs = _lines(outputs) * _PANEL
    for row, row_tiles in rows.tiles:
        for column, column_tiles in columns.tiles:
            products = row.products * column.products
            tiles = images * row_tiles * column_tiles
            size = 4 * products * channels * padded_outputs
            done = products * tiles * channels * padded_outputs
            lines = _lines(channels) * (row.inputs * column.inputs + products)
            lines += _lines(outputs) * (row.outputs * column.outputs + products)
            busy = done / by.multiply + tiles * lines * by.line_seconds
            if size > CACHED_WEIGHTS:
                busy += math.ceil(tiles / STREAMED_TILES) * size / STREAM_RATE
            if not reuse:
                busy += size / PREPARE_RATE + channels * outputs * PREPARE_SECONDS
            macs += products * tiles * channels * outputs
            weight_bytes += size
            seconds += CALL_SECONDS + busy / threads
    # Weights that serve one call do not stay.
    priced = max(0, weight_bytes - FREE_WEIGHTS) if reuse else 0
    price = WEIGHT_PRICE * priced / threads
    return TileForm(rows, columns, macs, weight_bytes, seconds, price)


def onednn_seconds(
    macs: int, threads: int, *, pointwise: bool = False, dtype: str = "float32"
) -> float:
    """Predicted time of oneDNN's direct convolution that does this many multiply-adds.

    Args:
        macs: multiply-adds at taps inside the map.
        threads: that work on it.
        pointwise: whether it is a 1x1 convolution.
        dtype: of the maps, "float32" or "bfloat16"; infinity where oneDNN does not have it.
    """
    by = rates(dtype)
    rate = by.onednn_1x1 if pointwise else by.onednn_3x3
    return ONEDNN_CALL_SECONDS + macs / (rate * threads) if rate else math.inf


def pixels_seconds(
    macs: int, threads: int, *, gathered: int = 0, runs: int = 0, dtype: str = "float32"
) -> float:
    """Predicted time of our convolution as one product.

    Args:
        macs: multiply-adds.
        threads: that work on it.
        gathered, runs: values of patches that are copied first, and runs of them.
        dtype: of the maps, "float32" or "bfloat16".
    """
    busy = macs / rates(dtype).pixels + gathered * GATHER_SECONDS + runs * GATHER_RUN_SECONDS
    return CALL_SECONDS + busy / threads


def pass_seconds(values: int, threads: int) -> float:
    """Predicted time of reading and writing a map of this many values."""
    return values * PASS_SECONDS / threads


def new_map_seconds(values: int, threads: int) -> float:
    """Predicted time that a new map of this many fp32 values takes beyond one that is given."""
    seconds = pass_seconds(values, threads)
    if 4 * values >= MAPPED_BYTES:
        seconds += 4 * values / 4096 * FAULT_SECONDS / threads
    return seconds


def _lines(channels: int) -> int:
    return -(-channels // _PANEL)


def depthwise_seconds(macs: int, threads: int) -> float:
    """Predicted time of the depthwise kernel."""
    return CALL_SECONDS + macs / (DEPTHWISE_RATE * threads)


def strips_seconds(macs_pointwise: int, macs_depthwise: int, threads: int) -> float:
    """Predicted time of an inverted residual in strips."""
    pointwise = macs_pointwise / (STRIPS_RATE * threads)
    return pointwise + depthwise_seconds(macs_depthwise, threads)
