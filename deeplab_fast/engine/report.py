"""Pictures and tables of a training run, drawn while it runs and at its end."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from deeplab_fast.data.preprocess import Preprocess, PreprocessBGR
from deeplab_fast.dispatch.files import write_atomically
from deeplab_fast.engine.averaging import ExponentialAverage
from deeplab_fast.engine.charts import class_chart, curves_chart, figure_writer
from deeplab_fast.engine.evaluate import panels_of
from deeplab_fast.engine.history import History
from deeplab_fast.engine.metrics import Metrics, percent
from deeplab_fast.engine.pictures import (
    batch_image,
    confusion_image,
    draw_panel,
    panel_name,
    png_writer,
)

if TYPE_CHECKING:
    from PIL import Image

    from deeplab_fast.data.datasets import LabelledData
    from deeplab_fast.engine.metrics import ImageScore
    from deeplab_fast.engine.module import SegmentationModule

__all__ = ["RunReport"]

# Of the run's time, after the first validation.
_SHARE = 0.02
_BATCH_IMAGES = 8


class RunReport(Callback):
    """Draws what a run did into its folder, beside ``metrics.jsonl``, and in TensorBoard.

    ``batch.png``: the first batch with its labels, as the network gets it, before the first step.
    After a validation ``results.csv`` (:meth:`History.table`) and, where that takes at most a
    fiftieth of the run's time, at the first validation and at the end, ``curves.png``,
    ``classes.png``, ``confusion.png`` and ``panels/``: the photos with the lowest and the highest
    mIoU beside labels and prediction. Curves, classes and table are of ``metrics.jsonl``, which
    needs ``MetricsFile`` before this callback, so that a resumed run has them whole. A
    ``TensorBoardLogger`` gets batch, confusion matrix and panels too. A picture that cannot be
    drawn or written is told of once, and the training goes on. Only the first process draws.

    Args:
        folder: of the run.
        tell: takes a line about what could not be drawn.
        title: above the pictures: what is trained.
        pictures: False writes ``results.csv`` alone.
        panels: number of worst and of best photos.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tell: Callable[[str], None] | None = None,
        *,
        title: str = "",
        pictures: bool = True,
        panels: int = 4,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.tell = tell or (lambda text: None)
        self.title = title or self.folder.name
        self.pictures = pictures
        self.panels = panels
        self.history = History(self.folder / "metrics.jsonl")
        self._failed: set[str] = set()
        # When the last drawing ended, and how long it took.
        self._drawn = self._cost = 0.0
        # The step whose validation confusion.png and panels/ show.
        self._shown: int | None = None

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.history = History(self.history.path)
        self._drawn = self._cost = 0.0
        self._shown = None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._table()

    @rank_zero_only
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        path = self.folder / "batch.png"
        if not self.pictures or "batch" in self._failed or (trainer.global_step and path.exists()):
            return
        if batch_idx == 0 or not path.exists():
            with self._told("batch"):
                module = cast("SegmentationModule", pl_module)
                picture = _written(path, _batch_picture(module, batch, trainer.global_step))
                self._log(trainer, {"batch": picture})

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._table()
        if time.monotonic() - self._drawn >= self._cost * (1 / _SHARE - 1):
            self._draw(trainer, cast("SegmentationModule", pl_module))

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, cast("SegmentationModule", pl_module))

    @rank_zero_only
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._table()
        self._charts()

    def finish(
        self,
        module: SegmentationModule,
        dataset: LabelledData | None,
        device: torch.device,
        *,
        title: str,
        step: int | None,
        confusion: Tensor | None,
        images: Sequence[ImageScore],
    ) -> None:
        """Draws ``confusion.png`` and ``panels/`` anew where they show another step, and curves
        where there are none.

        Args:
            module: with the weights that are shown.
            dataset: the validation's.
            device: to predict on; the module is given back where it was.
            title: of the pictures.
            step, confusion, images: of the weights' own validation.
        """
        if not (self.folder / "curves.png").exists():
            # A finished run that is resumed trains no more.
            self._charts()
        if not self.pictures or confusion is None or dataset is None or step == self._shown:
            return
        place = module.device
        with self._told("panels"):
            try:
                module.to(device)
                self._validation(module, dataset, title, confusion, images)
            finally:
                module.to(place)

    def _draw(self, trainer: Trainer, module: SegmentationModule) -> None:
        if not self.pictures:
            return
        begin = time.monotonic()
        self._charts()
        step = module.validated_step
        loader = trainer.val_dataloaders
        if step is not None and step != self._shown and module.confusion is not None and loader:
            scored = _averaged(trainer) or module
            title = f"{self.title}, step {step}"
            pictures = self._validation(
                scored, loader.dataset.dataset, title, module.confusion, module.images
            )
            self._shown = step
            with self._told("TensorBoard's pictures"):
                self._log(trainer, pictures)
        self._drawn = time.monotonic()
        self._cost = self._drawn - begin

    def _update(self) -> None:
        with self._told("metrics.jsonl"):
            self.history.update()

    def _table(self) -> None:
        self._update()
        with self._told("results.csv"):
            if self.history.validations:
                text = self.history.csv().encode("utf-8")
                path = self.folder / "results.csv"
                write_atomically([(path, lambda file: file.write(text))])

    def _charts(self) -> None:
        if not self.pictures:
            return
        self._update()
        if not self.history.steps and not self.history.validations:
            return
        files: dict[str, Callable[[], Callable[[BinaryIO], object]]] = {
            "curves.png": lambda: figure_writer(curves_chart(self.history, self.title))
        }
        if self.history.classes:
            files["classes.png"] = lambda: figure_writer(class_chart(self.history, self.title))
        for name, writer in files.items():
            with self._told(name):
                write_atomically([(self.folder / name, writer())])

    def _validation(
        self,
        module: SegmentationModule,
        dataset: LabelledData,
        title: str,
        confusion: Tensor,
        images: Sequence[ImageScore],
    ) -> dict[str, _Drawn]:
        """Writes confusion.png and panels/; the pictures by their names in TensorBoard."""
        drawn: dict[str, _Drawn] = {}
        with self._told("confusion.png"):
            picture = confusion_image(confusion.numpy(), module.classes.classes, title)
            drawn["confusion"] = _written(self.folder / "confusion.png", picture)
        with self._told("panels"):
            with torch.no_grad(), module.scoring(dataset) as counter:
                panels = panels_of(counter, images, self.panels)
            folder, kept = self.folder / "panels", set()
            folder.mkdir(exist_ok=True)
            metrics = Metrics.from_confusion(confusion, module.classes.classes)
            title += f": mIoU {percent(metrics.miou)} % of {len(images)} photos"
            for panel in panels:
                picture = draw_panel(panel, module.classes, title)
                path = folder / panel_name(panel)
                drawn[f"panels/{panel.kind}_{panel.rank:02d}"] = _written(path, picture)
                kept.add(path)
            for pattern in ("worst_*.png", "best_*.png"):
                for path in set(folder.glob(pattern)) - kept:
                    path.unlink()
        return drawn

    def _log(self, trainer: Trainer, pictures: dict[str, _Drawn]) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and logger.experiment.file_writer is not None:
                from tensorboard.compat.proto.summary_pb2 import Summary

                # add_image would compress the same pictures again, more slowly.
                values = [
                    Summary.Value(
                        tag=name,
                        image=Summary.Image(
                            width=each.width,
                            height=each.height,
                            colorspace=3,
                            encoded_image_string=each.png,
                        ),
                    )
                    for name, each in pictures.items()
                ]
                summary = Summary(value=values)
                logger.experiment.file_writer.add_summary(summary, trainer.global_step)

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """A failure is a line, once."""
        try:
            yield
        except ModuleNotFoundError as error:
            text = f"no {name}: {error.name} is missing (pip install {error.name})"
        except Exception as error:
            text = f"warning: {name}: {type(error).__name__}: {' '.join(str(error).split())}"
        else:
            return
        if name not in self._failed:
            self._failed.add(name)
            self.tell(text)


@dataclass(frozen=True)
class _Drawn:
    """A picture as it was written."""

    width: int
    height: int
    png: bytes


def _written(path: Path, picture: Image.Image) -> _Drawn:
    buffer = io.BytesIO()
    png_writer(picture)(buffer)
    png = buffer.getvalue()
    write_atomically([(path, lambda file: file.write(png))])
    return _Drawn(*picture.size, png)


def _averaged(trainer: Trainer) -> SegmentationModule | None:
    """The averaged weights that a validation scores."""
    found = (cast(Any, each) for each in trainer.callbacks)  # type: ignore[attr-defined]
    return next((each.averaged for each in found if isinstance(each, ExponentialAverage)), None)


def _batch_picture(module: SegmentationModule, batch: Any, step: int) -> Image.Image:
    images, labels, indices = batch
    count = min(_BATCH_IMAGES, len(images))
    names = [Path(name).name for name in module.sources(indices[:count])]
    shown = f"{count} of {len(images)}" if count < len(images) else str(len(images))
    return batch_image(
        _photos(images[:count], module),
        labels[:count].cpu().numpy(),
        names,
        module.classes,
        f"{shown} images of step {step + 1} as the network gets them, with their labels",
    )


def _photos(images: Tensor, module: SegmentationModule) -> np.ndarray:
    """uint8 [N, h, w, 3] of a batch, whether it was normalised or not."""
    if images.is_floating_point():
        given = getattr(module.model, "preprocess", None)
        own = given if isinstance(given, Preprocess) else Preprocess()
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (own.mean, own.std))
        images = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        if isinstance(own, PreprocessBGR):
            images = images.flip(1)
    return images.permute(0, 2, 3, 1).cpu().contiguous().numpy()
