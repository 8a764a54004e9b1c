"""Scores from confusion matrices, by hand and against torchmetrics."""

import json
import math
from contextlib import suppress

import numpy as np
import pytest
import torch

from deeplab_fast.engine.metrics import ImageScore, Metrics, worst_and_best
from deeplab_fast.testing import import_torchvision

# Rows are the labels. Class 2 is predicted and never labelled, class 3 is in neither.
BY_HAND = [
    [6, 1, 1, 0],
    [2, 10, 0, 0],
    [0, 0, 0, 0],
    [0, 0, 0, 0],
]


def test_by_hand():
    m = Metrics.from_confusion(np.array(BY_HAND), ("a", "b", "c", "d"))
    assert m.iou[:3] == pytest.approx((6 / 10, 10 / 13, 0.0))
    assert math.isnan(m.iou[3])
    # A false alarm counts against the mean, an absent class is left out of it.
    assert m.miou == pytest.approx((6 / 10 + 10 / 13 + 0) / 3)
    assert m.accuracy[:2] == pytest.approx((6 / 8, 10 / 12))
    assert math.isnan(m.accuracy[2]) and math.isnan(m.accuracy[3])
    assert m.mean_accuracy == pytest.approx((6 / 8 + 10 / 12) / 2)
    assert m.pixel_accuracy == pytest.approx(16 / 20)
    assert m.frequency_weighted_iou == pytest.approx(8 / 20 * 6 / 10 + 12 / 20 * 10 / 13)
    assert m.target_pixels == (8, 12, 0, 0) and m.predicted_pixels == (8, 11, 1, 0)
    assert m.absent == ("d",) and m.num_scored == 3


@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        pytest.param([0.2, 0.9, 0.5, 0.1, 0.7], 2, ([3, 0], [1, 4]), id="the-middle-left-out"),
        pytest.param([0.2, 0.9, 0.5], 4, ([0, 2], [1]), id="fewer-images"),
        pytest.param([0.2], 4, ([0], []), id="one-image"),
        pytest.param([math.nan, 0.3, 0.3], 1, ([1], [2]), id="no-score-and-equal-ones"),
    ],
)
def test_the_worst_and_the_best_images(scores, count, expected):
    images = [ImageScore(i, str(i), score, 1.0, 1) for i, score in enumerate(scores)]
    found = worst_and_best(images, count)
    for kind, indices in zip(("worst", "best"), expected, strict=True):
        mine = [(rank, score.index) for k, rank, score in found if k == kind]
        assert mine == list(enumerate(indices, start=1))


def test_table_and_json():
    m = Metrics.from_confusion(torch.tensor(BY_HAND), ("a", "b", "c", "d"))
    rows = {line.split("  ")[0].strip(): line.split() for line in m.table().splitlines()}
    assert rows["a"] == ["a", "60.00", "75.00", "40.00"]
    assert rows["c"] == ["c", "0.00", "-", "0.00"]
    assert rows["d"] == ["d", "-", "-", "0.00"]
    assert rows["mean IoU"] == ["mean", "IoU", "45.64", "(of", "3", "classes)"]
    assert "left out of the mean IoU: d" in m.table()
    content = json.loads(json.dumps(m.as_dict(), allow_nan=False))
    assert content["miou"] == m.miou and content["absent"] == ["d"]
    assert content["classes"][2] == {
        "name": "c",
        "iou": 0.0,
        "accuracy": None,
        "target_pixels": 0,
        "predicted_pixels": 1,
    }


@pytest.mark.parametrize(
    ("matrix", "exists"),
    [
        pytest.param([[9, 0], [0, 0]], False, id="one-class-of-two"),
        pytest.param([[0, 0, 0], [0, 9, 0], [0, 0, 0]], False, id="one-class-of-three"),
        pytest.param([[9, 1], [0, 0]], True, id="a-false-alarm"),
        pytest.param([[9]], True, id="all-there-is"),
    ],
)
def test_one_class_alone_has_no_mean(matrix, exists):
    names = ("a", "b", "c")[: len(matrix)]
    m = Metrics.from_confusion(np.array(matrix), names)
    for value in (m.miou, m.mean_accuracy, m.frequency_weighted_iou):
        assert math.isnan(value) is not exists
    assert m.pixel_accuracy == (0.9 if matrix == [[9, 1], [0, 0]] else 1)
    only = f"hold one class only ({'b' if len(matrix) == 3 else 'a'})"
    assert (only in m.note) is (only in m.table()) is not exists
    assert ("100.00" in m.table().split("mean IoU")[1].splitlines()[0]) is (len(matrix) == 1)
    assert (m.as_dict()["miou"] is None) is not exists


def test_scores_of_a_broken_run_are_marked():
    m = Metrics.from_confusion(np.array(BY_HAND), not_finite=7)
    assert "7 pixels have logits that are NaN or infinite" in m.note and m.note in m.table()
    assert m.as_dict()["not_finite_pixels"] == 7


def test_nothing_counted():
    m = Metrics.from_confusion(np.zeros((2, 2), np.int64))
    assert all(map(math.isnan, (m.miou, m.pixel_accuracy, m.mean_accuracy)))
    assert math.isnan(m.frequency_weighted_iou)
    assert m.absent == ("class 0", "class 1")
    assert m.as_dict()["miou"] is None and "-" in m.table()


def test_counts_beyond_floats_are_exact():
    # 2^53 + 1 has no float64: a matrix in floats would lose the pixel.
    m = Metrics.from_confusion(np.array([[2**53 + 1, 0], [0, 0]]))
    assert m.target_pixels == (2**53 + 1, 0) and m.pixel_accuracy == 1


@pytest.mark.parametrize(
    ("confusion", "classes", "message"),
    [
        pytest.param(np.zeros((2, 3), int), None, r"is \[2, 3\], expected \[C, C\]", id="shape"),
        pytest.param(np.zeros((2, 2)), None, "float64", id="dtype"),
        pytest.param(-np.ones((2, 2), int), None, "from -1, expected counts", id="negative"),
        pytest.param(np.zeros((2, 2), int), ("a",), "1 class names .* 2 classes", id="names"),
    ],
)
def test_what_is_no_confusion_matrix(confusion, classes, message):
    with pytest.raises(ValueError, match=message):
        Metrics.from_confusion(confusion, classes)


def test_against_torchmetrics():
    # torchmetrics imports torchvision where there is one, which may need help to load.
    with suppress(ImportError):
        import_torchvision()
    classification = pytest.importorskip("torchmetrics.functional.classification")
    target = torch.randint(0, 5, (4000,))
    predicted = torch.where(torch.rand(4000) < 0.7, target, torch.randint(0, 5, (4000,)))
    target[::17] = 255
    options = {"num_classes": 5, "ignore_index": 255}
    matrix = classification.multiclass_confusion_matrix(predicted, target, **options)
    m = Metrics.from_confusion(matrix)
    jaccard = classification.multiclass_jaccard_index(predicted, target, average=None, **options)
    accuracy = classification.multiclass_accuracy(predicted, target, average=None, **options)
    # torchmetrics works in fp32: three roundings of 6e-8.
    assert m.iou == pytest.approx(jaccard.tolist(), rel=2e-7)
    assert m.accuracy == pytest.approx(accuracy.tolist(), rel=2e-7)
    micro = classification.multiclass_accuracy(predicted, target, average="micro", **options)
    assert m.pixel_accuracy == pytest.approx(micro.item(), rel=2e-7)
