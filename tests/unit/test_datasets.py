"""Every layout of data sets on tiny generated files, and what is said where something is wrong."""

import json
import re
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from deeplab_fast.data.check import check_dataset
from deeplab_fast.data.classes import class_set, generic_classes
from deeplab_fast.data.datasets import (
    LabelError,
    Sample,
    SegmentationDataset,
    bad_labels,
    open_dataset,
    parse_label_map,
    read_mask,
)
from deeplab_fast.data.images import ImageReadError
from deeplab_fast.data.transforms import AugmentedDataset

SIZE = (6, 8)


def photo(path, size=SIZE, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def mask(path, values, palette=False, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values))
    if palette:
        # Reversed: a colour read as a number would show.
        image.putpalette([255 - i // 3 for i in range(768)])
    image.save(path, **save)


def png(size, bits, colour_type, rows):
    """A PNG file of these rows, each behind its filter byte."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", size[1], size[0], bits, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def labels(*values):
    """[6, 8] of these values in turn."""
    return np.resize(np.array(values, dtype=np.uint8), SIZE)


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def names(dataset):
    return [sample.name for sample in dataset.samples]


# Masks


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_masks_give_indices(tmp_path, bits):
    values = labels(*range(min(2**bits, 12)))
    mask(tmp_path / "m.png", values, palette=True, bits=bits)
    read = read_mask(tmp_path / "m.png")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_masks_of_few_bits_give_the_stored_values(tmp_path, bits):
    values = labels(*range(2**bits))
    packed = np.zeros((SIZE[0], SIZE[1] * bits // 8), dtype=np.uint8)
    for i in range(8 // bits):
        packed |= values[:, i :: 8 // bits] << (8 - bits * (i + 1))
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    (tmp_path / "m.png").write_bytes(png(SIZE, bits, 0, rows))
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), values)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        pytest.param(labels(0, 255), np.uint8, id="grey"),
        pytest.param(labels(0, 1).astype(bool), np.uint8, id="1-bit"),
        pytest.param(labels(1, 2).astype(np.uint16) * 1000, np.int32, id="16-bit"),
    ],
)
@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_masks_keep_their_values(tmp_path, values, dtype, suffix):
    path = tmp_path / f"m{suffix}"
    if suffix == ".npy":
        np.save(path, values)
    else:
        mask(path, values)
    read = read_mask(path)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_masks_with_one_number_in_all_channels(tmp_path, mode, suffix):
    values = labels(0, 1, 7, 255)
    path = tmp_path / f"m{suffix}"
    Image.fromarray(values).convert(mode).save(path)
    np.testing.assert_array_equal(read_mask(path), values)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_masks_are_refused(tmp_path, mode):
    image = Image.fromarray(labels(0, 1)).convert(mode)
    image.putalpha(Image.fromarray(labels(255, 255, 254)))
    image.save(tmp_path / "m.png")
    with pytest.raises(ImageReadError, match=f"16 pixels are transparent \\(mode {mode}\\)"):
        read_mask(tmp_path / "m.png")


def test_formats_that_change_values_are_refused(tmp_path):
    grey = Image.fromarray(labels(0, 1))
    grey.save(tmp_path / "m.jp2")
    grey.save(tmp_path / "m.webp", lossless=True)
    Image.fromarray(labels(0, 1).repeat(4, 0).repeat(4, 1)).save(
        tmp_path / "m.tif", compression="jpeg"
    )
    # Wide channels would lose their low bytes, and a small largest value is stretched.
    wide = np.zeros((*SIZE, 3), ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    (tmp_path / "wide.png").write_bytes(png(SIZE, 16, 2, rows))
    (tmp_path / "m.pgm").write_bytes(b"P5 8 6 20\n" + labels(0, 1).tobytes())
    (tmp_path / "m.pbm").write_bytes(b"P4 8 6\n" + bytes(6))
    Image.fromarray(np.zeros(SIZE, np.float32)).save(tmp_path / "float.tif")
    for name, reason in (
        ("m.jp2", "JPEG2000 does not keep class numbers"),
        ("m.webp", "WEBP does not keep"),
        ("m.tif", "TIFF with jpeg compression does not keep"),
        ("wide.png", r"a colour picture of 16 bits a channel \(mode RGB\)"),
        ("m.pgm", "whose numbers Pillow changes"),
        ("m.pbm", "whose numbers Pillow changes"),
        ("float.tif", "float samples; a mask holds class numbers"),
    ):
        with pytest.raises(ImageReadError, match=reason):
            read_mask(tmp_path / name)
    (tmp_path / "m.pgm").write_bytes(b"P5 8 6 255\n" + labels(0, 1).tobytes())
    np.testing.assert_array_equal(read_mask(tmp_path / "m.pgm"), labels(0, 1))


def test_masks_that_hold_no_class_numbers(tmp_path):
    photo(tmp_path / "colour.png")
    mask(tmp_path / "lossy.jpg", labels(0, 1))
    np.save(tmp_path / "float.npy", np.zeros(SIZE))
    np.save(tmp_path / "flat.npy", np.zeros(3, np.uint8))
    (tmp_path / "empty.png").write_bytes(b"")
    mask(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 9, (64, 64), np.uint8))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:700])
    for name, reason in (
        ("colour.png", "mode RGB, red, green and blue differ in 48 pixels"),
        ("lossy.jpg", "JPEG does not keep class numbers"),
        ("float.npy", "float64, expected integers"),
        ("flat.npy", r"\[3\], expected \[H, W\]"),
        ("empty.png", "0 bytes"),
        ("cut.png", "truncated"),
        ("missing.png", "No such file"),
    ):
        with pytest.raises(ImageReadError, match=reason) as caught:
            read_mask(tmp_path / name)
        assert caught.value.path == str(tmp_path / name)


def test_grey_tiff_masks_of_four_bits_give_the_stored_values(tmp_path):
    values = labels(*range(16))
    rows = (values[:, ::2] << 4 | values[:, 1::2]).tobytes()
    # Width, height, bits a sample, no compression, black is 0, place of the rows, one strip.
    entries = [(256, 8), (257, 6), (258, 4), (259, 1), (262, 1), (273, 122), (278, 6), (279, 24)]
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + tags + struct.pack("<I", 0)
    (tmp_path / "m.tif").write_bytes(head.ljust(122, b"\0") + rows)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.tif"), values)


# Label maps


def pair(tmp_path, values, **options):
    pixels = photo(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", values)
    samples = [Sample("a", tmp_path / "a.png", tmp_path / "a.npy")]
    return pixels, SegmentationDataset(samples, generic_classes(3), **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_label_map_ignores_what_it_does_not_name(tmp_path, dtype):
    values = np.resize(np.array([7, 9, 11, 12, 255], dtype), SIZE)
    pixels, dataset = pair(tmp_path, values, label_map={7: 0, 9: 2, 12: 255})
    image, label = dataset[0]
    np.testing.assert_array_equal(image, pixels)
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, labels(0, 2, 255, 255, 255))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_label_map_refuses_what_it_does_not_name(tmp_path, dtype):
    values = np.resize(np.array([7, 9, 11, 255], dtype), SIZE)
    _, dataset = pair(tmp_path, values, label_map={7: 0, 9: 2}, unmapped="error")
    with pytest.raises(LabelError, match=r"a\.npy: label 11 \(12 pixels\), which the label map"):
        dataset[0]
    # ignore_index itself is known.
    _, dataset = pair(tmp_path, values, label_map={7: 0, 9: 2, 11: 1}, unmapped="error")
    np.testing.assert_array_equal(dataset[0][1], labels(0, 2, 1, 255))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_label_map_keeps_what_it_does_not_name(tmp_path, dtype):
    values = np.resize(np.array([0, 255, 2, 9], dtype), SIZE)
    _, dataset = pair(tmp_path, values, label_map={255: 1}, unmapped="keep")
    np.testing.assert_array_equal(dataset[0][1], labels(0, 1, 2, 9))
    wide = np.resize(np.array([0, 300, 70000], np.int32), SIZE)
    _, dataset = pair(tmp_path, wide, label_map={300: 1}, unmapped="keep")
    np.testing.assert_array_equal(dataset[0][1], np.resize(np.array([0, 1, 70000]), SIZE))


def test_label_maps_as_text():
    assert parse_label_map("255=1") == {255: 1}
    assert parse_label_map(" 255=1, 7 = 0,-1=255") == {255: 1, 7: 0, -1: 255}
    for text in ("", "255", "a=1", "1=2=3", "255=1,255=0"):
        with pytest.raises(
            ValueError, match=f"--label-map is '{text}', expected raw value = class"
        ):
            parse_label_map(text)


def test_one_class_has_labels_0_and_1(tmp_path):
    photo(tmp_path / "images" / "a.png")
    mask(tmp_path / "masks" / "a.png", labels(0, 1, 255))
    for classes, name in ((1, "foreground"), ("1", "foreground"), (["crack"], "crack")):
        dataset = open_dataset("folder", tmp_path, classes=classes)
        assert dataset.classes.classes == ("background", name)
        assert (dataset.num_classes, dataset.outputs, dataset.ignore_index) == (2, 1, 255)
        np.testing.assert_array_equal(dataset[0][1], labels(0, 1, 255))
        assert AugmentedDataset(dataset).outputs == dataset.select([0]).outputs == 1
    assert open_dataset("folder", tmp_path, classes=2).outputs == 2
    with pytest.raises(ValueError, match="its only class is 'background'"):
        open_dataset("folder", tmp_path, classes=["background"])


def test_ignore_index_outside_a_byte_widens_the_labels(tmp_path):
    _, dataset = pair(tmp_path, labels(0, 9), label_map={0: 1}, ignore_index=-1)
    label = dataset[0][1]
    assert label.dtype == np.int32 and dataset.classes.ignore_index == -1
    np.testing.assert_array_equal(label, np.resize(np.array([1, -1]), SIZE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"label_map": {0: 3}}, r"--label-map sends 0 to 3; .* 0\.\.2", id="class"),
        pytest.param({"label_map": {}}, "sends nothing", id="empty"),
        pytest.param({"label_map": {"x": 1}}, "expected a mapping of raw value", id="key"),
        pytest.param({"unmapped": "drop"}, "expected 'ignore', 'error'", id="unmapped"),
        pytest.param({"ignore_index": 1.5}, "ignore_index is 1.5", id="ignore_index"),
    ],
)
def test_label_maps_that_do_not_fit(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        pair(tmp_path, labels(0), **options)


def test_a_mask_of_another_size_is_named(tmp_path):
    _, dataset = pair(tmp_path, np.zeros((6, 9), np.uint8))
    with pytest.raises(ValueError, match=r"a\.png has 8x6 pixels and its mask .*a\.npy 9x6"):
        dataset[0]


def test_bad_labels():
    assert bad_labels(labels(0, 2, 255), 3, 255) == {}
    assert bad_labels(labels(0, 3, 254, 3), 3, 255) == {3: 24, 254: 12}
    assert bad_labels(np.array([-1, -2, 5]), 5, -1) == {-2: 1, 5: 1}


def test_select_repeats_and_orders(tmp_path):
    for stem in "abc":
        photo(tmp_path / "images" / f"{stem}.png")
        mask(tmp_path / "masks" / f"{stem}.png", labels(1))
    dataset = open_dataset("folder", tmp_path, classes=2)
    chosen = dataset.select([2, 0, 2])
    assert names(chosen) == ["c", "a", "c"] and names(dataset) == ["a", "b", "c"]
    assert chosen[2][1][0, 0] == 1


# Layouts


def voc(base):
    for stem in ("t1", "t2", "v1", "s1", "s2"):
        photo(base / "JPEGImages" / f"{stem}.jpg")
    for stem, value in (("t1", 1), ("t2", 2), ("v1", 20)):
        mask(base / "SegmentationClass" / f"{stem}.png", labels(0, value, 255), palette=True)
    lists = base / "ImageSets" / "Segmentation"
    text(lists / "train.txt", "t1", "t2")
    text(lists / "val.txt", "v1")
    text(lists / "trainval.txt", "t1", "t2", "v1")


@pytest.mark.parametrize("inside", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc(tmp_path, inside):
    voc(tmp_path / inside)
    for split, stems in (
        ("train", ["t1", "t2"]),
        ("val", ["v1"]),
        ("trainval", ["t1", "t2", "v1"]),
    ):
        assert names(open_dataset("voc", tmp_path, split)) == stems
    dataset = open_dataset("voc", tmp_path)
    image, label = dataset[0]
    assert image.shape == (*SIZE, 3) and dataset.classes == class_set("voc")
    np.testing.assert_array_equal(label, labels(0, 20, 255))


@pytest.mark.parametrize("listed", [True, False])
def test_voc_augmented_with_pngs(tmp_path, listed):
    voc(tmp_path)
    for stem, value in (("t1", 3), ("t2", 3), ("s1", 3), ("s2", 3), ("v1", 3)):
        mask(tmp_path / "SegmentationClassAug" / f"{stem}.png", labels(value))
    if listed:
        text(
            tmp_path / "ImageSets" / "Segmentation" / "trainaug.txt",
            *(f"/JPEGImages/{s}.jpg /SegmentationClassAug/{s}.png" for s in ("t1", "s2")),
        )
    dataset = open_dataset("voc", tmp_path, "trainaug")
    # Without a list: all masks but those of val.
    assert names(dataset) == (["t1", "s2"] if listed else ["s1", "s2", "t1", "t2"])
    np.testing.assert_array_equal(dataset[0][1], labels(3))


def test_voc_augmented_with_sbd(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    voc(tmp_path / "voc")
    sbd = tmp_path / "release" / "dataset"
    text(sbd / "train.txt", "s1", "v1", "t1")
    text(sbd / "val.txt", "s2", "t2")
    (sbd / "cls").mkdir()
    for stem in ("s1", "s2", "t1", "v1"):
        # As SBD stores it: a struct of 1x1 with the field Segmentation.
        content = {"GTcls": {"Segmentation": labels(4, 0), "Boundaries": np.zeros(1)}}
        scipy_io.savemat(sbd / "cls" / f"{stem}.mat", content)
    dataset = open_dataset("voc", tmp_path / "voc", "trainaug", sbd_root=tmp_path / "release")
    # All of both but VOC's val, which SBD's train contains here.
    assert names(dataset) == ["s1", "s2", "t1", "t2"]
    np.testing.assert_array_equal(dataset[0][1], labels(4, 0))
    # VOC's own masks where there are any.
    np.testing.assert_array_equal(dataset[2][1], labels(0, 1, 255))
    with pytest.raises(FileNotFoundError, match=r"SegmentationClassAug \(PNG\).*sbd_root names"):
        open_dataset("voc", tmp_path / "voc", "trainaug")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint16])
def test_sbd_is_read_as_scipy_writes_it(tmp_path, compressed, dtype):
    scipy_io = pytest.importorskip("scipy.io")
    wanted = np.arange(35, dtype=dtype).reshape(5, 7)
    content = {
        "other": np.zeros(3),
        "GTcls": {"Boundaries": np.zeros(9), "Segmentation": wanted, "Name": "x"},
    }
    scipy_io.savemat(tmp_path / "a.mat", content, do_compression=compressed)
    found = read_mask(tmp_path / "a.mat")
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == (np.uint8 if dtype == np.uint8 else np.int32)
    # Cut at every place it is refused in words.
    whole = (tmp_path / "a.mat").read_bytes()
    for end in range(0, len(whole) - 8, 7):
        (tmp_path / "cut.mat").write_bytes(whole[:end])
        with pytest.raises(ImageReadError):
            read_mask(tmp_path / "cut.mat")


def test_cityscapes(tmp_path):
    for split, city, stem in (
        ("train", "ulm", "ulm_0_0"),
        ("train", "bonn", "bonn_0_0"),
        ("val", "lindau", "lindau_0_0"),
    ):
        photo(tmp_path / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
        folder = tmp_path / "gtFine" / split / city
        mask(folder / f"{stem}_gtFine_labelIds.png", labels(7, 33, 23, 0, 6, 255))
    assert names(open_dataset("cityscapes", tmp_path, "train")) == ["bonn_0_0", "ulm_0_0"]
    assert len(open_dataset("cityscapes", tmp_path, "trainval")) == 3
    dataset = open_dataset("cityscapes", tmp_path)
    # road, bicycle, sky; unlabelled, ground and licence plate are ignored.
    np.testing.assert_array_equal(dataset[0][1], labels(0, 18, 10, 255, 255, 255))
    mapped = {value for value in dataset.label_map.values() if value != 255}
    assert mapped == set(range(19)) == set(range(dataset.num_classes))
    mask(dataset.samples[0].mask, labels(34))
    with pytest.raises(LabelError, match=r"label 34 \(48 pixels\)"):
        dataset[0]
    with pytest.raises(ValueError, match="split is 'test', expected train, val, trainval"):
        open_dataset("cityscapes", tmp_path, "test")


@pytest.mark.parametrize("inside", ["", "ADEChallengeData2016"])
def test_ade20k(tmp_path, inside):
    for folder in ("training", "validation"):
        photo(tmp_path / inside / "images" / folder / "ADE_1.jpg")
        mask(tmp_path / inside / "annotations" / folder / "ADE_1.png", labels(0, 1, 150))
    for split in ("train", "val"):
        dataset = open_dataset("ade20k", tmp_path, split)
        assert dataset.num_classes == 150
        np.testing.assert_array_equal(dataset[0][1], labels(255, 0, 149))
    mask(dataset.samples[0].mask, labels(151))
    with pytest.raises(LabelError, match="label 151"):
        dataset[0]


def test_ade20k_sample(shared_data):
    dataset = open_dataset("ade20k", shared_data / "ade20k_sample")
    image, label = dataset[0]
    assert len(dataset) == 3 and image.shape == (512, 683, 3)
    raw = np.asarray(Image.open(dataset.samples[0].mask)).astype(int)
    np.testing.assert_array_equal(label, np.where(raw == 0, 255, raw - 1))
    with pytest.raises(FileNotFoundError, match="training is missing"):
        open_dataset("ade20k", shared_data / "ade20k_sample", "train")


def camvid(root):
    for split, stems in (("train", ["0001TP_1", "0006R0_1"]), ("val", ["0016E5_1"])):
        for stem in stems:
            photo(root / split / f"{stem}.webp")
            mask(root / f"{split}annot" / f"{stem}.png", labels(*range(12)), palette=True, bits=4)
        lines = (
            f"/SegNet/CamVid/{split}/{s}.png /SegNet/CamVid/{split}annot/{s}.png" for s in stems
        )
        text(root / f"{split}.txt", *lines)


def test_camvid(tmp_path):
    camvid(tmp_path)
    assert names(open_dataset("camvid", tmp_path, "trainval")) == [
        "0001TP_1",
        "0006R0_1",
        "0016E5_1",
    ]
    dataset = open_dataset("camvid", tmp_path, "train", sequences=["0006R0"])
    assert names(dataset) == ["0006R0_1"] and dataset.ignore_index == 11
    np.testing.assert_array_equal(dataset[0][1], labels(*range(12)))
    with pytest.raises(ValueError, match="no image of train starts with 0016E5"):
        open_dataset("camvid", tmp_path, "train", sequences="0016E5")
    with pytest.raises(FileNotFoundError, match="looked for the folders test and testannot"):
        open_dataset("camvid", tmp_path, "test")


@pytest.mark.parametrize("listed", [True, False])
def test_camvid_of_one_split_alone(tmp_path, listed):
    for stem in ("0001TP_1", "0001TP_2"):
        photo(tmp_path / "test" / f"{stem}.png")
        mask(tmp_path / "testannot" / f"{stem}.png", labels(3))
    if listed:
        text(tmp_path / "test.txt", "test/0001TP_2.png testannot/0001TP_2.png")
    dataset = open_dataset("camvid", tmp_path, "test")
    assert names(dataset) == ["0001TP_1", "0001TP_2"][int(listed) :]
    np.testing.assert_array_equal(dataset[0][1], labels(3))
    for split, missing in (("val", "val and valannot"), ("trainval", "train and trainannot and")):
        with pytest.raises(FileNotFoundError, match=f"looked for the folders {missing}"):
            open_dataset("camvid", tmp_path, split)


def test_a_listed_file_that_is_missing_is_named_when_read(tmp_path):
    camvid(tmp_path)
    (tmp_path / "valannot" / "0016E5_1.png").unlink()
    with pytest.raises(ImageReadError, match=r"valannot.0016E5_1\.png: No such file"):
        open_dataset("camvid", tmp_path)[0]


def test_camvid_itself(shared_data):
    dataset = open_dataset("camvid", shared_data / "camvid", "train")
    assert len(dataset) == 367 and len(open_dataset("camvid", shared_data / "camvid")) == 101
    for index in (0, 366):
        image, label = dataset[index]
        assert image.shape == (360, 480, 3) and label.max() <= 11
        np.testing.assert_array_equal(label, np.asarray(Image.open(dataset.samples[index].mask)))


def coco(root):
    (root / "annotations").mkdir(parents=True)
    square = [[0.0, 0.0, 4.0, 0.0, 4.0, 6.0, 0.0, 6.0]]
    right = [[2.0, 0.0, 8.0, 0.0, 8.0, 6.0, 2.0, 6.0]]
    # Column by column: 42 pixels outside, 6 inside.
    crowd = {"size": list(SIZE), "counts": [42, 6]}
    objects = [
        # 1 is COCO's person, 15 of VOC; 44 bottle, 5 of VOC; 13 is not in VOC.
        {"image_id": 1, "category_id": 1, "segmentation": square, "area": 24},
        {"image_id": 1, "category_id": 44, "segmentation": right, "area": 36},
        {"image_id": 1, "category_id": 13, "segmentation": right, "area": 36},
        {"image_id": 2, "category_id": 1, "segmentation": crowd, "area": 2000},
    ]
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]} for i in (2, 1, 3)
    ]
    for split in ("train", "val"):
        for i in (1, 2, 3):
            photo(root / f"{split}2017" / f"{i}.jpg")
        content = json.dumps({"images": images, "annotations": objects})
        (root / "annotations" / f"instances_{split}2017.json").write_text(content)


def test_coco_with_voc_labels(tmp_path):
    pytest.importorskip("pycocotools")
    coco(tmp_path)
    dataset = open_dataset("coco-voc", tmp_path)
    assert names(dataset) == ["1", "2", "3"]
    expected = np.zeros(SIZE, np.uint8)
    expected[:, 2:] = 5
    expected[:, :4] = 15
    # Both objects.
    expected[:, 2:4] = 255
    np.testing.assert_array_equal(dataset[0][1], expected)
    assert (dataset[1][1] == 15).sum() == 6 and (dataset[1][1][:, 7] == 15).all()
    assert not dataset[2][1].any()
    # More than 1000 pixels of the 20 classes: image 2 only.
    assert names(open_dataset("coco-voc", tmp_path, "train")) == ["2"]


def test_coco_without_pycocotools(tmp_path, monkeypatch):
    coco(tmp_path)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match="needs pycocotools, which is not installed"):
        open_dataset("coco-voc", tmp_path)


def test_folder(tmp_path):
    for split in ("train", "val"):
        photo(tmp_path / "img" / split / "x.jpg")
        photo(tmp_path / "img" / split / "y.png")
        mask(tmp_path / "gt" / split / "x.png", labels(1))
        mask(tmp_path / "gt" / split / "y.tif", labels(0))
    options = {"classes": ["a", "b"], "images": "img", "masks": "gt"}
    dataset = open_dataset("folder", tmp_path, "val", **options)
    assert names(dataset) == ["x", "y"] and dataset.classes.classes == ("a", "b")
    assert dataset[0][1].all() and not dataset[1][1].any()
    with pytest.raises(FileNotFoundError, match=r"for the split 'test'; there are: train, val"):
        open_dataset("folder", tmp_path, "test", **options)
    photo(tmp_path / "img" / "val" / "x.png")
    with pytest.raises(ValueError, match="have the same stem"):
        open_dataset("folder", tmp_path, "val", **options)


NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(("one", "other"), [(NFC, NFD), (NFD, NFC)], ids=["nfc-photo", "nfd-photo"])
def test_names_are_one_in_all_forms_of_unicode(tmp_path, one, other):
    photo(tmp_path / "images" / f"{one}.png")
    mask(tmp_path / "masks" / f"{other}.png", labels(1))
    folder = open_dataset("folder", tmp_path, classes=2)
    text(tmp_path / "pairs.csv", "image,mask", f"images/{other}.png,masks/{one}.png")
    table = open_dataset(tmp_path / "pairs.csv", classes=2)
    for stem in (one, other):
        photo(tmp_path / "camvid" / "val" / f"{stem}2.png")
    (tmp_path / "camvid" / "val" / f"{other}2.png").unlink()
    mask(tmp_path / "camvid" / "valannot" / f"{other}2.png", labels(1))
    text(tmp_path / "camvid" / "val.txt", f"val/{other}2.png")
    camvid = open_dataset("camvid", tmp_path / "camvid", sequences=one)
    for dataset in (folder, table, camvid):
        assert len(dataset) == 1 and dataset[0][1].all()
        assert dataset.samples[0].image.exists() and dataset.samples[0].mask.exists()


@pytest.mark.parametrize(("one", "other"), [(NFC, NFD), (NFD, NFC)], ids=["nfc-disk", "nfd-disk"])
def test_split_folders_in_another_form_of_unicode(tmp_path, one, other):
    photo(tmp_path / "images" / one / "a.png")
    mask(tmp_path / "masks" / one / "a.png", labels(1))
    dataset = open_dataset("folder", tmp_path, classes=2, split=other)
    assert len(dataset) == 1 and dataset[0][1].all()
    with pytest.raises(FileNotFoundError, match=r"no folder .* for the split"):
        open_dataset("folder", tmp_path, classes=2, split=f"{other}2")


def test_a_mask_of_16_bits_with_transparency_is_no_colour_picture(tmp_path):
    photo(tmp_path / "images" / "a.png")
    (tmp_path / "masks").mkdir()
    rows = b"".join(b"\0" + row.tobytes() for row in np.zeros((*SIZE, 2), ">u2"))
    (tmp_path / "masks" / "a.png").write_bytes(png(SIZE, 16, 4, rows))
    with pytest.raises(ImageReadError, match="a grey picture with transparency of 16 bits"):
        open_dataset("folder", tmp_path, classes=2)[0]


def test_folders_of_a_table_in_another_form_of_unicode(tmp_path):
    photo(tmp_path / NFD / f"{NFD}.png")
    mask(tmp_path / NFD / f"{NFD}_mask.png", labels(1))
    rows = f"{NFC}/{NFC}.png,{NFC}/{NFC}_mask.png", f"{NFC}/missing{NFC}.png,{NFC}/x.png"
    text(tmp_path / "pairs.csv", "image,mask", *rows)
    dataset = open_dataset(tmp_path / "pairs.csv", classes=2)
    assert dataset[0][1].all()
    with pytest.raises(ImageReadError, match=f"missing{NFC}"):
        dataset[1]


def test_voc_and_cityscapes_names_in_another_form_of_unicode(tmp_path):
    lists = tmp_path / "voc" / "ImageSets" / "Segmentation"
    text(lists / "val.txt", NFC)
    photo(tmp_path / "voc" / "JPEGImages" / f"{NFD}.jpg")
    mask(tmp_path / "voc" / "SegmentationClass" / f"{NFD}.png", labels(1))
    assert open_dataset("voc", tmp_path / "voc")[0][1].all()
    base = tmp_path / "cityscapes"
    photo(base / "leftImg8bit" / "val" / NFC / f"{NFC}_leftImg8bit.png")
    mask(base / "gtFine" / "val" / NFD / f"{NFD}_gtFine_labelIds.png", labels(7))
    assert not open_dataset("cityscapes", base)[0][1].any()


def test_the_same_name_in_two_forms_of_unicode(tmp_path):
    photo(tmp_path / "images" / f"{NFC}.png")
    for stem in (NFC, NFD):
        mask(tmp_path / "masks" / f"{stem}.png", labels(1))
    with pytest.raises(ValueError, match="the same name in two forms of Unicode"):
        open_dataset("folder", tmp_path, classes=2)
    photo(tmp_path / "images" / f"{NFD}.png")
    (tmp_path / "masks" / f"{NFD}.png").unlink()
    with pytest.raises(ValueError, match="have the same stem"):
        open_dataset("folder", tmp_path, classes=2)


def test_why_lossy_masks_do_not_count(tmp_path):
    for stem in ("a", "b"):
        photo(tmp_path / "images" / f"{stem}.png")
        mask(tmp_path / "masks" / f"{stem}.JPG", labels(1))
    with pytest.raises(FileNotFoundError, match=r"; 2 files there \(\.JPG\) count for nothing, as"):
        open_dataset("folder", tmp_path, classes=2)
    mask(tmp_path / "masks" / "b.png", labels(1))
    dataset = open_dataset("folder", tmp_path, classes=2)
    assert dataset[1][1].all()
    with pytest.raises(ImageReadError, match=r"a\.JPG: JPEG does not keep class numbers; store"):
        dataset[0]
    for stem in ("c", "d"):
        photo(tmp_path / "camvid" / "val" / f"{stem}.png")
        mask(tmp_path / "camvid" / "valannot" / f"{stem}.jpg", labels(1))
    text(tmp_path / "camvid" / "val.txt", "c.png", "d.png")
    with pytest.raises(ImageReadError, match=r"c\.jpg: JPEG does not keep"):
        open_dataset("camvid", tmp_path / "camvid")[0]


# EXIF orientations


def turned(values, orientation):
    """What is stored so that the orientation shows the values."""
    return {
        2: values[:, ::-1],
        3: values[::-1, ::-1],
        4: values[::-1],
        5: values.swapaxes(0, 1),
        6: np.rot90(values, 1),
        7: values[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(values, -1),
    }[orientation]


def tagged(path, values, orientation, palette=False):
    exif = Image.Exif()
    exif[0x0112] = orientation
    mask(path, np.ascontiguousarray(values), palette=palette, exif=exif)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize(
    ("suffix", "dtype", "palette"),
    [
        pytest.param(".png", np.uint8, False, id="grey"),
        pytest.param(".png", np.uint8, True, id="palette"),
        pytest.param(".png", np.uint16, False, id="16-bit"),
        pytest.param(".tif", np.uint8, False, id="tiff"),
    ],
)
def test_a_mask_is_turned_by_its_own_tag(tmp_path, orientation, suffix, dtype, palette):
    values = np.arange(48).reshape(SIZE).astype(dtype)
    tagged(tmp_path / f"m{suffix}", turned(values, orientation), orientation, palette)
    np.testing.assert_array_equal(read_mask(tmp_path / f"m{suffix}"), values)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_photo_and_mask_of_one_tag_agree(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 2, (*SIZE, 1), np.uint8).repeat(3, 2)
    for folder, values in (("images", 255 * pixels), ("masks", pixels[..., 0])):
        tagged(tmp_path / folder / "a.png", turned(values, orientation), orientation)
    dataset = open_dataset("folder", tmp_path, classes=2)
    image, label = dataset[0]
    np.testing.assert_array_equal(image, 255 * pixels)
    np.testing.assert_array_equal(label, pixels[..., 0])
    assert check_dataset(dataset).notes == check_dataset(dataset).problems == ()


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("which", ["photo", "mask"])
def test_a_turned_file_beside_one_that_is_not(tmp_path, orientation, which):
    stored = np.zeros((*SIZE, 3), np.uint8)
    image, other = tmp_path / "images" / "a.png", tmp_path / "masks" / "a.png"
    if which == "photo":
        tagged(image, stored, orientation)
        mask(other, labels(0, 1))
        text_ = (
            f"the photo {image} is tagged with EXIF orientation {orientation} and so is turned to "
            f"6x8 pixels; its mask {other} is not turned and has 8x6, as the photo is stored"
        )
    else:
        photo(image)
        tagged(other, labels(0, 1), orientation)
        text_ = (
            f"the mask {other} is tagged with EXIF orientation {orientation} and so is turned to "
            f"6x8 pixels; its photo {image} is not turned and has 8x6, as the mask is stored"
        )
    dataset = open_dataset("folder", tmp_path, classes=2)
    with pytest.raises(ValueError, match=re.escape(text_)):
        dataset[0]
    (problem,) = check_dataset(dataset).problems
    assert problem.kind == "size" and text_ in problem.message
    # A mask of what is seen fits: nothing to tell.
    if which == "photo":
        mask(other, labels(0, 1).T)
        assert dataset[0][0].shape[:2] == (8, 6)
        assert check_dataset(dataset).notes == check_dataset(dataset).problems == ()


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_a_tag_that_sizes_do_not_tell_of_is_reported(tmp_path, orientation, suffix):
    side = 6 if orientation > 4 else 8
    image, other = tmp_path / "images" / "a.jpg", tmp_path / "masks" / f"a{suffix}"
    tagged(image, np.zeros((6, side, 3), np.uint8), orientation)
    values = np.resize(np.array([0, 1], np.uint8), (6, side))
    other.parent.mkdir()
    np.save(other, values) if suffix == ".npy" else mask(other, values)
    dataset = open_dataset("folder", tmp_path, classes=2)
    report = check_dataset(dataset)
    (note,) = report.notes
    assert report.problems == () and "sizes do not tell whether mask and photo then agree" in note
    assert f"{image} (orientation {orientation}) and {other} (1)" in note


def test_a_folder_without_pairs_tells_what_was_looked_for(tmp_path):
    photo(tmp_path / "images" / "x.jpg")
    mask(tmp_path / "masks" / "other.png", labels(1))
    with pytest.raises(FileNotFoundError, match=r"1 photos in .*images .*1 masks in .*masks"):
        open_dataset("folder", tmp_path, classes=2)


def test_csv(tmp_path):
    for stem in "ab":
        photo(tmp_path / "p" / f"{stem}.jpg")
        mask(tmp_path / "m" / f"{stem}.png", labels(2))
    table = tmp_path / "pairs.csv"
    text(table, "image, mask, split", "p/a.jpg,m/a.png,train", "p/b.jpg,m/b.png,val")
    assert names(open_dataset(table, classes=3)) == ["p/a.jpg", "p/b.jpg"]
    dataset = open_dataset("csv", split="val", file=table, classes="3")
    assert names(dataset) == ["p/b.jpg"] and dataset[0][1].min() == 2
    with pytest.raises(ValueError, match=r"no pair of the split 'test' \(there are: train, val\)"):
        open_dataset(table, split="test", classes=3)
    text(table, "image,label", "p/a.jpg,m/a.png")
    with pytest.raises(ValueError, match="column mask is missing"):
        open_dataset(table, classes=3)
    text(table, "image,mask", "p/a.jpg,")
    with pytest.raises(ValueError, match="line 2: image and mask must both be given"):
        open_dataset(table, classes=3)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_file_describes_a_data_set(tmp_path, suffix):
    photo(tmp_path / "data" / "images" / "x.jpg")
    mask(tmp_path / "data" / "masks" / "x.png", labels(0, 255, 7))
    spec = {"name": "folder", "root": "data", "classes": ["no", "yes"], "label_map": {0: 0, 255: 1}}
    path = tmp_path / f"spec{suffix}"
    # JSON is YAML; both have text as keys of the label map here.
    path.write_text(json.dumps(spec))
    dataset = open_dataset(path)
    # The map names 255, so it is a class; 7 is not named and ignored.
    np.testing.assert_array_equal(dataset[0][1], labels(0, 1, 255))
    assert open_dataset(path, ignore_index=9)[0][1].max() == 9
    path.write_text("[1]")
    with pytest.raises(ValueError, match="expected a mapping with the key name"):
        open_dataset(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=f"spec{suffix}"):
        open_dataset(path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param(
            ("pets",), ValueError, "no data set is named 'pets'; there are: voc", id="name"
        ),
        pytest.param(("voc",), ValueError, "--root is missing: which folder holds JPEG", id="root"),
        pytest.param(("voc", "{}/x"), FileNotFoundError, "x is not a folder", id="no-folder"),
        pytest.param(
            ("voc", "{}"),
            FileNotFoundError,
            r"looked for the folders JPEGImages and SegmentationClass and ImageSets in .*, "
            r".*VOC2012, .*VOCdevkit.VOC2012",
            id="not-voc",
        ),
        pytest.param(("camvid", "{}"), FileNotFoundError, "val and valannot", id="not-camvid"),
        pytest.param(("voc", "{}", "x"), ValueError, "split is 'x', expected train", id="split"),
        pytest.param(("folder", "{}"), ValueError, "classes is missing", id="classes"),
        pytest.param(("csv",), ValueError, "classes is missing", id="csv-classes"),
        pytest.param(("{}/a.csv",), FileNotFoundError, "no such file", id="no-csv"),
    ],
)
def test_what_cannot_be_opened(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        open_dataset(*(argument.format(tmp_path) for argument in arguments))


def test_unknown_options_are_named(tmp_path):
    with pytest.raises(ValueError, match="voc: unknown options size; allowed are classes,"):
        open_dataset("voc", tmp_path, size=3)
