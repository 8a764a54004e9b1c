"""Triton device code of the ASPP's convolutions in training; `aspp_training.py` launches it.

Work and layout
    Three matrix products over tile lists of deeplab_fast/plan, which leave out the
    taps that no pixel of a tile has inside the map. Maps are channels_last, filters the rows of one
    matrix [sum taps K, C] in the order branch, tap, filter, and so are their gradients.

    aspp_convs: the product of aspp_kernels.py, whose sums are stored as they are. For batch norm a
    tile also leaves mean and sum of squared deviations of each of its columns, of the values as
    stored, taken from the accumulator, so that y is not read again; aspp_stats_kernel combines
    them. A cut tile leaves them where its parts are added.

    dgrad: dx[p] = sum over branches b and taps t of W_b[t]^T grad_b[p - t d_b], for all branches in
    one reduction, so that dx is written once. Pixels are sorted by their live taps in all branches
    and found through a table. The steps of a tile (branch, chunk of filters, tap) are rows of
    another, read as scalars: a nest of counters would take registers. Where a tile lies across
    classes, a tap that lives for some of its rows only reads zeros for the others.

    wgrad: dW_b[t] = sum of grad_b[p]^T x[p + t d_b] over the pixels p that keep p + t d_b inside.
    Both operands are contiguous across the sum, and their tiles are read transposed. Pixels are
    numbered through the rectangle over the whole batch; two multiplications make an address of a
    number (gradients.divider), and only the last pixels of a rectangle are masked.

    Programs run their parts of a list one behind the other. Cut tiles go through a workspace and a
    second launch, as in aspp_kernels.py: no atomics, results repeat to the bit.

Numerics
    Accumulation in float32, one rounding where a tensor is stored. Statistics are float32: means
    first, then squares about them, within a tile and again over the tiles, in a fixed order.

Cost, estimated and not measured, on an H100 in bf16 with 2048 channels and 256 filters a branch,
for forward, dgrad and wgrad: 2.03, 2.08 and 2.01 ms at 65x65 with rates 12/24/36 and batch 16;
0.55, 0.56 and 0.55 ms at 33x33 with 6/12/18. On tensor cores of 9.0 in TF32 operands that are
contiguous across the sum (the filters of dgrad, both of wgrad) are copied 4 bytes at a time.
"""

import triton
import triton.language as tl

from ..plan.gradients import STEP_FIELDS, StepField, WgradField
from ..plan.schedule import CLASS_FIELDS, PART_FIELDS, ClassField, PartField
from .aspp_kernels import halves, pixel_offsets, tile_sums

# The first five columns of a class are the same for wgrad.
_ROW = tl.constexpr(ClassField.ROW.value)
_ROWS = tl.constexpr(ClassField.ROWS.value)
_COL = tl.constexpr(ClassField.COL.value)
_COLS = tl.constexpr(ClassField.COLS.value)
_PIXELS = tl.constexpr(ClassField.PIXELS.value)
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
_STEP_ROW_SHIFT = tl.constexpr(StepField.ROW_SHIFT.value)
_STEP_COL_SHIFT = tl.constexpr(StepField.COL_SHIFT.value)
_STEP_WEIGHT_ROW = tl.constexpr(StepField.WEIGHT_ROW.value)
_STEP_CHANNEL = tl.constexpr(StepField.CHANNEL.value)
_STEP_LIVE = tl.constexpr(StepField.LIVE.value)
_STEP_FIELDS = tl.constexpr(STEP_FIELDS)
_TAP_ROW_SHIFT = tl.constexpr(WgradField.ROW_SHIFT.value)
_TAP_COL_SHIFT = tl.constexpr(WgradField.COL_SHIFT.value)
_TAP_CHANNEL = tl.constexpr(WgradField.CHANNEL.value)
_TAP_CHANNELS = tl.constexpr(WgradField.CHANNELS.value)
_TAP_WEIGHT_ROW = tl.constexpr(WgradField.WEIGHT_ROW.value)
_COLS_FACTOR = tl.constexpr(WgradField.COLS_FACTOR.value)
_COLS_BITS = tl.constexpr(WgradField.COLS_BITS.value)
_ROWS_FACTOR = tl.constexpr(WgradField.ROWS_FACTOR.value)
_ROWS_BITS = tl.constexpr(WgradField.ROWS_BITS.value)

# Strides and channel counts come in units of VEC elements, as in aspp_kernels.py.


@triton.jit
def _keep(partial_ptr, slot, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums of a part, to its slot of the workspace."""
    half: tl.constexpr = BLOCK_N // 2
    at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, half)[None, :]
    at = partial_ptr + slot.to(tl.int64) * (BLOCK_M * BLOCK_N) + at
    tl.store(at, left)
    tl.store(at + half, right)


@triton.jit
def _total(
    partial_ptr, part_ptr, first_row, first_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS x COLS of a cut tile: its slots, added in their order."""
    row = first_row + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK_N + (first_col + tl.arange(0, COLS))[None, :]
    total = tl.zeros([ROWS, COLS], tl.float32)
    for slot in range(tl.load(part_ptr + _BEGIN), tl.load(part_ptr + _END)):
        total += tl.load(partial_ptr + tl.cast(slot, tl.int64) * (BLOCK_M * BLOCK_N) + at)
    return total


@triton.jit
def _store_output(
    sums, first_col, part_ptr, class_ptr, y_ptr, stats_ptr, entries_ptr, width,
    stride_yn, stride_yh, stride_yw,
    BLOCK_M: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """COLS columns of a tile of y, and their statistics.

    What it needs of the tables it loads again: kept through the main loop it would take registers
    from the accumulator.
    """
    first = tl.load(part_ptr + _FIRST)
    pixel = first + tl.arange(0, BLOCK_M)
    channels = tl.load(class_ptr + _CHANNELS) // VEC * VEC
    first_channel = tl.load(class_ptr + _CHANNEL) // VEC * VEC
    channel = tl.load(part_ptr + _FILTER) // COLS * COLS + first_col + tl.arange(0, COLS)
    exists = channel < channels
    offset = pixel_offsets(class_ptr, pixel, stride_yn, stride_yh, stride_yw) * VEC
    inside = pixel < tl.load(class_ptr + _PIXELS)
    y = sums.to(y_ptr.dtype.element_ty)
    at = y_ptr + offset[:, None] + (first_channel + channel)[None, :]
    tl.store(at, y, mask=inside[:, None] & exists[None, :])
    if STATS:
        stored = tl.where(inside[:, None], y.to(tl.float32), 0.0)
        count = tl.minimum(tl.load(class_ptr + _PIXELS) - first, BLOCK_M)
        mean = tl.sum(stored, 0) / count.to(tl.float32)
        apart = tl.where(inside[:, None], stored - mean[None, :], 0.0)
        entry = tl.load(entries_ptr + tl.load(part_ptr + _CLASS)) + first // BLOCK_M
        at = stats_ptr + entry.to(tl.int64) * 2 * width + channel
        tl.store(at, mean, mask=exists)
        tl.store(at + width, tl.sum(apart * apart, 0), mask=exists)


@triton.jit
def _store_half(
    sums, first_col, part_ptr, class_ptr, y_ptr, stats_ptr, entries_ptr, width,
    stride_yn, stride_yh, stride_yw,
    BLOCK_M: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """As _store_output. In float32 statistics take registers for the values as well, of which a
    tile of 128x256 has enough for a quarter of its columns."""
    if STATS and y_ptr.dtype.element_ty == tl.float32 and BLOCK_M * COLS >= 8192:
        left, right = halves(sums, BLOCK_M, COLS)
        part: tl.constexpr = COLS // 2
        _store_output(
            left, first_col, part_ptr, class_ptr, y_ptr, stats_ptr, entries_ptr, width,
            stride_yn, stride_yh, stride_yw, BLOCK_M, part, VEC, STATS,
        )  # fmt: skip
        _store_output(
            right, first_col + part, part_ptr, class_ptr, y_ptr, stats_ptr, entries_ptr, width,
            stride_yn, stride_yh, stride_yw, BLOCK_M, part, VEC, STATS,
        )  # fmt: skip
    else:
        _store_output(
            sums, first_col, part_ptr, class_ptr, y_ptr, stats_ptr, entries_ptr, width,
            stride_yn, stride_yh, stride_yw, BLOCK_M, COLS, VEC, STATS,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "width", "channels", "stride_xn", "stride_xh", "stride_xw",
        "stride_yn", "stride_yh", "stride_yw",
    ]
)  # fmt: skip
def aspp_convs_kernel(
    x_ptr, weight_ptr, y_ptr, partial_ptr, stats_ptr, classes_ptr, parts_ptr, starts_ptr,
    entries_ptr, width,
    channels, stride_xn, stride_xh, stride_xw, stride_yn, stride_yh, stride_yw,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    VEC_X: tl.constexpr, VEC_Y: tl.constexpr, EVEN_C: tl.constexpr, SPLIT: tl.constexpr,
    STATS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The parts of the tile list of program `program_id(0)`.

    Args:
        x_ptr, weight_ptr, y_ptr, partial_ptr, the tables, channels, strides and constants: as for
            aspp_kernels.aspp_branches_kernel.
        stats_ptr: [entries, 2, width] fp32, mean and squares of each block of pixels (STATS).
        entries_ptr: schedule.StatsTable.first.
        width: of a row of stats_ptr; the most filters of a branch.
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
            _keep(partial_ptr, slot, left, right, BLOCK_M, BLOCK_N)
        else:
            _store_half(
                left, 0, part_ptr, class_ptr, y_ptr, stats_ptr, entries_ptr, width,
                stride_yn, stride_yh, stride_yw, BLOCK_M, half, VEC_Y, STATS,
            )  # fmt: skip
            _store_half(
                right, half, part_ptr, class_ptr, y_ptr, stats_ptr, entries_ptr, width,
                stride_yn, stride_yh, stride_yw, BLOCK_M, half, VEC_Y, STATS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["width", "stride_yn", "stride_yh", "stride_yw"])
def aspp_convs_sum_kernel(
    partial_ptr, y_ptr, stats_ptr, classes_ptr, sums_ptr, entries_ptr, width,
    stride_yn, stride_yh, stride_yw,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COLS: tl.constexpr, VEC_Y: tl.constexpr,
    STATS: tl.constexpr,
):  # fmt: skip
    """Adds the parts of a cut tile in their order and stores the result as a whole tile does.

    Grid: blocks of COLS columns, fastest, x cut tiles. A block has all rows of its tile, whose
    statistics it leaves. Arguments as for aspp_convs_kernel; sums_ptr is Schedule.sums.
    """
    pid = tl.program_id(0)
    first_col = pid % (BLOCK_N // COLS) * COLS
    part_ptr = sums_ptr + pid // (BLOCK_N // COLS) * _PART_FIELDS
    class_ptr = classes_ptr + tl.load(part_ptr + _CLASS) * _CLASS_FIELDS
    total = _total(partial_ptr, part_ptr, 0, first_col, BLOCK_M, BLOCK_N, BLOCK_M, COLS)
    _store_output(
        total, first_col, part_ptr, class_ptr, y_ptr, stats_ptr, entries_ptr, width,
        stride_yn, stride_yh, stride_yw, BLOCK_M, COLS, VEC_Y, STATS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["width", "blocks", "pixels"])
def aspp_stats_kernel(
    stats_ptr, counts_ptr, ranges_ptr, channels_ptr, mean_ptr, variance_ptr, width, blocks, pixels,
    ENTRIES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """mean and biased variance [sum K] fp32 of all pixels from those of blocks of pixels.

    mean = sum n_i mean_i / n and variance = sum (squares_i + n_i (mean_i - mean)^2) / n, summed in
    the order of the entries, ENTRIES side by side.

    Args:
        stats_ptr: [entries, 2, width] fp32.
        counts_ptr, ranges_ptr, channels_ptr: schedule.StatsTable.
        blocks: of COLS columns in a branch.
        pixels: n.

    Grid: blocks, fastest, x branches.
    """
    pid = tl.program_id(0)
    branch = pid // blocks
    begin = tl.load(ranges_ptr + branch)
    end = tl.load(ranges_ptr + branch + 1)
    first_channel = tl.load(channels_ptr + branch)
    channel = pid % blocks * COLS + tl.arange(0, COLS)
    exists = channel < tl.load(channels_ptr + branch + 1) - first_channel
    n = pixels.to(tl.float32)
    total = tl.zeros([ENTRIES, COLS], tl.float32)
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        live = (entry < end)[:, None] & exists[None, :]
        count = tl.load(counts_ptr + entry, mask=entry < end, other=0).to(tl.float32)
        at = stats_ptr + (entry.to(tl.int64) * 2 * width)[:, None] + channel[None, :]
        total += count[:, None] * tl.load(at, mask=live, other=0.0)
    mean = tl.sum(total, 0) / n
    total = tl.zeros([ENTRIES, COLS], tl.float32)
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        live = (entry < end)[:, None] & exists[None, :]
        count = tl.load(counts_ptr + entry, mask=entry < end, other=0).to(tl.float32)
        at = stats_ptr + (entry.to(tl.int64) * 2 * width)[:, None] + channel[None, :]
        apart = tl.load(at, mask=live, other=0.0) - mean[None, :]
        total += tl.load(at + width, mask=live, other=0.0) + count[:, None] * (apart * apart)
    tl.store(mean_ptr + first_channel + channel, mean, mask=exists)
    tl.store(variance_ptr + first_channel + channel, tl.sum(total, 0) / n, mask=exists)


@triton.jit
def _map_pixels(part_ptr, pixels_ptr, first_row, pixels, rows, cols, ROWS: tl.constexpr):
    """(image, row, column) of the pixels of ROWS rows of a tile; the last one again beyond it."""
    place = tl.load(part_ptr + _FIRST) + first_row + tl.arange(0, ROWS)
    pixel = tl.load(pixels_ptr + tl.minimum(place, pixels - 1))
    line = pixel // cols
    image = line // rows
    return image, line - image * rows, pixel - line * cols


@triton.jit
def _store_input_gradient(
    sums, first_row, first_col, part_ptr, pixels_ptr, dx_ptr, pixels, rows, cols, channels,
    stride_xn, stride_xh, stride_xw,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Rows and columns of a tile of dx."""
    image, row, col = _map_pixels(part_ptr, pixels_ptr, first_row, pixels, rows, cols, ROWS)
    offset = image.to(tl.int64) * stride_xn + row.to(tl.int64) * stride_xh
    offset = (offset + col.to(tl.int64) * stride_xw) * VEC
    place = tl.load(part_ptr + _FIRST) + first_row + tl.arange(0, ROWS)
    channel = tl.load(part_ptr + _FILTER) // COLS * COLS + first_col + tl.arange(0, COLS)
    mask = (place < pixels)[:, None] & (channel < channels * VEC)[None, :]
    at = dx_ptr + offset[:, None] + channel[None, :]
    tl.store(at, sums.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "pixels", "rows", "cols", "channels", "stride_gn", "stride_gh", "stride_gw",
        "stride_xn", "stride_xh", "stride_xw",
    ]
)  # fmt: skip
def aspp_dgrad_kernel(
    grad_ptr, weight_ptr, dx_ptr, partial_ptr, lists_ptr, steps_ptr, pixels_ptr, parts_ptr,
    starts_ptr, pixels, rows, cols,
    channels, stride_gn, stride_gh, stride_gw, stride_xn, stride_xh, stride_xw,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    VEC_G: tl.constexpr, VEC_X: tl.constexpr, EVEN_K: tl.constexpr, EVEN_C: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The parts of the tile list of program `program_id(0)`, of the gradient to the input.

    Args:
        grad_ptr: [N, H, W, sum K].
        weight_ptr: [sum taps K, C], contiguous; rows in the order branch, tap, filter.
        dx_ptr: [N, H, W, C].
        partial_ptr: [slots, BLOCK_M, BLOCK_N] fp32, the sums of cut tiles (SPLIT).
        lists_ptr: DgradSchedule.classes; steps_ptr, pixels_ptr, parts_ptr, starts_ptr: its tables.
        pixels, rows, cols: N H W, H, W.
        stride_g*: strides of grad, in units of VEC_G elements, which divides every K as well.
        channels, stride_x*: C and strides of dx, in units of VEC_X elements.
        EVEN_K: every K is a multiple of BLOCK_C.
        EVEN_C: C is a multiple of BLOCK_N.
    """
    pid = tl.program_id(0)
    depth = channels.to(tl.int64) * VEC_X
    g_row = stride_gh.to(tl.int64)
    g_col = stride_gw.to(tl.int64)
    for part in range(tl.load(starts_ptr + pid), tl.load(starts_ptr + pid + 1)):
        part_ptr = parts_ptr + part * _PART_FIELDS
        begin = tl.load(part_ptr + _BEGIN)
        end = tl.load(part_ptr + _END)
        image, row, col = _map_pixels(part_ptr, pixels_ptr, 0, pixels, rows, cols, BLOCK_M)
        k = tl.arange(0, BLOCK_C)
        g_base = image.to(tl.int64) * stride_gn + row.to(tl.int64) * g_row
        g_base = (g_base + col.to(tl.int64) * g_col) * VEC_G
        grad_at = grad_ptr + g_base[:, None] + k[None, :]
        c = tl.load(part_ptr + _FILTER) // BLOCK_N * BLOCK_N + tl.arange(0, BLOCK_N)
        weight_at = weight_ptr + (k.to(tl.int64) * depth)[:, None] + c[None, :]
        step = tl.load(lists_ptr + tl.load(part_ptr + _CLASS)) + begin
        step_ptr = steps_ptr + step.to(tl.int64) * _STEP_FIELDS

        # A step is loaded an iteration ahead. Loaded where it is used, the compiler would pipeline
        # it with the operands, which would have half the stages.
        row_shift = tl.load(step_ptr + _STEP_ROW_SHIFT)
        col_shift = tl.load(step_ptr + _STEP_COL_SHIFT)
        weight_row = tl.load(step_ptr + _STEP_WEIGHT_ROW)
        channel = tl.load(step_ptr + _STEP_CHANNEL)
        count = tl.load(step_ptr + _STEP_LIVE)
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for _ in range(begin, end):
            g_off = (row_shift.to(tl.int64) * g_row + col_shift.to(tl.int64) * g_col) * VEC_G
            g_off += channel // VEC_G * VEC_G
            weight_off = weight_row.to(tl.int64) * depth
            row_read = row + row_shift
            col_read = col + col_shift
            inside = (row_read >= 0) & (row_read < rows) & (col_read >= 0) & (col_read < cols)
            if EVEN_K:
                grad = tl.load(grad_at + g_off, mask=inside[:, None], other=0.0)
            else:
                live = k < count // VEC_G * VEC_G
                mask = inside[:, None] & live[None, :]
                grad = tl.load(grad_at + g_off, mask=mask, other=0.0)
            if EVEN_K and EVEN_C:
                weight = tl.load(weight_at + weight_off)
            elif EVEN_K:
                exists = (c < channels * VEC_X)[None, :]
                weight = tl.load(weight_at + weight_off, mask=exists, other=0.0)
            else:
                exists = (k < count)[:, None] & (c < channels * VEC_X)[None, :]
                weight = tl.load(weight_at + weight_off, mask=exists, other=0.0)
            sums = tl.dot(grad, weight, sums, input_precision=PRECISION)
            step_ptr += _STEP_FIELDS
            row_shift = tl.load(step_ptr + _STEP_ROW_SHIFT)
            col_shift = tl.load(step_ptr + _STEP_COL_SHIFT)
            weight_row = tl.load(step_ptr + _STEP_WEIGHT_ROW)
            channel = tl.load(step_ptr + _STEP_CHANNEL)
            count = tl.load(step_ptr + _STEP_LIVE)

        left, right = halves(sums, BLOCK_M, BLOCK_N)
        half: tl.constexpr = BLOCK_N // 2
        slot = tl.load(part_ptr + _SLOT)
        if SPLIT and slot >= 0:
            _keep(partial_ptr, slot, left, right, BLOCK_M, BLOCK_N)
        else:
            _store_input_gradient(
                left, 0, 0, part_ptr, pixels_ptr, dx_ptr, pixels, rows, cols, channels,
                stride_xn, stride_xh, stride_xw, BLOCK_M, half, VEC_X,
            )  # fmt: skip
            _store_input_gradient(
                right, 0, half, part_ptr, pixels_ptr, dx_ptr, pixels, rows, cols, channels,
                stride_xn, stride_xh, stride_xw, BLOCK_M, half, VEC_X,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "pixels", "rows", "cols", "channels", "stride_xn", "stride_xh", "stride_xw",
    ]
)  # fmt: skip
def aspp_dgrad_sum_kernel(
    partial_ptr, dx_ptr, pixels_ptr, sums_ptr, pixels, rows, cols,
    channels, stride_xn, stride_xh, stride_xw,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, VEC_X: tl.constexpr,
):  # fmt: skip
    """Adds the parts of a cut tile of dx in their order and stores the result.

    Grid: blocks of ROWS rows, fastest, x cut tiles. Arguments as for aspp_dgrad_kernel; sums_ptr is
    DgradSchedule.sums.
    """
    pid = tl.program_id(0)
    first_row = pid % (BLOCK_M // ROWS) * ROWS
    part_ptr = sums_ptr + pid // (BLOCK_M // ROWS) * _PART_FIELDS
    total = _total(partial_ptr, part_ptr, first_row, 0, BLOCK_M, BLOCK_N, ROWS, BLOCK_N)
    _store_input_gradient(
        total, first_row, 0, part_ptr, pixels_ptr, dx_ptr, pixels, rows, cols, channels,
        stride_xn, stride_xh, stride_xw, ROWS, BLOCK_N, VEC_X,
    )  # fmt: skip


@triton.jit
def _divided(number, factor, bits):
    """number // divisor, for the factor and bits of gradients.divider."""
    return (tl.umulhi(number.to(tl.uint32) * 2, factor) >> bits).to(tl.int32)


@triton.jit
def _wide(a, b, c):
    return a.to(tl.int64), b.to(tl.int64), c.to(tl.int64)


@triton.jit
def _store_filter_gradient(
    sums, first_row, first_col, part_ptr, class_ptr, dw_ptr, channels,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Rows and columns of a tile of dW."""
    k = tl.load(part_ptr + _FIRST) + first_row + tl.arange(0, ROWS)
    c = tl.load(part_ptr + _FILTER) // COLS * COLS + first_col + tl.arange(0, COLS)
    row = (tl.load(class_ptr + _TAP_WEIGHT_ROW) + k).to(tl.int64)
    at = dw_ptr + (row * channels * VEC)[:, None] + c[None, :]
    mask = (k < tl.load(class_ptr + _TAP_CHANNELS))[:, None] & (c < channels * VEC)[None, :]
    tl.store(at, sums.to(dw_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "channels", "stride_gn", "stride_gh", "stride_gw", "stride_xn", "stride_xh", "stride_xw",
    ]
)  # fmt: skip
def aspp_wgrad_kernel(
    grad_ptr, x_ptr, dw_ptr, partial_ptr, classes_ptr, parts_ptr, starts_ptr,
    channels, stride_gn, stride_gh, stride_gw, stride_xn, stride_xh, stride_xw,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    VEC_G: tl.constexpr, VEC_X: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The parts of the tile list of program `program_id(0)`, of the gradients to the filters.

    Args:
        grad_ptr: [N, H, W, sum K].
        x_ptr: [N, H, W, C].
        dw_ptr: [sum taps K, C], contiguous; rows in the order branch, tap, filter.
        partial_ptr: [slots, BLOCK_M, BLOCK_N] fp32, the sums of cut tiles (SPLIT).
        classes_ptr, parts_ptr, starts_ptr: the tables of gradients.wgrad_schedule.
        stride_g*: strides of grad, in units of VEC_G elements, which divides every K as well.
        channels, stride_x*: C and strides of x, in units of VEC_X elements.
        BLOCK_M, BLOCK_N, BLOCK_C: filters, channels and pixels.
        WIDE: a pixel of grad or x is 2^31 units or more behind the first.
    """
    pid = tl.program_id(0)
    if WIDE:
        stride_gn, stride_gh, stride_gw = _wide(stride_gn, stride_gh, stride_gw)
        stride_xn, stride_xh, stride_xw = _wide(stride_xn, stride_xh, stride_xw)
    for part in range(tl.load(starts_ptr + pid), tl.load(starts_ptr + pid + 1)):
        part_ptr = parts_ptr + part * _PART_FIELDS
        class_ptr = classes_ptr + tl.load(part_ptr + _CLASS) * _CLASS_FIELDS
        begin = tl.load(part_ptr + _BEGIN)
        end = tl.load(part_ptr + _END)
        rows = tl.load(class_ptr + _ROWS)
        cols = tl.load(class_ptr + _COLS)
        pixels = tl.load(class_ptr + _PIXELS)
        cols_factor = tl.load(class_ptr + _COLS_FACTOR).to(tl.uint32, bitcast=True)
        rows_factor = tl.load(class_ptr + _ROWS_FACTOR).to(tl.uint32, bitcast=True)
        cols_bits = tl.load(class_ptr + _COLS_BITS)
        rows_bits = tl.load(class_ptr + _ROWS_BITS)

        k = tl.load(part_ptr + _FIRST) // BLOCK_M * BLOCK_M + tl.arange(0, BLOCK_M)
        k_exists = k < tl.load(class_ptr + _TAP_CHANNELS) // VEC_G * VEC_G
        c = tl.load(part_ptr + _FILTER) // BLOCK_N * BLOCK_N + tl.arange(0, BLOCK_N)
        c_exists = c < channels * VEC_X
        # Distances from the end of a row, and of an image, of the rectangle to the next.
        g_line = stride_gh - cols * stride_gw
        g_image = stride_gn - rows * stride_gh
        x_line = stride_xh - cols * stride_xw
        x_image = stride_xn - rows * stride_xh
        row = tl.load(class_ptr + _ROW).to(tl.int64)
        col = tl.load(class_ptr + _COL).to(tl.int64)
        g_first = (row * stride_gh + col * stride_gw) * VEC_G
        row += tl.load(class_ptr + _TAP_ROW_SHIFT)
        col += tl.load(class_ptr + _TAP_COL_SHIFT)
        x_first = (row * stride_xh + col * stride_xw) * VEC_X
        first_channel = tl.load(class_ptr + _TAP_CHANNEL) // VEC_G * VEC_G
        grad_at = grad_ptr + (g_first + first_channel) + k[:, None]
        x_at = x_ptr + x_first + c[None, :]

        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for chunk in range(begin, end):
            pixel = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
            inside = pixel < pixels
            line = _divided(pixel, cols_factor, cols_bits)
            image = _divided(line, rows_factor, rows_bits)
            g_off = (image * g_image + line * g_line + pixel * stride_gw).to(tl.int64) * VEC_G
            x_off = (image * x_image + line * x_line + pixel * stride_xw).to(tl.int64) * VEC_X
            mask = inside[None, :] & k_exists[:, None]
            grad = tl.load(grad_at + g_off[None, :], mask=mask, other=0.0)
            mask = inside[:, None] & c_exists[None, :]
            x = tl.load(x_at + x_off[:, None], mask=mask, other=0.0)
            sums = tl.dot(grad, x, sums, input_precision=PRECISION)

        left, right = halves(sums, BLOCK_M, BLOCK_N)
        half: tl.constexpr = BLOCK_N // 2
        slot = tl.load(part_ptr + _SLOT)
        if SPLIT and slot >= 0:
            _keep(partial_ptr, slot, left, right, BLOCK_M, BLOCK_N)
        else:
            _store_filter_gradient(
                left, 0, 0, part_ptr, class_ptr, dw_ptr, channels, BLOCK_M, half, VEC_X
            )
            _store_filter_gradient(
                right, 0, half, part_ptr, class_ptr, dw_ptr, channels, BLOCK_M, half, VEC_X
            )


@triton.jit(do_not_specialize=["channels"])
def aspp_wgrad_sum_kernel(
    partial_ptr, dw_ptr, classes_ptr, sums_ptr, channels,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, VEC_X: tl.constexpr,
):  # fmt: skip
    """Adds the parts of a cut tile of dW in their order and stores the result.

    Grid: blocks of ROWS rows, fastest, x cut tiles. Arguments as for aspp_wgrad_kernel; sums_ptr is
    Schedule.sums.
    """
    pid = tl.program_id(0)
    first_row = pid % (BLOCK_M // ROWS) * ROWS
    part_ptr = sums_ptr + pid // (BLOCK_M // ROWS) * _PART_FIELDS
    class_ptr = classes_ptr + tl.load(part_ptr + _CLASS) * _CLASS_FIELDS
    total = _total(partial_ptr, part_ptr, first_row, 0, BLOCK_M, BLOCK_N, ROWS, BLOCK_N)
    _store_filter_gradient(
        total, first_row, 0, part_ptr, class_ptr, dw_ptr, channels, ROWS, BLOCK_N, VEC_X
    )
