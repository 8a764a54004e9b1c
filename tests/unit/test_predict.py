"""Prediction with small models whose results can be worked out by plain PyTorch."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import deeplab_fast as dlf
from deeplab_fast import ops
from deeplab_fast.data.images import ImageReadError
from deeplab_fast.data.preprocess import Preprocess
from deeplab_fast.engine import runner as module
from deeplab_fast.engine.finite import NotFiniteWarning
from deeplab_fast.engine.predict import predict


class Small(nn.Module):
    """One convolution of stride `stride`; records what it was given."""

    def __init__(self, stride=4, num_classes=5, align_corners=False):
        super().__init__()
        kernel = 1 if stride == 1 else 2 * stride - 1
        self.conv = nn.Conv2d(3, num_classes, kernel, stride, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(num_classes)
        self.num_classes = num_classes
        self.align_corners = align_corners
        self.output_stride = stride
        self.preprocess = Preprocess()
        self.inputs = []
        # Large weights: probabilities far from uniform, so that means of them matter.
        nn.init.normal_(self.conv.weight, std=4 / kernel)
        self.eval()

    def forward_logits(self, x):
        assert torch.is_inference_mode_enabled() and not self.training
        self.inputs.append((tuple(x.shape), x.dtype))
        return self.norm(self.conv(x))

    def plain(self, x):
        with torch.no_grad():
            return self.norm(self.conv(x))


def pixelwise(**options):
    return Small(stride=1, **options)


def upsampled(model, logits, size):
    return F.interpolate(logits, size, mode="bilinear", align_corners=model.align_corners)


def resized(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)


def mean_probabilities(model, x, base, out, scales, flip):
    """The paper's multi-scale inference, written with full-size copies."""
    passes = []
    for scale in scales:
        y = x if scale == 1 else resized(x, [math.floor(n * scale + 0.5) for n in base])
        passes.append(upsampled(model, model.plain(y), out).softmax(1))
        if flip:
            passes.append(upsampled(model, model.plain(y.flip(-1)), out).softmax(1).flip(-1))
    return torch.stack(passes).mean(0)


def assert_labels(labels, scores):
    """Labels are the argmax, up to classes that fp32 cannot tell apart."""
    best, second = scores.topk(2, dim=1).values.unbind(1)
    clear = best - second > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(labels.long()[clear], scores.argmax(1)[clear])


def assert_same(labels, expected):
    """Equal but for a few pixels: a convolution may round differently in another batch."""
    assert labels.dtype == expected.dtype and labels.shape == expected.shape
    assert (torch.as_tensor(labels) == torch.as_tensor(expected)).float().mean() > 0.995


def photo(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def calls(monkeypatch):
    """Records (logits shape, result size) of every upsample_argmax."""
    seen = []
    original = ops.upsample_argmax

    def recorded(logits, size, **options):
        seen.append((tuple(logits.shape), tuple(size)))
        return original(logits, size, **options)

    monkeypatch.setattr(ops, "upsample_argmax", recorded)
    return seen


@pytest.mark.parametrize("align_corners", [False, True])
def test_float_tensor(calls, align_corners):
    model = Small(align_corners=align_corners)
    x = torch.randn(2, 3, 33, 46)
    labels = predict(model, x)
    assert labels.dtype == torch.uint8 and labels.shape == (2, 33, 46)
    assert_labels(labels, upsampled(model, model.plain(x), (33, 46)))
    # Both images in one run, straight from low-resolution logits.
    assert calls == [((2, 5, 9, 12), (33, 46))]
    assert_same(predict(model, x[1]), labels[1])


def test_photo_goes_from_low_resolution_logits_to_its_own_size(calls):
    model = Small()
    model.preprocess = Preprocess(size=24)
    image = photo(50, 70)
    labels = predict(model, image)
    assert isinstance(labels, np.ndarray) and labels.dtype == np.uint8
    assert calls == [((1, 5, 6, 9), (50, 70))]
    logits = model.plain(model.preprocess(image))
    assert_labels(torch.from_numpy(labels)[None], upsampled(model, logits, (50, 70)))


def test_every_form_of_the_same_photo_gives_the_same(tmp_path):
    model = Small()
    image = photo(21, 34)
    path = tmp_path / "a.png"
    Image.fromarray(image).save(path)
    rgba = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
    expected = predict(model, image)
    for form in (path, str(path), Image.fromarray(image), rgba):
        np.testing.assert_array_equal(predict(model, form), expected)
    several = predict(model, [path, image])
    assert isinstance(several, list)
    np.testing.assert_array_equal(several[0], expected)
    np.testing.assert_array_equal(several[1], expected)
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
    assert torch.equal(predict(model, tensor), torch.from_numpy(expected))
    batch = predict(model, torch.stack([tensor, tensor]))
    assert batch.shape == (2, 21, 34)
    assert_same(batch[1], torch.from_numpy(expected))


def test_a_list_of_any_sizes_keeps_its_order_and_batches_equal_sizes():
    model = Small()
    images = [photo(20, 30, s) for s in range(3)] + [photo(16, 30, 3), photo(20, 30, 4)]
    expected = [predict(model, image) for image in images]
    model.inputs.clear()
    results = predict(model, images, batch_size=2)
    assert [shape[0] for shape, _ in model.inputs] == [2, 1, 1, 1]
    for result, one in zip(results, expected, strict=True):
        assert_same(result, one)
    assert predict(model, []) == []


def test_batch_size_of_a_tensor():
    model = Small()
    x = torch.randn(5, 3, 16, 16)
    whole = predict(model, x)
    model.inputs.clear()
    assert_same(predict(model, x, batch_size=2), whole)
    assert [shape[0] for shape, _ in model.inputs] == [2, 2, 1]


def test_an_empty_batch():
    model = Small()
    labels, prob = predict(model, torch.zeros(0, 3, 8, 9), return_prob=True)
    assert labels.shape == prob.shape == (0, 8, 9) and labels.dtype == torch.uint8
    assert predict(model, torch.zeros(0, 3, 8, 9)).shape == (0, 8, 9)


def test_above_256_classes_labels_are_int64():
    for model, options in (
        (pixelwise(num_classes=300), {}),
        (pixelwise(num_classes=300), {"flip": True}),
        (pixelwise(num_classes=300), {"tile": (4, 4)}),
    ):
        x = torch.randn(1, 3, 6, 7)
        labels = predict(model, x, **options)
        assert labels.dtype == torch.int64
        assert_labels(labels, model.plain(x).softmax(1)) if not options else None
    assert predict(pixelwise(num_classes=256), x).dtype == torch.uint8


PAPER_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@pytest.mark.parametrize(
    ("scales", "flip"),
    [
        pytest.param(PAPER_SCALES, True, id="paper"),
        pytest.param(PAPER_SCALES, False, id="scales-only"),
        pytest.param((1.0,), True, id="flip-only"),
        pytest.param((0.75,), True, id="one-other-scale"),
    ],
)
def test_mean_of_probabilities_of_a_tensor(scales, flip):
    model = Small()
    x = torch.randn(2, 3, 30, 41)
    labels, prob = predict(model, x, scales=scales, flip=flip, return_prob=True)
    mean = mean_probabilities(model, x, (30, 41), (30, 41), scales, flip)
    assert_labels(labels, mean)
    # Softmax and a sum of up to 12 terms of at most 1: some 20 roundings of 2^-24.
    torch.testing.assert_close(prob, mean.amax(1), rtol=0, atol=2e-6)
    assert labels.dtype == torch.uint8 and prob.dtype == torch.float32


def test_mean_of_probabilities_of_a_photo():
    # Every scale is made from the photo itself, not from its resized copy.
    model = Small()
    model.preprocess = Preprocess(size=20)
    image = photo(40, 60)
    labels, prob = predict(model, image, scales=(0.5, 2.0), flip=True, return_prob=True)
    passes = []
    for size in ((10, 15), (40, 60)):
        x = Preprocess(size=size)(image)
        for y in (x, x.flip(-1)):
            full = upsampled(model, model.plain(y), (40, 60)).softmax(1)
            passes.append(full if y is x else full.flip(-1))
    mean = torch.stack(passes).mean(0)
    assert_labels(torch.from_numpy(labels)[None], mean)
    np.testing.assert_allclose(prob, mean.amax(1)[0].numpy(), rtol=0, atol=2e-6)


def test_one_scale_alone_is_a_single_pass(calls):
    model = Small()
    x = torch.randn(1, 3, 32, 32)
    labels = predict(model, x, scales=0.5)
    assert calls == [((1, 5, 4, 4), (32, 32))]
    assert_labels(labels, upsampled(model, model.plain(resized(x, (16, 16))), (32, 32)))


def test_scaled_sizes_of_aligned_corners():
    # 33 pixels are 32 steps: half of them are 16 steps, 17 pixels.
    model = Small(align_corners=True)
    predict(model, torch.randn(1, 3, 33, 65), scales=(0.5, 2.0))
    assert [shape[-2:] for shape, _ in model.inputs] == [(17, 33), (65, 129)]
    model = Small()
    predict(model, torch.randn(1, 3, 33, 1), scales=(0.5, 0.25))
    assert [shape[-2:] for shape, _ in model.inputs] == [(17, 1), (8, 1)]


def test_flip_commutes_with_mirroring():
    # 29 columns: an odd width at stride 4, where a wrong mirror shifts the map.
    model = Small()
    x = torch.randn(1, 3, 24, 29)
    labels, prob = predict(model, x, flip=True, return_prob=True)
    mirrored, mirrored_prob = predict(model, x.flip(-1), flip=True, return_prob=True)
    # The two passes are summed in the other order, which is exact for two terms.
    assert torch.equal(labels, mirrored.flip(-1))
    torch.testing.assert_close(prob, mirrored_prob.flip(-1), rtol=0, atol=1e-6)
    alone = predict(model, x)
    assert not torch.equal(alone, labels)


def test_flip_changes_nothing_for_a_symmetric_model():
    model = pixelwise()
    x = torch.randn(1, 3, 9, 14)
    labels, prob = predict(model, x, return_prob=True)
    flipped_labels, flipped_prob = predict(model, x, flip=True, return_prob=True)
    assert torch.equal(labels, flipped_labels)
    torch.testing.assert_close(prob, flipped_prob, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "tile", "overlap"),
    [
        pytest.param((37, 53), (16, 20), 0.25, id="default-overlap"),
        pytest.param((37, 53), (16, 20), 0.0, id="no-overlap"),
        pytest.param((32, 40), (16, 20), 0.0, id="whole-number-of-tiles"),
        pytest.param((37, 53), (16, 20), 0.9, id="many-windows-over-a-pixel"),
        pytest.param((37, 53), (64, 20), 0.5, id="higher-than-the-image"),
        pytest.param((37, 53), (16, 99), 0.5, id="wider-than-the-image"),
        pytest.param((37, 53), (64, 64), 0.5, id="one-window"),
        pytest.param((7, 9), (1, 1), 0.5, id="one-pixel-windows"),
        pytest.param((17, 17), 16, 0.25, id="one-pixel-too-large"),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 3])
def test_windows_of_a_pixelwise_model_equal_the_whole_image(size, tile, overlap, batch_size):
    model = pixelwise()
    x = torch.randn(2, 3, *size)
    labels, prob = predict(
        model, x, tile=tile, overlap=overlap, batch_size=batch_size, return_prob=True
    )
    full = model.plain(x).softmax(1)
    assert_labels(labels, full)
    # The weights sum to 1 within a few roundings of 2^-24 each.
    torch.testing.assert_close(prob, full.amax(1), rtol=0, atol=2e-6)
    assert labels.dtype == torch.uint8
    assert max(shape[0] for shape, _ in model.inputs) <= max(2, batch_size or 1)


@pytest.mark.parametrize(
    ("align_corners", "size", "tile"),
    [
        pytest.param(False, 20, (12, 16), id="smaller"),
        pytest.param(True, 20, (12, 16), id="smaller, corners aligned"),
        pytest.param(False, 47, (33, 20), id="larger"),
        pytest.param(True, 47, (33, 20), id="larger, corners aligned"),
        pytest.param(False, (11, 60), (11, 16), id="one axis smaller, one larger, one row"),
        pytest.param(False, 20, (1, 99), id="windows of one row"),
        # Rows of the network's map that no row of the result needs lie between windows.
        pytest.param(False, 130, (33, 40), id="four times larger"),
        pytest.param(True, 130, (33, 40), id="four times larger, corners aligned"),
    ],
)
def test_windows_of_a_photo_are_cut_at_the_models_scale(align_corners, size, tile):
    model = pixelwise(align_corners=align_corners)
    model.preprocess = Preprocess(size=size)
    image = photo(30, 41)
    labels, prob = predict(model, image, tile=tile, overlap=0.4, return_prob=True)
    x = model.preprocess(image)
    assert {shape[-2:] for shape, _ in model.inputs} == {
        tuple(min(n, m) for n, m in zip(tile, x.shape[-2:], strict=True))
    }
    full = upsampled(model, model.plain(x).softmax(1), (30, 41))
    assert_labels(torch.from_numpy(labels)[None], full)
    # The weights sum to 1 within a few roundings of 2^-24 each; a level that a half was rounded
    # the other way is a 255th of a photo.
    off = np.abs(prob - full.amax(1)[0].numpy())
    assert np.quantile(off, 0.98) < 4e-6 and off.max() < 0.1


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="one pass"),
        pytest.param({"scales": (0.5, 1.0), "flip": True}, id="several"),
    ],
)
def test_a_photo_that_fits_one_window_is_as_without(options):
    model = Small()
    model.preprocess = Preprocess(size=24)
    image = photo(90, 120)
    whole, prob = predict(model, image, return_prob=True, **options)
    tiled, tiled_prob = predict(model, image, tile=(24, 32), return_prob=True, **options)
    np.testing.assert_array_equal(tiled, whole)
    np.testing.assert_array_equal(tiled_prob, prob)


def test_rows_that_come_in_parts_are_those_of_the_whole_map():
    rng = np.random.default_rng(0)
    for _ in range(200):
        have = rng.integers(1, 91, 2)
        want = np.clip(have * 10 ** rng.uniform(-1, 0.9, 2), 1, 400).astype(int)
        align_corners = bool(rng.integers(2))
        x = torch.from_numpy(rng.random((1, 2, *have), np.float32))
        ends = rng.choice(have[0] + 1, rng.integers(0, have[0] + 1), replace=False)
        parts = np.split(np.arange(have[0]), np.sort(ends))
        rows = module.InterpolatedRows(
            tuple(have.tolist()), tuple(want.tolist()), align_corners, int(rng.integers(1, 20))
        )
        found = torch.cat([r for part in parts for r in rows.add(x[:, :, part])], dim=2)
        whole = F.interpolate(x, tuple(want.tolist()), mode="bilinear", align_corners=align_corners)
        # Neighbours differ by at most 1, and a position of up to 91 is off by a few 91 * 2^-24.
        off = (found - whole).abs().max()
        assert off < 5e-5, (have, want, align_corners)


def test_windows_at_the_photos_own_scale_are_asked_for():
    model = pixelwise()
    image = photo(30, 40)
    whole = predict(model, image)
    model.preprocess = Preprocess(size=8)
    model.inputs.clear()
    own = replace(model.preprocess, size=None)
    tiled = predict(model, image, tile=(20, 20), preprocess=own)
    assert {shape[-2:] for shape, _ in model.inputs} == {(20, 20)}
    assert (tiled == whole).mean() > 0.999


@pytest.mark.parametrize(
    ("photo_size", "size", "tile", "text"),
    [
        pytest.param((3000, 4000), 520, (513, 513), "693x520 pixels, 0.173 of 4000x3000, 4 windows "
                     "of 513x513", id="windows"),
        pytest.param((3000, 4000), 520, (520, 700), "693x520 pixels, 0.173 of 4000x3000",
                     id="one window"),
        pytest.param((300, 400), None, None, "400x300 pixels", id="own size"),
    ],
)  # fmt: skip
def test_what_is_run_is_told(photo_size, size, tile, text):
    options = module.PredictOptions.checked(tile=tile)
    plan = module.input_plan(photo_size, Preprocess(size=size), options)
    assert str(plan) == text


def test_windows_are_counted_while_they_run():
    seen = []
    predict(
        pixelwise(),
        photo(30, 40),
        tile=16,
        overlap=0,
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 6), (3, 6), (5, 6), (6, 6)]


def test_photos_of_one_input_size_run_together():
    model = Small()
    model.preprocess = Preprocess(size=24)
    images = [photo(30, 40), photo(60, 80), photo(40, 30), photo(48, 64)]
    for options in ({}, {"flip": True}):
        each = [predict(model, image, return_prob=True, **options) for image in images]
        model.inputs.clear()
        labels, prob = predict(model, images, batch_size=4, return_prob=True, **options)
        # The third is upright, and ends the first group.
        sizes = [(2, 3, 24, 32), (1, 3, 32, 24), (1, 3, 24, 32)]
        assert [shape for shape, _ in model.inputs[:: 1 + len(options)]] == sizes
        for i in range(len(images)):
            # Batched and single convolutions may round differently.
            np.testing.assert_allclose(prob[i], each[i][1], rtol=0, atol=2e-5)
            assert (labels[i] == each[i][0]).mean() > 0.999


def test_separate_windows_equal_separate_images():
    # Without overlap a window is an image of its own, scales and flips included.
    model = Small()
    x = torch.randn(1, 3, 24, 40)
    options = {"scales": (0.5, 1.0, 1.5), "flip": True, "return_prob": True}
    labels, prob = predict(model, x, tile=(12, 20), overlap=0, batch_size=2, **options)
    for top in (0, 12):
        for left in (0, 20):
            rows, columns = slice(top, top + 12), slice(left, left + 20)
            one, one_prob = predict(model, x[..., rows, columns].contiguous(), **options)
            # Batched and single convolutions may round differently.
            torch.testing.assert_close(prob[:, rows, columns], one_prob, rtol=0, atol=2e-5)
            assert (labels[:, rows, columns] == one).float().mean() > 0.99


def test_overlapping_windows_are_blended():
    # Each window of four columns says its own mean; 0.85 and 0.15 are sin^2 and cos^2 of 3 pi / 8.
    class WindowMean(nn.Module):
        align_corners = False

        def forward_logits(self, x):
            p = x.mean((1, 2, 3), keepdim=True).expand(-1, 1, x.shape[2], x.shape[3])
            return torch.cat([p, 1 - p], 1).log()

    x = torch.tensor([0.6, 0.6, 0.6, 0.6, 1.0, 1.0]).expand(1, 3, 4, 6)
    labels, prob = predict(WindowMean(), x, tile=(4, 4), overlap=0.5, return_prob=True)
    a, b = 0.6, 0.8
    near, far = math.sin(3 * math.pi / 8) ** 2, math.sin(math.pi / 8) ** 2
    row = [a, a, near * a + far * b, far * a + near * b, b, b]
    torch.testing.assert_close(prob[0], torch.tensor([row] * 4), rtol=0, atol=1e-6)
    assert not labels.any()


@given(
    length=st.integers(1, 300),
    window=st.integers(1, 300),
    overlap=st.floats(0, 0.99),
)
@settings(max_examples=200, deadline=None)
def test_windows_cover_the_line(length, window, overlap):
    window = min(window, length)
    starts = module.window_starts(length, window, overlap)
    weights = module.window_weights(starts, window, length, torch.device("cpu"))
    assert starts[0] == 0 and starts[-1] == length - window and sorted(set(starts)) == starts
    # At least the overlap asked for, of which a pixel's fraction is cut in favour of more overlap;
    # a window of one pixel cannot overlap.
    steps = np.diff(starts)
    assert all(step <= max(1, window * (1 - overlap)) for step in steps)
    total = torch.zeros(length, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        assert weight.min() > 0
        total[start : start + window] += weight
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    assert weights[0][0] == weights[-1][-1] == 1


def test_a_pixel_of_every_border_is_certain_in_a_single_window():
    (weight,) = module.window_weights([0], 7, 7, torch.device("cpu"))
    assert torch.equal(weight, torch.ones(7))


def test_modes_are_restored_also_after_an_error():
    model = Small().train()
    model.norm.eval()
    before = model.norm.running_mean.clone()
    predict(model, torch.randn(2, 3, 8, 8))
    assert model.training and model.conv.training and not model.norm.training
    assert torch.equal(model.norm.running_mean, before)

    def broken(x):
        raise RuntimeError("broken")

    model.forward_logits = broken
    with pytest.raises(RuntimeError, match="broken"):
        predict(model, torch.randn(1, 3, 8, 8))
    assert model.training and not model.norm.training


def test_results_are_ordinary_tensors():
    x = torch.randn(1, 3, 8, 8)
    for options in ({}, {"flip": True}, {"tile": 4}):
        labels, prob = predict(pixelwise(), x, return_prob=True, **options)
        assert not labels.is_inference() and not prob.is_inference()
        labels[labels == 1] = 255


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16, "fp16"])
def test_low_precision_runs_under_autocast(dtype):
    model = pixelwise()
    seen = []
    model.conv.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    x = torch.randn(1, 3, 40, 40)
    labels = predict(model, x, dtype=dtype)
    assert seen == [torch.float16 if dtype == "fp16" else torch.bfloat16]
    assert model.conv.weight.dtype == torch.float32
    # Eight bits of mantissa move the boundaries a little.
    assert (labels == predict(model, x)).float().mean() > 0.95
    seen.clear()
    predict(model, x, dtype="fp32")
    assert seen == [torch.float32]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_take_the_dtype_of_the_model(dtype):
    model = pixelwise().to(dtype)
    for images in (torch.randn(1, 3, 8, 8), photo(8, 8)):
        predict(model, images, flip=True, scales=(1.0, 0.5))
    assert {seen for _, seen in model.inputs} == {dtype}
    _, prob = predict(model, torch.randn(1, 3, 8, 8), flip=True, return_prob=True)
    assert prob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_model_without_parameters_and_preprocess():
    class Bare(nn.Module):
        align_corners = False

        def forward_logits(self, x):
            return x

    x = torch.randn(1, 3, 5, 6)
    assert torch.equal(predict(Bare(), x), x.argmax(1).to(torch.uint8))
    with pytest.raises(ValueError, match=r"model\.preprocess is None: images need"):
        predict(Bare(), photo(5, 6))


def test_probability_of_a_single_pass():
    model = Small()
    x = torch.randn(1, 3, 18, 22)
    _, prob = predict(model, x, return_prob=True)
    full = upsampled(model, model.plain(x), (18, 22)).softmax(1)
    torch.testing.assert_close(prob, full.amax(1), rtol=0, atol=1e-6)
    lists = predict(model, [photo(9, 9), photo(8, 9)], return_prob=True)
    assert [a.shape for a in lists[0]] == [a.shape for a in lists[1]] == [(9, 9), (8, 9)]
    one, one_prob = predict(model, photo(9, 9), return_prob=True)
    np.testing.assert_array_equal(one, lists[0][0])
    np.testing.assert_array_equal(one_prob, lists[1][0])


def test_an_unreadable_path_is_named(tmp_path):
    with pytest.raises(ImageReadError, match=r"missing\.jpg"):
        predict(Small(), [photo(8, 8), tmp_path / "missing.jpg"])


X = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        pytest.param(X, {"scales": ()}, r"scales is \(\), expected", id="no-scale"),
        pytest.param(X, {"scales": (1, 0)}, "factors above 0", id="scale-0"),
        pytest.param(X, {"scales": (1, float("inf"))}, "factors above 0", id="scale-inf"),
        pytest.param(X, {"scales": "1"}, "scales is '1'", id="scale-text"),
        pytest.param(X, {"tile": (0, 4)}, r"tile is \(0, 4\)", id="tile-0"),
        pytest.param(X, {"tile": (4,)}, r"tile is \(4,\)", id="tile-one-side"),
        pytest.param(X, {"tile": (4.5, 4)}, r"tile is \(4\.5, 4\)", id="tile-float"),
        pytest.param(X, {"tile": 2, "overlap": 1}, r"overlap is 1, .*\[0, 1\)", id="overlap-1"),
        pytest.param(X, {"overlap": -0.1}, "overlap is -0.1", id="overlap-negative"),
        pytest.param(X, {"batch_size": 0}, "batch_size is 0", id="batch-0"),
        pytest.param(X, {"dtype": "int8"}, "dtype is 'int8', expected", id="dtype"),
        pytest.param(X, {"device": "gpu"}, "device is 'gpu', expected cpu, cuda", id="device"),
        pytest.param(X, {"device": "cuda:99"}, "this process sees", id="no-such-gpu"),
        pytest.param(X[0, 0], {}, r"shape \[8, 8\], expected \[N,3,H,W\]", id="rank-2"),
        pytest.param(X[:, :2], {}, r"shape \[1, 2, 8, 8\]", id="two-channels"),
        pytest.param(X[..., :0], {}, "no pixels", id="no-columns"),
        pytest.param(X.int(), {}, "dtype torch.int32, expected", id="int32"),
        pytest.param(7, {}, "images is a int; expected a tensor", id="number"),
        pytest.param([X[0]], {}, r"images\[0\] is a Tensor.*stack tensors", id="list-of-tensors"),
        pytest.param([np.zeros((3, 8, 8))], {}, "channels come last", id="array-nchw"),
    ],
)
def test_bad_arguments(images, options, message):
    model = Small().train()
    with pytest.raises(ValueError, match=message):
        predict(model, images, **options)
    assert not model.inputs and model.training


def test_a_dtype_that_does_not_fit_the_parameters():
    with pytest.raises(ValueError, match=r"dtype fp16 was asked for and .* bf16; leave dtype out"):
        predict(Small().bfloat16(), X, dtype="fp16")
    with pytest.raises(ValueError, match="dtype fp32"):
        predict(Small().bfloat16(), X, dtype="fp32")


def test_any_module_is_a_model_and_nothing_else():
    # What other libraries' models need has its tests in test_adapter.py.
    net = nn.Conv2d(3, 4, 1)
    assert torch.equal(predict(net, X), net(X).argmax(1).to(torch.uint8))
    with pytest.raises(ValueError, match=r"the model is a function, expected a torch\.nn\.Module"):
        predict(net.forward.__func__, X)


def test_preprocess_in_place_of_the_models():
    model = Small()
    image = photo(21, 34)
    other = Preprocess(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), size=16)
    labels = predict(model, image, preprocess=other)
    logits = model.plain(other(image))
    assert_labels(torch.from_numpy(labels)[None], upsampled(model, logits, (21, 34)))
    assert (labels != predict(model, image)).any()
    del model.preprocess
    np.testing.assert_array_equal(predict(model, image, preprocess=other), labels)
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(predict(model, x, preprocess=other), predict(model, x))
    with pytest.raises(ValueError, match=r"preprocess is a str, expected a deeplab_fast\.data"):
        predict(model, image, preprocess="imagenet")


# Logits that are NaN or infinite


class Spoilt(Small):
    """The value in all classes' logits at a place of every image whose pixels are not all 0."""

    def __init__(self, value=math.nan, place=(1, 2), **options):
        super().__init__(**options)
        self.value, self.place = value, place

    def spoil(self, logits, x):
        dirty = x.flatten(1).any(1)
        logits[dirty, :, self.place[0], self.place[1]] = self.value
        return logits

    def forward_logits(self, x):
        return self.spoil(super().forward_logits(x), x)

    def plain(self, x):
        return self.spoil(super().plain(x), x)


def not_finite(model, x, size):
    """[N, H, W] of PyTorch's full logits."""
    return ~upsampled(model, model.plain(x), size).isfinite().all(1)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("value", "classes"),
    [
        pytest.param(math.nan, 5, id="nan"),
        pytest.param(math.inf, 5, id="inf"),
        pytest.param(-math.inf, 5, id="minus-inf"),
        pytest.param(math.nan, 1, id="one-class"),
    ],
)
def test_not_finite_pixels_are_counted_by_image(value, classes, align_corners):
    model = Spoilt(value, num_classes=classes, align_corners=align_corners)
    x = torch.randn(3, 3, 21, 30)
    x[1] = 0
    expected = not_finite(model, x, (21, 30)).sum((1, 2)).tolist()
    assert expected[0] > 0 == expected[1]
    with pytest.warns(NotFiniteWarning, match="of image 0 of the tensor, .* of image 2") as caught:
        predict(model, x)
    assert caught[0].message.pixels == {f"image {i} of the tensor": expected[i] for i in (0, 2)}


@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"flip": True}, id="flip"),
        pytest.param({"scales": (0.5, 1.0)}, id="scales"),
        pytest.param({"tile": (12, 16), "flip": True}, id="windows"),
    ],
)
def test_not_finite_pixels_of_several_passes(options, classes):
    model = Spoilt(num_classes=classes)
    x = torch.randn(1, 3, 20, 28)
    if "tile" in options:
        expected = torch.zeros(20, 28, dtype=torch.bool)
        for top in (0, 8):
            for left in (0, 12):
                window = x[..., top : top + 12, left : left + 16]
                for flipped in (False, True):
                    part = not_finite(model, window.flip(-1) if flipped else window, (12, 16))[0]
                    expected[top : top + 12, left : left + 16] |= part.flip(-1) if flipped else part
    elif "flip" in options:
        expected = not_finite(model, x, (20, 28)) | not_finite(model, x.flip(-1), (20, 28)).flip(-1)
    else:
        parts = [not_finite(model, y, (20, 28)) for y in (resized(x, (10, 14)), x)]
        expected = parts[0] | parts[1]
    with pytest.warns(NotFiniteWarning) as caught:
        predict(model, x, **options)
    assert caught[0].message.pixels == {"image 0 of the tensor": int(expected.sum())}


def test_not_finite_images_are_named(tmp_path):
    model = Spoilt()
    path = tmp_path / "street.png"
    Image.fromarray(photo(20, 30)).save(path)
    with pytest.warns(NotFiniteWarning, match=r"pixels of .*street\.png are NaN or infinite"):
        predict(model, path)
    with pytest.warns(NotFiniteWarning, match=r"street\.png, \d+ pixels of images\[1\] are NaN"):
        predict(model, [path, photo(20, 30)], batch_size=2)
    with pytest.warns(NotFiniteWarning, match="pixels of the image are NaN"):
        predict(model, photo(20, 30))


def test_finite_logits_are_not_warned_of():
    class Huge(Small):
        def forward_logits(self, x):
            # Their sum overflows.
            return torch.full((x.shape[0], 5, 4, 4), torch.finfo(torch.float32).max)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(Huge(), torch.randn(1, 3, 16, 16))
        predict(Spoilt(), torch.zeros(1, 3, 16, 16))


def test_a_long_list_of_images_is_cut_in_the_message_only():
    warning = NotFiniteWarning({f"{i}.png": 1 + i for i in range(13)})
    assert "1 pixel of 0.png, 2 pixels of 1.png" in str(warning)
    assert "10 pixels of 9.png, 36 pixels of 3 more images are NaN" in str(warning)
    assert len(warning.pixels) == 13


# One class


def binary_probability(model, x, size, scales=(1.0,), flip=False):
    """Mean of the sigmoids at full size, [N, H, W]."""
    passes = []
    for scale in scales:
        y = x if scale == 1 else resized(x, [math.floor(n * scale + 0.5) for n in x.shape[-2:]])
        passes.append(upsampled(model, model.plain(y), size).sigmoid())
        if flip:
            passes.append(upsampled(model, model.plain(y.flip(-1)), size).sigmoid().flip(-1))
    return torch.stack(passes).mean(0)[:, 0]


def assert_binary(labels, prob, threshold):
    """Labels are those of the probability, up to pixels that fp32 cannot tell apart."""
    clear = (prob - threshold).abs() > 1e-5
    assert clear.float().mean() > 0.99 and labels.dtype == torch.uint8
    assert torch.equal((labels == 1)[clear], (prob > threshold)[clear])
    assert 0.02 < (labels == 1).float().mean() < 0.98 and labels.max() == 1


@pytest.mark.parametrize("threshold", [None, 0.3, 0.6])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="single"),
        pytest.param({"flip": True}, id="flip"),
        pytest.param({"scales": (0.5, 1.0, 1.5), "flip": True}, id="scales-flip"),
    ],
)
def test_one_class_is_a_sigmoid_and_a_threshold(options, align_corners, threshold):
    model = Small(num_classes=1, align_corners=align_corners)
    x = torch.randn(2, 3, 26, 33)
    if align_corners and "scales" in options:
        options = {"flip": True}
    labels, prob = predict(model, x, return_prob=True, threshold=threshold, **options)
    expected = binary_probability(model, x, (26, 33), **options)
    # A sigmoid and a mean of at most 6 terms of at most 1: some 10 roundings of 2^-24.
    torch.testing.assert_close(prob, expected, rtol=0, atol=1e-6)
    assert_binary(labels, expected, 0.5 if threshold is None else threshold)
    assert torch.equal(predict(model, x, threshold=threshold, **options), labels)


@pytest.mark.parametrize("number", [np.float32, np.float16], ids=["float32", "float16"])
def test_numbers_of_numpy_are_numbers(number):
    model, x = pixelwise(num_classes=1), torch.randn(1, 3, 20, 31)
    expected = predict(model, x, threshold=0.25, scales=(0.5, 1.0))
    found = predict(model, x, threshold=number(0.25), scales=(number(0.5), number(1)))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="expected a probability"):
        predict(model, x, threshold=number(1.5))
    found = predict(model, x, threshold=0.25, tile=np.int64(12), batch_size=np.int32(2))
    assert torch.equal(found, predict(model, x, threshold=0.25, tile=(12, 12), batch_size=2))


def test_windows_of_one_class_equal_the_whole_image():
    model = pixelwise(num_classes=1)
    x = torch.randn(1, 3, 20, 31)
    labels, prob = predict(model, x, tile=(8, 12), return_prob=True, threshold=0.3)
    expected = model.plain(x).sigmoid()[:, 0]
    torch.testing.assert_close(prob, expected, rtol=0, atol=1e-6)
    assert_binary(labels, expected, 0.3)
    image = photo(20, 31)
    np.testing.assert_array_equal(predict(model, image, tile=(8, 12)), predict(model, image))


def test_one_class_of_the_models_themselves():
    model = dlf.deeplabv3_mobilenet_v2_tf(num_classes=1, width=0.25, aspp_channels=8).eval()
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        # Statistics of this input, else the logits are all but constant.
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = 1.0
        model.train()(x)
        model.eval()
        # Half of the pixels on either side, and probabilities far from 0.5.
        final = [m for m in model.classifier.modules() if isinstance(m, nn.Conv2d)][-1]
        final.weight *= 3 / model(x)["out"].std()
        final.bias -= model(x)["out"].median()
        prob = model(x)["out"].sigmoid()[:, 0]
    for each in (model, dlf.optimize(model)):
        labels, found = each.predict(x, return_prob=True)
        # The fast path's logits are PyTorch's within 1e-5 of their size, here 3.
        torch.testing.assert_close(found, prob, rtol=0, atol=1e-4)
        assert_binary(labels, found, 0.5)
        assert 0.4 < labels.float().mean() < 0.6
        assert 0 < each.predict(x, threshold=0.9).sum() < labels.sum()


@pytest.mark.parametrize(
    ("classes", "threshold", "message"),
    [
        pytest.param(1, 0, "threshold is 0, expected a probability", id="0"),
        pytest.param(1, 1.0, "threshold is 1.0", id="1"),
        pytest.param(1, "half", "threshold is 'half'", id="text"),
        pytest.param(5, 0.5, "the model has 5 classes, of which the largest", id="classes"),
    ],
)
def test_thresholds_that_do_not_fit(classes, threshold, message):
    model = Small(num_classes=classes)
    with pytest.raises(ValueError, match=message):
        predict(model, X, threshold=threshold)
    assert not model.inputs
