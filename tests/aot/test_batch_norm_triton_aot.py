"""Ahead-of-time compilation of the Triton batch norm kernels for sm_80 and sm_90, without a GPU.

No kernel may spill, or need more registers than its configuration's share of a multiprocessor.
Maps must be read and written 16 bytes at a time, and loops over tiles must not pass anything
between threads: both depend on the layouts that Triton chooses. Registers, shared memory and the
instructions of the loops are held against a recorded table, by Triton version, because each brings
its own compiler. After a change that means to alter them:

    DEEPLAB_FAST_RECORD_RESOURCES=1 pytest tests/aot/test_batch_norm_triton_aot.py
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import aot_harness
import pytest
from deeplab_fast.kernels import batch_norm, batch_norm_kernels

from deeplab_fast.plan.batch_norm import BatchNormConfig, batch_norm_config
from deeplab_fast.plan.device import A100, H100

pytestmark = pytest.mark.aot

TABLE = "batch_norm_triton_resources.json"
KERNELS = aot_harness.triton_kernels(batch_norm_kernels)
DEVICES = {80: A100, 90: H100}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
# Output of the first stage of ResNet-50 at 513x513, batch 16; and a map that nothing divides.
LARGE = (16 * 129 * 129, 256)
ODD = (2 * 21 * 13, 321)
REDUCING = ("batch_stats_kernel", "bn_act_reduce_kernel")


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as a launch makes it.

    Attributes:
        dtype: of maps.
        maps: maps that are read, 0 for kernels that combine partials.
        written: maps that are written.
        shape: (pixels, channels).
        vector: channels that a thread reads at a time.
        constants: constexpr arguments beside those of the configuration, and pointers to nothing.
    """

    id: str
    kernel: str
    dtype: str
    maps: int
    written: int
    shape: tuple[int, int]
    vector: int
    constants: dict

    @property
    def reduces(self) -> bool:
        return self.kernel in REDUCING

    def config(self, capability: int) -> BatchNormConfig:
        return batch_norm_config(
            *self.shape, self.maps, self.vector, ITEMSIZE[self.dtype], DEVICES[capability],
            self.reduces,
        )  # fmt: skip

    def options(self, capability: int) -> dict:
        """Constants and launch options that come from the configuration."""
        if not self.maps:
            return batch_norm._combining_options(self.shape[0])
        config = self.config(capability)
        rows = {"ROWS": config.rows, "LANES": config.lanes}
        return {
            **(rows if self.reduces else {"BLOCK_P": config.block_p}),
            "BLOCK_C": config.block_c,
            "VEC": self.vector,
            "num_warps": config.num_warps,
            "num_stages": 1,
        }


def stats(id: str, dtype: str, vector: int, shape=LARGE) -> Variant:
    return Variant(f"stats-{id}", "batch_stats_kernel", dtype, 1, 0, shape, vector, {})


def combine(id: str, kernel: str, chunks: int, **constants: object) -> Variant:
    return Variant(id, kernel, "fp32", 0, 0, (chunks, 256), 1, constants)


def updating(updates: bool, counts: bool, cumulative: bool) -> dict[str, object]:
    """Constants of the kernel that updates running statistics, or does not."""
    absent = {} if updates else dict.fromkeys(("running_mean_ptr", "running_var_ptr"))
    if not (counts or cumulative):
        absent["batches_ptr"] = None
    return {"UPDATES": updates, "COUNTS": counts, "CUMULATIVE": cumulative, **absent}


def forward(id: str, dtype: str, vector: int, act: str, residual=False, shape=LARGE) -> Variant:
    constants = {"HAS_RESIDUAL": residual, "ACT": act}
    if not residual:
        constants["residual_ptr"] = None
    maps = 1 + residual
    return Variant(f"act-{id}", "bn_act_kernel", dtype, maps, 1, shape, vector, constants)


def reduce(id: str, dtype: str, vector: int, act: str, out=False, shape=LARGE) -> Variant:
    constants = {"HAS_OUT": out, "ACT": act, **({} if out else {"out_ptr": None})}
    maps = 2 + out
    return Variant(f"reduce-{id}", "bn_act_reduce_kernel", dtype, maps, 0, shape, vector, constants)


def backward(
    id: str, dtype: str, vector: int, act: str, out=False, means=True, to_residual=False,
    shape=LARGE,
) -> Variant:  # fmt: skip
    constants = {"HAS_OUT": out, "HAS_MEANS": means, "TO_RESIDUAL": to_residual, "ACT": act}
    reads_x = means or (act != "none" and not out)
    absent = {
        "x_ptr": reads_x,
        "out_ptr": out,
        "mean_grad_ptr": means,
        "mean_grad_xhat_ptr": means,
        "residual_grad_ptr": to_residual,
    }
    constants |= {name: None for name, given in absent.items() if not given}
    return Variant(
        f"backward-{id}", "bn_act_backward_kernel", dtype, 1 + reads_x + out, 1 + to_residual,
        shape, vector, constants,
    )  # fmt: skip


VARIANTS = [
    stats("bf16", "bf16", 8),
    stats("fp32", "fp32", 4),
    stats("fp16-unaligned", "fp16", 1, ODD),
    combine("stats-combine", "stats_combine_kernel", 700, **updating(False, False, False)),
    combine("stats-combine-counts", "stats_combine_kernel", 700, **updating(True, True, False)),
    combine("stats-combine-mean", "stats_combine_kernel", 700, **updating(True, False, True)),
    forward("bf16-residual-relu", "bf16", 8, "relu", residual=True),
    forward("fp32-hardswish", "fp32", 4, "hardswish"),
    forward("fp16-residual-relu6-unaligned", "fp16", 1, "relu6", True, ODD),
    reduce("bf16-relu", "bf16", 8, "relu"),
    reduce("bf16-relu-out", "bf16", 8, "relu", out=True),
    reduce("fp32-hardswish", "fp32", 4, "hardswish"),
    reduce("fp16-relu6-out-unaligned", "fp16", 1, "relu6", True, ODD),
    combine("sums-combine", "sums_combine_kernel", 700),
    backward("bf16-relu", "bf16", 8, "relu"),
    backward("bf16-relu-out-residual", "bf16", 8, "relu", out=True, to_residual=True),
    backward("bf16-constants-relu-out", "bf16", 8, "relu", out=True, means=False),
    backward("fp32-hardswish", "fp32", 4, "hardswish"),
    backward("fp16-none-unaligned", "fp16", 1, "none", shape=ODD),
]


def element_type(name: str, variant: Variant) -> str:
    """Triton's type of a runtime argument."""
    maps = ("x_ptr", "residual_ptr", "y_ptr", "grad_ptr", "out_ptr", "dx_ptr", "residual_grad_ptr")
    if name in maps:
        return "*" + variant.dtype
    if name == "batches_ptr":
        return "*i64"
    numbers = ("eps", "share", "kept", "per_value")
    return "*fp32" if name.endswith("_ptr") else "fp32" if name in numbers else "i32"


def whole_accesses(ptx: str, kind: str) -> int:
    """Loads ("ld") or stores ("st") of 16 bytes; of four words, however they are written."""
    return len(re.findall(rf"{kind}\.global(?:\.\w+)*?\.v4\.\w?32", ptx))


@pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.id)
def test_resources(variant: Variant, capability: int) -> None:
    constants = variant.constants | variant.options(capability)
    launch = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    compiled = aot_harness.compile_triton(
        KERNELS[variant.kernel],
        capability,
        constants,
        partial(element_type, variant=variant),
        launch,
    )
    got = dict(compiled.resources)
    if variant.maps:
        config = variant.config(capability)
        assert got["registers"] <= config.max_registers, got
        if variant.vector > 1:
            # One for each pixel and map of a thread; vectors of factors come on top.
            assert whole_accesses(compiled.ptx, "ld") >= config.rows * variant.maps
            assert whole_accesses(compiled.ptx, "st") >= config.rows * variant.written
    if variant.reduces:
        # That over tiles.
        loop = max(compiled.loops, key=len)
        assert not [i for i in loop if re.search(r"\b(BAR|SHFL|STS|LDS|LDSM|STSM)\b", i)]
        got["loop"] = len(loop)
    aot_harness.assert_recorded(TABLE, f"{variant.id} sm_{capability}", got)


class TestTable(aot_harness.TritonTests):
    table = TABLE
    kernels = KERNELS
    compiled = tuple(variant.kernel for variant in VARIANTS)
    keys = tuple(f"{variant.id} sm_{capability}" for variant in VARIANTS for capability in (80, 90))

    def test_arguments_that_are_not_specialised_exist(self) -> None:
        super().test_arguments_that_are_not_specialised_exist()
        for kernel in KERNELS.values():
            names = {n for n in kernel.arg_names if n.islower() and not n.endswith("_ptr")}
            assert set(kernel.do_not_specialize) == names
