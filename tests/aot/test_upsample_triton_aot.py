"""Ahead-of-time compilation of the Triton upsampling kernels for sm_80 and sm_90, without a GPU.

No kernel may spill. Registers, shared memory and the instructions of the loops over classes (which
the cost model in kernels/upsample_kernels.py rests on) are held against a recorded table, by Triton
version, because each brings its own compiler. After a change that means to alter them:

    DEEPLAB_FAST_RECORD_RESOURCES=1 pytest tests/aot/test_upsample_triton_aot.py
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import aot_harness
import pytest
from deeplab_fast.kernels import upsample_kernels

pytestmark = pytest.mark.aot

TABLE = "upsample_triton_resources.json"
KERNELS = aot_harness.triton_kernels(upsample_kernels)
# Leaves 12 warps to an SM, three for each scheduler. Class weights with label smoothing need it;
# everything else stays within 128.
REGISTER_BUDGET = 168
# A class loop that moves tiles through shared memory needs several times its instructions.
LOOP_BUDGET = 200

UP8 = {"ROWS": 8, "COLS": 64}
FORWARD = {"BLOCK_COLS": 64, "WITH_GRAD": False, "PIXEL_GRAD": False, "pixel_grad_ptr": None}
GRADIENT = {"BLOCK_COLS": 8, "WITH_GRAD": True, "LOSS_MAP": False, "loss_ptr": None}
PLAIN = {"HAS_WEIGHT": False, "SMOOTH": False, "weight_ptr": None}
WEIGHTED = {"HAS_WEIGHT": True, "SMOOTH": True}
# Contiguous label maps: the stride of a column is 1, which Triton makes a constant.
LABELS = {"stride_tw": 1}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as a launch makes it.

    Attributes:
        constants: constexpr arguments, and runtime arguments that a launch specialises to them.
        logits, target, labels: element types of these pointers.
        aligned: integer arguments that are multiples of 16, as for a 512x512 output.
    """

    id: str
    kernel: str
    constants: dict
    num_warps: int
    logits: str = "fp32"
    target: str = "i64"
    labels: str = "u8"
    aligned: tuple[str, ...] = ()
    loops: bool = True
    pointers: dict = field(default_factory=dict)


VARIANTS = [
    Variant("argmax-fp32-513", "upsample_argmax_kernel",
            {**UP8, "WITH_PROB": False, "prob_ptr": None}, 2),
    Variant("argmax-prob-bf16-512", "upsample_argmax_kernel",
            {**UP8, "COLS": 128, "WITH_PROB": True}, 4, "bf16", aligned=("out_rows", "out_cols")),
    Variant("argmax-int64-fp16-1row", "upsample_argmax_kernel",
            {"ROWS": 1, "COLS": 32, "WITH_PROB": True}, 1, "fp16", labels="i64"),
    Variant("confusion-int64-fp32-513", "upsample_confusion_kernel", {**UP8, **LABELS}, 2),
    Variant("confusion-uint8-bf16-512", "upsample_confusion_kernel", {**UP8, **LABELS}, 2,
            "bf16", "u8", aligned=("out_cols", "stride_tn", "stride_th")),
    Variant("softmax-add-fp32-nchw-513", "upsample_softmax_add_kernel",
            {**UP8, "FLIP": True, "stride_aw": 1}, 2),
    Variant("softmax-add-bf16-channels-last", "upsample_softmax_add_kernel",
            {**UP8, "FLIP": False, "stride_ac": 1}, 2, "bf16"),
    Variant("loss-mean-bf16-513", "upsample_cross_entropy_kernel",
            {**UP8, **FORWARD, **PLAIN, **LABELS, "LOSS_MAP": False, "loss_ptr": None}, 2, "bf16"),
    Variant("loss-map-weighted-fp32-512", "upsample_cross_entropy_kernel",
            {**UP8, **FORWARD, **WEIGHTED, **LABELS, "LOSS_MAP": True}, 2,
            aligned=("out_rows", "out_cols", "stride_tn", "stride_th")),
    Variant("loss-grad-fp32-513", "upsample_cross_entropy_kernel",
            {**UP8, **GRADIENT, **PLAIN, **LABELS, "PIXEL_GRAD": False, "pixel_grad_ptr": None}, 2),
    Variant("loss-grad-bf16-uint8-by-16", "upsample_cross_entropy_kernel",
            {**UP8, **GRADIENT, **PLAIN, **LABELS, "BLOCK_COLS": 16, "PIXEL_GRAD": False,
             "pixel_grad_ptr": None}, 2, "bf16", "u8"),
    Variant("loss-grad-weighted-fp32-1warp", "upsample_cross_entropy_kernel",
            {**UP8, **GRADIENT, **WEIGHTED, **LABELS, "COLS": 32, "PIXEL_GRAD": False,
             "pixel_grad_ptr": None}, 1),
    Variant("loss-pixel-grad-weighted-fp16-512", "upsample_cross_entropy_kernel",
            {**UP8, **GRADIENT, **WEIGHTED, **LABELS, "COLS": 128, "PIXEL_GRAD": True,
             "stride_gw": 1}, 4, "fp16", aligned=("out_cols", "stride_tn", "stride_th",
                                                  "stride_gn", "stride_gh")),
    Variant("loss-grad-fp32-by-4", "upsample_cross_entropy_kernel",
            {**UP8, **GRADIENT, **PLAIN, **LABELS, "ROWS": 4, "BLOCK_COLS": 4, "PIXEL_GRAD": False,
             "pixel_grad_ptr": None}, 2, target="i32"),
    Variant("gather-bf16", "gradient_gather_kernel",
            {"CLASSES": 8, "COLS": 64, "HAS_FACTOR": True}, 4, "bf16", loops=False),
    Variant("gather-fp32-no-factor", "gradient_gather_kernel",
            {"CLASSES": 8, "COLS": 64, "HAS_FACTOR": False, "factor_ptr": None}, 4, loops=False),
    Variant("finish-mean", "cross_entropy_finish_kernel",
            {"MEAN": True, "HAS_GRAD": True, "BLOCK": 1024}, 8, loops=False,
            pointers={"grad_ptr": "*fp32", "bad_ptr": "*i64"}),
    Variant("finish-sum", "cross_entropy_finish_kernel",
            {"MEAN": False, "HAS_GRAD": False, "BLOCK": 1024, "grad_ptr": None}, 8, loops=False,
            pointers={"bad_ptr": "*i64"}),
]  # fmt: skip


def element_type(name: str, variant: Variant) -> str:
    """Triton's type of a runtime argument."""
    pointers = {
        "logits_ptr": "*" + variant.logits,
        "target_ptr": "*" + variant.target,
        "labels_ptr": "*" + variant.labels,
        # The gradient of gradient_gather_kernel.
        "grad_ptr": "*" + variant.logits,
        "tables_ptr": "*i32",
        "counts_ptr": "*i32",
        "bad_ptr": "*i32",
        **variant.pointers,
    }
    if name in pointers:
        return pointers[name]
    if name.endswith("_ptr"):
        index = name.startswith(("row_", "col_")) and not name.endswith("lam_ptr")
        return "*i32" if index else "*fp32"
    return "fp32" if name == "smoothing" else "i32"


@pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.id)
def test_resources(variant: Variant, capability: int) -> None:
    options = {"num_warps": variant.num_warps, "num_stages": 1}
    compiled = aot_harness.compile_triton(
        KERNELS[variant.kernel],
        capability,
        variant.constants,
        partial(element_type, variant=variant),
        options,
        variant.aligned,
    )
    got = dict(compiled.resources)
    if variant.loops:
        got["class_loops"] = [len(loop) for loop in compiled.loops]
        assert got["class_loops"], "no loop over classes was found"
        assert max(got["class_loops"]) <= LOOP_BUDGET, got
    assert got["registers"] <= REGISTER_BUDGET, got
    aot_harness.assert_recorded(TABLE, f"{variant.id} sm_{capability}", got)


class TestTable(aot_harness.TritonTests):
    table = TABLE
    kernels = KERNELS
    compiled = tuple(variant.kernel for variant in VARIANTS)
    keys = tuple(f"{variant.id} sm_{capability}" for variant in VARIANTS for capability in (80, 90))
