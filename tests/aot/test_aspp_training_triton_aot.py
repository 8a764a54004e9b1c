"""Ahead-of-time compilation of the Triton kernels of the ASPP in training, without a GPU.

As in test_aspp_triton_aot.py: every configuration that a choice can fall on (before 9.0 the two
with most accumulators) must compile without spills, within the registers and the shared memory that
its occupancy assumes, to tensor-core instructions on operands copied asynchronously. Registers,
shared memory and instructions of the main loop are held against a recorded table, by Triton
version. After a change that means to alter them:

    DEEPLAB_FAST_RECORD_RESOURCES=1 pytest tests/aot/test_aspp_training_triton_aot.py
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from deeplab_fast.plan.device import A100, H100, SHARED_RESERVE
from deeplab_fast.plan.gemm import (
    FMA_FP32,
    MMA_16BIT,
    MMA_TF32,
    GemmConfig,
    aspp_dgrad_candidates,
    gemm_candidates,
)
from deeplab_fast.plan.rules import BranchesKey, branches_rule, dgrad_rule, wgrad_rule
from deeplab_fast.plan.taps import Branch
from deeplab_fast.testing import cubin_resources

pytestmark = pytest.mark.aot

# The tools that read a compiled kernel.
if "aspp_triton_aot" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "aspp_triton_aot", Path(__file__).with_name("test_aspp_triton_aot.py")
    )
    sys.modules["aspp_triton_aot"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["aspp_triton_aot"])
inference = sys.modules["aspp_triton_aot"]

TABLE = Path(__file__).with_name("aspp_training_triton_resources.json")
RECORD = os.environ.get("DEEPLAB_FAST_RECORD_RESOURCES") == "1"
DEVICES = {90: H100, 80: A100}
OS8 = (Branch(256, 1, 1), *(Branch(256, 3, d) for d in (12, 24, 36)))
OS16 = (Branch(256, 1, 1), *(Branch(256, 3, d) for d in (6, 12, 18)))
TABLES = {
    "classes_ptr", "lists_ptr", "steps_ptr", "pixels_ptr", "parts_ptr", "starts_ptr", "sums_ptr",
    "entries_ptr", "counts_ptr", "ranges_ptr", "channels_ptr",
}  # fmt: skip
OPERANDS = {"x_ptr", "weight_ptr", "y_ptr", "grad_ptr", "dx_ptr", "dw_ptr"}


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
        tuple(constants.items()),
        math,
        vector,
    )


def candidates(op: str, math: str, capability: int, aligned: bool = True) -> list[GemmConfig]:
    """The configurations without cuts."""
    make = aspp_dgrad_candidates if op == "dgrad" else gemm_candidates
    return [c for c in make(math, DEVICES[capability], None, aligned) if not c.split]


def other(name: str, kernel: str, capability: int, **constants: object) -> Variant:
    config = GemmConfig(16, 16, 16, 4, 3, 1)
    return Variant(name, kernel, capability, "bf16", config, tuple(constants.items()), None, 8)


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


@pytest.fixture(scope="module")
def kernels():
    # A missing Triton fails here: the test extra brings it.
    from deeplab_fast.kernels import aspp_training_kernels

    return {
        name: kernel
        for name, kernel in vars(aspp_training_kernels).items()
        if name.endswith("_kernel")
    }


def element_type(name: str, dtype: str) -> str:
    """Triton's type of a runtime argument."""
    if name in TABLES:
        return "*i32"
    if name in OPERANDS:
        return "*" + dtype
    return "*fp32" if name.endswith("_ptr") else "i32"


def compile_variant(kernel, variant: Variant):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    values = dict(variant.constants)
    assert set(values) <= set(names)
    signature = {
        name: "constexpr" if name in values else element_type(name, variant.dtype)
        for name in names
    }  # fmt: skip
    # Tensors from torch's allocators, and tables, are aligned to 16 bytes.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name.endswith("_ptr") and name not in values
    }
    options = {"num_warps": variant.config.num_warps, "num_stages": variant.config.num_stages}
    if variant.config.register_limit is not None:
        options["maxnreg"] = variant.config.register_limit
    constants = {(names.index(name),): value for name, value in values.items()}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", variant.capability, 32),
        options=options,
    )


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
        got["loop"] = inference.main_loop(cubin)
    elif variant.math == FMA_FP32:
        assert "mma" not in ptx
    if variant.math == MMA_16BIT and variant.vector > 1:
        copies = re.findall(r"cp\.async\.(c[ag])\.shared\.global \[.*?\], \[.*?\], (\w+)", ptx)
        assert copies and set(copies) == {("cg", "0x10")}
        # All stages are in flight: an operand that went through registers would have one.
        assert got["shared"] == config.shared_bytes(2, device.capability)
    if variant.vector > 1 and variant.kernel != "aspp_stats_kernel":
        assert "st.global.v4" in ptx

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
