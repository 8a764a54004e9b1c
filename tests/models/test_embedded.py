import numpy as np
import pytest
import torch

import deeplab_fast as dlf
from deeplab_fast import weights
from deeplab_fast.data import class_set
from deeplab_fast.data.datasets import open_dataset
from deeplab_fast.engine.evaluate import evaluate
from deeplab_fast.weights import embedded_path, list_embedded, model_card

safetensors = pytest.importorskip("safetensors")

MAX_BYTES = 12_000_000


@pytest.fixture(scope="module")
def model():
    return dlf.load("camvid")


def test_list_and_unknown_name() -> None:
    assert list_embedded() == ["camvid"]
    for load in (dlf.load, weights.load):
        with pytest.raises(
            ValueError, match=r"no embedded model is named 'voc'; there are: camvid"
        ):
            load("voc")


def test_file_is_small_and_half_precision() -> None:
    path = embedded_path("camvid")
    assert path.stat().st_size <= MAX_BYTES
    with safetensors.safe_open(path, "pt") as file:
        dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}
    # The counters of batch norms are integers.
    assert dtypes == {"F16", "I64"}


def test_it_is_a_deeplabv3_with_atrous_branches_and_names(model) -> None:
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(model.atrous_rates) == 3 and min(model.atrous_rates) > 1
    camvid = class_set("camvid")
    assert model.classes == tuple(camvid.classes) and model.palette == tuple(camvid.palette)
    assert model.preprocess.size is not None


def test_card_says_what_a_user_must_know() -> None:
    card = model_card("camvid")
    for heading in ("## Data", "## Licence", "## Recipe", "## Scores"):
        assert heading in card
    assert "CC BY-NC" in card and "Apache-2.0" in card


def test_a_photo_of_a_street_has_sky_above_and_no_sky_below(model) -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn has the photo")
    photo = datasets.load_sample_image("china.jpg")
    labels = model.predict(photo)
    assert labels.shape == photo.shape[:2] and labels.dtype == np.uint8
    sky = np.asarray(labels) == model.classes.index("sky")
    third = labels.shape[0] // 3
    assert sky[:third].mean() > 10 * sky[-third:].mean()
    assert sky[:third].mean() > 0.2


def test_ranges_for_int8_come_with_it(model) -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn has the photo")
    photo = datasets.load_sample_image("china.jpg")
    assert model.calibration is not None
    same = model.predict(photo, precision="int8") == model.predict(photo)
    # One label in a hundred changes on photos like those that it was measured on: three times that.
    assert same.mean() > 0.97


def test_it_scores_on_camvid(model, shared_data) -> None:
    """Every eighth validation photo: weights that were stored or read wrongly score below 0.2."""
    val = open_dataset("camvid", shared_data / "camvid", "val")
    result = evaluate(model, val.select(range(0, len(val), 8)))
    assert result.metrics.miou > 0.5
