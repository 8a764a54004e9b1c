"""``deeplab-fast train``: flags, YAML, presets, and what is said when something is missing."""

import importlib.abc
import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from deeplab_fast import cli, testing
from deeplab_fast.cli.train import parser

testing.import_torchvision()

from deeplab_fast.data import check  # noqa: E402
from deeplab_fast.data.datasets import open_dataset  # noqa: E402
from deeplab_fast.engine import train as engine  # noqa: E402
from deeplab_fast.engine.config import TrainConfig, to_yaml  # noqa: E402
from deeplab_fast.engine.datamodule import SegmentationData  # noqa: E402
from deeplab_fast.engine.finite import NotFiniteWarning  # noqa: E402
from deeplab_fast.engine.sources import trained_on  # noqa: E402
from deeplab_fast.models import DeepLabV3  # noqa: E402
from deeplab_fast.weights import from_checkpoint  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def recipe(tiny, scenes, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml({**tiny.recipe(scenes), "epochs": 1}))
    return file


def run(capsys, *arguments):
    status = cli.main(["train", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_flags_go_before_the_file_and_the_file_before_the_preset(capsys, recipe, tmp_path):
    out = tmp_path / "run"
    status, printed, errors = run(
        capsys,
        *("--preset", "paper", "--config", recipe, "--output", out, "--lr", "0.02"),
        *("--model-options.dropout", "0.2", "--model-options.atrous_rates", "[1,3]"),
        *("--crop", "[24,32]", "--trainer.precision", "32-true", "--ema", "0.9"),
        *("--data-options.images", "images", "--trainer.max_epochs", "1"),
    )
    assert status == 2 and "trainer.max_epochs" in errors and printed == ""
    assert not out.exists()
    status, printed, errors = run(
        capsys,
        *("--preset", "paper", "--config", recipe, "--output", out, "--lr", "0.02"),
        *("--model-options.dropout", "0.2", "--model-options.atrous_rates", "[1,3]"),
        *("--crop", "[24,32]", "--trainer.precision", "32-true", "--ema", "0.9"),
        *("--data-options.images", "images"),
    )
    assert status == 0, errors
    assert "mean IoU" in printed and f"3 steps done, the model is {out}" in printed
    plan = yaml.safe_load((out / "config.yaml").read_text())
    # A flag; the file; the preset; the default.
    assert (plan["lr"], plan["epochs"], plan["eval_output_stride"], plan["ema"]) == (
        0.02,
        1,
        8,
        0.9,
    )
    assert (plan["power"], plan["steps"], plan["flip"], plan["seed"]) == (0.9, None, 0.5, 0)
    assert plan["crop"] == [24, 32] and plan["trainer"] == {"precision": "32-true"}
    assert plan["model_options"] == {"dropout": 0.2, "atrous_rates": [1, 3]}
    assert plan["batch_norm_momentum"] == 0.0003
    # The weights are for the other commands.
    root = yaml.safe_load(recipe.read_text())["root"]
    data = ("--data", "folder", "--root", root, "--classes", f"{root}/classes.txt")
    assert cli.main(["eval", "--weights", str(out / "model.safetensors"), *data]) == 0
    assert "mean IoU" in capsys.readouterr().out
    assert from_checkpoint(out / "model.safetensors").atrous_rates == (2, 6)


def test_two_stages_and_their_options(capsys, recipe, tmp_path):
    out = tmp_path / "run"
    stages = ("--stages", "2", "--stage2.epochs", "2", "--output", out)
    status, printed, errors = run(capsys, "--config", recipe, *stages)
    assert status == 0, errors
    assert "6 steps done" in printed
    plan = yaml.safe_load((out / "stage2" / "config.yaml").read_text())
    assert (plan["epochs"], plan["freeze_batch_norm"]) == (2, True)
    status, printed, errors = run(capsys, "--config", recipe, *stages)
    assert status == 2 and "holds a run already" in errors and "--resume" in errors
    assert run(capsys, "--config", recipe, *stages, "--resume")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["--preset", "papr"],
            "--preset is 'papr', expected paper, .*did you mean 'paper'",
            id="preset",
        ),
        pytest.param(["--lr", "0"], "--lr is 0", id="range"),
        pytest.param(["--epochs", "2", "--steps", "2"], "give one of them", id="both lengths"),
        pytest.param(["--model", "resnet"], "--model is 'resnet', expected ", id="model"),
        pytest.param(
            ["--model-options.width", "2"], "--model-options do not fit .*width", id="model option"
        ),
        pytest.param(["--root", "nowhere"], "nowhere is not a folder", id="root"),
        pytest.param(["--split", "trian"], "trian", id="split"),
        pytest.param(["--weights", "nowhere.pth"], r"nowhere\.pth", id="weights"),
        pytest.param(["--transform", "a.b"], r"--transform is a\.b: No module", id="transform"),
        pytest.param(["--backend", "cuba"], "cuba", id="backend"),
        pytest.param(["--batch-size", "13"], "use at most 12", id="batch"),
        pytest.param(["--bootstrap", "[purple]"], "purple", id="class to bootstrap"),
        pytest.param(["--class-weights", "[1,2]"], "2 weights for 4 classes", id="weights count"),
        pytest.param(["--class-weights", "best"], "best", id="weights method"),
        pytest.param(["--loss", "focl"], "--loss is 'focl', .*did you mean 'focal'", id="loss"),
        pytest.param(["--output-stride", "32"], "8 or 16", id="stride"),
        pytest.param(
            ["--trainer.precision", "8-bit"], "--trainer does not fit: .*8-bit", id="trainer"
        ),
    ],
)
def test_bad_arguments_write_nothing(capsys, recipe, tmp_path, arguments, message):
    out = tmp_path / "run"
    status, printed, errors = run(capsys, "--config", recipe, "--output", out, *arguments)
    assert status == 2, printed
    assert errors.startswith("deeplab-fast train: error: ") or "error:" in errors
    assert re.search(message, errors), errors
    assert not out.exists()


def test_what_is_missing(capsys, recipe, tmp_path):
    for left_out, message in (("output", "output is missing"), ("epochs", "epochs or steps")):
        values = yaml.safe_load(recipe.read_text())
        values["output"] = str(tmp_path / "run")
        values.pop(left_out)
        file = tmp_path / f"{left_out}.yaml"
        file.write_text(to_yaml(values))
        status, _, errors = run(capsys, "--config", file)
        assert status == 2 and message in errors
    status, _, errors = run(capsys, "--output", tmp_path / "run", "--epochs", "1")
    assert status == 2 and "data is missing" in errors


class _Raises(importlib.abc.MetaPathFinder):
    def __init__(self, error):
        self.error = error

    def find_spec(self, name, path, target=None):
        if name == "lightning":
            raise self.error
        return None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        pytest.param(
            ModuleNotFoundError("No module named 'lightning'"),
            r"pip install deeplab_fast\[train\]",
            id="missing",
        ),
        pytest.param(
            RuntimeError("operator torchvision::nms does not exist"),
            r"the installed torchvision does not fit PyTorch \d+\.\d+.*pip uninstall torchvision",
            id="torchvision of another build",
        ),
    ],
)
def test_lightning_that_cannot_be_imported(capsys, recipe, tmp_path, monkeypatch, error, message):
    for name in list(sys.modules):
        if name == "lightning" or name.startswith("lightning."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Raises(error), *sys.meta_path])
    status, _, errors = run(capsys, "--config", recipe, "--output", tmp_path / "run")
    assert status == 2
    assert re.search(message, errors), errors
    assert not (tmp_path / "run").exists()
    # Help, and scoring, do without.
    with pytest.raises(engine.TrainingUnavailable):
        engine.import_lightning()
    assert cli.main(["train", "--help"]) == 0
    assert "--batch-size N" in capsys.readouterr().out
    status, printed, errors = run(capsys, "--config", recipe, "--validate-only")
    assert status == 0 and "mean IoU" in printed, errors


def test_an_untrained_model_on_camvid(capsys, shared_data):
    root = shared_data / "camvid"
    status, printed, errors = run(
        capsys,
        *("--validate-only", "--data", "camvid", "--root", root),
        *("--model", "tiny_deeplabv3", "--eval-output-stride", "8"),
    )
    assert status == 0, errors
    lines = dict(line.rsplit(None, 1) for line in printed.splitlines() if line.startswith("mean"))
    # One of 11 classes nearly everywhere.
    assert 0 < float(lines["mean IoU"]) < 20
    assert "road" in printed and "bicyclist" in printed


def test_validation_without_finite_logits_has_a_status(capsys, recipe, tmp_path, monkeypatch):
    original = DeepLabV3.forward_logits

    def spoilt(self, x):
        logits = original(self, x)
        return logits if self.training else logits * float("nan")

    monkeypatch.setattr(DeepLabV3, "forward_logits", spoilt)
    status, printed, _ = run(capsys, "--config", recipe, "--output", tmp_path / "run")
    assert status == 1 and "NaN or infinite: these are the scores of a broken run" in printed
    with pytest.warns(NotFiniteWarning):
        status, printed, _ = run(capsys, "--config", recipe, "--validate-only")
    assert status == 1 and "NaN or infinite" in printed


def test_every_option_has_help():
    import dataclasses

    from deeplab_fast.engine.config import TrainConfig

    text = parser().format_help()
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"], field.name
        assert f"--{field.name.replace('_', '-')}" in text


def test_the_example_of_data_options_is_one_for_a_shell():
    field = TrainConfig.__dataclass_fields__["data_options"]
    flag, value = shlex.split(field.metadata["help"].partition(": ")[2])
    assert flag == "--data-options.sequences" and yaml.safe_load(value) == ["0016E5"]


@pytest.fixture
def plain(tiny, tmp_path):
    """Flags of a run on a folder without parts, whose files have their present form for long."""
    root = tiny.write_scenes(tmp_path / "plain", 10)
    for path in root.rglob("*.png"):
        os.utime(path, (1e9, 1e9))
    flags = ("--data", "folder", "--root", root, "--classes", "grey,red,green,blue")
    own = ("--model", "tiny_deeplabv3", "--crop", "32", "--batch-size", "4", "--tensorboard=false")
    return flags, (*flags, *own, "--epochs", "1")


def test_a_folder_without_parts(capsys, plain, tmp_path):
    flags, recipe = plain
    out = tmp_path / "run"
    status, printed, errors = run(capsys, *recipe, "--output", out)
    assert status == 0, errors
    assert "2 of 10 pairs are for validation, chosen by name (--val-fraction 0.2" in printed
    assert (
        "2 steps of 4 images, 2 an epoch" in printed and "checking plain(8 samples, tr" in printed
    )
    rows = (out / "split.csv").read_text().splitlines()
    kept = {row.split(",")[0] for row in rows if row.endswith(",val")}
    assert rows[0] == "image,mask,split" and len(rows) == 11 and len(kept) == 2
    # What eval scores are the same two images, by the options and by the table.
    for source in (flags, ("--data", out / "split.csv")):
        results = tmp_path / f"results{len(source)}"
        arguments = ["eval", *source, "--split", "val", "--weights", out / "model.safetensors"]
        assert cli.main([*map(str, arguments), "--output", str(results)]) == 0
        images = json.loads((results / "metrics.json").read_text())["images"]
        assert {image["name"].split("/")[-1].removesuffix(".png") for image in images} == {
            path.split("/")[-1].removesuffix(".png") for path in kept
        }
    # The classes are those of the weights.
    assert "grey" in capsys.readouterr().out
    # Without a split it says what the weights have seen.
    assert cli.main(["eval", *map(str, flags), "--weights", str(out / "model.safetensors")]) == 0
    told = capsys.readouterr().err
    assert "were trained on 8 of the 10 images" in told
    assert f"--data {out / 'split.csv'} --split val" in told
    # So it does for a checkpoint of the run, and where a link leads to the data.
    link = tmp_path / "link"
    link.symlink_to(flags[3])
    linked = open_dataset("folder", link, classes=4)
    for weights in (out, out / "checkpoints" / "last.ckpt"):
        assert trained_on(weights, linked) == (8, out / "split.csv")


def test_what_weights_have_seen_in_two_stages(tiny, tmp_path):
    data = open_dataset("folder", tiny.write_scenes(tmp_path / "data", 4), classes=4)
    run = tmp_path / "run" / "stage2"
    run.mkdir(parents=True)
    (run / "model.safetensors").touch()
    # The data's own table above the weights is none of the run's.
    table = "image,mask,split\n" + "".join(f"{s.image},{s.mask},train\n" for s in data.samples)
    (tmp_path / "split.csv").write_text(table)
    assert trained_on(run.parent, data)[0] == 0
    (run / "split.csv").write_text(table)
    assert trained_on(run.parent, data) == (4, run / "split.csv")


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        pytest.param({"split": "all", "val_split": "all"}, ("10 of 10 images",), id="on purpose"),
        pytest.param({"split": "all"}, ("2 of 10 pairs", "2 of 2 images"), id="all beside val"),
        pytest.param({}, ("2 of 10 pairs",), id="two parts"),
        pytest.param({"val_every": 0}, (), id="no validation"),
        pytest.param({"val_root": "other"}, (), id="another root"),
        pytest.param({"val_root": "./plain"}, ("2 of 10 pairs",), id="the same root"),
        pytest.param(
            {"val_data": "folder", "val_root": "link"}, ("10 of 10 images",), id="the same data"
        ),
    ],
)
def test_photos_that_are_trained_and_validated_on(tiny, tmp_path, monkeypatch, options, notes):
    monkeypatch.chdir(tmp_path)
    tiny.write_scenes("plain", 10)
    tiny.write_scenes("other", 3)
    Path("link").symlink_to("plain")
    config = TrainConfig(data="folder", root="plain", classes=list("abcd"), **options)
    data = SegmentationData(config)
    assert len(data.notes) == len(notes), data.notes
    for note, start in zip(data.notes, notes, strict=True):
        shared = "images" in start
        assert re.match(f"warning: {start}" if shared else f"plain has no .*{start}", note), note
    if options.get("val_root") == "other":
        assert (len(data.train), len(data.val)) == (10, 3)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"root": "plain", "data_options": {"split_seed": 5}}, id="two seeds"),
        pytest.param({"data": "pairs.csv"}, id="listed twice"),
    ],
)
def test_parts_of_the_same_pairs_that_overlap(tiny, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    files = [path.name for path in (tiny.write_scenes("plain", 10) / "images").iterdir()]
    rows = [f"{dot}plain/images/{f},plain/masks/{f}" for f in files for dot in ("", "./")]
    Path("pairs.csv").write_text("\n".join(["image,mask", *rows]))
    given = {"data": "folder", "classes": list("abcd"), **options}
    with pytest.raises(ValueError, match=r"trained on as well.*--split-seed.*list each photo once"):
        SegmentationData(TrainConfig(**given))


def test_a_check_that_passed_is_remembered(capsys, plain, tmp_path, monkeypatch):
    _, recipe = plain
    assert run(capsys, *recipe, "--output", tmp_path / "one")[0] == 0

    def never(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(check, "read_sample", never)
    # Class weights are of the same counts.
    again = (*recipe, "--output", tmp_path / "two", "--class-weights", "inverse_log")
    status, printed, errors = run(capsys, *again)
    assert status == 0, errors
    assert "plain(8 samples, train, 4 classes): unchanged since the check" in printed
    with pytest.raises(AssertionError, match="read again"):
        run(capsys, *again[:-3], tmp_path / "three", "--recheck", "true")


def test_weights_of_one_logit_name_one_class(capsys, tiny, tmp_path):
    root = tiny.binary_scenes(tmp_path / "binary", 1)
    data = ("--data", "folder", "--root", root)
    own = ("--model", "tiny_deeplabv3", "--crop", "32", "--batch-size", "4", "--epochs", "1")
    one, two = tmp_path / "one", tmp_path / "two"
    status, _, errors = run(capsys, *data, *own, "--classes", "crack,", "--output", one)
    assert status == 0, errors
    weights = ("--weights", one / "model.safetensors")
    status, _, errors = run(capsys, *data, *own, *weights, "--output", two)
    # Its head is kept: the data have one class again.
    assert status == 0 and from_checkpoint(two / "model.safetensors").num_classes == 1, errors
    assert cli.main(["eval", *map(str, (*data, "--split", "val", *weights))]) == 0
    assert "crack" in capsys.readouterr().out


def test_no_validation_by_a_fraction_of_0(capsys, plain, tmp_path):
    _, recipe = plain
    flags = (*recipe, "--val-fraction", "0")
    status, printed, errors = run(capsys, *flags, "--output", tmp_path / "run")
    assert status == 0 and "mean IoU" not in printed, errors
    assert not (tmp_path / "run" / "split.csv").exists()
    status, _, errors = run(capsys, *flags, "--validate-only")
    assert status == 2 and "give --val-fraction above 0 or --val-data" in errors


def test_images_that_change_sides_on_resume_are_told(capsys, plain, tiny, tmp_path):
    _, recipe = plain
    out = tmp_path / "run"
    assert run(capsys, *recipe, "--output", out)[0] == 0
    recipe = recipe[:-1]
    status, printed, errors = run(
        capsys, *recipe, "2", "--output", out, "--resume", "--split-seed", "3"
    )
    assert status == 0, errors
    assert "images changed sides between training and validation since the run began" in printed


def test_problems_of_both_parts_are_told_at_once(capsys, plain, tmp_path):
    _, recipe = plain
    for path in (tmp_path / "plain" / "masks").iterdir():
        Image.fromarray(np.resize(np.array([0, 1, 2, 3, 11], np.uint8), (40, 48))).save(path)
    status, _, errors = run(capsys, *recipe, "--output", tmp_path / "run")
    assert status == 2 and not (tmp_path / "run").exists()
    lines = errors.splitlines()
    assert "8 problems in 8 of 8 samples" in lines[0] and "2 problems in 2 of 2" in lines[2]
    assert lines[1].startswith("  8 masks: label 11 (3072 pixels), outside the classes 0..3")
    assert [line for line in lines if "--ignore-index 11" in line] == [lines[4]]
