"""1x1 convolutions with what follows them, in Triton: the launchers.

`conv_bn_act` takes what the reference of the same name in `deeplab_fast.reference` takes, already
validated. The kernel and its costs are in `conv_kernels.py`; importing this module does not import
Triton. Convolutions of other sizes are refused: cuDNN has fused kernels for them
(`ops._cudnn`), and only the dilated branches of the ASPP have padding worth skipping (`aspp.py`).
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch import limits
from ..dispatch.describe import OpDesc
from ..plan.gemm import GemmConfig
from ..plan.packing import channels_inside, empty_map, fp32
from ..plan.rules import POINTWISE, PointwiseKey
from . import launch
from .launch import arithmetic, grid, is_longest, launch_options, pixel_strides, precision, vector
from .tuned import choose

_MAX_PIXELS = 2**31 - 1
_LEAST_CLASSES = 16
_MOST_CLASSES = 32


def not_supported_reasons(desc: OpDesc) -> list[str]:
    """Why the Triton kernel cannot run the call; empty where it can.

    Args:
        desc: a call of conv_bn_act.
    """
    reasons = product_reasons(desc)
    rows, cols = desc.params["weight"][2:]
    if (rows, cols) != (1, 1):
        reasons.append(f"only 1x1 convolutions; cuDNN's fused kernels run {rows}x{cols}")
    if desc.params["padding"] or desc.params["groups"] != 1:
        reasons.append(
            f"needs padding=0 and groups=1, got padding={desc.params['padding']}, "
            f"groups={desc.params['groups']}"
        )
    return reasons


def product_reasons(desc: OpDesc) -> list[str]:
    """Why no matrix product of Triton can run a call of any op; empty where they can."""
    reasons = limits.triton(desc)
    n, _, height, width = desc.shape
    if n * height * width > _MAX_PIXELS:
        reasons.append(
            f"counts at most {_MAX_PIXELS} pixels, {n} maps of {height}x{width} have more"
        )
    return reasons


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    act: str | None = "relu",
    config: GemmConfig | None = None,
) -> Tensor:
    """y = act(scale * conv(x, weight) + shift + residual) of a 1x1 convolution.

    Args:
        x: [N, C, H, W] fp16, bf16 or fp32; a layout other than channels_last is copied.
        weight: [K, C, 1, 1], the dtype of x.
        scale, shift: [K], any float dtype; used in fp32.
        stride: of rows and columns.
        padding, groups: 0 and 1; dilation has no effect.
        residual: [N, K, H', W'], the dtype of x, or None.
        act: "relu" or None.
        config: None for the choice of `rules.POINTWISE`.

    Returns:
        [N, K, H', W'], channels_last, accumulated in fp32 and rounded once.
    """
    if stride != 1:
        x = x[:, :, ::stride, ::stride]
    y = empty_map(x, weight.shape[0])
    pointwise(
        x, weight.flatten(1), fp32(scale), fp32(shift)[None], y,
        residual=residual, relu=act == "relu", config=config,
    )  # fmt: skip
    return y


def pointwise(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    y: Tensor,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    classifier: tuple[Tensor, Tensor] | None = None,
    config: GemmConfig | None = None,
) -> None:
    """Launch `conv_kernels.pointwise_kernel`; writes y.

    Args:
        x: [N, C, H, W], any strides.
        weight: [K, C' >= C], the dtype of x; of its columns the first C are used.
        scale: [K] fp32.
        shift: [1, K] fp32, or [N, K] for a shift of each image.
        y: [N, K, H, W] ([N, classes, H, W] with a classifier), channels next to each other.
        residual: [N, K, H, W], the dtype of x.
        relu: the activation.
        classifier: ([classes, K] in the dtype of x, [classes] fp32) of a second product.
        config: None for the choice of `rules.POINTWISE`.
    """
    n, channels, height, width = x.shape
    filters = weight.shape[0]
    if n == 0:
        return
    kernels = launch.device_module("conv_kernels")
    groups = shift.shape[0]
    group_rows = n * height * width // groups
    x = channels_inside(x)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    if residual is not None:
        residual = channels_inside(residual)
    classes, class_weight, class_bias = 0, None, None
    if classifier is not None:
        class_weight, class_bias = classifier
        class_weight = class_weight.contiguous()
        classes = class_weight.shape[0]
    flat_x, x_strides = pixel_strides(x)
    flat_y, y_strides = pixel_strides(y)
    flat_r, r_strides = pixel_strides(residual) if residual is not None else (True, (0, 0, 0))
    inner = [channels, weight.stride(0), *x_strides]
    vec_x = min(vector(x, *inner, *([filters] if classes else [])), vector(weight))
    vec_y = vector(y, *y_strides, *([] if classes else [filters]))
    vec_r = vector(x if residual is None else residual, *r_strides)
    if config is None:
        aligned = is_longest(x, vec_x, vec_x if classes else min(vec_y, vec_r))
        key = PointwiseKey(
            groups, group_rows, channels, filters, arithmetic(x), aligned,
            classes=classes > 0, residual=residual is not None,
        )  # fmt: skip
        config = choose(POINTWISE, key, launch.device_of(x))
    tiles_n = -(-filters // config.block_n)
    tiles_m = -(-group_rows // config.block_m)
    with launch.on_device(x):
        kernels.pointwise_kernel[grid(groups * tiles_m * tiles_n)](
            x, weight, scale, shift, residual, class_weight, class_bias, y,
            group_rows, height, width, channels // vec_x, filters // (vec_x if classes else vec_y),
            classes, tiles_n,
            *(s // vec_x for s in x_strides), weight.stride(0) // vec_x,
            shift.stride(0) if groups > 1 else 0,
            *(s // vec_r for s in r_strides), *(s // vec_y for s in y_strides),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_C=config.block_c,
            CLASSES=class_block(classes) if classes else 0,
            VEC_X=vec_x, VEC_Y=vec_y, VEC_R=vec_r, FLAT_X=flat_x, FLAT_Y=flat_y, FLAT_R=flat_r,
            EVEN_C=channels % config.block_c == 0, HAS_RESIDUAL=residual is not None, RELU=relu,
            PRECISION=precision(x),
            **launch_options(config),
        )  # fmt: skip


def class_block(classes: int) -> int:
    """Classes that a program scores at a time: what a matrix product takes, and registers hold
    beside a tile of 256 filters (with 256 at a time they spilled 624 bytes a thread)."""
    return min(max(_LEAST_CLASSES, 1 << (classes - 1).bit_length()), _MOST_CLASSES)
