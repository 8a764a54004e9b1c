"""Ahead-of-time compilation of the Triton ASPP and 1x1 kernels, without a GPU.

Every configuration that a choice can fall on must compile without spills, within the registers and
the shared memory that let its thread blocks share a multiprocessor as `plan/gemm.py` says, to
tensor-core instructions on operands copied 16 bytes at a time. Registers, shared memory and
instructions of the main loop are held against a recorded table, by Triton version, because each
brings its own compiler. After a change that means to alter them:

    DEEPLAB_FAST_RECORD_RESOURCES=1 pytest tests/aot/test_aspp_triton_aot.py
"""

from __future__ import annotations

import inspect
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from deeplab_fast.plan.device import A100, H100, SHARED_RESERVE
from deeplab_fast.plan.gemm import FMA_FP32, MMA_16BIT, MMA_TF32, GemmConfig, gemm_candidates
from deeplab_fast.plan.rules import BranchesKey, PointwiseKey, branches_rule, pointwise_rule
from deeplab_fast.plan.taps import Branch
from deeplab_fast.testing import cubin_resources, nvidia_tool

pytestmark = pytest.mark.aot

TABLE = Path(__file__).with_name("aspp_triton_resources.json")
RECORD = os.environ.get("DEEPLAB_FAST_RECORD_RESOURCES") == "1"
DEVICES = {90: H100, 80: A100}
OS8 = (Branch(256, 1, 1), *(Branch(256, 3, d) for d in (12, 24, 36)))
OS16 = (Branch(256, 1, 1), *(Branch(256, 3, d) for d in (6, 12, 18)))


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as a launch makes it.

    Attributes:
        math: arithmetic of its main loop, None where it has none.
        vector: elements of an access.
    """

    id: str
    kernel: str
    capability: int
    dtype: str
    config: GemmConfig
    constants: tuple[tuple[str, object], ...]
    math: str | None
    vector: int

    @property
    def key(self) -> str:
        return f"{self.id} sm_{self.capability}"


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
        tuple(constants.items()),
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
        tuple(constants.items()), MMA_16BIT, 8,
    )  # fmt: skip


def other(name: str, kernel: str, capability: int, **constants) -> Variant:
    config = GemmConfig(16, 16, 16, 4, 3, 1)
    return Variant(name, kernel, capability, "bf16", config, tuple(constants.items()), None, 8)


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


@pytest.fixture(scope="module")
def kernels():
    # A missing Triton fails here: the test extra brings it.
    from deeplab_fast.kernels import aspp_kernels, conv_kernels

    return {
        name: kernel
        for module in (aspp_kernels, conv_kernels)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }


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


def compile_variant(kernel, variant: Variant):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    values = dict(variant.constants)
    assert set(values) <= set(names)
    signature = {
        name: "constexpr" if name in values else element_type(name, variant) for name in names
    }
    constants = {(names.index(name),): value for name, value in values.items()}
    # Tensors from torch's allocators are aligned to 16 bytes.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name.endswith("_ptr") and name not in values
    }
    options = {"num_warps": variant.config.num_warps, "num_stages": variant.config.num_stages}
    if variant.config.register_limit is not None:
        options["maxnreg"] = variant.config.register_limit
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", variant.capability, 32),
        options=options,
    )


def main_loop(cubin: Path) -> int:
    """Instructions of the innermost loop around a tensor-core instruction."""
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
        first = labels.get(branch[1], i) if branch else i
        if any("MMA" in inside for inside in instructions[first:i]):
            lengths.append(i + 1 - first)
    return min(lengths)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.key.replace(" ", "-"))
def test_resources(kernels, variant: Variant, tmp_path: Path) -> None:
    import triton

    compiled = compile_variant(kernels[variant.kernel], variant)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    used = cubin_resources(cubin.read_bytes())
    assert used["STACK"] == 0 and used["LOCAL"] == 0, f"{variant.key} spills: {used}"
    got = {"registers": used["REG"], "shared": compiled.metadata.shared}
    config, device = variant.config, DEVICES[variant.capability]
    ptx = compiled.asm["ptx"]
    if variant.math is not None:
        assert got["registers"] <= config.max_registers, got
        itemsize = 4 if variant.dtype == "fp32" else 2
        assert got["shared"] <= config.shared_bytes(itemsize, device.capability), got
        block = got["shared"] + SHARED_RESERVE
        assert block * config.occupancy <= device.shared, got
    if variant.math in (MMA_16BIT, MMA_TF32):
        assert ("wgmma.mma_async" in ptx) == (variant.capability == 90)
        assert ("mma.sync" in ptx) == (variant.capability == 80)
        got["loop"] = main_loop(cubin)
    elif variant.math == FMA_FP32:
        assert "mma" not in ptx
    if variant.math is not None and variant.vector > 1:
        copies = re.findall(r"cp\.async\.(c[ag])\.shared\.global \[.*?\], \[.*?\], (\w+)", ptx)
        assert copies and set(copies) == {("cg", "0x10")}
    if variant.vector > 1 and "CLASSES" not in dict(variant.constants):
        assert "st.global.v4" in ptx or variant.kernel == "image_shift_kernel"

    version = ".".join(triton.__version__.split(".")[:2])
    table = json.loads(TABLE.read_text("utf-8")) if TABLE.is_file() else {}
    if RECORD:
        table.setdefault(version, {})[variant.key] = got
        write_table(table)
    elif version in table:
        expected = table[version].get(variant.key)
        assert got == expected, (
            f"{variant.key} with Triton {version}: {got}, recorded {expected}. If that is meant, "
            "record it with DEEPLAB_FAST_RECORD_RESOURCES=1"
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
    keys = {variant.key for variant in VARIANTS}
    assert len(keys) == len(VARIANTS)
    # The versions beside torch 2.11 and the one that the tests run with.
    assert {"3.6", "3.7"} <= set(table)
    for rows in table.values():
        assert set(rows) == keys


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


def test_every_kernel_is_compiled_here(kernels) -> None:
    assert set(kernels) == {variant.kernel for variant in VARIANTS}


def test_arguments_that_are_not_specialised_exist(kernels) -> None:
    """A misspelt name would be specialised without a word."""
    for kernel in kernels.values():
        excluded = kernel.do_not_specialize
        assert excluded and set(excluded) <= set(kernel.arg_names)


def test_no_removed_api(kernels) -> None:
    for kernel in kernels.values():
        source = inspect.getsource(inspect.getmodule(kernel.fn))
        # Spelt in parts: a pre-commit hook forbids the name itself.
        assert "make_" + "block_ptr" not in source
        assert "libdevice" not in source
