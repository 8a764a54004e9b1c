"""How `fold_filters` lays out its results, and the work of its GPU kernel.

Results lie one behind another in one allocation. Every layer starts at a multiple of `ALIGNMENT`
elements, whatever their dtype; what lies between the end of a layer and the start of the next is
zero.

The kernel takes its work from two tables: a row of facts for each layer, and for each program the
layer that it works on. Addresses of the filters are among the facts, so that one launch reads all
layers where they lie. A layer is cut in one of two ways:

    whole    filters that lie in memory in the order of their result, as channels_last ones, 1x1
             ones and those of one channel do, each of a whole number of 16-byte vectors, the first
             at a multiple of 16 bytes: a tile is `VECTORS` vectors
    by pair  all others, with any strides: a tile is all taps of `PAIRS` pairs (filter, channel).
             Contiguous filters of R S taps are read R S elements apart, tap after tap: each cache
             line comes from memory once and is then found in the first-level cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .schedule import Int32
from .tables import capturing, to_device

# 16 bytes of the narrowest results: what vector accesses and cuDNN ask for.
ALIGNMENT = 8
VECTOR_BYTES = 16
# Four for each of 128 threads: a block asks for 8 KiB before it waits, where 3e12 bytes a second at
# a delay of 0.8 us need 18 KiB on the way to each of 132 multiprocessors.
VECTORS = 512
# 9 KiB of 3x3 filters in float32: the 12 blocks that a multiprocessor has registers for find their
# lines in its first-level cache.
PAIRS = 256

Shape = tuple[int, ...]
Int64 = NDArray[np.int64]


class LayerField(IntEnum):
    """Columns of `FoldTable.layers`.

    The filters start at ADDRESS (bytes); their strides are FILTER, CHANNEL, ROW and COL (elements).
    There are CHANNELS channels, TAPS taps, COLS of them in a row. UNITS are pairs, or vectors where
    WHOLE is 1; there CHANNELS are all values of a filter, in vectors. The result starts at RESULT,
    the scales at SCALE, the tiles at TILE. GAP elements behind the result, at END, are to be zero.
    """

    ADDRESS = 0
    FILTER = 1
    CHANNEL = 2
    ROW = 3
    COL = 4
    CHANNELS = 5
    TAPS = 6
    COLS = 7
    UNITS = 8
    WHOLE = 9
    RESULT = 10
    END = 11
    GAP = 12
    SCALE = 13
    TILE = 14


LAYER_FIELDS = 16


@dataclass(frozen=True)
class Filters:
    """A layer's filters as they lie in memory.

    Attributes:
        shape: [K, C, R, S].
        strides: in elements.
        address: of the first, in bytes.
    """

    shape: Shape
    strides: Shape
    address: int


@dataclass(frozen=True)
class FoldTable:
    """The work of a launch.

    Attributes:
        layers: [L, LAYER_FIELDS], `LayerField`.
        tiles: [programs], the layer of each.
    """

    layers: Int64
    tiles: Int32


def shapes_of(weights: Iterable[Tensor]) -> list[Shape]:
    """The shapes [K, C, R, S] of filters."""
    return [tuple(w.shape) for w in weights]


def starts(shapes: Iterable[Shape]) -> list[int]:
    """The first element of each layer's result, and behind them the size of the allocation."""
    found = [0]
    for shape in shapes:
        found.append(found[-1] + _padded(prod(shape)))
    return found


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def gaps(shapes: Sequence[Shape]) -> list[tuple[int, int]]:
    """(first element, end) of what belongs to no layer, where there is anything."""
    first = starts(shapes)
    ends = [start + prod(shape) for start, shape in zip(first, shapes, strict=False)]
    return [pair for pair in zip(ends, first[1:], strict=True) if pair[0] < pair[1]]


def views(flat: Tensor, shapes: Iterable[Shape]) -> list[Tensor]:
    """Each layer's result, channels_last, as a view of the allocation.

    Args:
        flat: [starts(shapes)[-1]].
        shapes: [K, C, R, S] of each layer.
    """
    found, start = [], 0
    for k, c, r, s in shapes:
        row, one = s * c, r * s * c
        found.append(flat.as_strided((k, c, r, s), (one, 1, row, c), start))
        start += _padded(k * one)
    return found


def fold_table(layers: Sequence[Filters], itemsize: int) -> FoldTable:
    """The tables of a call.

    Args:
        layers: the filters.
        itemsize: bytes of a value of theirs.
    """
    rows = np.zeros((len(layers), LAYER_FIELDS), np.int64)
    first = starts(layer.shape for layer in layers)
    counts: list[int] = []
    filters = tiles = 0
    for row, layer, start, end in zip(rows, layers, first, first[1:], strict=False):
        facts = _cut(layer, itemsize)
        tile = VECTORS if facts[LayerField.WHOLE] else PAIRS
        size = prod(layer.shape)
        facts |= {
            LayerField.ADDRESS: layer.address,
            LayerField.RESULT: start,
            LayerField.END: start + size,
            LayerField.GAP: end - start - size,
            LayerField.SCALE: filters,
            LayerField.TILE: tiles,
        }
        for field, value in facts.items():
            row[field] = value
        filters += layer.shape[0]
        counts.append(-(-facts[LayerField.UNITS] // tile))
        tiles += counts[-1]
    return FoldTable(rows, np.repeat(np.arange(len(layers), dtype=np.int32), counts))


def _cut(layer: Filters, itemsize: int) -> dict[LayerField, int]:
    """What says how a layer is read, and the units of its tiles."""
    k, c, r, s = layer.shape
    vector = VECTOR_BYTES // itemsize
    strides = layer.strides
    if _lies_as_its_result(layer):
        c, r, s = c * r * s, 1, 1
        strides = (c, 1, 0, 0)
        if c % vector == 0 and layer.address % VECTOR_BYTES == 0:
            return {
                LayerField.CHANNELS: c // vector,
                LayerField.UNITS: k * c // vector,
                LayerField.WHOLE: 1,
            }
    fields = (LayerField.FILTER, LayerField.CHANNEL, LayerField.ROW, LayerField.COL)
    return {
        **dict(zip(fields, strides, strict=True)),
        LayerField.CHANNELS: c,
        LayerField.TAPS: r * s,
        LayerField.COLS: s,
        LayerField.UNITS: k * c,
        LayerField.WHOLE: 0,
    }


def _lies_as_its_result(layer: Filters) -> bool:
    """Whether the filters are dense and channels_last; the stride of one entry has no meaning."""
    _, c, r, s = layer.shape
    dense = (r * s * c, 1, s * c, c)
    return all(
        size == 1 or stride == expected
        for size, stride, expected in zip(layer.shape, layer.strides, dense, strict=True)
    )


@dataclass(frozen=True)
class Tables:
    """`FoldTable` on a device, and the size of the allocation of the results."""

    layers: Tensor
    tiles: Tensor
    size: int


# Of calls that no CUDA graph was captured with, the latest: filters move when a model is loaded
# anew. About 100 KB each for ResNet-50.
MOST_TABLES = 64
_latest: OrderedDict[tuple[object, ...], Tables] = OrderedDict()
# Never emptied: a captured graph reads them through raw pointers for as long as it lives.
_captured: dict[tuple[object, ...], Tables] = {}


def device_tables(weights: Sequence[Tensor]) -> Tables:
    """The tables of a call on the weights' device, copied there at the first call with filters at
    these addresses.

    Raises:
        RuntimeError: there was none, and a CUDA graph is being captured.
    """
    x = weights[0]
    # Asked for at every call, with 60 filters: nothing is made of the facts before they are new.
    facts = tuple([(w.shape, w.stride(), w.data_ptr()) for w in weights])
    key = (facts, x.element_size(), x.device)
    tables = _captured.get(key)
    if tables is not None:
        return tables
    tables = _latest.get(key)
    if tables is None:
        table = fold_table([Filters(*fact) for fact in facts], x.element_size())
        what = f"the table of these {len(facts)} layers' filters is"
        layers, tiles = to_device([table.layers.view(np.int32), table.tiles], x, what)
        size = starts(shape for shape, *_ in facts)[-1]
        tables = Tables(layers.view(torch.int64), tiles, size)
    if capturing(x):
        _captured[key] = tables
        return tables
    _latest[key] = tables
    with suppress(KeyError):
        # Unless another thread has dropped it at this moment.
        _latest.move_to_end(key)
    if len(_latest) > MOST_TABLES:
        _, dropped = _latest.popitem(last=False)
        if dropped.tiles.is_cuda:
            # Whatever stream reads it: its memory is handed out again.
            torch.cuda.synchronize(dropped.tiles.device)
    return tables
