"""A segment as one function of the dispatcher: what fakes, torch.compile and opcheck see of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast.ops import segment

OPS = torch.ops.deeplab_fast
GEOMETRY = [2, 1, 1, 2, 1, 2, 1]
POOL = [3, 3, 2, 2, 1, 1, 1, 1, 0]


def calls() -> dict[str, tuple[Any, ...]]:
    """The arguments of `segment` for each kind of segment."""
    torch.manual_seed(0)
    x, filters = torch.randn(2, 4, 9, 8), torch.randn(5, 4, 3, 3)
    x = x.contiguous(memory_format=torch.channels_last)
    front, behind = [torch.rand(4) + 0.5 for _ in range(4)], [torch.rand(5) + 0.5 for _ in range(4)]
    running = (torch.zeros(5), torch.ones(5), torch.tensor(2), 0.1)
    nothing = (None,) * 4
    like_z = segment.output_like(x, filters, [2, 1], [1, 2], [1, 2], 1)
    residual = torch.randn(like_z.shape).contiguous(memory_format=torch.channels_last)
    conv = (filters, GEOMETRY)
    batch = (True, 1e-3, *running)
    constant = (False, 1e-3, *nothing)
    weights, constants = behind[2:], [*behind[2:], *behind[:2]]
    return {
        "conv": (x, [], None, *conv, *constant, [], None, None, []),
        "norm, conv, statistics": (x, front, "relu", *conv, *batch, [], None, None, []),
        "conv, norm, pooling": (x, [], None, *conv, *batch, weights, None, "relu6", POOL),
        "residual": (x, front, "relu", *conv, *batch, weights, residual, "relu", []),
        "constants": (x, [], None, *conv, *constant, constants, None, "hardswish", []),
        "norm alone": (x, [], None, None, [], *constant, [*front[2:], *front[:2]], None, None, []),
    }


CALLS = list(calls())


@pytest.fixture(params=["reference", "auto"])
def backend(request: pytest.FixtureRequest):
    with dlf.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(backend, name) -> None:
    torch.library.opcheck(OPS.segment.default, calls()[name])


def gradient_call(name: str) -> tuple[Any, ...]:
    args = calls()[name]
    x, before, act_before, filters, geometry, takes, _, _, _, _, _, after, residual, act, pool = (
        args
    )
    y, z, *stats = segment.run(*args)
    if filters is None or not after:
        z = None
    mean_and_rstd = stats if takes else after[2:]
    norm = [*mean_and_rstd, *after[:2]] if after else []
    needs = [True, bool(before), bool(before), filters is not None]
    needs += [bool(after), bool(after), residual is not None]
    out = y if residual is not None and act is not None else None
    count = int(takes) * 70 if after else 0
    return (
        torch.randn_like(y), x, before, act_before, 144 * bool(before), filters, geometry,
        z, norm, count, out, act, pool, needs,
    )  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_of_the_gradients(backend, name) -> None:
    torch.library.opcheck(OPS.segment_backward.default, gradient_call(name))


@pytest.mark.parametrize("name", CALLS)
def test_through_the_dispatcher_and_at_once(name) -> None:
    """The same bits, and the running statistics are changed by both."""
    one, other = calls()[name], calls()[name]
    at_once, dispatched = segment.run(*one), OPS.segment(*other)
    assert all(torch.equal(a, b) for a, b in zip(at_once, dispatched, strict=True))
    for a, b in zip(one, other, strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(a, b)
    changed = one[7]
    assert changed is None or changed.any()
    args = gradient_call(name)
    found = zip(segment.run_gradients(*args), OPS.segment_backward(*args), strict=True)
    assert all(torch.equal(a, b) for a, b in found)
