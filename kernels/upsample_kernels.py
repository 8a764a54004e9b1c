"""Triton device code of the upsampling ops; `upsample.py` launches it.

Work and layout
    Logits are [N, C, h, w] with any strides. A program takes `ROWS` output rows of one row cell
    (plan/bilinear.py: all of them lie between the same two rows of logits) and `COLS` output
    columns; a thread owns one column for all rows. For one class after the other it loads the four
    corner logits of its column, interpolates them along the row once, and walks its rows. Lanes of
    a warp in the same column cell read the same address. No tensor has both a class and a
    full-resolution dimension; the number of classes is a runtime value, and no class is padded.

Numerics
    Logits are converted to float32 at the load; all arithmetic is float32 in PyTorch's form
        (1 - ly) ((1 - lx) a + lx b) + ly ((1 - lx) c + lx d),
    so infinities behave as they do there. Each stored tensor is rounded once. Sums over pixels have
    a fixed order: in a thread, across a warp, then partial by partial. Nothing that is summed in
    floating point goes through an atomic.

Cost, predicted and not measured. P = N H W output pixels, L = N h w C logits, B blocks (about
1.03 N h w for upsampling by 8), t bytes of a logit, b bytes of a label. A slot is one instruction
of one thread for one pixel and class, counted in the loops over classes that Triton 3.6 and 3.7
compile for sm_90 at 8 rows a program.
    argmax                    t L + P bytes          9.6 slots (18.8 with the probability)
    confusion                 t L + b P bytes        9.6 slots, P atomic adds over C^2 tables
    cross entropy             t L + b P bytes       15.0 slots, 1 of them an exponential
    ... and its gradient      t L + b P + 16 B C    34.0 slots, 2 exponentials
    gradient gather           16 B C + t L bytes    4 masked loads for each partial
    softmax add               t L + 8 P C bytes     34.0 slots, 2 exponentials
An H100 issues 2.9e13 slots a second (132 SMs x 128 lanes x 1.7 GHz), an eighth of that where they
are exponentials, and moves 3e12 bytes. All but softmax add are bound by issue. At N = 16,
65x65 -> 513x513, fp32, the model gives 30 us for the argmax, 105 us for the loss with its gradient
and 0.24 ms for the softmax add at 21 classes; 0.21, 0.75 and 1.7 ms at 150.
"""

import triton
import triton.language as tl

# A finite start of a running maximum: (-inf) - (-inf) would be NaN for a first logit of -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# exp(x) is written exp2(x LOG2_E): Triton's exp keeps denormals, at three more instructions.
LOG2_E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))
# NaN has no name here: a launch compares the globals of a kernel with those that it was compiled
# with, and NaN differs from itself. The second launch would raise.


# Rows and columns beyond the end are not clamped, only masked: the compiler must see that columns
# are consecutive, or it spreads the loads and stores of pixels over lanes in another order.


@triton.jit
def _row_tile(
    first_ptr, block_low_ptr, lam_ptr, block, row_blocks, in_rows, ROWS: tl.constexpr
):  # fmt: skip
    """Rows of a row block: (row, whether it exists, the two source rows, lam).

    An axis that keeps its size has no second source: 0 times one that is not finite would be NaN.
    """
    first = tl.load(first_ptr + block)
    end = tl.load(first_ptr + block + 1)
    row = first + tl.arange(0, ROWS)
    row_in = row < end
    low = tl.load(block_low_ptr + block)
    step = tl.where(tl.load(first_ptr + row_blocks) == in_rows, 0, 1)
    high = tl.minimum(low + step, in_rows - 1)
    return row, row_in, low, high, tl.load(lam_ptr + tl.minimum(row, end - 1))


@triton.jit
def _blocked_columns(first_ptr, tile, col_blocks, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Columns of COLS / BLOCK_COLS column blocks: (column, whether it exists)."""
    slot = tl.arange(0, COLS)
    block = tile * (COLS // BLOCK_COLS) + slot // BLOCK_COLS
    block_in = block < col_blocks
    first = tl.load(first_ptr + block, mask=block_in, other=0)
    end = tl.load(first_ptr + block + 1, mask=block_in, other=0)
    col = first + slot % BLOCK_COLS
    return col, col < end


@triton.jit
def _source_columns(low_ptr, lam_ptr, col, in_cols, out_cols):
    """The two source columns and lam of each column; those that do not exist get some."""
    col = tl.maximum(tl.minimum(col, out_cols - 1), 0)
    low = tl.load(low_ptr + col)
    step = tl.where(in_cols == out_cols, 0, 1)
    return low, tl.minimum(low + step, in_cols - 1), tl.load(lam_ptr + col)


@triton.jit
def _corners(logits_ptr, image, top, bottom, left, right, stride_n, stride_h, stride_w):
    """Pointers [COLS] to class 0 of the four corners: top left, top right, bottom left and right.

    Offsets are int64: a batch of logits may hold more than 2^31 elements.
    """
    base = logits_ptr + image * stride_n
    top_ptr = base + top.to(tl.int64) * stride_h
    bottom_ptr = base + bottom.to(tl.int64) * stride_h
    left = left.to(tl.int64) * stride_w
    right = right.to(tl.int64) * stride_w
    return top_ptr + left, top_ptr + right, bottom_ptr + left, bottom_ptr + right


@triton.jit
def _interpolate(p00, p01, p10, p11, offset, lam_x, lam_y):
    """One class of the tile: [ROWS, COLS] from four corner loads a column."""
    a = tl.load(p00 + offset).to(tl.float32)
    b = tl.load(p01 + offset).to(tl.float32)
    c = tl.load(p10 + offset).to(tl.float32)
    d = tl.load(p11 + offset).to(tl.float32)
    top = (1.0 - lam_x) * a + lam_x * b
    bottom = (1.0 - lam_x) * c + lam_x * d
    return (1.0 - lam_y)[:, None] * top[None, :] + lam_y[:, None] * bottom[None, :]


@triton.jit
def _gather(ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Load from pointers [ROWS, COLS] that follow no pattern.

    As a vector: of a matrix Triton 3.6 spreads rows over lanes, and moves the tile to that layout.
    """
    return tl.reshape(tl.load(tl.reshape(ptr, [ROWS * COLS])), [ROWS, COLS]).to(tl.float32)


@triton.jit
def _interpolate_at(
    p00, p01, p10, p11, offset, lam_x, lam_y, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """One class for each pixel, `offset` [ROWS, COLS]: cheaper than a select within the loop."""
    a = _gather(p00[None, :] + offset, ROWS, COLS)
    b = _gather(p01[None, :] + offset, ROWS, COLS)
    c = _gather(p10[None, :] + offset, ROWS, COLS)
    d = _gather(p11[None, :] + offset, ROWS, COLS)
    top = (1.0 - lam_x)[None, :] * a + lam_x[None, :] * b
    bottom = (1.0 - lam_x)[None, :] * c + lam_x[None, :] * d
    return (1.0 - lam_y)[:, None] * top + lam_y[:, None] * bottom


@triton.jit
def _online_softmax(v, highest, total):
    """Take v into a running maximum and sum of exp(v - maximum), with one exponential."""
    e = tl.exp2(-tl.abs(v - highest) * LOG2_E)
    above = v > highest
    total = tl.where(above, total * e + 1.0, total + e)
    return tl.where(above, v, highest), total


@triton.jit
def _softmax_state(
    p00, p01, p10, p11, lam_x, lam_y, num_classes, stride_c,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """(maximum, sum of exp(v - maximum)) over classes, each [ROWS, COLS].

    A logit of +inf makes the sum NaN, as inf - inf does in PyTorch.
    """
    highest = tl.full([ROWS, COLS], LOWEST, tl.float32)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for c in range(num_classes):
        v = _interpolate(p00, p01, p10, p11, c * stride_c, lam_x, lam_y)
        highest, total = _online_softmax(v, highest, total)
    return highest, tl.where(highest == INFINITY, float("nan"), total)


@triton.jit
def _argmax_state(
    p00, p01, p10, p11, lam_x, lam_y, num_classes, stride_c,
    ROWS: tl.constexpr, COLS: tl.constexpr, WITH_SUM: tl.constexpr,
):  # fmt: skip
    """(argmax, sum of exp(v - maximum)) over classes, each [ROWS, COLS].

    As torch.argmax: the first of equal values; a NaN is larger than everything, the first one wins.
    """
    best = tl.full([ROWS, COLS], -INFINITY, tl.float32)
    index = tl.zeros([ROWS, COLS], tl.int32)
    highest = tl.full([ROWS, COLS], LOWEST, tl.float32)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for c in range(num_classes):
        v = _interpolate(p00, p01, p10, p11, c * stride_c, lam_x, lam_y)
        # v > best, or v is NaN and best is not.
        better = ((v <= best) == 0) & (best == best)
        best = tl.where(better, v, best)
        index = tl.where(better, c, index)
        if WITH_SUM:
            highest, total = _online_softmax(v, highest, total)
    if WITH_SUM:
        # Classes that are all -inf leave the sum 0.
        total = tl.where((highest == INFINITY) | (total == 0.0), float("nan"), total)
    return index, total


@triton.jit(
    do_not_specialize=[
        "num_classes", "in_rows", "in_cols", "row_blocks", "col_tiles",
        "stride_ln", "stride_lc", "stride_lh", "stride_lw",
    ]
)  # fmt: skip
def upsample_argmax_kernel(
    logits_ptr, labels_ptr, prob_ptr,
    row_first_ptr, row_low_ptr, row_lam_ptr, col_low_ptr, col_lam_ptr,
    num_classes, in_rows, in_cols, out_rows, out_cols, row_blocks, col_tiles,
    stride_ln, stride_lc, stride_lh, stride_lw,
    ROWS: tl.constexpr, COLS: tl.constexpr, WITH_PROB: tl.constexpr,
):  # fmt: skip
    """Labels [N, H, W], and their probabilities [N, H, W] where asked for, both contiguous.

    Grid: column tiles, fastest, x row blocks x images.
    """
    pid = tl.program_id(0)
    tile = pid % col_tiles
    block = pid // col_tiles % row_blocks
    image = (pid // col_tiles // row_blocks).to(tl.int64)
    row, row_in, top, bottom, lam_y = _row_tile(
        row_first_ptr, row_low_ptr, row_lam_ptr, block, row_blocks, in_rows, ROWS
    )
    col = tile * COLS + tl.arange(0, COLS)
    left, right, lam_x = _source_columns(col_low_ptr, col_lam_ptr, col, in_cols, out_cols)
    p00, p01, p10, p11 = _corners(
        logits_ptr, image, top, bottom, left, right, stride_ln, stride_lh, stride_lw
    )
    stride_c = stride_lc.to(tl.int64)
    index, total = _argmax_state(
        p00, p01, p10, p11, lam_x, lam_y, num_classes, stride_c, ROWS, COLS, WITH_PROB
    )
    inside = row_in[:, None] & (col < out_cols)[None, :]
    pixel = (image * out_rows + row)[:, None] * out_cols + col[None, :]
    tl.store(labels_ptr + pixel, index.to(labels_ptr.dtype.element_ty), mask=inside)
    if WITH_PROB:
        tl.store(prob_ptr + pixel, 1.0 / total, mask=inside)


@triton.jit
def _labels(
    target_ptr, image, row, col, inside, num_classes, ignore_index,
    stride_n, stride_h, stride_w,
):  # fmt: skip
    """(label or 0, whether it is a class, whether it is neither a class nor ignore_index)."""
    pixel = row.to(tl.int64)[:, None] * stride_h + col.to(tl.int64)[None, :] * stride_w
    # Compared as int64: a label that does not fit int32 must not wrap into a class.
    label = tl.load(target_ptr + image * stride_n + pixel, mask=inside, other=0).to(tl.int64)
    counted = inside & (label != ignore_index)
    is_class = counted & (label >= 0) & (label < num_classes)
    label = tl.where(is_class, label, 0).to(tl.int32)
    return label, is_class, counted & (is_class == 0)


@triton.jit(
    do_not_specialize=[
        "num_classes", "in_rows", "in_cols", "row_blocks", "col_tiles", "ignore_index",
        "stride_ln", "stride_lc", "stride_lh", "stride_lw", "last_table",
    ]
)  # fmt: skip
def upsample_confusion_kernel(
    logits_ptr, target_ptr, tables_ptr, bad_ptr,
    row_first_ptr, row_low_ptr, row_lam_ptr, col_low_ptr, col_lam_ptr,
    num_classes, in_rows, in_cols, out_cols, row_blocks, col_tiles, ignore_index, last_table,
    stride_ln, stride_lc, stride_lh, stride_lw, stride_tn, stride_th, stride_tw,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Counts (label, argmax) in one of `last_table + 1` zeroed tables [C, C] (a power of two).

    Neighbouring columns and programs count in different tables: a region of one class, which most
    images are made of, would otherwise queue at one address. Integer counts do not depend on order.
    bad [programs] gets the number of labels that are neither a class nor ignore_index.

    Grid: column tiles, fastest, x row blocks x images.
    """
    pid = tl.program_id(0)
    tile = pid % col_tiles
    block = pid // col_tiles % row_blocks
    image = (pid // col_tiles // row_blocks).to(tl.int64)
    row, row_in, top, bottom, lam_y = _row_tile(
        row_first_ptr, row_low_ptr, row_lam_ptr, block, row_blocks, in_rows, ROWS
    )
    col = tile * COLS + tl.arange(0, COLS)
    left, right, lam_x = _source_columns(col_low_ptr, col_lam_ptr, col, in_cols, out_cols)
    p00, p01, p10, p11 = _corners(
        logits_ptr, image, top, bottom, left, right, stride_ln, stride_lh, stride_lw
    )
    inside = row_in[:, None] & (col < out_cols)[None, :]
    label, is_class, is_bad = _labels(
        target_ptr, image, row, col, inside, num_classes, ignore_index,
        stride_tn, stride_th, stride_tw,
    )  # fmt: skip
    tl.store(bad_ptr + pid, tl.sum(is_bad.to(tl.int32)))
    stride_c = stride_lc.to(tl.int64)
    index, _ = _argmax_state(
        p00, p01, p10, p11, lam_x, lam_y, num_classes, stride_c, ROWS, COLS, False
    )
    table = (pid * COLS + tl.arange(0, COLS)) & last_table
    offset = (table.to(tl.int64)[None, :] * num_classes + label) * num_classes + index
    flat: tl.constexpr = [ROWS * COLS]
    tl.atomic_add(
        tl.reshape(tables_ptr + offset, flat), 1, mask=tl.reshape(is_class, flat), sem="relaxed"
    )


@triton.jit(
    do_not_specialize=[
        "num_classes", "in_rows", "in_cols", "row_blocks", "col_tiles",
        "stride_ln", "stride_lc", "stride_lh", "stride_lw",
    ]
)  # fmt: skip
def upsample_softmax_add_kernel(
    logits_ptr, accumulator_ptr,
    row_first_ptr, row_low_ptr, row_lam_ptr, col_low_ptr, col_lam_ptr,
    num_classes, in_rows, in_cols, out_cols, row_blocks, col_tiles,
    stride_ln, stride_lc, stride_lh, stride_lw,
    stride_an, stride_ac, stride_ah, stride_aw,
    ROWS: tl.constexpr, COLS: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """accumulator [N, C, H, W] (any strides) += softmax, of mirrored columns where FLIP.

    Grid: column tiles, fastest, x row blocks x images.
    """
    pid = tl.program_id(0)
    tile = pid % col_tiles
    block = pid // col_tiles % row_blocks
    image = (pid // col_tiles // row_blocks).to(tl.int64)
    row, row_in, top, bottom, lam_y = _row_tile(
        row_first_ptr, row_low_ptr, row_lam_ptr, block, row_blocks, in_rows, ROWS
    )
    col = tile * COLS + tl.arange(0, COLS)
    source = col
    if FLIP:
        source = out_cols - 1 - col
    left, right, lam_x = _source_columns(col_low_ptr, col_lam_ptr, source, in_cols, out_cols)
    p00, p01, p10, p11 = _corners(
        logits_ptr, image, top, bottom, left, right, stride_ln, stride_lh, stride_lw
    )
    stride_c = stride_lc.to(tl.int64)
    highest, total = _softmax_state(
        p00, p01, p10, p11, lam_x, lam_y, num_classes, stride_c, ROWS, COLS
    )
    scale = 1.0 / total
    inside = row_in[:, None] & (col < out_cols)[None, :]
    pixel = row.to(tl.int64)[:, None] * stride_ah + col.to(tl.int64)[None, :] * stride_aw
    out = accumulator_ptr + image * stride_an + pixel
    for c in range(num_classes):
        v = _interpolate(p00, p01, p10, p11, c * stride_c, lam_x, lam_y)
        sum_ptr = out + tl.cast(c, tl.int64) * stride_ac
        before = tl.load(sum_ptr, mask=inside, other=0.0)
        tl.store(sum_ptr, before + tl.exp2((v - highest) * LOG2_E) * scale, mask=inside)


@triton.jit(
    do_not_specialize=[
        "num_classes", "in_rows", "in_cols", "row_blocks", "col_blocks", "col_tiles",
        "stride_ln", "stride_lc", "stride_lh", "stride_lw", "ignore_index", "smoothing",
    ]
)  # fmt: skip
def upsample_cross_entropy_kernel(
    logits_ptr, target_ptr, weight_ptr, pixel_grad_ptr,
    loss_ptr, sums_ptr, counts_ptr, partial_ptr,
    row_first_ptr, row_low_ptr, row_lam_ptr, col_first_ptr, col_low_ptr, col_lam_ptr,
    num_classes, in_rows, in_cols, out_rows, out_cols, row_blocks, col_blocks, col_tiles,
    stride_ln, stride_lc, stride_lh, stride_lw,
    stride_tn, stride_th, stride_tw, stride_gn, stride_gh, stride_gw,
    ignore_index, smoothing,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, LOSS_MAP: tl.constexpr,
    WITH_GRAD: tl.constexpr, PIXEL_GRAD: tl.constexpr,
):  # fmt: skip
    """Loss of every pixel, and the gradient of their sum to the corners of every block.

    With log p_c = v_c - lse(v), label y, class weights w and smoothing e, a pixel has the loss
        (1 - e) w_y (-log p_y) + (e / C) sum_c w_c (-log p_c)
    and its logits the gradient
        p_c ((1 - e) w_y + (e / C) sum(w)) - (1 - e) w_y [c = y] - (e / C) w_c,
    times pixel_grad [N, H, W] where PIXEL_GRAD. Ignored pixels have neither.

    Writes
        loss [N, H, W], contiguous, where LOSS_MAP;
        sums [2, programs]: sum of the losses, sum of w_y;
        counts [2, programs]: pixels whose label is a class, pixels whose label is neither a class
            nor ignore_index (they are ignored);
        partial [N, row_blocks, 4, C, col_blocks] where WITH_GRAD: for each block the gradient times
            (1 - ly)(1 - lx), (1 - ly) lx, ly (1 - lx), ly lx, summed over its pixels. Every entry
            is written by one program.

    Grid: column tiles, fastest, x row blocks x images. Columns come in blocks where WITH_GRAD.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    tile = pid % col_tiles
    block = pid // col_tiles % row_blocks
    image = (pid // col_tiles // row_blocks).to(tl.int64)
    row, row_in, top, bottom, lam_y = _row_tile(
        row_first_ptr, row_low_ptr, row_lam_ptr, block, row_blocks, in_rows, ROWS
    )
    if WITH_GRAD:
        col, col_in = _blocked_columns(col_first_ptr, tile, col_blocks, COLS, BLOCK_COLS)
    else:
        col = tile * COLS + tl.arange(0, COLS)
        col_in = col < out_cols
    left, right, lam_x = _source_columns(col_low_ptr, col_lam_ptr, col, in_cols, out_cols)
    p00, p01, p10, p11 = _corners(
        logits_ptr, image, top, bottom, left, right, stride_ln, stride_lh, stride_lw
    )
    stride_c = stride_lc.to(tl.int64)
    inside = row_in[:, None] & col_in[None, :]
    label, is_class, is_bad = _labels(
        target_ptr, image, row, col, inside, num_classes, ignore_index,
        stride_tn, stride_th, stride_tw,
    )  # fmt: skip
    if HAS_WEIGHT:
        label_weight = _gather(weight_ptr + label, ROWS, COLS)
    else:
        label_weight = tl.full([ROWS, COLS], 1.0, tl.float32)
    label_weight = tl.where(is_class, label_weight, 0.0)

    highest = tl.full([ROWS, COLS], LOWEST, tl.float32)
    total = tl.zeros([ROWS, COLS], tl.float32)
    weighted = tl.zeros([ROWS, COLS], tl.float32)
    weight_sum = 0.0
    for c in range(num_classes):
        v = _interpolate(p00, p01, p10, p11, c * stride_c, lam_x, lam_y)
        highest, total = _online_softmax(v, highest, total)
        if SMOOTH:
            if HAS_WEIGHT:
                w = tl.load(weight_ptr + c)
                weighted += w * v
                weight_sum += w
            else:
                weighted += v
    total = tl.where(highest == INFINITY, float("nan"), total)
    if SMOOTH and not HAS_WEIGHT:
        weight_sum = num_classes.to(tl.float32)

    at_label = _interpolate_at(
        p00, p01, p10, p11, label.to(tl.int64) * stride_c, lam_x, lam_y, ROWS, COLS
    )
    log_total = tl.log(total)
    hard = label_weight
    loss = label_weight * (log_total - (at_label - highest))
    if SMOOTH:
        soft = smoothing / num_classes
        hard = (1.0 - smoothing) * label_weight
        loss = (1.0 - smoothing) * loss + soft * (weight_sum * (log_total + highest) - weighted)
    loss = tl.where(is_class, loss, 0.0)
    if LOSS_MAP:
        pixel = (image * out_rows + row)[:, None] * out_cols + col[None, :]
        tl.store(loss_ptr + pixel, loss, mask=inside)
    tl.store(sums_ptr + pid, tl.sum(loss))
    tl.store(sums_ptr + programs + pid, tl.sum(label_weight))
    tl.store(counts_ptr + pid, tl.sum(is_class.to(tl.int32)))
    tl.store(counts_ptr + programs + pid, tl.sum(is_bad.to(tl.int32)))

    if WITH_GRAD:
        # With e = exp(v - highest), p = e / total: the gradient is factor (e - at_class [c = y]),
        # less the part of the smoothing that does not depend on the logits.
        # An ignored pixel has 0 / total, NaN where its softmax is, as in PyTorch.
        factor = hard / total
        at_class = total
        if SMOOTH:
            both = tl.where(is_class, hard + soft * weight_sum, 0.0)
            at_class = tl.where(both == 0.0, 0.0, total * (hard / tl.where(both == 0.0, 1.0, both)))
            factor = both / total
            soft_factor = tl.where(is_class, soft, 0.0)
        if PIXEL_GRAD:
            pixel = row.to(tl.int64)[:, None] * stride_gh + col.to(tl.int64)[None, :] * stride_gw
            pixel_grad_ptr += image * stride_gn
            pixel_grad = tl.load(pixel_grad_ptr + pixel, mask=is_class, other=0.0).to(tl.float32)
            factor *= pixel_grad
            if SMOOTH:
                soft_factor *= pixel_grad
        low_y = (1.0 - lam_y)[:, None]
        high_y = lam_y[:, None]
        low_factor = low_y * factor
        high_factor = high_y * factor
        if SMOOTH:
            low_soft = tl.sum(low_y * soft_factor, 0)
            high_soft = tl.sum(high_y * soft_factor, 0)

        BLOCKS: tl.constexpr = COLS // BLOCK_COLS
        col_block = tile * BLOCKS + tl.arange(0, BLOCKS)
        block_in = col_block < col_blocks
        plane = num_classes.to(tl.int64) * col_blocks
        right = tl.arange(0, 2)[None, :, None] * plane
        high = tl.arange(0, 2)[None, None, :] * (2 * plane)
        out = partial_ptr + (image * row_blocks + block) * 4 * plane
        out = out + col_block[:, None, None] + right + high
        for c in range(num_classes):
            v = _interpolate(p00, p01, p10, p11, c * stride_c, lam_x, lam_y)
            e = tl.exp2((v - highest) * LOG2_E) - tl.where(label == c, at_class, 0.0)
            above = tl.sum(low_factor * e, 0)
            below = tl.sum(high_factor * e, 0)
            if SMOOTH:
                w = 1.0
                if HAS_WEIGHT:
                    w = tl.load(weight_ptr + c)
                above -= w * low_soft
                below -= w * high_soft
            above_right = tl.sum(tl.reshape(above * lam_x, [BLOCKS, BLOCK_COLS]), 1)
            above_left = tl.sum(tl.reshape(above * (1.0 - lam_x), [BLOCKS, BLOCK_COLS]), 1)
            below_right = tl.sum(tl.reshape(below * lam_x, [BLOCKS, BLOCK_COLS]), 1)
            below_left = tl.sum(tl.reshape(below * (1.0 - lam_x), [BLOCKS, BLOCK_COLS]), 1)
            # One store, because a store of sums goes through shared memory: [BLOCKS, right, high].
            corners = tl.join(tl.join(above_left, above_right), tl.join(below_left, below_right))
            tl.store(out, corners, mask=block_in[:, None, None])
            out += col_blocks


@triton.jit(do_not_specialize=["programs"])
def cross_entropy_finish_kernel(
    sums_ptr, counts_ptr, grad_ptr, result_ptr, bad_ptr, programs,
    MEAN: tl.constexpr, HAS_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """result = (loss, factor of the gradient), bad = pixels with labels that are no class.

    The factor is grad (1 where there is none), for MEAN divided by the sum of the label weights,
    and 0 where every pixel is ignored, as in PyTorch. One program adds the partials of
    upsample_cross_entropy_kernel in float64 and a fixed order.
    """
    lane = tl.arange(0, BLOCK)
    loss = tl.zeros([BLOCK], tl.float64)
    weight = tl.zeros([BLOCK], tl.float64)
    classes = tl.zeros([BLOCK], tl.int64)
    bad = tl.zeros([BLOCK], tl.int64)
    for start in range(0, programs, BLOCK):
        at = start + lane
        exists = at < programs
        loss += tl.load(sums_ptr + at, mask=exists, other=0.0).to(tl.float64)
        weight += tl.load(sums_ptr + programs + at, mask=exists, other=0.0).to(tl.float64)
        classes += tl.load(counts_ptr + at, mask=exists, other=0).to(tl.int64)
        bad += tl.load(counts_ptr + programs + at, mask=exists, other=0).to(tl.int64)
    loss = tl.sum(loss).to(tl.float32)
    weight = tl.sum(weight).to(tl.float32)
    factor = 1.0
    if HAS_GRAD:
        factor = tl.load(grad_ptr).to(tl.float32)
    if MEAN:
        # The loss of nothing is NaN, also where numpy would warn about 0 / 0.
        mean_of = tl.where(weight == 0.0, float("nan"), weight)
        loss, factor = loss / mean_of, factor / mean_of
    factor = tl.where(tl.sum(classes) == 0, 0.0, factor)
    tl.store(result_ptr, loss)
    tl.store(result_ptr + 1, factor)
    tl.store(bad_ptr, tl.sum(bad))


@triton.jit(
    do_not_specialize=[
        "num_classes", "in_rows", "in_cols", "row_blocks", "col_blocks", "col_tiles", "class_tiles",
        "most_blocks",
    ]
)  # fmt: skip
def gradient_gather_kernel(
    partial_ptr, factor_ptr, grad_ptr,
    row_start_ptr, row_low_ptr, col_start_ptr, col_low_ptr,
    num_classes, in_rows, in_cols, row_blocks, col_blocks, col_tiles, class_tiles, most_blocks,
    CLASSES: tl.constexpr, COLS: tl.constexpr, HAS_FACTOR: tl.constexpr,
):  # fmt: skip
    """grad [N, C, h, w], contiguous, from the partials of upsample_cross_entropy_kernel.

    Logit (i, j) is a low corner of the blocks of row cell i and a high corner of those of row cell
    i - 1 (at the last row, whose high corner is the row itself, of both), likewise for columns. Its
    partials are added in the order of the blocks.

    Grid: column tiles, fastest, x class tiles x rows x images.
    """
    pid = tl.program_id(0)
    tile = pid % col_tiles
    class_tile = pid // col_tiles % class_tiles
    i = pid // col_tiles // class_tiles % in_rows
    image = (pid // col_tiles // class_tiles // in_rows).to(tl.int64)
    c = class_tile * CLASSES + tl.arange(0, CLASSES)
    col = tile * COLS + tl.arange(0, COLS)
    exists = (c < num_classes)[:, None] & (col < in_cols)[None, :]
    j = tl.minimum(col, in_cols - 1)
    col_begin = tl.load(col_start_ptr + tl.maximum(j - 1, 0))
    col_end = tl.load(col_start_ptr + j + 1)
    row_begin = tl.load(row_start_ptr + tl.maximum(i - 1, 0))
    row_end = tl.load(row_start_ptr + i + 1)
    plane = num_classes.to(tl.int64) * col_blocks
    total = tl.zeros([CLASSES, COLS], tl.float32)
    for block in range(row_begin, row_end):
        row_low = tl.load(row_low_ptr + block)
        is_low = row_low == i
        is_high = (row_low + 1 == i) | (is_low & (i + 1 == in_rows))
        base = partial_ptr + (image * row_blocks + block) * 4 * plane
        for k in range(most_blocks):
            col_block = col_begin + k
            touches = exists & (col_block < col_end)[None, :]
            col_block = tl.minimum(col_block, col_blocks - 1)
            col_low = tl.load(col_low_ptr + col_block)
            is_left = col_low == j
            is_right = (col_low + 1 == j) | (is_left & (j + 1 == in_cols))
            at = base + c.to(tl.int64)[:, None] * col_blocks + col_block[None, :]
            left = touches & is_left[None, :]
            right = touches & is_right[None, :]
            total += tl.load(at, mask=left & is_low, other=0.0)
            total += tl.load(at + plane, mask=right & is_low, other=0.0)
            total += tl.load(at + 2 * plane, mask=left & is_high, other=0.0)
            total += tl.load(at + 3 * plane, mask=right & is_high, other=0.0)
    if HAS_FACTOR:
        total *= tl.load(factor_ptr)
    out = ((image * num_classes + c[:, None]) * in_rows + i) * in_cols + j[None, :]
    tl.store(grad_ptr + out, total.to(grad_ptr.dtype.element_ty), mask=exists)
