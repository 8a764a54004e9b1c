"""What a training run adds to Lightning: checkpoints, stops, averaged weights, logs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from deeplab_fast._documents import shown
from deeplab_fast.dispatch.files import is_full, write_atomically
from deeplab_fast.engine.averaging import ExponentialAverage
from deeplab_fast.engine.history import row_of
from deeplab_fast.engine.metrics import ImageScore
from deeplab_fast.engine.run_folder import FolderWatch, RunFolderError, is_no_fault_of_content
from deeplab_fast.weights import read_content

if TYPE_CHECKING:
    from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
    from lightning.pytorch.utilities.types import STEP_OUTPUT

    from deeplab_fast.engine.module import SegmentationModule

__all__ = [
    "LIGHTNING_VERSIONS",
    "AtomicCheckpointIO",
    "CheckpointNotWritten",
    "EarlyStop",
    "ExponentialAverage",
    "MetricsFile",
    "RunCheckpoint",
    "Stopped",
]


LIGHTNING_VERSIONS = ">=2.6,<3"


class CheckpointNotWritten(RunFolderError):
    """A checkpoint could not be written; the former one is whole."""


class Stopped(Exception):
    """Training was asked to stop by a signal; the checkpoint is written."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under another name, to the disk, and then gives it its own; reads it as
    data.

    At any moment, also after a power cut, the file of that name is a whole checkpoint: the new or
    the former one.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: object = None,
    ) -> None:
        """Writes it.

        Raises:
            CheckpointNotWritten: no space, no permission; the file that was there is untouched.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically([(path, lambda file: torch.save(checkpoint, file))], durable=True)
        # torch's writer turns an OSError of the file into a RuntimeError.
        except (OSError, RuntimeError) as error:
            cause = _os_error(error)
            if cause is None:
                raise
            raise CheckpointNotWritten(cause.errno, _why_not_written(path, cause)) from error

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: object = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads it as data (`weights.read_content`), on the CPU; errors as that has them."""
        content: dict[str, Any] = read_content(path)
        return content


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _why_not_written(path: Path, error: OSError) -> str:
    former = f"the former {path.name} is untouched" if path.exists() else "there is no former one"
    if is_full(error):
        return (
            f"no space left for the checkpoint {path}; {former}. Make room, then go on with "
            "--resume"
        )
    return f"the checkpoint {path} cannot be written: {error.strerror or error}; {former}"


class EarlyStop(EarlyStopping):
    """Ends a run after ``patience`` validations in a row without a better mIoU.

    A mIoU that is nan, of logits that are not finite, is no better one and no end. A resumed run
    counts on, with the patience that is given now.
    """

    def __init__(self, patience: int) -> None:
        super().__init__("val/miou", mode="max", patience=patience, check_finite=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})


class RunCheckpoint(Checkpoint):
    """``last.ckpt`` and ``best.ckpt`` of a run, and its stops: signals, wall time, steps.

    ``last.ckpt`` is written between two steps of the optimizer: every ``minutes``, before a stop,
    at the end, and one step before a validation and after each epoch unless writing took more than
    a twentieth of the time since. A run that goes on from it gives what it would have given without
    the interruption. ``best.ckpt`` is written after a validation with a higher ``monitor`` than
    ever.

    SIGTERM and SIGINT stop the run at the end of the step with :class:`Stopped`, in validation at
    once; a second SIGINT interrupts.

    Args:
        folder: for the two files.
        minutes: wall time between checkpoints within an epoch.
        max_seconds: wall time of this call of ``fit`` after which it is stopped and validated.
        max_steps: steps of the optimizer in all, after which it is stopped and validated.
        monitor: name of a logged metric, larger is better.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        minutes: float = 10.0,
        max_seconds: float | None = None,
        max_steps: int | None = None,
        monitor: str = "val/miou",
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.minutes = minutes
        self.max_seconds = max_seconds
        self.max_steps = max_steps
        self.monitor = monitor
        self.best_score: float | None = None
        self.best_step: int | None = None
        # Counts [C, C] and images of the best validation of a SegmentationModule.
        self.best_confusion: Tensor | None = None
        self.best_images: tuple[ImageScore, ...] = ()
        # Of the last one, for a run that is resumed at its end.
        self.last_confusion: Tensor | None = None
        self.out_of_time = False
        self._watch: FolderWatch | None = None
        self._signal: int | None = None
        self._started = self._saved = self._cost = 0.0
        self._handlers: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    @property
    def last_path(self) -> Path:
        """Where ``last.ckpt`` lies."""
        return self.folder / "last.ckpt"

    @property
    def best_path(self) -> Path:
        """Where ``best.ckpt`` lies."""
        return self.folder / "best.ckpt"

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_score": self.best_score,
            "best_step": self.best_step,
            "best_confusion": self.best_confusion,
            "best_images": [dataclasses.astuple(image) for image in self.best_images],
            "last_confusion": self.last_confusion,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]
        # Absent from checkpoints of former versions.
        self.best_confusion = state_dict.get("best_confusion")
        self.best_images = tuple(ImageScore(*row) for row in state_dict.get("best_images", ()))
        self.last_confusion = state_dict.get("last_confusion")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = self._saved = time.monotonic()
        self.out_of_time = False
        # Where there is none yet the first checkpoint makes it.
        home = self.folder.parent
        self._watch = FolderWatch(home) if home.is_dir() else None
        # One that came since Lightning took over, which would act in the middle of a step.
        self._signal = signal.SIGTERM if trainer.received_sigterm else None
        signals, environment = _inner_parts(trainer)
        signals.received_sigterm = False
        self._catch_signals(environment)
        self._agree_with_best(trainer)
        if self.max_steps is not None and trainer.global_step >= self.max_steps:
            trainer.should_stop = True

    def _agree_with_best(self, trainer: Trainer) -> None:
        """Takes the score of a ``best.ckpt`` that was written after the checkpoint resumed from."""
        if not trainer.global_step:
            return
        if not self.best_path.exists():
            self.best_score = self.best_step = self.best_confusion = None
            self.best_images = ()
            return
        last = self.last_confusion
        try:
            content = read_content(self.best_path)
            if content["global_step"] != self.best_step:
                self.load_state_dict(content["callbacks"][self.state_key])
        # Of its content too: a key that is missing, ...
        except Exception as error:
            if is_no_fault_of_content(error):
                raise
            raise ValueError(
                f"{self.best_path} is damaged ({shown(error, 200)}); remove it: the next "
                "validation is then the best one"
            ) from error
        self.last_confusion = last

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        # A resumed epoch has no start.
        self._validate_last(trainer, _is_last_epoch(trainer))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        done, parts = batch_idx + 1, trainer.accumulate_grad_batches
        if done % parts:
            return
        left = trainer.num_training_batches - done
        signum, running, unsaved, cheap = self._agreed(trainer)
        enough = self.max_steps is not None and trainer.global_step >= self.max_steps
        late = self.max_seconds is not None and running >= self.max_seconds
        # Within the last batch of an epoch Lightning cannot resume: on_train_epoch_end writes then.
        if left:
            before_validation = cheap and left <= parts and self._validates(trainer)
            due = unsaved >= 60 * self.minutes
            if signum is not None or late or enough or before_validation or due:
                self._save(trainer, self.last_path)
            if signum is not None:
                raise Stopped(signum)
        if late or enough:
            self.out_of_time = late and not enough
            # Lightning validates once more and ends.
            trainer.should_stop = True
            self._validate_last(trainer, True)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Without other processes: they may have another number of validation batches.
        if self._signal is not None and trainer.world_size == 1:
            raise Stopped(self._signal)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.last_confusion = getattr(pl_module, "confusion", None)
        score = trainer.callback_metrics.get(self.monitor)
        if score is None or not score > (-1.0 if self.best_score is None else self.best_score):
            return
        self.best_score, self.best_step = float(score), trainer.global_step
        self.best_confusion = getattr(pl_module, "confusion", None)
        self.best_images = getattr(pl_module, "images", ())
        self._save(trainer, self.best_path)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signum, _, unsaved, cheap = self._agreed(trainer)
        last = trainer.should_stop or _is_last_epoch(trainer)
        due = signum is not None or last or cheap or unsaved >= 60 * self.minutes
        # A part of an epoch, stopped for its length, would count as a whole one.
        if due and trainer.fit_loop.batch_idx + 1 >= trainer.num_training_batches:
            self._save(trainer, self.last_path)
        if signum is not None:
            raise Stopped(signum)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release_signals()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release_signals()

    def _save(self, trainer: Trainer, path: Path) -> None:
        if self._watch is not None:
            self._watch.check()
        begin = time.monotonic()
        trainer.save_checkpoint(path)
        if path == self.last_path:
            self._saved = time.monotonic()
            self._cost = self._saved - begin

    def _validate_last(self, trainer: Trainer, last: bool) -> None:
        """The last epoch is validated, also where ``check_val_every_n_epoch`` passes over it."""
        if last and trainer.enable_validation and trainer.check_val_every_n_epoch:
            trainer.check_val_every_n_epoch = 1

    def _validates(self, trainer: Trainer) -> bool:
        """Whether the present epoch ends with a validation."""
        every = trainer.check_val_every_n_epoch or 0
        return trainer.enable_validation and every > 0 and not (trainer.current_epoch + 1) % every

    def _agreed(self, trainer: Trainer) -> tuple[int | None, float, float, bool]:
        """Signal, seconds since the start and the last checkpoint, whether one more is cheap.

        The same on all processes: they must agree on when to save and stop, both collective calls.
        """
        now = time.monotonic()
        values = [float(self._signal or 0), now - self._started, now - self._saved, self._cost]
        if trainer.world_size > 1:
            shared = torch.tensor(values, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            values = shared.tolist()
        return int(values[0]) or None, values[1], values[2], values[2] >= 20 * values[3]

    def _catch_signals(self, environment: ClusterEnvironment) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        wanted = [signal.SIGINT]
        # There Lightning saves and requeues the job.
        if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
            wanted.append(signal.SIGTERM)
        for signum in wanted:
            self._handlers[signum] = signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._signal is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signum

    def _release_signals(self) -> None:
        handlers, self._handlers = self._handlers, {}
        for signum, handler in handlers.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)


class MetricsFile(Callback):
    """A JSON object a line: ``{"step": 10, "epoch": 0, "train/loss": ..., "lr": ...}``.

    ``step`` counts the steps of the optimizer that are done. Losses are means over the parts of the
    one step. Validations have lines of their own, with "train/mean_loss" of all steps since the one
    before. Scores are in 0..1. A checkpoint knows how many lines there were; a
    run that goes on from it drops the others.

    Args:
        path: of the file.
        every: steps between lines.
    """

    def __init__(self, path: str | os.PathLike[str], every: int = 1) -> None:
        super().__init__()
        self.path = Path(path)
        self.every = every
        self._lines = 0
        self._known = False
        # Of the steps since the last validation; the device adds.
        self._loss: Tensor | float = 0.0
        self._steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"lines": self._lines, "loss": float(self._loss), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._lines, self._known = state_dict["lines"], True
        # Absent from checkpoints of former versions.
        self._loss, self._steps = state_dict.get("loss", 0.0), state_dict.get("steps", 0)

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        lines = []
        if self.path.is_file() and trainer.global_step:
            lines = self.path.read_text("utf-8", "replace").splitlines()
            # Another trainer's checkpoint does not tell.
            lines = lines[: self._lines] if self._known else lines
            # A power cut leaves some cut off, or of zeros.
            lines = [line for line in lines if row_of(line) is not None]
        else:
            self._loss, self._steps = 0.0, 0
        self._lines = len(lines)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{line}\n" for line in lines)
        write_atomically([(self.path, lambda file: file.write(text.encode("utf-8")))])

    @rank_zero_only
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        values = cast("SegmentationModule", pl_module).last_step
        self._loss, self._steps = self._loss + values["train/loss"], self._steps + 1
        if trainer.global_step % self.every == 0:
            self._write(trainer, values)

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            values = {k: v for k, v in metrics.items() if k.startswith("val/")}
            if self._steps:
                values["train/mean_loss"] = torch.as_tensor(self._loss / self._steps)
            self._write(trainer, values)
            self._loss, self._steps = 0.0, 0

    def _write(self, trainer: Trainer, values: Mapping[str, Tensor | float]) -> None:
        row: dict[str, float | None] = {"step": trainer.global_step, "epoch": trainer.current_epoch}
        for name, value in values.items():
            number = float(value)
            row[name] = number if math.isfinite(number) else None
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._lines += 1


def _is_last_epoch(trainer: Trainer) -> bool:
    return trainer.current_epoch + 1 >= (trainer.max_epochs or 0)


def _inner_parts(trainer: Trainer) -> tuple[_SignalConnector, ClusterEnvironment]:
    """What Lightning has no public way to: that a SIGTERM was seen, and the environment.

    Raises:
        RuntimeError: a Lightning that has them elsewhere; says which versions are supported.
    """
    try:
        signals = trainer._signal_connector
        environment = trainer._accelerator_connector.cluster_environment
    except AttributeError as error:
        raise RuntimeError(
            f"Lightning {lightning.__version__} is not one that training works with ({error}); "
            f"install lightning{LIGHTNING_VERSIONS}"
        ) from error
    return signals, environment
