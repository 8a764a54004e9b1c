"""Pictures and tables that a training run leaves: their content, and that they never stop it."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from deeplab_fast import testing

testing.import_torchvision()

import lightning  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402

from deeplab_fast.data.classes import ClassSet  # noqa: E402
from deeplab_fast.data.transforms import resize_pair  # noqa: E402
from deeplab_fast.engine import report  # noqa: E402
from deeplab_fast.engine.callbacks import MetricsFile  # noqa: E402
from deeplab_fast.engine.charts import class_chart, curves_chart  # noqa: E402
from deeplab_fast.engine.datamodule import SegmentationData  # noqa: E402
from deeplab_fast.engine.evaluate import evaluate  # noqa: E402
from deeplab_fast.engine.history import History  # noqa: E402
from deeplab_fast.engine.module import SegmentationModule  # noqa: E402
from deeplab_fast.engine.pictures import batch_image, confusion_image, panel_name  # noqa: E402
from deeplab_fast.engine.report import RunReport  # noqa: E402
from deeplab_fast.engine.sources import open_training  # noqa: E402
from deeplab_fast.engine.train import build_model, fit  # noqa: E402
from deeplab_fast.weights import from_checkpoint  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class Stop(Callback):
    """Ends the training in the middle, or spoils its weights."""

    def __init__(self, step, spoil=False):
        self.step, self.spoil = step, spoil

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step < self.step:
            return
        if not self.spoil:
            raise RuntimeError("stopped")
        with torch.no_grad():
            # One class everywhere, also of averaged weights.
            pl_module.model.classifier[1].bias.copy_(torch.arange(4.0) * 100)


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_resumed_run_has_its_pictures_whole(config, tmp_path):
    config = config.replace(epochs=3, lr=0.3, ema=0.2, export="best", pictures=True)
    config = config.replace(tensorboard=True)
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="stopped"):
        fit(config, callbacks=[Stop(4)], quiet=True)
    # Curves are drawn of what was done.
    assert {"batch.png", "curves.png", "classes.png", "results.csv"} <= {
        path.name for path in folder.iterdir()
    }
    before = pixels(folder / "batch.png")
    told = []
    result = fit(config, callbacks=[Stop(7, spoil=True)], resume=True, tell=told.append)
    assert not any(line.startswith(("no ", "warning: res")) for line in told)
    assert not any(".png" in line or "panels" in line for line in told)
    assert np.array_equal(pixels(folder / "batch.png"), before)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    scores = [row for row in rows if "val/miou" in row]
    losses = [row for row in rows if "train/loss" in row]
    assert len(scores) == 3 and len(losses) == 9
    with open(folder / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"]) for row in table] == [
        (str(n), str(3 * n)) for n in range(1, 4)
    ]
    for i, (row, score) in enumerate(zip(table, scores, strict=True)):
        mean = sum(each["train/loss"] for each in losses[3 * i : 3 * i + 3]) / 3
        assert float(row["train/loss"]) == pytest.approx(mean)
        assert float(row["val/loss"]) == score["val/loss"]
        # Four digits.
        for name in ("miou", "pixel_accuracy"):
            value = float(row[f"val/{name}_percent"])
            assert value == pytest.approx(100 * score[f"val/{name}"], abs=5.1e-5)
        assert float(row["val/iou_percent/blue"]) == pytest.approx(
            100 * score["val/iou/blue"], abs=5.1e-5
        )
    # The matrix and the panels are of what was exported, not of the spoilt last weights.
    assert result.exported_step < 9
    exported = evaluate(from_checkpoint(result.weights), open_training(config), panels=4)
    wanted = confusion_image(
        exported.confusion, exported.classes.classes, f"{result.weights}, tiny_deeplabv3"
    )
    assert np.array_equal(pixels(folder / "confusion.png"), np.asarray(wanted))
    shown = {path.name for path in (folder / "panels").iterdir()}
    assert shown == {panel_name(panel) for panel in exported.panels} and len(shown) == 8
    # Of a finished run too.
    (folder / "curves.png").unlink()
    fit(config.replace(export="last"), resume=True, quiet=True)
    assert (folder / "curves.png").exists()
    # TensorBoard's own reader takes seconds to check what PNGs add up to.
    events = b"".join(path.read_bytes() for path in (folder / "tensorboard").glob("events*"))
    for tag in ("val/loss", "val/miou", "val/iou/red", "confusion", "panels/worst_01"):
        assert tag.encode() in events
    assert (folder / "batch.png").read_bytes() in events


@pytest.fixture
def history(tmp_path):
    """Of two classes, one of which has no IoU at first; in a file that ends in a loss."""

    def written(count, classes):
        lines = []
        for step in range(1, count + 1):
            lines.append({"step": step, "epoch": 0, "train/loss": 1 / step, "lr": 0.1 / step})
            if step % 5 == 0:
                ious = {
                    f"val/iou/{name}": None if name == "none" or (i == 1 and step == 5) else i / 10
                    for i, name in enumerate(classes)
                }
                scores = {
                    "train/mean_loss": 3 / step,
                    "val/loss": 2 / step,
                    "val/miou": 0.5 if step == 5 else 0.4,
                    **ious,
                }
                lines.append({"step": step, "epoch": 0, **scores})
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        found = History(path)
        found.update()
        return found

    return written


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(10, id="means-between-validations"),
        pytest.param(100, id="a-running-mean"),
    ],
)
def test_curves(history, count):
    losses, scores, rates = curves_chart(history(count, ["a"]), "a run").axes
    lines = {line.get_label(): line for line in losses.get_lines()}
    raw, checked = losses.get_lines()[0], lines["validation"]
    np.testing.assert_array_equal(raw.get_xdata(), np.arange(1, count + 1))
    np.testing.assert_allclose(raw.get_ydata(), 1 / np.arange(1, count + 1))
    np.testing.assert_allclose(checked.get_ydata(), 2 / np.arange(5, count + 1, 5))
    if count == 10:
        mean = lines["training (mean since the validation before)"]
        np.testing.assert_allclose(mean.get_ydata(), [3 / 5, 3 / 10])
    else:
        mean = lines["training (mean of 5 logged steps)"].get_ydata()
        # Of steps 8 to 12, and of the first three.
        assert mean[9] == pytest.approx(sum(1 / n for n in range(8, 13)) / 5)
        assert mean[0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    best = {line.get_label(): line for line in scores.get_lines()}
    star = best["best mIoU: 50.00 % at step 5"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (5, 50)
    np.testing.assert_allclose(rates.get_lines()[0].get_ydata(), 0.1 / np.arange(1, count + 1))


def test_curves_before_a_validation(history):
    losses, scores, rates = curves_chart(history(3, ["a"])).axes
    # One value alone is seen too.
    assert rates.get_lines()[0].get_marker() == "."
    assert len(losses.get_lines()) == 1 and losses.get_legend() is None
    assert [text.get_text() for text in scores.texts] == ["no validation yet"]


def test_classes_over_time(history):
    axes = class_chart(history(10, ["a", "__b$__", "none"])).axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    *classes, mark = lines
    # The last IoU, and that of the best validation, which is marked.
    assert classes == [r"b\$  10.0  (-)", "a  0.0  (0.0)"]
    np.testing.assert_array_equal(lines[classes[0]], [math.nan, 10])
    assert list(lines[mark]) == [0, 1] and axes.get_lines()[-1].get_xdata()[0] == 5
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown == classes
    assert axes.get_xlabel() == "step\nin neither labels nor predictions: none"


def test_many_classes_are_a_heat_map(history):
    names = [f"c{i}" for i in range(10)] + ["none"] + [f"d{i}" for i in range(5)]
    axes = class_chart(history(10, names)).axes[0]
    (image,) = axes.get_images()
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert len(labels) == 15 and labels[0] == "d4  150.0" and labels[-1] == "c0  0.0"
    values = image.get_array()
    assert values.shape == (15, 2) and values[0, 1] == 150 and values[-2].mask[0]


def test_lines_that_are_added_are_read_once(history):
    found = history(10, ["a"])
    found.update()
    assert len(found.steps) == 10 and len(found.validations) == 2
    with open(found.path, "a") as file:
        file.write('{"step": 11, "epoch": 1, "train/loss": null, "lr": 0.1}\n')
    found.update()
    assert len(found.steps) == 11 and math.isnan(found.steps[-1]["train/loss"])


def test_a_batch_beside_its_labels():
    classes = ClassSet("c", ("background", "cat"), ((0, 0, 0), (200, 100, 0)), 7)
    images = np.random.default_rng(0).integers(0, 256, (3, 320, 320, 3), np.uint8)
    labels = np.zeros((3, 320, 320), np.uint8)
    labels[:, 100:200], labels[:, 250:] = 1, 7
    picture = np.asarray(batch_image(images, labels, ["a", "b", "c"], classes))
    photo, shown = picture[20:340, :320], picture[20:340, 326:646]
    np.testing.assert_array_equal(photo, images[0])
    # The background is the photo; 154/256 of the cat's colour; ignored pixels are dark.
    np.testing.assert_array_equal(shown[:98], images[0, :98])
    mixed = (images[0, 101:198].astype(int) * 102 + np.array([200, 100, 0]) * 154 + 128) >> 8
    np.testing.assert_array_equal(shown[101:198], mixed)
    assert shown[252:].max() <= 102
    legend = picture[-25:].reshape(-1, 3)
    assert {(200, 100, 0), (0, 0, 0)} <= set(map(tuple, legend.tolist()))
    # The third begins a row of its own.
    second, _ = resize_pair(images[2], labels[2], (320, 320))
    np.testing.assert_array_equal(picture[20 + 340 + 12 : 692, :320], second)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        pytest.param(
            ModuleNotFoundError("No module", name="matplotlib"),
            "no curves.png: matplotlib is missing (pip install matplotlib)",
            id="not-installed",
        ),
        pytest.param(OSError("full"), "warning: curves.png: OSError: full", id="broken"),
    ],
)
def test_a_failed_picture_is_a_line(config, monkeypatch, error, line):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(report, "curves_chart", fail)
    told = []
    result = fit(config.replace(pictures=True), tell=told.append)
    assert result.finished and told.count(line) == 1
    assert not (result.folder / "curves.png").exists()
    assert (result.folder / "classes.png").exists() and (result.folder / "panels").is_dir()


def test_without_pictures_and_in_a_trainer_of_ones_own(config, tmp_path):
    def run(callbacks):
        trainer = lightning.Trainer(
            max_epochs=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            accelerator="cpu",
            callbacks=callbacks,
        )
        data = SegmentationData(config)
        module = SegmentationModule(build_model(config, 4), config, classes=data.train.classes)
        trainer.fit(module, datamodule=data)

    folder = tmp_path / "own"
    run([])
    assert not folder.exists() and not list(tmp_path.rglob("*.png"))
    run([MetricsFile(folder / "metrics.jsonl"), RunReport(folder, pictures=False)])
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "results.csv"}
    run([MetricsFile(folder / "metrics.jsonl"), RunReport(folder)])
    assert {"batch.png", "classes.png", "confusion.png", "curves.png", "panels"} <= {
        path.name for path in folder.iterdir()
    }
