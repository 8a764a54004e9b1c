"""Triton device code of 1x1 convolutions; `conv.py` and `aspp.py` launch it.

Work and layout
    A matrix product: rows of x [N, H, W, C] (any strides but C's, which is 1) by filters, the rows
    of the convolution's own weight [K, C]. Both operands are contiguous in the channels that are
    summed. The epilogue works in float32 and rounds once: scale and shift, a residual, ReLU; or it
    goes on to a second product, the class scores of the rounded result, so that only those leave.
    Rows come in groups that share no tile. The projection of the ASPP has a group for each image,
    because its shift holds the image's pooled branch; everything else is one group.

    Tiles of the same rows lie side by side in the grid: they read the same x.

Cost, estimated and not measured, on an H100 in bf16: the projection of 1024 to 256 channels at
65x65 takes 86 us at batch 16 and 10 us at batch 1, plus 2 us for the pooled branch.
"""

import triton
import triton.language as tl

# Strides and channel counts come in units of VEC elements: the compiler then sees what divides an
# address, and makes 16-byte accesses, without a variant for every stride.


@triton.jit
def _offsets(
    row, rows, cols, stride_n, stride_h, stride_w, VEC: tl.constexpr, FLAT: tl.constexpr
):  # fmt: skip
    """Offsets (int64) of pixels, numbered (image, row, column) over maps of rows x cols.

    FLAT: a pixel is stride_w behind the one before, also across rows and images.
    """
    if FLAT:
        offset = row.to(tl.int64) * stride_w
    else:
        line = row // cols
        image = line // rows
        offset = (
            image.to(tl.int64) * stride_n
            + (line - image * rows).to(tl.int64) * stride_h
            + (row - line * cols).to(tl.int64) * stride_w
        )
    return offset * VEC


@triton.jit
def _result(
    sums, first_col, tile_n, group, row, inside, rows, cols, filters,
    scale_ptr, shift_ptr, residual_ptr,
    stride_sg, stride_rn, stride_rh, stride_rw,
    BLOCK_N: tl.constexpr, NUM: tl.constexpr, VEC_R: tl.constexpr, FLAT_R: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """(columns, whether they exist, act(scale * sums + shift + residual)) of half a tile."""
    col = tile_n * BLOCK_N + first_col + tl.arange(0, NUM)
    exists = col < filters
    scale = tl.load(scale_ptr + col, mask=exists, other=0.0)
    shift = tl.load(shift_ptr + group.to(tl.int64) * stride_sg + col, mask=exists, other=0.0)
    y = sums * scale[None, :] + shift[None, :]
    if HAS_RESIDUAL:
        offset = _offsets(row, rows, cols, stride_rn, stride_rh, stride_rw, VEC_R, FLAT_R)
        mask = inside[:, None] & exists[None, :]
        y += tl.load(residual_ptr + offset[:, None] + col[None, :], mask=mask, other=0.0)
    if RELU:
        # Not a maximum, which would turn NaN into 0.
        y = tl.where(y < 0.0, 0.0, y)
    return col, exists, y


@triton.jit(
    do_not_specialize=[
        "group_rows", "rows", "cols", "channels", "filters", "classes", "tiles_n",
        "stride_xn", "stride_xh", "stride_xw", "stride_wk", "stride_sg",
        "stride_rn", "stride_rh", "stride_rw", "stride_yn", "stride_yh", "stride_yw",
    ]
)  # fmt: skip
def pointwise_kernel(
    x_ptr, weight_ptr, scale_ptr, shift_ptr, residual_ptr, class_weight_ptr, class_bias_ptr, y_ptr,
    group_rows, rows, cols, channels, filters, classes, tiles_n,
    stride_xn, stride_xh, stride_xw, stride_wk, stride_sg,
    stride_rn, stride_rh, stride_rw, stride_yn, stride_yh, stride_yw,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, CLASSES: tl.constexpr,
    VEC_X: tl.constexpr, VEC_Y: tl.constexpr, VEC_R: tl.constexpr,
    FLAT_X: tl.constexpr, FLAT_Y: tl.constexpr, FLAT_R: tl.constexpr,
    EVEN_C: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = act(scale * (x . weight) + shift + residual), or class scores of it where CLASSES > 0.

    Args:
        x_ptr: [N, H, W, C]; weight_ptr: [K, C], rows stride_wk apart.
        scale_ptr: [K] fp32; shift_ptr: fp32, of group g [K] at g stride_sg.
        residual_ptr: [N, H, W, K] where HAS_RESIDUAL.
        class_weight_ptr: [classes, K] in x's dtype, contiguous; class_bias_ptr: [classes] fp32.
        y_ptr: [N, H, W, K], or [N, H, W, classes].
        group_rows: pixels of a group; rows, cols: H, W.
        channels, stride_x*, stride_wk: in units of VEC_X elements; stride_r* of VEC_R, filters and
            stride_y* of VEC_Y (with CLASSES filters of VEC_X).

    Grid: tiles of filters, fastest, x tiles of a group x groups. Where CLASSES > 0 one tile holds
    all filters, and its classes are scored CLASSES at a time.
    """
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    tiles_m = tl.cdiv(group_rows, BLOCK_M)
    tile_m = pid // tiles_n % tiles_m
    group = pid // tiles_n // tiles_m
    NUM_K: tl.constexpr = VEC_X if CLASSES > 0 else VEC_Y
    num_filters = filters * NUM_K

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(row, group_rows - 1) + group * group_rows
    offset = _offsets(row, rows, cols, stride_xn, stride_xh, stride_xw, VEC_X, FLAT_X)
    c = tl.arange(0, BLOCK_C)
    x_at = x_ptr + offset[:, None] + c[None, :]
    k = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), num_filters - 1)
    weight_at = weight_ptr + (k.to(tl.int64) * stride_wk * VEC_X)[:, None] + c[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_c in range(0, channels * VEC_X, BLOCK_C):
        if EVEN_C:
            x = tl.load(x_at + first_c)
            weight = tl.load(weight_at + first_c)
        else:
            live = (c < channels * VEC_X - first_c)[None, :]
            x = tl.load(x_at + first_c, mask=live, other=0.0)
            weight = tl.load(weight_at + first_c, mask=live, other=0.0)
        sums = tl.dot(x, tl.trans(weight), sums, input_precision=PRECISION)

    half: tl.constexpr = BLOCK_N // 2
    left, right = tl.split(tl.permute(tl.reshape(sums, [BLOCK_M, 2, half]), [0, 2, 1]))
    # Rows are computed again: kept through the loop they would take registers from the sums.
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < group_rows
    row = row + group * group_rows
    col0, exists0, y0 = _result(
        left, 0, tile_n, group, row, inside, rows, cols, num_filters,
        scale_ptr, shift_ptr, residual_ptr,
        stride_sg, stride_rn, stride_rh, stride_rw,
        BLOCK_N, half, VEC_R, FLAT_R, HAS_RESIDUAL, RELU,
    )  # fmt: skip
    offset = _offsets(row, rows, cols, stride_yn, stride_yh, stride_yw, VEC_Y, FLAT_Y)
    if CLASSES > 0:
        col1, exists1, y1 = _result(
            right, half, tile_n, group, row, inside, rows, cols, num_filters,
            scale_ptr, shift_ptr, residual_ptr,
            stride_sg, stride_rn, stride_rh, stride_rw,
            BLOCK_N, half, VEC_R, FLAT_R, HAS_RESIDUAL, RELU,
        )  # fmt: skip
        dtype = class_weight_ptr.dtype.element_ty
        y0 = y0.to(dtype)
        y1 = y1.to(dtype)
        # One stage: in flight beside those of the first product, weights would need more memory.
        for first in tl.range(0, classes, CLASSES, num_stages=1):
            n = first + tl.arange(0, CLASSES)
            counted = n < classes
            at = class_weight_ptr + tl.minimum(n, classes - 1)[:, None] * num_filters
            w0 = tl.load(at + col0[None, :], mask=exists0[None, :], other=0.0)
            w1 = tl.load(at + col1[None, :], mask=exists1[None, :], other=0.0)
            scores = tl.dot(y0, tl.trans(w0), input_precision=PRECISION)
            scores = tl.dot(y1, tl.trans(w1), scores, input_precision=PRECISION)
            scores += tl.load(class_bias_ptr + n, mask=counted, other=0.0)[None, :]
            at = y_ptr + offset[:, None] + n[None, :]
            mask = inside[:, None] & counted[None, :]
            tl.store(at, scores.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        mask = inside[:, None] & exists0[None, :]
        at = y_ptr + offset[:, None]
        tl.store(at + col0[None, :], y0.to(y_ptr.dtype.element_ty), mask=mask)
        col1, exists1, y1 = _result(
            right, half, tile_n, group, row, inside, rows, cols, num_filters,
            scale_ptr, shift_ptr, residual_ptr,
            stride_sg, stride_rn, stride_rh, stride_rw,
            BLOCK_N, half, VEC_R, FLAT_R, HAS_RESIDUAL, RELU,
        )  # fmt: skip
        mask = inside[:, None] & exists1[None, :]
        tl.store(at + col1[None, :], y1.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["pooled_channels", "filters", "tiles_k", "stride_pn", "stride_pp",
                       "stride_wk"]
)  # fmt: skip
def image_shift_kernel(
    pooled_ptr, weight_ptr, scale_ptr, shift_ptr, result_ptr,
    pooled_channels, filters, tiles_k, stride_pn, stride_pp, stride_wk,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """result [N, K] fp32 = scale * (weight . pooled) + shift: the shift of each image.

    Args:
        pooled_ptr: [N, P], any strides; weight_ptr: [K, P], contiguous in P, rows stride_wk apart.
        scale_ptr, shift_ptr: [K] fp32.

    Grid: blocks of filters, fastest, x images.
    """
    pid = tl.program_id(0)
    k = pid % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    image = (pid // tiles_k).to(tl.int64)
    exists = k < filters
    weight_at = weight_ptr + tl.minimum(k, filters - 1).to(tl.int64)[:, None] * stride_wk
    total = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    for first in range(0, pooled_channels, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        live = p < pooled_channels
        pooled = tl.load(
            pooled_ptr + image * stride_pn + p.to(tl.int64) * stride_pp, mask=live, other=0.0
        )
        weight = tl.load(weight_at + p[None, :], mask=live[None, :], other=0.0)
        total += weight.to(tl.float32) * pooled.to(tl.float32)[None, :]
    sums = tl.sum(total, 1)
    scale = tl.load(scale_ptr + k, mask=exists, other=0.0)
    shift = tl.load(shift_ptr + k, mask=exists, other=0.0)
    tl.store(result_ptr + image * filters + k, sums * scale + shift, mask=exists)
