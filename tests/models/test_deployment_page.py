"""DEPLOYMENT.md: its code runs as it stands there, and its tables are those of the package."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import deeplab_fast as dlf
from deeplab_fast.cli.export import parser
from deeplab_fast.data.images import read_image
from deeplab_fast.exporting import FORMATS, Description
from deeplab_fast.exporting.formats import OPSET
from deeplab_fast.exporting.graph import SMALLEST
from tests.helpers.pages import blocks_of

PAGE = (Path(__file__).parents[2] / "DEPLOYMENT.md").read_text("utf-8")
PHOTO = Path(dlf.exporting.__file__).with_name("photo.jpg")
# Of labels after preprocessing: one level of a resized pixel, rounded the other way, moves logits.
SAME = 0.998


BLOCKS = blocks_of(PAGE)


@dataclass
class Ran:
    """What the blocks of a section left behind."""

    folder: Path
    names: dict[str, object]
    # Of each block that runs something.
    printed: list[str]


def _shell(text: str, folder: Path) -> str:
    """Runs lines of a shell, in which `python` and `deeplab-fast` are those of this process."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    commands = (("python", ""), ("deeplab-fast", "-m deeplab_fast"))
    for name, arguments in commands:
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (tools / name).chmod(0o755)
    own = str(Path(dlf.__file__).parents[1])
    env = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([own, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run(
        ["bash", "-e", "-c", text], cwd=folder, env=env, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _run(section: str, folder: Path) -> Ran:
    """Runs the blocks of a section, one after the other, in one folder and with the same names."""
    shutil.copy(PHOTO, folder / "photo.jpg")
    ran = Ran(folder, {"__name__": section}, [])
    for number, block in enumerate(b for b in BLOCKS if b.section == section):
        if block.language == "python":
            code = compile(block.text, f"{section}, block {number}", "exec")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, ran.names)
            ran.printed.append(printed.getvalue())
        elif block.language == "sh":
            ran.printed.append(_shell(block.text, folder))
        else:
            (folder / block.file).write_text(block.text)
    return ran


def _counts(labels: np.ndarray) -> list[tuple[int, int]]:
    values, counts = np.unique(labels, return_counts=True)
    return [(int(v), int(n)) for v, n in zip(values, counts, strict=True)]


def _printed_counts(text: str) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in re.findall(r"^(\d+) (\d+)$", text, re.MULTILINE)]


def _bound(model: nn.Module) -> float:
    """CONTRIBUTING.md: of a form that saves multiplications, by the root of the convolutions."""
    return 1e-5 * sum(isinstance(m, nn.Conv2d) for m in model.modules()) ** 0.5


def _error(found: object, wanted: torch.Tensor) -> float:
    difference = torch.as_tensor(found) - wanted
    return float(difference.double().norm() / wanted.double().norm())


def _logits(model: nn.Module, images: object) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.as_tensor(images))["out"]


def _small_photo(width: int = 480, height: int = 360) -> np.ndarray:
    return np.array(Image.open(PHOTO).convert("RGB").resize((width, height)))


def _need_compiler(*tools: str) -> None:
    missing = [tool for tool in ("bash", "g++", *tools) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found, by which the page's C++ is built")


def _need_toolkit() -> None:
    """CMake's files of a PyTorch built for CUDA ask for the whole toolkit, not for nvcc alone."""
    if torch.version.cuda is None:
        return
    from torch.utils.cpp_extension import CUDA_HOME

    home = Path(CUDA_HOME or "/nonexistent")
    headers = home / "include/cuda_runtime.h"
    libraries = [home / lib / "libcudart.so" for lib in ("lib64", "lib", "lib/x86_64-linux-gnu")]
    if not headers.exists() or not any(path.exists() for path in libraries):
        pytest.skip("PyTorch is built for CUDA and there is no CUDA toolkit, which its CMake needs")


def _five_lines(ran: Ran) -> None:
    model, labels = dlf.load("camvid"), ran.names["labels"]
    wanted = model.predict(PHOTO)
    assert (labels == wanted).mean() > SAME
    report, by_runtime, loaded, _ = ran.printed
    assert f"labels uint8 [N,H,W], fp32, opset {OPSET}" in report and "labels equal" in report
    counts = {line.split()[0]: int(line.split()[1]) for line in by_runtime.splitlines()}
    assert counts == {model.classes[label]: n for label, n in _counts(labels)}
    assert loaded.startswith("ONNX Runtime ") and "images uint8 [N,H,W,3] labels" in loaded
    with Image.open(ran.folder / "results/photo_labels.png") as image:
        assert (np.asarray(image) == wanted).mean() > SAME
    written = json.loads((ran.folder / "results/photo.json").read_text())
    assert written["backend"].startswith("ONNX Runtime")


def _onnx_runtime(ran: Ran) -> None:
    model, logits = dlf.load("camvid"), ran.names["logits"]
    wanted = _logits(model, ran.names["images"])
    assert _error(logits, wanted) < _bound(model)
    # What the snippet normalises is what the model takes.
    own = dlf.data.Preprocess(model.preprocess.mean, model.preprocess.std)
    pixels = torch.from_numpy(_small_photo(960, 720)).permute(2, 0, 1)[None]
    np.testing.assert_allclose(ran.names["images"], own.batch(pixels), rtol=0, atol=1e-6)
    printed = np.fromstring(ran.printed[0].strip("[]\n").replace("\n", " "), int, sep=" ")
    np.testing.assert_array_equal(printed, np.bincount(logits.argmax(1).ravel(), minlength=11))


def _openvino(ran: Ran) -> None:
    model = dlf.load("camvid")
    in_python, in_cpp = ran.printed
    assert in_cpp == in_python
    assert json.loads(in_cpp.splitlines()[0]) == list(model.classes)
    labels = ran.names["labels"][0]
    assert _printed_counts(in_cpp) == _counts(labels) and len(_counts(labels)) > 1
    assert (labels == model.predict(_small_photo())).mean() > SAME


def _torch_export(ran: Ran) -> None:
    model = dlf.load("camvid")
    assert _error(ran.names["logits"], _logits(model, ran.names["images"])) < _bound(model)
    assert ran.names["description"]["classes"] == list(model.classes)
    assert ran.printed[-1].strip().endswith("[2, 11, 360, 480]")


def _aotinductor(ran: Ran) -> None:
    in_python, in_cpp = ran.printed
    labels = ran.names["labels"][0].numpy()
    assert _printed_counts(in_python) == _counts(labels) and len(_counts(labels)) > 1
    assert _printed_counts(in_cpp) == _counts(labels)
    assert (labels == ran.names["model"].predict(_small_photo())).mean() > SAME
    # Of an image that is smaller than told, or of another size than the file has.
    program = [ran.folder / "build/packaged", "camvid.pt2-package", "photo.rgb"]
    env = {**os.environ, "AOTI_RUNTIME_CHECK_INPUTS": "1"}
    for sides, said in ((("360", "500"), "fewer than"), (("360", "470"), "unmatched dim value")):
        done = subprocess.run(
            [*program, *sides], cwd=ran.folder, env=env, text=True, capture_output=True
        )
        assert done.returncode != 0 and said in done.stderr


def _torchscript(ran: Ran) -> None:
    for what in ("torch.jit.trace", "torch.jit.script"):
        assert f"{what}" in ran.printed[0]
    assert ran.printed[0].count('call deeplab_fast.export(model, "model.onnx")') == 2
    assert "PyTorch deprecates" in PAGE and "RuntimeError" in PAGE


# Sections with code: libraries, what else is needed, what must come out.
SECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None, Callable[[Ran], None]]] = {
    "In five lines": (("onnx", "onnxscript", "onnxruntime"), None, _five_lines),
    "ONNX Runtime with preprocessing of your own": (
        ("onnx", "onnxscript", "onnxruntime"),
        None,
        _onnx_runtime,
    ),
    "OpenVINO": (("onnx", "onnxscript", "openvino"), (), _openvino),
    "torch.export": ((), None, _torch_export),
    "AOTInductor": ((), ("cmake",), _aotinductor),
    "From TorchScript": ((), None, _torchscript),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("section", SECTIONS)
def test_the_code_of_a_section(section, tmp_path, monkeypatch):
    libraries, tools, check = SECTIONS[section]
    for library in libraries:
        pytest.importorskip(library)
    if tools is not None:
        _need_compiler(*tools)
        if "cmake" in tools:
            _need_toolkit()
    monkeypatch.chdir(tmp_path)
    check(_run(section, tmp_path))


def test_all_code_is_run():
    assert {block.section for block in BLOCKS} == set(SECTIONS)
    assert {block.language for block in BLOCKS} == {"python", "sh", "cpp", "cmake"}
    for block in BLOCKS:
        if block.language == "python":
            compile(block.text, block.section, "exec")


def _rows(head: str) -> list[list[str]]:
    """The cells of the table whose first line begins so."""
    lines = PAGE[PAGE.index(head) :].splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_tables_are_those_of_the_package(tmp_path):
    formats = [re.findall(r"`(\.[\w-]+)`", row[0]) for row in _rows("| file | runs in")[2:]]
    assert [names[0] for names in formats] == list(FORMATS)
    assert f"opset {OPSET}" in PAGE and f"are {SMALLEST} pixels or more" in PAGE
    signature = inspect.signature(dlf.export).parameters
    options = {row[0].strip("`"): row[1].strip("`") for row in _rows("| option | default")[2:]}
    shown = {n: repr(p.default).replace("'", '"') for n, p in signature.items()}
    assert options == {n: shown[n] for n in list(signature)[2:]}
    keys = re.findall(r"`(\w+)`", _rows("| key | value")[2][1])
    assert keys == [field.name for field in fields(Description)]
    flags = re.search(r"On the command line these are (.*)\n", PAGE)
    known = parser().format_help()
    assert flags and all(flag in known for flag in re.findall(r"`(--[\w-]+)", flags[1]))


def test_the_table_of_precisions_is_what_export_refuses(tmp_path):
    head, _, *rows = _rows("| precision | `.onnx`")
    for row in rows:
        precision = row[0].strip("`")
        for suffix, cell in zip(head[1:], row[1:], strict=True):
            path = tmp_path / "missing" / f"m{suffix.strip('`')}"
            # The folder is looked for after the precision.
            wanted = FileNotFoundError if cell == "yes" else ValueError
            with pytest.raises(wanted, match=r"no such folder|precision is"):
                dlf.export(nn.Identity(), path, precision=precision)


def test_the_photo_is_turned_as_it_lies():
    """The page's programs read the photo without EXIF, which is predict's reading here."""
    np.testing.assert_array_equal(read_image(PHOTO), np.array(Image.open(PHOTO).convert("RGB")))
