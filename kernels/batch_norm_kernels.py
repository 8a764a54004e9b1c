"""Triton device code of batch norm in training; `batch_norm.py` launches it.

Work and layout
    Maps are [P, C]: P = N H W pixels one behind another, stride elements apart, C channels next to
    each other. A thread owns VEC neighbouring channels, 16 bytes where strides and addresses allow
    it, so that one access of a warp covers whole cache lines.
    One-pass kernels take a tile of BLOCK_P pixels by BLOCK_C channels a program, from the start of
    the map. Kernels that reduce over pixels take tiles of ROWS x LANES pixels: a thread holds ROWS
    of them at a time and sums within its registers, tile after tile, so that nothing passes between
    threads before the last tile is done. Their programs take every `chunks`-th tile, from the end
    of the map to its start: some of what the kernel before wrote last, and of what the one after
    reads first, is then in the second-level cache.

Numerics
    Values are converted to float32 at the load; each stored tensor is rounded once. Statistics are
    (count, mean, M2), M2 the sum of squared deviations from the mean: of a thread's ROWS values in
    two passes over its registers, then merged by the formula of Chan, Golub and LeVeque (1983).
    Partials of programs are combined by a second kernel. Every order is fixed by shape, dtype,
    alignment and the number of multiprocessors; there are no atomics. What the activation saw is
    computed by one function, with an explicit multiply-add: forward and backward agree on its sign
    to the bit.

Cost. Bytes moved, with P C elements of t bytes; vectors and partials (8 bytes for each program and
channel of it) are below one percent of a large map. The time is a prediction: bytes over the 3e12
bytes a second of an H100's memory, for the largest map of ResNet-50 at 513x513, output stride 16,
batch 16, bf16, which is [16, 256, 129, 129] with 136 MB.
    batch_stats                                        t P C           45 us
    bn_act                                           2 t P C           91 us
    bn_act with a residual                           3 t P C          136 us
    bn_act_reduce                                    2 t P C           91 us
    bn_act_reduce with out                           3 t P C          136 us
    bn_act_backward                                  3 t P C          136 us
    bn_act_backward with out and to the residual     5 t P C          227 us
The loops of the kernels that reduce take 8 to 15 instructions an element of aligned maps
(tests/aot/batch_norm_triton_resources.json); at 2.9e13 a second that is less than half of these
times. A map that fits the second-level cache (50 MB) can be faster; then launches count as well:
one for a one-pass kernel, two for one that reduces.
"""

import triton
import triton.language as tl

# Strides and channel counts come in units of VEC elements: the compiler then sees what divides an
# address, and makes 16-byte accesses, without a variant for every stride.


@triton.jit
def _factors(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, col, exists):
    """mean, rstd, rstd * weight (NaN where that is infinite, see `reference`) and bias of each
    channel."""
    mean = tl.load(mean_ptr + col, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + col, mask=exists, other=0.0)
    weight = tl.load(weight_ptr + col, mask=exists, other=0.0)
    bias = tl.load(bias_ptr + col, mask=exists, other=0.0)
    scale = rstd * weight
    return mean, rstd, scale + (scale - scale), bias


@triton.jit
def _before_act(x, mean, scale, bias):
    """What the activation sees without a residual; the factors broadcast against x."""
    return tl.fma(x - mean, scale, bias)


@triton.jit
def _activated(z, ACT: tl.constexpr):
    # Comparisons, not minima and maxima, which would turn NaN into a number.
    if ACT == "relu":
        z = tl.where(z < 0.0, 0.0, z)
    elif ACT == "relu6":
        z = tl.where(z < 0.0, 0.0, tl.where(z > 6.0, 6.0, z))
    elif ACT == "hardswish":
        gate = tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 6.0, z + 3.0))
        z = z * gate * (1.0 / 6.0)
    return z


@triton.jit
def _activation_grad(grad, at, ACT: tl.constexpr):
    """grad times the activation's derivative at `at`; for "hardswish" `at` is its input.

    At NaN no comparison takes the gradient away.
    """
    if ACT == "relu":
        grad = tl.where(at <= 0.0, 0.0, grad)
    elif ACT == "relu6":
        grad = tl.where((at <= 0.0) | (at >= 6.0), 0.0, grad)
    elif ACT == "hardswish":
        slope = tl.fma(at, 1.0 / 3.0, 0.5)
        grad = grad * tl.where(at < -3.0, 0.0, tl.where(at > 3.0, 1.0, slope))
    return grad


@triton.jit
def _tile(tile_c, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr):
    """(pixel within a tile, channel, whether it exists)."""
    col = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.arange(0, BLOCK_P), col, col < channels * VEC


@triton.jit
def _offsets(first, pixel, col, stride, VEC: tl.constexpr):
    """Offsets [BLOCK_P, BLOCK_C] of a tile whose first pixel (int64) is `first`."""
    return first * stride * VEC + pixel.to(tl.int64)[:, None] * stride * VEC + col[None, :]


@triton.jit
def _values(ptr, offset, inside):
    return tl.load(ptr + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _by_lane(tile, ROWS: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile as [ROWS, LANES, BLOCK_C], of which a thread holds whole columns of ROWS.

    Loaded in this shape, Triton 3.6 would spread rows over threads.
    """
    return tl.reshape(tile, [ROWS, LANES, BLOCK_C])


@triton.jit
def _merged(count, mean, m2, new_count, new_mean, new_m2):
    """(count, mean, M2) of two sets together; counts broadcast against the rest."""
    total = count + new_count
    part = tl.div_rn(new_count, tl.maximum(total, 1.0))
    delta = new_mean - mean
    return total, tl.fma(delta, part, mean), m2 + new_m2 + delta * delta * (count * part)


@triton.jit
def _over_rows(count, mean, m2):
    """(count, mean, M2) of the sets in all rows together."""
    total = tl.sum(count, 0)
    whole = tl.div_rn(tl.sum(count * mean, 0), tl.maximum(total, 1.0))
    off = mean - whole[None, :]
    return total, whole, tl.sum(m2 + count * off * off, 0)


@triton.jit(do_not_specialize=["pixels", "channels", "stride_x", "tiles", "chunks", "tiles_c"])
def batch_stats_kernel(
    x_ptr, mean_ptr, m2_ptr,
    pixels, channels, stride_x, tiles, chunks, tiles_c,
    ROWS: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Mean and M2 [chunks, C] fp32 of the tiles of each chunk.

    Args:
        x_ptr: [P, C], pixels stride_x apart; channels and stride_x in units of VEC elements.
        tiles: of ROWS x LANES pixels; tiles_c: of BLOCK_C channels.

    Grid: tiles of channels, fastest, x chunks.
    """
    BLOCK_P: tl.constexpr = ROWS * LANES
    pid = tl.program_id(0)
    chunk = pid // tiles_c
    pixel, col, exists = _tile(pid % tiles_c, channels, BLOCK_P, BLOCK_C, VEC)
    lane = tl.arange(0, LANES)[:, None]
    count = tl.zeros([LANES, 1], tl.float32)
    mean = tl.zeros([LANES, BLOCK_C], tl.float32)
    m2 = tl.zeros([LANES, BLOCK_C], tl.float32)
    for step in range(0, tl.cdiv(tiles - chunk, chunks)):
        first = (tiles - 1 - chunk - step * chunks).to(tl.int64) * BLOCK_P
        left = tl.minimum(pixels - first, BLOCK_P).to(tl.int32)
        inside = (pixel < left)[:, None] & exists[None, :]
        x = _values(x_ptr, _offsets(first, pixel, col, stride_x, VEC), inside)
        x = _by_lane(x, ROWS, LANES, BLOCK_C)
        # Of the pixels lane, lane + LANES, ... those below `left`.
        new_count = (tl.maximum(left - lane + LANES - 1, 0) // LANES).to(tl.float32)
        new_mean = tl.sum(x, 0) * tl.div_rn(1.0, tl.maximum(new_count, 1.0))
        off = tl.where(_by_lane(inside, ROWS, LANES, BLOCK_C), x - new_mean[None, :, :], 0.0)
        new_m2 = tl.sum(off * off, 0)
        count, mean, m2 = _merged(count, mean, m2, new_count, new_mean, new_m2)
    _, mean, m2 = _over_rows(count, mean, m2)
    at = chunk.to(tl.int64) * channels * VEC + col
    tl.store(mean_ptr + at, mean, mask=exists)
    tl.store(m2_ptr + at, m2, mask=exists)


@triton.jit(
    do_not_specialize=[
        "pixels", "channels", "tiles", "chunks", "block_p", "eps", "share", "kept",
    ]
)  # fmt: skip
def stats_combine_kernel(
    mean_ptr, m2_ptr, result_mean_ptr, variance_ptr, rstd_ptr,
    running_mean_ptr, running_var_ptr, batches_ptr,
    pixels, channels, tiles, chunks, block_p, eps, share, kept,
    CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
    UPDATES: tl.constexpr, COUNTS: tl.constexpr, CUMULATIVE: tl.constexpr,
):  # fmt: skip
    """Mean, biased variance and 1 / sqrt(variance + eps) [C] of all chunks of batch_stats_kernel,
    whose tiles have block_p pixels.

    Args:
        UPDATES: running_mean and running_var [C] fp32 become kept times themselves plus share times
            the mean and the unbiased variance.
        COUNTS: batches, one int64, is increased by 1.
        CUMULATIVE: share is 1 / batches in place of the argument, and kept the rest of 1; batches
            counts this one already.

    Grid: tiles of BLOCK_C channels.
    """
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = col < channels
    count = tl.zeros([CHUNKS, 1], tl.float32)
    mean = tl.zeros([CHUNKS, BLOCK_C], tl.float32)
    m2 = tl.zeros([CHUNKS, BLOCK_C], tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)[:, None]
        at = chunk.to(tl.int64) * channels + col[None, :]
        inside = (chunk < chunks) & exists[None, :]
        pixels_of = ((tiles - 1 - chunk) // chunks + 1).to(tl.int64) * block_p
        # The last tile, which may be a part of one, is the first of chunk 0.
        pixels_of -= tl.where(chunk == 0, tiles.to(tl.int64) * block_p - pixels, 0)
        new_count = tl.where(chunk < chunks, pixels_of, 0).to(tl.float32)
        new_mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
        new_m2 = tl.load(m2_ptr + at, mask=inside, other=0.0)
        count, mean, m2 = _merged(count, mean, m2, new_count, new_mean, new_m2)
    count, mean, m2 = _over_rows(count, mean, m2)
    variance = tl.div_rn(m2, count)
    tl.store(result_mean_ptr + col, mean, mask=exists)
    tl.store(variance_ptr + col, variance, mask=exists)
    tl.store(rstd_ptr + col, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), mask=exists)
    if UPDATES:
        if CUMULATIVE:
            share = tl.div_rn(1.0, tl.load(batches_ptr).to(tl.float32))
            kept = 1.0 - share
        unbiased = variance * tl.div_rn(count, tl.maximum(count - 1.0, 1.0))
        old_mean = tl.load(running_mean_ptr + col, mask=exists, other=0.0)
        old_var = tl.load(running_var_ptr + col, mask=exists, other=0.0)
        tl.store(running_mean_ptr + col, tl.fma(mean, share, kept * old_mean), mask=exists)
        tl.store(running_var_ptr + col, tl.fma(unbiased, share, kept * old_var), mask=exists)
    if COUNTS:
        if tl.program_id(0) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit(do_not_specialize=["pixels", "channels", "stride_x", "stride_r", "tiles_c"])
def bn_act_kernel(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr,
    pixels, channels, stride_x, stride_r, tiles_c,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """y [P, C] = act((x - mean) * (rstd * weight) + bias + residual).

    Args:
        x_ptr, residual_ptr: [P, C], pixels stride_x and stride_r apart; these and channels in units
            of VEC elements. y is dense.
        mean_ptr, ...: [C] fp32.
        ACT: "relu", "relu6", "hardswish" or "none".

    Grid: tiles of channels, fastest, x tiles of pixels.
    """
    pid = tl.program_id(0)
    pixel, col, exists = _tile(pid % tiles_c, channels, BLOCK_P, BLOCK_C, VEC)
    first = (pid // tiles_c).to(tl.int64) * BLOCK_P
    left = tl.minimum(pixels - first, BLOCK_P).to(tl.int32)
    inside = (pixel < left)[:, None] & exists[None, :]
    x = _values(x_ptr, _offsets(first, pixel, col, stride_x, VEC), inside)
    mean, _, scale, bias = _factors(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, col, exists)
    z = _before_act(x, mean[None, :], scale[None, :], bias[None, :])
    if HAS_RESIDUAL:
        z += _values(residual_ptr, _offsets(first, pixel, col, stride_r, VEC), inside)
    y = _activated(z, ACT).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + _offsets(first, pixel, col, channels, VEC), y, mask=inside)


@triton.jit(
    do_not_specialize=[
        "pixels", "channels", "stride_g", "stride_x", "stride_o", "tiles", "chunks", "tiles_c",
    ]
)  # fmt: skip
def bn_act_reduce_kernel(
    grad_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, out_ptr, sum_ptr, sum_xhat_ptr,
    pixels, channels, stride_g, stride_x, stride_o, tiles, chunks, tiles_c,
    ROWS: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr,
    HAS_OUT: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g xhat [chunks, C] fp32 over the tiles of each chunk.

    Args:
        grad_ptr, x_ptr, out_ptr: [P, C], pixels stride_g, stride_x and stride_o apart, in units of
            VEC elements, as is channels.
        HAS_OUT: the activation's derivative is taken at out, else at what x gives again.
        tiles: of ROWS x LANES pixels; tiles_c: of BLOCK_C channels.

    Grid: tiles of channels, fastest, x chunks.
    """
    BLOCK_P: tl.constexpr = ROWS * LANES
    pid = tl.program_id(0)
    chunk = pid // tiles_c
    pixel, col, exists = _tile(pid % tiles_c, channels, BLOCK_P, BLOCK_C, VEC)
    mean, rstd, scale, bias = _factors(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, col, exists)
    sums = tl.zeros([LANES, BLOCK_C], tl.float32)
    sums_x = tl.zeros([LANES, BLOCK_C], tl.float32)
    for step in range(0, tl.cdiv(tiles - chunk, chunks)):
        first = (tiles - 1 - chunk - step * chunks).to(tl.int64) * BLOCK_P
        left = tl.minimum(pixels - first, BLOCK_P).to(tl.int32)
        inside = (pixel < left)[:, None] & exists[None, :]
        g = _values(grad_ptr, _offsets(first, pixel, col, stride_g, VEC), inside)
        x = _values(x_ptr, _offsets(first, pixel, col, stride_x, VEC), inside)
        if ACT != "none":
            if HAS_OUT:
                at = _values(out_ptr, _offsets(first, pixel, col, stride_o, VEC), inside)
            else:
                at = _before_act(x, mean[None, :], scale[None, :], bias[None, :])
            g = _activation_grad(g, at, ACT)
        sums += tl.sum(_by_lane(g, ROWS, LANES, BLOCK_C), 0)
        sums_x += tl.sum(_by_lane(g * (x - mean[None, :]), ROWS, LANES, BLOCK_C), 0)
    at = chunk.to(tl.int64) * channels * VEC + col
    tl.store(sum_ptr + at, tl.sum(sums, 0), mask=exists)
    tl.store(sum_xhat_ptr + at, tl.sum(sums_x, 0) * rstd, mask=exists)


@triton.jit(do_not_specialize=["channels", "chunks"])
def sums_combine_kernel(
    sum_ptr, sum_xhat_ptr, result_ptr, result_xhat_ptr, channels, chunks,
    CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Both sums [C] over all chunks of bn_act_reduce_kernel.

    Grid: tiles of BLOCK_C channels.
    """
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = col < channels
    sums = tl.zeros([CHUNKS, BLOCK_C], tl.float32)
    sums_xhat = tl.zeros([CHUNKS, BLOCK_C], tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)[:, None]
        at = chunk.to(tl.int64) * channels + col[None, :]
        inside = (chunk < chunks) & exists[None, :]
        sums += tl.load(sum_ptr + at, mask=inside, other=0.0)
        sums_xhat += tl.load(sum_xhat_ptr + at, mask=inside, other=0.0)
    tl.store(result_ptr + col, tl.sum(sums, 0), mask=exists)
    tl.store(result_xhat_ptr + col, tl.sum(sums_xhat, 0), mask=exists)


@triton.jit(
    do_not_specialize=[
        "pixels", "channels", "stride_g", "stride_x", "stride_o", "tiles_c", "per_value",
    ]
)  # fmt: skip
def bn_act_backward_kernel(
    grad_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, out_ptr,
    mean_grad_ptr, mean_grad_xhat_ptr, dx_ptr, residual_grad_ptr,
    pixels, channels, stride_g, stride_x, stride_o, tiles_c, per_value,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr,
    HAS_OUT: tl.constexpr, HAS_MEANS: tl.constexpr, TO_RESIDUAL: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """dx [P, C] = rstd * weight * (g - mean_grad - xhat * mean_grad_xhat), and g where TO_RESIDUAL.

    Args:
        grad_ptr, ..., stride_o: as for bn_act_reduce_kernel. dx and residual_grad are dense.
        mean_grad_ptr, mean_grad_xhat_ptr: [C] fp32 where HAS_MEANS, both times per_value; else
            taken as zero.

    Without the means x is read only where the activation needs it.

    Grid: tiles of channels, fastest, x tiles of pixels.
    """
    NEEDS_X: tl.constexpr = HAS_MEANS or (ACT != "none" and not HAS_OUT)
    pid = tl.program_id(0)
    pixel, col, exists = _tile(pid % tiles_c, channels, BLOCK_P, BLOCK_C, VEC)
    first = (pid // tiles_c).to(tl.int64) * BLOCK_P
    left = tl.minimum(pixels - first, BLOCK_P).to(tl.int32)
    inside = (pixel < left)[:, None] & exists[None, :]
    g = _values(grad_ptr, _offsets(first, pixel, col, stride_g, VEC), inside)
    if NEEDS_X:
        x = _values(x_ptr, _offsets(first, pixel, col, stride_x, VEC), inside)
    mean, rstd, scale, bias = _factors(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, col, exists)
    if ACT != "none":
        if HAS_OUT:
            at = _values(out_ptr, _offsets(first, pixel, col, stride_o, VEC), inside)
        else:
            at = _before_act(x, mean[None, :], scale[None, :], bias[None, :])
        g = _activation_grad(g, at, ACT)
    to = _offsets(first, pixel, col, channels, VEC)
    if TO_RESIDUAL:
        tl.store(residual_grad_ptr + to, g.to(residual_grad_ptr.dtype.element_ty), mask=inside)
    dx = g
    if HAS_MEANS:
        mean_grad = tl.load(mean_grad_ptr + col, mask=exists, other=0.0) * per_value
        slope = rstd * (tl.load(mean_grad_xhat_ptr + col, mask=exists, other=0.0) * per_value)
        dx = tl.fma(mean[None, :] - x, slope[None, :], g - mean_grad[None, :])
    dx = (dx * scale[None, :]).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + to, dx, mask=inside)
