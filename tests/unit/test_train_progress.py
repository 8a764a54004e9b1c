"""What a training run says while it runs."""

import json
import re
from types import SimpleNamespace

import pytest

from deeplab_fast import testing

testing.import_torchvision()

from lightning.pytorch.callbacks import Callback  # noqa: E402

from deeplab_fast.engine import progress  # noqa: E402
from deeplab_fast.engine.train import fit  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class Clock(Callback):
    """Six seconds a step and four a validation batch."""

    def __init__(self):
        self.now, self.losses = 0.0, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now += 6.0

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.now += 4.0


def test_lines_of_steps_and_validations(config, monkeypatch):
    clock, told = Clock(), []
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    config = config.replace(epochs=3, log_every=2, val_every=2)
    result = fit(config, callbacks=[clock], tell=told.append)
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").open()]
    scores = [row["val/miou"] for row in rows if "val/miou" in row]
    shown = [
        re.sub(r"loss [0-9.]+", "loss L", line)
        for line in told
        if line.startswith(("step", "valid"))
    ]
    one, two = (f"{100 * score:.2f} %" for score in scores)
    # Of the step that was done.
    lr = {step: 0.1 * (1 - (step - 1) / 9) ** 0.9 for step in range(1, 10)}
    best = "the best so far" if scores[1] > scores[0] else f"best {one} at step 6"
    assert shown == [
        # Not at 6 s, at 10 s with a multiple of two steps; no validation is known yet. The rate
        # counts from the first step: 4 images in 6 s.
        f"step 2/9, epoch 1/3: loss L, lr {lr[2]:.3g}, 0.7 images/s, 0:00:42 left",
        f"step 4/9, epoch 2/3: loss L, lr {lr[4]:.3g}, 0.7 images/s, 0:00:30 left",
        f"step 6/9, epoch 2/3: loss L, lr {lr[6]:.3g}, 0.7 images/s, 0:00:18 left",
        # Its 12 photos take 48 s.
        "validating: 8/12 batches, 0:00:16 left",
        f"validation at step 6/9, epoch 2/3: loss L, mIoU {one} (the best so far), 48.0 s",
        # 22 s after the line before; one step of 6 s and a validation of 48 s are left.
        f"step 8/9, epoch 3/3: loss L, lr {lr[8]:.3g}, 0.7 images/s, 0:00:54 left",
        "validating: 8/12 batches, 0:00:16 left",
        f"validation at step 9/9, epoch 3/3: loss L, mIoU {two} ({best}), 48.0 s",
        f"step 9/9, epoch 3/3: loss L, lr {lr[9]:.3g}, 0.7 images/s",
    ]
    # The mean of the steps since the line before.
    means = [sum(clock.losses[i - 2 : i]) / 2 for i in (2, 4, 6, 8)]
    lines = [line for line in told if line.startswith("step")]
    said = [float(re.search(r"loss ([0-9.]+)", line)[1]) for line in lines]
    assert said == pytest.approx([*means, clock.losses[8]], abs=5.1e-5)


def test_a_slow_step_has_a_line_of_its_own(config, monkeypatch):
    clock, told = Clock(), []
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 5 * clock.now))
    fit(config.replace(epochs=1, log_every=100, val_every=0), callbacks=[clock], tell=told.append)
    assert [line.split(",")[0] for line in told if line.startswith("step")] == [
        "step 1/3",
        "step 2/3",
        "step 3/3",
    ]


def test_the_bar_shows_the_same_and_validations_stand_above_it(config, capsys):
    fit(config, progress=True)
    captured = capsys.readouterr()
    assert "validation at step 6/6, epoch 2/2: loss" in captured.out
    assert not re.search("^step", captured.out, re.MULTILINE)
    last = captured.err.rstrip().split("\r")[-1]
    assert re.search(
        r"epoch 2/2: 100%.* step 6/6, loss [0-9.]+, lr [0-9.]+, [0-9.]+ images/s, "
        r"val mIoU [0-9.]+ %",
        last,
    )


def test_python_says_the_same_unless_quiet(config, capsys):
    fit(config.replace(output=config.output + "1"))
    printed = capsys.readouterr().out
    assert "6 steps of" in printed and "step 6/6, epoch 2/2: loss" in printed
    fit(config.replace(output=config.output + "2"), quiet=True)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
