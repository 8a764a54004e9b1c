"""The checks of `deeplab-fast tune` on the Triton kernels: what they ask is what kernels give.

The interpreter takes minutes for the loss and the ASPP at these sizes; those ops have tests of
their own here, and all of them are launched at these sizes in tests/launch.
"""

from __future__ import annotations

import pytest

from deeplab_fast import backends
from deeplab_fast.dispatch import checks
from deeplab_fast.dispatch.declare import find
from deeplab_fast.dispatch.errors import Wrong

pytestmark = pytest.mark.interpret

# The size at which each is quickest.
CASES = [
    (op, form, number)
    for op, number in (
        ("upsample_argmax", 1),
        ("upsample_softmax_add", 1),
        ("upsample_confusion", 1),
        ("batch_stats", 1),
        ("bn_act", 1),
        ("bn_act_reduce", 1),
        ("bn_act_backward", 1),
        ("aspp_project", 1),
        ("conv_bn_act", 1),
    )
    for form in find(op).examples.forms
]


@pytest.mark.parametrize(("op", "form", "number"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_kernel_passes(op: str, form: str, number: int, dtype: str) -> None:
    implementation = backends.implementations(op)["triton"]
    size = find(op).examples.sizes[number]
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
