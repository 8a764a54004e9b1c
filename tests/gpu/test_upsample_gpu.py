"""The Triton upsampling kernels, and all backends of the upsampling ops, on a GPU at real sizes.

The oracle is `deeplab_fast.reference` in float64. A result passes when its error is at most twice
that of PyTorch's own float32 path on the same values, plus what `assert_as_good` names: that holds
for low-precision logits too, because the kernels accumulate in float32 whatever the logits are.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from deeplab_fast.kernels import upsample as triton_upsample
from gpu_harness import (
    DEVICE,
    HALF_STEP,
    assert_capture_says_what_to_do,
    assert_same,
    every_dtype,
    needs_memory,
    on_a_busy_stream,
    peak_memory,
    replayed,
    use_backend,
)
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import ops, reference
from deeplab_fast.testing import deterministic

# exp2 and log2 of the GPU's special function unit, and the fast division, are good to 2^-22. Four
# in a row make a pixel's loss, and what they have in common does not average out over pixels.
SPECIAL = 4 * 2.0**-22

# N, C, h, w, H, W, align_corners
SIZES = [
    pytest.param((4, 21, 65, 65, 513, 513, False), id="os8-513-21-classes"),
    pytest.param((2, 21, 65, 65, 513, 513, True), id="os8-513-align-corners"),
    pytest.param((1, 21, 65, 65, 520, 520, False), id="os8-520-batch-1"),
    pytest.param((2, 150, 33, 33, 513, 513, False), id="os16-513-150-classes"),
    pytest.param((1, 19, 97, 193, 769, 1537, True), id="cityscapes-not-square"),
    pytest.param((1, 300, 17, 19, 129, 150, False), id="300-classes"),
    pytest.param((2, 21, 129, 100, 65, 33, False), id="down"),
    pytest.param((1, 21, 1, 1, 513, 513, False), id="one-pixel-map"),
    pytest.param((1, 3, 65, 65, 65, 65, False), id="same-size"),
]


class Case:
    """Inputs of one size on the GPU; the target has ignored pixels."""

    def __init__(self, shape, dtype=torch.float32, channels_last=True):
        n, c, h, w, rows, cols, self.align_corners = shape
        self.size = (rows, cols)
        logits = (torch.randn(n, c, h, w, device=DEVICE) * 3).to(dtype)
        if channels_last:
            logits = logits.contiguous(memory_format=torch.channels_last)
        self.logits = logits
        self.target = torch.randint(0, min(c, 255), (n, rows, cols), device=DEVICE)
        self.target[torch.rand(self.target.shape, device=DEVICE) < 0.1] = 255
        self.weight = torch.rand(c, device=DEVICE) + 0.5

    def loss_args(self, weighted: bool, smoothing: float, reduction: str, dtype=torch.float32):
        weight = self.weight.to(dtype) if weighted else None
        return self.target, weight, 255, smoothing, reduction, self.align_corners


def assert_as_good(got: Tensor, torch32: Tensor, exact: Tensor, stored=torch.float32) -> None:
    """Largest error at most twice that of `torch32`, plus the special functions' and one rounding.

    `stored` is the dtype that the result was rounded to.
    """
    assert got.shape == exact.shape
    magnitude = exact.abs().max()
    allowed = 2 * (torch32.double() - exact).abs().max()
    allowed += magnitude * (SPECIAL + HALF_STEP[stored])
    assert (got.double() - exact).abs().max() <= allowed


def assert_labels_as_good(labels: Tensor, case: Case) -> None:
    """Every label is an argmax of the float64 logits, but for float32's rounding of them."""
    full = reference.upsample(case.logits.double(), case.size, case.align_corners)
    full32 = reference.upsample(case.logits.float(), case.size, case.align_corners)
    rounding = 2 * (full32 - full).abs().max() + full.abs().max() * 2.0**-23
    chosen = full.gather(1, labels.long()[:, None])[:, 0]
    assert (full.amax(1) - chosen).max() <= 2 * rounding
    assert (labels.long() == full.argmax(1)).double().mean() > 0.999


@every_dtype
@pytest.mark.parametrize("shape", SIZES)
def test_argmax(shape, dtype: torch.dtype) -> None:
    case = Case(shape, dtype)
    args = (case.size, case.align_corners, True)
    labels, prob = triton_upsample.upsample_argmax(case.logits, *args)
    assert_labels_as_good(labels, case)
    exact = reference.upsample_argmax(case.logits.double(), *args)[1]
    torch32 = reference.upsample_argmax(case.logits.float(), *args)[1]
    assert_as_good(prob, torch32, exact)
    # The layout of the logits changes nothing.
    again = triton_upsample.upsample_argmax(case.logits.contiguous(), *args)
    assert torch.equal(labels, again[0]) and torch.equal(prob, again[1])


@every_dtype
@pytest.mark.parametrize(
    "weighted,smoothing,reduction",
    [
        pytest.param(False, 0.0, "mean", id="mean"),
        pytest.param(True, 0.1, "mean", id="mean-weights-smoothing"),
        pytest.param(True, 0.1, "none", id="none-weights-smoothing"),
        pytest.param(False, 0.0, "sum", id="sum"),
    ],
)
@pytest.mark.parametrize("shape", SIZES)
def test_cross_entropy(shape, weighted, smoothing, reduction, dtype: torch.dtype) -> None:
    case = Case(shape, dtype)
    args = case.loss_args(weighted, smoothing, reduction)
    args64 = case.loss_args(weighted, smoothing, reduction, torch.float64)
    loss = triton_upsample.upsample_cross_entropy(case.logits, *args)
    exact = reference.upsample_cross_entropy(case.logits.double(), *args64)
    torch32 = reference.upsample_cross_entropy(case.logits.float(), *args)
    assert_as_good(loss, torch32, exact)

    outer = torch.randn(loss.shape, device=DEVICE)
    grad = triton_upsample.upsample_cross_entropy_backward(outer, case.logits, *args)
    backward = reference.upsample_cross_entropy_backward
    exact = backward(outer.double(), case.logits.double(), *args64)
    torch32 = backward(outer, case.logits.float(), *args)
    assert grad.dtype == dtype and grad.is_contiguous()
    assert_as_good(grad, torch32, exact, dtype)
    if reduction != "none":
        both = triton_upsample.upsample_cross_entropy_with_grad(case.logits, *args)
        # Programs of another width: the same pixels in another order.
        torch.testing.assert_close(both[0], loss, rtol=2.0**-22, atol=0)
        assert_as_good(both[1] * outer, torch32, exact)


@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", SIZES)
def test_confusion(shape, target_dtype: torch.dtype) -> None:
    case = Case(shape)
    target = case.target.to(target_dtype)
    labels = triton_upsample.upsample_argmax(case.logits, case.size, case.align_corners, False)[0]
    got = triton_upsample.upsample_confusion(case.logits, target, 255, case.align_corners)
    classes = case.logits.shape[1]
    valid = case.target != 255
    pairs = case.target[valid] * classes + labels.long()[valid]
    expected = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    assert torch.equal(got, expected)


def test_confusion_of_one_region_counts_every_pixel() -> None:
    logits = torch.zeros(16, 21, 65, 65, device=DEVICE)
    target = torch.zeros(16, 513, 513, dtype=torch.uint8, device=DEVICE)
    got = triton_upsample.upsample_confusion(logits, target, 255, False)
    assert got[0, 0] == target.numel() and got.sum() == target.numel()


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("flip", [False, True], ids=["straight", "flipped"])
@pytest.mark.parametrize("shape", SIZES)
def test_softmax_add(shape, flip: bool, channels_last: bool) -> None:
    case = Case(shape)
    before = torch.rand(*case.logits.shape[:2], *case.size, device=DEVICE)
    if channels_last:
        before = before.contiguous(memory_format=torch.channels_last)
    got, torch32, exact = before.clone(), before.clone(), before.double()
    triton_upsample.upsample_softmax_add(got, case.logits, flip, case.align_corners)
    reference.upsample_softmax_add(torch32, case.logits, flip, case.align_corners)
    reference.upsample_softmax_add(exact, case.logits.double(), flip, case.align_corners)
    assert_as_good(got, torch32, exact)


def call_all_ops(case: Case) -> dict[str, Tensor]:
    """Every upsampling op through its public function, with the loss's gradient."""
    logits = case.logits.clone().requires_grad_()
    kwargs = {"align_corners": case.align_corners}
    loss = ops.upsample_cross_entropy(
        logits, case.target, weight=case.weight, label_smoothing=0.1, **kwargs
    )
    loss.backward()
    labels, prob = ops.upsample_argmax(logits, case.size, return_prob=True, **kwargs)
    accumulator = torch.zeros(*logits.shape[:2], *case.size, device=DEVICE)
    ops.upsample_softmax_add(accumulator, logits.detach(), flip=True, **kwargs)
    return {
        "loss": loss.detach(),
        "grad": logits.grad,
        "labels": labels,
        "prob": prob,
        "confusion": ops.upsample_confusion(logits, case.target, **kwargs),
        "sum": accumulator,
    }


@every_dtype
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backends_agree(backend: str, dtype: torch.dtype) -> None:
    case = Case((2, 21, 65, 65, 513, 513, False), dtype)
    with dlf.use_backend("reference"):
        expected = call_all_ops(case)
    with use_backend(backend):
        got = call_all_ops(case)
    # fp32 to fp32, two different orders of summation; positions are off by up to 65 * 2^-23.
    for name in ("loss", "prob", "sum"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)
    scale = expected["grad"].abs().max().item()
    step = 2 * HALF_STEP[dtype] + 1e-4
    torch.testing.assert_close(got["grad"], expected["grad"], rtol=step, atol=1e-4 * scale)
    assert (got["labels"] == expected["labels"]).double().mean() > 0.999
    assert got["confusion"].sum() == expected["confusion"].sum()
    moved = (got["labels"] != expected["labels"]).sum()
    assert (got["confusion"] - expected["confusion"]).abs().sum() <= 2 * moved


def test_results_repeat_to_the_bit() -> None:
    case = Case((4, 21, 65, 65, 513, 513, False), torch.bfloat16)
    with dlf.use_backend("triton"):
        first = call_all_ops(case)
        with deterministic():
            second = call_all_ops(case)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_fp16_gradient_keeps_what_a_loss_scale_protects() -> None:
    case = Case((2, 21, 65, 65, 513, 513, False), torch.float16)
    logits = case.logits.requires_grad_()
    with dlf.use_backend("triton"):
        loss = ops.upsample_cross_entropy(logits, case.target)
        (loss * 65536).backward()
    args = case.loss_args(False, 0.0, "mean")
    exact = reference.upsample_cross_entropy_backward(
        torch.tensor(65536.0, device=DEVICE), logits.detach().double(), *args
    )
    error = (logits.grad.double() - exact).norm() / exact.norm()
    assert error < 2 * HALF_STEP[torch.float16]


def test_autocast_gives_a_float32_loss() -> None:
    case = Case((1, 21, 33, 33, 257, 257, False), torch.bfloat16)
    with dlf.use_backend("triton"), torch.autocast(DEVICE, torch.bfloat16):
        loss = ops.upsample_cross_entropy(case.logits, case.target)
    assert loss.dtype == torch.float32


def test_cuda_graph_replays_on_new_inputs() -> None:
    case = Case((2, 21, 65, 65, 513, 513, False), torch.bfloat16)
    other = Case((2, 21, 65, 65, 513, 513, False), torch.bfloat16)
    logits, target = case.logits.clone(), case.target.clone()
    accumulator = torch.zeros(*logits.shape[:2], *case.size, device=DEVICE)
    args = (None, 255, 0.0, "mean", False)

    def step():
        labels, _ = triton_upsample.upsample_argmax(logits, case.size, False, False)
        loss, grad = triton_upsample.upsample_cross_entropy_with_grad(logits, target, *args)
        counts = triton_upsample.upsample_confusion(logits, target, 255, False)
        accumulator.zero_()
        triton_upsample.upsample_softmax_add(accumulator, logits, True, False)
        return labels, loss, grad, counts, accumulator

    def change() -> None:
        logits.copy_(other.logits)
        target.copy_(other.target)

    got = replayed(step, change)
    assert_same(got, step())


def test_capture_without_a_call_before_says_what_to_do() -> None:
    logits = torch.zeros(1, 2, 11, 13, device=DEVICE)
    assert_capture_says_what_to_do(
        lambda: triton_upsample.upsample_argmax(logits, (83, 97), False, False)
    )


def test_runs_on_the_current_stream() -> None:
    case = Case((2, 21, 65, 65, 513, 513, False))
    args = (case.target, None, 255, 0.0, "mean", False)

    def run() -> tuple[Tensor, Tensor]:
        return triton_upsample.upsample_cross_entropy_with_grad(case.logits, *args)

    expected = run()
    assert_same(on_a_busy_stream(run, case.logits), expected)


def test_compiles_without_graph_breaks() -> None:
    case = Case((2, 21, 33, 33, 257, 257, False))

    def step(logits: Tensor, target: Tensor, weight: Tensor):
        loss = ops.upsample_cross_entropy(logits * 2, target, weight=weight)
        labels = ops.upsample_argmax(logits.detach(), (257, 257))
        counts = ops.upsample_confusion(logits.detach(), target)
        return loss, labels + 0, counts * 2

    results = []
    with dlf.use_backend("triton"):
        for run in (step, torch.compile(step, fullgraph=True)):
            logits = case.logits.clone().requires_grad_()
            loss, *rest = run(logits, case.target, case.weight)
            loss.backward()
            results.append([loss.detach(), logits.grad, *rest])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_labels_outside_do_not_harm_and_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((1, 21, 33, 33, 257, 257, False))
    clean = case.target.clone()
    case.target[0, 3, 4:7] = torch.tensor([21, -1, 2**32 + 1], device=DEVICE)
    clean[0, 3, 4:7] = 255
    args = (None, 255, 0.0, "mean", False)
    got = triton_upsample.upsample_cross_entropy_with_grad(case.logits, case.target, *args)
    assert triton_upsample.last_label_errors(DEVICE).item() == 3
    expected = triton_upsample.upsample_cross_entropy_with_grad(case.logits, clean, *args)
    assert triton_upsample.last_label_errors(DEVICE).item() == 0
    assert_same(got, expected)
    monkeypatch.setenv(triton_upsample.STRICT_LABELS, "1")
    with pytest.raises(ValueError, match=r"label 21 at \(image 0, row 3, column 4\)"):
        triton_upsample.upsample_confusion(case.logits, case.target, 255, False)
    # The device still works.
    assert torch.ones(3, device=DEVICE).sum().item() == 3


def test_all_ignored_is_nan_with_no_gradient() -> None:
    logits = torch.randn(1, 5, 9, 9, device=DEVICE, requires_grad=True)
    target = torch.full((1, 65, 65), 255, device=DEVICE)
    with dlf.use_backend("triton"):
        loss = ops.upsample_cross_entropy(logits, target)
        loss.backward()
    assert loss.isnan() and not logits.grad.any()


def test_logits_beyond_two_to_the_31_elements() -> None:
    n, c, h, w = 27, 150, 733, 733
    needs_memory(24)
    logits = torch.zeros(n, c, h, w, dtype=torch.float16, device=DEVICE)
    assert logits.numel() > 2**31
    logits[-1].normal_()
    target = torch.randint(0, c, (n, 64, 64), device=DEVICE)
    args = (None, 255, 0.0, "none", False)
    last = slice(n - 1, n)
    labels = triton_upsample.upsample_argmax(logits, (64, 64), False, False)[0]
    alone = triton_upsample.upsample_argmax(logits[last].clone(), (64, 64), False, False)[0]
    assert torch.equal(labels[last], alone)
    loss = triton_upsample.upsample_cross_entropy(logits, target, *args)
    alone = triton_upsample.upsample_cross_entropy(logits[last].clone(), target[last], *args)
    assert torch.equal(loss[last], alone)


def test_accumulator_beyond_two_to_the_31_elements() -> None:
    needs_memory(24)
    logits = torch.randn(2, 150, 65, 65, device=DEVICE)
    accumulator = torch.zeros(2, 150, 2700, 2700, device=DEVICE)
    assert accumulator.numel() > 2**31
    triton_upsample.upsample_softmax_add(accumulator, logits, False, False)
    alone = torch.zeros(1, 150, 2700, 2700, device=DEVICE)
    triton_upsample.upsample_softmax_add(alone, logits[1:].clone(), False, False)
    assert torch.equal(accumulator[1:], alone)


@pytest.mark.parametrize("classes", [21, 150])
def test_memory_of_the_loss_is_a_tenth(classes: int) -> None:
    case = Case((8, classes, 65, 65, 513, 513, False), torch.bfloat16)

    def eager(logits: Tensor) -> Tensor:
        full = F.interpolate(logits.float(), case.size, mode="bilinear")
        return F.cross_entropy(full, case.target, ignore_index=255)

    def fused(logits: Tensor) -> Tensor:
        with dlf.use_backend("triton"):
            return ops.upsample_cross_entropy(logits, case.target)

    peaks = []
    for loss in (eager, fused):
        logits = case.logits.clone().requires_grad_()
        peaks.append(peak_memory(lambda f=loss, x=logits: f(x).backward()))
        del logits
    assert peaks[1] <= 0.1 * peaks[0], f"{peaks[1]} bytes against {peaks[0]}"
