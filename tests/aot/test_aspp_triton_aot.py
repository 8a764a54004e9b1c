"""Ahead-of-time compilation of the Triton ASPP and 1x1 kernels, without a GPU.

Every configuration that a choice can fall on must compile without spills, within the registers and
the shared memory that let its thread blocks share a multiprocessor as `plan/gemm.py` says, to
tensor-core instructions on operands copied 16 bytes at a time. Registers, shared memory and
instructions of the main loop are held against a recorded table, by Triton version, because each
brings its own compiler. After a change that means to alter them:

    DEEPLAB_FAST_RECORD_RESOURCES=1 pytest tests/aot/test_aspp_triton_aot.py
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import aot_gemm
import aot_harness
import pytest
from aot_gemm import DEVICES, OS8, OS16, Variant, other
from deeplab_fast.kernels import aspp_kernels, conv_kernels

from deeplab_fast.plan.device import H100
from deeplab_fast.plan.gemm import FMA_FP32, MMA_16BIT, MMA_TF32, GemmConfig, gemm_candidates
from deeplab_fast.plan.rules import BranchesKey, PointwiseKey, branches_rule, pointwise_rule

pytestmark = pytest.mark.aot

TABLE = "aspp_triton_resources.json"
KERNELS = aot_harness.triton_kernels(aspp_kernels, conv_kernels)


def size(config: GemmConfig) -> str:
    return f"{config.block_m}x{config.block_n}"


def branches(
    capability: int,
    config: GemmConfig,
    dtype: str = "bf16",
    math: str = MMA_16BIT,
    vector: int | None = None,
) -> Variant:
    vector = vector or (4 if dtype == "fp32" else 8)
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_C": config.block_c,
        "VEC_X": vector,
        "VEC_Y": vector,
        "EVEN_C": vector > 1,
        "SPLIT": config.split,
        "PRECISION": "tf32" if math == MMA_TF32 else "ieee",
    }
    name = f"branches-{math}-{size(config)}" + ("-cut" if config.split else "")
    name += "-unaligned" if vector == 1 else ""
    return Variant(
        name,
        "aspp_branches_kernel",
        capability,
        dtype,
        config,
        constants,
        math,
        vector,
    )


def pointwise(
    capability: int, config: GemmConfig, name: str, classes: int = 0, **changes
) -> Variant:
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_C": config.block_c,
        "CLASSES": classes,
        "VEC_X": 8,
        "VEC_Y": 1 if classes else 8,
        "VEC_R": 8,
        "FLAT_X": True,
        "FLAT_Y": True,
        "FLAT_R": True,
        "EVEN_C": True,
        "HAS_RESIDUAL": False,
        "RELU": True,
        "PRECISION": "ieee",
    } | changes
    if not constants["HAS_RESIDUAL"]:
        constants["residual_ptr"] = None
    if not classes:
        constants |= {"class_weight_ptr": None, "class_bias_ptr": None}
    return Variant(
        f"{name}-{size(config)}", "pointwise_kernel", capability, "bf16", config,
        constants, MMA_16BIT, 8,
    )  # fmt: skip


def variants() -> list[Variant]:
    found = []
    for capability, device in DEVICES.items():
        largest = gemm_candidates(MMA_16BIT, device)[0]
        # The code for whole tiles alone is a part of that for cut ones: compiled for one size.
        found.append(branches(capability, largest))
        for config in gemm_candidates(MMA_16BIT, device):
            found.append(branches(capability, replace(config, split=True)))
        tf32 = replace(gemm_candidates(MMA_TF32, device)[0], split=True)
        found.append(branches(capability, tf32, "fp32", MMA_TF32))
        odd = replace(gemm_candidates(MMA_16BIT, device, aligned=False)[0], split=True)
        found.append(branches(capability, odd, "fp16", vector=1))
        project = {pointwise_rule(PointwiseKey(*shape, MMA_16BIT), device) for shape in PROJECTIONS}
        found += [pointwise(capability, config, "project") for config in sorted(project, key=str)]
        key = PointwiseKey(16, 4225, 1024, 256, MMA_16BIT, classes=True)
        classify = pointwise_rule(key, device)
        found.append(pointwise(capability, classify, "classify", 32))
        tile = {"BLOCK_M": largest.block_m, "BLOCK_N": largest.block_n}
        found.append(other("sum", "aspp_sum_kernel", capability, **tile, ROWS=16, VEC_Y=8))
    strided = {"FLAT_X": False, "FLAT_R": False, "HAS_RESIDUAL": True, "RELU": False}
    found.append(pointwise(90, gemm_candidates(MMA_16BIT, H100)[0], "strided", **strided))
    fma = replace(gemm_candidates(FMA_FP32, H100)[0], split=True)
    found.append(branches(90, fma, "fp32", FMA_FP32))
    found.append(other("image-shift", "image_shift_kernel", 90, BLOCK_K=16, BLOCK_P=128))
    return found


# Projection of 1024 to 256 channels: images, pixels, channels, filters.
PROJECTIONS = [(n, side * side, 1024, 256) for side in (65, 33) for n in (1, 16)]
VARIANTS = variants()


def element_type(name: str, variant: Variant) -> str:
    """Triton's type of a runtime argument."""
    tables = ("classes_ptr", "parts_ptr", "starts_ptr", "sums_ptr")
    operands = (
        "x_ptr", "weight_ptr", "y_ptr", "residual_ptr", "class_weight_ptr", "pooled_ptr",
    )  # fmt: skip
    if name in tables:
        return "*i32"
    if name in operands:
        return "*" + variant.dtype
    return "*fp32" if name.endswith("_ptr") else "i32"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.key.replace(" ", "-"))
def test_resources(variant: Variant) -> None:
    compiled = aot_gemm.check(
        KERNELS[variant.kernel], variant, partial(element_type, variant=variant), TABLE
    )
    if variant.math is not None and variant.vector > 1:
        aot_gemm.assert_operands_are_copied(compiled)
    if variant.vector > 1 and "CLASSES" not in variant.constants:
        assert "st.global.v4" in compiled.ptx or variant.kernel == "image_shift_kernel"


class TestTable(aot_harness.TritonTests):
    table = TABLE
    kernels = KERNELS
    compiled = tuple(variant.kernel for variant in VARIANTS)
    keys = tuple(variant.key for variant in VARIANTS)


@pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90"])
def test_what_is_chosen_for_the_models_is_compiled_here(capability: int) -> None:
    device = DEVICES[capability]
    compiled = {(v.kernel, v.config) for v in VARIANTS if v.capability == capability}
    for side, rates in ((65, OS8), (33, OS16)):
        for batch in (1, 16):
            shape = (batch, side, side)
            chosen = branches_rule(BranchesKey(*shape, 2048, rates, MMA_16BIT), device)
            assert ("aspp_branches_kernel", chosen) in compiled
            key = PointwiseKey(batch, side**2, 1024, 256, MMA_16BIT)
            chosen = pointwise_rule(key, device)
            assert ("pointwise_kernel", chosen) in compiled
