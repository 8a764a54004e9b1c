"""Losses against PyTorch's interpolate, cross_entropy and softmax in float64, and by hand."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deeplab_fast.engine.losses import SegmentationLoss, class_weights_from_counts

KINDS = ["cross_entropy", "hard_pixels", "focal", "dice", "cross_entropy+dice"]
every_kind = pytest.mark.parametrize("kind", KINDS)
both_alignments = pytest.mark.parametrize(
    "align_corners", [False, True], ids=["centres", "corners"]
)
both_sizes = pytest.mark.parametrize("labels", ["full", "downsampled"])


def make(classes: int = 5, size: tuple[int, int] = (4, 6), dtype=torch.float64) -> Tensor:
    return (3 * torch.randn(2, classes, *size, dtype=torch.float64)).to(dtype).requires_grad_()


def make_target(classes: int = 5, size: tuple[int, int] = (19, 32), ignored: float = 0.3) -> Tensor:
    target = torch.randint(0, classes, (2, *size))
    return torch.where(torch.rand(2, *size) < ignored, 255, target)


def upsample(logits: Tensor, target: Tensor, align_corners: bool = False) -> Tensor:
    return F.interpolate(
        logits, size=target.shape[1:], mode="bilinear", align_corners=align_corners
    )


def plain_dice(full: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    p = full.softmax(1)
    valid = target != ignore_index
    terms = []
    for c in range(full.shape[1]):
        truth = (target[valid] == c).to(p.dtype)
        q = p[:, c][valid]
        if truth.any():
            terms.append(2 * (q * truth).sum() / ((q * q).sum() + truth.sum()))
    return 1 - sum(terms) / len(terms)


def assert_same_with_gradient(loss: SegmentationLoss, expected, logits: Tensor, target: Tensor):
    """fp64 on both sides: sums of a few thousand terms in another order."""
    got = loss(logits, target)
    want = expected(logits, target)
    assert got.shape == () and got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    (got_grad,) = torch.autograd.grad(3.0 * got, logits)
    (want_grad,) = torch.autograd.grad(3.0 * want, logits)
    assert want_grad.norm() > 0
    assert (got_grad - want_grad).norm() <= 1e-12 * want_grad.norm()


@both_alignments
@pytest.mark.parametrize(
    ("classes", "weights", "smoothing"),
    [
        pytest.param(5, None, 0.0, id="plain"),
        pytest.param(2, None, 0.0, id="2 classes"),
        pytest.param(5, [0.2, 0.0, 3.0, 1.0, 7.5], 0.1, id="weights, one of them 0, and smoothing"),
    ],
)
def test_cross_entropy_of_upsampled_logits(classes, weights, smoothing, align_corners):
    loss = SegmentationLoss(
        class_weights=weights, label_smoothing=smoothing, align_corners=align_corners
    )
    weight = None if weights is None else torch.tensor(weights).double()

    def expected(logits: Tensor, target: Tensor) -> Tensor:
        full = upsample(logits, target, align_corners)
        return F.cross_entropy(full, target, weight, ignore_index=255, label_smoothing=smoothing)

    assert_same_with_gradient(loss, expected, make(classes), make_target(classes))


# (full length, logits, corners) -> nearest labels.
NEAREST = [
    pytest.param(8, 2, False, [2, 6], id="even ratio: the later one of the two in the middle"),
    pytest.param(9, 3, False, [1, 4, 7], id="odd ratio"),
    pytest.param(5, 3, False, [0, 2, 4], id="no integer ratio: centres at 0.33, 2, 3.67"),
    pytest.param(8, 1, False, [4], id="one logit"),
    pytest.param(2, 4, False, [0, 0, 1, 1], id="more logits than labels"),
    pytest.param(3, 3, False, [0, 1, 2], id="same size"),
    pytest.param(8, 2, True, [0, 7], id="corners"),
    pytest.param(33, 5, True, [0, 8, 16, 24, 32], id="corners as in DeepLabv2: every 8th"),
    pytest.param(6, 4, True, [0, 2, 3, 5], id="corners: 0, 1.67, 3.33, 5"),
    pytest.param(8, 1, True, [0], id="corners, one logit: interpolate's corner"),
]


@pytest.mark.parametrize(("length", "count", "align_corners", "nearest"), NEAREST)
@pytest.mark.parametrize("dim", [1, 2], ids=["rows", "columns"])
def test_downsampled_labels(length, count, align_corners, nearest, dim):
    # As many classes as places, so that another place is another label.
    places = torch.randperm(length)
    shape = (-1, 1) if dim == 1 else (1, -1)
    target = places.view(1, *shape).expand(2, -1, -1)
    logits = make(length, (count, 1) if dim == 1 else (1, count))
    loss = SegmentationLoss(labels="downsampled", align_corners=align_corners)

    def expected(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, places[nearest].view(1, *shape).expand(2, -1, -1))

    assert_same_with_gradient(loss, expected, logits, target)


def test_downsampled_as_interpolates_nearest_exact():
    # Ratios that are powers of two are exact in interpolate's fp32 too.
    target = make_target(5, (32, 24))
    nearest = F.interpolate(target[:, None].double(), size=(4, 6), mode="nearest-exact")
    assert_same_with_gradient(
        SegmentationLoss(labels="downsampled"),
        lambda z, _: F.cross_entropy(z, nearest[:, 0].long(), ignore_index=255),
        make(),
        target,
    )


def test_hard_pixels_by_hand():
    # Two classes with logits (0, -x) and label 0 lose ln(1 + e^-x); the last pixel is ignored.
    x = torch.tensor([[0.0, 5.0, -2.0, 1.0, -9.0]], dtype=torch.float64)
    logits = torch.stack([torch.zeros_like(x), -x]).view(1, 2, 1, 5)
    target = torch.tensor([[[0, 0, 0, 0, 255]]])
    loss = SegmentationLoss(kind="hard_pixels", top_k=0.5)(logits, target)
    assert loss.item() == pytest.approx(
        (math.log(2) + math.log1p(math.exp(2))) / 2, rel=1e-14, abs=0
    )


@both_alignments
@pytest.mark.parametrize(
    ("options", "ignored", "kept"),
    [
        pytest.param({}, 0, 304, id="a quarter of 1216 pixels"),
        pytest.param({"top_k": 0.1}, 0, 122, id="121.6 pixels are 122"),
        pytest.param({"top_k": 0.1}, 1211, 1, id="half a pixel is one"),
        pytest.param({"top_k": 1e-6}, 0, 1, id="far below a pixel is one"),
        pytest.param({"top_k": 0.5}, 1000, 108, id="of the pixels that are not ignored"),
        pytest.param({"top_k": 1.0}, 500, 716, id="all of them"),
        pytest.param({"min_kept": 400}, 0, 400, id="min_kept is more"),
        pytest.param({"min_kept": 200}, 0, 304, id="min_kept is less"),
        pytest.param({"min_kept": 400}, 1000, 216, id="min_kept is more than there are"),
        pytest.param({"min_kept": 10**6}, 0, 1216, id="min_kept is more than the image has"),
    ],
)
def test_hard_pixels_of_upsampled_logits(options, ignored, kept, align_corners):
    target = make_target(ignored=0.0)
    target.view(-1)[torch.randperm(target.numel())[:ignored]] = 255
    loss = SegmentationLoss(kind="hard_pixels", align_corners=align_corners, **options)

    def expected(logits: Tensor, target: Tensor) -> Tensor:
        full = upsample(logits, target, align_corners)
        losses = F.cross_entropy(full, target, ignore_index=255, reduction="none")
        return losses[target != 255].sort(descending=True).values[:kept].mean()

    assert_same_with_gradient(loss, expected, make(), target)


def test_hard_pixels_rank_weighted_and_smoothed_losses():
    weights = [0.1, 1.0, 20.0, 0.0, 2.0]
    loss = SegmentationLoss(
        kind="hard_pixels", class_weights=weights, label_smoothing=0.2, labels="downsampled"
    )

    def expected(logits: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(
            logits,
            target,
            torch.tensor(weights).double(),
            ignore_index=255,
            label_smoothing=0.2,
            reduction="none",
        )
        valid = losses[target != 255]
        return valid.sort(descending=True).values[: round(len(valid) / 4)].mean()

    assert_same_with_gradient(loss, expected, make(size=(9, 8)), make_target(size=(9, 8)))


def test_dice_by_hand():
    # (probabilities of the three classes, label); class 2 is in no label, the last is ignored.
    pixels = [((0.6, 0.3, 0.1), 0), ((0.5, 0.25, 0.25), 1), ((0.01, 0.01, 0.98), 255)]
    p = torch.tensor([p for p, _ in pixels], dtype=torch.float64)
    target = torch.tensor([label for _, label in pixels]).view(1, 1, 3)
    dice_0 = 2 * 0.6 / (0.36 + 0.25 + 1)
    dice_1 = 2 * 0.25 / (0.09 + 0.0625 + 1)
    loss = SegmentationLoss(kind="dice")(p.log().T.reshape(1, 3, 1, 3), target)
    assert loss.item() == pytest.approx(1 - (dice_0 + dice_1) / 2, rel=1e-14, abs=0)


@both_alignments
@pytest.mark.parametrize(
    ("classes", "present"),
    [
        pytest.param(5, [0, 1, 2, 3, 4], id="all classes"),
        pytest.param(5, [1, 4], id="absent classes are left out of the mean"),
        pytest.param(2, [0, 1], id="2 classes"),
        pytest.param(2, [1], id="one class of two"),
    ],
)
def test_dice_of_upsampled_logits(classes, present, align_corners):
    target = torch.tensor(present)[torch.randint(0, len(present), (2, 19, 32))]
    target[:, 3:7] = 255
    assert_same_with_gradient(
        SegmentationLoss(kind="dice", align_corners=align_corners),
        lambda z, t: plain_dice(upsample(z, t, align_corners), t),
        make(classes),
        target,
    )


def test_dice_of_a_class_that_no_probability_is_left_for():
    # fp32 softmax is exactly 0 for class 2, which no label has: 0 / 0 must not reach the loss.
    logits = torch.tensor([2.0, 1.0, -1e4]).view(1, 3, 1, 1).repeat(1, 1, 2, 2).requires_grad_()
    target = torch.tensor([[[0, 1], [1, 0]]])
    loss = SegmentationLoss(kind="dice")(logits, target)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    # fp32: a dozen operations on values around 1.
    assert loss.item() == pytest.approx(
        plain_dice(logits.detach().double(), target).item(), rel=1e-6
    )


@both_sizes
def test_cross_entropy_and_dice(labels):
    weights = [1.0, 2.0, 0.5, 4.0, 1.0]
    loss = SegmentationLoss(
        kind="cross_entropy+dice",
        class_weights=weights,
        label_smoothing=0.1,
        dice_weight=0.25,
        labels=labels,
    )

    def expected(logits: Tensor, target: Tensor) -> Tensor:
        if labels == "full":
            logits = upsample(logits, target)
        else:
            # The nearest label of a cell of 8 is its fifth.
            target = target[:, 4::8][:, :, 4::8]
        cross_entropy = F.cross_entropy(
            logits,
            target,
            torch.tensor(weights).double(),
            ignore_index=255,
            label_smoothing=0.1,
        )
        return cross_entropy + 0.25 * plain_dice(logits, target)

    assert_same_with_gradient(loss, expected, make(), make_target(size=(32, 48)))


@both_alignments
@pytest.mark.parametrize(
    ("classes", "weights", "gamma"),
    [
        pytest.param(5, None, 2.0, id="plain"),
        pytest.param(5, [0.2, 0.0, 3.0, 1.0, 7.5], 0.5, id="weights, one of them 0"),
        pytest.param(5, [0.2, 0.0, 3.0, 1.0, 7.5], 0.0, id="gamma 0 is cross entropy"),
        pytest.param(1, [0.2, 3.0], 2.0, id="one class"),
    ],
)
def test_focal_of_upsampled_logits(classes, weights, gamma, align_corners):
    loss = SegmentationLoss(
        kind="focal", focal_gamma=gamma, class_weights=weights, align_corners=align_corners
    ).double()

    def expected(logits, target):
        full = upsample(logits, target, align_corners)
        full = torch.cat([torch.zeros_like(full), full], 1) if classes == 1 else full
        valid = target != 255
        p = full.softmax(1).permute(0, 2, 3, 1)[valid].gather(1, target[valid][:, None])[:, 0]
        w = torch.ones(full.shape[1]) if weights is None else torch.tensor(weights)
        w = w.double()[target[valid]]
        return (-w * (1 - p) ** gamma * p.log()).sum() / w.sum()

    target = make_target(max(2, classes))
    assert_same_with_gradient(loss, expected, make(classes), target)


def test_focal_of_pixels_that_are_certain():
    logits = torch.tensor([80.0, -80.0]).view(1, 2, 1, 1).requires_grad_()
    for label, value in ((0, 0.0), (1, 160.0)):
        loss = SegmentationLoss(kind="focal", focal_gamma=0.5)(logits, torch.full((1, 2, 2), label))
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.item() == pytest.approx(value) and grad.isfinite().all()


@both_alignments
@both_sizes
@pytest.mark.parametrize(
    ("weights", "smoothing"),
    [
        pytest.param(None, 0.0, id="plain"),
        pytest.param([0.3, 2.0], 0.0, id="weights"),
        pytest.param(None, 0.2, id="smoothing"),
    ],
)
def test_one_class_is_binary_cross_entropy(weights, smoothing, labels, align_corners):
    loss = SegmentationLoss(
        class_weights=weights,
        label_smoothing=smoothing,
        labels=labels,
        align_corners=align_corners,
    ).double()

    def expected(logits, target):
        if labels == "full":
            z = upsample(logits, target, align_corners)[:, 0]
        else:
            z, target = (
                logits[:, 0],
                target[:, ::4, ::4] if align_corners else target[:, 2::4, 2::4],
            )
        valid = target != 255
        y = target[valid].double()
        w = torch.ones(2) if weights is None else torch.tensor(weights)
        w = w.double()[target[valid]]
        smooth = y * (1 - smoothing) + smoothing / 2
        losses = F.binary_cross_entropy_with_logits(z[valid], smooth, reduction="none")
        return (w * losses).sum() / w.sum()

    # Every fourth pixel is nearest to a logit in either alignment.
    size = (17, 25) if align_corners else (20, 28)
    logits = make(1, (5, 7))
    assert_same_with_gradient(loss, expected, logits, make_target(2, size))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"kind": "dice"}, id="dice"),
        pytest.param({"kind": "hard_pixels", "top_k": 0.1}, id="hard pixels"),
        pytest.param({"kind": "cross_entropy+dice", "class_weights": [1.0, 4.0]}, id="both"),
    ],
)
def test_one_class_is_the_pair_of_zero_and_its_logit(options):
    loss = SegmentationLoss(**options).double()

    def expected(logits, target):
        return loss(torch.cat([torch.zeros_like(logits), logits], 1), target)

    assert_same_with_gradient(loss, expected, make(1), make_target(2))
    with pytest.raises(ValueError, match="label 2"):
        loss(make(1), torch.full((2, 19, 32), 2))


@every_kind
@both_sizes
def test_everything_ignored_is_nan_without_gradient(kind, labels):
    logits = make()
    loss = SegmentationLoss(kind=kind, labels=labels)(logits, torch.full((2, 19, 32), 255))
    assert loss.isnan()
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@every_kind
def test_empty_batch(kind):
    logits = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = SegmentationLoss(kind=kind)(logits, torch.zeros(0, 8, 8, dtype=torch.long))
    assert loss.isnan() and loss.shape == ()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_loss_is_fp32(kind, dtype):
    logits, target = make(dtype=dtype), make_target()
    loss = SegmentationLoss(kind=kind)
    got = loss(logits, target)
    assert got.dtype == torch.float32
    # The same rounded logits, computed in fp64. fp32: at most about 1000 roundings a term, of
    # 2^-24 each and of random sign, and none for the logits' own dtype.
    assert got.item() == pytest.approx(loss(logits.detach().double(), target).item(), rel=4e-6)
    got.backward()
    assert logits.grad.dtype == dtype and logits.grad.isfinite().all()


@every_kind
def test_autocast_changes_nothing(kind):
    logits, target = make(dtype=torch.bfloat16), make_target()
    loss = SegmentationLoss(kind=kind)
    expected = loss(logits, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(logits, target), expected)


@every_kind
def test_compiles_as_one_graph(kind):
    logits, target = make(), make_target()
    loss = SegmentationLoss(kind=kind)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert torch.equal(compiled(logits, target), loss(logits, target))


@every_kind
@both_sizes
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_label_dtypes(kind, labels, dtype):
    logits, target = make(), make_target()
    loss = SegmentationLoss(kind=kind, labels=labels)
    assert torch.equal(loss(logits, target.to(dtype)), loss(logits, target))


@every_kind
def test_uint8_labels_do_not_wrap_around(kind):
    # 300 - 256 = 44 and 412 - 256 = 156 are labels.
    logits = make(300, (2, 3))
    target = torch.tensor([[[44, 156], [0, 255]]] * 2)
    loss = SegmentationLoss(kind=kind, ignore_index=412, top_k=0.5)
    assert torch.equal(loss(logits, target.to(torch.uint8)), loss(logits, target))


@every_kind
def test_another_ignore_index(kind):
    # CamVid's: the class after the last one.
    logits, target = make(11), make_target(11)
    moved = torch.where(target == 255, 11, target)
    assert torch.equal(
        SegmentationLoss(kind=kind, ignore_index=11)(logits, moved),
        SegmentationLoss(kind=kind)(logits, target),
    )


@every_kind
def test_label_out_of_range(kind):
    target = make_target()
    target[1, 2, 3] = 5
    with pytest.raises(ValueError, match=r"label 5 at \(image 1, row 2, column 3\)"):
        SegmentationLoss(kind=kind)(make(), target)


@every_kind
def test_shapes_and_dtypes_that_do_not_fit(kind):
    loss = SegmentationLoss(kind=kind)
    with pytest.raises(ValueError, match="expected one non-empty label map"):
        loss(make(), make_target()[:1])
    with pytest.raises(ValueError, match=r"logits must be a tensor \[N, C, H, W\]"):
        loss(make()[0], make_target())
    with pytest.raises(TypeError, match="target has dtype float32"):
        loss(make(), make_target().float())


def test_number_of_class_weights():
    with pytest.raises(ValueError, match="4 weights for logits of 5 classes"):
        SegmentationLoss(class_weights=[1.0] * 4)(make(), make_target())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "focl"}, "kind must be one of 'cross_entropy', "),
        ({"labels": "half"}, "labels must be one of 'full', 'downsampled', got 'half'"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"top_k": 0.0}, "top_k"),
        ({"top_k": 25}, "top_k"),
        ({"min_kept": -1}, "min_kept"),
        ({"dice_weight": math.nan}, "dice_weight"),
        ({"focal_gamma": -0.5}, "focal_gamma"),
        ({"kind": "focal", "label_smoothing": 0.1}, "'focal' has no label_smoothing"),
        ({"class_weights": []}, "class_weights"),
        ({"class_weights": [1.0, -1.0]}, "class_weights"),
        ({"class_weights": [1.0, math.inf]}, "class_weights"),
        ({"class_weights": [0.0, 0.0]}, "class_weights"),
        ({"kind": "dice", "class_weights": [1.0]}, "'dice' has no class_weights"),
        ({"kind": "dice", "label_smoothing": 0.1}, "'dice' has no class_weights"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(ValueError, match=text):
        SegmentationLoss(**options)


def test_options_are_fixed():
    loss = SegmentationLoss(top_k=0.5)
    with pytest.raises(AttributeError, match="top_k is fixed"):
        loss.top_k = 0.1
    assert loss.top_k == 0.5


def test_class_weights_are_a_buffer_outside_the_state_dict():
    loss = SegmentationLoss(class_weights=[1.0, 2.0])
    assert loss.state_dict() == {} and list(loss.parameters()) == []
    assert [name for name, _ in loss.named_buffers()] == ["class_weights"]
    assert loss.to("meta").class_weights.device.type == "meta"


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(way):
    loss = SegmentationLoss(kind="hard_pixels", top_k=0.1, class_weights=[1.0, 2.0, 3.0, 4.0, 5.0])
    logits, target = make(), make_target()
    assert torch.equal(way(loss)(logits, target), loss(logits, target))


def test_weights_by_median_frequency():
    # Median of 10, 20, 60 and 100 is 40; class 2 was not seen.
    weights = class_weights_from_counts([10, 20, 0, 60, 100])
    assert weights == pytest.approx((4.0, 2.0, 1.0, 2 / 3, 0.4), rel=1e-15, abs=0)
    assert class_weights_from_counts([4, 2, 8]) == (1.0, 2.0, 0.5)


def test_weights_by_inverse_log():
    weights = class_weights_from_counts([1, 3, 0], "inverse_log")
    expected = (1 / math.log(1.27), 1 / math.log(1.77), 1 / math.log(1.02))
    assert weights == pytest.approx(expected, rel=1e-14, abs=0)


def test_weights_fit_the_loss():
    weights = class_weights_from_counts([5, 1, 1, 9, 0])
    assert SegmentationLoss(class_weights=weights)(make(), make_target()).isfinite()


@pytest.mark.parametrize(
    ("counts", "method", "text"),
    [
        ([], "median_frequency", "pixel_counts"),
        ([0, 0], "median_frequency", "pixel_counts"),
        ([3, -1], "inverse_log", "pixel_counts"),
        ([3, 1], "inverse", "method must be one of 'median_frequency', 'inverse_log'"),
    ],
)
def test_counts_that_give_no_weights(counts, method, text):
    with pytest.raises(ValueError, match=text):
        class_weights_from_counts(counts, method)


def test_building_blocks_do_not_import_lightning():
    names = ", ".join(
        f"deeplab_fast.engine.{m}" for m in ("losses", "schedule", "batch_norm", "bootstrap")
    )
    code = (
        f"import sys, {names}\n"
        "heavy = {'lightning', 'pytorch_lightning', 'torchmetrics', 'tensorboard', 'torchvision'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
