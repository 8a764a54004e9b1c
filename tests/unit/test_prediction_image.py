"""The picture of one prediction: what each panel, the legend and the scale show."""

import numpy as np
import pytest
from PIL import Image

from deeplab_fast.data.classes import ClassSet
from deeplab_fast.engine.pictures import prediction_image

RED, GREEN, BLUE, GREY = (200, 0, 0), (0, 180, 0), (0, 0, 220), (120, 120, 120)
CLASSES = ClassSet("tiny", ("left", "right", "absent", "dot"), (RED, GREEN, BLUE, GREY))
# The ends of the scale.
SURE, UNSURE = (0, 0, 0), (255, 246, 170)
GAP = 6


def halves(height, width):
    """A white photo, left and right class, sure but at a pixel in the middle of each half."""
    image = np.full((height, width, 3), 255, np.uint8)
    labels = np.zeros((height, width), np.uint8)
    labels[:, width // 2 :] = 1
    return image, labels, np.ones((height, width), np.float32)


def panels(drawn, size, columns):
    """The four pictures, cut out of the whole; the first row of each is below its title."""
    array = np.asarray(drawn)
    height, width = size
    letters = max(11, drawn.width // 80)
    head = letters * 5 // 3
    found = []
    for i in range(4):
        top = i // columns * (head + height) + head
        left = i % columns * (width + GAP)
        found.append(array[top : top + height, left : left + width])
    return found, array[4 // columns * (head + height) :]


@pytest.mark.parametrize(
    ("shape", "width", "size", "columns"),
    [
        pytest.param((90, 160), 1600, (448, 797), 2, id="wide-enlarged"),
        pytest.param((1000, 2000), 646, (160, 320), 2, id="wide-reduced"),
        pytest.param((100, 100), 646, (320, 320), 2, id="square"),
        pytest.param((200, 100), 1298, (640, 320), 4, id="upright-in-one-row"),
        pytest.param((1, 600), 406, (1, 200), 2, id="lower-than-a-pixel"),
    ],
)
def test_panels_show_photo_labels_overlay_and_uncertainty(shape, width, size, columns):
    image, labels, probabilities = halves(*shape)
    # The right half: all four classes as likely.
    probabilities[:, shape[1] // 2 :] = 0.25
    drawn = prediction_image(image, labels, probabilities, CLASSES, width=width)
    assert drawn.mode == "RGB" and drawn.width == width
    (photo, painted, mixed, doubt), _ = panels(drawn, size, columns)
    assert photo.shape[:2] == size and (photo == 255).all()
    for at, colour, heat in ((0.25, RED, SURE), (0.75, GREEN, UNSURE)):
        place = size[0] // 2, int(at * size[1])
        assert tuple(painted[place]) == colour
        # Half of the colour, half of the white photo, rounded.
        assert np.abs(mixed[place] - (np.array(colour) + 255) / 2).max() <= 0.5
        assert tuple(doubt[place]) == heat


def test_colours_of_the_uncertainty_grow_lighter_over_its_whole_range():
    image, labels, probabilities = halves(20, 320)
    # From certain at the left to all four classes as likely at the right, a pixel for a pixel.
    probabilities[:] = np.linspace(1, 0.25, 320)
    drawn = prediction_image(image, labels, probabilities, CLASSES, width=646)
    (_, _, _, doubt), below = panels(drawn, (20, 320), 2)
    lightness = doubt[10].astype(float) @ (0.299, 0.587, 0.114)
    assert (np.diff(lightness) >= -1).all() and lightness[0] < 2 and lightness[-1] > 230
    # The bar of the scale has the same colours at the same places.
    top = np.flatnonzero((below[:, -1] == UNSURE).all(1))[0] + 2
    assert np.abs(below[top, -320:].astype(int) - doubt[10]).max() <= 1


@pytest.mark.parametrize(
    ("classes", "probability", "end"),
    [
        pytest.param(4, np.nan, True, id="nan"),
        pytest.param(4, 0.0, True, id="less-likely-than-all-alike"),
        pytest.param(2, 0.5, True, id="two-classes"),
        pytest.param(4, 0.5, False, id="half-of-four-classes"),
        pytest.param(1, 0.5, True, id="one-class"),
    ],
)
def test_end_of_the_scale(classes, probability, end):
    few = ClassSet("few", CLASSES.classes[:classes], CLASSES.palette[:classes])
    image, labels, probabilities = halves(60, 120)
    labels[:] = 0
    probabilities[:] = probability
    drawn = prediction_image(image, labels, probabilities, few, width=646)
    (_, _, _, doubt), _ = panels(drawn, (160, 320), 2)
    assert (doubt == UNSURE).all() == end and len(np.unique(doubt.reshape(-1, 3), axis=0)) == 1


def test_legend_has_the_classes_that_occur_and_no_others():
    image, labels, probabilities = halves(300, 400)
    # Too small for the panel, which takes every fourth pixel, and still of the photo.
    labels[1, 1] = 3
    drawn = prediction_image(image, labels, probabilities, CLASSES, width=326)
    _, below = panels(drawn, (120, 160), 2)
    colours = {tuple(colour) for colour in below[:, :160].reshape(-1, 3).tolist()}
    assert {RED, GREEN, GREY} <= colours and BLUE not in colours


def test_an_unpainted_class_is_painted_among_the_labels_alone():
    image, labels, probabilities = halves(60, 120)
    drawn = prediction_image(image, labels, probabilities, CLASSES, width=646, unpainted=[0])
    (_, painted, mixed, _), below = panels(drawn, (160, 320), 2)
    assert tuple(painted[80, 80]) == RED and tuple(mixed[80, 80]) == (255, 255, 255)
    assert not (below[:, :320] == RED).all(-1).any()


def test_many_classes_wrap_and_nothing_is_cut():
    names = tuple(f"a class with a long name {i}" for i in range(60))
    many = ClassSet("many", names, tuple((i, 255 - i, 100) for i in range(60)))
    image, labels, probabilities = halves(60, 120)
    labels[:] = np.arange(60).repeat(120).reshape(60, 120)
    drawn = prediction_image(image, labels, probabilities, many, width=646)
    _, below = panels(drawn, (160, 320), 2)
    found = {tuple(colour) for colour in below[:, :320].reshape(-1, 3).tolist()}
    assert set(many.palette) <= found and drawn.width == 646


def test_what_does_not_fit_is_refused():
    image, labels, probabilities = halves(60, 120)
    with pytest.raises(ValueError, match=r"width is 319, expected at least 320"):
        prediction_image(image, labels, probabilities, CLASSES, width=319)
    with pytest.raises(ValueError, match=r"\[60, 120\], the probabilities \[60, 119\]; expected"):
        prediction_image(image, labels, probabilities[:, 1:], CLASSES)
    with pytest.raises(ValueError, match=r"labels run from 0 to 9"):
        prediction_image(image, labels * 9, probabilities, CLASSES)
    with pytest.raises(
        ValueError, match=r"the image is \[60, 119, 3\], the labels are \[60, 120\]"
    ):
        prediction_image(image[:, 1:], labels, probabilities, CLASSES)
    assert isinstance(prediction_image(image, labels, probabilities, CLASSES), Image.Image)
