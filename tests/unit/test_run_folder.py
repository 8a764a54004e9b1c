"""The folder of a run: what killed runs left, what became damaged, gone, read-only or full."""

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deeplab_fast import testing
from deeplab_fast.dispatch.files import remove_left, write_atomically

testing.import_torchvision()

from lightning.pytorch import Callback  # noqa: E402

from deeplab_fast.engine.callbacks import CheckpointNotWritten  # noqa: E402
from deeplab_fast.engine.config import TrainConfig  # noqa: E402
from deeplab_fast.engine.history import History, row_of  # noqa: E402
from deeplab_fast.engine.run_folder import (  # noqa: E402
    FolderWatch,
    RunFolderError,
    read_stages,
    run_config,
)
from deeplab_fast.engine.train import fit  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tiny, scenes, tmp_path):
    return TrainConfig(**tiny.recipe(scenes), epochs=2, output=str(tmp_path / "run"), log_every=1)


@pytest.fixture
def done(config):
    """A finished run's folder."""
    return fit(config, quiet=True).folder


def ended_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def temporary(folder, pid, age=10.0):
    path = folder / f".last.ckpt.{pid}.tmp"
    path.write_bytes(b"x" * 100)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_temporary_files_of_killed_runs_are_removed(tmp_path):
    gone = temporary(tmp_path, ended_pid())
    ours = temporary(tmp_path, os.getpid())
    alive = temporary(tmp_path, os.getppid())
    (tmp_path / "later").mkdir()
    later = temporary(tmp_path / "later", gone.name.split(".")[-2], age=-10)
    others = [tmp_path / name for name in (".last.ckpt.tmp", "last.ckpt.1.tmp", ".a.b.tmp")]
    for path in others:
        path.touch()
    now = time.time()
    assert remove_left(tmp_path, now) == 200
    assert not gone.exists() and not ours.exists()
    assert alive.exists() and all(path.exists() for path in others)
    # Written since: by another machine on a shared disk.
    assert remove_left(tmp_path / "later", now) == 0 and later.exists()
    assert remove_left(tmp_path / "none", now) == 0


def test_a_locked_temporary_file_is_in_use(tmp_path):
    path = temporary(tmp_path, ended_pid())
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert remove_left(tmp_path, time.time()) == 0 and path.exists()
    assert remove_left(tmp_path, time.time()) == 100


def test_what_is_being_written_is_locked(tmp_path):
    def write(file):
        file.write(b"x")
        code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        other = subprocess.run([sys.executable, "-c", code, file.name], stderr=subprocess.DEVNULL)
        assert other.returncode != 0

    write_atomically([(tmp_path / "a", write)])
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_resumed_run_clears_its_folder(config, done):
    left = temporary(done / "checkpoints", ended_pid())
    lines = []
    result = fit(config, resume=True, tell=lines.append)
    assert result.finished and result.best_miou is not None
    assert f"the run in {done} is finished, 6 steps" in lines[0]
    assert not left.exists()
    left = temporary(done, ended_pid())
    fit(config.replace(epochs=3), resume=True, quiet=True)
    assert not left.exists()
    assert not [path for path in done.rglob(".*.tmp")]


class At(Callback):
    """Does something at the end of a step, the second if not told another."""

    def __init__(self, do, step=2):
        self.do, self.step = do, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.do()


def test_a_folder_that_vanishes_ends_the_run(config, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(RunFolderError, match=rf"{folder}, is gone: it was moved, removed or"):
        fit(config, quiet=True, callbacks=[At(lambda: shutil.rmtree(folder))])
    assert not folder.exists()


def test_another_inode_ends_no_run(config, tmp_path):
    """As on file systems that make inodes up, or mount a disk anew."""
    folder, copy = tmp_path / "run", tmp_path / "copy"
    inodes = [0, 0]

    def other():
        shutil.copytree(folder, copy)
        inodes[0] = folder.stat().st_ino
        folder.rename(tmp_path / "former")
        copy.rename(folder)
        inodes[1] = folder.stat().st_ino

    result = fit(config.replace(log_every=1000), quiet=True, callbacks=[At(other)])
    assert inodes[0] != inodes[1]
    assert result.finished and (folder / "model.safetensors").exists()


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_folder_that_is_not_known_to_be_gone(tmp_path, monkeypatch, code):
    """The write itself tells, where there is something to tell."""
    watch = FolderWatch(tmp_path)

    def fails(path, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "stat", fails)
    watch.check()


def test_a_folder_is_its_own_while_one_of_its_files_is_left(tmp_path):
    names = ("config.yaml", "versions.json")
    for name in names:
        (tmp_path / name).touch()
    watch, without = FolderWatch(tmp_path), FolderWatch(tmp_path.parent)
    for name in names:
        watch.check()
        (tmp_path / name).unlink()
    with pytest.raises(RunFolderError, match="is gone"):
        watch.check()
    # One that had none of them, as under a trainer of one's own.
    without.check()


def test_another_folder_of_its_name_is_not_written_to(config, tmp_path):
    folder = tmp_path / "run"

    def moved():
        folder.rename(tmp_path / "moved")
        folder.mkdir()

    with pytest.raises(RunFolderError, match="is gone"):
        fit(config.replace(log_every=1000), quiet=True, callbacks=[At(moved)])
    assert not list(folder.glob("checkpoints/*"))


def test_a_full_disk_ends_the_run_with_its_checkpoint(config, tmp_path):
    """A limit on the length of files stands for the disk's end."""
    config = config.replace(checkpoint_minutes=0.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    try:
        with pytest.raises(
            CheckpointNotWritten, match=r"no space left .* the former last\.ckpt is"
        ):
            fit(config, quiet=True, callbacks=[At(full)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "run").rglob(".*.tmp"))
    assert fit(config, resume=True, quiet=True).finished


def damage(done, name, content):
    path = done / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if content is None else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("config.yaml", b"", "is no config of a training run", id="config, empty"),
        pytest.param("config.yaml", b"\0" * 64, "zero byte at 0", id="config, zeros"),
        pytest.param("config.yaml", b"lr: [1]", "lr is .1., expected a number", id="config, kind"),
        pytest.param("config.yaml", b"1: 2", "expected lines of option", id="config, keys"),
        pytest.param("stages.yaml", b"", "second stage has of its own, is damaged", id="stages"),
    ],
)
def test_damaged_records_are_named(done, name, content, message):
    (done / name).touch()
    path = damage(done, name, content)
    with pytest.raises(ValueError, match=message) as caught:
        (run_config if name == "config.yaml" else read_stages)(done)
    assert str(path) in str(caught.value) and "again" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"[1]", b'{"finished": 1}', None])
def test_a_damaged_result_is_made_anew(config, done, content):
    path = damage(done, "result.json", content)
    assert fit(config, resume=True, quiet=True).finished
    assert json.loads(path.read_text())["finished"] is True


def test_damaged_lines_of_metrics_are_left_out(config, done):
    path = done / "metrics.jsonl"
    lines = path.read_text().splitlines()
    whole = [json.loads(line) for line in lines]
    path.write_bytes("\n".join([lines[0], "\0" * 40, *lines[2:-1], lines[-1][:9]]).encode())
    history = History(path)
    history.update()
    assert len(history.steps) + len(history.validations) == len(lines) - 2
    fit(config.replace(epochs=3), resume=True, quiet=True)
    after = [json.loads(line) for line in path.read_text().splitlines()]
    assert after[: len(lines) - 2] == [whole[0], *whole[2:-1]]


@pytest.mark.parametrize(
    "line", ["", "[1]", '{"step": 1}', '{"step": null, "epoch": 0}', "{}", "["]
)
def test_what_is_no_line_of_metrics(line):
    assert row_of(line) is None


def test_a_damaged_checkpoint_is_named_and_the_other_offered(config, done):
    last = damage(done, "checkpoints/last.ckpt", None)
    more = config.replace(epochs=3)
    with pytest.raises(ValueError, match="is no checkpoint of a training run") as caught:
        fit(more, resume=True, quiet=True)
    best = last.with_name("best.ckpt")
    assert f"{best} is whole, of step " in str(caught.value)
    shutil.copy(best, last)
    assert fit(more, resume=True, quiet=True).finished
    damage(done, "checkpoints/best.ckpt", None)
    with pytest.raises(ValueError, match=r"best\.ckpt is damaged .*; remove it"):
        fit(config.replace(epochs=4), resume=True, quiet=True)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda c: c["state_dict"].popitem(), id="a tensor is missing"),
        pytest.param(lambda c: c.update(callbacks={"x": 1}, optimizer_states=[]), id="optimizer"),
        pytest.param(lambda c: c.pop("train_config"), id="no options"),
        pytest.param(lambda c: c.update(global_step="x"), id="a step that is a text"),
        pytest.param(lambda c: c.update(loops={"fit_loop": 3}), id="loops"),
        pytest.param(lambda c: c.pop("pytorch-lightning_version"), id="no version"),
        pytest.param(lambda c: c.update(train_config={"lr": torch.ones(1)}), id="tensor options"),
    ],
)
def test_a_checkpoint_of_other_content_is_refused(config, done, change):
    last = done / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    change(content)
    torch.save(content, last)
    with pytest.raises(ValueError, match=r"last\.ckpt") as caught:
        fit(config.replace(epochs=3), resume=True, quiet=True)
    assert "\n" not in str(caught.value)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_runs_nothing(config, done, tmp_path):
    last = done / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    torch.save({**content, "more": Payload(tmp_path / "RAN")}, last)
    with pytest.raises(ValueError, match="is no checkpoint of a training run"):
        fit(config.replace(epochs=3), resume=True, quiet=True)
    assert not (tmp_path / "RAN").exists()


def test_a_run_that_went_on_is_not_finished_by_its_former_end(config, done):
    """Also where it was killed before the end that its config now asks for."""

    def dies():
        raise SystemExit("killed")

    more = config.replace(epochs=3)
    with pytest.raises(SystemExit):
        fit(more, resume=True, quiet=True, callbacks=[At(dies, step=7)])
    assert run_config(done).epochs == 3
    result = fit(more, resume=True, quiet=True)
    assert result.finished and result.steps == 9


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_answer():
    return OSError(errno.EIO, os.strerror(errno.EIO), "last.ckpt")


def wrapped(cause):
    error = ValueError("cannot be read")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(out_of_memory(), id="of the GPU"),
        pytest.param(MemoryError("of the host"), id="of the host"),
        pytest.param(no_answer(), id="disk"),
        pytest.param(wrapped(no_answer()), id="cause"),
    ],
)
def test_what_a_checkpoint_is_not_to_blame_for(config, done, monkeypatch, error):
    """Where it is read, restored, and where the best one is: the error stays what it is."""
    from lightning.pytorch import LightningModule

    from deeplab_fast.engine import callbacks, run_folder

    def fails(*arguments, **options):
        raise error

    more = config.replace(epochs=3)
    places = [
        (run_folder, "read_content"),
        (callbacks.AtomicCheckpointIO, "load_checkpoint"),
        (LightningModule, "load_state_dict"),
    ]
    for owner, name in places:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(type(error)) as caught:
                fit(more, resume=True, quiet=True)
        assert caught.value is error, name
    # One of its content stays told of.
    with monkeypatch.context() as patch:
        patch.setattr(LightningModule, "load_state_dict", lambda *given, **options: {}["gone"])
        with pytest.raises(ValueError, match=r"does not fit the run .*damaged, or of another run"):
            fit(more, resume=True, quiet=True)
    assert fit(more, resume=True, quiet=True).finished


def test_the_best_checkpoint_is_not_told_to_be_removed(config, done, monkeypatch):
    from deeplab_fast.engine import callbacks

    read, error = callbacks.read_content, no_answer()

    def fails(path):
        if Path(path).name == "best.ckpt":
            raise error
        return read(path)

    monkeypatch.setattr(callbacks, "read_content", fails)
    with pytest.raises(OSError) as caught:
        fit(config.replace(epochs=3), resume=True, quiet=True)
    assert caught.value is error


def test_records_that_cannot_be_read_are_not_damaged(done, monkeypatch):
    from deeplab_fast.engine import run_folder

    error = no_answer()

    def fails(path):
        raise error

    (done / "stages.yaml").touch()
    monkeypatch.setattr(run_folder, "read_document", fails)
    for read in (run_config, read_stages):
        with pytest.raises(OSError) as caught:
            read(done)
        assert caught.value is error
    monkeypatch.undo()
    assert read_stages(done / "config.yaml") is None


def test_out_of_memory_is_one_line_of_the_command(config, done, monkeypatch, capsys):
    from lightning.pytorch import LightningModule

    from deeplab_fast import cli

    def fails(*arguments, **options):
        raise out_of_memory()

    monkeypatch.setattr(LightningModule, "load_state_dict", fails)
    assert cli.main(["train", "--resume", "--output", str(done), "--epochs", "3"]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("deeplab-fast train: ") and "CUDA out of memory" in told
