"""What an exported file says of itself: written, read back, refused where it is another's."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeplab_fast.data.preprocess import Preprocess, PreprocessBGR
from deeplab_fast.exporting import Description, DescriptionError
from deeplab_fast.exporting.description import KEY

OWN = Description(
    labels=True,
    photos=False,
    num_classes=3,
    classes=("sky", "road", "tree"),
    palette=((1, 2, 3), (255, 0, 9), (7, 7, 7)),
    channels="RGB",
    mean=(0.5, 0.4, 0.3),
    std=(0.1, 0.2, 0.3),
    resize=720,
    batch=None,
    size=None,
    multiple=16,
    smallest=33,
    precision="fp32",
    model="deeplabv3_resnet18",
    version="0.1.0",
)


@pytest.mark.parametrize(
    "own",
    [
        OWN,
        # Fixed, of photos, with nothing known of its classes.
        replace(OWN, photos=True, classes=None, palette=None, batch=1, size=(96, 128), resize=None),
        # One class, with names for it and the background; another order of channels.
        replace(
            OWN,
            num_classes=1,
            classes=("no", "yes"),
            palette=((0, 0, 0), (9, 9, 9)),
            channels="BGR",
        ),
        replace(OWN, resize=(100, 200), labels=False),
    ],
    ids=["dynamic", "fixed", "one-class", "exact-size"],
)
def test_what_is_written_is_read(own):
    assert Description.from_strings(own.as_strings(), "file") == own
    kind = PreprocessBGR if own.channels == "BGR" else Preprocess
    assert own.preprocess == kind(own.mean, own.std, own.resize)


def test_other_readers_find_what_they_want_by_name():
    strings = OWN.as_strings()
    assert json.loads(strings["classes"]) == ["sky", "road", "tree"]
    assert json.loads(strings["palette"])[1] == [255, 0, 9]
    assert json.loads(strings["mean"]) == [0.5, 0.4, 0.3] and strings["channels"] == "RGB"


def test_texts_of_inputs_and_results():
    assert OWN.input_text == "images float32 [N,3,H,W]"
    assert OWN.result_text == "labels uint8 [N,H,W]"
    fixed = replace(OWN, photos=True, labels=False, batch=1, size=(96, 128))
    assert fixed.input_text == "images uint8 [1,96,128,3]"
    assert fixed.result_text == "logits float32 [1,3,96,128]"
    assert replace(OWN, num_classes=300).result_text == "labels int64 [N,H,W]"


@pytest.mark.parametrize(
    ("change", "size", "words"),
    [
        ({}, (2, 48, 64), ""),
        ({}, (1, 48, 65), "multiples of 16"),
        ({}, (1, 16, 64), "33 or more"),
        ({"size": (48, 64)}, (1, 48, 80), "takes 48x64 only"),
        ({"batch": 1}, (2, 48, 64), "takes 1 at a time"),
        ({"size": (16, 16), "smallest": 1}, (1, 16, 16), ""),
    ],
    ids=["fits", "no-multiple", "small", "other-size", "other-batch", "fixed-and-small"],
)
def test_sizes_that_are_not_taken(change, size, words):
    reason = replace(OWN, **change).reason_against(*size)
    assert words in reason and bool(words) == bool(reason)


def _changed(**changes: object) -> dict[str, str]:
    return {KEY: json.dumps({**json.loads(OWN.as_strings()[KEY]), **changes})}


@pytest.mark.parametrize(
    "strings",
    [
        {KEY: "no JSON"},
        {KEY: "[1, 2]"},
        {KEY: "{}"},
        {KEY: "[" * 100_000},
        _changed(more=1),
        _changed(labels="yes"),
        _changed(num_classes=0),
        _changed(num_classes=10**30),
        _changed(num_classes=True),
        _changed(batch=-1),
        _changed(size=[96]),
        _changed(size=96),
        _changed(size=[0, 96]),
        _changed(mean=[0.5, 0.5]),
        _changed(mean="abc"),
        _changed(std=[0, 1, 1]),
        _changed(resize="720"),
        _changed(channels="XYZ"),
        _changed(classes=["a"] * 4),
        _changed(classes=[1, 2, 3]),
        _changed(palette=[[1, 2, 300]]),
        _changed(palette=[[1, 2]]),
        _changed(palette=5),
        _changed(model=None),
    ],
)
def test_another_description_is_refused(strings):
    with pytest.raises(DescriptionError, match="export the model again"):
        Description.from_strings(strings, "m.onnx")


def test_a_file_without_description_is_refused():
    with pytest.raises(DescriptionError, match=r"m\.onnx does not say.*deeplab_fast\.export wrote"):
        Description.from_strings({"author": "somebody"}, "m.onnx")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(name=st.sampled_from(sorted(Description.__dataclass_fields__)), value=_JSON)
def test_any_value_is_taken_or_refused_in_words(name, value):
    try:
        found = Description.from_strings(_changed(**{name: value}), "m.onnx")
    except DescriptionError:
        return
    again = Description.from_strings(found.as_strings(), "m.onnx")
    # NaN is no number that a file may have.
    assert again == found
