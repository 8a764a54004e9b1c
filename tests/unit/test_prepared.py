"""Prepared convolutions against the specification in float64."""

import copy
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deeplab_fast import _ext, ops, reference, use_backend
from deeplab_fast.ops import _cpu_forms
from deeplab_fast.ops.prepared import PreparedAspp, PreparedConv, PreparedProject

# 2-norm against float64. A direct fp32 sum stays below 2e-6, the forms that save multiplications
# below 1e-5 (design of the project, section 6).
DIRECT, SAVING = 2e-6, 1e-5

needs_kernels = pytest.mark.skipif(not _ext.CPU.loaded, reason=f"no C++: {_ext.CPU.reason}")


def relative_error(y: Tensor, exact: Tensor) -> float:
    if exact.numel() == 0:
        return 0.0
    return float((y.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def random_conv(k: int, c: int, kernel: int) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(k, c, kernel, kernel) / (c * kernel * kernel) ** 0.5
    return weight, torch.rand(k) + 0.5, torch.randn(k)


def exact_conv(x, weight, scale, shift, residual=None, act="relu", **options) -> Tensor:
    wide = [t if t is None else t.double() for t in (x, weight, scale, shift, residual)]
    given = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **options}
    return reference.conv_bn_act(*wide[:4], *given.values(), wide[4], act)


@pytest.mark.parametrize(
    "shape,k,dilation",
    [
        pytest.param((1, 16, 13, 17), 16, 1, id="plain"),
        pytest.param((2, 7, 12, 9), 5, 2, id="odd-channels-and-batch"),
        pytest.param((1, 33, 20, 20), 40, 4, id="phases-divide-the-map"),
        pytest.param((1, 8, 5, 7), 24, 9, id="dilation-above-the-map"),
        pytest.param((3, 17, 1, 1), 3, 1, id="one-pixel"),
        pytest.param((1, 16, 1, 23), 16, 3, id="one-row"),
        pytest.param((0, 16, 6, 6), 16, 1, id="no-image"),
        pytest.param((1, 300, 33, 33), 64, 12, id="aspp-line3"),
        pytest.param((1, 64, 33, 33), 64, 18, id="aspp-line2"),
    ],
)
@pytest.mark.parametrize("act,with_residual", [("relu", True), (None, False)], ids=str)
def test_3x3_against_float64(shape, k, dilation, act, with_residual, nan_poison) -> None:
    x, (weight, scale, shift) = torch.randn(shape), random_conv(k, shape[1], 3)
    residual = torch.randn(shape[0], k, *shape[2:]) if with_residual else None
    options = {"padding": dilation, "dilation": dilation}
    conv = PreparedConv(weight, scale, shift, act=act, **options)
    y = conv(x, residual)
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = exact_conv(x, weight, scale, shift, residual, act, **options)
    assert relative_error(y, exact) <= SAVING


@needs_kernels
@pytest.mark.parametrize("rows", list(_cpu_forms.FORMS))
@pytest.mark.parametrize("columns", list(_cpu_forms.FORMS))
def test_every_pair_of_forms(rows, columns, nan_poison) -> None:
    """Chosen by hand, on a map whose phases have the length that a whole-line form takes."""
    row, column = _cpu_forms.FORMS[rows], _cpu_forms.FORMS[columns]
    dilation = 4
    height, width = (dilation * f.outputs if f.whole_line else 21 for f in (row, column))
    x, (weight, scale, shift) = torch.randn(2, 19, height, width), random_conv(21, 19, 3)
    x = x.contiguous(memory_format=torch.channels_last)
    kernels = torch.ops.deeplab_fast
    folded = weight * scale[:, None, None, None]
    prepared = kernels._conv_prepare_tiles_cpu(folded, row.number, column.number)
    out = torch.full((2, 30, height, width), 7.0).contiguous(memory_format=torch.channels_last)
    forms = [row.number, row.number], [column.number, column.number]
    kernels._conv_tiles_cpu(x, [prepared], shift, None, out, 4, dilation, *forms, "relu")
    exact = exact_conv(x, weight, scale, shift, padding=dilation, dilation=dilation)
    assert relative_error(out[:, 4:25], exact) <= SAVING
    # Channels beside the slice are not written.
    assert bool((out[:, :4] == 7).all() and (out[:, 25:] == 7).all())


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(1, 14),
    st.sampled_from([1, 3]),
    st.integers(0, 2**31),
)
def test_random_shapes(n, c, k, height, width, dilation, kernel, seed) -> None:
    torch.manual_seed(seed)
    x, (weight, scale, shift) = torch.randn(n, c, height, width), random_conv(k, c, kernel)
    options = {"padding": dilation * (kernel // 2), "dilation": dilation}
    y = PreparedConv(weight, scale, shift, **options, act=None)(x)
    exact = exact_conv(x, weight, scale, shift, act=None, **options)
    assert relative_error(y, exact) <= SAVING


@pytest.mark.parametrize(
    "k,c,options",
    [
        pytest.param(70, 260, {}, id="1x1-own-product"),
        pytest.param(512, 64, {}, id="1x1-onednn"),
        pytest.param(20, 12, {"stride": 2}, id="1x1-stride-2"),
    ],
)
@pytest.mark.parametrize("act", ["relu", "relu6", "hardswish", None], ids=str)
def test_1x1_and_activations(k, c, options, act) -> None:
    x, (weight, scale, shift) = torch.randn(2, c, 9, 7) * 3, random_conv(k, c, 1)
    y = PreparedConv(weight, scale, shift, act=act, **options)(x)
    exact = exact_conv(x, weight, scale, shift, act=None, **options)
    wide = {
        "relu": torch.relu,
        "relu6": torch.nn.functional.relu6,
        "hardswish": torch.nn.functional.hardswish,
        None: lambda t: t,
    }[act](exact)
    assert relative_error(y, wide) <= DIRECT


@pytest.mark.parametrize("layout", ["nchw", "strided"])
def test_layout_of_the_input_does_not_matter(layout) -> None:
    x, (weight, scale, shift) = torch.randn(2, 16, 14, 18), random_conv(8, 16, 3)
    conv = PreparedConv(weight, scale, shift, padding=2, dilation=2)
    expected = conv(x.contiguous(memory_format=torch.channels_last))
    other = x if layout == "nchw" else x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(conv(other), expected)


@pytest.mark.parametrize("size", [(33, 33), (20, 31), (1, 1)], ids=str)
def test_aspp_and_projection(size, nan_poison) -> None:
    c, k, rates = 40, 24, (6, 12, 18)
    x, pooled = torch.randn(2, c, *size), torch.randn(2, 10)
    parts = [random_conv(k, c, 1), *(random_conv(k, c, 3) for _ in rates)]
    weights, scales, shifts = (list(column) for column in zip(*parts, strict=True))
    dilations = (1, *rates)
    y = PreparedAspp(weights, scales, shifts, dilations)(x)
    wide = [[t.double() for t in column] for column in (weights, scales, shifts)]
    exact = reference.aspp_branches(x.double(), *wide, dilations)
    assert relative_error(y, exact) <= SAVING
    weight, scale, shift = random_conv(16, 4 * k + 10, 1)
    z = PreparedProject(weight, scale, shift, branch_channels=4 * k)(y, pooled)
    arguments = [t.double() for t in (y, pooled, weight, scale, shift)]
    assert relative_error(z, reference.aspp_project(*arguments)) <= DIRECT
    # The public ops, with weights prepared for one call.
    assert relative_error(ops.aspp_branches(x, weights, scales, shifts, dilations), exact) <= SAVING
    with use_backend("reference"):
        plain = ops.aspp_project(y, pooled, weight, scale, shift)
    assert relative_error(z, plain.double()) <= 2 * DIRECT


@needs_kernels
def test_any_number_of_threads_gives_the_same(nan_poison) -> None:
    x, (weight, scale, shift) = torch.randn(1, 32, 30, 30), random_conv(48, 32, 3)
    conv = PreparedConv(weight, scale, shift, padding=1)
    before = torch.get_num_threads()
    exact = exact_conv(x, weight, scale, shift, padding=1)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert relative_error(conv(x), exact) <= SAVING
    finally:
        torch.set_num_threads(before)


def test_bound_on_extra_bytes_copies_and_threads() -> None:
    x, (weight, scale, shift) = torch.randn(1, 64, 40, 40), random_conv(64, 64, 3)
    free = PreparedConv(weight, scale, shift, padding=1)
    expected = free(x)
    assert free.extra_bytes > 0 and free.plan(x.shape).extra_bytes <= free.extra_bytes
    bound = PreparedConv(weight, scale, shift, padding=1, max_extra_bytes=0)
    assert relative_error(bound(x), expected.double()) <= SAVING
    assert bound.extra_bytes == 0
    for again in (copy.deepcopy(free), pickle.loads(pickle.dumps(free))):
        assert again.extra_bytes == 0
        assert torch.equal(again(x), expected)
    fresh = PreparedConv(weight, scale, shift, padding=1)
    results: list[Tensor] = []
    workers = [threading.Thread(target=lambda: results.append(fresh(x))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4 and all(torch.equal(y, expected) for y in results)


def test_it_takes_a_snapshot_of_its_weights() -> None:
    x, (weight, scale, shift) = torch.randn(1, 8, 9, 9), random_conv(8, 8, 3)
    conv = PreparedConv(weight, scale, shift, padding=1)
    expected = conv(x)
    weight.zero_(), scale.zero_(), shift.zero_()
    assert torch.equal(conv(x), expected)


@pytest.mark.parametrize(
    "change,message",
    [
        pytest.param({"act": "gelu"}, "act must be one of", id="activation"),
        pytest.param({"groups": 3}, "groups=3 must divide", id="groups"),
        pytest.param({"dilation": 0}, "dilation", id="dilation"),
        pytest.param({"weight": torch.zeros(4, 4, 3)}, r"expected \[K, C, R, S\]", id="rank"),
        pytest.param(
            {"weight": torch.zeros(4, 4, 3, 3, dtype=torch.float64)}, "float32", id="dtype"
        ),
        pytest.param({"scale": torch.ones(5)}, "one value for each output channel", id="scale"),
    ],
)
def test_bad_arguments(change, message) -> None:
    weight, scale, shift = random_conv(4, 4, 3)
    given = {"weight": weight, "scale": scale, "shift": shift, **change}
    with pytest.raises(ValueError, match=message):
        PreparedConv(given.pop("weight"), given.pop("scale"), given.pop("shift"), **given)


def test_bad_inputs() -> None:
    conv = PreparedConv(*random_conv(4, 4, 3), padding=1)
    with pytest.raises(ValueError, match="3 channels, the weight wants 4"):
        conv(torch.zeros(1, 3, 5, 5))
    with pytest.raises(ValueError, match="float64"):
        conv(torch.zeros(1, 4, 5, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="residual has shape"):
        conv(torch.zeros(1, 4, 5, 5), torch.zeros(1, 4, 5, 6))
    with pytest.raises(ValueError, match=r"channel_offset=2"):
        conv(torch.zeros(1, 4, 5, 5), out=torch.zeros(1, 5, 5, 5), channel_offset=2)
