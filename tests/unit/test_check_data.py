"""The check before training finds everything wrong in one pass."""

import re

import numpy as np
import pytest
from PIL import Image

from deeplab_fast.data.check import DataError, check_dataset, grouped
from deeplab_fast.data.datasets import open_dataset
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
    with pytest.raises(DataError, match="5 problems in 4 of 6 samples") as caught:
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


def test_binary_masks_of_data_with_more_classes(tmp_path):
    add(tmp_path, "a", filled(0, 255))
    (problem,) = check_dataset(open_dataset("folder", tmp_path, classes=3)).problems
    assert "--label-map 255=1 with --classes 1" in problem.message


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


def test_what_is_alike_is_one_line(tmp_path):
    add(tmp_path, "a", None)
    for stem in "bcde":
        add(tmp_path, stem, filled(0, 1, 7))
    add(tmp_path, "f", filled(1, 7, 9))
    dataset = open_dataset("folder", tmp_path, classes=2)
    masks = [str(sample.mask) for sample in dataset.samples]
    twice = dataset.select([0, 0, 0, 0, *range(1, 6)])
    report = check_dataset(twice)
    assert len(report.problems) == 9
    # The missing mask four times, 7 in four masks (8 pixels each), and one mask of its own.
    missing, sevens, own = grouped(report.problems)
    assert missing.startswith("4 masks: cannot read the mask: No such file") and " and 1 more" in (
        missing
    )
    assert sevens == (
        "4 masks: label 7 (32 pixels), outside the classes 0..1 and not the ignored label "
        "255 (--ignore-index): "
        f"{masks[1]}, {masks[2]}, {masks[3]} and 1 more"
    )
    assert own == report.problems[-1].message
    with pytest.raises(DataError, match="9 problems in 9 of 9 samples") as caught:
        report.raise_if_bad()
    assert str(caught.value).splitlines()[1:4] == [f"  {line}" for line in (missing, sevens, own)]
    assert report.as_dict()["problems"][4]["values"] == {"7": 8}


def test_many_sets_of_wrong_values_are_told_by_value(tmp_path):
    # Mask i holds 10 and 10 + i: as many sets as masks, one value in all of them.
    for i in range(10):
        add(tmp_path, f"m{i}", filled(10, 10 + i))
    report = check_dataset(open_dataset("folder", tmp_path, classes=2))
    lines = grouped(report.problems)
    assert len(lines) == 7 and lines[0].startswith("10 masks: label 10 (132 pixels), outside")
    assert lines[1].startswith("1 masks: label 11 (12 pixels)")
    assert lines[-1] == "4 masks: 4 other labels that are no class"


@pytest.mark.parametrize(
    ("values", "options", "hint"),
    [
        pytest.param((0, 255), {"ignore_index": 254}, "--classes 1 --label-map 255=1", id="binary"),
        pytest.param((0, 1, 2, 11), {}, "11 beside the classes: if .* --ignore-index 11", id="11"),
        pytest.param(
            (0, 1, 255), {"ignore_index": 9}, "255 beside .* --ignore-index 255", id="255"
        ),
        pytest.param((1, 2, 3), {}, "begin at 1: --label-map 1=0,2=1,3=2", id="from 1"),
        pytest.param(
            (0, 1, 3), {}, "give 4 classes .* --ignore-index 3; .* 0=255,1=0,2=1,3=2", id="one more"
        ),
        pytest.param((0, 127, 254), {}, "in this order, --label-map 0=0,127=1,254=2", id="spread"),
        pytest.param((0, 3, 5, 7), {}, "name them all: the masks hold labels up to 7", id="more"),
        pytest.param(
            range(200), {}, "197 values that are no class: .* smoothing", id="no class numbers"
        ),
    ],
)
def test_hints_at_usual_causes(tmp_path, values, options, hint):
    size = (20, 20)
    for stem in "ab":
        add(tmp_path, stem, np.resize(np.array(values, np.uint8), size), size)
    report = check_dataset(open_dataset("folder", tmp_path, classes=3, **options))
    assert len(report.hints) == 1 and re.search(hint, report.hints[0])
    with pytest.raises(DataError, match="\nhint: "):
        report.raise_if_bad()


def test_a_single_mask_is_no_usual_cause(tmp_path):
    add(tmp_path, "a", filled(0, 1, 11))
    for stem in "bcd":
        add(tmp_path, stem, filled(0, 1))
    assert check_dataset(open_dataset("folder", tmp_path, classes=2)).hints == ()


def test_colours_that_stand_for_no_class(tmp_path):
    (tmp_path / "masks").mkdir()
    colours = {"road": (128, 64, 128), "sky": (70, 130, 180)}
    for stem in "ab":
        add(tmp_path, stem, None)
        pixels = np.resize(
            np.array([*colours.values(), (71, 130, 180), (9, 9, 9)], np.uint8), (4, 6, 3)
        )
        Image.fromarray(pixels).save(tmp_path / "masks" / f"{stem}.png")
    dataset = open_dataset("folder", tmp_path, mask_colours=colours)
    report = check_dataset(dataset)
    assert [problem.kind for problem in report.problems] == ["colours"] * 2
    assert report.problems[0].values == {(71, 130, 180): 6, (9, 9, 9): 6}
    assert grouped(report.problems)[0].startswith(
        "2 masks: colour 9 9 9 (12 pixels) and colour 71 130 180 (12 pixels), to which "
        "--mask-colours gives no class: "
    )
    near, cure = report.hints
    assert "71 130 180 is nearest to sky (70 130 180), 1 of 255 away" in near
    assert "as void" in cure and "--unknown-colours ignore" in cure
    good = open_dataset("folder", tmp_path, mask_colours=colours, unknown_colours="ignore")
    report = check_dataset(good)
    assert (report.problems, report.pixels, report.ignored_pixels) == ((), (12, 12), 24)


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
