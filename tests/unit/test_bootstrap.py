"""Which images bootstrapping repeats, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from deeplab_fast.data.check import DataReport
from deeplab_fast.engine.bootstrap import bootstrap_indices

# Class 0 is in every image, class 4 in none; 1 and 3 are in as many images.
IMAGES_OF = ((0, 1, 2, 3, 4), (1, 3), (0, 2, 4), (3, 4), ())
NAMES = ("background", "bicycle", "chair", "sofa", "table")


def test_images_of_the_given_classes_come_again():
    assert bootstrap_indices(IMAGES_OF, 5, classes=[1]) == [0, 1, 2, 3, 4, 1, 3]


def test_an_image_with_two_hard_classes_counts_once():
    assert bootstrap_indices(IMAGES_OF, 5, classes=[3, 1]) == [0, 1, 2, 3, 4, 1, 3, 4]


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        pytest.param(1, [0, 1, 2, 3, 4], id="1 changes nothing"),
        pytest.param(3, [0, 1, 2, 3, 4, 1, 3, 1, 3], id="3"),
    ],
)
def test_factor_is_how_often_an_image_occurs(factor, expected):
    assert bootstrap_indices(IMAGES_OF, 5, classes=[1], factor=factor) == expected


@pytest.mark.parametrize(
    "classes",
    [
        pytest.param(["bicycle", "sofa"], id="names"),
        pytest.param(["bicycle", 3], id="name and id"),
        pytest.param(["1", "sofa"], id="id as text"),
        pytest.param([np.int64(1), np.uint8(3)], id="numpy"),
    ],
)
def test_names_and_ids(classes):
    by_id = bootstrap_indices(IMAGES_OF, 5, classes=[1, 3])
    assert bootstrap_indices(IMAGES_OF, 5, classes=classes, names=NAMES) == by_id


def test_a_name_wins_over_a_number():
    names = ("3", "a", "b", "c", "d")
    assert bootstrap_indices(IMAGES_OF, 5, classes=["3"], names=names)[5:] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("rarest", "extra"),
    [
        pytest.param(1, [1, 3], id="tie goes to the lower id"),
        pytest.param(2, [1, 3, 4], id="both of the tie"),
        pytest.param(3, [0, 1, 2, 3, 4], id="three"),
        pytest.param(9, [0, 1, 2, 3, 4], id="more than there are: not those in all or no images"),
    ],
)
def test_rarest_classes_by_image_count(rarest, extra):
    assert bootstrap_indices(IMAGES_OF, 5, rarest=rarest) == [0, 1, 2, 3, 4, *extra]


def test_classes_in_every_image_are_not_rare():
    assert bootstrap_indices({0: [0, 1], 1: [1, 0], 2: []}, 2) == [0, 1]


def test_a_known_class_without_images_adds_nothing():
    assert bootstrap_indices(IMAGES_OF, 5, classes=["table"], names=NAMES) == [0, 1, 2, 3, 4]


def test_mapping_and_repeated_indices():
    assert bootstrap_indices({7: [2, 2, 0], 3: [1]}, 3, classes=[7]) == [0, 1, 2, 0, 2]


def test_report_of_the_data_check():
    report = DataReport("set", 5, NAMES, 255, (), (9, 4, 5, 2, 0), IMAGES_OF, 0)
    indices = bootstrap_indices(
        report.images_of, report.samples, classes=["chair"], names=report.classes
    )
    assert indices == [0, 1, 2, 3, 4, 0, 2, 4]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        pytest.param(
            {"classes": ["bike"], "names": NAMES}, r"\['bike'\].*1 \(bicycle\)", id="name"
        ),
        pytest.param({"classes": [1, 9]}, r"\[9\]; known: 0, 1, 2, 3, 4", id="id"),
        pytest.param({"classes": [-1]}, r"\[-1\]", id="negative id"),
        pytest.param({"classes": ["sofa"]}, "names=", id="name without names"),
        pytest.param({"classes": []}, "None takes the rarest", id="no class"),
        pytest.param({"classes": "sofa", "names": NAMES}, "list of", id="text, not a list"),
        pytest.param({"factor": 0}, "factor=0", id="factor"),
        pytest.param({"rarest": 0}, "rarest=0", id="rarest"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=text):
        bootstrap_indices(IMAGES_OF, 5, **options)


def test_index_outside_the_data_set():
    with pytest.raises(ValueError, match=r"class 0 names image 4.*0\.\.3"):
        bootstrap_indices(IMAGES_OF, 4, classes=[1])
