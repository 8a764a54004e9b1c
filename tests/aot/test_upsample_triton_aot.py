"""Ahead-of-time compilation of the Triton upsampling kernels for sm_80 and sm_90, without a GPU.

No kernel may spill. Registers, shared memory and the instructions of the loops over classes (which
the cost model in kernels/upsample_kernels.py rests on) are held against a recorded table, by Triton
version, because each brings its own compiler. After a change that means to alter them:

    DEEPLAB_FAST_RECORD_RESOURCES=1 pytest tests/aot/test_upsample_triton_aot.py
"""

from __future__ import annotations

import inspect
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deeplab_fast.testing import cubin_resources, nvidia_tool

pytestmark = pytest.mark.aot

TABLE = Path(__file__).with_name("upsample_triton_resources.json")
RECORD = os.environ.get("DEEPLAB_FAST_RECORD_RESOURCES") == "1"
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


@pytest.fixture(scope="module")
def kernels():
    # A missing Triton fails here: the test extra brings it.
    from deeplab_fast.kernels import upsample_kernels

    return upsample_kernels


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


def compile_variant(kernels, variant: Variant, capability: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, variant.kernel)
    names = kernel.arg_names
    assert set(variant.constants) | set(variant.aligned) <= set(names)
    signature = {
        name: "constexpr" if name in variant.constants else element_type(name, variant)
        for name in names
    }
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    # Tensors from torch's allocators are aligned to 16 bytes.
    divisible = [
        i
        for i, name in enumerate(names)
        if name not in variant.constants and (name.endswith("_ptr") or name in variant.aligned)
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.num_warps, "num_stages": 1},
    )


def loop_lengths(cubin: Path) -> list[int]:
    """Instructions of each loop, in the order of the code: what lies between a backward branch and
    its target."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in nvidia_tool("nvdisasm", "-c", str(cubin)).splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    lengths = []
    for i, instruction in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        # The last branch, to itself, only fills the code.
        if branch and labels.get(branch[1], i) < i:
            lengths.append(i + 1 - labels[branch[1]])
    return lengths


@pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.id)
def test_resources(kernels, variant: Variant, capability: int, tmp_path: Path) -> None:
    import triton

    compiled = compile_variant(kernels, variant, capability)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    used = cubin_resources(cubin.read_bytes())
    assert used["STACK"] == 0 and used["LOCAL"] == 0, f"{variant.id} spills: {used}"
    got = {"registers": used["REG"], "shared": compiled.metadata.shared}
    if variant.loops:
        got["class_loops"] = loop_lengths(cubin)
        assert got["class_loops"], "no loop over classes was found"
        assert max(got["class_loops"]) <= LOOP_BUDGET, got
    assert got["registers"] <= REGISTER_BUDGET, got

    version = ".".join(triton.__version__.split(".")[:2])
    key = f"{variant.id} sm_{capability}"
    table = json.loads(TABLE.read_text("utf-8")) if TABLE.is_file() else {}
    if RECORD:
        table.setdefault(version, {})[key] = got
        write_table(table)
    elif version in table:
        expected = table[version].get(key)
        assert got == expected, (
            f"{key} with Triton {version}: {got}, recorded {expected}. If that is meant, record it "
            "with DEEPLAB_FAST_RECORD_RESOURCES=1"
        )


def write_table(table: dict) -> None:
    lines = []
    for version, rows in sorted(table.items()):
        body = ",\n".join(f"    {json.dumps(k)}: {json.dumps(rows[k])}" for k in sorted(rows))
        lines.append(f'  "{version}": {{\n{body}\n  }}')
    temporary = TABLE.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    os.replace(temporary, TABLE)


def test_the_table_holds_what_is_compiled() -> None:
    table = json.loads(TABLE.read_text("utf-8"))
    keys = {f"{v.id} sm_{c}" for v in VARIANTS for c in (80, 90)}
    # The versions beside torch 2.11 and the one that the tests run with.
    assert {"3.6", "3.7"} <= set(table)
    for rows in table.values():
        assert set(rows) == keys


def test_every_kernel_is_compiled_here(kernels) -> None:
    launched = {name for name in vars(kernels) if name.endswith("_kernel")}
    assert launched == {variant.kernel for variant in VARIANTS}


def test_arguments_that_are_not_specialised_exist(kernels) -> None:
    """A misspelt name would be specialised without a word."""
    for name in {variant.kernel for variant in VARIANTS}:
        kernel = getattr(kernels, name)
        excluded = kernel.do_not_specialize
        assert excluded and set(excluded) <= set(kernel.arg_names)


def test_no_removed_api(kernels) -> None:
    source = inspect.getsource(kernels)
    # Spelt in parts: a pre-commit hook forbids the name itself.
    assert "make_" + "block_ptr" not in source
    assert "libdevice" not in source
