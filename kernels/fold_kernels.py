"""Triton device code that folds batch norms into the filters of all layers; `fold.py` launches it.

Work and layout
    One launch for all layers: a program finds its layer, and there the address of its filters, in
    the tables of deeplab_fast/plan/fold.py, which says how layers are cut. Filters that lie as
    their result does are read and written 16 bytes at a time (8 where the result is half as wide),
    and one division by the length of a filter serves a whole vector. Others are read in the order
    of the result, a tap after the other: a warp writes 32 neighbouring channels, and reads 32
    values that lie R S elements apart, 5 cache lines of 16-bit 3x3 filters and 9 of float32 ones.
    The other taps find those lines in the first-level cache.

Numerics
    A value is converted to float32, multiplied, and rounded once where it is stored.

Cost, a prediction: bytes over the 3e12 bytes a second of an H100's memory, for the 40e6 filter
values of DeepLabv3 on ResNet-50:
    bf16 to bf16        4 bytes a value       53 us
    float32 to bf16     6 bytes a value       79 us
Two thirds of these values are 3x3 filters. Where they are contiguous, a warp's load takes 5
accesses to the first-level cache in 16 bits and 9 in float32: 4.1e6 and 7.3e6 in all, 18 and 33 us
where each of 132 multiprocessors makes one a cycle of 1.7 GHz, beside the transfers and not behind
them. Their loop takes 14 instructions a value: 11e6 of a warp, 13 us at 9e11 a second. The tables
take 66 KB.
"""

import triton
import triton.language as tl

from ..plan.fold import LAYER_FIELDS, LayerField

_ADDRESS = tl.constexpr(LayerField.ADDRESS.value)
_FILTER = tl.constexpr(LayerField.FILTER.value)
_CHANNEL = tl.constexpr(LayerField.CHANNEL.value)
_ROW = tl.constexpr(LayerField.ROW.value)
_COL = tl.constexpr(LayerField.COL.value)
_CHANNELS = tl.constexpr(LayerField.CHANNELS.value)
_TAPS = tl.constexpr(LayerField.TAPS.value)
_COLS = tl.constexpr(LayerField.COLS.value)
_UNITS = tl.constexpr(LayerField.UNITS.value)
_WHOLE = tl.constexpr(LayerField.WHOLE.value)
_RESULT = tl.constexpr(LayerField.RESULT.value)
_END = tl.constexpr(LayerField.END.value)
_GAP = tl.constexpr(LayerField.GAP.value)
_SCALE = tl.constexpr(LayerField.SCALE.value)
_TILE = tl.constexpr(LayerField.TILE.value)
_LAYER_FIELDS = tl.constexpr(LAYER_FIELDS)


@triton.jit
def _count(layer_ptr, FIELD: tl.constexpr):
    """A fact of a layer that fits 32 bits."""
    return tl.load(layer_ptr + FIELD).to(tl.int32)


@triton.jit
def _fold_vectors(
    layer_ptr, tile, weight_ptr, scale_ptr, y_ptr, VECTORS: tl.constexpr, VEC: tl.constexpr
):
    """A tile of filters that lie as their result."""
    address = tl.load(layer_ptr + _ADDRESS)
    weight_ptr = tl.multiple_of(address.to(weight_ptr.dtype), 16)
    vector = tile * VECTORS + tl.arange(0, VECTORS)
    inside = vector < _count(layer_ptr, _UNITS)
    scale = tl.load(scale_ptr + vector // _count(layer_ptr, _CHANNELS), mask=inside, other=0.0)
    at = vector[:, None] * VEC + tl.arange(0, VEC)[None, :]
    w = tl.load(weight_ptr + at, mask=inside[:, None], other=0.0)
    y = w.to(tl.float32) * scale[:, None]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _fold_pairs(layer_ptr, tile, weight_ptr, scale_ptr, y_ptr, PAIRS: tl.constexpr):
    """A tile of all taps of pairs (filter, channel)."""
    channels, taps = _count(layer_ptr, _CHANNELS), _count(layer_ptr, _TAPS)
    cols = _count(layer_ptr, _COLS)
    row_stride, col_stride = tl.load(layer_ptr + _ROW), tl.load(layer_ptr + _COL)
    pair = tile * PAIRS + tl.arange(0, PAIRS)
    inside = pair < _count(layer_ptr, _UNITS)
    k = pair // channels
    c = pair - k * channels
    scale = tl.load(scale_ptr + k, mask=inside, other=0.0)
    weight_ptr = tl.load(layer_ptr + _ADDRESS).to(weight_ptr.dtype)
    weight_ptr += k * tl.load(layer_ptr + _FILTER) + c * tl.load(layer_ptr + _CHANNEL)
    y_ptr += k * (channels * taps) + c
    col = 0
    for _ in range(0, taps):
        y = tl.load(weight_ptr, mask=inside, other=0.0).to(tl.float32) * scale
        tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=inside)
        # Divisions that find the row and column of a tap took 27 of 58 instructions of the loop.
        col += 1
        last = col == cols
        weight_ptr += tl.where(last, row_stride - (cols - 1) * col_stride, col_stride)
        y_ptr += channels
        col = tl.where(last, 0, col)


@triton.jit(do_not_specialize=["weight_ptr"])
def fold_filters_kernel(
    layers_ptr, tiles_ptr, weight_ptr, scale_ptr, y_ptr,
    VECTORS: tl.constexpr, PAIRS: tl.constexpr, GAP: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """y = scale * filters of all layers, and zero between them.

    Args:
        layers_ptr, tiles_ptr: int64 and int32 tables of `plan.fold.FoldTable`.
        weight_ptr: of the type of the filters; nothing is read from it.
        scale_ptr: [sum K] fp32.
        y_ptr: the results.
        GAP: elements between two layers at most, a power of two.
        VEC: values of the filters in 16 bytes.

    Grid: tiles.
    """
    pid = tl.program_id(0)
    layer_ptr = layers_ptr + tl.load(tiles_ptr + pid) * _LAYER_FIELDS
    tile = pid - _count(layer_ptr, _TILE)
    scale_ptr += tl.load(layer_ptr + _SCALE)
    if tile == 0:
        gap = tl.arange(0, GAP)
        zero = tl.zeros([GAP], y_ptr.dtype.element_ty)
        end_ptr = y_ptr + tl.load(layer_ptr + _END)
        tl.store(end_ptr + gap, zero, mask=gap < tl.load(layer_ptr + _GAP))
    # Results start at multiples of GAP elements.
    y_ptr += _count(layer_ptr, _RESULT) // GAP * GAP
    if tl.load(layer_ptr + _WHOLE) != 0:
        _fold_vectors(layer_ptr, tile, weight_ptr, scale_ptr, y_ptr, VECTORS, VEC)
    else:
        _fold_pairs(layer_ptr, tile, weight_ptr, scale_ptr, y_ptr, PAIRS)
