"""upsample_cross_entropy and its gradient against torch's interpolate and cross_entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast import _ext, ops, reference
from deeplab_fast.testing import cpu_instruction_sets, deterministic, threads

OPS = torch.ops.deeplab_fast
# Unit roundoff of float32.
U = 2.0**-24

# (N, C, h, w), (H, W)
SHAPES = [
    pytest.param((1, 21, 5, 6), (40, 48), id="up by 8"),
    pytest.param((2, 21, 9, 7), (65, 50), id="no integer ratio, not square, batch"),
    pytest.param((1, 5, 33, 20), (17, 9), id="down, rows without outputs"),
    pytest.param((1, 4, 5, 40), (33, 17), id="up and down"),
    pytest.param((1, 7, 6, 6), (7, 7), id="ratio close to 1: sources do not fit one vector"),
    pytest.param((2, 3, 6, 9), (6, 9), id="ratio 1"),
    pytest.param((2, 3, 1, 1), (5, 6), id="one source pixel"),
    pytest.param((1, 3, 4, 5), (1, 1), id="one output pixel"),
    pytest.param((1, 3, 2, 2), (150, 70), id="bands cut into parts"),
    pytest.param((1, 1, 3, 2), (9, 9), id="1 class: no loss, no gradient"),
    pytest.param((1, 2, 3, 2), (9, 9), id="2 classes"),
    pytest.param((1, 150, 3, 5), (40, 50), id="150 classes"),
    pytest.param((1, 1100, 2, 2), (33, 9), id="1100 classes: rows are done in parts"),
]
# (weights, smoothing)
OPTIONS = [
    pytest.param(False, 0.0, id="plain"),
    pytest.param(True, 0.0, id="weights"),
    pytest.param(False, 0.1, id="smoothing"),
    pytest.param(True, 0.3, id="weights and smoothing"),
    pytest.param(True, 1.0, id="nothing but smoothing"),
]
REDUCTIONS = ["mean", "sum", "none"]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, 1).repeat_interleave(3, 3)[:, ::2, :, ::3],
    "transposed": lambda x: x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
}
every_shape = pytest.mark.parametrize(("shape", "size"), SHAPES)
every_option = pytest.mark.parametrize(("weighted", "smoothing"), OPTIONS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
compiled_sets = pytest.mark.parametrize("implementation", cpu_instruction_sets(), indirect=True)
both_alignments = pytest.mark.parametrize(
    "align_corners", [False, True], ids=["centres", "corners"]
)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpu" and not _ext.CPU.loaded:
        pytest.skip(_ext.CPU.reason)
    with dlf.use_backend(request.param):
        yield request.param


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)


def make_target(n: int, size: tuple[int, int], classes: int, ignore_index: int = 255) -> Tensor:
    """Labels with ignored ones in between, and a whole row and corner of them."""
    target = torch.randint(0, classes, (n, *size))
    target = torch.where(torch.rand(n, *size) < 0.2, ignore_index, target)
    if size[0] > 2:
        target[:, 1] = ignore_index
        target[:, :, size[1] - size[1] // 3 :][:, : size[0] // 2] = ignore_index
    return target


def check(x: Tensor, target: Tensor, weighted: bool, **options) -> None:
    """Loss and gradient against autograd through interpolate and cross_entropy in float64.

    For one pixel, with dz what an upsampled logit is off (design's rule: twice the error of
    PyTorch's own fp32 path and a rounding per operation), the loss is off by 2 dz and by roundings:
    C in the sum, 2 in its logarithm, 8 of its own size. A probability is relatively off by 2 dz and
    C + 6 roundings. Interpolation weights are off by 3 roundings of a source position, which is
    below h or w. Gradients of a source pixel sum up its outputs, one rounding a term. All of it
    times the largest sum of absolute terms over the outputs of a source pixel, where p and the 1 of
    its label count by themselves: their difference may be small.
    """
    (_, classes, h, w), size = x.shape, target.shape[1:]
    align = options.get("align_corners", False)
    reduction = options.get("reduction", "mean")
    weight = torch.rand(classes, dtype=torch.float64) + 0.5 if weighted else None
    exact_options = {k: v for k, v in options.items() if k != "align_corners"}
    exact_options.setdefault("ignore_index", 255)

    exact_x = x.detach().double().requires_grad_()
    full = F.interpolate(exact_x, size, mode="bilinear", align_corners=align)
    full.retain_grad()
    expected = F.cross_entropy(full, target.long(), weight, **exact_options)
    upstream = torch.rand_like(expected) + 0.5
    expected.backward(upstream)
    pixels = target.numel() if reduction == "sum" else 1

    if x.dtype == torch.float64:
        loss_error = relative_error = 1e-12
        rounding = 0.0
    else:
        close = reference.upsample(x.detach().float(), size, align) - full.detach()
        dz = 2 * close.abs().max().item() + 6 * U * x.abs().max().item()
        # Weights are below 1.5.
        largest = F.cross_entropy(full.detach(), target.long(), weight, **(
            exact_options | {"reduction": "none"}
        )).max().item()  # fmt: skip
        loss_error = 1.5 * (2 * dz + (classes + 2) * U) + 8 * U * largest
        terms = 2 * (size[0] / h + size[1] / w) + 8
        relative_error = 2 * dz + (classes + 6 + 3 * (h + w) + terms) * U
        rounding = torch.finfo(x.dtype).eps / 2

    x = x.detach().requires_grad_()
    options["weight"] = None if weight is None else weight.to(reference.compute_dtype(x.dtype))
    loss = ops.upsample_cross_entropy(x, target, **options)
    assert loss.dtype == reference.compute_dtype(x.dtype)
    torch.testing.assert_close(
        loss.detach().double(), expected.detach(), rtol=1e-12, atol=pixels * loss_error
    )
    assert torch.equal(ops.upsample_cross_entropy(x.detach(), target, **options), loss.detach())

    loss.backward(upstream.to(loss.dtype))
    assert x.grad.dtype == x.dtype
    assert x.grad.is_contiguous()
    share = torch.ones(classes).double() if weight is None else weight
    valid = target != exact_options["ignore_index"]
    label = torch.where(valid, target.long(), 0)
    hard = torch.where(valid, share[label] + share.mean(), 0) * upstream
    if reduction == "mean":
        hard = hard / torch.where(valid, share[label], 0).sum()
    terms = hard[:, None] * full.detach().softmax(1).scatter_add(
        1, label[:, None], torch.ones_like(label[:, None], dtype=torch.float64)
    )
    spread = torch.ops.aten.upsample_bilinear2d_backward(
        terms, list(size), list(x.shape), align, None, None
    )
    tolerance = relative_error * spread.max().item()
    tolerance += rounding * exact_x.grad.abs().max().item()
    if x.dtype == torch.float16:
        # Half of the smallest number.
        tolerance += 2.0**-25
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=0, atol=tolerance)


class TestAgainstFloat64:
    @compiled_sets
    @both_alignments
    @every_shape
    def test_shapes(self, implementation, shape, size, align_corners) -> None:
        target = make_target(shape[0], size, shape[1], -1)
        check(make(shape), target, False, align_corners=align_corners, ignore_index=-1)

    @every_option
    @every_reduction
    def test_options(self, backend, weighted, smoothing, reduction) -> None:
        x, target = make((2, 21, 9, 7)), make_target(2, (65, 50), 21)
        check(x, target, weighted, label_smoothing=smoothing, reduction=reduction)

    @every_reduction
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_dtypes(self, backend, dtype, reduction) -> None:
        x, target = make((2, 21, 5, 4), dtype), make_target(2, (29, 35), 21)
        check(x, target, True, label_smoothing=0.1, reduction=reduction, align_corners=True)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
    @pytest.mark.parametrize("ignore_index", [255, 1], ids=["outside", "a class"])
    def test_labels(self, backend, dtype, ignore_index) -> None:
        x, target = make((2, 4, 5, 4)), make_target(2, (29, 35), 4, ignore_index).to(dtype)
        target = target.transpose(1, 2).contiguous().transpose(1, 2)
        check(x, target, True, ignore_index=ignore_index, reduction="none")

    @settings(max_examples=60, deadline=None)
    @given(
        n=st.integers(1, 2),
        c=st.integers(1, 9),
        h=st.integers(1, 12),
        w=st.integers(1, 12),
        height=st.integers(1, 50),
        width=st.integers(1, 50),
        align_corners=st.booleans(),
        weighted=st.booleans(),
        smoothing=st.sampled_from([0.0, 0.2]),
        reduction=st.sampled_from(REDUCTIONS),
        seed=st.integers(0, 2**31),
    )
    def test_any_shape(
        self, n, c, h, w, height, width, align_corners, weighted, smoothing, reduction, seed
    ) -> None:
        if not _ext.CPU.loaded:
            pytest.skip(_ext.CPU.reason)
        torch.manual_seed(seed)
        target = make_target(n, (height, width), c)
        # A mean over no pixel is nan, which has a test of its own.
        target[0, 0, 0] = 0
        options = {"label_smoothing": smoothing, "reduction": reduction}
        with dlf.use_backend("cpu"):
            check(make((n, c, h, w)), target, weighted, align_corners=align_corners, **options)


class TestGradient:
    @every_reduction
    @both_alignments
    def test_gradcheck(self, backend, reduction, align_corners) -> None:
        x = make((2, 3, 3, 2), torch.float64).requires_grad_()
        target = make_target(2, (7, 5), 3)
        weight = torch.rand(3, dtype=torch.float64)

        def loss(x: Tensor) -> Tensor:
            return ops.upsample_cross_entropy(
                x, target, weight=weight, label_smoothing=0.1, reduction=reduction,
                align_corners=align_corners,
            )  # fmt: skip

        assert torch.autograd.gradcheck(loss, x)

    @every_reduction
    def test_second_derivatives(self, backend, reduction) -> None:
        x = make((2, 3, 3, 2), torch.float64).requires_grad_()
        target, weight = make_target(2, (7, 5), 3), torch.rand(3, dtype=torch.float64)

        def loss(x: Tensor) -> Tensor:
            return ops.upsample_cross_entropy(
                x, target, weight=weight, label_smoothing=0.1, reduction=reduction
            )

        assert torch.autograd.gradgradcheck(loss, x)

    @every_reduction
    def test_a_retained_graph_gives_the_same_again(self, backend, reduction) -> None:
        x = make((1, 3, 3, 2)).requires_grad_()
        loss = ops.upsample_cross_entropy(x, make_target(1, (7, 5), 3), reduction=reduction)
        (once,) = torch.autograd.grad(3 * loss.sum(), x, retain_graph=True)
        (again,) = torch.autograd.grad(3 * loss.sum(), x)
        assert torch.equal(once, again)

    def test_beside_the_inputs_only_the_low_resolution_gradient_is_saved(self, backend) -> None:
        saved: list[Tensor] = []

        def pack(t: Tensor) -> Tensor:
            saved.append(t)
            return t

        x, target = make((2, 21, 5, 4), torch.bfloat16), make_target(2, (40, 32), 21)
        x.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ops.upsample_cross_entropy(x, target)
        own = [t for t in saved if t is not x and t is not target]
        assert [(t.shape, t.dtype) for t in own] == [(x.shape, torch.float32)]

    def test_a_mean_does_not_vanish_in_half_precision(self, backend) -> None:
        """1 / 90,000 times an interpolation weight is below fp16; the loss scale lifts it again."""
        scale = 2.0**16
        x = make((1, 3, 3, 3), torch.float16).requires_grad_()
        target = make_target(1, (300, 300), 3)
        (ops.upsample_cross_entropy(x, target) * scale).backward()
        exact = x.detach().double().requires_grad_()
        (ops.upsample_cross_entropy(exact, target) * scale).backward()
        torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-3, atol=1e-3)
        assert x.grad.abs().min() > 0

    def test_through_a_model(self, backend) -> None:
        """Gradients reach the parameters behind the logits as through torch's own ops."""
        conv = torch.nn.Conv2d(4, 5, 1).double()
        x, target = torch.randn(2, 4, 6, 5, dtype=torch.float64), make_target(2, (33, 29), 5)
        ops.upsample_cross_entropy(conv(x), target).backward()
        got = conv.weight.grad.clone()
        conv.zero_grad()
        full = F.interpolate(conv(x), (33, 29), mode="bilinear")
        F.cross_entropy(full, target, ignore_index=255).backward()
        torch.testing.assert_close(got, conv.weight.grad, rtol=1e-12, atol=1e-14)


class TestSpecialInput:
    @pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weights"])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hard", "smoothed"])
    def test_all_ignored_as_torch(self, backend, weighted, smoothing) -> None:
        weight = torch.rand(3) if weighted else None
        target = torch.full((2, 9, 8), 255)
        for reduction in REDUCTIONS:
            options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
            x = make((2, 3, 3, 2)).requires_grad_()
            full = F.interpolate(x, (9, 8), mode="bilinear")
            expected = F.cross_entropy(full, target, ignore_index=255, **options)
            (expected_grad,) = torch.autograd.grad(expected.sum(), x)
            loss = ops.upsample_cross_entropy(x, target, **options)
            torch.testing.assert_close(loss, expected, equal_nan=True)
            (grad,) = torch.autograd.grad(loss.sum(), x)
            assert torch.equal(grad, expected_grad)
            assert not grad.any()

    @every_reduction
    def test_no_image(self, backend, reduction) -> None:
        x = torch.zeros(0, 3, 3, 2, requires_grad=True)
        target = torch.zeros(0, 9, 8, dtype=torch.long)
        loss = ops.upsample_cross_entropy(x, target, reduction=reduction)
        expected = F.cross_entropy(torch.zeros(0, 3, 9, 8), target, reduction=reduction)
        torch.testing.assert_close(loss.detach(), expected, equal_nan=True)
        loss.sum().backward()
        assert x.grad.shape == x.shape

    def test_nan_logits_give_a_nan_loss_and_gradient(self, backend) -> None:
        x = make((1, 3, 4, 4)).requires_grad_()
        x.data[0, 1, 1, 1] = float("nan")
        loss = ops.upsample_cross_entropy(x, torch.zeros(1, 8, 8, dtype=torch.long))
        loss.backward()
        assert loss.isnan()
        assert x.grad[0, :, 1, 1].isnan().all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
    @pytest.mark.parametrize("target", ["counted", "ignored", "part ignored"])
    @every_option
    @every_reduction
    def test_not_finite_logits_as_torch(
        self, implementation, reduction, weighted, smoothing, target, value
    ) -> None:
        """Also where the pixel is ignored: the gradient of its softmax, times 0, is nan."""
        x = make((2, 4, 5, 6))
        # No weight is 0 at this ratio, so that infinity times it is none.
        size = (10, 12)
        # One class that is minus infinity has a probability of 0.
        x[0, slice(None) if value < 0 else 1, 2, 3] = value
        labels = torch.randint(0, 4, (2, *size))
        if target != "counted":
            labels[0, :, : 12 if target == "ignored" else 7] = 255
        options = {
            "weight": torch.rand(4) + 0.5 if weighted else None,
            "label_smoothing": smoothing,
            "reduction": reduction,
        }
        leaf = x.clone().requires_grad_()
        full = F.interpolate(leaf, size, mode="bilinear")
        expected = F.cross_entropy(full, labels, ignore_index=255, **options)
        (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
        leaf = x.clone().requires_grad_()
        loss = ops.upsample_cross_entropy(leaf, labels, **options)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        assert expected_grad.isnan().any()
        assert grad[expected_grad.isnan()].isnan().all()
        assert torch.equal(grad[1].isfinite(), expected_grad[1].isfinite())

    def test_large_logits_do_not_overflow(self, backend) -> None:
        x = torch.tensor([1e4, -1e4]).view(1, 2, 1, 1).expand(1, 2, 2, 2).clone().requires_grad_()
        target = torch.tensor([0, 1]).view(1, 1, 2).expand(1, 2, 2)
        loss = ops.upsample_cross_entropy(x, target, reduction="none")
        assert torch.equal(loss.detach(), torch.tensor([[[0.0, 2e4], [0.0, 2e4]]]))
        loss.sum().backward()
        expected = torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[0.0, -1.0], [0.0, -1.0]]])
        assert torch.equal(x.grad[0], expected)

    @pytest.mark.parametrize("value", [3, 254, -1, -(2**40), 2**40], ids=str)
    @pytest.mark.parametrize("needs_grad", [False, True], ids=["forward", "with gradient"])
    def test_a_bad_label_is_named_with_its_place(self, backend, value, needs_grad) -> None:
        x = make((2, 3, 3, 2)).requires_grad_(needs_grad)
        target = make_target(2, (9, 20), 3)
        target[1, 7, 13] = target[1, 8, 2] = value
        where = r"at \(image 1, row 7, column 13\) is outside \[0, 3\)"
        text = rf"label {value} {where}.*=255; 2 in all"
        for reduction in REDUCTIONS:
            with pytest.raises(ValueError, match=text):
                ops.upsample_cross_entropy(x, target, reduction=reduction)
        with pytest.raises(ValueError, match=text):
            ops.upsample_confusion(x, target)

    def test_both_backends_say_the_same_of_a_bad_label(self, compiled) -> None:
        x, target = make((1, 3, 3, 2)), torch.full((1, 4, 4), 200, dtype=torch.uint8)
        texts = []
        for name in ("cpu", "reference"):
            with dlf.use_backend(name), pytest.raises(ValueError) as error:
                ops.upsample_cross_entropy(x, target)
            texts.append(str(error.value))
        assert texts[0] == texts[1]


class TestSameBits:
    @every_reduction
    def test_for_any_number_of_threads(self, compiled, reduction) -> None:
        x, target = make((2, 21, 17, 15)).requires_grad_(), make_target(2, (130, 120), 21)
        results = []
        for count in (1, 2):
            with threads(count):
                loss = ops.upsample_cross_entropy(x, target, reduction=reduction)
                results.append((loss, *torch.autograd.grad(loss.sum(), x)))
        assert all(map(torch.equal, *results))

    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_for_any_layout(self, compiled, layout) -> None:
        x, target = make((2, 21, 9, 7)), make_target(2, (65, 50), 21)
        results = []
        for y in (x, layout(x)):
            y.requires_grad_()
            loss = ops.upsample_cross_entropy(y, target)
            results.append((loss, *torch.autograd.grad(loss, y)))
        assert all(map(torch.equal, *results))


def _args() -> tuple:
    """Arguments of the registered ops."""
    x, target = make((2, 5, 4, 3)), make_target(2, (17, 14), 5)
    return x, target, torch.rand(5), 255, 0.1


@every_reduction
class TestIntegration:
    def test_opcheck(self, compiled, reduction) -> None:
        args = (*_args(), reduction, True)
        torch.library.opcheck(OPS.upsample_cross_entropy.default, args)
        if reduction == "none":
            grad = torch.rand(2, 17, 14)
        else:
            torch.library.opcheck(OPS.upsample_cross_entropy_with_grad.default, args)
            grad = torch.rand(())
        torch.library.opcheck(OPS.upsample_cross_entropy_backward.default, (grad, *args))

    def test_with_grad_and_backward_agree(self, backend, reduction) -> None:
        if reduction == "none":
            pytest.skip("the one-pass form is for mean and sum")
        args = (*_args(), reduction, True)
        _, grad = OPS.upsample_cross_entropy_with_grad(*args)
        times = OPS.upsample_cross_entropy_backward(torch.tensor(2.0), *args)
        torch.testing.assert_close(2 * grad, times, rtol=1e-6, atol=0)

    def test_compile_fullgraph_forward_and_backward(self, compiled, reduction) -> None:
        torch.compiler.reset()
        x, target, *_ = _args()
        x.requires_grad_()

        def call(x: Tensor) -> Tensor:
            return ops.upsample_cross_entropy(x, target, reduction=reduction)

        expected = call(x)
        (grad,) = torch.autograd.grad(expected.sum(), x)
        y = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(y, expected)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], grad)

    def test_export(self, compiled, reduction) -> None:
        x, target, weight, *_ = _args()

        class Call(torch.nn.Module):
            def forward(self, x, target, weight):
                return ops.upsample_cross_entropy(x, target, weight=weight, reduction=reduction)

        program = torch.export.export(Call(), (x, target, weight))
        targets = [str(node.target) for node in program.graph.nodes]
        assert any("deeplab_fast.upsample_cross_entropy" in t for t in targets)
        expected = Call()(x, target, weight)
        assert torch.equal(program.module()(x, target, weight), expected)

    def test_outputs_are_written_whole(self, compiled, reduction, nan_poison: None) -> None:
        x, target, *_ = _args()
        results = []
        for mode in (False, True):
            x = x.detach().requires_grad_()
            if mode:
                with deterministic():
                    loss = ops.upsample_cross_entropy(x, target, reduction=reduction)
                    loss.sum().backward()
            else:
                loss = ops.upsample_cross_entropy(x, target, reduction=reduction)
                loss.sum().backward()
            results.append((loss.detach(), x.grad))
        assert all(map(torch.equal, *results))
        assert all(t.isfinite().all() for t in results[1])

    def test_autocast_does_not_round(self, compiled, reduction) -> None:
        x, target, *_ = _args()
        expected = ops.upsample_cross_entropy(x, target, reduction=reduction)
        x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = ops.upsample_cross_entropy(x, target, reduction=reduction)
        assert torch.equal(loss.detach(), expected)
        loss.sum().backward()
        assert x.grad.dtype == torch.float32
