"""Lists, tables, masks and annotations that were made to do harm."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from deeplab_fast.data import ImageReadError, InputSizeError, list_images
from deeplab_fast.data.check import check_dataset
from deeplab_fast.data.datasets import open_dataset, read_mask
from deeplab_fast.data.datasets.files import on_disk
from deeplab_fast.data.transforms import AugmentedDataset, paper_training, torchvision_training


def table(folder, content: bytes):
    path = folder / "pairs.csv"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"image,mask\na\0.png,m.png\n", r"line 2: 'a\\x00.png' is no name"),
        (b"image,mask\n" + b"a" * 200_000 + b",m\n", "line 2: more than 65536 characters"),
        (b"image,mask," + b"a," * 100_000 + b"\n", "line 1: more than 65536 characters"),
        (b'image,mask\nx,y\n"a,b\nc,d\ne,f\n', r"'a,b\\nc,d\\ne,f' is no name"),
        # One field over all lines.
        (b'image,mask\n"' + b"a,b\n" * 50_000, "line .*field larger than field limit"),
        ("image,mask\na,b\n".encode("utf-16"), r"is no text in UTF-8 \(byte 0xff\)"),
        (b"image,mask\n\xe9,b\n", r"is no text in UTF-8 \(byte 0xe9\)"),
        (b"", "the column image and mask is missing"),
        (b"\0" * 5000, "the column image and mask is missing"),
        (b"image;mask\na;b\n", "the column image and mask is missing"),
        (b"image,image,mask\na,b,c\n", "the column image is there twice"),
        (b"image,mask\n,b\n", "line 2: image and mask must both be given"),
        (b"image,mask\na\n", "line 2: image and mask must both be given"),
        (b"image,mask\n", "no pair"),
    ],
)
def test_wild_tables_are_refused_in_a_line(tmp_path, content, said):
    with pytest.raises(ValueError, match=said) as error:
        open_dataset(table(tmp_path, content), classes=2)
    assert len(str(error.value)) < 600 and "\0" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        # Ends of lines and a mark as other systems write them; more fields than columns.
        b"image,mask\ra.png,b.png\r",
        b"\xef\xbb\xbfimage,mask\r\na.png,b.png\r\n",
        b"\n\nimage, mask\n\na.png, b.png, c, d\n\n",
        b'image,mask\n"a.png","b.png"\n',
    ],
)
def test_tables_of_all_kinds_are_read(tmp_path, content):
    (sample,) = open_dataset(table(tmp_path, content), classes=2).samples
    assert (sample.image, sample.mask) == (tmp_path / "a.png", tmp_path / "b.png")


def test_what_a_table_names_is_reported_and_not_shown(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("root:x:0:0")
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / "pipe.png")
    rows = [
        ("../secret.txt", "../secret.txt"),
        ("pipe.png", "pipe.png"),
        ("/dev/zero", "/dev/zero"),
        ("\x1b[2J.png", "é" * 3000),
        ("é/" * 3000, "."),
    ]
    content = "image,mask\n" + "".join(f"{a},{b}\n" for a, b in rows)
    dataset = open_dataset(table(tmp_path / "data", content.encode()), classes=2)
    report = check_dataset(dataset)
    assert [problem.kind for problem in report.problems] == ["photo", "mask"] * 5
    reasons = [problem.reason for problem in report.problems]
    assert "pipe" in reasons[2] and "device" in reasons[4] and "folder" in reasons[9]
    text = " ".join(problem.message for problem in report.problems)
    assert "root:x" not in text and "\x1b" not in text
    # Each at most once in a message.
    assert all(problem.message.count("cannot read") == 1 for problem in report.problems)


def test_names_of_many_folders_are_looked_up_without_end_of_the_stack(tmp_path):
    (tmp_path / "e\u0301").mkdir()
    (tmp_path / "e\u0301" / "a.png").touch()
    assert on_disk(tmp_path / "\u00e9" / "a.png", {}) == tmp_path / "e\u0301" / "a.png"
    deep = tmp_path.joinpath(*["\u00e9"] * 1900)
    assert on_disk(deep, {}).name == "\u00e9"


def test_links_that_lead_round_are_read_once(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "again").symlink_to(tmp_path / kind)
        (tmp_path / kind / "loop.png").symlink_to(tmp_path / kind / "loop.png")
        Image.new("L", (3, 2)).save(tmp_path / kind / "a.png")
    dataset = open_dataset(tmp_path, classes=2, split="all")
    report = check_dataset(dataset)
    assert {sample.name for sample in dataset.samples} <= {"a", "loop"}
    assert all("symbolic links" in problem.message for problem in report.problems[:2])


def header(text: str) -> bytes:
    padded = text.encode("latin-1") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded


@pytest.mark.parametrize(
    ("content", "said"),
    [
        # Sizes that a file only claims: 4 TiB, more than integers hold, below zero.
        (header("{'descr':'|u1','fortran_order':False,'shape':(2097152,2097152)}"), "0 bytes of"),
        (header("{'descr':'|u1','fortran_order':False,'shape':(10**30,1)}"), "no array"),
        (header(f"{{'descr':'|u1','fortran_order':False,'shape':({10**30},1)}}"), "0 bytes of"),
        (header("{'descr':'|u1','fortran_order':False,'shape':(-1,-1)}") + b"x", "an array"),
        (header("{'descr':'|u1','fortran_order':False,'shape':(2,2)}") + b"12345", "5 bytes of"),
        # Values that are no integers, or run code.
        (header("{'descr':'|O','fortran_order':False,'shape':(1,1)}") + b"cos\nsystem", "object"),
        (header("{'descr':'<f4','fortran_order':False,'shape':(1,1)}") + b"1234", "float32"),
        (header("{'descr':[('a','u1')],'fortran_order':False,'shape':(1,1)}") + b"1", "integers"),
        # Other axes, other files.
        (header("{'descr':'|u1','fortran_order':False,'shape':(4,)}") + b"1234", r"\[4\]"),
        (header("__import__('os').abort()"), "no array of numpy.save"),
        (header("(" * 5000), "no array of numpy.save"),
        (b"\x93NUMPY\x09\x00" + b"\0" * 50, "no array of numpy.save"),
        (b"\x80\x04cos\nsystem\n", "no array of numpy.save"),
        (b"PK\x03\x04" + b"\0" * 40, "no array of numpy.save"),
    ],
)
def test_wild_arrays_are_refused_before_they_are_made(tmp_path, content, said):
    path = tmp_path / "m.npy"
    path.write_bytes(content)
    with pytest.raises(ImageReadError, match=said) as error:
        read_mask(path)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize("dtype", ["u1", "<i4", ">i8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_as_they_were_stored(tmp_path, dtype, order):
    wanted = (np.arange(6).reshape(2, 3) % 2).astype(dtype, order=order)
    np.save(tmp_path / "m.npy", wanted)
    found = read_mask(tmp_path / "m.npy")
    np.testing.assert_array_equal(found, wanted.astype(np.int64))
    assert found.flags.c_contiguous and found.flags.writeable


def test_an_array_file_that_unpacks_without_end_is_refused(tmp_path):
    packed = zlib.compress(b"\0" * (100 << 20), 9)
    content = b"MATLAB 5.0".ljust(124) + b"\0\x01IM" + struct.pack("<2I", 15, len(packed)) + packed
    (tmp_path / "bomb.mat").write_bytes(content)
    with pytest.raises(ImageReadError, match="unpacks to more than 67108864 bytes"):
        read_mask(tmp_path / "bomb.mat")


def coco(root, objects, *, image=None, more=""):
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    found = {"id": 1, "file_name": "a.jpg", "height": 4, "width": 6, **(image or {})}
    entries = [
        {"image_id": 1, "category_id": 5, "area": 5.0, "segmentation": each} for each in objects
    ]
    text = json.dumps({"images": [found], "annotations": entries})
    (root / "annotations" / "instances_val2017.json").write_text(text + more)
    return root


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        # Runs beyond the image, which pycocotools writes behind its memory.
        ({"size": [4, 6], "counts": [0, 10**9]}, "runs of 1000000000 pixels"),
        ({"size": [4, 6], "counts": [1, -5, 28]}, "not whole numbers"),
        ({"size": [4, 6], "counts": ["24"]}, "not whole numbers"),
        ({"size": [10**6, 10**6], "counts": [24]}, "runs of an image of"),
        ({"size": [4, 6], "counts": "oooooooooooooooooooooooo1"}, "not COCO's"),
        ({"size": [4, 6], "counts": "h0o"}, "was cut"),
        ({"size": [4, 6], "counts": "\U0001f600"}, "not COCO's"),
        ({"counts": "h0"}, "runs of an image of None"),
        # Polygons far outside, of no numbers, longer than the image.
        ([[0, 0, 1e9, 0, 1e9, 1e9]], "far outside"),
        ([[0, 0, float("nan"), 0, 1, 1]], "far outside"),
        ([[0, 0, float("inf"), 0, 1, 1]], "far outside"),
        ([[0, 0, 10**400, 0, 1, 1]], "too large"),
        ([[0, 0, "1", 0, 1, 1]], "something else than numbers"),
        ([[0, 0, 1]], "less than three points"),
        ([[[0, 0], [1, 1], [2, 2]]], "less than three points"),
        ([0, 0, 1, 1, 2, 2], "less than three points"),
        ([[0, 0, 20_000, 20_000] * 50], "pixels of edges"),
    ],
)
def test_wild_shapes_of_coco_never_reach_its_library(tmp_path, shape, said):
    pytest.importorskip("pycocotools")
    dataset = open_dataset("coco-voc", coco(tmp_path, [shape]))
    with pytest.raises(ImageReadError, match=said) as error:
        dataset.raw_label(0)
    assert "an object of a" in str(error.value)


def test_runs_of_coco_are_read_as_its_library_reads_them(tmp_path):
    coco_mask = pytest.importorskip("pycocotools.mask")
    generator = np.random.default_rng(0)
    for height, width, share in ((4, 6, 0.5), (1, 1, 1.0), (37, 53, 0.1), (64, 8, 0.0)):
        wanted = generator.random((height, width)) < share
        packed = coco_mask.encode(np.asfortranarray(wanted.astype(np.uint8)))
        shape = {"size": [height, width], "counts": packed["counts"].decode()}
        root = tmp_path / f"{height}x{width}"
        dataset = open_dataset(
            "coco-voc", coco(root, [shape], image={"height": height, "width": width})
        )
        np.testing.assert_array_equal(dataset.raw_label(0) == 1, wanted)


@pytest.mark.parametrize(
    ("image", "said"),
    [({"height": 10**9}, "sides of 1 to 16384"), ({"width": 0}, "sides of 1 to 16384")],
)
def test_wild_sizes_of_coco_are_refused(tmp_path, image, said):
    pytest.importorskip("pycocotools")
    with pytest.raises(ImageReadError, match=said):
        open_dataset("coco-voc", coco(tmp_path, [], image=image)).raw_label(0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "more than 64 lists"),
        ("{", "JSON"),
        ("[]", "has no list of images"),
        ('{"images": {}, "annotations": []}', "has no list of images"),
        ('{"images": [1], "annotations": []}', r"images\[0\] has no id"),
        (
            '{"images": [{"id": true, "file_name": "a", "height": 1, "width": 1}]}',
            r"images\[0\] has no id",
        ),
        ('{"images": [], "annotations": [{"image_id": 1}]}', r"annotations\[0\] has no category"),
    ],
)
def test_wild_annotations_of_coco_are_refused(tmp_path, content, said):
    pytest.importorskip("pycocotools")
    coco(tmp_path, [])
    (tmp_path / "annotations" / "instances_val2017.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        open_dataset("coco-voc", tmp_path)


def test_pictures_that_are_masks_by_name_only_are_refused(tmp_path):
    jpeg = io.BytesIO()
    Image.new("RGB", (4, 4)).save(jpeg, "JPEG")
    for name, content in (
        ("page.png", b"<html></html>"),
        ("drawn.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("pickle.png", b"\x80\x04cos\nsystem\n(S'true'\ntR."),
        ("photo.png", jpeg.getvalue()),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageReadError, match=r"cannot identify|does not keep class numbers"):
            read_mask(tmp_path / name)


def test_training_names_the_photo_that_would_become_too_large(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        Image.new("L", (5000, 1)).save(tmp_path / kind / "line.png")
    dataset = open_dataset(tmp_path, classes=2, split="all")
    for transform in (torchvision_training(), paper_training(input_size=520, scale=(1.0, 1.0))):
        with pytest.raises(InputSizeError, match=r"images.line\.png: a picture of 1x5000"):
            AugmentedDataset(dataset, transform)[0]
    # At its own size it is cropped.
    assert AugmentedDataset(dataset, paper_training(33))[0][1].shape == (33, 33)


def test_lists_of_images_name_what_is_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "none.png").symlink_to("nowhere.png")
    # Who reads them says why they cannot be read.
    assert list_images(tmp_path / "pipe.png") == [tmp_path / "pipe.png"]
    assert list_images(tmp_path / "none.png") == [tmp_path / "none.png"]
    assert [path.name for path in list_images(tmp_path)] == ["none.png", "pipe.png"]
    for name in ("n" * 5000, "a\0.png", "a\x1b[2J"):
        with pytest.raises(FileNotFoundError, match=r"no such file|matches no image") as error:
            list_images(name)
        assert len(str(error.value)) < 400 and str(error.value).isprintable()
