"""From a photo to an input tensor, beside torchvision's own transform."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplab_fast.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess


@pytest.fixture(scope="module")
def preset():
    testing = pytest.importorskip("deeplab_fast.testing")
    try:
        testing.import_torchvision()
    except ImportError as error:
        pytest.skip(str(error))
    from torchvision.transforms._presets import SemanticSegmentation

    return SemanticSegmentation


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        pytest.param(None, (37, 53), id="native"),
        pytest.param(24, (37, 53), id="down-landscape"),
        pytest.param(24, (53, 37), id="down-portrait"),
        pytest.param(70, (37, 53), id="up"),
        pytest.param(37, (37, 53), id="already-that-size"),
        pytest.param(20, (41, 41), id="square"),
        pytest.param(3, (97, 2), id="thin"),
    ],
)
def test_equals_torchvision_on_tensors_bit_for_bit(preset, size, shape):
    image = photo(*shape)
    expected = preset(resize_size=size)(torch.from_numpy(image).permute(2, 0, 1).contiguous())
    result = Preprocess(size=size)(image)
    assert result.dtype == torch.float32 and result.is_contiguous()
    torch.testing.assert_close(result, expected[None], rtol=0, atol=0)


def test_differs_from_torchvision_on_pil_images_by_one_level_at_most(preset):
    from PIL import Image

    image = photo(61, 90)
    expected = preset(resize_size=33)(Image.fromarray(image))[None]
    result = Preprocess(size=33)(image)
    assert result.shape == expected.shape
    # Pillow rounds after each of its two passes, half a level each, and the result here is rounded
    # once: less than two levels, so at most one between whole levels, of 1 / 255 / std.
    levels = (result - expected).abs() * 255 * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    assert levels.max() < 1.01
    # A kernel without antialiasing would be far off at this reduction.
    assert levels.mean() < 0.5


def test_formula_by_hand():
    image = np.array([[[0, 128, 255], [255, 0, 51]]], np.uint8)
    result = Preprocess(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))(image)
    expected = [[[-0.2, 1.8]], [[(128 / 255 - 0.2) / 0.25, -0.8]], [[0.7, -0.1]]]
    # Three fp32 operations on values up to 4.
    torch.testing.assert_close(result[0], torch.tensor(expected), rtol=1e-6, atol=3e-7)


def test_tensorflow_normalisation():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    result = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3)(image)
    expected = torch.arange(256, dtype=torch.float32).reshape(16, 16) / 127.5 - 1
    # Two roundings of values up to 1 on either side, in units of 2^-24.
    torch.testing.assert_close(result[0, 1], expected, rtol=0, atol=4 * 2**-24)


def test_exact_size_and_one_level_rounding():
    image = np.zeros((2, 2, 3), np.uint8)
    image[0] = 1
    step = Preprocess(mean=(0, 0, 0), std=(1 / 255,) * 3, size=(4, 2))
    # Rows 1, .75, .25, 0 between the two pixel rows, rounded to whole levels.
    torch.testing.assert_close(
        step(image)[0, 0, :, 0], torch.tensor([1.0, 1.0, 0.0, 0.0]), rtol=1e-6, atol=1e-6
    )
    assert Preprocess(size=(5, 9))(photo(7, 3)).shape == (1, 3, 5, 9)


@pytest.mark.parametrize(
    ("size", "shape", "expected"),
    [
        (None, (480, 640), (480, 640)),
        (520, (480, 640), (520, 693)),  # 693.33 is cut
        (520, (640, 480), (693, 520)),
        (520, (100, 100), (520, 520)),
        ((257, 300), (480, 640), (257, 300)),
    ],
)
def test_target_size(size, shape, expected):
    assert Preprocess(size=size).target_size(*shape) == expected


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 100))
@settings(max_examples=50, deadline=None)
def test_the_shorter_side_gets_the_size(height, width, size):
    result = Preprocess(size=size).target_size(height, width)
    assert min(result) == size
    assert (result[0] >= result[1]) == (height >= width) or result[0] == result[1]


def test_batches_and_layouts_agree():
    images = torch.from_numpy(np.stack([photo(20, 30), photo(20, 30)[::-1]]))
    nhwc = images.permute(0, 3, 1, 2)
    step = Preprocess(size=13)
    result = step.batch(nhwc)
    torch.testing.assert_close(result, step.batch(nhwc.contiguous()), rtol=0, atol=0)
    torch.testing.assert_close(result[:1], step(images[0].numpy()), rtol=0, atol=0)
    assert step.batch(nhwc, size=(4, 6)).shape == (2, 3, 4, 6)


def test_the_input_is_not_changed():
    image = photo(8, 9)
    before = image.copy()
    Preprocess()(image)
    np.testing.assert_array_equal(image, before)
    read_only = photo(8, 9)
    read_only.flags.writeable = False
    torch.testing.assert_close(Preprocess()(read_only), Preprocess()(image), rtol=0, atol=0)
    torch.testing.assert_close(
        Preprocess()(image[:, ::-1]), Preprocess()(image).flip(-1), rtol=0, atol=0
    )


def test_it_is_a_value():
    step = Preprocess([0, 0, 0], [1, 1, 1], [3, 4])
    assert step == Preprocess((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (3, 4)) and hash(step)
    assert pickle.loads(pickle.dumps(step)) == step
    assert (Preprocess().mean, Preprocess().std) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"mean": (0.5, 0.5)}, "mean is .*three finite numbers", id="two-means"),
        pytest.param({"mean": 0.5}, "mean is 0.5", id="one-number"),
        pytest.param({"std": (1, 0, 1)}, "numbers above 0", id="std-0"),
        pytest.param({"std": (1, float("nan"), 1)}, "std is .*finite", id="std-nan"),
        pytest.param({"size": 0}, "size is 0", id="size-0"),
        pytest.param({"size": (5,)}, r"size is \(5,\)", id="one-side"),
        pytest.param({"size": 5.5}, r"size is 5\.5", id="half-a-pixel"),
        pytest.param({"size": True}, "size is True", id="bool"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**arguments)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        pytest.param(np.zeros((4, 4, 3), np.float32), "float32", id="float"),
        pytest.param(np.zeros((4, 4), np.uint8), r"shape \[4, 4\]", id="grey"),
        pytest.param(np.zeros((0, 4, 3), np.uint8), r"shape \[0, 4, 3\]", id="no-rows"),
        pytest.param("photo.jpg", "got str", id="path"),
    ],
)
def test_wrong_images(image, message):
    with pytest.raises(ValueError, match=message):
        Preprocess()(image)


def test_wrong_batches():
    with pytest.raises(ValueError, match=r"uint8 tensor \[N,3,H,W\], got torch.float32"):
        Preprocess().batch(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\[1, 4, 4, 3\]"):
        Preprocess().batch(torch.zeros(1, 4, 4, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("have", "want"),
    [
        pytest.param((700, 40), (97, 31), id="smaller, more rows than are floats at a time"),
        pytest.param((31, 20), (300, 61), id="larger"),
        pytest.param((30, 64), (47, 17), id="one axis each way"),
        pytest.param((9, 7), (9, 7), id="as it is"),
        pytest.param((400, 3), (1, 1), id="one pixel"),
    ],
)
def test_rows_of_a_resized_photo(have, want):
    generator = torch.Generator().manual_seed(0)
    # As pictures lie in memory: channels last.
    pixels = torch.randint(0, 256, (1, *have, 3), dtype=torch.uint8, generator=generator)
    pixels = pixels.permute(0, 3, 1, 2)
    preprocess = Preprocess(mean=(0, 0, 0), std=(1, 1, 1))
    whole = preprocess.batch(pixels, size=want).mul(255).round()
    # Sums lie within roundings of a half once in thousands of pixels.
    for top, height in {(0, want[0]), (want[0] // 3, want[0] - want[0] // 3), (want[0] - 1, 1)}:
        rows = preprocess.resized_rows(pixels, want, top, height)
        assert rows.dtype == torch.uint8
        off = (rows - whole[..., top : top + height, :]).abs()
        assert off.max() <= 1 and off.mean() < 2e-3
