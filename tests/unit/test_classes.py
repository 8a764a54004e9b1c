"""Class names, colours, and class lists from files."""

import dataclasses

import numpy as np
import pytest

from deeplab_fast.data.classes import (
    CLASS_SETS,
    ClassSet,
    class_set,
    distinct_colours,
    generic_classes,
    label_count,
    pascal_colour_map,
    same_name,
)


def test_pascal_colour_map_against_the_published_table():
    # The devkit's table for the 21 classes, and its colour 255 of the ignored border.
    table = """
        0 0 0  128 0 0  0 128 0  128 128 0  0 0 128  128 0 128  0 128 128  128 128 128  64 0 0
        192 0 0  64 128 0  192 128 0  64 0 128  192 0 128  64 128 128  192 128 128  0 64 0
        128 64 0  0 192 0  128 192 0  0 64 128
    """
    numbers = list(map(int, table.split()))
    expected = tuple(zip(numbers[0::3], numbers[1::3], numbers[2::3], strict=True))
    assert pascal_colour_map(21) == expected
    assert pascal_colour_map(256)[255] == (224, 224, 192)
    assert pascal_colour_map(0) == ()


def test_pascal_colours_differ_beyond_256():
    assert len(set(pascal_colour_map(3000))) == 3000
    with pytest.raises(ValueError, match="-1"):
        pascal_colour_map(-1)


@pytest.mark.parametrize(
    ("name", "count", "ignore_index", "spots"),
    [
        ("voc", 21, 255, {0: ("background", (0, 0, 0)), 15: ("person", (192, 128, 128))}),
        ("coco-voc", 21, 255, {0: ("__background__", (0, 0, 0)), 20: ("tvmonitor", (0, 64, 128))}),
        ("cityscapes", 19, 255, {0: ("road", (128, 64, 128)), 18: ("bicycle", (119, 11, 32))}),
        ("ade20k", 150, 255, {0: ("wall", (120, 120, 120)), 149: ("flag", (92, 0, 255))}),
        ("camvid", 11, 11, {0: ("sky", (128, 128, 128)), 10: ("bicyclist", (0, 128, 192))}),
    ],
)
def test_built_in_sets(name, count, ignore_index, spots):
    classes = class_set(name)
    assert classes is CLASS_SETS[name] and classes.name == name
    assert classes.num_classes == len(classes) == len(set(classes.classes)) == count
    assert classes.ignore_index == ignore_index
    for index, expected in spots.items():
        assert (classes.classes[index], classes.palette[index]) == expected


def test_ade20k_names_are_the_first_of_the_official_list(shared_data):
    lines = (shared_data / "ade20k_sample" / "objectInfo150.txt").read_text().splitlines()[1:]
    first = tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines)
    assert class_set("ade20k").classes == first


def test_torchvision_names_the_classes_alike():
    testing = pytest.importorskip("deeplab_fast.testing")
    try:
        testing.import_torchvision()
    except ImportError as error:
        pytest.skip(str(error))
    from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights

    weights = DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1
    assert class_set("coco-voc").classes == tuple(weights.meta["categories"])


def test_distinct_colours_are_apart_and_bright():
    colours = np.array(distinct_colours(24), float)
    # Rec. 601 luma; under half of such a colour a black photo still has a luma of 40.
    assert (colours @ (0.299, 0.587, 0.114)).min() > 80
    # No greys, of which photos and white lines are made.
    assert (colours.max(1) - colours.min(1)).min() > 40
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert apart[~np.eye(24, dtype=bool)].min() > 50
    assert distinct_colours(300)[:24] == distinct_colours(24)
    # More than the grid has.
    assert len(set(distinct_colours(3000))) == 3000


def test_background():
    assert class_set("voc").background == class_set("coco-voc").background == 0
    assert class_set("cityscapes").background is None
    assert generic_classes(3, ["car", "tree", "background"]).background == 2
    for name in ("_Background_", "unlabelled", "Unlabeled", "void"):
        assert generic_classes(2, [name, "cat"]).background == 0
    assert generic_classes(2).background is None


def test_classes_by_name_or_id():
    classes = generic_classes(3, ["background", "cat, tabby", "dog"])
    assert classes.ids_of("dog") == classes.ids_of("2") == (2,)
    assert classes.ids_of("background, dog") == (0, 2) and classes.ids_of("None") == ()
    # A name of the set goes before what it would mean.
    assert generic_classes(2, ["none", "0"]).ids_of("none") == (0,)
    assert generic_classes(2, ["none", "0"]).ids_of("0") == (1,)
    for wrong in ("bird", "3", ""):
        with pytest.raises(
            ValueError, match=r"is no class of generic; there are background, .* 0\.\.2"
        ):
            classes.ids_of(wrong)


def test_generic_classes():
    classes = generic_classes(300)
    assert classes.classes[299] == "class 299" and len(set(classes.palette)) == 300
    # Black is for a background alone.
    assert (0, 0, 0) not in classes.palette
    first, second = distinct_colours(2)
    assert generic_classes(2, ["background", "cat"]).palette == ((0, 0, 0), first)
    # The background needs no colour of its own.
    names = ["cat", "background", "dog"]
    assert generic_classes(3, names).palette == (first, (0, 0, 0), second)
    with pytest.raises(ValueError, match="2 class names for 3"):
        generic_classes(3, ["a", "b"])
    with pytest.raises(ValueError, match="0 classes"):
        generic_classes(0)


def test_a_class_set_is_a_checked_value():
    classes = ClassSet("two", ["a", "b"], [[0, 0, 0], [1, 2, 3]])
    assert classes.classes == ("a", "b") and classes.palette[1] == (1, 2, 3)
    assert hash(classes) == hash(ClassSet("two", ("a", "b"), ((0, 0, 0), (1, 2, 3))))
    with pytest.raises(dataclasses.FrozenInstanceError):
        classes.name = "x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((("a",), ()), "1 names and 0 colours", id="no-palette"),
        pytest.param(((), ()), "one or more names", id="no-class"),
        pytest.param((("a",), ((0, 0, 256),)), r"\(0, 0, 256\) is not a colour", id="above-255"),
        pytest.param((("a",), ((0, 0),)), "not a colour", id="two-parts"),
        pytest.param((("a",), (7,)), "not a colour", id="a-number"),
        pytest.param((("a",), ((0.5, 0, 0),)), "not a colour", id="a-float"),
        pytest.param(((1,), ((0, 0, 0),)), "one or more names", id="name-is-no-text"),
        pytest.param((("a",), ((0, 0, 0),), "x"), "ignore_index is 'x'", id="ignore-is-text"),
    ],
)
def test_wrong_class_sets(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassSet("mine", *arguments)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.txt", "# my classes\nroad\n\n  sky  \ncar park\n"),
        ("a.names", "road\nsky\ncar park"),
        ("bom.txt", "\ufeffroad\nsky\ncar park"),
        ("a.json", '["road", "sky", "car park"]'),
        ("map.json", '{"1": "sky", "0": "road", "2": "car park"}'),
        ("a.yaml", "- road\n- sky\n- car park\n"),
        ("map.yml", "0: road\n1: sky\n2: car park\n"),
        ("full.yaml", "classes: {0: road, 1: sky, 2: car park}\n"),
    ],
)
def test_files(tmp_path, file, content):
    path = tmp_path / file
    path.write_text(content, encoding="utf-8")
    classes = class_set(path)
    assert classes.classes == ("road", "sky", "car park")
    assert classes.palette == distinct_colours(3) and classes.ignore_index == 255
    assert classes.name == path.stem and class_set(str(path)) == classes


def test_a_file_with_everything(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        '{"name": "yard", "classes": ["hen", "cat"], "palette": [[1, 2, 3], [4, 5, 6]],'
        ' "ignore_index": null}'
    )
    assert class_set(path) == ClassSet("yard", ("hen", "cat"), ((1, 2, 3), (4, 5, 6)), None)


def test_other_sources():
    assert class_set(CLASS_SETS["voc"]) is CLASS_SETS["voc"]
    assert class_set(["hen", "cat"]).classes == ("hen", "cat")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        pytest.param("a.txt", "\n# nothing\n", "expected names", id="empty"),
        pytest.param("a.json", "[1, 2]", "1 is not a name; put it in quotes", id="numbers"),
        pytest.param("a.yaml", "- no\n- yes\n", "False is not a name", id="yaml-booleans"),
        pytest.param("a.json", "[", "line 1, column", id="broken-json"),
        pytest.param("a.yaml", "a: [", r"line \d, column", id="broken-yaml"),
        pytest.param("a.json", '{"0": "a", "2": "b"}', r"must name the ids 0\.\.1", id="gap"),
        pytest.param("a.json", '{"classes": ["a"], "colors": []}', "unknown keys colors", id="key"),
        pytest.param(
            "a.json",
            '{"classes": ["a", "b"], "palette": [[0, 0, 0]]}',
            "2 names and 1 colours",
            id="short-palette",
        ),
        pytest.param(
            "a.json", '{"classes": ["a"], "palette": "red"}', "palette is 'red'", id="palette-text"
        ),
    ],
)
def test_wrong_files_are_named(tmp_path, file, content, message):
    path = tmp_path / file
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        class_set(path)
    assert str(path) in str(caught.value)


def test_binary_files_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match=r"a\.txt"):
        class_set(path)


def test_unknown_names_list_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="'vok'; built in are: voc, coco-voc"):
        class_set("vok")
    with pytest.raises(FileNotFoundError, match=r"missing\.txt: no such file"):
        class_set(tmp_path / "missing.txt")


def test_one_class_has_a_background():
    one = generic_classes(1)
    both = one.of_labels()
    assert one.classes == ("foreground",) and both.classes == ("background", "foreground")
    assert both.palette == ((0, 0, 0), *one.palette) and both.of_labels() is both
    assert both.ignore_index == one.ignore_index == 255 and both.background == 0
    named = ClassSet("cracks", ("crack",), ((1, 2, 3),), ignore_index=7).of_labels()
    assert (named.classes, named.ignore_index) == (("background", "crack"), 7)
    with pytest.raises(ValueError, match="its only class is 'background'; name the class"):
        generic_classes(1, ["background"]).of_labels()
    assert [label_count(n) for n in (1, 2, 21)] == [2, 2, 21]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        pytest.param("Road", "road", True, id="case"),
        pytest.param("__background__", "background", True, id="underscores"),
        pytest.param("stra\u00dfe caf\u00e9", "stra\u00dfe cafe\u0301", True, id="unicode-form"),
        pytest.param("road", "roads", False, id="another"),
    ],
)
def test_names_that_are_the_same(one, other, same):
    assert same_name(one, other) is same_name(other, one) is same


def test_names_and_numbers_as_text():
    names = class_set("road, traffic light,sky")
    assert names.classes == ("road", "traffic light", "sky")
    assert names.palette == generic_classes(3, names.classes).palette
    assert class_set("road,").classes == ("road",)
    assert class_set("3") == generic_classes(3)
    for text in ("a,,b", "a,a", ","):
        with pytest.raises(ValueError, match=f"--classes is '{text}', expected names that differ"):
            class_set(text)
