"""Pictures, masks, arrays, tensors and lists of pairs, damaged at random."""

from __future__ import annotations

import io
import json
import random
import struct
import warnings
import zlib
from functools import cache

import numpy as np
import pytest
import torch
from fuzz import answer, examples, refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from deeplab_fast.data import ImageReadError, Preprocess, as_rgb_array, read_image
from deeplab_fast.data.check import check_dataset
from deeplab_fast.data.datasets import open_dataset, read_mask
from deeplab_fast.data.images import exif_orientation
from deeplab_fast.engine.predict import predict

# A picture of twice these pixels is read at most, at 24 bytes a pixel, beside Python's own heap.
MOST = 1 << 18
MEMORY = 2 * MOST * 24 + (64 << 20)


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", MOST)
    # Pillow warns of what it finds odd, and of pictures above half of the bound.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def corpus() -> tuple[tuple[str, bytes], ...]:
    """Small pictures of every kind that is read, by suffix."""
    noise = np.random.default_rng(0).integers(0, 256, (11, 13, 4), dtype=np.uint8)
    colour, clear = Image.fromarray(noise[..., :3].copy()), Image.fromarray(noise)
    grey = Image.fromarray(noise[..., 0].copy())
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    turned, text = Image.Exif(), PngImagePlugin.PngInfo()
    turned[0x0112] = 6
    text.add_text("comment", "x" * 50, zip=True)
    text.add_itxt("title", "y" * 50, zip=True)
    made: list[tuple[str, Image.Image, dict[str, object]]] = [
        ("png", colour, {"pnginfo": text, "icc_profile": b"\0" * 200}),
        ("png", clear, {"exif": turned}),
        ("png", grey, {}),
        ("png", deep, {}),
        ("png", colour.quantize(7), {"transparency": 3}),
        ("png", grey.convert("1"), {}),
        ("png", grey.convert("LA"), {}),
        ("png", colour, {"save_all": True, "append_images": [colour.rotate(180)]}),
        ("jpg", colour, {"exif": turned, "icc_profile": b"\0" * 200}),
        ("jpg", colour.convert("CMYK"), {}),
        ("jpg", grey, {"progressive": True}),
        ("gif", colour.quantize(9), {"save_all": True, "append_images": [colour.quantize(5)]}),
        ("bmp", colour, {}),
        ("bmp", colour.quantize(9), {}),
        ("tif", colour, {"exif": turned}),
        ("tif", colour, {"compression": "tiff_lzw"}),
        ("tif", colour, {"compression": "tiff_adobe_deflate"}),
        ("tif", colour, {"compression": "jpeg"}),
        ("tif", deep, {}),
        ("tif", grey.convert("1"), {"compression": "group4"}),
        ("tif", Image.fromarray(noise[..., 0].astype(np.float32)), {}),
        ("tif", colour.convert("CMYK"), {}),
        ("tif", colour.convert("LAB"), {}),
        ("webp", clear, {}),
        ("webp", colour, {"save_all": True, "append_images": [colour.rotate(180)]}),
        ("tga", colour, {"compression": "tga_rle"}),
        ("ppm", colour, {}),
        ("pbm", grey.convert("1"), {}),
        ("jp2", colour, {}),
        ("avif", colour, {}),
        # By their names none of these.
        ("ico", colour, {}),
        ("pcx", colour, {}),
        ("sgi", colour, {}),
        ("eps", colour, {}),
    ]
    found = []
    for suffix, picture, options in made:
        file = io.BytesIO()
        try:
            picture.save(file, Image.registered_extensions()[f".{suffix}"], **options)
        # A Pillow that was built without this format.
        except (KeyError, OSError):
            continue
        found.append((suffix, file.getvalue()))
    tifffile = pytest.importorskip("tifffile")
    for options in ({}, {"compression": "zlib"}, {"tile": (16, 16)}, {"planarconfig": "separate"}):
        file = io.BytesIO()
        values = noise[..., :3].astype(np.float32) / 255
        if "planarconfig" in options:
            values = values.transpose(2, 0, 1)
        tifffile.imwrite(file, values, photometric="rgb", **options)
        found.append(("tif", file.getvalue()))
    for values in (noise[..., 0], noise[..., 0].astype(np.int64), noise, noise[..., 0] > 9):
        file = io.BytesIO()
        np.save(file, values)
        found.append(("npy", file.getvalue()))
    found.append(("mat", matlab(noise[..., 0], packed=False)))
    found.append(("mat", matlab(noise[..., 0], packed=True)))
    return tuple(found)


def matlab(values: np.ndarray, *, packed: bool) -> bytes:
    """A file as SBD has them."""

    def element(kind: int, content: bytes) -> bytes:
        return struct.pack("<2I", kind, len(content)) + content + b"\0" * (-len(content) % 8)

    def matrix(kind: int, shape: tuple[int, int], name: bytes, *parts: bytes) -> bytes:
        flags = element(6, struct.pack("<2I", kind, 0))
        sizes = element(5, struct.pack("<2i", *shape))
        return element(14, flags + sizes + element(1, name) + b"".join(parts))

    inner = matrix(9, values.shape, b"", element(2, values.tobytes("F")))
    fields = element(5, struct.pack("<i", 16)) + element(1, b"Segmentation\0\0\0\0")
    whole = matrix(2, (1, 1), b"GTcls", fields, inner)
    if packed:
        whole = zlib.compress(whole)
        whole = struct.pack("<2I", 15, len(whole)) + whole
    return b"MATLAB 5.0".ljust(124) + b"\0\x01IM" + whole


# What sizes, counts and offsets are set to.
WILD = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def damaged(seed: int) -> tuple[str, bytes]:
    """One of the corpus, changed at a few places: most often near its head."""
    chance = random.Random(seed)
    suffix, content = chance.choice(corpus())
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        near = len(data) if chance.random() < 0.4 else min(len(data), 200)
        place = chance.randrange(max(1, near))
        kind = chance.randrange(7)
        if kind == 0:
            data[place : place + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            size = chance.choice("BHI")
            order = chance.choice("<>")
            value = chance.choice(WILD) & (256 ** struct.calcsize(size) - 1)
            data[place : place + struct.calcsize(size)] = struct.pack(order + size, value)
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + chance.randrange(1, 30)]
        elif kind == 4:
            data[place:place] = data[place : place + chance.randrange(1, 200)]
        elif kind == 5:
            other = chance.choice(corpus())[1]
            data[place:] = other[chance.randrange(len(other)) :]
        else:
            data[place:place] = chance.randbytes(chance.randrange(1, 50))
    if chance.random() < 0.1:
        suffix = chance.choice(("png", "jpg", "tif", "npy", "mat"))
    return suffix, _with_sums(bytes(data)) if chance.random() < 0.7 else bytes(data)


def _with_sums(data: bytes) -> bytes:
    """A PNG with right sums of its chunks, so that their content is looked at."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    parts, place = [data[:8]], 8
    while place + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, place)
        end = place + 8 + size
        if end + 4 > len(data):
            break
        parts += [data[place:end], struct.pack(">I", zlib.crc32(data[place + 4 : end]))]
        place = end + 4
    return b"".join((*parts, data[place:]))


seeds = st.integers(0, 2**62)


@pytest.mark.parametrize("index", range(len(corpus())))
def test_the_corpus_itself_is_read_or_refused_in_words(tmp_path, index):
    suffix, content = corpus()[index]
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    if suffix in ("npy", "mat"):
        answer("corpus of masks", lambda: read_mask(path), ImageReadError, memory=MEMORY)
    else:
        answer("corpus", lambda: read_image(path), ImageReadError, memory=MEMORY)


@examples(250)
@given(seed=seeds)
def test_damaged_files_are_read_or_refused_in_words(tmp_path_factory, seed):
    suffix, content = damaged(seed)
    path = tmp_path_factory.getbasetemp() / f"damaged.{suffix}"
    path.write_bytes(content)
    bound = {"seconds": 5.0, "memory": MEMORY}
    if suffix not in ("npy", "mat"):
        found = answer("read_image", lambda: read_image(path), ImageReadError, **bound)
        if isinstance(found, np.ndarray):
            assert found.dtype == np.uint8 and found.shape[2:] == (3,) and found.flags.c_contiguous
        answer(
            "read_image of a file object",
            lambda: read_image(io.BytesIO(content), bits=12),
            ImageReadError,
            **bound,
        )
    assert exif_orientation(path) in range(1, 9)
    found = answer("read_mask", lambda: read_mask(path), ImageReadError, **bound)
    if isinstance(found, np.ndarray):
        assert found.ndim == 2 and found.dtype in (np.uint8, np.int32)
    colours = {(0, 0, 0): 0, (1, 2, 3): 255}
    answer("read_mask by colours", lambda: read_mask(path, colours), ValueError, **bound)


@examples(100)
@given(content=st.binary(max_size=300), suffix=st.sampled_from(["png", "npy", "mat", "tif"]))
def test_bytes_of_any_kind_are_refused_in_words(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(content)
    answer("read_image of bytes", lambda: read_image(path), ImageReadError, memory=MEMORY)
    answer("read_mask of bytes", lambda: read_mask(path), ImageReadError, memory=MEMORY)


names = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    ["a.png", "../b.png", "/dev/zero", ".", "é" * 300, "a/" * 2100, "\x1b[2J", "b\0"]
)
cells = names | st.sampled_from(["train", "val", '"', '"a', "'", "#", " ", ""])
tables = st.lists(st.lists(cells, max_size=5).map(lambda row: ",".join(row)), max_size=8).map(
    lambda rows: "\n".join(rows)
)


@examples(150)
@given(
    rows=tables,
    head=st.sampled_from(["image,mask\n", "image,mask,split\r", "\ufeffmask,image\r\n", ""]),
    codec=st.sampled_from(["utf-8", "utf-8", "utf-16", "latin-1"]),
    split=st.sampled_from([None, "train", "all", "x"]),
)
def test_tables_are_read_or_refused_in_words(tmp_path_factory, rows, head, codec, split):
    path = tmp_path_factory.getbasetemp() / "pairs.csv"
    path.write_bytes((head + rows).encode(codec, "replace"))
    found = answer(
        "open_dataset of a table",
        lambda: open_dataset(path, split=split, classes=3),
        ValueError,
        memory=64 << 20,
    )
    if isinstance(found, BaseException):
        return
    report = answer("check_dataset of a table", lambda: check_dataset(found), memory=64 << 20)
    assert len(report.problems) >= 2 * len(found)


shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 17]), max_size=4).map(tuple)
dtypes = st.sampled_from(
    ["u1", "u2", ">u2", "i1", "i8", "f2", "f4", ">f8", "?", "c8", "O", "S3", "U2", "M8[s]", "V4"]
)


@examples(200)
@given(shape=shapes, dtype=dtypes, seed=seeds, layout=st.integers(0, 4))
def test_arrays_are_taken_or_refused_in_words(shape, dtype, seed, layout):
    generator = np.random.default_rng(seed)
    count = int(np.prod(shape))
    kind = np.dtype(dtype)
    array = np.frombuffer(generator.bytes(count * kind.itemsize), kind) if dtype != "O" else None
    array = np.full(count, None, object) if array is None else array
    array = array.reshape(shape)
    if layout == 1:
        array = array[::-1] if array.ndim else array
    elif layout == 2:
        array = array.T
    elif layout == 3:
        array = np.broadcast_to(array, (3, *array.shape[1:])) if array.shape[:1] == (1,) else array
    elif layout == 4 and array.ndim == 2:
        array = np.asmatrix(array)
    with np.errstate(all="ignore"):
        found = answer("as_rgb_array", lambda: as_rgb_array(array), ValueError, memory=16 << 20)
    if isinstance(found, np.ndarray):
        assert found.dtype == np.uint8 and found.shape == (*array.shape[:2], 3)
        assert type(found) is np.ndarray and found.flags.c_contiguous


class Model(torch.nn.Module):
    """Logits that are the colours of blocks of pixels."""

    num_classes, align_corners = 3, False
    preprocess = Preprocess(size=8)

    def forward_logits(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(x, 4, ceil_mode=True)


sizes = st.sampled_from([1, 2, 3, 7, 40, 3000])


@examples(10)
@given(
    height=sizes,
    width=sizes,
    scales=st.lists(st.sampled_from([1e-300, 0.5, 1.0, 2.0, 1e4, 1e9, 1e308]), max_size=2),
    tile=st.sampled_from([None, 3, 64, 10**9]),
    size=st.sampled_from([None, 1, 8, 520, (1, 8), (10**6, 10**6)]),
    kind=st.sampled_from(["array", "tensor", "float", "half", "picture"]),
)
def test_predict_gives_labels_or_refuses_sizes_in_words(height, width, scales, tile, size, kind):
    image: object = np.zeros((height, width, 3), np.uint8)
    if kind == "picture":
        image = Image.fromarray(image)
    elif kind != "array":
        image = torch.zeros(1, 3, height, width, dtype=torch.uint8)
        image = image if kind == "tensor" else image.half() if kind == "half" else image.float()
    if isinstance(tile, int) and max(height, width) * (size if size == 520 else 1) > 40 * tile:
        # Thousands of windows take their time.
        return
    preprocess = None if kind in ("float", "half") else Preprocess(size=size)
    found = answer(
        "predict",
        lambda: predict(Model(), image, scales=scales or (1.0,), tile=tile, preprocess=preprocess),
        ValueError,
        seconds=20.0,
        memory=2 << 30,
    )
    if not isinstance(found, BaseException):
        assert tuple(found.shape[-2:]) == (height, width)


def test_bombs_are_refused(tmp_path):
    def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (8, 8)) -> bytes:
        head = struct.pack(">2I5B", *size, 8, 2, 0, 0, 0)
        rows = zlib.compress(b"\0" * (size[1] * (1 + 3 * size[0])) if size == (8, 8) else b"")
        parts = [(b"IHDR", head), *chunks, (b"IDAT", rows), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c))
            for k, c in parts
        )

    zeros = zlib.compress(b"\0" * (200 << 20), 9)
    path = tmp_path / "bomb.png"
    # Texts and a colour profile that unpack to 200 MB: never to more than Pillow's own bounds.
    for chunk in ((b"zTXt", b"a\0\0" + zeros), (b"iTXt", b"a\0\1\0\0\0" + zeros),
                  (b"iCCP", b"a\0\0" + zeros)):  # fmt: skip
        path.write_bytes(png(chunk))
        answer("bombs", lambda: read_image(path), ImageReadError, memory=MEMORY)
    for size in ((2**31 - 1, 2**31 - 1), (1, 2**31 - 1), (1000, 1000), (0, 5)):
        path.write_bytes(png(size=size))
        refused("bombs", lambda: read_image(path), ImageReadError)
        refused("bombs", lambda: read_mask(path), ImageReadError)


def test_a_tiff_strip_that_unpacks_without_end_is_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "bomb.tif"
    values = np.zeros((64, 64, 3), np.float32)
    tifffile.imwrite(path, values, photometric="rgb", compression="zlib", rowsperstrip=64)
    zeros = zlib.compress(b"\0" * (200 << 20), 9)
    with tifffile.TiffFile(path, mode="r+b") as file:
        page = file.pages.first
        end = path.stat().st_size
        page.tags["StripOffsets"].overwrite([end])
        page.tags["StripByteCounts"].overwrite([len(zeros)])
    with open(path, "ab") as opened:
        opened.write(zeros)
    said = refused("bombs", lambda: read_image(path), ImageReadError)
    assert "unpacks to more than its 49152 bytes" in said
    # One of more pixels than are read.
    tifffile.imwrite(path, np.zeros((1024, 1024, 3), np.float32), photometric="rgb")
    assert "524288 are read" in refused("bombs", lambda: read_image(path), ImageReadError)


numbers = st.sampled_from([0, 1, -1, 5, 5.5, 1e300, -1e9, 40000, float("nan"), "1", None, [1]])
points = st.lists(st.floats(-4, 12), min_size=3, max_size=6).map(lambda xs: [*xs, *xs[::-1]])
polygons = st.lists(points, min_size=1, max_size=3) | st.lists(
    st.lists(st.floats(-4, 12) | numbers, max_size=9), max_size=3
)
runs = st.lists(st.integers(-2, 48) | numbers, max_size=6)
crowds = st.fixed_dictionaries(
    {},
    optional={
        "size": st.sampled_from([[6, 8], [8, 6], [6], 6, None]),
        "counts": runs
        | st.text(st.characters(min_codepoint=40, max_codepoint=130), max_size=12)
        | st.integers(0, 48).map(lambda n: [n, 48 - n]),
    },
)


@examples(60)
@given(
    shapes_of=st.lists(polygons | crowds, max_size=3), height=st.sampled_from([6, 6, 6, 0, 10**9])
)
def test_shapes_of_coco_are_drawn_or_refused_in_words(tmp_path_factory, shapes_of, height):
    pytest.importorskip("pycocotools")
    root = tmp_path_factory.getbasetemp() / "coco"
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "val2017").mkdir(exist_ok=True)
    image = {"id": 1, "file_name": "a.jpg", "height": height, "width": 8}
    entries = [
        {"image_id": 1, "category_id": 5, "area": 5, "segmentation": each} for each in shapes_of
    ]
    text = json.dumps({"images": [image], "annotations": entries})
    (root / "annotations" / "instances_val2017.json").write_text(text)
    dataset = open_dataset("coco-voc", root)
    found = answer("shapes of COCO", lambda: dataset.raw_label(0), ImageReadError, memory=MEMORY)
    if isinstance(found, np.ndarray):
        assert found.shape == (6, 8) and set(found.ravel().tolist()) <= {0, 1, 255}
