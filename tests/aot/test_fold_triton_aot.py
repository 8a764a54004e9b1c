"""The Triton kernel of fold_filters, compiled ahead of time for sm_80 and sm_90, without a GPU.

It may not spill. Filters that lie as their results must be read 16 bytes at a time, and as many
thread blocks as plan/fold.py counts on must find registers: both depend on the layouts that Triton
chooses. Registers, shared memory and the instructions of the loop over taps are held against a
recorded table, by Triton version, because each brings its own compiler. After a change that means
to alter them:

    DEEPLAB_FAST_RECORD_RESOURCES=1 pytest tests/aot/test_fold_triton_aot.py
"""

from __future__ import annotations

import re
from typing import NamedTuple

import aot_harness
import pytest
from deeplab_fast.kernels import fold as launcher
from deeplab_fast.kernels import fold_kernels

from deeplab_fast.plan import fold

pytestmark = pytest.mark.aot

TABLE = "fold_triton_resources.json"
KERNELS = aot_harness.triton_kernels(fold_kernels)
NAME = "fold_filters_kernel"
CAPABILITIES = (80, 90)
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


class Variant(NamedTuple):
    """A specialisation.

    Attributes:
        given, result: dtypes of the filters and of the results.
        blocks: thread blocks that must find registers on a multiprocessor.
    """

    given: str
    result: str
    blocks: int = 12

    @property
    def id(self) -> str:
        return f"{self.given}-to-{self.result}"


VARIANTS = [
    Variant("bf16", "bf16"),
    Variant("fp16", "fp16"),
    Variant("fp32", "bf16"),
    Variant("fp32", "fp16"),
    Variant("fp32", "fp32"),
    # Results twice as wide as a vector of filters pass through shared memory.
    Variant("fp16", "fp32", blocks=10),
]


def accesses(ptx: str, kind: str, words: int) -> int:
    """Loads ("ld") or stores ("st") of so many words."""
    return len(re.findall(rf"{kind}\.global(?:\.\w+)*?\.v{words}\.\w?32", ptx))


@pytest.mark.parametrize("capability", CAPABILITIES, ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.id)
def test_resources(variant: Variant, capability: int) -> None:
    types = {
        "layers_ptr": "*i64", "tiles_ptr": "*i32", "weight_ptr": f"*{variant.given}",
        "scale_ptr": "*fp32", "y_ptr": f"*{variant.result}",
    }  # fmt: skip
    itemsize = ITEMSIZE[variant.given]
    threads = 32 * launcher.NUM_WARPS
    compiled = aot_harness.compile_triton(
        KERNELS[NAME],
        capability,
        launcher.constants(itemsize),
        types.__getitem__,
        {"num_warps": launcher.NUM_WARPS, "num_stages": 1},
    )
    vectors = fold.VECTORS // threads
    assert accesses(compiled.ptx, "ld", 4) == vectors
    words = 4 * ITEMSIZE[variant.result] // itemsize
    assert accesses(compiled.ptx, "st", min(words, 4)) == vectors * max(words // 4, 1)
    block = aot_harness.registers_of_block(compiled.resources["registers"], threads)
    assert variant.blocks * block <= aot_harness.REGISTERS
    # Taps: unrolled, and one by one.
    loops = sorted(map(len, compiled.loops))
    got = {**compiled.resources, "loops": loops}
    aot_harness.assert_recorded(TABLE, f"{variant.id} sm_{capability}", got)


class TestTable(aot_harness.TritonTests):
    table = TABLE
    kernels = KERNELS
    compiled = (NAME,)
    keys = tuple(
        f"{variant.id} sm_{capability}" for variant in VARIANTS for capability in CAPABILITIES
    )
