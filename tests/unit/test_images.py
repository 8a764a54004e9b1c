"""Reading photos of every kind, and finding them."""

import io
import os
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from deeplab_fast.data.images import (
    ImageReadError,
    as_rgb_array,
    exif_orientation,
    list_images,
    read_image,
)

# A 3x2 picture whose six pixels all differ: a wrong transposition or channel order shows.
RGB = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [255, 255, 255], [0, 0, 0]]], np.uint8
)
GREY = np.array([[0, 10, 20], [100, 200, 255]], np.uint8)


def grey3(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=2)


def save(tmp_path, image: Image.Image, name: str, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def png16(values: np.ndarray, colour_type: int) -> bytes:
    """A 16-bit PNG, which Pillow cannot write in colour; values [H, W, channels] uint16."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"),
        ("RGB", "bmp"),
        ("RGB", "tif"),
        ("RGB", "webp"),
        ("RGB", "ppm"),
    ],
)
def test_lossless_formats_give_the_pixels_back(tmp_path, mode, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path, Image.fromarray(RGB), f"a.{suffix}", **options)
    result = read_image(path)
    assert result.dtype == np.uint8 and result.flags.c_contiguous and result.flags.writeable
    np.testing.assert_array_equal(result, RGB)


def test_a_str_path_and_a_file_object_give_the_same(tmp_path):
    path = save(tmp_path, Image.fromarray(RGB), "a.png")
    np.testing.assert_array_equal(read_image(str(path)), RGB)
    with open(path, "rb") as file:
        np.testing.assert_array_equal(read_image(file), RGB)
    np.testing.assert_array_equal(read_image(io.BytesIO(path.read_bytes())), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    # What the camera stores so that the viewer's transposition shows RGB upright.
    stored = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, 1),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RGB, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    path = save(tmp_path, image, "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(path), RGB)
    assert exif_orientation(path) == orientation
    # Grey and without compression, which Pillow maps into memory.
    grey = Image.fromarray(np.ascontiguousarray(stored[..., 0]))
    for options in ({}, {"compression": "tiff_lzw"}):
        path = save(tmp_path, grey, "a.tif", exif=exif, **options)
        np.testing.assert_array_equal(read_image(path), RGB[..., :1].repeat(3, 2))


def test_files_without_an_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 9
    odd = save(tmp_path, Image.fromarray(RGB), "odd.png", exif=exif)
    (tmp_path / "a.npy").write_bytes(b"no picture")
    plain = save(tmp_path, Image.fromarray(RGB), "plain.png")
    for path in (odd, plain, tmp_path / "a.npy", tmp_path / "missing.png"):
        assert exif_orientation(path) == 1


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    path = save(tmp_path, Image.fromarray(RGB), "a.png", exif=b"Exif\0\0MM\0*garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(read_image(path), RGB)


def test_grey_and_one_bit(tmp_path):
    np.testing.assert_array_equal(
        read_image(save(tmp_path, Image.fromarray(GREY), "g.png")), grey3(GREY)
    )
    bits = GREY >= 100
    np.testing.assert_array_equal(
        read_image(save(tmp_path, Image.fromarray(bits), "b.png")), grey3(bits * np.uint8(255))
    )


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([9, 8, 7, 60, 50, 40, 200, 100, 0])
    assert image.mode == "P"
    expected = np.array([[[9, 8, 7], [60, 50, 40], [200, 100, 0]]], np.uint8)
    np.testing.assert_array_equal(read_image(save(tmp_path, image, "p.png")), expected)
    expected[0, 1] = 255
    transparent = save(tmp_path, image, "t.png", transparency=1)
    np.testing.assert_array_equal(read_image(transparent), expected)


def test_alpha_is_composited_on_white(tmp_path):
    rgba = np.zeros((1, 4, 4), np.uint8)
    rgba[0, :, :3] = (100, 0, 255)
    rgba[0, :, 3] = (255, 0, 128, 51)
    # alpha * colour + (1 - alpha) * 255, e.g. at alpha 128: 100 -> (12800 + 32385) / 255 = 177.2
    expected = [[100, 0, 255], [255, 255, 255], [177, 127, 255], [224, 204, 255]]
    path = save(tmp_path, Image.fromarray(rgba), "a.png")
    np.testing.assert_array_equal(read_image(path)[0], expected)
    np.testing.assert_array_equal(as_rgb_array(rgba)[0], expected)
    grey_alpha = np.array([[[100, 255], [100, 0], [100, 128]]], np.uint8)
    for source in (
        grey_alpha,
        save(tmp_path, Image.fromarray(grey_alpha), "la.png"),
    ):
        np.testing.assert_array_equal(as_rgb_array(source)[0, :, 0], [100, 255, 177])


def test_opaque_alpha_changes_nothing():
    rgba = np.concatenate([RGB, np.full((2, 3, 1), 255, np.uint8)], axis=2)
    np.testing.assert_array_equal(as_rgb_array(rgba), RGB)


# The extremes, a whole multiple of 257, one below and above a high byte's change.
SIXTEEN = np.array([[0, 255, 256, 257 * 77, 32767, 65535]], np.uint16)
EIGHT = np.array([[0, 0, 1, 77, 127, 255]], np.uint8)


@pytest.mark.parametrize(
    ("colour_type", "channels"),
    [
        pytest.param(0, 1, id="grey"),
        pytest.param(2, 3, id="rgb"),
        pytest.param(4, 2, id="grey-alpha"),
        pytest.param(6, 4, id="rgba"),
    ],
)
def test_sixteen_bit_png_keeps_the_high_byte_and_is_not_clipped(colour_type, channels):
    values = np.repeat(SIXTEEN[..., None], channels, axis=2)
    if channels in (2, 4):
        values[..., -1] = 65535
    result = read_image(io.BytesIO(png16(values, colour_type)))
    np.testing.assert_array_equal(result, grey3(EIGHT))


def test_sixteen_bit_tiff_and_arrays_follow_the_same_rule(tmp_path):
    np.testing.assert_array_equal(
        read_image(save(tmp_path, Image.fromarray(SIXTEEN), "a.tif")), grey3(EIGHT)
    )
    np.testing.assert_array_equal(as_rgb_array(SIXTEEN), grey3(EIGHT))
    np.testing.assert_array_equal(as_rgb_array(grey3(SIXTEEN)), grey3(EIGHT))
    tifffile = pytest.importorskip("tifffile")
    for name, photometric, values in (
        ("rgb.tif", "rgb", grey3(SIXTEEN)),
        ("white.tif", "miniswhite", 65535 - SIXTEEN),
    ):
        tifffile.imwrite(tmp_path / name, values, photometric=photometric)
        np.testing.assert_array_equal(read_image(tmp_path / name), grey3(EIGHT))


TWELVE = np.array([[0, 15, 16, 2048, 4095]], np.uint16)


def test_twelve_bits_in_sixteen_are_no_black_picture(tmp_path):
    path = save(tmp_path, Image.fromarray(TWELVE), "a.png")
    with pytest.raises(ImageReadError, match=r"a\.png: 16-bit samples up to 4095, .*--depth 12"):
        read_image(path)
    with pytest.raises(ImageReadError, match=r"16-bit samples up to 4095"):
        as_rgb_array(TWELVE)
    expected = grey3(np.array([[0, 0, 1, 128, 255]], np.uint8))
    np.testing.assert_array_equal(read_image(path, bits=12), expected)
    np.testing.assert_array_equal(as_rgb_array(TWELVE, bits=12), expected)
    # A dark picture of 16 bits, if it is said to be one.
    np.testing.assert_array_equal(read_image(path, bits=16), grey3((TWELVE >> 8).astype(np.uint8)))
    with pytest.raises(ImageReadError, match="samples up to 4095, and 10 bits hold 1023"):
        read_image(path, bits=10)
    with pytest.raises(ValueError, match="bits is 7, expected 8 to 16"):
        read_image(path, bits=7)


@pytest.mark.parametrize(
    ("high", "accepted"),
    [
        pytest.param(0, True, id="black"),
        pytest.param(1, False, id="all but black"),
        pytest.param((1 << 14) - 1, False, id="14 bits"),
        pytest.param(1 << 14, True, id="15 bits"),
    ],
)
def test_how_many_bits_a_sample_must_use(tmp_path, high, accepted):
    values = np.array([[0, high, high]], np.uint16)
    # Alpha is full where colours are dark.
    with_alpha = np.stack([values, np.full_like(values, 65535)], axis=2)
    path = save(tmp_path, Image.fromarray(values), "a.tif")
    for read in (lambda: read_image(path), lambda: as_rgb_array(with_alpha)):
        if accepted:
            np.testing.assert_array_equal(read(), grey3((values >> 8).astype(np.uint8)))
        else:
            with pytest.raises(ImageReadError, match=f"16-bit samples up to {high}"):
                read()


@pytest.mark.parametrize(
    ("bright", "accepted"),
    [
        pytest.param(1, False, id="one pixel without data"),
        pytest.param(4, False, id="0.1 %"),
        pytest.param(5, True, id="more than 0.1 %"),
    ],
)
def test_a_few_saturated_pixels_do_not_make_sixteen_bits(tmp_path, bright, accepted):
    values = np.full((40, 100), 4095, np.uint16)
    values.ravel()[:bright] = 65535
    path = save(tmp_path, Image.fromarray(values), "a.png")
    colour = io.BytesIO(png16(np.repeat(values[:, :, None], 3, axis=2), 2))
    if accepted:
        for source in (path, colour):
            np.testing.assert_array_equal(read_image(source)[..., 0], values >> 8)
        return
    said = rf"up to 4095, of 65535 but for {bright} above .* set those above to 4095 and shift"
    with pytest.raises(ImageReadError, match=said):
        read_image(path)
    with pytest.raises(ImageReadError, match=rf"but for {3 * bright} above .* store it with 8"):
        read_image(colour)
    # What the message says to do.
    fixed = np.minimum(values, 4095)
    assert (as_rgb_array(fixed, bits=12) == 255).all()


def test_a_black_picture_with_few_bright_pixels(tmp_path):
    values = np.zeros((40, 100), np.uint16)
    values[3, 4] = 65535
    np.testing.assert_array_equal(as_rgb_array(values)[..., 0], values >> 8)


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4)], ids=["RGB", "RGBA"])
def test_twelve_bits_of_a_colour_file(colour_type, channels):
    values = np.full((2, 2, channels), 4095, np.uint16)
    values[..., 3:] = 65535
    file = png16(values, colour_type)
    # Pillow keeps the high byte: 15.
    with pytest.raises(ImageReadError, match=r"16-bit samples up to 4095, .* 8 bits a sample"):
        read_image(io.BytesIO(file))
    with pytest.raises(ImageReadError, match=r"16-bit colour, .*12 bits were asked"):
        read_image(io.BytesIO(file), bits=12)
    assert (read_image(io.BytesIO(file), bits=16) == 15).all()


@pytest.mark.parametrize(
    ("bands", "extra", "photometric", "accepted"),
    [
        pytest.param(4, 0, "rgb", False, id="a fourth of no kind"),
        pytest.param(4, 2, "rgb", True, id="alpha"),
        pytest.param(4, 0, "minisblack", False, id="four greys"),
        pytest.param(2, 0, "minisblack", False, id="two greys"),
        pytest.param(2, 2, "minisblack", True, id="grey and alpha"),
        pytest.param(5, 0, "rgb", False, id="five"),
        pytest.param(3, None, "rgb", True, id="RGB"),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16], ids=["by Pillow", "by tifffile, some"])
def test_bands_that_are_no_colour(tmp_path, bands, extra, photometric, accepted, dtype):
    tifffile = pytest.importorskip("tifffile")
    top = np.iinfo(dtype).max
    values = np.full((3, 4, bands), top, dtype)
    values[..., 0] = top // 2
    path = tmp_path / "bands.tif"
    colours = 3 if photometric == "rgb" else 1
    samples = None if extra is None else (extra,) * (bands - colours)
    tifffile.imwrite(
        path, values, photometric=photometric, planarconfig="contig", extrasamples=samples
    )
    if accepted:
        assert read_image(path)[0, 0].tolist() == ([127] * 3 if colours == 1 else [127, 255, 255])
        return
    with pytest.raises(ImageReadError, match=f"{bands} bands, .*; write the bands that the model"):
        read_image(path)


def test_cmyk_and_ycbcr(tmp_path):
    # JPEG is lossy: flat colour, and two levels of slack for the chroma conversion.
    flat = Image.new("RGB", (16, 16), (200, 80, 40))
    for mode, quality in (("CMYK", 100), ("YCbCr", 100)):
        image = read_image(save(tmp_path, flat.convert(mode), f"{mode}.jpg", quality=quality))
        assert image.shape == (16, 16, 3)
        assert np.abs(image.astype(int) - (200, 80, 40)).max() <= 2, mode
    cmyk = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8))
    cmyk = Image.merge("CMYK", [Image.fromarray(np.asarray(cmyk)[..., i]) for i in range(4)])
    expected = [[255, 255, 255], [0, 255, 255], [0, 0, 0]]
    np.testing.assert_array_equal(read_image(save(tmp_path, cmyk, "c.tif"))[0], expected)


def test_lab(tmp_path):
    colours = Image.fromarray(np.array([[[255] * 3, [0] * 3, [200, 80, 40]]], np.uint8))
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.applyTransform(colours, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    result = read_image(save(tmp_path, image, "lab.tif"))
    # 8-bit L* has steps of 0.4, a* and b* steps of 1: half of one is up to two levels of blue.
    assert np.abs(result.astype(int) - np.asarray(colours)).max() <= 3


def test_float_grey_tiff(tmp_path):
    unit = np.array([[0.0, 0.25, 1.0]], np.float32)
    expected = grey3(np.array([[0, 64, 255]], np.uint8))  # 63.75 rounds to 64
    np.testing.assert_array_equal(
        read_image(save(tmp_path, Image.fromarray(unit), "u.tif")), expected
    )
    np.testing.assert_array_equal(
        read_image(save(tmp_path, Image.fromarray(unit * 255), "f.tif")), expected
    )
    np.testing.assert_array_equal(as_rgb_array(unit.astype(np.float64)), expected)


@pytest.mark.parametrize(
    "planar",
    [pytest.param(False, id="interleaved"), pytest.param(True, id="channels-first")],
)
def test_tiff_kinds_that_pillow_does_not_read(tmp_path, planar):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "rgb.tif"
    values = RGB.astype(np.float32) / 255
    if planar:
        tifffile.imwrite(
            path, values.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"
        )
    else:
        tifffile.imwrite(path, values, photometric="rgb")
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(path)
    np.testing.assert_array_equal(read_image(path), RGB)
    with open(path, "rb") as file:
        np.testing.assert_array_equal(read_image(file), RGB)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([0.0, 300.0], id="above-255"),
        pytest.param([-3.0, 1.0], id="negative"),
        pytest.param([0.0, np.nan], id="nan"),
        pytest.param([0.0, np.inf], id="infinite"),
    ],
)
def test_floats_without_a_known_range_are_refused(tmp_path, values):
    array = np.array([values], np.float32)
    path = save(tmp_path, Image.fromarray(array), "a.tif")
    with pytest.raises(ImageReadError, match=r"a\.tif: float samples from .* expected finite"):
        read_image(path)
    with pytest.raises(ImageReadError, match="float samples"):
        as_rgb_array(array)


def test_integers_beyond_sixteen_bits_are_refused(tmp_path):
    path = save(tmp_path, Image.fromarray(np.array([[0, 70000]], np.int32)), "a.tif")
    with pytest.raises(ImageReadError, match=r"70000.*0\.\.65535"):
        read_image(path)


def test_the_first_picture_of_an_animation_is_read(tmp_path):
    other = Image.new("RGB", (3, 2), (1, 2, 3))
    first = Image.fromarray(RGB)
    path = save(tmp_path, first, "a.webp", save_all=True, append_images=[other], lossless=True)
    np.testing.assert_array_equal(read_image(path), RGB)


def test_a_pil_image_is_taken_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path, Image.fromarray(RGB), "a.png", exif=exif)
    with Image.open(path) as image:
        np.testing.assert_array_equal(as_rgb_array(image), RGB)
    np.testing.assert_array_equal(as_rgb_array(Image.fromarray(GREY)), grey3(GREY))
    np.testing.assert_array_equal(as_rgb_array(path), np.rot90(RGB, -1))


def test_arrays(tmp_path):
    np.testing.assert_array_equal(as_rgb_array(GREY), grey3(GREY))
    np.testing.assert_array_equal(as_rgb_array(GREY[..., None]), grey3(GREY))
    np.testing.assert_array_equal(as_rgb_array(GREY > 50), grey3((GREY > 50) * np.uint8(255)))
    flipped = as_rgb_array(RGB[:, ::-1])
    assert flipped.flags.c_contiguous
    np.testing.assert_array_equal(flipped, RGB[:, ::-1])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        pytest.param(np.zeros((3, 8, 9), np.uint8), "channels come last", id="channels-first"),
        pytest.param(np.zeros((2, 8, 9, 3), np.uint8), r"\[2, 8, 9, 3\]", id="batch"),
        pytest.param(np.zeros((8, 9, 5), np.uint8), r"\[8, 9, 5\], expected", id="five-channels"),
        pytest.param(np.zeros((0, 9, 3), np.uint8), "no pixels", id="no-rows"),
        pytest.param(np.zeros((8, 9), np.int64), "int64, expected uint8", id="int64"),
        pytest.param(7, "expected an image as a path.*got int", id="number"),
    ],
)
def test_bad_arrays(bad, message):
    with pytest.raises(ValueError, match=message):
        as_rgb_array(bad)


def truncated(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


@pytest.fixture(scope="module")
def photo_bytes() -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    result = {}
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, kind)
        result[kind] = file.getvalue()
    return result


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_truncated_files_name_path_and_reason(tmp_path, photo_bytes, kind):
    path = tmp_path / "cut.img"
    path.write_bytes(photo_bytes[kind])
    read_image(path)
    path.write_bytes(truncated(photo_bytes[kind]))
    with pytest.raises(ImageReadError) as caught:
        read_image(path)
    assert caught.value.path == str(path) and str(path) in str(caught.value)
    assert caught.value.reason and "\n" not in caught.value.reason


def test_a_truncated_pil_image_too(tmp_path, photo_bytes):
    path = tmp_path / "cut.jpg"
    path.write_bytes(truncated(photo_bytes["JPEG"]))
    with Image.open(path) as image, pytest.raises(ImageReadError, match="truncated"):
        as_rgb_array(image)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_unreadable_files_name_path_and_reason(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "broken.tif").write_bytes(b"II*\0garbage")
    for name, reason in (
        ("empty.jpg", "empty"),
        ("text.jpg", "not a picture"),
        ("broken.tif", "."),
        ("missing.jpg", "[Nn]o such file"),
        ("", "folder"),
    ):
        with pytest.raises(ImageReadError, match=reason) as caught:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(ImageReadError, match="empty"):
        read_image(io.BytesIO())


def test_an_oversized_file_says_how_to_allow_it(tmp_path, monkeypatch):
    path = save(tmp_path, Image.fromarray(RGB), "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(ImageReadError, match="MAX_IMAGE_PIXELS"):
        read_image(path)


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ImageReadError("a.jpg", "empty")))
    assert (error.path, error.reason) == ("a.jpg", "empty")


@pytest.fixture
def tree(tmp_path):
    for name in (
        "b.jpg",
        "a.PNG",
        "notes.txt",
        ".hidden.png",
        "sub/c.tif",
        "sub/deep/d.webp",
        ".cache/e.png",
        "data.bin",
        "odd[1].png",
        "none/readme.md",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def names(paths, tree):
    return [path.relative_to(tree).as_posix() for path in paths]


def test_list_a_folder(tree):
    found = names(list_images(tree), tree)
    assert found == ["a.PNG", "b.jpg", "odd[1].png", "sub/c.tif", "sub/deep/d.webp"]


def test_list_files_keep_their_order_whatever_their_suffix(tree):
    given = [tree / "data.bin", str(tree / "b.jpg"), tree / "a.PNG"]
    assert names(list_images(given), tree) == ["data.bin", "b.jpg", "a.PNG"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        pytest.param("*.jpg", ["b.jpg"], id="suffix"),
        pytest.param("*.bin", ["data.bin"], id="unknown-suffix-asked-for"),
        pytest.param(
            "*",
            ["a.PNG", "b.jpg", "odd[1].png", "sub/c.tif", "sub/deep/d.webp"],
            id="everything-takes-images-and-folders",
        ),
        pytest.param("**/*.webp", ["sub/deep/d.webp"], id="recursive"),
        pytest.param("odd[1].png", ["odd[1].png"], id="a-file-named-like-a-pattern"),
        pytest.param("[ab].*", ["a.PNG", "b.jpg"], id="brackets"),
    ],
)
def test_list_patterns(tree, pattern, expected):
    assert names(list_images(str(tree / pattern)), tree) == expected


def test_list_names_a_file_once(tree):
    assert len(list_images([tree / "b.jpg", tree, str(tree / "*.jpg")])) == 5


def test_list_follows_links_and_ends(tree):
    if os.name == "nt":
        pytest.skip("links need a privilege on this system")
    (tree / "sub" / "loop").symlink_to(tree / "sub")
    assert len(list_images(tree / "sub")) == 2


def test_list_names_everything_that_gives_nothing(tree):
    with pytest.raises(FileNotFoundError) as caught:
        list_images([tree / "b.jpg", tree / "missing", tree / "none", str(tree / "*.xyz")])
    message = str(caught.value)
    assert f"{tree / 'missing'}: no such file" in message
    assert f"{tree / 'none'}: no image in this folder" in message and ".jpeg" in message
    assert f"{tree / '*.xyz'}: the pattern matches no image" in message
    assert "b.jpg" not in message
    with pytest.raises(ValueError, match="no image given"):
        list_images([])
