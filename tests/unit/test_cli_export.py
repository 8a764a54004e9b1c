"""``deeplab-fast export``, and ``deeplab-fast predict`` of what it writes."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deeplab_fast as dlf
from deeplab_fast import cli
from deeplab_fast.data.preprocess import Preprocess
from deeplab_fast.exporting import load_exported

SIDES = (72, 88)
CLASSES = ("background", "road", "sky", "tree", "car")


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def model() -> dlf.DeepLabV3:
    """A tiny model whose labels vary over a picture."""
    torch.manual_seed(0)
    model = dlf.deeplabv3_resnet18(num_classes=5, head="paper", aspp_channels=16).eval()
    model.classes = CLASSES
    x = Preprocess().batch(torch.from_numpy(np.array(photo(*SIDES))).permute(2, 0, 1)[None])
    with torch.no_grad():
        last = [m for m in model.classifier.modules() if isinstance(m, torch.nn.Conv2d)][-1]
        # All classes equal on average: without it one class would win everywhere.
        last.bias -= model.forward_logits(x).mean((0, 2, 3))
    assert len(np.unique(model.predict(photo(*SIDES)))) > 1
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """Weights, files of logits and labels, and photos."""
    folder = tmp_path_factory.mktemp("files")
    dlf.save_weights(model, folder / "tiny.safetensors")
    dlf.export(model, folder / "any.pt2", check=False)
    dlf.export(model, folder / "labels.pt2", size=SIDES, labels=True, check=False)
    dlf.export(
        model, folder / "photos.pt2", size=SIDES, labels=True, preprocessing=True, check=False
    )
    photo(*SIDES).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def onnx_file(model, tmp_path_factory) -> Path:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    path = tmp_path_factory.mktemp("onnx") / "static.onnx"
    dlf.export(model, path, size=SIDES, dynamic=False)
    return path


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def labels_of(folder: Path, stem: str) -> np.ndarray:
    with Image.open(folder / f"{stem}_labels.png") as image:
        return np.asarray(image)


def test_export_writes_and_reports(capsys, model, folder, tmp_path):
    out = tmp_path / "m.pt2"
    weights = folder / "tiny.safetensors"
    base = ("export", "--weights", weights, "--output", out)
    status, printed, errors = run(capsys, *base, "--input-size", *SIDES, "--static", "--labels")
    assert status == 0, errors
    assert f"{out}: images float32 [1,3,72,88] -> labels uint8 [1,72,88], fp32" in printed
    assert "torch.export" in printed and "of the labels equal" in printed
    assert list(tmp_path.iterdir()) == [out]
    loaded = load_exported(out)
    assert loaded.classes == CLASSES and loaded.description.model == "deeplabv3_resnet18"
    np.testing.assert_array_equal(
        loaded.predict(folder / "photo.png"), model.predict(folder / "photo.png")
    )


def test_options_reach_the_file(capsys, folder, tmp_path):
    out = tmp_path / "m.pt2"
    flags = ["--preprocessing", "--size", "96", "--precision", "bf16", "--no-check"]
    flags += ["--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6", "--input-size", "80", 90]
    base = ("export", "--weights", folder / "tiny.safetensors", "--output", out)
    status, printed, errors = run(capsys, *base, *flags)
    assert status == 0, errors
    assert "uint8 [N,80,90,3] -> logits float32 [N,5,80,90], bf16" in printed
    assert "not run" in printed
    own = load_exported(out).description
    assert own.resize == 96 and own.mean == (0.1, 0.2, 0.3) and own.std == (0.4, 0.5, 0.6)


def test_a_photo_of_ones_own(capsys, folder, tmp_path):
    base = ("export", "--weights", folder / "tiny.safetensors", "--output", tmp_path / "m.pt2")
    flags = ("--input-size", 64, 64)
    status, printed, _ = run(capsys, *base, *flags, "--photo", folder / "photo.png")
    assert status == 0 and "on 1x3x64x64 and 2x3x64x64" in printed
    (tmp_path / "m.pt2").unlink()
    (tmp_path / "text.png").write_text("no picture")
    status, _, errors = run(capsys, *base, *flags, "--photo", tmp_path / "text.png")
    assert status == 2 and "text.png" in errors and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["text.png"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        pytest.param([], "--output FILE is missing", id="no-output"),
        pytest.param(["--output", "OUT/m.tflite"], "'m.tflite' has no format", id="suffix"),
        pytest.param(["--output", "OUT/m"], "'m' has no format", id="no-suffix"),
        pytest.param(
            ["--output", "OUT/m.onnx", "--precision", "bf16"],
            "precision is 'bf16', and a .onnx file has fp32, fp16, int8",
            id="precision-of-another-format",
        ),
        pytest.param(
            ["--output", "OUT/m.pt2", "--precision", "fp64"],
            "precision is 'fp64'",
            id="precision-that-there-is-not",
        ),
        pytest.param(
            ["--output", "OUT/m.pt2", "--precision", "int8"],
            "deeplab-fast calibrate",
            id="int8-without-calibration",
        ),
        pytest.param(
            ["--output", "OUT/m.pt2", "--no-check", "--photo", "x.png"],
            "--no-check and --photo were both given",
            id="check-and-none",
        ),
        pytest.param(["--output", "OUT/new/m.pt2"], "no such folder", id="folder"),
        pytest.param(
            ["--output", "OUT/m.pt2", "--input-size", "0", "64"], "size is", id="size-of-nothing"
        ),
        pytest.param(
            ["--output", "OUT/m.pt2", "--photo", "OUT/no.png"], "no.png", id="photo-that-is-not"
        ),
    ],
)
def test_bad_arguments_write_nothing(capsys, folder, tmp_path, flags, said):
    given = [flag.replace("OUT", str(tmp_path)) for flag in flags]
    base = ("export", "--weights", folder / "tiny.safetensors")
    status, printed, errors = run(capsys, *base, *given)
    assert status == 2 and printed == ""
    assert said.replace("OUT", str(tmp_path)) in errors
    assert errors.startswith("deeplab-fast export: error: ")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_that_name(capsys, folder, tmp_path):
    (tmp_path / "m.pt2").mkdir()
    base = ("export", "--weights", folder / "tiny.safetensors")
    status, _, errors = run(capsys, *base, "--output", tmp_path / "m.pt2")
    assert status == 2 and "is a folder; name a file in it" in errors
    assert not list((tmp_path / "m.pt2").iterdir())
    (tmp_path / "m.bin").mkdir()
    status, _, errors = run(capsys, *base, "--output", tmp_path / "m.xml")
    assert status == 2 and "m.bin is a folder, and the weights are to be written there" in errors
    assert not list((tmp_path / "m.bin").iterdir())


def test_weights_are_needed(capsys, tmp_path):
    status, _, errors = run(capsys, "export", "--output", tmp_path / "m.pt2")
    assert status == 2 and "--weights is missing" in errors


@pytest.mark.parametrize(
    ("suffix", "missing", "extra"),
    [
        pytest.param(".onnx", "onnxscript", "onnx", id="to-write"),
        pytest.param(".onnx", "onnxruntime", "onnx", id="to-check"),
        pytest.param(".xml", "openvino", "openvino", id="openvino"),
    ],
)
def test_missing_libraries(capsys, folder, tmp_path, monkeypatch, suffix, missing, extra):
    from deeplab_fast.exporting import formats

    def find_spec(name):
        return None if name == missing else importlib.util.find_spec("json")

    monkeypatch.setattr(formats, "find_spec", find_spec)
    base = ("export", "--weights", folder / "tiny.safetensors")
    status, printed, errors = run(capsys, *base, "--output", tmp_path / f"m{suffix}")
    assert status == 2 and printed == ""
    assert f"needs {missing}," in errors and f"deeplab_fast[{extra}]" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", None])
def test_predict_by_onnx(capsys, model, folder, onnx_file, tmp_path, runtime):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    flags = () if runtime is None else ("--runtime", runtime)
    base = ("predict", folder / "photo.png", "--output", tmp_path, "--weights", onnx_file)
    status, printed, errors = run(capsys, *base, *flags)
    assert status == 0 and errors == "", errors
    assert "1 of 1 images segmented" in printed
    wanted = model.predict(folder / "photo.png")
    assert (labels_of(tmp_path, "photo") == wanted).mean() > 0.999
    written = json.loads((tmp_path / "photo.json").read_text())
    name = "OpenVINO 2" if runtime == "openvino" else "ONNX Runtime 1"
    assert written["backend"].startswith(name)
    assert written["model"] == "deeplabv3_resnet18"
    assert {c["name"] for c in written["classes"]} <= set(CLASSES)


@pytest.mark.parametrize(
    ("name", "flags", "options"),
    [
        pytest.param("any.pt2", [], {}, id="logits"),
        pytest.param(
            "any.pt2",
            ["--scales", "0.75", "1", "--flip"],
            {"scales": (0.75, 1.0), "flip": True},
            id="passes",
        ),
        pytest.param(
            "any.pt2",
            ["--mean", "0.2", "0.3", "0.4", "--std", "0.3", "0.3", "0.3"],
            {"preprocess": Preprocess((0.2, 0.3, 0.4), (0.3,) * 3)},
            id="normalisation",
        ),
        pytest.param("labels.pt2", [], {}, id="labels"),
        pytest.param("photos.pt2", ["--device", "cpu", "--precision", "fp32"], {}, id="photos"),
    ],
)
def test_predict_by_a_program(capsys, model, folder, tmp_path, name, flags, options):
    base = ("predict", folder / "photo.png", "--output", tmp_path, "--weights", folder / name)
    status, _, errors = run(capsys, *base, *flags)
    assert status == 0 and errors == "", errors
    wanted = model.predict(folder / "photo.png", **options)
    # Full-size logits are resized once more by other scales.
    assert (labels_of(tmp_path, "photo") == wanted).mean() > (
        0.98 if "scales" in options else 0.999
    )
    written = json.loads((tmp_path / "photo.json").read_text())
    assert written["backend"] == f"torch.export {torch.__version__}"


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        pytest.param("any.pt2", ["--num-classes", 5], "--num-classes: any.pt2", id="classes"),
        pytest.param("any.pt2", ["--model", "x"], "--model: any.pt2", id="model"),
        pytest.param("any.pt2", ["--device", "cuda"], "cuda", id="device"),
        pytest.param("any.pt2", ["--dtype", "bf16"], "--dtype: any.pt2", id="dtype"),
        pytest.param("any.pt2", ["--precision", "bf16"], "precision is bf16", id="precision"),
        pytest.param("photos.pt2", ["--mean", 0, 0, 0], "--mean: photos.pt2", id="mean-of-photos"),
        pytest.param("labels.pt2", ["--scales", 0.5, 1], "scales: labels.pt2", id="scales"),
        pytest.param("labels.pt2", ["--flip"], "flip: labels.pt2", id="flip"),
        pytest.param("labels.pt2", ["--tile", 64, 64], "tile: labels.pt2", id="tile"),
        pytest.param("any.pt2", ["--runtime", "openvino"], "run by torch", id="runtime-of-another"),
        pytest.param("any.pt2", ["--runtime", "tensorrt"], "'tensorrt'", id="unknown-runtime"),
        pytest.param("tiny.safetensors", ["--runtime", "openvino"], "leave it out", id="weights"),
        pytest.param("no.pt2", [], "no such file", id="no-file"),
    ],
)
def test_predict_refuses(capsys, folder, tmp_path, name, flags, said):
    out = tmp_path / "out"
    base = ("predict", folder / "photo.png", "--output", out, "--weights", folder / name)
    status, printed, errors = run(capsys, *base, *flags)
    assert status == 2 and printed == "" and said in errors
    assert not out.exists()


def test_another_file_of_that_name(capsys, folder, tmp_path):
    (tmp_path / "m.pt2").write_bytes(b"no program")
    base = ("predict", folder / "photo.png", "--output", tmp_path / "out")
    status, _, errors = run(capsys, *base, "--weights", tmp_path / "m.pt2")
    assert status == 2 and "is no .pt2 file that torch reads" in errors
    # A program that something else wrote.
    program = torch.export.export(torch.nn.Identity(), (torch.zeros(1, 3, 40, 40),))
    torch.export.save(program, tmp_path / "m.pt2")
    status, _, errors = run(capsys, *base, "--weights", tmp_path / "m.pt2")
    assert status == 2 and "does not say what it takes and gives" in errors
    assert not (tmp_path / "out").exists()


def test_photos_of_other_sizes_are_reported(capsys, model, folder, onnx_file, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    photo(*SIDES).save(photos / "a.png")
    photo(SIDES[0], SIDES[1] + 1).save(photos / "b.png")
    photo(*SIDES, seed=1).save(photos / "c.png")
    out = tmp_path / "out"
    base = ("predict", photos, "--output", out, "--weights", onnx_file)
    status, printed, errors = run(capsys, *base)
    assert status == 1 and "2 of 3 images segmented" in printed and "1 failed" in printed
    assert f"{photos / 'b.png'}: static.onnx: the input has 72x89 pixels" in errors
    assert {path.name.split("_")[0].split(".")[0] for path in out.iterdir()} == {"a", "c"}
    assert (labels_of(out, "c") == model.predict(photos / "c.png")).mean() > 0.999


def test_a_full_disk_is_told_with_the_file(folder, tmp_path, monkeypatch, capsys):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(source))

    monkeypatch.setattr(os, "replace", full)
    path = tmp_path / "full.pt2"
    arguments = ["--weights", str(folder / "tiny.safetensors"), "--no-check", "--output", str(path)]
    assert cli.main(["export", *arguments]) == 1
    assert f"no space left for {path}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
