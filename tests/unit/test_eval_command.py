"""``deeplab-fast eval`` and ``check-data``: what they print, write and refuse."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import deeplab_fast as dlf
from deeplab_fast import cli
from deeplab_fast.data.datasets import open_dataset
from deeplab_fast.data.preprocess import Preprocess
from deeplab_fast.engine import evaluate as module
from deeplab_fast.engine.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = dlf.deeplabv3_mobilenet_v2_tf(
        num_classes=4, width=0.25, aspp_channels=8, atrous_rates=(2,)
    )
    model.classes = ("a", "b", "c", "d")
    return dlf.save_weights(model, tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture
def data(tiny, tmp_path):
    tiny.write_scenes(tmp_path / "data", 3)
    spec = tmp_path / "data.yaml"
    spec.write_text("name: folder\nroot: data\nclasses: [a, b, c, d]\n")
    return spec


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_eval_command(capsys, weights, data, tmp_path, monkeypatch):
    rates = []

    def recorded(model, dataset, **options):
        rates.append(model.atrous_rates)
        return evaluate(model, dataset, **options)

    monkeypatch.setattr(module, "evaluate", recorded)
    out = tmp_path / "out"
    config = tmp_path / "eval.yaml"
    config.write_text("flip: true\nscales: [0.5, 1.0]\n")
    status, printed, errors = run(
        *(capsys, "eval", "--config", config, "--data", data, "--weights", weights),
        *("--output-stride", 8, "--output", out, "--panels", 1, "--device", "cpu"),
    )
    assert status == 0 and errors == ""
    # The file's rate 2 is for its output stride 16.
    assert rates == [(4,)]
    model = dlf.from_checkpoint(weights).eval()
    expected = evaluate(model, open_dataset(data), scales=(0.5, 1.0), flip=True, output_stride=8)
    assert expected.metrics.table() in printed and "3 images scored" in printed
    content = json.loads((out / "metrics.json").read_text())
    assert content["confusion"] == expected.confusion.tolist()
    assert content["settings"]["output_stride"] == 8 and content["settings"]["flip"] is True
    assert content["builder"] == "deeplabv3_mobilenet_v2_tf"
    assert (out / "confusion.png").is_file() and len(list((out / "panels").iterdir())) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(["--data", ""], "--data is missing", id="data"),
        pytest.param(["--data", "pets"], "no data set is named 'pets'", id="name"),
        pytest.param(["--weights", "x.pth"], "--weights: no such checkpoint: x.pth", id="weights"),
        pytest.param(["--scales", "0"], "scales is", id="scales"),
        pytest.param(["--threshold", "0.5"], "the model has 4 classes, of which", id="threshold"),
        pytest.param(["--panels", "2"], "--panels needs --output", id="panels"),
        pytest.param(["--batch-size", "0"], "--batch-size is 0", id="batch"),
        pytest.param(["--workers", "-1"], "--workers is -1", id="workers"),
        pytest.param(["--classes", "5"], "weights have 4 classes and the data set", id="classes"),
        pytest.param(["--output", "{}"], "is a file; name a folder", id="output"),
    ],
)
def test_eval_with_bad_arguments(capsys, weights, data, flags, message):
    flags = [flag.format(data) for flag in flags]
    status, printed, errors = run(capsys, "eval", "--data", data, "--weights", weights, *flags)
    assert (status, printed) == (2, "") and message in errors


def test_eval_of_a_model_of_ones_own(capsys, data, tmp_path):
    source = tmp_path / "nets.py"
    source.write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n"
        "    torch.manual_seed(1)\n"
        "    return nn.Conv2d(3, 4, 5, 2, padding=2)\n"
        "def five():\n"
        "    return nn.Conv2d(3, 5, 1)\n"
    )
    out = tmp_path / "out"
    base = ("eval", "--data", data, "--device", "cpu", "--model-from")
    status, printed, errors = run(capsys, *base, f"{source}:build", "--output", out)
    assert status == 0
    assert errors.count("how photos for Conv2d are normalised") == 1
    torch.manual_seed(1)
    net = nn.Conv2d(3, 4, 5, 2, padding=2)
    expected = evaluate(net, open_dataset(data), preprocess=Preprocess())
    assert expected.metrics.table() in printed
    content = json.loads((out / "metrics.json").read_text())
    assert content["confusion"] == expected.confusion.tolist()
    assert content["settings"]["model"] == "Conv2d"
    assert content["builder"] == f"{source}:build" and content["weights"] is None
    other = ("--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5)
    status, printed, errors = run(capsys, *base, f"{source}:build", *other)
    assert (status, errors) == (0, "")
    half = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3)
    assert evaluate(net, open_dataset(data), preprocess=half).metrics.table() in printed
    torch.save({"state_dict": {k: v + 1 for k, v in net.state_dict().items()}}, tmp_path / "w.pth")
    weights = ("--weights", tmp_path / "w.pth")
    status, printed, _ = run(capsys, *base, f"{source}:build", *other, *weights)
    with torch.no_grad():
        for value in net.parameters():
            value += 1
    assert status == 0
    assert evaluate(net, open_dataset(data), preprocess=half).metrics.table() in printed
    status, _, errors = run(capsys, *base, f"{source}:five")
    assert status == 2 and "have 5 classes and the data set" in errors


def test_eval_of_broken_weights(capsys, weights, data, tmp_path):
    model = dlf.from_checkpoint(weights)
    with torch.no_grad():
        [m for m in model.classifier.modules() if isinstance(m, nn.Conv2d)][-1].bias[2] = math.nan
    broken = dlf.save_weights(model, tmp_path / "broken.safetensors")
    out = tmp_path / "out"
    status, printed, errors = run(
        capsys, "eval", "--data", data, "--weights", broken, "--output", out
    )
    assert status == 1
    assert "1920 pixels of s00, 1920 pixels of s01, 1920 pixels of s02 are NaN" in errors
    assert "note: 5760 pixels have logits that are NaN or infinite" in printed
    assert json.loads((out / "metrics.json").read_text())["not_finite_pixels"] == 5760


def test_eval_of_one_class(tiny, capsys, tmp_path):
    tiny.write_scenes(tmp_path / "data", 3)
    for path in (tmp_path / "data" / "masks").iterdir():
        label = np.asarray(Image.open(path))
        Image.fromarray(np.where(label == 1, 255, 0).astype(np.uint8)).save(path)
    model = dlf.deeplabv3_mobilenet_v2_tf(
        num_classes=1, width=0.25, aspp_channels=8, atrous_rates=(2,)
    )
    weights = dlf.save_weights(model, tmp_path / "one.safetensors")
    base = ("--data", "folder", "--root", tmp_path / "data", "--classes", 1)
    mapped = (*base, "--label-map", "255=1")
    status, printed, errors = run(
        *(capsys, "eval", *mapped, "--weights", weights, "--threshold", "0.4"),
        *("--output", tmp_path / "o"),
    )
    assert (status, errors) == (0, "") and "foreground" in printed
    dataset = open_dataset(
        "folder", tmp_path / "data", classes=1, label_map={255: 1}, unmapped="keep"
    )
    expected = evaluate(model, dataset, threshold=0.4)
    assert expected.metrics.table() in printed
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["settings"]["threshold"] == 0.4
    # Without the map nothing of the class is left.
    status, printed, errors = run(capsys, "check-data", *base)
    assert status == 1 and "1 problem" in printed and "255=1" in errors
    assert run(capsys, "check-data", *mapped)[0] == 0
    for flags, message in (
        (("--label-map", "255"), "--label-map is '255', expected raw value = class id"),
        (("--label-map", "255=7"), "--label-map sends 255 to 7"),
    ):
        status, _, errors = run(capsys, "check-data", *base, *flags)
        assert status == 2 and message in errors


def test_eval_and_check_of_bad_data(capsys, weights, data, tmp_path):
    bad = tmp_path / "data" / "masks" / "s01.png"
    Image.fromarray(np.full((40, 48), 9, np.uint8)).save(bad)
    out = tmp_path / "out"
    status, printed, errors = run(
        capsys, "eval", "--data", data, "--weights", weights, "--output", out
    )
    assert status == 1 and "s01.png: label 9" in errors and not out.exists()
    status, printed, errors = run(capsys, "check-data", "--data", data)
    assert status == 1 and "s01.png: label 9 (1920 pixels)" in errors and "1 problem" in printed
    Image.fromarray(np.full((40, 48), 255, np.uint8)).save(bad)
    status, printed, errors = run(capsys, "check-data", "--data", data)
    assert status == 1 and "every pixel is ignored" in errors
    status, printed, errors = run(capsys, "check-data", "--data", data, "--allow-empty")
    assert status == 0 and "0 problems" in printed
    assert errors.splitlines() == ["deeplab-fast check-data: checking data(3 samples, 4 classes)"]
    status, printed, errors = run(capsys, "check-data", "--data", "camvid", "--root", tmp_path)
    assert status == 2 and "looked for the folders val and valannot" in errors


def test_a_turned_photo_beside_a_mask_that_is_not(capsys, weights, data, tmp_path):
    photo, mask = (tmp_path / "data" / name / "s01.png" for name in ("images", "masks"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo).save(photo, exif=exif)
    for command in (("eval", "--weights", weights), ("check-data",)):
        status, _, errors = run(capsys, *command, "--data", data)
        assert status == 1
        assert f"the photo {photo} is tagged with EXIF orientation 6" in errors
        assert f"its mask {mask} is not turned and has 48x40, as the photo is stored" in errors
    exif[0x0112] = 3
    Image.open(photo).save(photo, exif=exif)
    status, printed, errors = run(capsys, "check-data", "--data", data)
    assert status == 0 and "0 problems, 1 warnings" in printed
    assert "warning: each file is turned by its own EXIF orientation, and" in errors
    assert f"{photo} (orientation 3) and {mask} (1)" in errors
