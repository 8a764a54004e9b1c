"""The check before training finds everything wrong in one pass."""

import numpy as np
import pytest
from PIL import Image

from deeplab_fast.data.check import DataError, check_dataset
from deeplab_fast.data.datasets import Sample, SegmentationDataset, open_dataset
from deeplab_fast.data.transforms import AugmentedDataset


def add(root, stem, label, size=(4, 6)):
    for folder in ("images", "masks"):
        (root / folder).mkdir(exist_ok=True)
    photo = root / "images" / f"{stem}.png"
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(photo)
    if label is not None:
        Image.fromarray(np.asarray(label, np.uint8)).save(root / "masks" / f"{stem}.png")


def filled(*values):
    return np.resize(np.array(values, np.uint8), (4, 6))


@pytest.fixture
def broken(tmp_path):
    """Good: a, b. Everything else is wrong in its own way, f in two."""
    add(tmp_path, "a", filled(0))
    add(tmp_path, "b", filled(0, 2, 255))
    add(tmp_path, "c", filled(1))
    (tmp_path / "images" / "c.png").write_bytes(b"no picture")
    add(tmp_path, "d", None)
    add(tmp_path, "e", filled(255))
    add(tmp_path, "f", np.array([[0, 3, 3, 77]]))
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_wrong_at_once(broken, workers):
    dataset = open_dataset("folder", broken, classes=["x", "y", "z"])
    report = check_dataset(dataset, workers=workers)
    images, masks = broken / "images", broken / "masks"
    assert [(p.index, p.kind, p.path) for p in report.problems] == [
        (2, "photo", str(images / "c.png")),
        (3, "mask", str(masks / "d.png")),
        (4, "empty", str(masks / "e.png")),
        (5, "size", str(masks / "f.png")),
        (5, "labels", str(masks / "f.png")),
    ]
    messages = [p.message for p in report.problems]
    assert "not a picture" in messages[0] and "cannot read the mask" in messages[1]
    assert "6x4 pixels" in messages[3] and "4x1" in messages[3]
    assert "label 3 (2 pixels), label 77 (1 pixel), outside the classes 0..2" in messages[4]
    # a: 24 of x; b: 8 each of x, z and ignored; c: 24 of y; e: 24 ignored; f: 1 of x.
    assert report.pixels == (24 + 8 + 1, 24, 8) and report.ignored_pixels == 8 + 24
    assert report.images_of == ((0, 1, 5), (2,), (1,)) and report.images == (3, 1, 1)
    assert report.absent == ()
    with pytest.raises(DataError, match="5 problems in 6 samples") as caught:
        report.raise_if_bad()
    assert all(message in str(caught.value) for message in messages)
    assert caught.value.report is report
    assert len(report.bad(allow_empty=True)) == 4
    assert len(report.as_dict()["problems"]) == 5


def test_a_good_data_set(tmp_path):
    add(tmp_path, "a", filled(0, 1))
    report = check_dataset(open_dataset("folder", tmp_path, classes=["x", "y", "z"]))
    report.raise_if_bad()
    assert report.problems == () and report.absent == ("z",)
    assert report.notes == ("no mask has the class z",)
    rows = [line.split() for line in report.table().splitlines()]
    assert rows[1] == ["x", "12", "50.00%", "1"] and rows[3] == ["z", "0", "0.00%", "0"]
    assert rows[4] == ["ignored", "0", "0.00%"]


def test_empty_masks_alone_may_be_allowed(tmp_path):
    add(tmp_path, "a", filled(255))
    report = check_dataset(open_dataset("folder", tmp_path, classes=2))
    report.raise_if_bad(allow_empty=True)
    with pytest.raises(DataError, match="every pixel is ignored"):
        report.raise_if_bad()


def test_values_are_judged_after_the_label_map(tmp_path):
    add(tmp_path, "a", filled(10, 20, 30))
    open_it = {"classes": 2, "label_map": {10: 0, 20: 1}}
    report = check_dataset(open_dataset("folder", tmp_path, **open_it))
    assert not report.problems and report.pixels == (8, 8) and report.ignored_pixels == 8
    report = check_dataset(open_dataset("folder", tmp_path, **open_it, unmapped="error"))
    assert [p.kind for p in report.problems] == ["labels"]
    assert "label 30 (8 pixels), which the label map" in report.problems[0].message


@pytest.mark.parametrize("classes", [1, 2])
def test_a_mask_of_0_and_255_alone_is_no_binary_mask(tmp_path, classes):
    add(tmp_path, "a", filled(0, 255))
    add(tmp_path, "b", filled(0, 0, 255))
    report = check_dataset(open_dataset("folder", tmp_path, classes=classes))
    (problem,) = report.problems
    assert (problem.index, problem.kind, problem.path) == (-1, "one class", "")
    name = "background" if classes == 1 else "class 0"
    assert f"every labelled pixel of all masks is '{name}' (class 0)" in problem.message
    assert "label 255 (20 pixels), which is ignored" in problem.message
    assert "--label-map 255=1" in problem.message
    assert report.ignored_values == {255: 20} and report.as_dict()["ignored_values"] == {"255": 20}
    assert "label 255 (20 pixels)" in report.table().splitlines()[-1]
    assert report.notes == (f"no mask has the class {'foreground' if classes == 1 else 'class 1'}",)
    with pytest.raises(DataError, match="255=1"):
        report.raise_if_bad(allow_empty=True)
    report.raise_if_bad(allow_one_class=True)
    mapped = {"classes": classes, "label_map": {255: 1}, "unmapped": "keep"}
    report = check_dataset(open_dataset("folder", tmp_path, **mapped))
    assert (report.problems, report.notes, report.pixels) == ((), (), (28, 20))


def test_a_map_to_the_class_that_is_ignored_is_not_advised_again(tmp_path):
    add(tmp_path, "a", filled(0, 255))
    given = {"classes": 2, "label_map": {255: 1}, "unmapped": "keep", "ignore_index": 1}
    report = check_dataset(open_dataset("folder", tmp_path, **given))
    (problem,) = report.problems
    for text in (problem.message, *report.notes):
        assert "label-map" not in text
    assert "ignore another number than 1, which is 'class 1': --ignore-index 255" in problem.message
    assert (
        check_dataset(open_dataset("folder", tmp_path, **given | {"ignore_index": 255})).problems
        == ()
    )


def test_masks_of_one_class_other_than_the_first(tmp_path):
    add(tmp_path, "a", filled(2))
    (problem,) = check_dataset(open_dataset("folder", tmp_path, classes=3)).problems
    assert "is 'class 2' (class 2): there is nothing to tell apart" in problem.message
    assert "label-map" not in problem.message


def test_some_masks_of_two_values(tmp_path):
    add(tmp_path, "a", filled(0, 1))
    add(tmp_path, "b", filled(0, 255))
    add(tmp_path, "c", filled(0, 1, 255))
    report = check_dataset(open_dataset("folder", tmp_path, classes=2))
    assert report.problems == ()
    (note,) = report.notes
    assert "1 of 3 masks hold 'class 0' and 255 alone" in note and "--label-map 255=1" in note
    # With more classes a void border beside the background is usual.
    add(tmp_path, "d", filled(2))
    assert check_dataset(open_dataset("folder", tmp_path, classes=3)).notes == ()


def test_values_that_the_label_map_leaves_out_are_told(tmp_path):
    add(tmp_path, "a", filled(10, 20, 30, 255))
    label_map = {10: 0, 20: 1, 255: 255}
    report = check_dataset(open_dataset("folder", tmp_path, classes=2, label_map=label_map))
    assert report.ignored_values == {30: 6, 255: 6}
    (note,) = report.notes
    assert "the masks hold label 30 (6 pixels), which the label map does not name" in note


def test_a_long_list_is_cut_in_the_message_only(tmp_path):
    add(tmp_path, "a", None)
    sample = Sample("a", tmp_path / "images" / "a.png", tmp_path / "masks" / "a.png")
    classes = open_classes()
    report = check_dataset(SegmentationDataset([sample] * 60, classes))
    with pytest.raises(DataError, match=r"\.\.\. and 10 more"):
        report.raise_if_bad()
    assert len(report.problems) == 60


def open_classes():
    from deeplab_fast.data.classes import generic_classes

    return generic_classes(2)


def test_augmented_data_are_refused(tmp_path):
    add(tmp_path, "a", filled(0))
    dataset = AugmentedDataset(open_dataset("folder", tmp_path, classes=2))
    with pytest.raises(TypeError, match="without augmentation"):
        check_dataset(dataset)


def test_camvid_has_no_problem(shared_data):
    dataset = open_dataset("camvid", shared_data / "camvid").select(range(0, 101, 25))
    report = check_dataset(dataset)
    report.raise_if_bad()
    assert sum(report.pixels) + report.ignored_pixels == 5 * 360 * 480
    # Road and sky are in every photo.
    assert report.images[0] == report.images[3] == 5
