"""The checks of `deeplab-fast tune` on the Triton kernels: what they ask is what kernels give.

The interpreter takes minutes for the loss and the ASPP at these sizes; those ops have tests of
their own here, and all of them are launched at these sizes in tests/launch.
"""

from __future__ import annotations

import pytest

from deeplab_fast import backends
from deeplab_fast.dispatch import checks
from deeplab_fast.dispatch.declare import find, gpu_ops
from deeplab_fast.dispatch.errors import Wrong

pytestmark = pytest.mark.interpret

SLOW = ("upsample_cross_entropy", "aspp_branches", "aspp_convs", "aspp_convs_backward")
CASES = [(op.name, form) for op in gpu_ops() if op.name not in SLOW for form in op.examples.forms]


@pytest.mark.parametrize(("op", "form"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_kernel_passes(op: str, form: str, dtype: str) -> None:
    implementation = backends.implementations(op)["triton"]
    # That at which each is quickest.
    size = find(op).examples.sizes[1]
    found = checks.check(op, implementation.run, dtype, form, "cpu", at=[size])
    assert found.error <= found.bound


def test_a_wrong_kernel_does_not(monkeypatch) -> None:
    """Its launcher writes one channel too few."""
    from deeplab_fast.kernels import batch_norm

    right = batch_norm.bn_act

    def wrong(x, *rest):
        y = right(x, *rest)
        y[:, -1] = 0
        return y

    with pytest.raises(Wrong, match="values are wrong, first at image 0, row 0, column 0"):
        checks.check(
            "bn_act", wrong, "float16", "plain", "cpu", at=find("bn_act").examples.sizes[1:2]
        )
