"""What a training run says while it runs: lines, or a bar on a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from tqdm import tqdm

from deeplab_fast.engine.counting import clock
from deeplab_fast.engine.finite import describe_not_finite
from deeplab_fast.engine.metrics import Metrics, percent

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import STEP_OUTPUT

    from deeplab_fast.engine.callbacks import RunCheckpoint
    from deeplab_fast.engine.module import SegmentationModule

__all__ = ["Progress", "say"]

# Seconds between lines: not more often than the first, and after the second at the next step.
_LEAST, _MOST = 10.0, 30.0


def say(text: str) -> None:
    """A line on stdout at once, also where that is a file, above a bar where there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class Progress(Callback):
    """Tells how far the training is, and the result of each validation.

    Without a bar a line of the steps comes with the first multiple of ``every`` after 10 seconds,
    and after 30 seconds with any step; a validation of more than 30 seconds has lines too::

        step 120/3000, epoch 2/30: loss 0.4321, lr 0.0068, 23.4 images/s, 0:12:40 left
        validation at step 300/3000, epoch 3/30: loss 0.5120, mIoU 63.21 % (best 64.00 % at step
        200), 12.3 s

    The loss of the steps is the mean since the line before; images/s are of all processes since the
    second step, without validations; the time left is with them. Only the first process tells.

    Args:
        tell: takes a line.
        total_steps: of the run.
        saver: knows the best score.
        every: steps.
        bar: instead of the lines of the steps a bar on stderr.
    """

    def __init__(
        self,
        tell: Callable[[str], None],
        total_steps: int,
        saver: RunCheckpoint,
        *,
        every: int = 10,
        bar: bool = False,
    ) -> None:
        super().__init__()
        self.tell = tell
        self.total_steps = total_steps
        self.saver = saver
        self.every = every
        self.bar = bar
        self._line: tqdm | None = None
        self._inner: tqdm | None = None
        self._step = 0
        # From which step and when on the pace counts: the first step prepares what others use.
        self._paced_step: int | None = None
        self._paced = 0.0
        # When the last line was told, and the validation began.
        self._told = self._began = 0.0
        # Seconds of validations: in all, of the last one.
        self._validating = self._last_validation = 0.0
        self._loss: Tensor | None = None
        self._losses = 0
        self._score = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._paced_step = trainer.global_step, None
        self._told = time.monotonic()
        self._validating = self._last_validation = 0.0
        self._loss, self._losses, self._score = None, 0, ""
        # The trainer may have a bar of its own, which the user gave it.
        if self.bar and trainer.is_global_zero and trainer.progress_bar_callback is None:
            self._line = tqdm(
                total=self.total_steps,
                initial=trainer.global_step,
                dynamic_ncols=True,
                bar_format="{desc}{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}{postfix}",
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        loss = (
            cast(Mapping[str, Tensor], outputs)["loss"].detach() * trainer.accumulate_grad_batches
        )
        self._loss = loss if self._loss is None else self._loss + loss
        self._losses += 1
        step, now = trainer.global_step, time.monotonic()
        if step == self._step or not trainer.is_global_zero:
            return
        if self._paced_step is None:
            self._paced, self._paced_step = now, step
        self._step = step
        waited = now - self._told
        if self._line is not None:
            if waited >= 0.5 or step == self.total_steps:
                self._show(trainer, pl_module, now)
        elif waited >= _LEAST and (step % self.every == 0 or waited >= _MOST):
            self.tell(f"step {self._place(trainer)}: {self._state(trainer, pl_module, now)}")
            self._told, self._loss, self._losses = now, None, 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()
        if self._counts(trainer) and self._line is not None:
            self._inner = tqdm(
                total=_number(trainer),
                desc="validating",
                dynamic_ncols=True,
                leave=False,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left",
            )

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self._counts(trainer):
            return
        if self._inner is not None:
            self._inner.update()
            return
        now = time.monotonic()
        if now - max(self._told, self._began) < _MOST:
            return
        done, count = batch_idx + 1, _number(trainer)
        left = (now - self._began) / done * (count - done)
        self.tell(f"validating: {done}/{count} batches, {clock(left)} left")
        self._told = now

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close_inner()
        if not self._counts(trainer):
            return
        now = time.monotonic()
        self._last_validation = now - self._began
        self._validating += self._last_validation
        module = cast("SegmentationModule", pl_module)
        metrics = module.metrics
        if metrics is None:
            return
        score = _miou(metrics)
        self._score = f", val mIoU {score}"
        loss = float(trainer.callback_metrics.get("val/loss", math.nan))
        self.tell(
            f"validation at step {self._place(trainer)}: loss {loss:.4f}, mIoU {score}"
            f"{self._best(metrics)}, {self._last_validation:.1f} s"
        )
        if self._line is not None:
            self._show(trainer, pl_module, now)
        if metrics.note:
            found = describe_not_finite(module.not_finite)
            self.tell(f"warning: validation: {metrics.note}" + (f" ({found})" if found else ""))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._line is None and self._loss is not None:
            now = time.monotonic()
            self.tell(f"step {self._place(trainer)}: {self._state(trainer, pl_module, now)}")
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _counts(self, trainer: Trainer) -> bool:
        return trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking

    def _place(self, trainer: Trainer) -> str:
        epoch = min(trainer.current_epoch + 1, trainer.max_epochs or 1)
        return f"{trainer.global_step}/{self.total_steps}, epoch {epoch}/{trainer.max_epochs}"

    def _state(self, trainer: Trainer, pl_module: LightningModule, now: float) -> str:
        """Loss, rate, pace and time left since the last line; waits for the device."""
        module = cast("SegmentationModule", pl_module)
        parts = []
        if self._loss is not None:
            parts.append(f"loss {float(self._loss) / self._losses:.4f}")
        parts.append(f"lr {float(module.last_step.get('lr', module.learning_rate)):.3g}")
        first = trainer.global_step if self._paced_step is None else self._paced_step
        steps, seconds = trainer.global_step - first, now - self._paced - self._validating
        if steps > 0 and seconds > 0:
            parts.append(f"{steps * module.config.batch_size / seconds:.1f} images/s")
            left = (self.total_steps - trainer.global_step) * seconds / steps
            left += self._validations_left(trainer) * self._last_validation
            if trainer.global_step < self.total_steps:
                parts.append(f"{clock(left)} left")
        return ", ".join(parts)

    def _show(self, trainer: Trainer, pl_module: LightningModule, now: float) -> None:
        assert self._line is not None
        self._line.set_description(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", refresh=False
        )
        text = self._state(trainer, pl_module, now) + self._score
        self._line.set_postfix_str(text, refresh=False)
        self._line.n = trainer.global_step
        self._line.refresh()
        self._told = now
        # The mean of about the last hundred steps.
        if self._losses >= 100 and self._loss is not None:
            self._loss, self._losses = self._loss * (50 / self._losses), 50

    def _validations_left(self, trainer: Trainer) -> int:
        every = trainer.check_val_every_n_epoch
        if not trainer.enable_validation or not every:
            return 0
        done, count = trainer.current_epoch // every, trainer.max_epochs or 0
        return max(0, math.ceil(count / every) - done)

    def _best(self, metrics: Metrics) -> str:
        if metrics.not_finite or math.isnan(metrics.miou):
            return ""
        # The saver comes after this callback, and its score is fp32, as Lightning's are.
        best = self.saver.best_score
        if best is None or float(torch.tensor(metrics.miou)) > best:
            return " (the best so far)"
        return f" (best {percent(best)} % at step {self.saver.best_step})"

    def _close_inner(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None

    def _close(self) -> None:
        self._close_inner()
        if self._line is not None:
            self._line.close()
            self._line = None


def _number(trainer: Trainer) -> int:
    """Of validation batches of this process."""
    batches = trainer.num_val_batches
    return int(sum(batches) if isinstance(batches, list) else batches)


def _miou(metrics: Metrics) -> str:
    """In percent, of how many classes where some are absent; "-" where it means nothing."""
    if metrics.not_finite or math.isnan(metrics.miou):
        return "-"
    scored = f" of {metrics.num_scored} of {len(metrics.classes)} classes" if metrics.absent else ""
    return f"{percent(metrics.miou)} %{scored}"
