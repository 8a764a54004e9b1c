"""The command line end to end, and the files it writes."""

import copy
import io
import json
import math
import os
import re
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deeplab_fast as dlf
from deeplab_fast import cli
from deeplab_fast.cli.predict import unique_stems
from deeplab_fast.data.classes import ClassSet, class_set, generic_classes
from deeplab_fast.data.images import read_image
from deeplab_fast.data.preprocess import Preprocess
from deeplab_fast.dispatch import limits
from deeplab_fast.dispatch.files import write_atomically
from deeplab_fast.engine import outputs
from deeplab_fast.engine import predict as predict_module


@pytest.fixture(scope="module")
def model():
    """A tiny model whose labels vary over a picture."""
    torch.manual_seed(0)
    options = {"num_classes": 4, "width": 0.25, "aspp_channels": 8}
    model = dlf.deeplabv3_mobilenet_v2_tf(**options).eval()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        model.train()(x)
        model.eval()
        # All classes equal on average: without it one class would win everywhere.
        logits = model.forward_logits(x)
        final = [m for m in model.classifier.modules() if isinstance(m, torch.nn.Conv2d)][-1]
        final.bias -= logits.mean((0, 2, 3))
    model.classes = ("background", "road", "sky", "tree")
    model.palette = ((0, 0, 0), (128, 64, 128), (70, 130, 180), (107, 142, 35))
    return model


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    return dlf.save_weights(model, tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def photo(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures of several kinds."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    photo(40, 56).save(folder / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(30, 44, 1).save(folder / "turned.jpg", exif=exif)
    photo(33, 21, 2).convert("L").save(folder / "sub" / "grey.png")
    return folder


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def labels_of(folder, stem):
    with Image.open(folder / f"{stem}_labels.png") as image:
        return image.mode, np.asarray(image)


def test_predict_a_folder(capsys, model, weights, photos, tmp_path):
    out = tmp_path / "new" / "out"
    status, printed, errors = run(capsys, "predict", photos, "--output", out, "--weights", weights)
    assert status == 0 and errors == ""
    assert "3 of 3 images segmented" in printed
    written = sorted(path.name for path in out.iterdir())
    assert written == sorted(
        f"{stem}{end}"
        for stem in ("grey", "plain", "turned")
        for end in ("_labels.png", "_overlay.png", ".json")
    )
    classes_seen = set()
    # turned.jpg is stored 30 x 44 and shown 44 x 30.
    for path, shape in (
        (photos / "plain.png", (40, 56)),
        (photos / "turned.jpg", (44, 30)),
        (photos / "sub" / "grey.png", (33, 21)),
    ):
        mode, labels = labels_of(out, path.stem)
        assert mode == "P" and labels.shape == shape
        np.testing.assert_array_equal(labels, model.predict(path))
        classes_seen |= set(np.unique(labels).tolist())
        with Image.open(out / f"{path.stem}_overlay.png") as image:
            # The photo's pixels, and a legend below.
            assert image.mode == "RGB" and image.width >= shape[1] and image.height > shape[0]
        areas = json.loads((out / f"{path.stem}.json").read_text())
        assert areas["image"] == str(path)
        assert (areas["width"], areas["height"]) == shape[::-1]
        assert areas["model"] == "deeplabv3_mobilenet_v2_tf"
        assert areas["backend"] in dlf.backends.BACKENDS
        for area in areas["classes"]:
            assert area["name"] == model.classes[area["id"]]
            assert area["pixels"] == (labels == area["id"]).sum()
            assert area["fraction"] == pytest.approx(area["pixels"] / labels.size)
        assert sum(area["pixels"] for area in areas["classes"]) == labels.size
    assert len(classes_seen) > 1, "the test's model gives one class only"


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        pytest.param(["--flip"], {"flip": True}, id="flip"),
        pytest.param(["--scales", "0.5", "1.5"], {"scales": (0.5, 1.5)}, id="scales"),
        pytest.param(
            ["--tile", "24", "32", "--overlap", "0.5"],
            {"tile": (24, 32), "overlap": 0.5},
            id="tile",
        ),
        pytest.param(["--dtype", "bf16"], {"dtype": "bf16"}, id="dtype"),
        pytest.param(["--device", "cpu", "--backend", "reference"], {}, id="device-and-backend"),
        pytest.param(["--model", "deeplabv3_mobilenet_v2_tf"], {}, id="model"),
    ],
)
def test_options_reach_the_prediction(capsys, model, weights, photos, tmp_path, flags, options):
    image = photos / "plain.png"
    arguments = ("predict", image, "--output", tmp_path / "o", "--weights", weights, *flags)
    status, _, errors = run(capsys, *arguments)
    assert status == 0, errors
    with dlf.use_backend("reference" if "reference" in flags else "auto"):
        expected = model.predict(image, **options)
    np.testing.assert_array_equal(labels_of(tmp_path / "o", "plain")[1], expected)
    if options:
        assert (expected != model.predict(image)).any(), "the option changes nothing here"


def test_size_and_output_stride(capsys, model, weights, photos, tmp_path, monkeypatch):
    seen = []
    original = dlf.DeepLabV3.forward_logits

    def recorded(self, x):
        seen.append((tuple(x.shape[-2:]), self.output_stride))
        return original(self, x)

    monkeypatch.setattr(dlf.DeepLabV3, "forward_logits", recorded)
    image = photos / "plain.png"
    base = ("predict", image, "--output", tmp_path / "o", "--weights", weights)
    for flags in ((), ("--size", 20), ("--output-stride", 8)):
        assert run(capsys, *base, *flags)[0] == 0
        assert labels_of(tmp_path / "o", "plain")[1].shape == (40, 56)
    assert seen == [((40, 56), 16), ((20, 28), 16), ((40, 56), 8)]


def test_a_configuration_file_and_flags_above_it(capsys, weights, photos, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"paths: ['{photos / 'plain.png'}']\n"
        f"output: '{tmp_path / 'from_file'}'\n"
        f"weights: '{weights}'\n"
        "scales: [0.5, 1.0]\ntile: [24, 32]\nflip: true\n"
    )
    assert run(capsys, "predict", "--config", config)[0] == 0
    assert (tmp_path / "from_file" / "plain.json").is_file()
    assert run(capsys, "predict", "--config", config, "--output", tmp_path / "flag")[0] == 0
    for one, other in zip(
        sorted((tmp_path / "from_file").glob("*.png")),
        sorted((tmp_path / "flag").glob("*.png")),
        strict=True,
    ):
        assert one.read_bytes() == other.read_bytes()
    config.write_text("paths: []\n")
    status, _, errors = run(capsys, "predict", "--config", config)
    assert status == 2 and "no images given" in errors
    config.write_text("output: x\nno_such_option: 1\n")
    status, _, errors = run(capsys, "predict", "--config", config)
    assert status == 2 and "no_such_option" in errors


def test_an_unreadable_image_is_reported_and_the_others_are_done(capsys, weights, photos, tmp_path):
    whole = (photos / "turned.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[:-100])
    (photos / "empty.png").write_bytes(b"")
    arguments = ("predict", photos, "--output", tmp_path / "o", "--weights", weights)
    status, printed, errors = run(capsys, *arguments)
    assert status == 1
    assert f"{photos / 'cut.jpg'}: " in errors and "truncated" in errors
    assert f"{photos / 'empty.png'}: the file is empty" in errors
    assert "3 of 5 images segmented" in printed and "2 failed" in printed
    assert len(list((tmp_path / "o").iterdir())) == 9
    assert not list((tmp_path / "o").glob("cut*"))


def test_same_stems_do_not_overwrite_each_other(capsys, model, weights, tmp_path):
    files = ("a/x.png", "b/x.png", "b/x.bmp", "b/deep/X.png", "y.png", "c/a_x.png")
    for seed, name in enumerate(files):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(24, 24 + seed, seed).save(path)
    out = tmp_path / "o"
    inputs = tmp_path / "in"
    assert run(capsys, "predict", inputs, "--output", out, "--weights", weights)[0] == 0
    assert sorted(path.stem for path in out.glob("*.json")) == sorted(
        ["a_x-2", "b_x_png", "b_x_bmp", "b_deep_X", "y", "a_x"]
    )
    seen = set()
    for path in out.glob("*.json"):
        source = Path(json.loads(path.read_text())["image"])
        seen.add(source.relative_to(inputs).as_posix())
        np.testing.assert_array_equal(labels_of(out, path.stem)[1], model.predict(source))
    assert seen == set(files)


def test_logits_that_are_not_finite_are_told(capsys, model, photos, tmp_path):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        [m for m in broken.classifier.modules() if isinstance(m, torch.nn.Conv2d)][-1].bias[1] = (
            math.nan
        )
    weights = dlf.save_weights(broken, tmp_path / "broken.safetensors")
    image = photos / "plain.png"
    for flags in ((), ("--flip",), ("--tile", 24, 32)):
        status, printed, errors = run(
            *(capsys, "predict", image, "--output", tmp_path / "o", "--weights", weights, *flags)
        )
        assert status == 1 and "1 of 1 images segmented" in printed
        assert "1 with logits that are NaN or infinite" in printed
        # 40 x 56 pixels.
        assert f"warning: the logits of 2240 pixels of {image} are NaN or infinite" in errors
        areas = json.loads((tmp_path / "o" / "plain.json").read_text())
        assert areas["not_finite_pixels"] == 2240


def test_predict_of_one_class(capsys, photos, tmp_path):
    torch.manual_seed(1)
    one = dlf.deeplabv3_mobilenet_v2_tf(num_classes=1, width=0.25, aspp_channels=8).eval()
    image = photos / "plain.png"
    with torch.no_grad():
        for norm in (m for m in one.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.momentum = 1.0
        one.train()(torch.rand(2, 3, 64, 64) * 2 - 1)
        one.eval()
        final = [m for m in one.classifier.modules() if isinstance(m, torch.nn.Conv2d)][-1]
        final.weight *= 3 / one(one.preprocess(read_image(image)))["out"].std()
        final.bias -= one(one.preprocess(read_image(image)))["out"].median()
    weights = dlf.save_weights(one, tmp_path / "one.safetensors")
    base = ("predict", image, "--output", tmp_path / "o", "--weights", weights)
    for flags, options in (
        ((), {}),
        (("--threshold", "0.52"), {"threshold": 0.52}),
        (("--tile", 24, 32, "--flip"), {"tile": (24, 32), "flip": True}),
    ):
        status, _, errors = run(capsys, *base, *flags)
        assert (status, errors) == (0, ""), errors
        labels = labels_of(tmp_path / "o", "plain")[1]
        np.testing.assert_array_equal(labels, one.predict(image, **options))
        # A window's logits are another's than the whole photo's, whose median is 0.
        assert set(np.unique(labels)) == {0, 1} or "tile" in options
        areas = json.loads((tmp_path / "o" / "plain.json").read_text())
        assert {a["name"] for a in areas["classes"]} <= {"background", "foreground"}
        assert areas["backend"] == "reference" and areas["not_finite_pixels"] == 0
    names = tmp_path / "crack.txt"
    for content in ("crack\n", "background\ncrack\n"):
        names.write_text(content)
        assert "crack" in run(capsys, *base, "--classes", names)[1]
    names.write_text("a\nb\nc\n")
    status, _, errors = run(capsys, *base, "--classes", names)
    assert status == 2 and "has 3 classes and the model 1" in errors


def test_names_that_differ_in_case_only_or_repeat():
    def names(*paths):
        return unique_stems([Path(path) for path in paths])

    assert names("p/x.png", "p/y.png") == ["x", "y"]
    assert names("p/x.png", "p/X.png") == ["x_png", "X_png-2"]
    assert names("a/x.png", "b/x.png") == ["a_x", "b_x"]
    # On some file systems the two forms of Unicode are one name.
    assert names("p/caf\u00e9.png", "p/cafe\u0301.png")[1].endswith("_png-2")
    assert names("x.png", "sub/x.png") == ["x", "sub_x"]
    clashing = names("a/b_x.png", "a_b/x.png", "a/b/x.png", "c/a_b_x.png")
    assert len(set(clashing)) == 4 and clashing[3] == "a_b_x"


def test_the_file_is_what_the_convenience_model_is_for(capsys, shared_data, tmp_path):
    folder = shared_data / "deeplabv3_257"
    reference = np.load(folder / "deeplabv3_257_mv_gpu_bird_reference.npz")
    Image.fromarray(reference["input_uint8"].reshape(257, 257, 3)).save(tmp_path / "bird.png")
    weights = folder / "deeplabv3_257_mv_gpu_folded.safetensors"
    status, printed, _ = run(
        capsys,
        *("predict", tmp_path / "bird.png", "--output", tmp_path / "o"),
        *("--weights", weights, "--output-stride", 8),
    )
    assert status == 0 and "bird" in printed
    labels = labels_of(tmp_path / "o", "bird")[1]
    assert (labels == reference["argmax257"].reshape(257, 257)).mean() >= 0.999
    areas = json.loads((tmp_path / "o" / "bird.json").read_text())
    assert {area["name"] for area in areas["classes"]} == {"background", "bird"}


def test_class_names_from_a_file(capsys, weights, photos, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\nthree\nfour\n")
    arguments = ("predict", photos / "plain.png", "--weights", weights, "--classes", names)
    assert run(capsys, *arguments, "--output", tmp_path / "o")[0] == 0
    areas = json.loads((tmp_path / "o" / "plain.json").read_text())
    assert {area["name"] for area in areas["classes"]} <= {"one", "two", "three", "four"}
    assert areas["class_set"] == "names"


def test_reset_head(capsys, weights, photos, tmp_path):
    base = ("predict", photos / "plain.png", "--output", tmp_path / "o", "--weights", weights)
    status, _, errors = run(capsys, *base, "--num-classes", 3)
    assert status == 2 and "4 classes" in errors and "3" in errors and "--reset-head" in errors
    assert not (tmp_path / "o").exists()
    status, _, errors = run(capsys, *base, "--num-classes", 3, "--reset-head")
    assert status == 0 and "random weights" in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(["--tile", "0", "8"], "error: --tile is", id="tile-0"),
        pytest.param(["--tile", "8"], "--tile", id="tile-one-number"),
        pytest.param(["--tile", "8", "x"], "--tile", id="tile-text"),
        pytest.param(["--tile", "8", "8", "--overlap", "1"], "overlap is 1.0", id="overlap-1"),
        pytest.param(["--scales", "0"], "scales is", id="scale-0"),
        pytest.param(["--threshold", "2"], "threshold is 2.0, expected", id="threshold-2"),
        pytest.param(["--threshold", "0.5"], "the model has 4 classes", id="threshold-classes"),
        pytest.param(["--size", "-1"], "--size is -1", id="size-negative"),
        pytest.param(["--device", "tpu0"], "device is 'tpu0'", id="device"),
        pytest.param(["--device", "cuda:99"], "CUDA devices", id="no-such-gpu"),
        pytest.param(["--dtype", "int4"], "dtype is 'int4'", id="dtype"),
        pytest.param(["--output-stride", "4"], "--output-stride is 4", id="output-stride"),
        pytest.param(["--num-classes", "0"], "--num-classes is 0", id="num-classes-0"),
        pytest.param(["--backend", "opencl"], "allowed: auto, cuda, triton", id="backend"),
        pytest.param(["--model", "unet"], "there are: deeplabv3_cascaded", id="model"),
        pytest.param(["--model", "deeplabv3_resnet18"], "does not fit", id="another-model"),
        pytest.param(["--classes", "voc"], "voc has 21 classes and the model 4", id="classes"),
        pytest.param(["--classes", "nope"], "no class set is named 'nope'", id="no-class-set"),
        pytest.param(
            ["--weights", "missing.pth"], "no such checkpoint: missing.pth", id="no-weights"
        ),
        pytest.param(["--bogus"], "--bogus", id="unknown-flag"),
        pytest.param(["missing.jpg"], "missing.jpg: no such file or folder", id="no-image"),
    ],
)
def test_bad_arguments_write_nothing(capsys, weights, photos, tmp_path, flags, message):
    out = tmp_path / "o"
    arguments = ["predict", photos / "plain.png", "--output", out, "--weights", weights]
    # A positional argument belongs to the paths.
    at = 2 if not flags[0].startswith("-") else len(arguments)
    status, printed, errors = run(capsys, *arguments[:at], *flags, *arguments[at:])
    assert status == 2 and message in errors and printed == ""
    assert "Traceback" not in errors
    assert not out.exists()


def test_missing_arguments_say_what_to_pass(capsys, weights, photos, tmp_path):
    out = tmp_path / "o"
    status, _, errors = run(capsys, "predict", photos, "--output", out)
    assert status == 2 and "--weights is missing" in errors and ".safetensors" in errors
    status, _, errors = run(capsys, "predict", photos, "--weights", weights)
    assert status == 2 and "--output DIR is missing" in errors
    status, _, errors = run(capsys, "predict", "--output", out, "--weights", weights)
    assert status == 2 and "PATH is missing" in errors
    assert run(capsys)[0] == 2
    assert not out.exists()


def test_weights_that_tell_no_model_ask_for_one(capsys, weights, photos, tmp_path, monkeypatch):
    found = types.SimpleNamespace(layout="strange", model=None, num_classes=4, options={}, notes="")
    monkeypatch.setattr("deeplab_fast.weights.inspect_weights", lambda path, part: found)
    arguments = ("predict", photos, "--output", tmp_path / "o", "--weights", weights)
    status, _, errors = run(capsys, *arguments)
    assert status == 2 and "layout strange" in errors and "--model: deeplabv3_" in errors


def test_a_file_that_is_no_checkpoint(capsys, photos, tmp_path):
    (tmp_path / "w.pth").write_text("hello")
    arguments = ("predict", photos, "--output", tmp_path / "o", "--weights", tmp_path / "w.pth")
    status, _, errors = run(capsys, *arguments)
    assert status == 2 and "w.pth" in errors and "Traceback" not in errors


def test_results_never_become_inputs_or_overwrite_them(capsys, weights, photos, tmp_path):
    base = ("--weights", weights, "--output")
    status, _, errors = run(capsys, "predict", photos, *base, photos)
    assert status == 2 and "also a folder of images" in errors
    inside = photos / "results"
    for _ in range(2):
        status, printed, _ = run(capsys, "predict", photos, *base, inside)
        assert status == 0 and "3 of 3 images" in printed
    truth = photos / "plain_labels.png"
    photo(8, 8).save(truth)
    before = truth.read_bytes()
    status, _, errors = run(capsys, "predict", photos / "plain.png", truth, *base, photos)
    assert status == 2 and "would overwrite the image" in errors
    assert truth.read_bytes() == before
    status, _, errors = run(capsys, "predict", photos, *base, truth)
    assert status == 2 and "is a file" in errors


def test_a_backend_that_cannot_run_writes_nothing(capsys, weights, photos, tmp_path):
    # No CUDA kernel runs on a CPU tensor, whatever is built.
    out = tmp_path / "o"
    arguments = ("predict", photos, "--output", out, "--weights", weights)
    status, _, errors = run(capsys, *arguments, "--device", "cpu", "--backend", "cuda")
    assert status == 2 and "'cuda' was asked for" in errors
    assert not out.exists()


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory"), id="gpu"),
        pytest.param(RuntimeError("DefaultCPUAllocator: can't allocate memory"), id="cpu"),
        pytest.param(MemoryError(), id="python"),
    ],
)
def test_too_large_an_image_is_reported(capsys, weights, photos, tmp_path, monkeypatch, error):
    original = predict_module.predict

    def limited(model, images, **options):
        if any(image.shape[0] == 44 for image in images):
            raise error
        return original(model, images, **options)

    monkeypatch.setattr(predict_module, "predict", limited)
    arguments = ("predict", photos, "--output", tmp_path / "o", "--weights", weights)
    # Together with the others too: a batch that does not fit is run one by one.
    for flags in ((), ("--size", 20, "--batch-size", 3)):
        status, printed, errors = run(capsys, *arguments, *flags)
        assert status == 1 and "2 of 3 images" in printed
        assert errors.count("not enough memory") == 1
        assert "turned.jpg: not enough memory; use --tile" in errors


def test_hostile_files_fail_alone_and_in_a_line_each(capsys, weights, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "page\x1b[2J.png").write_text("<html>")
    # A line of 1x5000 pixels, whose shorter side alone would be resized.
    photo(1, 5000).save(folder / "line.png")
    # Names that cannot be printed as they are.
    names = ["b\x1b[2J.png", "\udcff.png"]
    for name in names:
        photo(40, 56).save(folder / "a.png")
        (folder / "a.png").rename(folder / name)
    arguments = ("predict", folder, "--output", tmp_path / "o", "--weights", weights)
    status, printed, errors = run(capsys, *arguments, "--size", 16)
    assert status == 1 and "3 of 7 images" in printed
    assert "b\\x1b[2J.png: " in printed and "\\udcff.png: " in printed
    text = printed + errors
    assert text.encode() and "\x1b" not in text and "Traceback" not in text
    for said in ("is a pipe", "is a device", "symbolic links", "not a picture"):
        assert errors.count(said) == 1
    assert "line.png: a picture of 1x5000 pixels" not in errors
    written = (tmp_path / "o" / "\udcff.json").read_bytes()
    assert json.loads(written.decode("utf-8"))["image"] == str(folder / "\udcff.png")
    status, _, errors = run(capsys, *arguments, "--size", 520)
    assert errors.count("line.png: a picture of 1x5000 pixels") == 1 and "--size" in errors


def test_other_errors_are_not_swallowed(capsys, weights, photos, tmp_path, monkeypatch):
    def broken(model, image, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(predict_module, "predict", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(capsys, "predict", photos, "--output", tmp_path / "o", "--weights", weights)


def test_a_folder_that_cannot_be_made(capsys, weights, photos, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "o"
    status, _, errors = run(capsys, "predict", photos, "--output", out, "--weights", weights)
    assert status == 1 and "cannot write" in errors


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_only_on_a_terminal_and_for_several(
    monkeypatch, capsys, weights, photos, tmp_path
):
    base = ("--output", tmp_path / "o", "--weights", weights)
    for arguments, bar in (((photos,), True), ((photos / "plain.png",), False)):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        assert cli.main(["predict", *map(str, (*arguments, *base))]) == 0
        assert ("3/3" in terminal.getvalue()) == bar
    monkeypatch.undo()
    assert run(capsys, "predict", photos, *base)[2] == ""


@pytest.mark.parametrize("workers", [0, 3], ids=["one thread", "threads beside it"])
def test_photos_together_and_beside_each_other(capsys, model, weights, tmp_path, workers):
    folder = tmp_path / "photos"
    folder.mkdir()
    # At the size 20 the first three are inputs of one size.
    for name, size in {"a": (40, 56), "b": (60, 84), "c": (20, 28), "d": (56, 40)}.items():
        photo(*size, seed=ord(name)).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"nothing")
    out = tmp_path / "o"
    arguments = ("--size", 20, "--batch-size", 2, "--workers", workers)
    status, printed, errors = run(
        capsys, "predict", folder, "--output", out, "--weights", weights, *arguments
    )
    assert status == 1 and "4 of 5 images segmented" in printed
    assert errors.count("\n") == 1 and "broken.png: " in errors
    lines = printed.splitlines()
    starts = [
        f"{n}/5 {folder / name}.png: " for n, name in ((1, "a"), (2, "b"), (4, "c"), (5, "d"))
    ]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=False)] == [
        True
    ] * 4
    sized = copy.copy(model)
    sized.preprocess = replace(model.preprocess, size=20)
    for name in "abcd":
        # Batched and single convolutions may round differently.
        expected = sized.predict(folder / f"{name}.png")
        assert (labels_of(out, name)[1] == expected).mean() > 0.999


def test_the_pace_is_that_of_photos_when_they_are_done(capsys, monkeypatch, weights, tmp_path):
    for name in "abcdef":
        photo(20, 28).save(tmp_path / f"{name}.png")
    segment = predict_module.predict

    def slow(*arguments, **options):
        time.sleep(0.1)
        return segment(*arguments, **options)

    monkeypatch.setattr(predict_module, "predict", slow)
    arguments = ("--output", tmp_path / "o", "--weights", weights, "--size", 20, "--workers", 5)
    _, printed, _ = run(capsys, "predict", tmp_path, *arguments)
    found = re.search(r"6 of 6 images segmented into .* in .* s, (\S+) ms an image\n", printed)
    # Five follow the first by 100 ms each; the first may be written up to 350 ms late.
    assert found and float(found[1]) > 30


def test_what_the_network_got_is_told(capsys, weights, tmp_path):
    photo(60, 80).save(tmp_path / "a.png")
    out = tmp_path / "o"
    base = ("predict", tmp_path / "a.png", "--output", out, "--weights", weights, "--size", 40)
    for flags, told, window, windows in (
        ((), "53x40 pixels, 0.667 of 80x60;", None, 1),
        (("--tile", 32, 32), "53x40 pixels, 0.667 of 80x60, 4 windows of 32x32;", [32, 32], 4),
        (("--tile", 64, 64), "53x40 pixels, 0.667 of 80x60;", None, 1),
        (("--size", 0, "--tile", 32, 32), "80x60 pixels, 9 windows of 32x32;", [32, 32], 9),
    ):
        status, printed, _ = run(capsys, *base, *flags)
        assert status == 0 and f"(at {told} " in printed
        found = json.loads((out / "a.json").read_text())["input"]
        assert (found["window"], found["windows"]) == (window, windows)
        size = (60, 80) if 0 in flags else (40, 53)
        assert (found["height"], found["width"]) == size


def test_only_the_outputs_that_were_asked_for(capsys, model, weights, photos, tmp_path):
    base = ("predict", photos / "plain.png", "--weights", weights)
    for kinds, names in (
        ("labels", ["plain_labels.png"]),
        ("json, probabilities", ["plain.json", "plain_probabilities.png"]),
    ):
        out = tmp_path / kinds[:4]
        assert run(capsys, *base, "--output", out, "--outputs", kinds)[0] == 0
        assert sorted(path.name for path in out.iterdir()) == names
    with Image.open(tmp_path / "json" / "plain_probabilities.png") as image:
        assert image.mode.startswith("I;16")
        found = np.asarray(image) / 65535
    _, expected = predict_module.predict(model, photos / "plain.png", return_prob=True)
    # Half of a level.
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.5 / 65535 + 1e-7)
    status, _, errors = run(capsys, *base, "--output", tmp_path / "o", "--outputs", "label")
    assert status == 2 and "--outputs are label; expected one or more of labels" in errors
    assert not (tmp_path / "o").exists()


def test_photos_of_twelve_bits(capsys, model, weights, tmp_path):
    eight = np.asarray(photo(40, 56).convert("L"))
    Image.fromarray(eight.astype(np.uint16) << 4).save(tmp_path / "deep.png")
    out = tmp_path / "o"
    base = ("predict", tmp_path / "deep.png", "--output", out, "--weights", weights)
    status, _, errors = run(capsys, *base)
    assert status == 1 and "predict --depth 12" in errors and not out.exists()
    assert run(capsys, *base, "--depth", 12)[0] == 0
    expected = model.predict(np.repeat(eight[:, :, None], 3, axis=2))
    np.testing.assert_array_equal(labels_of(out, "deep")[1], expected)
    status, _, errors = run(capsys, *base, "--depth", 7)
    assert status == 2 and "--depth: bits is 7, expected 8 to 16" in errors


@pytest.mark.parametrize(
    ("names", "called"),
    [
        pytest.param(class_set("camvid").classes, "camvid", id="of a built-in set"),
        pytest.param(tuple("abcdefghijk"), "tiny", id="of the weights alone"),
    ],
)
def test_the_json_names_the_class_set(capsys, photos, tmp_path, names, called):
    torch.manual_seed(0)
    eleven = dlf.deeplabv3_mobilenet_v2_tf(num_classes=11, width=0.25, aspp_channels=8).eval()
    eleven.classes = names
    weights = dlf.save_weights(eleven, tmp_path / "tiny.safetensors")
    out = tmp_path / "o"
    arguments = ("predict", photos / "plain.png", "--output", out, "--weights", weights)
    assert run(capsys, *arguments)[0] == 0
    assert json.loads((out / "plain.json").read_text())["class_set"] == called


def test_the_other_commands(capsys):
    status, printed, _ = run(capsys, "models")
    assert status == 0 and printed.split() == dlf.list_models()
    status, printed, _ = run(capsys, "info")
    assert status == 0 and torch.__version__ in printed
    status, printed, _ = run(capsys, "--version")
    assert status == 0 and dlf.__version__ in printed
    status, printed, _ = run(capsys, "predict", "--help")
    assert status == 0 and "--output-stride" in printed


# ---- models of the user's own ----

OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 7, 4, padding=3)
        self.norm = nn.BatchNorm2d(classes)

    def forward(self, x):
        y = nn.functional.interpolate(self.norm(self.conv(x)), x.shape[-2:], mode="bilinear")
        return {"out": y}

def build():
    torch.manual_seed(5)
    return Net()

def one_class():
    return nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.Sigmoid())

def named():
    from deeplab_fast.data import Preprocess

    net = build()
    net.classes = ("wall", "floor", "sky", "tree")
    net.preprocess = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3)
    return net

def ours():
    import deeplab_fast
    return deeplab_fast.deeplabv3_mobilenet_v2_tf(num_classes=4, width=0.25, aspp_channels=8)

def fast():
    import deeplab_fast
    return deeplab_fast.accelerate(build(), exclude="norm")

def traced():
    return torch.jit.trace(nn.Conv2d(3, 4, 3), torch.rand(1, 3, 8, 8))

def half_a_segmenter():
    net = build()
    net.forward_logits, net.align_corners, net.num_classes = net.forward, False, 4
    return net

def nothing():
    pass

def pair():
    return build(), None

def broken():
    return helper({"classes": 3})

def helper(options):
    return Net(options["clases"])

def leaves():
    raise SystemExit(3)

def wrong_output():
    return nn.Flatten()

def wants(path):
    return build()

network = build()
number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The user's folder, which is the current one, with a module, a package and a file."""
    folder = tmp_path / "project"
    (folder / "ownpkg").mkdir(parents=True)
    (folder / "scripts").mkdir()
    for path in ("own_models.py", "ownpkg/nets.py", "scripts/build model.py"):
        (folder / path).write_text(OWN)
    (folder / "ownpkg" / "__init__.py").write_text("")
    (folder / "ownpkg" / "lacks.py").write_text("import no_such_library\n")
    (folder / "scripts" / "uses.py").write_text("import neighbour\nbuild = neighbour.make\n")
    (folder / "scripts" / "neighbour.py").write_text("from own_models import build as make\n")
    (folder / "scripts" / "torch.py").write_text(OWN)
    (folder / "syntax.py").write_text("def build(:\n    pass\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith(("own", "deeplab_fast_model_from", "neighbour", "syntax")):
            del sys.modules[name]


def assert_nearly(labels, expected):
    """Equal but for a few pixels: an accelerated model rounds differently."""
    assert labels.shape == expected.shape and (labels == expected).mean() > 0.998
    assert len(np.unique(expected)) > 1


def own_net(source="build"):
    names = {}
    exec(OWN, names)
    return names[source]().eval()


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param("own_models:build", id="module"),
        pytest.param("ownpkg.nets:build", id="module-of-a-package"),
        pytest.param("own_models.py:build", id="file"),
        pytest.param("scripts/build model.py:build", id="file-elsewhere"),
        pytest.param("{}/ownpkg/nets.py:build", id="absolute-path"),
        pytest.param("scripts/uses.py:build", id="file-that-imports-its-neighbour"),
        pytest.param("scripts/torch.py:build", id="file-called-like-a-library"),
    ],
)
def test_predict_by_a_model_of_ones_own(capsys, own, photos, tmp_path, spec):
    out = tmp_path / "o"
    image = photos / "plain.png"
    spec = spec.format(own)
    status, printed, errors = run(
        capsys, "predict", image, "--output", out, "--model-from", spec, "--flip"
    )
    assert status == 0, errors
    assert "1 of 1 images" in printed
    assert "how photos for Net are normalised; assumed" in errors and "--mean" in errors
    expected = predict_module.predict(own_net(), image, flip=True, preprocess=Preprocess())
    assert_nearly(labels_of(out, "plain")[1], expected)
    areas = json.loads((out / "plain.json").read_text())
    assert areas["model"] == spec and areas["backend"] in dlf.backends.BACKENDS
    assert {a["name"] for a in areas["classes"]} <= {f"class {i}" for i in range(4)}


def test_what_a_model_of_ones_own_tells(capsys, own, photos, tmp_path):
    out, image = tmp_path / "o", photos / "plain.png"
    base = ("predict", image, "--output", out, "--model-from")
    half = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3)
    status, _, errors = run(capsys, *base, "own_models:named")
    assert (status, errors) == (0, "")
    expected = predict_module.predict(own_net("named"), image)
    assert_nearly(labels_of(out, "plain")[1], expected)
    areas = json.loads((out / "plain.json").read_text())
    assert {a["name"] for a in areas["classes"]} <= {"wall", "floor", "sky", "tree"}
    # Mean and std of the command line, above the model's or in place of what is assumed.
    for source in ("named", "build"):
        other = ("--mean", 0.1, 0.2, 0.3, "--std", 0.3, 0.2, 0.1, "--size", 24)
        status, _, errors = run(capsys, *base, f"own_models:{source}", *other)
        assert (status, errors) == (0, "")
        given = Preprocess((0.1, 0.2, 0.3), (0.3, 0.2, 0.1), 24)
        expected = predict_module.predict(own_net(source), image, preprocess=given)
        assert_nearly(labels_of(out, "plain")[1], expected)
    run(capsys, *base, "own_models:named", "--mean", 0, 0, 0)
    expected = predict_module.predict(
        own_net("named"), image, preprocess=replace(half, mean=(0, 0, 0))
    )
    assert_nearly(labels_of(out, "plain")[1], expected)


def test_mean_and_std_of_a_models_weights(capsys, model, weights, photos, tmp_path):
    image = photos / "plain.png"
    base = ("predict", image, "--output", tmp_path / "o", "--weights", weights)
    assert run(capsys, *base, "--mean", 0, 0, 0, "--std", 1, 0.5, 1)[0] == 0
    given = replace(model.preprocess, mean=(0, 0, 0), std=(1, 0.5, 1))
    expected = model.predict(image, preprocess=given)
    np.testing.assert_array_equal(labels_of(tmp_path / "o", "plain")[1], expected)
    assert (expected != model.predict(image)).any()


def test_one_class_of_ones_own(capsys, own, photos, tmp_path):
    out, image = tmp_path / "o", photos / "plain.png"
    base = ("predict", image, "--output", out, "--model-from", "own_models:one_class")
    torch.manual_seed(3)
    status, _, errors = run(capsys, *base, "--threshold", 0.4, "--mean", 0, 0, 0, "--std", 1, 1, 1)
    assert (status, errors) == (0, "")
    torch.manual_seed(3)
    net = own_net("one_class")
    with torch.no_grad():
        x = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)[None] / 255
        p = net(x)[0, 0].numpy()
    clear = abs(p - 0.4) > 1e-6
    np.testing.assert_array_equal((labels_of(out, "plain")[1] == 1)[clear], (p > 0.4)[clear])
    assert "foreground" in (out / "plain.json").read_text() or (p < 0.4).all()


def test_weights_of_a_model_of_ones_own(capsys, own, weights, model, photos, tmp_path):
    out, image = tmp_path / "o", photos / "plain.png"
    base = ("predict", image, "--output", out, "--mean", 0, 0, 0, "--std", 1, 1, 1)
    net = own_net()
    with torch.no_grad():
        for value in net.parameters():
            value.add_(torch.randn_like(value))
    state = {f"module.{k}": v for k, v in net.state_dict().items()}
    torch.save({"model": state, "model_ema": own_net().state_dict()}, tmp_path / "w.pth")
    arguments = (*base, "--model-from", "own_models:build", "--weights", tmp_path / "w.pth")
    status, _, errors = run(capsys, *arguments)
    assert status == 2 and "more than one network that fits: model, model_ema" in errors
    assert not out.exists()
    status, _, errors = run(capsys, *arguments, "--weights-part", "model")
    assert (status, errors) == (0, "")
    plain = Preprocess(mean=(0,) * 3, std=(1,) * 3)
    expected = predict_module.predict(net, image, preprocess=plain)
    assert_nearly(labels_of(out, "plain")[1], expected)
    # A model of this package takes weights as everywhere.
    base = ("predict", image, "--output", out, "--model-from", "own_models:ours")
    assert run(capsys, *base, "--weights", weights)[0] == 0
    np.testing.assert_array_equal(labels_of(out, "plain")[1], model.predict(image))


@pytest.mark.parametrize(
    ("source", "flags", "calls", "note"),
    [
        pytest.param("build", [], 1, "", id="by-itself"),
        pytest.param("build", ["--no-accelerate"], 0, "", id="told-not-to"),
        # Its exclude would be lost.
        pytest.param("fast", [], 0, "", id="done-by-its-code"),
        pytest.param("traced", [], 0, "note: the model runs as it is: got ", id="scripted"),
        pytest.param("traced", ["--no-accelerate"], 0, "", id="scripted-and-told-not-to"),
    ],
)
def test_models_of_ones_own_are_accelerated(
    capsys, own, photos, tmp_path, monkeypatch, source, flags, calls, note
):
    seen, ran = [], []
    accelerate, predict = dlf.accelerate, predict_module.predict

    def recorded(model, **options):
        accelerate(model, **options)
        if options == {"training": False}:
            seen.append(dlf.accelerate_report(model).accelerated)
        return model

    def noted(model, image, **options):
        ran.append(model.model)
        return predict(model, image, **options)

    monkeypatch.setattr(dlf, "accelerate", recorded)
    monkeypatch.setattr(predict_module, "predict", noted)
    base = ("--mean", 0, 0, 0, "--std", 1, 1, 1, "--model-from", f"own_models:{source}")
    image = photos / "plain.png"
    status, _, errors = run(capsys, "predict", image, "--output", tmp_path / "o", *base, *flags)
    assert status == 0, errors
    assert len(seen) == calls and all(count > 0 for count in seen)
    (model,) = ran
    if not isinstance(model, torch.jit.ScriptModule):
        fast = dlf.accelerate_report(model).accelerated > 0
        assert fast == (source == "fast" or calls == 1)
    assert (note in errors) if note else errors == ""
    if source == "build":
        plain = Preprocess(mean=(0,) * 3, std=(1,) * 3)
        expected = predict(own_net(), image, preprocess=plain)
        assert_nearly(labels_of(tmp_path / "o", "plain")[1], expected)


def test_no_accelerate_is_for_models_of_ones_own(capsys, weights, photos, tmp_path):
    base = ("predict", photos, "--output", tmp_path / "o", "--weights", weights)
    status, _, errors = run(capsys, *base, "--no-accelerate")
    assert status == 2 and "--no-accelerate is for models of --model-from; expected" in errors
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("spec", "flags", "message"),
    [
        pytest.param("own_models", [], "own_models: expected MODULE:FUNCTION", id="no-colon"),
        pytest.param("own_models:", [], "own_models:: expected MODULE:FUNCTION", id="no-name"),
        pytest.param("nope:build", [], "no module is named 'nope', expected one in", id="module"),
        pytest.param("ownpkg.nope:build", [], "is named 'ownpkg.nope'", id="module-of-a-package"),
        pytest.param("nope.py:build", [], "nope.py is no file, expected FILE.py", id="file"),
        pytest.param("own_models:make", [], "has no make; expected a function", id="function"),
        pytest.param("own_models:make", [], "It has: Net, build, one_class", id="what-there-is"),
        pytest.param("own_models:number", [], "is a int, expected a function", id="number"),
        pytest.param("own_models:network", [], "is a Net, expected a function", id="a-model"),
        pytest.param("own_models:nothing", [], "returned None, expected a torch.nn", id="none"),
        pytest.param("own_models:pair", [], "returned a tuple, expected", id="tuple"),
        pytest.param("own_models:wrong_output", [], "a tensor [1, 12288]", id="no-map"),
        pytest.param(
            "own_models:half_a_segmenter", [], "forward_logits but no preprocess;", id="half"
        ),
        pytest.param("own_models:broken", [], "failed with KeyError; expected", id="raises"),
        pytest.param("own_models:broken", [], "in helper\n    return Net(opt", id="traceback"),
        pytest.param("own_models:broken", [], "KeyError: 'clases'", id="its-error"),
        pytest.param("own_models:leaves", [], "failed with SystemExit", id="exits"),
        pytest.param("own_models:wants", [], "missing 1 required positional", id="arguments"),
        pytest.param("syntax:build", [], 'syntax.py", line 1', id="syntax"),
        pytest.param("ownpkg.lacks:build", [], "No module named 'no_such_library'", id="library"),
        pytest.param(
            "own_models:build",
            ["--model", "deeplabv3_resnet50", "--num-classes", "3"],
            "--model-from and --model, --num-classes were both given; expected one",
            id="model-and-classes",
        ),
        pytest.param(
            "own_models:build", ["--output-stride", "8"], "--output-stride were", id="stride"
        ),
        pytest.param("own_models:build", ["--reset-head"], "--reset-head were", id="reset-head"),
        pytest.param(
            "own_models:build", ["--weights-part", "x"], "--weights FILE, which", id="part"
        ),
        pytest.param(
            "own_models:build", ["--weights", "no.pth"], "no such checkpoint: no.pth", id="weights"
        ),
        pytest.param(
            "own_models:build",
            ["--precision", "int8"],
            "--precision: precision int8 was asked for and the model (Net) computes in fp32",
            id="precision",
        ),
        pytest.param(
            "own_models:build", ["--threshold", "0.4"], "the model has 4 classes", id="threshold"
        ),
        pytest.param(
            "own_models:build", ["--classes", "voc"], "voc has 21 classes", id="class-names"
        ),
        pytest.param(
            "own_models:build", ["--backend", "opencl"], "allowed: auto, cuda", id="backend"
        ),
        pytest.param("own_models:build", ["--std", "1", "0", "1"], "--std: std is", id="std-of-0"),
        pytest.param("own_models:build", ["--mean", "1"], "--mean", id="mean-of-one"),
    ],
)
def test_models_of_ones_own_that_fail(capsys, own, photos, tmp_path, spec, flags, message):
    out = tmp_path / "o"
    status, printed, errors = run(
        capsys, "predict", photos / "plain.png", "--output", out, "--model-from", spec, *flags
    )
    assert status == 2 and printed == "" and message in errors
    # Of a traceback the user's own part only.
    assert "cli/" not in errors and "importlib" not in errors
    assert not out.exists()


# ---- the files ----

IMAGE = np.full((4, 6, 3), 200, np.uint8)
LABELS = np.zeros((4, 6), np.uint8)
LABELS[:, 3:] = 1
TWO = ClassSet("two", ("cat", "dog"), ((0, 100, 200), (100, 0, 0)))


def test_overlay_by_hand():
    result = outputs.overlay(IMAGE, LABELS, TWO, alpha=0.25)
    # 0.75 * 200 + 0.25 * colour; the column before the boundary is white.
    np.testing.assert_array_equal(result[:, :2], np.broadcast_to([150, 175, 200], (4, 2, 3)))
    np.testing.assert_array_equal(result[:, 2], np.full((4, 3), 255))
    np.testing.assert_array_equal(result[:, 3:], np.broadcast_to([175, 150, 150], (4, 3, 3)))
    np.testing.assert_array_equal(
        outputs.overlay(IMAGE, LABELS[:, :1].repeat(6, 1), TWO, alpha=0), IMAGE
    )
    np.testing.assert_array_equal(
        outputs.overlay(IMAGE, LABELS[:, :1].repeat(6, 1), TWO, alpha=1)[0, 0], [0, 100, 200]
    )
    with_background = ClassSet("b", ("background", "dog"), TWO.palette)
    kept = outputs.overlay(IMAGE, LABELS, with_background)
    np.testing.assert_array_equal(kept[:, :2], IMAGE[:, :2])
    with pytest.raises(ValueError, match="alpha is 2"):
        outputs.overlay(IMAGE, LABELS, TWO, alpha=2)


def test_overlay_of_an_image_larger_than_a_band(monkeypatch):
    labels = np.random.default_rng(0).integers(0, 2, (37, 6)).astype(np.uint8)
    image = np.random.default_rng(1).integers(0, 256, (37, 6, 3), np.uint8)
    whole = outputs.overlay(image, labels, TWO)
    areas = outputs.class_areas(labels, TWO)
    monkeypatch.setattr(outputs, "_BAND", 5)
    np.testing.assert_array_equal(outputs.overlay(image, labels, TWO), whole)
    assert outputs.class_areas(labels, TWO) == areas


def test_class_areas():
    labels = np.array([[0, 2, 2], [2, 2, 0]])
    areas = outputs.class_areas(labels, class_set("voc"))
    assert [(a["id"], a["name"], a["pixels"]) for a in areas] == [
        (2, "bicycle", 4),
        (0, "background", 2),
    ]
    assert [a["fraction"] for a in areas] == pytest.approx([4 / 6, 2 / 6])


@pytest.mark.parametrize(
    ("classes", "mode"),
    [
        pytest.param(2, "P", id="two"),
        pytest.param(256, "P", id="the-last-that-a-palette-holds"),
        pytest.param(257, "I;16", id="the-first-beyond"),
        pytest.param(1000, "I;16", id="many"),
    ],
)
def test_label_maps_are_lossless(tmp_path, classes, mode):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, (9, 300))
    labels[0, :2] = 0, classes - 1
    labels = labels.astype(np.uint8 if classes <= 256 else np.int64)
    image = np.zeros((9, 300, 3), np.uint8)
    known = generic_classes(classes)
    paths = outputs.write_outputs(tmp_path, "a", image, labels, known)
    with Image.open(paths["labels"]) as stored:
        assert stored.mode == mode
        np.testing.assert_array_equal(np.asarray(stored), labels)
        if mode == "P":
            np.testing.assert_array_equal(
                np.asarray(stored.convert("RGB")), np.array(known.palette, np.uint8)[labels]
            )


def test_ignored_labels_are_kept(tmp_path):
    labels = LABELS.copy()
    labels[0, 0] = 255
    paths = outputs.write_outputs(tmp_path, "a", IMAGE, labels, TWO)
    np.testing.assert_array_equal(np.asarray(Image.open(paths["labels"])), labels)
    areas = json.loads(paths["json"].read_text())["classes"]
    assert [area["name"] for area in areas] == ["dog", "cat", "ignored"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"labels": LABELS + 5}, r"from 5 to 6.*two has 2 classes", id="too-large"),
        pytest.param({"labels": LABELS.astype(int) - 1}, "from -1 to 0", id="negative"),
        pytest.param({"labels": LABELS.astype(float)}, "float64", id="float"),
        pytest.param({"labels": LABELS[:3]}, r"expected uint8 \[3, 6, 3\]", id="other-size"),
        pytest.param({"image": IMAGE[..., 0]}, r"uint8 \[4, 6\], expected", id="grey"),
        pytest.param({"stem": "../a"}, "stem is", id="path-in-the-stem"),
        pytest.param({"stem": ""}, "stem is ''", id="no-stem"),
    ],
)
def test_outputs_that_do_not_fit_write_nothing(tmp_path, change, message):
    arguments = {"stem": "a", "image": IMAGE, "labels": LABELS, "classes": TWO, **change}
    with pytest.raises(ValueError, match=message):
        outputs.write_outputs(tmp_path / "o", **arguments)
    assert not (tmp_path / "o").exists()


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    outputs.write_outputs(tmp_path, "a", IMAGE, LABELS, TWO)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def write(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(
            [(tmp_path / "a.json", lambda file: file.write(b"new")), (tmp_path / "b.png", write)]
        )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_read_image_reads_what_is_written(tmp_path):
    paths = outputs.write_outputs(tmp_path, "a", IMAGE, LABELS, TWO, legend=False)
    np.testing.assert_array_equal(read_image(paths["overlay"]), outputs.overlay(IMAGE, LABELS, TWO))


def colours_in(picture):
    return set(map(tuple, np.asarray(picture).reshape(-1, 3).tolist()))


def test_the_legend_has_the_classes_that_occur(tmp_path, monkeypatch):
    image, labels = np.full((40, 60, 3), 9, np.uint8), np.zeros((40, 60), np.uint8)
    labels[:10], labels[10, 0] = 2, 255
    three = ClassSet("b", ("background", "cat", "dog"), ((0, 0, 0), (1, 2, 3), (250, 100, 20)))
    paths = outputs.write_outputs(tmp_path, "a", image, labels, three)
    shown = read_image(paths["overlay"])
    # The background keeps the photo, and its box in the legend is empty.
    assert (shown[12:40, :60] == 9).all() and (shown[:9, :60] == [130, 55, 15]).all()
    boxes = colours_in(shown[40:]) & {(250, 100, 20), (0, 0, 0), (1, 2, 3)}
    assert boxes == {(250, 100, 20), (0, 0, 0)}, "dog, and black of the ignored pixel"
    texts = []
    monkeypatch.setattr(outputs, "legend_image", lambda entries, *_: texts.extend(entries))
    outputs.overlay_legend(labels, three, 60)
    assert [(entry.text, entry.colour) for entry in texts] == [
        ("background 75.0%", None),
        ("dog 25.0%", (250, 100, 20)),
        ("ignored <0.1%", (0, 0, 0)),
    ]


def test_pictures_of_the_command_line(capsys, weights, model, photos, tmp_path):
    path, out = photos / "plain.png", tmp_path / "o"
    classes = ",".join(str(i) for i in range(model.num_classes))
    common = ("predict", path, "--output", out, "--weights", weights, "--no-legend")
    status, _, errors = run(capsys, *common, "--unpainted", classes)
    assert status == 0, errors
    shown, photo_ = read_image(out / "plain_overlay.png"), read_image(path)
    # All but the lines between classes is the photo.
    line = (shown == 255).all(-1)
    np.testing.assert_array_equal(shown[~line], photo_[~line])
    status, _, errors = run(capsys, *common, "--unpainted", "bird of paradise")
    assert status == 2 and "--unpainted: 'bird of paradise' is no class of" in errors


def test_which_classes_are_unpainted():
    three = ClassSet("b", ("background", "cat", "dog"), ((0, 0, 0), (1, 2, 3), (250, 100, 20)))
    image, labels = np.full((3, 3, 3), 200, np.uint8), np.full((3, 3), 2, np.uint8)
    assert (outputs.overlay(image, labels, three)[0, 0] == [225, 150, 110]).all()
    assert (outputs.overlay(image, labels, three, unpainted=[1, 2]) == 200).all()
    assert (outputs.overlay(image, labels * 0, three, unpainted=()) == 100).all()
    with pytest.raises(ValueError, match=r"unpainted has the class 3, .* b has the ids 0\.\.2"):
        outputs.overlay(image, labels, three, unpainted=[3])


@pytest.mark.skipif(bool(limits.cpu_int8()), reason=limits.cpu_int8())
def test_calibrate_writes_weights_for_int8(capsys, model, weights, photos, tmp_path):
    out = tmp_path / "int8.safetensors"
    arguments = ["calibrate", photos, "--weights", weights, "--output", out]
    options = ["--method", "minmax", "--limit", "2", "--size", "48"]
    status, printed, errors = run(capsys, *arguments, *options)
    assert status == 0
    assert "ranges by minmax on 2 images" in printed
    assert f"--weights {out} --precision int8" in printed
    # Random weights keep fewer labels than is wanted.
    assert not errors or "less than 99%" in errors
    again = dlf.from_checkpoint(out)
    assert again.calibration.images == 2
    assert again.preprocess == model.preprocess
    predicted = tmp_path / "labels"
    status, _, _ = run(
        capsys, "predict", photos, "--weights", out, "--output", predicted, "--precision", "int8"
    )
    assert status == 0
    assert list(predicted.glob("*_labels.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PHOTOS"], "--output FILE.safetensors is missing"),
        (["--output", "FILE.safetensors"], "PATH is missing"),
        (["PHOTOS", "--output", "FILE.pth"], "expected a .safetensors file"),
        (["NONE", "--output", "FILE.safetensors"], "NONE"),
        (["PHOTOS", "--output", "FILE.safetensors", "--method", "best"], "minmax"),
        (["PHOTOS", "--output", "FILE.safetensors", "--limit", "0"], "limit is 0"),
    ],
)
def test_calibrate_refuses(capsys, weights, photos, tmp_path, arguments, message):
    names = {"PHOTOS": photos, "NONE": tmp_path / "NONE"}
    given = [names.get(a, tmp_path / a if a.startswith("FILE") else a) for a in arguments]
    status, _, errors = run(capsys, "calibrate", "--weights", weights, *given)
    assert status == 2
    assert message in errors
    assert not list(tmp_path.glob("FILE*"))
