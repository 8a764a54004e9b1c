"""python -m deeplab_fast.demo: the picture, the table of precisions, and the photo that ships."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deeplab_fast as dlf
from deeplab_fast import demo
from deeplab_fast.data import Preprocess, read_image
from deeplab_fast.dispatch import limits

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """No other library's model is timed, and each precision three times."""
    monkeypatch.setattr(demo, "_PRECISION_BUDGET", 0.0)
    monkeypatch.setattr(demo, "_time_beside_torchvision", lambda quick: None)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "small.png"
    Image.open(demo.STREET).resize((160, 90)).save(path)
    return path


def saved(folder, classes=3, calibrate=None, bias=None):
    """Weights of a small untrained model: labels differ over the photo, or the bias gives them."""
    torch.manual_seed(0)
    model = dlf.deeplabv3_efficientnet_lite0(num_classes=classes, aspp_channels=32).eval()
    model.preprocess = Preprocess()
    last = [m for m in model.classifier.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        if bias is None:
            last.bias -= model.forward_logits(Preprocess()(read_image(demo.STREET))).mean((0, 2, 3))
        else:
            last.weight.zero_()
            last.bias.fill_(bias)
    if calibrate is not None:
        model.calibrate(calibrate)
    path = folder / "model.safetensors"
    dlf.save_weights(model, path)
    return path


def run(capsys, *arguments):
    status = demo.main([str(argument) for argument in arguments])
    return status, capsys.readouterr()


def rows(text):
    """What the table says of each precision."""
    found = re.findall(r"^  (fp32|bf16|int8) +(?:(\d+) +([\d.]+)%|-   (.+))$", text, re.MULTILINE)
    return {name: (reason or (int(ms), float(same))) for name, ms, same, reason in found}


@pytest.mark.filterwarnings("ignore::deeplab_fast.program.calibrate.CalibrationWarning")
def test_table_of_precisions(photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(limits, "cpu_bf16", lambda: "there is no such instruction")
    weights = saved(tmp_path)
    status, told = run(capsys, "--photo", photo, "--weights", weights, "--output", tmp_path)
    assert status == 0 and not told.err
    table = rows(told.out)
    assert list(table) == ["fp32", "bf16", "int8"]
    assert table["fp32"][1] == 100
    # The reason, and never another precision in its place.
    assert table["bf16"].startswith("does not run here: there is no such instruction")
    if reason := limits.cpu_int8():
        assert reason in table["int8"]
        return
    model, image = dlf.from_checkpoint(weights).eval(), read_image(photo)
    model.calibrate(image[:, ::-1].copy())
    same = (model.predict(image, precision="int8") == model.predict(image)).mean()
    assert table["int8"][1] == float(f"{100 * same:.2f}")
    assert "measured just now on the photo's mirror image" in told.out
    assert Image.open(tmp_path / "small.png").width == 1600
    assert str(tmp_path / "small.png") in told.out


@pytest.mark.filterwarnings("ignore::deeplab_fast.program.calibrate.CalibrationWarning")
@pytest.mark.skipif(bool(limits.cpu_int8()), reason="no int8 on this CPU")
def test_ranges_that_came_with_the_weights_are_used(photo, tmp_path, capsys, monkeypatch):
    image = read_image(photo)
    weights = saved(tmp_path, calibrate=[image, image[::-1].copy()])
    measured = []
    monkeypatch.setattr(dlf.DeepLabV3, "calibrate", lambda *given: measured.append(given))
    status, told = run(capsys, "--photo", photo, "--weights", weights, "--output", tmp_path)
    assert status == 0 and not measured
    assert "its ranges came with the weights, measured on 2 images" in told.out
    assert isinstance(rows(told.out)["int8"], tuple)


def test_int8_that_cannot_be_measured_is_said_and_the_rest_is_timed(
    photo, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(limits, "cpu_int8", lambda: "this CPU multiplies no bytes")
    status, told = run(capsys, "--photo", photo, "--weights", saved(tmp_path), "--output", tmp_path)
    table = rows(told.out)
    assert status == 0 and "this CPU multiplies no bytes" in table["int8"]
    assert table["fp32"][1] == 100 and "its ranges" not in told.out


@pytest.mark.parametrize(
    ("bias", "light"),
    [
        pytest.param(-9.0, False, id="surely-not-the-class"),
        pytest.param(9.0, False, id="surely-the-class"),
        pytest.param(0.0, True, id="either"),
    ],
)
def test_uncertainty_of_one_class(bias, light, photo, tmp_path, capsys):
    weights, picture = saved(tmp_path, classes=1, bias=bias), tmp_path / "one.png"
    status, _ = run(capsys, "--photo", photo, "--weights", weights, "--picture", picture)
    assert status == 0
    # The lower right panel, away from its title: one colour, nearly black or the scale's last.
    colours = np.unique(np.asarray(Image.open(picture))[600:800, 900:1500].reshape(-1, 3), axis=0)
    assert len(colours) == 1 and (colours.sum() > 600 if light else colours.sum() < 5)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_picture_alone(suffix, photo, tmp_path, capsys):
    picture = tmp_path / "new" / f"street.{suffix}"
    status, told = run(capsys, "--photo", photo, "--picture", picture)
    assert status == 0 and not told.err and not rows(told.out)
    assert [path.name for path in picture.parent.iterdir()] == [picture.name]
    with Image.open(picture) as image:
        assert image.format == {"png": "PNG", "jpg": "JPEG"}[suffix] and image.width == 1600
    model = dlf.load("camvid")
    labels = model.predict(photo)
    (told_areas,) = re.findall(r"^Areas: (.*)$", told.out, re.MULTILINE)
    for area in told_areas.split(", "):
        name, share = area.rsplit(" ", 1)
        assert f"{(labels == model.classes.index(name)).mean():.1%}" == share


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--picture", "x.webp"], "ends in .png or .jpg", id="other-format"),
        pytest.param(["--photo", "nowhere.png", "--picture", "x.png"], "nowhere.png", id="photo"),
        pytest.param(["--weights", "nowhere.pth"], "nowhere.pth", id="weights"),
    ],
)
def test_what_is_not_usable(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, told = run(capsys, *arguments)
    assert status == 2 and told.err.startswith("demo: error: ") and message in told.err
    assert not list(tmp_path.iterdir())


def test_street_that_ships_is_small_anonymous_and_has_its_licence():
    assert demo.STREET.stat().st_size <= 150_000
    with Image.open(demo.STREET) as image:
        assert 640 <= image.width <= 1280 and not image.getexif() and "exif" not in image.info
    for text in (
        demo.STREET.with_suffix(".txt"),
        Path(dlf.exporting.__file__).parent / "photo.txt",
    ):
        lines = text.read_text("utf-8")
        assert all(f"\n{part}: " in lines for part in ("Author", "Source", "Licence", "Changes"))
        listed = (ROOT / "pyproject.toml").read_text("utf-8")
        assert f'"{text.relative_to(ROOT).as_posix()}"' in listed
    assert "Permission is hereby granted" in demo.STREET.with_suffix(".txt").read_text("utf-8")


def test_readme_shows_the_picture_and_names_the_command():
    page = (ROOT / "README.md").read_text("utf-8")
    (command,) = re.findall(r"`python -m deeplab_fast\.demo (--picture \S+)`", page)
    _, path = command.split()
    assert f"]({path})" in page
    assert (ROOT / path).stat().st_size < 369_000
    assert Image.open(ROOT / path).width == 1600
