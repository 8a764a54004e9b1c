"""Interrupted training: the same result as uninterrupted, whole checkpoints, clear messages."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
import traceback
from pathlib import Path

import pytest
import torch

from deeplab_fast import testing

testing.import_torchvision()

import lightning  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from packaging.specifiers import SpecifierSet  # noqa: E402

from deeplab_fast import cli  # noqa: E402
from deeplab_fast.dispatch import files  # noqa: E402
from deeplab_fast.engine import callbacks as parts  # noqa: E402
from deeplab_fast.engine.callbacks import AtomicCheckpointIO, CheckpointNotWritten  # noqa: E402
from deeplab_fast.engine.config import to_yaml, train_config  # noqa: E402
from deeplab_fast.engine.module import NonFiniteLoss  # noqa: E402
from deeplab_fast.engine.train import fit, fit_stages  # noqa: E402
from deeplab_fast.weights import read_state_dict  # noqa: E402
from tests.helpers.fuzz import rows  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plan(tiny, tmp_path_factory):
    """8 steps in 2 epochs of 4, each of 2 parts; every state that a step depends on is in use."""
    root = tiny.write_scenes(tmp_path_factory.mktemp("scenes"), 16)
    return train_config(
        **tiny.recipe(root),
        model_options={"dropout": 0.5},
        scale=[0.5, 2.0],
        colour_jitter=0.3,
        accumulate=2,
        epochs=2,
        lr=0.1,
        ema=0.8,
        log_every=1,
    )


@pytest.fixture(scope="module")
def uninterrupted(plan, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = fit(plan.replace(output=str(folder)))
    assert result.steps == 8
    return result


def state(result):
    """All that a run has come to: weights, averages, optimizer, schedule, lines of metrics."""
    content = torch.load(result.last_checkpoint, weights_only=True)
    kept = ("state_dict", "current_model_state", "averaging_state", "optimizer_states")
    lines = [
        json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()
    ]
    return {
        **{name: content[name] for name in kept},
        "lr": content["lr_schedulers"],
        "step": content["global_step"],
        "best": result.best_miou,
        "weights": read_state_dict(result.weights),
        "best_weights": read_state_dict(result.best_checkpoint),
        "lines": lines,
        "miou": result.miou,
    }


def differences(a, b, path=""):
    """Paths at which two nested values differ, tensors by every bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)}"]
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{path}/{i}")]
    return [] if a == b or (a != a and b != b) else [f"{path}: {a} and {b}"]


class SignalAt(Callback):
    """Signals this process at a micro-batch, or at the start of the first validation."""

    def __init__(self, batch=None, epoch=0, validation=False, signum=signal.SIGTERM):
        self.at, self.validation, self.signum = (epoch, batch), validation, signum

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            os.kill(os.getpid(), self.signum)

    def on_validation_start(self, trainer, pl_module):
        if self.validation:
            os.kill(os.getpid(), self.signum)


@pytest.mark.parametrize(
    ("interruption", "steps"),
    [
        pytest.param({"batch": 2}, 2, id="first part of a step"),
        pytest.param({"batch": 3, "signum": signal.SIGINT}, 2, id="second part, Ctrl+C"),
        pytest.param({"batch": 7}, 4, id="last step of an epoch"),
        pytest.param({"batch": 0, "epoch": 1}, 5, id="first step of the second epoch"),
        pytest.param({"batch": 7, "epoch": 1}, 8, id="last step of all"),
        pytest.param({"validation": True}, 4, id="validation"),
    ],
)
def test_a_signal_saves_and_resuming_changes_nothing(
    plan, uninterrupted, tmp_path, interruption, steps
):
    config = plan.replace(output=str(tmp_path / "run"))
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    result = fit(config, callbacks=[SignalAt(**interruption)])
    name = signal.Signals(interruption.get("signum", signal.SIGTERM)).name
    assert not result.finished and result.stopped == f"stopped by {name}"
    assert result.weights is None and result.steps == steps
    # The handlers are those of before.
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    again = fit(config, resume=True)
    assert again.finished and again.steps == 8
    found = state(again)
    whole = state(uninterrupted)
    if interruption.get("batch") == 7 and interruption.get("epoch") == 1:
        # All was done but writing the weights.
        found["miou"] = whole["miou"]
    assert differences(whole, found) == []


def test_time_is_up_and_more_workers_go_on(plan, uninterrupted, tmp_path):
    config = plan.replace(output=str(tmp_path / "run"), max_time="0.001s")
    steps = []
    for _ in range(10):
        result = fit(config, resume=True)
        steps.append(result.steps)
        # Each time there is a model to look at, and its score.
        assert result.weights.exists() and (result.miou is not None or result.finished)
        if result.finished:
            break
        assert result.stopped == "stopped after 0.001s"
        if len(steps) == 2:
            config = config.replace(workers=1, max_time=None)
    assert steps == [1, 2, 8]
    whole, found = state(uninterrupted), state(result)
    # The validations at the stops are extra ones: their lines were dropped, their best may stay.
    for name in ("best", "best_weights"):
        whole.pop(name), found.pop(name)
    assert differences(whole, found) == []


@pytest.mark.slow
def test_killed_at_any_moment(tiny, plan, uninterrupted, tmp_path):
    config = plan.replace(output=str(tmp_path / "run"), checkpoint_minutes=0.0)
    file = tmp_path / "plan.yaml"
    file.write_text(to_yaml(config.as_dict()))
    process = subprocess.Popen(
        [sys.executable, tiny.__file__, "train", "--config", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 600
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    steps = torch.load(last, weights_only=True)["global_step"]
    assert 1 <= steps < 8
    told = []
    again = fit(config, resume=True, tell=told.append)
    assert any("resuming from" in line for line in told)
    assert not any(line.startswith("warning: from step") for line in told)
    assert differences(state(uninterrupted), state(again)) == []


def in_child(work):
    """Process id of a fork that calls ``work`` and ends."""
    child = os.fork()
    if child:
        return child
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def watch_files(folder, seen):
    """Calls ``seen`` before whatever this process opens, renames or removes in a folder."""

    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod"):
            if str(arguments[0]).startswith(str(folder)):
                seen()

    # It cannot be taken back: for processes that end.
    sys.addaudithook(hook)


def test_killed_again_and_again(plan, uninterrupted, tmp_path):
    """DEEPLAB_FAST_FUZZ=50 kills 50 runs: before a random access to a file of theirs, from the
    first folder to the last rename of model.safetensors, or after a random time."""
    rng = random.Random(0)
    plan = plan.replace(checkpoint_minutes=0.0)
    counted = tmp_path / "counted"

    def whole():
        events = []
        folder = tmp_path / "dry"
        watch_files(folder, lambda: events.append(time.monotonic()))
        begin = time.monotonic()
        fit(plan.replace(output=str(folder)), quiet=True)
        counted.write_text(f"{len(events)} {time.monotonic() - begin}")

    assert os.waitpid(in_child(whole), 0)[1] == 0
    events, seconds = (float(word) for word in counted.read_text().split())
    kills, finished, at = 0, 0, 0
    wanted = rows(3)
    while kills < wanted or at:
        at += 1
        config = plan.replace(output=str(tmp_path / f"run{finished}"))
        left = rng.randrange(int(events)) if rng.random() < 0.6 else None
        if kills >= wanted:
            left = 1 << 30

        def work(config=config, left=left):
            def seen():
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            if left is not None:
                watch_files(Path(config.output), seen)
            fit(config, resume=True, quiet=True)

        child = in_child(work)
        if left is None:
            time.sleep(rng.uniform(0.0, seconds))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            kills += 1
            continue
        assert status == 0
        again = fit(config, resume=True)
        assert again.finished
        assert differences(state(uninterrupted), state(again)) == []
        assert again.weights.read_bytes() == uninterrupted.weights.read_bytes()
        left_over = [path for path in again.folder.rglob("*") if path.name.endswith(".tmp")]
        assert left_over == []
        finished, at = finished + 1, 0
    print(f"{kills} kills, {finished} runs finished")


def test_resumed_with_other_options(plan, tmp_path):
    config = plan.replace(output=str(tmp_path / "run"))
    fit(config, callbacks=[SignalAt(batch=2)])
    told = []
    fit(config.replace(lr=0.05, workers=0, max_time="1h"), resume=True, tell=told.append)
    warnings = [line for line in told if line.startswith("warning: from step ")]
    assert len(warnings) == 1 and "lr 0.1 -> 0.05" in warnings[0]
    assert "max_time" not in warnings[0] and "output" not in warnings[0]


def test_fewer_steps_than_are_done_change_nothing(plan, tmp_path):
    config = plan.replace(output=str(tmp_path / "run"))
    fit(config, callbacks=[SignalAt(batch=1, epoch=1)])
    record = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match="steps is 1 and the run that is resumed is at 5"):
        fit(config.replace(steps=1, epochs=None), resume=True)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == record
    assert fit(config, resume=True).finished


def test_resume_without_and_with_a_strange_checkpoint(plan, tmp_path):
    config = plan.replace(output=str(tmp_path / "run"), epochs=1, val_every=0)
    # Nothing there: it starts, so that a job can be queued with --resume from the first.
    assert fit(config, resume=True).finished
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        fit(config, resume=tmp_path / "nowhere.ckpt")
    strange = tmp_path / "strange.ckpt"
    strange.write_bytes(b"PK no checkpoint")
    with pytest.raises(ValueError, match=r"strange\.ckpt is no checkpoint of a training run"):
        fit(config.replace(output=str(tmp_path / "other")), resume=strange)
    assert not (tmp_path / "other").exists()


def test_second_stage_is_resumed(plan, tmp_path):
    config = plan.replace(output=str(tmp_path / "run"), epochs=1, val_every=0)
    results = fit_stages(config, stages=2, stage2={"epochs": 2})
    other = config.replace(output=str(tmp_path / "other"))
    stopped = fit_stages(other, stages=2, callbacks=[SignalAt(batch=2)])
    assert len(stopped) == 1 and not stopped[0].finished
    # Out of time it leaves weights, and is not finished.
    stopped = fit_stages(other.replace(max_time="0.001s"), stages=2, resume=True)
    assert len(stopped) == 1 and stopped[0].weights.exists() and not stopped[0].finished
    stopped = fit_stages(
        other, stages=2, stage2={"epochs": 2}, resume=True, callbacks=[SignalAt(batch=1, epoch=1)]
    )
    assert [r.finished for r in stopped] == [True, False]
    again = fit_stages(other, stages=2, stage2={"epochs": 2}, resume=True)
    assert [r.finished for r in again] == [True]
    weights = [read_state_dict(r[-1].weights) for r in (results, again)]
    assert differences(*weights) == []


def test_a_full_disk_leaves_the_former_checkpoint(plan, tmp_path, monkeypatch, capsys):
    config = plan.replace(output=str(tmp_path / "run"))
    fit(config, callbacks=[SignalAt(batch=2)])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = last.read_bytes()

    def full(path, mode, **options):
        if ".ckpt" not in str(path):
            return open(path, mode, **options)
        # The name of the file, and a device that is always full.
        Path(path).touch()
        return open("/dev/full", mode)

    monkeypatch.setattr(files, "open", full, raising=False)
    file = tmp_path / "plan.yaml"
    file.write_text(to_yaml(config.as_dict()))
    assert cli.main(["train", "--config", str(file), "--resume"]) == 1
    message = capsys.readouterr().err
    assert "no space left for the checkpoint" in message and "last.ckpt is untouched" in message
    assert last.read_bytes() == content
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
    monkeypatch.undo()
    assert fit(config, resume=True).finished


class Full(Callback):
    def on_train_batch_end(self, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_elsewhere(plan, tmp_path, monkeypatch, capsys):
    file = tmp_path / "plan.yaml"
    file.write_text(to_yaml(plan.replace(output=str(tmp_path / "run")).as_dict()))
    monkeypatch.setattr(parts.MetricsFile, "on_train_batch_end", Full.on_train_batch_end)
    assert cli.main(["train", "--config", str(file)]) == 1
    message = capsys.readouterr().err
    assert "no space left for" in message and "--resume" in message
    assert str(tmp_path / "run") in message


@pytest.mark.parametrize("moment", ["write", "sync", "rename"])
def test_a_checkpoint_is_the_new_or_the_former_one(tmp_path, monkeypatch, moment):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    target = {"write": (torch, "save"), "sync": (os, "fsync"), "rename": (os, "replace")}[moment]
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(
            CheckpointNotWritten, match=r"Input/output error; the former last\.ckpt"
        ):
            AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]
    AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 2}
    # What is no trouble with files is not called so.
    with pytest.raises(AttributeError), monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(AttributeError("other")))
        AtomicCheckpointIO().save_checkpoint({}, path)


class Recorded(Callback):
    def __init__(self):
        self.before = None
        self.after = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = {k: v.clone() for k, v in pl_module.model.named_parameters()}

    def on_exception(self, trainer, pl_module, exception):
        self.after = {k: v.clone() for k, v in pl_module.model.named_parameters()}


def test_a_loss_that_is_nan_stops_with_the_batch_named(plan, tmp_path):
    config = plan.replace(
        output=str(tmp_path / "run"),
        transform="tiny_training.with_nan",
        colour_jitter=0.0,
        aux_weight=0.5,
        checkpoint_minutes=0.0,
    )
    weights = Recorded()
    with pytest.raises(NonFiniteLoss) as caught:
        fit(config, callbacks=[weights])
    message = str(caught.value)
    assert message.startswith("the loss is not finite at epoch 0, step ")
    assert "s05.png" in message and "loss nan, main nan, aux nan" in message
    # Only the part of the step that has it, two of four images.
    assert message.count(".png") == 2
    assert "classifier 0." in message and "aux_classifier" in message
    assert differences(weights.before, weights.after) == []
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    if last.exists():
        content = torch.load(last, weights_only=True)
        tensors = [*content["state_dict"].values(), *content["current_model_state"].values()]
        assert all(t.isfinite().all() for t in tensors)
    assert not (tmp_path / "run" / "model.safetensors").exists()


class Spoilt(Callback):
    """An infinite gradient behind a finite loss."""

    def on_after_backward(self, trainer, pl_module):
        next(pl_module.model.parameters()).grad[0, 0, 0, 0] = float("inf")


def test_a_gradient_that_is_infinite_stops(plan, tmp_path):
    with pytest.raises(NonFiniteLoss, match="the gradient is not finite at epoch 0, step 0") as e:
        fit(plan.replace(output=str(tmp_path / "run")), callbacks=[Spoilt()])
    # Any of the step's images may have caused it.
    assert str(e.value).count(".png") == 4


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_says_what_to_lower(tiny, plan, tmp_path, monkeypatch, capsys, where):
    config = plan.replace(output=str(tmp_path / "run"))
    file = tmp_path / "plan.yaml"
    file.write_text(to_yaml(config.as_dict()))

    def too_much(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            too_much()

    apply = too_much if where == "forward" else Backward.apply
    head = tiny.HEADS["paper"]
    plain = head.forward
    monkeypatch.setattr(head, "forward", lambda self, x: apply(plain(self, x)))
    assert cli.main(["train", "--config", str(file)]) == 1
    message = capsys.readouterr().err
    assert "not enough memory at epoch 0, step 0 for 2 images a pass (crop 32x32" in message
    assert message.count(".png") == 2
    assert "Raise accumulate (now 2" in message and "lower batch_size (now 4)" in message


def test_supported_lightning_is_the_one_that_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = project["optional-dependencies"].values()
    asked = {each for group in groups for each in group if each.startswith("lightning")}
    assert asked == {f"lightning{parts.LIGHTNING_VERSIONS}"}
    assert lightning.__version__ in SpecifierSet(parts.LIGHTNING_VERSIONS)


def test_lightning_without_the_inner_parts_is_refused():
    with pytest.raises(RuntimeError, match=r"_signal_connector.*install lightning>=2\.6,<3"):
        parts._inner_parts(object())
