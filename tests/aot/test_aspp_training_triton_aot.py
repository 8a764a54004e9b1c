"""Ahead-of-time compilation of the Triton kernels of the ASPP in training, without a GPU.

As in test_aspp_triton_aot.py: every configuration that a choice can fall on (before 9.0 the two
with most accumulators) must compile without spills, within the registers and the shared memory that
its occupancy assumes, to tensor-core instructions on operands copied asynchronously. Registers,
shared memory and instructions of the main loop are held against a recorded table, by Triton
version. After a change that means to alter them:

    DEEPLAB_FAST_RECORD_RESOURCES=1 pytest tests/aot/test_aspp_training_triton_aot.py
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import aot_gemm
import aot_harness
import pytest
from aot_gemm import DEVICES, OS8, OS16, Variant, other
from deeplab_fast.kernels import aspp_training_kernels

from deeplab_fast.plan.gemm import (
    FMA_FP32,
    MMA_16BIT,
    MMA_TF32,
    GemmConfig,
    aspp_dgrad_candidates,
    gemm_candidates,
)
from deeplab_fast.plan.rules import BranchesKey, branches_rule, dgrad_rule, wgrad_rule

pytestmark = pytest.mark.aot

TABLE = "aspp_training_triton_resources.json"
KERNELS = aot_harness.triton_kernels(aspp_training_kernels)
TABLES = {
    "classes_ptr", "lists_ptr", "steps_ptr", "pixels_ptr", "parts_ptr", "starts_ptr", "sums_ptr",
    "entries_ptr", "counts_ptr", "ranges_ptr", "channels_ptr",
}  # fmt: skip
OPERANDS = {"x_ptr", "weight_ptr", "y_ptr", "grad_ptr", "dx_ptr", "dw_ptr"}


def product(
    op: str,
    capability: int,
    config: GemmConfig,
    math: str = MMA_16BIT,
    dtype: str | None = None,
    vector: int | None = None,
    note: str = "",
    **changes: object,
) -> Variant:
    """The main kernel of an op ("convs", "dgrad", "wgrad")."""
    dtype = dtype or ("bf16" if math == MMA_16BIT else "fp32")
    vector = vector or (4 if dtype == "fp32" else 8)
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_C": config.block_c,
        "VEC_X": vector,
        "SPLIT": config.split,
        "PRECISION": "tf32" if math == MMA_TF32 else "ieee",
    }
    if op == "convs":
        constants |= {"VEC_Y": vector, "EVEN_C": vector > 1, "STATS": True}
    elif op == "dgrad":
        constants |= {"VEC_G": vector, "EVEN_K": vector > 1, "EVEN_C": vector > 1}
    else:
        constants |= {"VEC_G": vector, "WIDE": False}
    constants |= changes
    name = f"{op}-{math}-{config.block_m}x{config.block_n}" + ("-cut" if config.split else "")
    return Variant(
        name + note + ("-unaligned" if vector == 1 else ""),
        f"aspp_{op}_kernel",
        capability,
        dtype,
        config,
        constants,
        math,
        vector,
    )


def candidates(op: str, math: str, capability: int, aligned: bool = True) -> list[GemmConfig]:
    """The configurations without cuts."""
    make = aspp_dgrad_candidates if op == "dgrad" else gemm_candidates
    return [c for c in make(math, DEVICES[capability], None, aligned) if not c.split]


def variants() -> list[Variant]:
    found = []
    for op in ("convs", "dgrad", "wgrad"):
        # The code for whole tiles alone is a part of that for cut ones.
        found += [
            product(op, capability, replace(config, split=True))
            for capability in DEVICES
            for config in candidates(op, MMA_16BIT, capability)
        ]
        tf32 = replace(candidates(op, MMA_TF32, 90)[0], split=True)
        found.append(product(op, 90, tf32, MMA_TF32))
        odd = replace(candidates(op, MMA_16BIT, 90, False)[0], split=True)
        found.append(product(op, 90, odd, dtype="fp16", vector=1))
    fma = replace(candidates("wgrad", FMA_FP32, 90)[0], split=True)
    found.append(product("wgrad", 90, fma, FMA_FP32))
    largest = candidates("convs", MMA_16BIT, 90)[0]
    tile = {"BLOCK_M": largest.block_m, "BLOCK_N": largest.block_n}
    found += [
        product("convs", 90, largest, note="-no-stats", STATS=False),
        product("dgrad", 90, largest, note="-odd", EVEN_K=False, EVEN_C=False),
        product("wgrad", 90, largest, note="-wide", WIDE=True),
        other("convs-sum", "aspp_convs_sum_kernel", 90, **tile, COLS=32, VEC_Y=8, STATS=True),
        other("dgrad-sum", "aspp_dgrad_sum_kernel", 90, **tile, ROWS=16, VEC_X=8),
        other("wgrad-sum", "aspp_wgrad_sum_kernel", 90, **tile, ROWS=16, VEC_X=8),
        other("stats", "aspp_stats_kernel", 90, ENTRIES=64, COLS=16),
    ]
    return found


VARIANTS = variants()


def element_type(name: str, dtype: str) -> str:
    """Triton's type of a runtime argument."""
    if name in TABLES:
        return "*i32"
    if name in OPERANDS:
        return "*" + dtype
    return "*fp32" if name.endswith("_ptr") else "i32"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.key.replace(" ", "-"))
def test_resources(variant: Variant) -> None:
    compiled = aot_gemm.check(
        KERNELS[variant.kernel], variant, partial(element_type, dtype=variant.dtype), TABLE
    )
    if variant.math == MMA_16BIT and variant.vector > 1:
        aot_gemm.assert_operands_are_copied(compiled)
        # All stages are in flight: an operand that went through registers would have one.
        capability = DEVICES[variant.capability].capability
        assert compiled.resources["shared"] == variant.config.shared_bytes(2, capability)
    if variant.vector > 1 and variant.kernel != "aspp_stats_kernel":
        assert "st.global.v4" in compiled.ptx


class TestTable(aot_harness.TritonTests):
    table = TABLE
    kernels = KERNELS
    compiled = tuple(variant.kernel for variant in VARIANTS)
    keys = tuple(variant.key for variant in VARIANTS)


@pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90"])
def test_what_is_chosen_for_the_models_is_compiled_here(capability: int) -> None:
    device = DEVICES[capability]
    compiled = {
        (v.kernel, replace(v.config, split=False)) for v in VARIANTS if v.capability == capability
    }
    choices = {
        "aspp_convs_kernel": branches_rule,
        "aspp_dgrad_kernel": dgrad_rule,
        "aspp_wgrad_kernel": wgrad_rule,
    }
    few = tuple(replace(b, channels=48) for b in OS16)
    for side, rates in ((65, OS8), (33, OS16), (33, few)):
        for batch, channels in ((1, 2048), (8, 2048), (8, 64)):
            key = BranchesKey(batch, side, side, channels, rates, MMA_16BIT)
            for kernel, choose in choices.items():
                chosen = choose(key, device)
                assert (kernel, replace(chosen, split=False)) in compiled
