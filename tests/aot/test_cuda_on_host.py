"""What the CUDA kernels of the upsampling ops compute, run on the host without a GPU.

`cuda_on_host/` compiles the same kernels, plans and launch sequences with the C++ compiler and runs
the threads of a block as fibres. In double the results must agree with the float64 reference to
1e-12: nothing but the order of sums differs. Memory order within a warp, speed and the hardware's
own functions need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import aot_harness
import pytest
import torch
from aot_harness import OnHost
from torch import Tensor

from deeplab_fast import reference

pytestmark = pytest.mark.aot

# Unit roundoff of float32.
U = 2.0**-24

# (N, C, h, w), (H, W)
SHAPES = [
    pytest.param((1, 21, 5, 7), (40, 56), id="up by 8"),
    pytest.param((2, 19, 5, 4), (65, 50), id="no integer ratio, not square, batch"),
    pytest.param((1, 3, 3, 30), (5, 300), id="several column tiles"),
    pytest.param((1, 5, 33, 20), (17, 9), id="down, rows and columns without outputs"),
    pytest.param((1, 2, 3, 700), (4, 130), id="down by 5: threads stage columns of their own"),
    pytest.param((1, 1, 1, 300), (2, 20), id="down, 1 class: more cells than a block has"),
    pytest.param((1, 7, 6, 6), (7, 7), id="ratio close to 1"),
    pytest.param((2, 3, 6, 9), (6, 9), id="ratio 1"),
    pytest.param((2, 3, 1, 1), (5, 6), id="one source pixel"),
    pytest.param((1, 3, 4, 5), (1, 1), id="one output pixel"),
    pytest.param((1, 3, 2, 2), (150, 300), id="split rows, several pixel tiles in a cell"),
    pytest.param((1, 150, 2, 3), (20, 30), id="150 classes"),
    pytest.param((1, 300, 2, 2), (9, 9), id="more classes than threads"),
    pytest.param((1, 1500, 2, 2), (3, 5), id="classes staged in parts"),
    pytest.param((0, 4, 3, 3), (7, 7), id="no image"),
]
every_shape = pytest.mark.parametrize(("shape", "size"), SHAPES)
both_alignments = pytest.mark.parametrize(
    "align_corners", [False, True], ids=["centres", "corners"]
)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> OnHost:
    return OnHost("upsample", tmp_path_factory.mktemp("cuda_on_host"))


def call(library: OnHost, name: str, x: Tensor, size: tuple[int, int], *args) -> None:
    """Runs `<name>_<type>`."""
    sizes = torch.tensor([*x.shape, *size])
    strides = torch.tensor(x.stride())
    kind = "double" if x.dtype == torch.float64 else "float"
    library.call(f"{name}_{kind}", x, sizes, strides, *args)


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)


def make_target(n: int, size: tuple[int, int], classes: int) -> Tensor:
    target = torch.randint(0, classes, (n, *size))
    return torch.where(torch.rand(n, *size) < 0.2, -1, target)


def tolerance(x: Tensor, size: tuple[int, int], align_corners: bool) -> float:
    """Twice the error of PyTorch's interpolation in that dtype, and a rounding per operation."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return 1e-12
    exact = reference.upsample(x.double(), size, align_corners)
    error = (reference.upsample(x, size, align_corners) - exact).abs().max().item()
    return 2 * error + (6 * x.abs().max().item() + x.shape[1] + 6) * U


@both_alignments
@every_shape
def test_argmax(library, shape, size, align_corners) -> None:
    check_argmax(library, make(shape), size, align_corners)


@both_alignments
def test_argmax_in_float32(library, align_corners) -> None:
    check_argmax(library, make((2, 19, 5, 4), torch.float32), (65, 50), align_corners)


def check_argmax(library, x, size, align_corners) -> None:
    shape, dtype = x.shape, x.dtype
    narrow = shape[1] <= 256
    labels = torch.full((shape[0], *size), 99, dtype=torch.uint8 if narrow else torch.int64)
    prob = torch.full(labels.shape, float("nan"), dtype=dtype)
    call(
        library, "argmax", x, size, align_corners,
        labels if narrow else None, None if narrow else labels, prob,
    )  # fmt: skip
    full = reference.upsample(x.double(), size, align_corners)
    chosen = full.gather(1, labels.long()[:, None])
    slack = 2 * tolerance(x, size, align_corners)
    assert (full.amax(1, keepdim=True) - chosen <= slack).all()
    expected = full.softmax(1).amax(1)
    torch.testing.assert_close(prob.double(), expected, rtol=0, atol=slack)


def test_argmax_takes_the_first_of_equals_and_nan(library) -> None:
    x = torch.zeros(1, 5, 3, 3)
    labels = torch.full((1, 20, 20), 99, dtype=torch.uint8)
    call(library, "argmax", x, (20, 20), False, labels, None, None)
    assert not labels.any()
    x[:, 2] = x[:, 4] = float("nan")
    call(library, "argmax", x, (20, 20), False, labels, None, None)
    assert (labels == 2).all()


@pytest.mark.parametrize("size", [(4, 5), (8, 5), (4, 10)], ids=["both", "columns", "rows"])
def test_an_axis_that_keeps_its_size_has_no_neighbours(library, size) -> None:
    """0 times one that is nan would be nan; PyTorch has none there."""
    x = make((1, 3, 4, 5))
    x[0, 1, 2, 2] = float("nan")
    expected, expected_prob = reference.upsample_argmax(x, size, False, True)
    prob = torch.zeros(1, *size, dtype=x.dtype)
    labels = torch.full((1, *size), 99, dtype=torch.uint8)
    call(library, "argmax", x, size, False, labels, None, prob)
    assert torch.equal(labels, expected)
    torch.testing.assert_close(prob, expected_prob, equal_nan=True)
    loss, *_ = cross_entropy(library, x, torch.ones(1, *size, dtype=torch.int64), None, 0.0, "none")
    target = torch.ones(1, *size, dtype=torch.int64)
    wanted = reference.upsample_cross_entropy(x, target, None, -1, 0.0, "none", False)
    torch.testing.assert_close(loss, wanted, equal_nan=True)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, 1).repeat_interleave(3, 3)[:, ::2, :, ::3],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(library, layout) -> None:
    x = make((2, 21, 5, 7))
    results = []
    for y in (x, layout(x)):
        labels = torch.full((2, 40, 56), 99, dtype=torch.uint8)
        call(library, "argmax", y, (40, 56), False, labels, None, None)
        loss, grad, *_ = cross_entropy(library, y, make_target(2, (40, 56), 21).fill_(3))
        results.append((labels, loss, grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("shared_limit", [48 * 1024, 0], ids=["shared table", "global counts"])
@both_alignments
@every_shape
def test_confusion(library, shape, size, align_corners, shared_limit) -> None:
    x, target = make(shape), make_target(shape[0], size, shape[1])
    expected = reference.upsample_confusion(x, target, -1, align_corners)
    if target.numel():
        # A bad label is counted and otherwise ignored.
        row = reference.upsample(x, size, align_corners).argmax(1)[0, 0, 0]
        if target[0, 0, 0] >= 0:
            expected[target[0, 0, 0], row] -= 1
        target[0, 0, 0] = shape[1]
    matrix = torch.zeros(shape[1], shape[1], dtype=torch.int64)
    bad = torch.zeros(1, dtype=torch.int64)
    call(library, "confusion", x, size, align_corners, target, -1, shared_limit, matrix, bad)
    assert torch.equal(matrix, expected)
    assert bad.item() == (1 if target.numel() else 0)


@pytest.mark.parametrize("flip", [False, True], ids=["as is", "flipped"])
@both_alignments
@every_shape
def test_softmax_add(library, shape, size, align_corners, flip) -> None:
    x = make(shape)
    accumulator = torch.rand(*shape[:2], *size, dtype=torch.float64)
    accumulator = accumulator.contiguous(memory_format=torch.channels_last)
    expected = accumulator.clone()
    reference.upsample_softmax_add(expected, x, flip, align_corners)
    strides = torch.tensor(accumulator.stride())
    call(library, "softmax_add", x, size, align_corners, accumulator, strides, flip)
    torch.testing.assert_close(accumulator, expected, rtol=0, atol=1e-12)


def cross_entropy(
    library: OnHost,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
    with_grad: bool = True,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, int, list[int]]:
    """(loss, gradient, bad labels, [threads, cells, splits, staged classes])."""
    nan = float("nan")
    loss = torch.full((), nan, dtype=x.dtype)
    pixel_loss = torch.full(target.shape, nan, dtype=x.dtype) if reduction == "none" else None
    grad = torch.full(x.shape, nan, dtype=x.dtype) if with_grad else None
    bad = torch.full((1,), -1)
    plan = torch.zeros(4, dtype=torch.int64)
    call(
        library, "cross_entropy", x, tuple(target.shape[1:]), align_corners, target, -1, weight,
        None if weight is None else weight.sum(), float(smoothing), reduction == "mean",
        upstream if reduction != "none" else None, upstream if reduction == "none" else None,
        loss, pixel_loss, grad, bad, plan,
    )  # fmt: skip
    return (
        loss if pixel_loss is None else pixel_loss,
        torch.empty(0) if grad is None else grad,
        int(bad),
        plan.tolist(),
    )


def check_cross_entropy(library, x, target, weight, smoothing, reduction, align_corners) -> None:
    options = (weight, -1, smoothing, reduction, align_corners)
    expected = reference.upsample_cross_entropy(x.double(), target, *options)
    upstream = torch.rand(expected.shape, dtype=torch.float64) + 0.5
    expected_grad = reference.upsample_cross_entropy_backward(
        upstream, x.double(), target, *options
    )
    loss, grad, bad, _ = cross_entropy(
        library, x, target, *options[:1], *options[2:], upstream=upstream
    )
    assert bad == 0
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    scale = max(1e-6, expected_grad.abs().max().item()) if expected_grad.numel() else 1.0
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12 * scale)
    forward, *_ = cross_entropy(library, x, target, *options[:1], *options[2:], with_grad=False)
    torch.testing.assert_close(forward, loss, rtol=1e-14, atol=1e-14, equal_nan=True)


@both_alignments
@every_shape
def test_cross_entropy(library, shape, size, align_corners) -> None:
    target = make_target(shape[0], size, shape[1])
    check_cross_entropy(library, make(shape), target, None, 0.0, "sum", align_corners)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weights"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_options(library, weighted, smoothing, reduction) -> None:
    weight = torch.rand(21, dtype=torch.float64) + 0.5 if weighted else None
    x, target = make((2, 21, 5, 4)), make_target(2, (30, 29), 21)
    check_cross_entropy(library, x, target, weight, smoothing, reduction, False)


def test_cross_entropy_in_float32(library) -> None:
    """A probability is relatively off by twice an upsampled logit's error and C + 6 roundings; the
    cells sum up fewer than 200 pixels, each below the largest of the gradient's absolute terms.
    """
    x, target = make((1, 21, 5, 7), torch.float32), make_target(1, (40, 56), 21)
    options = (None, -1, 0.0, "sum", False)
    loss, grad, *_ = cross_entropy(library, x, target, reduction="sum")
    expected = reference.upsample_cross_entropy(x.double(), target, *options)
    error = tolerance(x, (40, 56), False)
    torch.testing.assert_close(loss.double(), expected, rtol=U, atol=2 * error * target.numel())
    expected_grad = reference.upsample_cross_entropy_backward(
        torch.ones(()), x.double(), target, *options
    )
    torch.testing.assert_close(
        grad.double(), expected_grad, rtol=0, atol=200 * (2 * error + 27 * U)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=str)
def test_all_ignored(library, smoothing) -> None:
    target = torch.full((1, 9, 8), -1)
    loss, grad, *_ = cross_entropy(library, make((1, 3, 3, 2)), target, None, smoothing)
    assert loss.isnan()
    assert not grad.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("ignored", [0, 12, 16], ids=["all counted", "rows ignored", "all ignored"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=str)
def test_not_finite_logits_show(library, smoothing, ignored, value) -> None:
    """As in PyTorch, also in the gradient of ignored pixels: their softmax times 0."""
    x, target = make((1, 3, 4, 4)), torch.randint(0, 3, (1, 16, 16))
    # One class that is minus infinity has a probability of 0.
    x[0, slice(None) if value < 0 else 1, 1, 1] = value
    target[:, :ignored] = -1
    options = (None, -1, smoothing, "sum", False)
    expected = reference.upsample_cross_entropy(x, target, *options)
    expected_grad = reference.upsample_cross_entropy_backward(torch.ones(()), x, target, *options)
    loss, grad, *_ = cross_entropy(library, x, target, None, smoothing, "sum")
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert expected_grad[0, :, 1, 1].isnan().all() and not expected_grad.isnan().all()
    assert grad[expected_grad.isnan()].isnan().all()
    accumulator, wanted = torch.zeros(2, 1, 3, 16, 16, dtype=torch.float64)
    strides = torch.tensor(accumulator.stride())
    call(library, "softmax_add", x, (16, 16), False, accumulator, strides, False)
    reference.upsample_softmax_add(wanted, x, False, False)
    torch.testing.assert_close(accumulator, wanted, equal_nan=True)
    prob, labels = torch.zeros(1, 16, 16, dtype=x.dtype), torch.zeros(1, 16, 16, dtype=torch.uint8)
    call(library, "argmax", x, (16, 16), False, labels, None, prob)
    wanted_labels, wanted_prob = reference.upsample_argmax(x, (16, 16), False, True)
    assert torch.equal(labels, wanted_labels)
    torch.testing.assert_close(prob, wanted_prob, equal_nan=True)


def test_bad_labels_are_counted_and_ignored(library) -> None:
    x, target = make((1, 3, 3, 2)), make_target(1, (9, 8), 3)
    clean = target.clone()
    target[0, 2, 3], target[0, 8, 7], target[0, 4, 4] = 3, -7, 2**40
    clean[0, 2, 3] = clean[0, 8, 7] = clean[0, 4, 4] = -1
    loss, grad, bad, _ = cross_entropy(library, x, target)
    expected, expected_grad, none, _ = cross_entropy(library, x, clean)
    assert (bad, none) == (3, 0)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize(
    ("classes", "threads", "cells"),
    [
        pytest.param(21, 128, 6, id="6 cells of 21 classes fill 126 threads"),
        pytest.param(19, 192, 10, id="10 cells of 19 classes fill 190 threads"),
        pytest.param(150, 160, 1, id="one cell of 150 classes fills 150 threads"),
        pytest.param(2, 128, 16, id="few classes: the pixels limit the cells"),
    ],
)
def test_threads_are_busy(library, classes, threads, cells) -> None:
    """Gradient blocks for logits upsampled by 8."""
    x, target = make((1, classes, 1, 20)), torch.zeros(1, 8, 160, dtype=torch.int64)
    plan = cross_entropy(library, x, target)[3]
    assert plan[:2] == [threads, cells]


# (N, C, h, w, H, W)
COMMON = {
    "21 classes, 65 to 520": (1, 21, 65, 65, 520, 520),
    "21 classes, 33 to 513, batch 16": (16, 21, 33, 33, 513, 513),
    "19 classes, 128x256 to 1024x2048": (1, 19, 128, 256, 1024, 2048),
    "150 classes, 33 to 513": (1, 150, 33, 33, 513, 513),
}


def test_shared_memory_is_as_recorded(library) -> None:
    """Bytes that the fp32 launches ask for; up to 48 KB a block has without more ado.

    test_cuda_resources.py says how to record new numbers.
    """
    found = {}
    for name, shape in COMMON.items():
        sizes, out = torch.tensor(shape), torch.zeros(2, dtype=torch.int64)
        library.run("shared_bytes", sizes, out)
        labels, with_grad = out.tolist()
        found[name] = {"labels": labels, "cross_entropy": with_grad}
        assert max(labels, with_grad) <= 48 * 1024
    aot_harness.assert_shared_recorded("cuda_resources.json", found)
