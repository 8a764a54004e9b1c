"""Every Triton kernel of the upsampling ops, in Triton's interpreter, against float64.

Error bounds, with u = 2^-24 and A the largest magnitude of a logit, on a map of at most s pixels
a side:
    position        float32 rounds the scale and the position, each by u relative: the weight of a
                    corner is off by at most 2 s u, on each of two axes
    logit v         that, times a difference of corners of at most 2 A, on two axes, and six
                    roundings: (8 s + 6) u A =: dv
    log p           two errors dv, and C + 8 roundings of terms of the size of 1 + |log p|
    gradient        a pixel's part is off by dp = p (2 dv + (C + 8) u) plus its weight's 4 s u, and
                    a logit collects pixels of total weight S
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from deeplab_fast.kernels import upsample as triton_upsample
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplab_fast import reference

pytestmark = pytest.mark.interpret

U = 2.0**-24

# N, C, h, w, H, W, align_corners
SHAPES = [
    pytest.param((2, 3, 3, 4, 8, 11, False), id="up-not-integer"),
    pytest.param((1, 3, 3, 2, 9, 5, True), id="up-align-corners-exact"),
    pytest.param((1, 2, 4, 3, 7, 10, True), id="up-align-corners-not-integer"),
    pytest.param((1, 3, 7, 6, 3, 4, False), id="down"),
    pytest.param((1, 2, 7, 5, 4, 2, True), id="down-align-corners"),
    pytest.param((2, 2, 1, 1, 5, 3, False), id="one-pixel-map"),
    pytest.param((1, 3, 4, 5, 1, 1, True), id="to-one-pixel"),
    pytest.param((1, 3, 3, 4, 3, 4, False), id="same-size"),
    pytest.param((1, 1, 2, 3, 5, 4, False), id="one-class"),
    pytest.param((1, 2, 1, 3, 2, 70, False), id="wide-needs-several-programs-and-warps"),
    pytest.param((1, 2, 2, 1, 40, 3, False), id="tall-cells-are-cut-into-blocks"),
    pytest.param((1, 21, 2, 2, 3, 3, False), id="21-classes"),
]


class Case:
    """Inputs of one shape, the upsampled logits in float64, and the bounds above."""

    def __init__(self, shape, dtype=torch.float32, scale=3.0):
        n, c, h, w, rows, cols, self.align_corners = shape
        self.logits = (torch.randn(n, c, h, w) * scale).to(dtype)
        self.size = (rows, cols)
        self.target = torch.randint(0, c, (n, rows, cols))
        # About one pixel in five is ignored, never all of them.
        self.target[torch.rand(self.target.shape) < 0.2] = 255
        self.target[0, 0, 0] = 0
        self.full = reference.upsample(self.logits.double(), self.size, self.align_corners)
        self.side = max(h, w)
        self.dv = (8 * self.side + 6) * U * float(self.logits.abs().max())
        self.roundings = (c + 8) * U

    def loss_bound(self, loss: torch.Tensor, weight: float = 1.0) -> float:
        return weight * (2 * self.dv + self.roundings * (1 + float(loss.abs().max())))

    def grad_bound(self, pixel: torch.Tensor) -> float:
        """For pixels whose loss has the given factors [N, H, W]."""
        n, _, h, w = self.logits.shape
        collected = torch.ops.aten.upsample_bilinear2d_backward(
            pixel.abs()[:, None].double(),
            list(self.size),
            [n, 1, h, w],
            self.align_corners,
            None,
            None,
        )
        relative = 2 * self.dv + self.roundings + 4 * self.side * U
        return relative * float(collected.max())


def assert_labels(case: Case, labels: torch.Tensor) -> None:
    """Each label is the argmax, or its logit is the maximum but for rounding."""
    chosen = case.full.gather(1, labels.long()[:, None])[:, 0]
    assert (case.full.amax(1) - chosen).max() <= 2 * case.dv
    # Else the bound would hide a wrong kernel: most pixels must have a clear winner.
    top = case.full.topk(min(2, case.full.shape[1]), 1).values
    clear = top[:, 0] - top[:, -1] > 2 * case.dv if top.shape[1] > 1 else chosen == chosen
    assert clear.double().mean() > 0.8
    assert torch.equal(labels.long()[clear], case.full.argmax(1)[clear])


@pytest.mark.parametrize("shape", SHAPES)
def test_argmax(shape, nan_poison) -> None:
    case = Case(shape)
    labels, prob = triton_upsample.upsample_argmax(case.logits, case.size, case.align_corners, True)
    assert labels.dtype == torch.uint8 and prob.dtype == torch.float32
    assert_labels(case, labels)
    expected = case.full.softmax(1).amax(1)
    assert ((prob - expected).abs() <= 2 * case.dv + case.roundings).all()


@pytest.mark.parametrize(
    "classes,dtype",
    [
        pytest.param(256, torch.uint8, id="256-classes-fit-uint8"),
        pytest.param(257, torch.int64, id="257-classes-need-int64"),
    ],
)
def test_argmax_label_dtype(classes: int, dtype: torch.dtype, nan_poison) -> None:
    logits = torch.zeros(1, classes, 1, 1)
    logits[0, classes - 1] = 1
    labels, prob = triton_upsample.upsample_argmax(logits, (1, 2), False, False)
    assert labels.dtype == dtype
    assert (labels == classes - 1).all()
    assert prob.shape == (0,)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.contiguous(memory_format=torch.channels_last), id="channels-last"),
        pytest.param(lambda x: x.repeat(1, 1, 2, 2)[:, :, :3, 2:5], id="slice-of-a-larger-map"),
        pytest.param(lambda x: x[:, :, :1, :].expand(2, 3, 3, 3), id="expanded-stride-0"),
        pytest.param(lambda x: x.transpose(2, 3), id="transposed"),
    ],
)
def test_argmax_takes_any_strides(layout) -> None:
    logits = layout(torch.randn(2, 3, 3, 3))
    got = triton_upsample.upsample_argmax(logits, (5, 7), False, False)[0]
    contiguous = triton_upsample.upsample_argmax(logits.contiguous(), (5, 7), False, False)[0]
    assert torch.equal(got, contiguous)
    assert torch.equal(got, reference.upsample_argmax(logits, (5, 7), False, False)[0])


def test_argmax_of_equal_values_is_the_first() -> None:
    # Small integers at ratio 4 interpolate without rounding, so that ties are exact.
    logits = torch.randint(0, 2, (2, 4, 3, 3)).float()
    got = triton_upsample.upsample_argmax(logits, (12, 12), False, False)[0]
    full = F.interpolate(logits, (12, 12), mode="bilinear")
    assert (full == full.amax(1, keepdim=True)).sum(1).max() > 1
    assert torch.equal(got.long(), full.argmax(1))


def test_argmax_of_nan_and_infinities_is_torchs() -> None:
    inf, nan = float("inf"), float("nan")
    rows = [
        [1.0, nan, 2.0, nan],
        [nan, 1.0, nan, inf],
        [inf, 3.0, inf, 0.0],
        [-inf, -inf, -inf, -inf],
        [-inf, 5.0, -inf, 4.0],
    ]
    # A constant map of each row of values. From 2x2 to one pixel no weight is zero: 0 * inf is NaN.
    logits = torch.tensor(rows)[:, :, None, None].expand(5, 4, 2, 2)
    labels, prob = triton_upsample.upsample_argmax(logits, (1, 1), False, True)
    expected, expected_prob = reference.upsample_argmax(logits, (1, 1), False, True)
    assert labels.flatten().tolist() == [1, 0, 0, 0, 1]
    assert torch.equal(labels, expected)
    torch.testing.assert_close(prob, expected_prob, equal_nan=True)


def check_loss_and_gradient(case: Case) -> None:
    args = (case.target, None, 255, 0.0, "mean", case.align_corners)
    loss, grad = triton_upsample.upsample_cross_entropy_with_grad(case.logits, *args)
    logits = case.logits.double()
    pixels = reference.upsample_cross_entropy(
        logits, case.target, None, 255, 0.0, "none", case.align_corners
    )
    expected = reference.upsample_cross_entropy(logits, *args)
    assert abs(loss - expected) <= case.loss_bound(pixels)
    expected = reference.upsample_cross_entropy_backward(torch.ones(()), logits, *args)
    valid = case.target != 255
    assert grad.shape == logits.shape and grad.is_contiguous()
    assert ((grad - expected).abs() <= case.grad_bound(valid / valid.sum())).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_in_one_pass(shape, nan_poison) -> None:
    check_loss_and_gradient(Case(shape))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 2, *[st.integers(1, 12)] * 2),
    classes=st.integers(1, 4),
    align_corners=st.booleans(),
)
def test_loss_and_gradient_of_any_size(sizes, classes: int, align_corners: bool) -> None:
    check_loss_and_gradient(Case((1, classes, *sizes, align_corners)))


@pytest.mark.parametrize(
    "reduction,weighted,smoothing",
    [
        pytest.param("mean", True, 0.0, id="mean-divides-by-the-sum-of-weights"),
        pytest.param("mean", False, 0.1, id="smoothing"),
        pytest.param("sum", True, 0.3, id="sum-weights-and-smoothing"),
        pytest.param("sum", False, 1.0, id="smoothing-of-one-has-no-label-term"),
        pytest.param("none", True, 0.3, id="none-is-a-map-with-a-gradient-for-each-pixel"),
        pytest.param("none", False, 0.0, id="none-without-options"),
    ],
)
def test_options(reduction: str, weighted: bool, smoothing: float, nan_poison) -> None:
    case = Case((2, 4, 2, 3, 5, 7, False))
    # A class of weight 0 gives its pixels no label term.
    weight = torch.tensor([0.5, 0.0, 2.0, 1.5]) if weighted else None
    options = (255, smoothing, reduction, case.align_corners)
    args = (case.target, weight, *options)
    args64 = (case.target, None if weight is None else weight.double(), *options)
    logits = case.logits.double()
    largest = 2.0 if weighted else 1.0
    pixels = reference.upsample_cross_entropy(logits, *args64[:4], "none", case.align_corners)

    loss = triton_upsample.upsample_cross_entropy(case.logits, *args)
    expected = reference.upsample_cross_entropy(logits, *args64)
    count = case.target.numel() if reduction == "sum" else 1
    assert loss.shape == expected.shape and loss.dtype == torch.float32
    assert ((loss - expected).abs() <= count * case.loss_bound(pixels, largest)).all()

    outer = torch.randn(loss.shape)
    got = triton_upsample.upsample_cross_entropy_backward(outer, case.logits, *args)
    expected = reference.upsample_cross_entropy_backward(outer.double(), logits, *args64)
    valid = (case.target != 255).double()
    if reduction == "mean":
        valid /= args64[1][case.target % 255][case.target != 255].sum() if weighted else valid.sum()
    bound = case.grad_bound(valid * largest * 2 * outer)
    assert got.is_contiguous()
    assert ((got - expected).abs() <= bound).all()
    if reduction != "none":
        both = triton_upsample.upsample_cross_entropy_with_grad(case.logits, *args)
        assert abs(both[0] - loss) <= count * case.loss_bound(pixels, largest)
        assert ((both[1] * outer - expected).abs() <= bound).all()


def test_smoothing_with_class_weight_zero_and_an_expanded_gradient() -> None:
    case = Case((1, 3, 2, 2, 4, 4, False))
    args = (case.target, torch.tensor([0.0, 1.0, 2.0]), 255, 0.2, "none", False)
    args64 = (args[0], args[1].double(), *args[2:])
    # What loss.sum().backward() passes on: one value with strides 0.
    outer = torch.ones(()).expand(case.target.shape)
    got = triton_upsample.upsample_cross_entropy_backward(outer, case.logits, *args)
    expected = reference.upsample_cross_entropy_backward(outer, case.logits.double(), *args64)
    bound = case.grad_bound((case.target != 255) * 4.0)
    assert ((got - expected).abs() <= bound).all()


def test_fp16_logits_are_accumulated_in_fp32() -> None:
    case = Case((1, 5, 2, 3, 7, 9, False), torch.float16)
    args = (case.target, None, 255, 0.0, "mean", False)
    logits = case.logits.double()
    expected = reference.upsample_cross_entropy_backward(torch.ones(()), logits, *args)
    valid = case.target != 255
    bound = case.grad_bound(valid / valid.sum())
    loss, grad = triton_upsample.upsample_cross_entropy_with_grad(case.logits, *args)
    assert loss.dtype == grad.dtype == torch.float32
    assert ((grad - expected).abs() <= bound).all()
    # Rounded once: half a step of fp16, relative, or of its smallest step.
    step = 2.0**-11 * (expected.abs() + bound) + 2.0**-25
    got = triton_upsample.upsample_cross_entropy_backward(torch.ones(()), case.logits, *args)
    assert got.dtype == torch.float16
    assert ((got - expected).abs() <= bound + step).all()
    # A loss scale enters before the rounding: nothing vanishes below fp16's range.
    scale = torch.tensor(65536.0)
    tiny = case.logits * 1e-3
    scaled = triton_upsample.upsample_cross_entropy_backward(scale * 1e-8, tiny, *args)
    assert scaled.count_nonzero() > 0
    labels, prob = triton_upsample.upsample_argmax(case.logits, case.size, False, True)
    assert prob.dtype == torch.float32
    assert_labels(case, labels)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["plain", "smoothing"])
def test_all_ignored_is_pytorchs(reduction: str, smoothing: float) -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    target = torch.full((1, 3, 3), 255)
    full = F.interpolate(logits, (3, 3), mode="bilinear")
    expected = F.cross_entropy(
        full, target, ignore_index=255, label_smoothing=smoothing, reduction=reduction
    )
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    args = (target, None, 255, smoothing, reduction, False)
    loss = triton_upsample.upsample_cross_entropy(logits.detach(), *args)
    torch.testing.assert_close(loss, expected.detach(), equal_nan=True, rtol=0, atol=0)
    outer = torch.ones(loss.shape)
    grad = triton_upsample.upsample_cross_entropy_backward(outer, logits.detach(), *args)
    assert torch.equal(grad, expected_grad) and not grad.any()


@pytest.mark.parametrize(
    "dtype,bad",
    [
        pytest.param(torch.uint8, 3, id="uint8-first-beyond"),
        pytest.param(torch.int32, -1, id="int32-negative"),
        pytest.param(torch.int64, 2**32 + 1, id="int64-that-wraps-to-a-class-in-int32"),
    ],
)
def test_labels_outside_are_ignored_and_counted(
    dtype: torch.dtype, bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(1, 3, 2, 2)
    target = torch.randint(0, 3, (1, 4, 5)).to(dtype)
    target[0, 1, 2] = 255
    clean = target.clone()
    target[0, 2, 3] = target[0, 3, 4] = bad
    clean[0, 2, 3] = clean[0, 3, 4] = 255
    args = (None, 255, 0.0)
    for reduction in ("mean", "none"):
        loss = triton_upsample.upsample_cross_entropy(logits, target, *args, reduction, False)
        assert triton_upsample.last_label_errors("cpu").item() == 2
        expected = triton_upsample.upsample_cross_entropy(logits, clean, *args, reduction, False)
        assert triton_upsample.last_label_errors("cpu").item() == 0
        assert torch.equal(loss, expected)
    counts = triton_upsample.upsample_confusion(logits, target, 255, False)
    assert triton_upsample.last_label_errors("cpu").item() == 2
    assert counts.sum() == 17
    monkeypatch.setenv(triton_upsample.STRICT_LABELS, "1")
    where = rf"label {bad} at \(image 0, row 2, column 3\).*; 2 in all"
    with pytest.raises(ValueError, match=where):
        triton_upsample.upsample_cross_entropy(logits, target, *args, "mean", False)
    with pytest.raises(ValueError, match=where):
        triton_upsample.upsample_confusion(logits, target, 255, False)
    triton_upsample.upsample_confusion(logits, clean, 255, False)


@pytest.mark.parametrize(
    "ignore_index,dtype",
    [
        pytest.param(-100, torch.uint8, id="ignore-index-that-the-dtype-cannot-hold"),
        pytest.param(1, torch.int32, id="ignore-index-is-a-class"),
        pytest.param(-1, torch.int64, id="negative-ignore-index"),
    ],
)
def test_ignore_index(ignore_index: int, dtype: torch.dtype) -> None:
    logits = torch.randn(1, 3, 2, 2)
    target = torch.randint(0, 3, (1, 3, 4)).to(dtype)
    if ignore_index == -1:
        target[0, 0] = -1
    # Strided as a slice of a larger map is.
    target = target.repeat(1, 2, 2)[:, :3, 2:6]
    loss = triton_upsample.upsample_cross_entropy(
        logits, target, None, ignore_index, 0.0, "mean", False
    )
    assert triton_upsample.last_label_errors("cpu").item() == 0
    expected = F.cross_entropy(
        F.interpolate(logits, (3, 4), mode="bilinear"), target.long(), ignore_index=ignore_index
    )
    torch.testing.assert_close(loss, expected)


def test_masked_classes_have_loss_and_gradient() -> None:
    # Logits of -inf switch classes off; the first class is one of them. At these sizes no weight is
    # zero: 0 * inf is NaN, here as in PyTorch.
    case = Case((1, 4, 4, 6, 3, 4, False))
    case.logits[:, [0, 2]] = -float("inf")
    target = torch.randint(0, 2, (1, 3, 4)) * 2 + 1
    args = (target, None, 255, 0.0, "mean", False)
    loss, grad = triton_upsample.upsample_cross_entropy_with_grad(case.logits, *args)
    logits = case.logits.double()
    torch.testing.assert_close(loss.double(), reference.upsample_cross_entropy(logits, *args))
    expected = reference.upsample_cross_entropy_backward(torch.ones(()), logits, *args)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)
    assert not grad[:, [0, 2]].any() and grad[:, 1].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_logit_that_is_no_number_shows_in_the_loss(value: float) -> None:
    logits = torch.randn(1, 3, 2, 2)
    logits[0, 1, 0, 0] = value
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    args = (target, None, 255, 0.0, "none", False)
    got = triton_upsample.upsample_cross_entropy(logits, *args)
    expected = reference.upsample_cross_entropy(logits, *args)
    assert expected.isnan().any() and not expected.isnan().all()
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("size", [(4, 5), (8, 5), (4, 10)], ids=["both", "columns", "rows"])
def test_an_axis_that_keeps_its_size_has_no_neighbours(size: tuple[int, int]) -> None:
    # 0 times one that is NaN would be NaN; PyTorch has none there.
    logits = torch.randn(1, 3, 4, 5)
    logits[0, 1, 2, 2] = float("nan")
    target = torch.ones(1, *size, dtype=torch.int64)
    found, accumulators = [], torch.zeros(2, 1, 3, *size)
    for module, accumulator in zip((triton_upsample, reference), accumulators, strict=True):
        module.upsample_softmax_add(accumulator, logits, False, False)
        found.append(
            (
                *module.upsample_argmax(logits, size, False, True),
                module.upsample_confusion(logits, target, 255, False),
                module.upsample_cross_entropy(logits, target, None, 255, 0.0, "none", False),
                accumulator,
            )
        )
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_of_ignored_pixels_whose_softmax_is_no_number(
    reduction: str, smoothing: float, value: float
) -> None:
    logits = torch.randn(1, 3, 4, 4)
    logits[0, 1, 1, 1] = value
    if value < 0:
        logits[0, :, 1, 1] = value
    target = torch.randint(0, 3, (1, 8, 8))
    target[:, :6] = 255
    args = (target, None, 255, smoothing, reduction, False)
    loss = triton_upsample.upsample_cross_entropy(logits, *args)
    assert loss.isfinite().all()
    upstream = torch.ones_like(loss)
    got = triton_upsample.upsample_cross_entropy_backward(upstream, logits, *args)
    expected = reference.upsample_cross_entropy_backward(upstream, logits, *args)
    assert expected[0, :, 1, 1].isnan().all() and not expected.isnan().all()
    assert got[expected.isnan()].isnan().all()


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[7]])
def test_confusion(shape, nan_poison) -> None:
    n, c, h, w, rows, cols, align_corners = shape
    # Integers far apart: no rounding can change the argmax.
    logits = torch.stack([torch.randperm(c * h * w).view(c, h, w) for _ in range(n)]).float()
    target = torch.randint(0, c, (n, rows, cols))
    target[:, 0, 0] = 255
    got = triton_upsample.upsample_confusion(logits, target, 255, align_corners)
    expected = reference.upsample_confusion(logits.double(), target, 255, align_corners)
    assert got.dtype == torch.int64
    assert torch.equal(got, expected)


def test_confusion_over_several_tables() -> None:
    logits = torch.randn(1, 2, 4, 4)
    target = torch.randint(0, 2, (1, 64, 64), dtype=torch.uint8)
    assert triton_upsample.num_confusion_tables(2, target.numel()) == 4
    labels = triton_upsample.upsample_argmax(logits, (64, 64), False, False)[0]
    got = triton_upsample.upsample_confusion(logits, target, 255, False)
    expected = torch.bincount((target.long() * 2 + labels).flatten(), minlength=4).view(2, 2)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "flip,shape,layout",
    [
        pytest.param(False, SHAPES[0], lambda a: a, id="up-nchw"),
        pytest.param(
            True,
            SHAPES[0],
            lambda a: a.contiguous(memory_format=torch.channels_last),
            id="flipped-channels-last",
        ),
        pytest.param(True, SHAPES[3], lambda a: a.repeat(1, 2, 1, 2)[:, ::2, :, ::2], id="sliced"),
        pytest.param(True, SHAPES[9], lambda a: a, id="flipped-over-several-programs"),
        pytest.param(False, SHAPES[8], lambda a: a, id="one-class-adds-one"),
    ],
)
def test_softmax_add(flip: bool, shape, layout) -> None:
    case = Case(shape.values[0])
    accumulator = layout(torch.rand(*case.logits.shape[:2], *case.size))
    strides = accumulator.stride()
    prob = case.full.softmax(1)
    expected = accumulator.double() + (prob.flip(-1) if flip else prob)
    triton_upsample.upsample_softmax_add(accumulator, case.logits, flip, case.align_corners)
    assert accumulator.stride() == strides
    # The probability's error, and the rounding of sums up to 2.
    bound = 2 * case.dv + case.roundings + 2 * U
    assert ((accumulator - expected).abs() <= bound).all()


def test_softmax_add_of_infinities_is_torchs() -> None:
    inf = float("inf")
    rows = [[inf, 0.0, 1.0], [-inf, 0.0, 1.0], [-inf, -inf, -inf]]
    # From 2x2 to one pixel no weight is zero: 0 * inf is NaN.
    logits = torch.tensor(rows)[:, :, None, None].expand(3, 3, 2, 2)
    got, expected = torch.zeros(2, 3, 3, 1, 1)
    triton_upsample.upsample_softmax_add(got, logits, False, False)
    reference.upsample_softmax_add(expected, logits, False, False)
    assert expected.isnan().flatten(1).all(1).tolist() == [True, False, True]
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_softmax_add_refuses_shared_memory() -> None:
    accumulator = torch.zeros(1, 2, 1, 4).expand(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"expanded tensor.*clone"):
        triton_upsample.upsample_softmax_add(accumulator, torch.zeros(1, 2, 2, 2), False, False)


def test_no_images(nan_poison) -> None:
    logits, target = torch.zeros(0, 3, 2, 2), torch.zeros(0, 4, 4, dtype=torch.int64)
    labels, prob = triton_upsample.upsample_argmax(logits, (4, 4), False, True)
    assert labels.shape == prob.shape == (0, 4, 4) and labels.dtype == torch.uint8
    assert not triton_upsample.upsample_confusion(logits, target, 255, False).any()
    triton_upsample.upsample_softmax_add(torch.zeros(0, 3, 4, 4), logits, True, False)
    for reduction in ("mean", "sum", "none"):
        args = (target, None, 255, 0.0, reduction, False)
        loss = triton_upsample.upsample_cross_entropy(logits, *args)
        expected = reference.upsample_cross_entropy(logits, *args)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        grad = triton_upsample.upsample_cross_entropy_backward(loss, logits, *args)
        assert grad.shape == logits.shape
        if reduction != "none":
            both = triton_upsample.upsample_cross_entropy_with_grad(logits, *args)
            torch.testing.assert_close(both[0], expected, equal_nan=True)


def test_gradient_in_one_pass_needs_a_scalar_loss() -> None:
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'none'"):
        triton_upsample.upsample_cross_entropy_with_grad(
            torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1).long(), None, 255, 0.0, "none", False
        )


def test_capture_before_the_first_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_upsample.tables, "capturing", lambda x: True)
    with pytest.raises(RuntimeError, match="run the op once at this size before"):
        triton_upsample.upsample_argmax(torch.zeros(1, 2, 6, 7), (13, 17), False, False)
