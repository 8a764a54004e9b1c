"""What is found by trying before a run, by Lightning's tuner: a learning rate, a batch size."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from deeplab_fast.backends import use_backend
from deeplab_fast.engine.config import OptionError, TrainConfig
from deeplab_fast.engine.counting import clock
from deeplab_fast.engine.datamodule import SegmentationData
from deeplab_fast.engine.module import SegmentationModule
from deeplab_fast.engine.train import Prepared, prepare
from deeplab_fast.engine.trainer import backends_restored, without_hints

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.tuner import Tuner

    from deeplab_fast.models import DeepLabV3

__all__ = ["LearningRates", "find_batch_size", "find_lr"]


@dataclass(frozen=True)
class LearningRates:
    """A range test: ``rates`` rise evenly on a logarithmic scale, a step of the optimizer each;
    ``losses`` are those of the steps, smoothed."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def lowest(self) -> int | None:
        """The step of the lowest loss behind the first tenth, which smoothing has not settled yet;
        None where the loss never falls."""
        first = max(1, len(self.losses) // 10)
        if len(self.losses) < first + 3:
            return None
        found = first + int(np.argmin(self.losses[first:]))
        return found if found > first else None

    @property
    def suggestion(self) -> float | None:
        """A tenth of the rate at which the loss is lowest."""
        return None if self.lowest is None else self.rates[self.lowest] / 10

    def table(self, rows: int = 12) -> str:
        """Learning rates and losses in so many lines, with the suggestion."""
        chosen = np.unique(np.linspace(0, len(self.rates) - 1, rows).round().astype(int))
        lines = ["learning rate      loss"]
        lines += [f"{self.rates[i]:13.2e}  {self.losses[i]:8.4f}" for i in chosen]
        if self.lowest is None:
            lines.append("the loss never falls: no learning rate to suggest")
        else:
            lines.append(f"the loss is lowest at {self.rates[self.lowest]:.2e}")
        return "\n".join(lines)


@backends_restored()
def find_lr(
    config: TrainConfig,
    *,
    model: DeepLabV3 | None = None,
    data: SegmentationData | None = None,
    steps: int = 100,
    lowest: float = 1e-6,
    highest: float = 1.0,
    tell: Callable[[str], None] | None = None,
) -> LearningRates:
    """Lightning's range test: steps at rising learning rates, the same for all parts of the model.

    Nothing is written, no weights are kept; the run's own schedule, warm-up and averages are out of
    it.

    Args:
        config: of the run, whose model, data, loss, optimizer and batch size it takes.
        model, data: as of ``fit``.
        steps: of the optimizer.
        lowest, highest: learning rates, above 0; it ends early where the loss is four times its
            lowest.
        tell: takes lines about the data and the weights.

    Raises:
        As ``fit``.

    Source: arXiv 1506.01186, section 3.3; ``lightning.pytorch.tuner.Tuner.lr_find``.
    """
    tell = tell or (lambda text: None)
    ready = prepare(config, model, data, tell=tell)
    # Lightning's bar shows nothing off a terminal, and its tuner takes no callbacks.
    cast(Any, ready.module).on_train_batch_end = _Lines(tell, steps * config.accumulate)
    with _tuner(ready, max_epochs=-1) as (tuner, module), _bar_for_terminals():
        found = tuner.lr_find(
            module,
            datamodule=ready.data,
            min_lr=lowest,
            max_lr=highest,
            num_training=steps,
            update_attr=False,
        )
    assert found is not None
    # Lightning suggests the steepest place, which in a noisy curve is anywhere.
    rates, losses = (tuple(map(float, found.results[name])) for name in ("lr", "loss"))
    return LearningRates(rates, losses)


@backends_restored()
def find_batch_size(
    config: TrainConfig,
    *,
    model: DeepLabV3 | None = None,
    data: SegmentationData | None = None,
    most: int = 1024,
    tell: Callable[[str], None] | None = None,
) -> int:
    """The largest batch that fits into the GPU's memory, less a twentieth: Lightning's search.

    Steps of training with crops of ``config.crop``, doubled until memory runs out, then halved in
    between. Divided by ``accumulate`` it is what a pass holds; of several GPUs it is for each.

    Args:
        config: of the run.
        model, data: as of ``fit``.
        most: where the search ends.
        tell: takes lines about the data and the weights.

    Raises:
        OptionError: there is no GPU; a CPU has no memory that could be run out of safely.
        As ``fit``.

    Source: ``lightning.pytorch.tuner.Tuner.scale_batch_size``.
    """
    if not torch.cuda.is_available():
        raise OptionError(
            "find_batch_size",
            "needs a GPU, and there is none: the memory of a CPU is shared, and the system ends "
            "what takes too much of it. Choose batch_size by hand",
        )
    config = config.replace(batch_size=1, accumulate=1)
    ready = prepare(config, model, data, tell=tell or (lambda text: None))
    return largest_batch(ready, most)


def largest_batch(ready: Prepared, most: int) -> int:
    """The search of :func:`find_batch_size`, on whatever device the trainer takes."""
    crops = _Crops(ready)
    with _tuner(ready, max_epochs=1, limit_val_batches=0) as (tuner, module):
        cast(SegmentationModule, module).explains_memory = False
        found = tuner.scale_batch_size(
            module,
            datamodule=crops,
            mode="binsearch",
            steps_per_trial=2,
            # The norm of the pooled vector wants two images.
            init_val=2,
            max_trials=most.bit_length(),
            max_val=most,
        )
    assert found is not None
    return int(found)


class _Lines:
    """Tells, every 10 seconds, how many batches are done and the time that the others take."""

    def __init__(self, tell: Callable[[str], None], total: int) -> None:
        self.tell, self.total = tell, total
        self.done = 0
        self.began = self.told = time.monotonic()

    def __call__(self, outputs: object, batch: object, batch_idx: int) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.told >= 10 and not sys.stderr.isatty():
            left = (now - self.began) / self.done * (self.total - self.done)
            self.tell(f"batch {self.done}/{self.total}, {clock(left)} left")
            self.told = now


@contextlib.contextmanager
def _bar_for_terminals() -> Iterator[None]:
    """Without Lightning's bar where it would fill a log."""
    aside = contextlib.redirect_stderr(io.StringIO())
    with contextlib.nullcontext() if sys.stderr.isatty() else aside:
        yield


@contextlib.contextmanager
def _tuner(ready: Prepared, **options: Any) -> Iterator[tuple[Tuner, LightningModule]]:
    """A tuner of a trainer that writes into a folder that is gone afterwards."""
    from lightning.pytorch.tuner import Tuner

    own = {k: v for k, v in ready.arguments.items() if k not in ("callbacks", "logger")}
    backend = ready.config.backend
    with (
        tempfile.TemporaryDirectory() as folder,
        without_hints(),
        use_backend(backend) if backend else contextlib.nullcontext(),
    ):
        trainer = lightning.Trainer(
            **{
                "accumulate_grad_batches": ready.config.accumulate,
                "gradient_clip_val": ready.config.clip_norm,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
                **own,
                **options,
                "default_root_dir": str(Path(folder)),
            }
        )
        yield Tuner(trainer), ready.module


class _Crops(lightning.LightningDataModule):
    """Endless augmented crops in batches of any size, without regard to the number of images."""

    def __init__(self, ready: Prepared) -> None:
        super().__init__()
        self.ready = ready
        self.batch_size = 2

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(_Endless(self.ready.data), batch_size=self.batch_size)

    def val_dataloader(self) -> list[Any]:
        # The tuner asks for one, and takes no batch of it.
        return []


class _Endless(IterableDataset[Any]):
    def __init__(self, data: SegmentationData) -> None:
        self.items = data.augmented()

    def __iter__(self) -> Iterator[Any]:
        for index in itertools.cycle(range(len(self.items))):
            yield (*self.items[index], index)
