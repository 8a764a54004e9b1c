"""Pictures that were made to do harm: wild sizes, files that are none, names that are none."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import answer
from PIL import Image

from deeplab_fast.data import ImageReadError, InputSizeError, Preprocess, as_rgb_array, read_image
from deeplab_fast.data.datasets import read_mask
from deeplab_fast.data.images import exif_orientation, shown_name
from deeplab_fast.data.preprocess import MOST_PIXELS, MOST_TILED_PIXELS
from deeplab_fast.data.transforms import resize_pair
from deeplab_fast.engine.predict import PredictOptions, input_plan, predict
from deeplab_fast.engine.runner import Runner


class Counts(torch.nn.Module):
    """Logits of the mean colour; `seen` has the sizes of its inputs."""

    num_classes, align_corners = 3, False

    def __init__(self, size: int | None = 520) -> None:
        super().__init__()
        self.preprocess = Preprocess(size=size)
        self.seen: list[tuple[int, ...]] = []

    def forward_logits(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(x.shape[-2:]))
        return torch.nn.functional.avg_pool2d(x, 8, ceil_mode=True)


def planned(photo: tuple[int, int], size: int | None, **options: object) -> object:
    return input_plan(photo, Preprocess(size=size), PredictOptions.checked(**options))


@pytest.mark.parametrize(
    ("photo", "size", "options"),
    [
        # One pixel, and the smallest camera.
        ((1, 1), 520, {}),
        ((16, 16), 520, {"scales": (0.5, 1.75)}),
        # A panorama, a line scan, both ways.
        ((1000, 20_000), 520, {"scales": (1.75,)}),
        ((32_000, 520), 520, {}),
        # The largest that is allowed.
        ((4096, 4096), None, {"scales": (2.0,)}),
        ((1, MOST_PIXELS // 512**2), 512, {}),
        # Large ones at their own size, whole and in windows.
        ((13_000, 13_000), None, {}),
        ((100_000, 100_000), None, {"tile": 513}),
        # Windows where the whole is too large, and the largest of those.
        ((4000, 4000), 12_000, {"tile": 513}),
        ((1 << 14, 1), 64, {"tile": 64}),
    ],
)
def test_usual_sizes_are_allowed(photo, size, options):
    planned(photo, size, **options)


@pytest.mark.parametrize(
    ("photo", "size", "options", "said"),
    [
        # The shorter side alone is scaled: both ways.
        ((1, 5000), 520, {}, "resized to 520x2600000, 1352 million pixels"),
        ((5000, 1), 520, {}, "resized to 2600000x520, 1352 million pixels"),
        # One pixel above the largest along a side.
        ((1, MOST_PIXELS // 512**2 + 1), 512, {}, "allowed are 16.78 million pixels"),
        # More than four times its own.
        ((4097, 4096), None, {"scales": (1, 2.01)}, "allowed are 67.13 million"),
        # The largest scale.
        ((64, 64), 520, {"scales": (64,)}, "33280x33280, 1108 million pixels"),
        # Windows: a row of them, all, one at its scale.
        ((1, 5000), 520, {"tile": 513}, "in rows of windows of 1334 million pixels"),
        ((MOST_TILED_PIXELS // 512**2 + 1, 1), 512, {"tile": 64}, "allowed are 268.4 million"),
        ((600, 600), None, {"tile": 513, "scales": (64,)}, "use smaller windows or scales"),
    ],
)
def test_sizes_out_of_proportion_are_refused_with_advice(photo, size, options, said):
    with pytest.raises(InputSizeError) as error:
        planned(photo, size, **options)
    message = str(error.value)
    assert said in message
    assert "x".join(map(str, photo)) in message or "tile" in options
    assert "cut it into parts, or use" in message


def test_windows_are_advised_only_where_they_are_allowed():
    def message(photo, size):
        with pytest.raises(InputSizeError) as error:
            planned(photo, size)
        return str(error.value)

    assert "use windows (tile=513" in message((1500, 1500), 6000)
    # A row of windows would be as large as the whole.
    assert "windows" not in message((1, 5000), 520)


def test_every_way_in_refuses_a_line_of_pixels(tmp_path):
    line = np.zeros((1, 5000, 3), np.uint8)
    Image.fromarray(line).save(tmp_path / "line.png")
    model = Counts()
    for images, name in [
        (line, "the image: "),
        ([line[:, :5], line], "images[1]: "),
        (Image.fromarray(line), "the image: "),
        (str(tmp_path / "line.png"), f"{tmp_path}/line.png: "),
        ([tmp_path / "line.png"], f"{tmp_path}/line.png: "),
        (torch.from_numpy(line).permute(2, 0, 1), ""),
    ]:
        with pytest.raises(InputSizeError) as error:
            predict(model, images)
        assert str(error.value).startswith(f"{name}a picture of 1x5000 pixels")
    assert model.seen == []
    with pytest.raises(InputSizeError, match="520x2600000"):
        model.preprocess(line)
    with pytest.raises(InputSizeError, match="5000x25000000"):
        resize_pair(line, line[..., 0], (5000, 25_000_000))
    with pytest.raises(InputSizeError, match="38400x38400"):
        predict(model, torch.zeros(1, 3, 600, 600), scales=64)


def test_a_line_of_pixels_at_its_own_size_is_run():
    model = Counts(None)
    assert predict(model, np.zeros((1, 5000, 3), np.uint8)).shape == (1, 5000)
    assert predict(model, np.zeros((5000, 1, 3), np.uint8), tile=64).shape == (5000, 1)


@pytest.mark.parametrize("size", [0, -1, True, 1_000_001, 10**400, (5, 10**9)])
def test_sizes_of_a_preprocess_are_those_of_pictures(size):
    with pytest.raises(ValueError, match="at most 1000000 pixels") as error:
        Preprocess(size=size)
    assert len(str(error.value)) < 500


def test_memory_that_runs_out_is_told_with_advice(monkeypatch):
    def fails(self, x):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr(Runner, "logits", fails)
    with pytest.raises(MemoryError, match=r"not enough memory; use --tile .*can't allocate"):
        predict(Counts(), np.zeros((8, 8, 3), np.uint8))


@pytest.fixture
def odd_files(tmp_path):
    """Paths that are no ordinary files, with what is said of them."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "to_pipe.png").symlink_to(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        # The name of a socket is short.
        os.chdir(tmp_path)
        server.bind("socket.png")
        os.chdir(before)
    return {
        tmp_path / "pipe.png": "this is a pipe",
        tmp_path / "to_pipe.png": "this is a pipe",
        tmp_path / "socket.png": "this is a socket",
        tmp_path / "folder.png": "this is a folder",
        tmp_path / "empty.png": "the file is empty",
        tmp_path / "loop.png": "symbolic links",
        tmp_path / "no.png": "No such file",
        Path("/dev/zero"): "this is a device",
        Path("/dev/null"): "this is a device",
        Path("/proc/self/mem"): "the file is empty",
        tmp_path / ("n" * 5000): "name too long",
        tmp_path / "nul\0.png": "null byte",
    }


def test_what_is_no_ordinary_file_is_refused_without_waiting(odd_files):
    for path, said in odd_files.items():
        for read in (read_image, as_rgb_array, read_mask):
            with pytest.raises(ImageReadError, match=f"(?i){said}") as error:
                read(path)
            assert len(str(error.value)) < 700
            assert str(error.value).isprintable()
        assert exif_orientation(path) == 1


def test_a_pipe_with_a_writer_is_refused_too(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    end = os.open(tmp_path / "pipe.png", os.O_RDWR)
    with pytest.raises(ImageReadError, match="pipe"):
        read_image(tmp_path / "pipe.png")
    os.close(end)


def test_names_are_shown_so_that_they_move_no_cursor():
    assert shown_name("a\x1b[2Jb\n.png") == "a\\x1b[2Jb\\n.png"
    assert shown_name(b"\xff.png".decode("utf-8", "surrogateescape")) == "\\udcff.png"
    assert len(shown_name("n" * 5000)) == 303
    assert shown_name("größe 1.png") == "größe 1.png"


def test_other_types_than_paths_are_no_files():
    for source in (0, None, 1.5, ["a.png"]):
        with pytest.raises(ValueError, match="expected"):
            read_image(source)


def test_files_that_another_program_would_draw_are_refused(tmp_path):
    path = tmp_path / "drawn.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    for read in (read_image, read_mask):
        with pytest.raises(ImageReadError, match="EPS, which is drawn by another program"):
            read(path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1, 3, 8, 8, device="meta"),
        torch.zeros(1, 3, 8, 8).to_sparse(),
        torch.zeros(1, 3, 8, 8, dtype=torch.complex64),
        torch.zeros(1, 3, 8, 8, dtype=torch.int32),
        torch.zeros(1, 3, 8, 8, dtype=torch.bool),
        torch.zeros(1, 3, 0, 8),
        torch.zeros(3),
    ],
    ids=["meta", "sparse", "complex", "int32", "bool", "no pixels", "one axis"],
)
def test_tensors_without_images_are_refused(tensor):
    with pytest.raises(ValueError, match=r"image tensor .*(expected|no pixels)"):
        predict(Counts(), tensor)


def test_tensors_that_ask_for_gradients_or_share_memory_are_run():
    model = Counts(None)
    x = torch.rand(1, 3, 9, 9, requires_grad=True)
    want = predict(model, x.detach().clone())
    assert torch.equal(predict(model, x), want)
    spread = torch.rand(1, 3, 1, 1).expand(1, 3, 9, 9)
    assert torch.equal(predict(model, spread), predict(model, spread.contiguous()))


def test_options_of_a_model_are_not_changed_by_a_refusal():
    model = Counts()
    model.train()
    with pytest.raises(InputSizeError):
        predict(model, np.zeros((1, 5000, 3), np.uint8))
    assert model.training
    changed = dataclasses.replace(model.preprocess, size=None)
    assert predict(model, np.zeros((1, 5000, 3), np.uint8), preprocess=changed).shape == (1, 5000)


def test_a_matrix_of_numpy_is_a_grey_picture():
    # Without a plain view np.repeat ends the process.
    found = as_rgb_array(np.asmatrix(np.eye(3, 5, dtype=np.uint8)))
    np.testing.assert_array_equal(found, np.repeat(np.eye(3, 5, dtype=np.uint8)[..., None], 3, 2))


def test_arrays_spread_over_no_memory_are_taken_at_their_size_or_told():
    spread = np.broadcast_to(np.uint8(7), (50, 60, 3))
    assert as_rgb_array(spread).shape == (50, 60, 3) and as_rgb_array(spread).flags.writeable
    # More than addresses reach, so that it is refused whatever the system promises.
    with pytest.raises(ImageReadError, match="not enough memory"):
        as_rgb_array(np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (10**8, 10**8, 3)))


class Classes(Counts):
    """Logits of so many classes."""

    def __init__(self, num_classes: int, size: int | None = 520) -> None:
        super().__init__(size)
        self.num_classes = num_classes

    def forward_logits(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward_logits(x)[:, :1].expand(-1, self.num_classes, -1, -1)


SIDE = 2000
# The heap's own, and Python's.
SLACK = 24 << 20


@pytest.mark.parametrize(
    ("classes", "options", "each"),
    [
        # Bytes a pixel of the photo as the docstring of predict has them.
        (1, {}, 18),
        (40, {}, 18),
        (40, {"return_prob": True}, 18),
        (5, {"flip": True}, 4 * 5 + 18),
        (1, {"flip": True, "return_prob": True}, 18),
        (10, {"tile": 300}, 18),
    ],
)
def test_memory_of_predict_is_a_multiple_of_the_photo(classes, options, each):
    photo = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    model = Classes(classes)
    predict(model, photo[:600, :600], **options)
    answer("memory", lambda: predict(model, photo, **options), memory=each * SIDE**2 + SLACK)


def test_memory_of_reading_is_a_multiple_of_the_photo(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
    for name, picture in (
        ("clear.png", Image.fromarray(rgba)),
        ("photo.jpg", Image.fromarray(rgba[..., :3].copy())),
        ("deep.png", Image.fromarray(rgba[..., 0].astype(np.uint16) * 257)),
        ("float.tif", Image.fromarray(rgba[..., 0].astype(np.float32))),
    ):
        picture.save(tmp_path / name)
        path = tmp_path / name
        answer("memory", lambda path=path: read_image(path), memory=24 * SIDE**2 + SLACK)
