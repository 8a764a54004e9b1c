"""Training end to end on tiny data: it learns, it averages, it follows the recipe it was given."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

import deeplab_fast
from deeplab_fast import testing

testing.import_torchvision()

import lightning  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402

from deeplab_fast.data.check import DataError  # noqa: E402
from deeplab_fast.engine import train as engine  # noqa: E402
from deeplab_fast.engine.callbacks import ExponentialAverage  # noqa: E402
from deeplab_fast.engine.config import PRESETS, to_yaml, train_config  # noqa: E402
from deeplab_fast.engine.datamodule import (  # noqa: E402
    SegmentationData,
)
from deeplab_fast.engine.evaluate import evaluate  # noqa: E402
from deeplab_fast.engine.module import SegmentationModule  # noqa: E402
from deeplab_fast.engine.sources import open_training  # noqa: E402
from deeplab_fast.engine.train import build_model, fit, fit_stages  # noqa: E402
from deeplab_fast.models import DeepLabV3  # noqa: E402
from deeplab_fast.weights import from_checkpoint, read_state_dict, save_weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_overfits_four_images(config):
    config = config.replace(
        model_options={"dropout": 0.0, "output_stride": 8},
        crop=[40, 48],
        flip=0.0,
        epochs=80,
        lr=0.2,
        val_every=80,
    )
    four = open_training(config).select(range(4))
    result = fit(config, data=SegmentationData(config, train=four, val=four))
    losses = [row["train/loss"] for row in rows(result.folder) if "train/loss" in row]
    assert len(losses) == 80
    # An untrained model of 4 classes: -log(1/4).
    assert losses[0] == pytest.approx(math.log(4), abs=0.3)
    assert losses[-1] < 0.35 * losses[0]
    # The boundaries between the rectangles are not those of the cells of 8 pixels.
    assert result.miou > 0.75
    assert result.finished and result.steps == 80


def test_a_run_leaves_what_it_takes_to_run_it_again(tiny, config, tmp_path):
    result = fit(config.replace(ema=0.9, check_data=True, eval_output_stride=8))
    folder = result.folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "model.safetensors",
        "result.json",
        "results.csv",
        "versions.json",
    ]
    summary = json.loads((folder / "result.json").read_text())
    assert summary["finished"] and summary["steps"] == 6 and summary["val_miou"] == result.miou
    assert [row["name"] for row in summary["metrics"]["classes"]] == list(tiny.NAMES)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["torch"] == str(torch.__version__)
    assert versions["lightning"] == lightning.__version__
    assert socket.gethostname() not in json.dumps(versions).split('"')
    values = yaml.safe_load((folder / "config.yaml").read_text())
    again = fit(train_config(**{**values, "output": str(tmp_path / "again")}))
    first, second = (read_state_dict(r.weights) for r in (result, again))
    assert same(first, second)
    assert rows(folder) == rows(again.folder)
    model = from_checkpoint(result.weights)
    assert model.classes == tiny.NAMES and model.output_stride == 8
    assert model.atrous_rates == (2, 4)
    # What was logged is what evaluation gives of the saved weights.
    score = evaluate(model, open_training(config)).metrics.miou
    # Lightning logs fp32.
    assert score == result.miou == pytest.approx(rows(folder)[-1]["val/miou"], rel=1e-7)
    # A checkpoint is a file of weights too.
    assert same(first, {k: v.cpu() for k, v in read_state_dict(result.last_checkpoint).items()})


class Rates(Callback):
    """Learning rates and weights of the groups at each step of the optimizer."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})


def test_poly_schedule_in_the_running_trainer(config):
    recorder = Rates()
    config = config.replace(
        epochs=3,
        accumulate=2,
        warmup_steps=2,
        warmup_factor=0.5,
        power=0.9,
        aux_weight=0.4,
        aux_lr_factor=10.0,
        backbone_lr_factor=0.1,
        decay_norm_and_bias=True,
        val_every=0,
    )
    result = fit(config, callbacks=[recorder])
    assert result.miou is None and result.steps == 9
    factors = [0.5, 0.75, *((1 - t / 7) ** 0.9 for t in range(7))]
    assert len(recorder.seen) == 9
    for seen, factor in zip(recorder.seen, factors, strict=True):
        assert seen == pytest.approx(
            {"classifier": 0.1 * factor, "backbone": 0.01 * factor, "aux_classifier": factor}
        )
    logged = [row["lr"] for row in rows(result.folder) if "lr" in row]
    assert logged == pytest.approx([0.1 * factor for factor in factors])


def test_steps_end_in_the_middle_of_an_epoch_with_a_validation(config):
    result = fit(config.replace(epochs=None, steps=4, val_every=5))
    assert result.steps == 4 and result.finished
    last = rows(result.folder)[-1]
    assert "val/miou" in last and last["step"] == 4
    lrs = [row["lr"] for row in rows(result.folder) if "lr" in row]
    assert lrs == pytest.approx([0.1 * (1 - t / 4) ** 0.9 for t in range(4)])


@pytest.mark.parametrize("name", ["strict", "layout", "reset_head", "given"])
def test_model_options_are_the_builders_alone(config, tmp_path, name):
    start = save_weights(build_model(config, 4), tmp_path / "start.safetensors")
    config = config.replace(weights=str(start), model_options={name: False})
    with pytest.raises(ValueError, match=f"model_options do not fit tiny_deeplabv3: .*'{name}'"):
        build_model(config, 4)


def test_averages_begin_anew_with_a_second_fit(config):
    average = ExponentialAverage(0.5)
    ends = []
    for _ in range(2):
        result = fit(config.replace(output=f"{config.output}{len(ends)}"), callbacks=[average])
        ends.append(read_state_dict(result.weights))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    start = build_model(config, 4).state_dict()
    assert not all(torch.equal(value, ends[1][key].to(value)) for key, value in start.items())


def test_two_stages(config, tmp_path):
    config = config.replace(
        eval_output_stride=8,
        output_stride=16,
        # At output stride 16; the second stage must not take them for rates at 8.
        model_options={"atrous_rates": [1, 3]},
    )
    told = []
    one, two = fit_stages(config, stages=2, stage2={"epochs": 1}, tell=told.append)
    assert one.folder.name == "stage1" and two.folder.name == "stage2"
    assert (one.steps, two.steps) == (6, 3)
    plan = yaml.safe_load((two.folder / "config.yaml").read_text())
    assert plan["lr"] == pytest.approx(0.01)
    assert plan["output_stride"] == 8 and plan["freeze_batch_norm"]
    first, second = (read_state_dict(result.weights) for result in (one, two))
    changed = {key for key in first if not torch.equal(first[key], second[key])}
    norms = {
        f"{name}.{leaf}"
        for name, module in from_checkpoint(one.weights).named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for leaf in module.state_dict()
    }
    assert norms and not changed & norms
    # Every weight of a convolution is trained on.
    assert changed == set(first) - norms
    assert from_checkpoint(two.weights).atrous_rates == (2, 6)
    # A finished first stage is passed over.
    before = one.weights.stat().st_mtime_ns
    results = fit_stages(config, stages=2, stage2={"epochs": 1}, resume=True)
    assert [r.folder.name for r in results] == ["stage2"]
    assert one.weights.stat().st_mtime_ns == before


class Frozen(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # What the trainer, or a user, does between epochs.
        pl_module.train()


def test_frozen_batch_norm_and_parts_stay_as_they_are(config):
    config = config.replace(freeze=["backbone.block0"], freeze_backbone_statistics=True)
    start = build_model(config, 4).state_dict()
    start = {key: value.clone() for key, value in start.items()}
    end = read_state_dict(fit(config, callbacks=[Frozen()]).weights)
    kept = {key for key in start if torch.equal(start[key], end[key])}
    expected = {
        key
        for key in start
        if key.startswith("backbone.block0.")
        or (key.startswith("backbone.") and "running" in key)
        or (key.startswith("backbone.") and "num_batches" in key)
    }
    assert expected <= kept
    # Gains and biases of the other batch norms are trained on; no weight is all kept.
    assert not any(key.endswith(".weight") for key in kept - expected)
    with pytest.raises(ValueError, match=r"no part 'backbone\.blck'.*backbone\.block0"):
        SegmentationModule(build_model(config, 4), config.replace(freeze=["backbone.blck"]))


def test_freezing_outlives_the_trainers_sync_batch_norm(config):
    module = SegmentationModule(build_model(config, 4), config.replace(freeze_batch_norm=True))
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    layers = [m for m in module.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert layers and any(layer.train().training for layer in layers)
    module.on_fit_start()
    module.train()
    layers = [m for m in module.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert layers and not any(layer.training for layer in layers)
    assert not any(p.requires_grad for layer in layers for p in layer.parameters())


class Weights(Callback):
    """Copies of all parameters and buffers after each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = pl_module.model.state_dict()
        self.seen.append({key: value.clone() for key, value in state.items()})


def test_averaged_weights_follow_their_formula(config):
    recorder = Weights()
    result = fit(config.replace(ema=0.5, epochs=3), callbacks=[recorder])
    average = recorder.seen[0]
    for n, state in enumerate(recorder.seen[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        for key, value in state.items():
            if value.is_floating_point():
                average[key] = average[key] * decay + value * (1 - decay)
            else:
                average[key] = value
    saved = read_state_dict(result.weights)
    assert saved.keys() == average.keys()
    for key, value in average.items():
        # Eight roundings of fp32, and lerp's other order of them.
        torch.testing.assert_close(saved[key], value, rtol=2e-6, atol=1e-6, msg=key)
    # The weights in training are others, and the checkpoint has both.
    content = torch.load(result.last_checkpoint, weights_only=True)
    live = {k.removeprefix("model."): v for k, v in content["current_model_state"].items()}
    assert same(live, recorder.seen[-1]) and not same(live, saved)


def test_users_own_trainer(config, tmp_path):
    data = SegmentationData(config)
    module = SegmentationModule(build_model(config, 4), config, classes=data.train.classes)
    trainer = lightning.Trainer(
        max_epochs=2,
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        accelerator="cpu",
    )
    trainer.fit(module, datamodule=data)
    # config.steps is not set: the schedule's length is what the trainer estimates.
    assert trainer.global_step == 6
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0
    reference = fit(config)
    assert same(module.model.state_dict(), read_state_dict(reference.weights))
    assert module.metrics.miou == reference.miou
    validated = trainer.validate(module, datamodule=data, verbose=False)
    assert validated[0]["val/miou"] == pytest.approx(reference.miou)


def step_gradients(config, model, batch):
    module = SegmentationModule(model, config)
    images, labels, _ = batch
    module.losses(module.inputs(images), labels)["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_an_unlabelled_batch_changes_nothing(config):
    model = build_model(config, 4)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    labels = torch.full((2, 32, 32), 255, dtype=torch.uint8)
    for kind in ("cross_entropy", "hard_pixels", "dice", "cross_entropy+dice"):
        model.zero_grad()
        grads = step_gradients(config.replace(loss=kind), model, (images, labels, None))
        assert grads and all(not grad.any() for grad in grads.values())


def test_parts_of_a_batch_have_the_gradient_of_the_whole(config):
    # Equal numbers of labelled pixels in each part, and batch norm out of the way: the mean of the
    # parts' means is the mean.
    config = config.replace(
        freeze_batch_norm=True,
        model_options={"dropout": 0.0},
        transform="tiny_training.inner_crop",
        epochs=1,
        val_every=0,
    )
    one, parts_of_two, parts_of_four = (
        read_state_dict(fit(config.replace(accumulate=n, output=f"{config.output}{n}")).weights)
        for n in (1, 2, 4)
    )
    for other in (parts_of_two, parts_of_four):
        for key, value in one.items():
            # Sums of 4096 pixels in another order, 3 steps: 1e-5 is 80 roundings of fp32.
            torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.slow
def test_two_processes_equal_one(tiny, config, tmp_path):
    """DDP over gloo: gradients through the weights, the confusion matrix through exact scores."""
    # The batch norms are frozen (PyTorch has no SyncBatchNorm for CPUs), labels fill the crops.
    config = config.replace(
        freeze_batch_norm=True,
        model_options={"dropout": 0.0},
        transform="tiny_training.inner_crop",
        epochs=2,
        batch_size=12,
        # The first step has learning rate 0: the first validation is of equal weights.
        warmup_steps=1,
        warmup_factor=0.0,
        lr=1.0,
        val_split="odd",
        ema=0.5,
        trainer={"accelerator": "cpu"},
    )
    root = tiny.write_scenes(tmp_path / "scenes")
    # 5 images over 2 processes: one of them has one more.
    tiny.write_scenes(root, 5, split="odd")
    config = config.replace(root=str(root))
    single = fit(config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    plan = tmp_path / "plan.yaml"
    values = config.replace(output=str(tmp_path / "two")).as_dict()
    plan.write_text(to_yaml(values))
    # What torchrun sets.
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, tiny.__file__, "train", "--config", str(plan), "--allow-imports"],
            env={**os.environ, **common, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(2)
    ]
    output = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    mine, theirs = rows(single.folder), rows(tmp_path / "two")
    first, second = (
        [
            {k: v for k, v in row.items() if k.startswith("val/")}
            for row in found
            if "val/miou" in row
        ]
        for found in (mine, theirs)
    )
    assert len(first) == 2 and first[0] == second[0] and first[0]["val/pixel_accuracy"] > 0
    a, b = read_state_dict(single.weights), read_state_dict(tmp_path / "two" / "model.safetensors")
    start = build_model(config, 4).state_dict()
    moved = [key for key in a if not torch.equal(a[key], start[key])]
    assert len(moved) > 8
    for key in moved:
        # The gradient is a mean of 12 * 32 * 32 pixels in fp32, in two halves; 1e-4 of the step is
        # 1000 roundings, an average of the wrong images would be a part in 2.
        step = (a[key] - start[key]).abs().max()
        torch.testing.assert_close(b[key], a[key], rtol=0, atol=float(1e-4 * step), msg=key)
    assert "steps done" in output[0] and "steps done" not in output[1]


def test_class_weights_and_bootstrapping_from_the_data(config):
    config = config.replace(class_weights="median_frequency", bootstrap=["blue", "0"])
    data = SegmentationData(config)
    report = data.counted()
    weights = engine._class_weights(config, data)
    counts = np.array(report.pixels)
    np.testing.assert_allclose(weights, np.median(counts) / counts)
    twice = set(report.images_of[3]) | set(report.images_of[0])
    assert data.bootstrap() == 12 + len(twice)
    assert data.bootstrap() == 12 + len(twice)
    # The weights are of the data as they are.
    assert engine._class_weights(config, data) == weights
    module = SegmentationModule(build_model(config, 4), config, class_weights=weights)
    torch.testing.assert_close(module.loss.class_weights, torch.tensor(weights))
    assert "loss.class_weights" not in module.state_dict()


def test_validation_loss_is_that_of_the_logits_at_full_size(config):
    """Of the trained weights; scores are of the exported, which have class weights taken back."""
    weights = [1.0, 2.0, 4.0, 0.5]
    given = {"class_weights": weights, "undo_class_weights": 0.5, "val_batch_size": 4}
    result = fit(config.replace(epochs=1, ema=0.5, aux_weight=0.4, **given))
    trained = from_checkpoint(result.last_checkpoint, model="tiny_deeplabv3").eval()
    data, losses = open_training(config), []
    for image, label in data:
        x = trained.preprocess(image)
        target = torch.tensor(label).long()[None]
        with torch.no_grad(), deeplab_fast.use_backend("reference"):
            full = trained(x)["out"]
        assert full.shape[-2:] == target.shape[-2:]
        loss = F.cross_entropy(full, target, torch.tensor(weights), ignore_index=255)
        losses.append(float(loss))
    last = rows(result.folder)[-1]
    # Sums of 2000 pixels in fp32 of logits that are 2e-6 from the reference's.
    assert last["val/loss"] == pytest.approx(sum(losses) / 12, rel=1e-5)
    score = evaluate(from_checkpoint(result.weights), data).metrics
    assert score.miou == pytest.approx(result.miou)
    assert evaluate(trained, data).metrics.miou != pytest.approx(result.miou)
    assert {k: v for k, v in last.items() if k.startswith("val/iou/")} == pytest.approx(
        {f"val/iou/{name}": iou for name, iou in zip(score.classes, score.iou, strict=True)}
    )


def test_class_weights_are_taken_back_and_input_size_saved(config):
    """The exported last bias is the trained one less T log w; the checkpoint keeps the trained."""
    weights = [1.0, 2.0, 4.0, 0.0]
    given = {"class_weights": weights, "undo_class_weights": 0.5, "input_size": 24}
    result = fit(config.replace(epochs=1, **given))
    trained = read_state_dict(result.last_checkpoint)["classifier.1.bias"]
    exported = from_checkpoint(result.weights)
    # A class of weight 0 keeps its logit.
    shift = 0.5 * torch.tensor([1.0, 2.0, 4.0, 1.0]).log()
    torch.testing.assert_close(exported.classifier[1].bias, trained - shift, rtol=0, atol=1e-7)
    assert exported.preprocess.size == 24
    assert result.miou is not None


def test_augmentation_is_the_same_with_workers(config):
    config = config.replace(
        scale=[0.5, 2.0], colour_jitter=0.4, hue_jitter=0.1, epochs=1, val_every=0
    )
    plain = fit(config)
    workers = fit(config.replace(workers=1, output=f"{config.output}2"))
    assert same(read_state_dict(plain.weights), read_state_dict(workers.weights))


def test_torchvision_preset_trains_its_auxiliary_head(config):
    values = {**config.as_dict(), "steps": 2, "epochs": None}
    for name in ("lr", "crop"):
        values.pop(name)
    given = {
        **{k: v for k, v in values.items() if k not in PRESETS["torchvision"]},
        "epochs": 1,
        "model": "tiny_deeplabv3",
        "batch_size": 4,
        "base_size": 40,
        "crop": 32,
    }
    given.pop("steps")
    result = fit(train_config("torchvision", **given))
    row = rows(result.folder)[0]
    assert row["train/loss"] == pytest.approx(row["train/main"] + 0.5 * row["train/aux"])
    assert any(key.startswith("aux_classifier.") for key in read_state_dict(result.weights))


class Spoil(Callback):
    """After a step, weights that predict one class everywhere."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step >= self.step:
            last = pl_module.model.classifier[1]
            with torch.no_grad():
                last.weight.zero_()
                last.bias.copy_(torch.arange(4.0))


class Stop(Callback):
    """SIGTERM to itself."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_the_best_weights_and_their_scores_are_exported(config):
    config = config.replace(epochs=6, lr=0.3, export=train_config().export)
    # Interrupted after the best: the checkpoint knows its scores.
    first = fit(config, callbacks=[Stop(16)])
    assert not first.finished and first.exported is None and first.steps == 16
    result = fit(config, callbacks=[Spoil(17)], resume=True)
    scores = [row["val/miou"] for row in rows(result.folder) if "val/miou" in row]
    best = int(np.argmax(scores))
    assert best < 5 and result.exported == "best" and result.exported_step == 3 * (best + 1)
    # The scores that are shown in the end are those of what was exported.
    assert result.metrics.miou == pytest.approx(scores[best])
    assert result.last_metrics.miou == pytest.approx(scores[-1])
    summary = json.loads((result.folder / "result.json").read_text())
    assert summary["metrics"]["miou"] == result.metrics.miou
    assert result.best_miou == pytest.approx(scores[best])
    content = torch.load(result.best_checkpoint, weights_only=True)
    assert content["global_step"] == 3 * (best + 1)
    exported = from_checkpoint(result.weights)
    assert evaluate(exported, open_training(config)).metrics.miou == pytest.approx(scores[best])


def test_mixed_precision(config):
    result = fit(config.replace(trainer={"precision": "bf16-mixed"}))
    assert result.finished and math.isfinite(result.miou)
    assert {v.dtype for v in read_state_dict(result.weights).values()} == {
        torch.float32,
        torch.int64,
    }


@pytest.mark.parametrize(
    "loss",
    ["cross_entropy", "focal", "dice", pytest.param("cross_entropy+dice", id="both")],
)
def test_one_class_learns(tiny, config, tmp_path, loss):
    root = tiny.binary_scenes(tmp_path / "binary", 255)
    config = config.replace(
        root=str(root),
        classes="1",
        label_map="255=1",
        check_data=True,
        model_options={"dropout": 0.0, "output_stride": 8},
        loss=loss,
        aux_weight=0.5 if loss == "focal" else 0.0,
        focal_gamma=1.0,
        crop=[40, 48],
        flip=0.0,
        epochs=30,
        val_every=30,
        lr=0.2,
    )
    result = fit(config)
    # All background: 0.37 to 0.45.
    assert result.miou > 0.7 and result.metrics.classes == ("background", "foreground")
    assert result.metrics.accuracy[1] > 0.5
    model = from_checkpoint(result.weights).eval()
    assert model.num_classes == 1 and model.classes == ("background", "foreground")
    scored = evaluate(model, open_training(config)).metrics
    assert scored.miou == pytest.approx(result.miou)
    assert engine.validate(config.replace(weights=str(result.weights))).miou == pytest.approx(
        result.miou
    )


def test_a_binary_mask_of_255_is_not_trained_on_in_silence(tiny, config, tmp_path):
    root = tiny.binary_scenes(tmp_path / "binary", 255)
    for classes in ("1", "2"):
        bad = config.replace(root=str(root), classes=classes, epochs=1, check_data=True)
        with pytest.raises(DataError, match="--label-map 255=1"):
            fit(bad)
        assert not Path(bad.output).exists()
    # Without the check there is no score of 100.
    told = []
    result = fit(bad.replace(check_data=False, export="best"), tell=told.append)
    assert math.isnan(result.miou) and result.best_miou is None
    assert any(re.search(r"validation at step .* mIoU -, [0-9.]+ s$", line) for line in told)
    assert any("one class only (class 0)" in line for line in told)
    assert "no validation had a mIoU: model.safetensors has the last weights" in told
    assert result.exported == "last" and result.exported_step == result.steps
    assert json.loads((result.folder / "result.json").read_text())["val_miou"] is None


def test_validation_data_of_one_class_are_told_and_have_no_score(tiny, config, tmp_path):
    root = tiny.binary_scenes(tmp_path / "binary", 1)
    train = open_training(config.replace(root=str(root), classes="2"))
    val = open_training(
        config.replace(root=str(tiny.binary_scenes(tmp_path / "empty", 0)), classes="2")
    )
    told = []
    data = SegmentationData(config, train=train, val=val)
    data.check(tell=told.append)
    assert any("every labelled pixel of all masks is 'class 0'" in line for line in told)


def test_class_weights_of_one_class_are_taken_back(tiny, config, tmp_path):
    root = tiny.binary_scenes(tmp_path / "binary", 1)
    config = config.replace(root=str(root), classes="1", epochs=1)
    with pytest.raises(ValueError, match="3 weights for 2 classes"):
        fit(config.replace(class_weights=[1.0, 2.0, 3.0]))
    result = fit(config.replace(class_weights=[0.5, 2.0], undo_class_weights=0.5))
    trained = read_state_dict(result.last_checkpoint)["classifier.1.bias"]
    exported = from_checkpoint(result.weights).classifier[1].bias
    # The logit is the difference of two: less 0.5 (log 2 - log 0.5).
    torch.testing.assert_close(exported, trained - math.log(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("val_batch_size", [1, 4])
def test_validation_without_finite_logits_is_told(config, monkeypatch, val_batch_size):
    original = DeepLabV3.forward_logits

    def spoilt(self, x):
        logits = original(self, x)
        if not self.training:
            logits[0, 2, 0, 0] = math.nan
        return logits

    monkeypatch.setattr(DeepLabV3, "forward_logits", spoilt)
    told = []
    config = config.replace(epochs=1, val_batch_size=val_batch_size)
    result = fit(config, tell=told.append)
    images = 12 // val_batch_size
    # 3 x 3 logits of 40 x 48 pixels: the first reaches one and a half cells, 20 x 24 pixels.
    assert result.metrics.not_finite == images * 20 * 24
    assert result.best_miou is None and result.best_checkpoint is None
    last = rows(result.folder)[-1]
    assert last["val/miou"] is None and last["val/not_finite_pixels"] == images * 20 * 24
    (line,) = [line for line in told if "warning: validation" in line]
    assert "480 pixels of s00" in line and ("of s01" in line) is (val_batch_size == 1)
    assert json.loads((result.folder / "result.json").read_text())["metrics"]["note"]


@pytest.mark.parametrize("check", [True, False])
def test_a_turned_photo_beside_a_mask_that_is_not(tiny, config, tmp_path, check):
    from PIL import Image

    root = tiny.write_scenes(tmp_path / "turned", 4)
    photo, mask = root / "images" / "s02.png", root / "masks" / "s02.png"
    exif = Image.Exif()
    for orientation in (8, 2):
        exif[0x0112] = orientation
        Image.open(photo).save(photo, exif=exif)
        config = config.replace(root=str(root), check_data=check, epochs=1)
        told = []
        if orientation == 8:
            with pytest.raises(ValueError, match=f"{photo} is tagged .* its mask {mask} is not"):
                fit(config)
        else:
            fit(config.replace(output=str(tmp_path / "other")), tell=told.append)
            line = f"{photo} (orientation 2) and {mask} (1)"
            # Training and validation data are the same.
            assert sum(line in each for each in told) == (2 if check else 0)


def test_classes_without_pixels_are_told(config, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\ne\n")
    told = []
    fit(config.replace(classes=str(names), check_data=True, epochs=1), tell=told.append)
    assert told.count("warning: no mask has the class e") == 2
    assert any(re.search(r"mIoU [0-9.]+ % of 4 of 5 classes", line) for line in told)
