"""README.md: its Python runs as it stands there, its commands have the options they name."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deeplab_fast import testing

testing.import_torchvision()

import deeplab_fast as dlf  # noqa: E402
from deeplab_fast import cli  # noqa: E402
from tests.helpers.pages import blocks_of  # noqa: E402

PAGE = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
DEPLOYMENT = (Path(__file__).parents[2] / "DEPLOYMENT.md").read_text("utf-8")
# What stands there too is run by test_deployment_page.
BLOCKS = [b for b in blocks_of(PAGE) if b.language == "python" and b.text not in DEPLOYMENT]


def _photo(path: Path, seed: int, size: tuple[int, int] = (96, 72)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(noise).resize(size).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the snippets name."""
    root = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    for name in ("photo.jpg", "street.jpg", "photos/a.jpg", "photos/b.jpg"):
        _photo(root / name, len(name))
    camvid = dlf.load("camvid")
    dlf.save_weights(camvid, root / "model.safetensors")
    for i in range(10):
        _photo(root / f"data/images/{i}.jpg", i)
        labels = np.random.default_rng(i).integers(0, 3, (72, 96), np.uint8)
        (root / "data/masks").mkdir(exist_ok=True)
        Image.fromarray(labels).save(root / f"data/masks/{i}.png")
    state = dict(dlf.deeplabv3_resnet50(num_classes=21, aux_loss=True).state_dict())
    torch.save(state, root / "checkpoint.pth")
    torch.save({"model": state, "model_ema": state}, root / "run.pth")
    with contextlib.suppress(ImportError):
        import segmentation_models_pytorch as smp

        other = smp.DeepLabV3("resnet18", encoder_weights=None, classes=3)
        torch.save(other.state_dict(), root / "smp_or_mmseg.pth")
        other.save_pretrained(root / "smp_folder")
    return root


def _name(text: str) -> str:
    [*_, last] = [line for line in text.splitlines() if line and not line.startswith("#")]
    return re.sub(r"\W+", "-", last)[:40]


@pytest.mark.slow
@pytest.mark.parametrize("text", [pytest.param(b.text, id=_name(b.text)) for b in BLOCKS])
@pytest.mark.filterwarnings("ignore")
def test_a_snippet_runs_on_its_own(text, folder, monkeypatch):
    needed = re.findall(r"^import (\w+)", text, re.MULTILINE)
    if "smp_" in text:
        needed.append("segmentation_models_pytorch")
    for library in needed:
        pytest.importorskip(library)
    # Lightning is an extra.
    if "train import fit" in text:
        pytest.importorskip("lightning")
        # A run of one epoch on small crops shows what the snippet says as well.
        assert "epochs=30" in text
        text = text.replace("epochs=30", "epochs=1, crop=65, input_size=72")
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"__name__": "snippet"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(text, "README.md", "exec"), names)
    if "labels" in names:
        assert np.asarray(names["labels"]).dtype == np.uint8
    if "result" in names:
        assert names["result"].weights.exists() and "mIoU" in printed.getvalue()


def _commands() -> list[str]:
    """Lines that begin with the command, those that go on joined; without comments."""
    text = re.sub(r"\\\n\s+", "", PAGE)
    found = re.findall(r"^    (deeplab-fast .*)$", text, re.MULTILINE)
    return [line.partition(" #")[0] for line in found if "..." not in line]


def test_commands_name_what_there_is():
    """Every command of the page is taken by its parser."""
    commands = _commands()
    assert len(commands) > 10
    for line in commands:
        _, name, *arguments = shlex.split(line)
        parser = cli.COMMANDS[name].parser()
        # No file is there: a --config would be read.
        if "--config" in arguments:
            at = arguments.index("--config")
            del arguments[at : at + 2]
        parser.parse_args(arguments)
