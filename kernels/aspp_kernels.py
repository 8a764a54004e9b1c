"""Triton device code of the ASPP branches; `aspp.py` launches it.

Work and layout
    An implicit matrix product over the tiles of deeplab_fast/plan/schedule.py: pixels of one tap
    class by filters of one branch. x is [N, H, W, C] with any strides but C's, which is 1; filters
    are the rows of one matrix [sum taps K, C], so that both operands are contiguous in the channels
    that are summed, as the tensor cores want them for 16-bit and for TF32 operands alike. Rows of
    an x tile are gathered: row m lies at a base of its own, and a tap adds the same offset to all
    of them, because every tap of a class is inside the map for all its pixels. There is no padding
    and no mask but for channels beyond C. Pixels are numbered within a class, whose rectangle is
    in the table, so their addresses are computed: a table of pixels would be a load more before
    each tile, and one copy for each batch size.

    A program runs its parts of the list one behind the other. Taps are the inner loop, chunks of
    channels the outer one (schedule.py says why), in one flat loop that the compiler pipelines
    across both. The epilogue applies scale, shift and ReLU in float32, rounds once, and writes into
    the branch's channels of the output.

    A cut tile writes float32 sums to its slot of the workspace; a second launch adds the slots of a
    tile in their order. Nothing goes through an atomic: results repeat to the bit.

Numerics
    Products of 16-bit operands are exact in float32, where they are added; float32 operands are
    multiplied as they are ("ieee") or rounded to TF32, as the launcher says.

Cost, estimated and not measured, on an H100 in bf16 with 2048 channels and 256 filters a branch:
2.0 ms at 65x65 with rates 12/24/36 and batch 16, 0.17 ms at batch 1; 0.55 ms and 63 us at 33x33
with 6/12/18.
"""

import triton
import triton.language as tl

from ..plan.schedule import CLASS_FIELDS, PART_FIELDS, ClassField, PartField

_ROW = tl.constexpr(ClassField.ROW.value)
_ROWS = tl.constexpr(ClassField.ROWS.value)
_COL = tl.constexpr(ClassField.COL.value)
_COLS = tl.constexpr(ClassField.COLS.value)
_PIXELS = tl.constexpr(ClassField.PIXELS.value)
_ROW_SHIFT = tl.constexpr(ClassField.ROW_SHIFT.value)
_COL_SHIFT = tl.constexpr(ClassField.COL_SHIFT.value)
_ROW_TAPS = tl.constexpr(ClassField.ROW_TAPS.value)
_COL_TAPS = tl.constexpr(ClassField.COL_TAPS.value)
_DILATION = tl.constexpr(ClassField.DILATION.value)
_WEIGHT_ROW = tl.constexpr(ClassField.WEIGHT_ROW.value)
_WEIGHT_COL_STEP = tl.constexpr(ClassField.WEIGHT_COL_STEP.value)
_WEIGHT_ROW_STEP = tl.constexpr(ClassField.WEIGHT_ROW_STEP.value)
_CHANNEL = tl.constexpr(ClassField.CHANNEL.value)
_CHANNELS = tl.constexpr(ClassField.CHANNELS.value)
_CLASS_FIELDS = tl.constexpr(CLASS_FIELDS)
_CLASS = tl.constexpr(PartField.CLASS.value)
_FIRST = tl.constexpr(PartField.FIRST.value)
_FILTER = tl.constexpr(PartField.FILTER.value)
_BEGIN = tl.constexpr(PartField.BEGIN.value)
_END = tl.constexpr(PartField.END.value)
_SLOT = tl.constexpr(PartField.SLOT.value)
_PART_FIELDS = tl.constexpr(PART_FIELDS)

# Strides and channel counts come in units of VEC elements, and table entries that are multiples of
# something are divided and multiplied by it: the compiler then sees what divides an address, and
# makes 16-byte accesses, without a variant for every stride.


@triton.jit
def pixel_offsets(class_ptr, pixel, stride_n, stride_h, stride_w):
    """Offsets (int64) of a class's pixels, given by their numbers."""
    cols = tl.load(class_ptr + _COLS)
    rows = tl.load(class_ptr + _ROWS)
    line = pixel // cols
    col = tl.load(class_ptr + _COL) + pixel - line * cols
    image = line // rows
    row = tl.load(class_ptr + _ROW) + line - image * rows
    return image.to(tl.int64) * stride_n + row.to(tl.int64) * stride_h + col.to(tl.int64) * stride_w


@triton.jit
def _store(
    sums, first_row, first_col, part_ptr, class_ptr, scale_ptr, shift_ptr, y_ptr,
    stride_yn, stride_yh, stride_yw,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """relu(scale * sums + shift) of rows and columns of a tile, to the branch's channels.

    What it needs of the tables it loads again: kept through the main loop it would take registers
    from the accumulator.
    """
    pixel = tl.load(part_ptr + _FIRST) + first_row + tl.arange(0, BLOCK_M)
    channels = tl.load(class_ptr + _CHANNELS) // VEC * VEC
    first_channel = tl.load(class_ptr + _CHANNEL) // VEC * VEC
    channel = tl.load(part_ptr + _FILTER) // BLOCK_N * BLOCK_N + first_col + tl.arange(0, BLOCK_N)
    exists = channel < channels
    scale = tl.load(scale_ptr + first_channel + channel, mask=exists, other=0.0)
    shift = tl.load(shift_ptr + first_channel + channel, mask=exists, other=0.0)
    y = sums * scale[None, :] + shift[None, :]
    # Not a maximum, which would turn NaN into 0.
    y = tl.where(y < 0.0, 0.0, y)
    offset = pixel_offsets(class_ptr, pixel, stride_yn, stride_yh, stride_yw) * VEC
    inside = pixel < tl.load(class_ptr + _PIXELS)
    at = y_ptr + offset[:, None] + (first_channel + channel)[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & exists[None, :])


@triton.jit
def halves(sums, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and right columns of a tile; stored one after the other they need half the
    registers and shared memory."""
    return tl.split(tl.permute(tl.reshape(sums, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))


@triton.jit
def tile_sums(
    part_ptr, class_ptr, x_ptr, weight_ptr, channels, stride_xn, stride_xh, stride_xw,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, VEC_X: tl.constexpr,
    EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums [BLOCK_M, BLOCK_N] of a part; arguments as for aspp_branches_kernel."""
    depth = channels.to(tl.int64)
    x_row = stride_xh.to(tl.int64)
    x_col = stride_xw.to(tl.int64)
    begin = tl.load(part_ptr + _BEGIN)
    end = tl.load(part_ptr + _END)
    row_taps = tl.load(class_ptr + _ROW_TAPS)
    col_taps = tl.load(class_ptr + _COL_TAPS)

    # Rows and filters beyond the end repeat the last one; they are not stored.
    pixel = tl.load(part_ptr + _FIRST) + tl.arange(0, BLOCK_M)
    pixel = tl.minimum(pixel, tl.load(class_ptr + _PIXELS) - 1)
    c = tl.arange(0, BLOCK_C)
    x_base = pixel_offsets(class_ptr, pixel, stride_xn, x_row, x_col) * VEC_X
    x_at = x_ptr + x_base[:, None] + c[None, :]
    row = tl.load(part_ptr + _FILTER) + tl.arange(0, BLOCK_N)
    row = tl.minimum(row, tl.load(class_ptr + _CHANNELS) - 1)
    weight_at = weight_ptr + (row.to(tl.int64) * depth * VEC_X)[:, None] + c[None, :]

    # Iteration `begin` is tap (tap_row, tap_col) of a chunk.
    taps = row_taps * col_taps
    chunk = begin // taps
    tap_row = (begin - chunk * taps) // col_taps
    tap_col = begin - chunk * taps - tap_row * col_taps
    first_c = chunk * BLOCK_C
    dilation = tl.load(class_ptr + _DILATION)
    row_shift = tl.load(class_ptr + _ROW_SHIFT)
    col_shift = tl.load(class_ptr + _COL_SHIFT)
    shift_row = row_shift + tap_row * dilation
    shift_col = col_shift + tap_col * dilation
    first_row = tl.load(class_ptr + _WEIGHT_ROW)
    row_step = tl.load(class_ptr + _WEIGHT_ROW_STEP)
    col_step = tl.load(class_ptr + _WEIGHT_COL_STEP)
    weight_row = first_row + tap_row * row_step + tap_col * col_step
    # From the last tap of a row of taps to the first of the next.
    wrap_step = row_step - (col_taps - 1) * col_step

    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(begin, end):
        x_off = (shift_row.to(tl.int64) * x_row + shift_col.to(tl.int64) * x_col) * VEC_X
        weight_off = weight_row.to(tl.int64) * depth * VEC_X
        if EVEN_C:
            x = tl.load(x_at + (x_off + first_c))
            weight = tl.load(weight_at + (weight_off + first_c))
        else:
            live = (c < channels * VEC_X - first_c)[None, :]
            x = tl.load(x_at + (x_off + first_c), mask=live, other=0.0)
            weight = tl.load(weight_at + (weight_off + first_c), mask=live, other=0.0)
        sums = tl.dot(x, tl.trans(weight), sums, input_precision=PRECISION)
        tap_col += 1
        wraps = tap_col == col_taps
        tap_col = tl.where(wraps, 0, tap_col)
        tap_row = tl.where(wraps, tap_row + 1, tap_row)
        ends = tap_row == row_taps
        tap_row = tl.where(ends, 0, tap_row)
        shift_col = tl.where(wraps, col_shift, shift_col + dilation)
        shift_row = tl.where(ends, row_shift, tl.where(wraps, shift_row + dilation, shift_row))
        weight_row += tl.where(wraps, wrap_step, col_step)
        weight_row = tl.where(ends, first_row, weight_row)
        first_c = tl.where(ends, first_c + BLOCK_C, first_c)
    return sums


@triton.jit(
    do_not_specialize=[
        "channels", "stride_xn", "stride_xh", "stride_xw", "stride_yn", "stride_yh", "stride_yw",
    ]
)  # fmt: skip
def aspp_branches_kernel(
    x_ptr, weight_ptr, scale_ptr, shift_ptr, y_ptr, partial_ptr,
    classes_ptr, parts_ptr, starts_ptr,
    channels, stride_xn, stride_xh, stride_xw, stride_yn, stride_yh, stride_yw,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    VEC_X: tl.constexpr, VEC_Y: tl.constexpr, EVEN_C: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The parts of the tile list of program `program_id(0)`.

    Args:
        x_ptr: [N, H, W, C].
        weight_ptr: [sum taps K, C], contiguous; rows in the order branch, tap, filter.
        scale_ptr, shift_ptr: [sum K] fp32.
        y_ptr: [N, H, W, sum K].
        partial_ptr: [slots, BLOCK_M, BLOCK_N] fp32, the sums of cut tiles (SPLIT).
        classes_ptr, parts_ptr, starts_ptr: the tables of schedule.Schedule.
        channels, stride_x*: C and strides of x, in units of VEC_X elements.
        stride_y*: strides of y, in units of VEC_Y elements, which divides every K as well.
        EVEN_C: C is a multiple of BLOCK_C.
    """
    pid = tl.program_id(0)
    for part in range(tl.load(starts_ptr + pid), tl.load(starts_ptr + pid + 1)):
        part_ptr = parts_ptr + part * _PART_FIELDS
        class_ptr = classes_ptr + tl.load(part_ptr + _CLASS) * _CLASS_FIELDS
        sums = tile_sums(
            part_ptr, class_ptr, x_ptr, weight_ptr, channels, stride_xn, stride_xh, stride_xw,
            BLOCK_M, BLOCK_N, BLOCK_C, VEC_X, EVEN_C, PRECISION,
        )  # fmt: skip

        left, right = halves(sums, BLOCK_M, BLOCK_N)
        half: tl.constexpr = BLOCK_N // 2
        slot = tl.load(part_ptr + _SLOT)
        if SPLIT and slot >= 0:
            at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, half)[None, :]
            at = partial_ptr + slot.to(tl.int64) * (BLOCK_M * BLOCK_N) + at
            tl.store(at, left)
            tl.store(at + half, right)
        else:
            _store(
                left, 0, 0, part_ptr, class_ptr, scale_ptr, shift_ptr, y_ptr,
                stride_yn, stride_yh, stride_yw, BLOCK_M, half, VEC_Y,
            )  # fmt: skip
            _store(
                right, 0, half, part_ptr, class_ptr, scale_ptr, shift_ptr, y_ptr,
                stride_yn, stride_yh, stride_yw, BLOCK_M, half, VEC_Y,
            )  # fmt: skip


@triton.jit(do_not_specialize=["stride_yn", "stride_yh", "stride_yw"])
def aspp_sum_kernel(
    partial_ptr, scale_ptr, shift_ptr, y_ptr, classes_ptr, sums_ptr,
    stride_yn, stride_yh, stride_yw,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, VEC_Y: tl.constexpr,
):  # fmt: skip
    """Adds the parts of a cut tile in their order and stores the result as a whole tile does.

    Grid: blocks of ROWS rows, fastest, x cut tiles. Arguments as for aspp_branches_kernel; sums_ptr
    is Schedule.sums.
    """
    pid = tl.program_id(0)
    first_row = pid % (BLOCK_M // ROWS) * ROWS
    part_ptr = sums_ptr + pid // (BLOCK_M // ROWS) * _PART_FIELDS
    class_ptr = classes_ptr + tl.load(part_ptr + _CLASS) * _CLASS_FIELDS
    at = (first_row + tl.arange(0, ROWS))[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for slot in range(tl.load(part_ptr + _BEGIN), tl.load(part_ptr + _END)):
        total += tl.load(partial_ptr + tl.cast(slot, tl.int64) * (BLOCK_M * BLOCK_N) + at)
    _store(
        total, first_row, 0, part_ptr, class_ptr, scale_ptr, shift_ptr, y_ptr,
        stride_yn, stride_yh, stride_yw, ROWS, BLOCK_N, VEC_Y,
    )  # fmt: skip
