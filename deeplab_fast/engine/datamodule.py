"""Training and validation data for Lightning: checked, augmented, in a reproducible order."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from deeplab_fast.data.check import DataError, DataReport, problem_text
from deeplab_fast.data.datasets import SegmentationDataset
from deeplab_fast.data.preprocess import IMAGENET_MEAN
from deeplab_fast.data.transforms import AugmentedDataset, Compose, CopyPaste
from deeplab_fast.engine.bootstrap import bootstrap_indices, class_ids
from deeplab_fast.engine.checked import check_remembered
from deeplab_fast.engine.config import OptionError, TrainConfig
from deeplab_fast.engine.evaluate import IndexedItem, IndexedItems, ShardSampler
from deeplab_fast.engine.sources import (
    open_training,
    open_validation,
    seen_in_both,
    training_transform,
)

__all__ = ["Batch", "SegmentationData", "TrainBatches", "TrainLoader"]

# Images uint8 or float [N, 3, h, w], labels [N, h, w], indices of the samples [N].
Batch = tuple[Tensor, Tensor, Tensor]


class SegmentationData(lightning.LightningDataModule):
    """Loaders for ``lightning.Trainer(use_distributed_sampler=False)``.

    Training batches are (images, labels, indices); their order and augmentation follow from (seed,
    epoch, index) alone, whatever the number of workers. A global batch of ``config.batch_size``
    images is split evenly over processes and ``config.accumulate`` parts; images beyond the last
    whole batch wait for another epoch's order. Validation goes over every image once, at its own
    size.

    Args:
        config: the options under "Data", "Augmentation" and "Length and batches"; those of a folder
            or table are ``open_dataset``'s: ``val_fraction``, ``group_by``, ``mask_suffix``,
            ``mask_colours``, ... What was found and split stands in ``notes``.
        train, val: data sets instead of those that the config names, as ``open_dataset`` gives.
        mean: colour of the padding, R, G, B in 0..1: the model's ``preprocess.mean``.
        input_size: what photos have at scale 1: the model's ``preprocess.size``; None: their own.

    Attributes:
        train, val: the data sets, ``val`` None without validation.
        notes: lines on how both were found and split, and a warning where they share photos.
        report: of the training data, once it was needed.

    Raises:
        ValueError, OSError, DataError: data that cannot be opened, or have problems; parts that
            were made of the same pairs by options that do not agree.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        train: SegmentationDataset | None = None,
        val: SegmentationDataset | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        input_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.mean = tuple(mean)
        self.input_size = input_size if input_size is not None else config.input_size or None
        named = train is None and val is None
        self.train = train if train is not None else open_training(config)
        if val is None and config.val_every and (train is None or config.val_data):
            val = open_validation(config)
        self.val = val
        if val is not None and val.classes.classes != self.train.classes.classes:
            raise ValueError(
                f"the data to validate on have the classes {', '.join(val.classes.classes)} and "
                f"those to train on {', '.join(self.train.classes.classes)}; they must be the same"
            )
        shared = seen_in_both(self.train, val, config if named else None)
        notes = (*self.train.notes, *(val.notes if val is not None else ()), shared)
        self.notes = tuple(dict.fromkeys(note for note in notes if note))
        self.report: DataReport | None = None
        self._bootstrapped = False
        self._pasted = self._classes_to_paste()
        self._loader: TrainLoader | None = None

    def check(
        self, *, progress: bool = False, tell: Callable[[str], None] | None = None
    ) -> DataReport:
        """Reads photos and masks of both data sets; keeps the report of the training data.

        Those that are unchanged since they passed a check are not read again, unless
        ``config.recheck``.

        Args:
            progress: a bar on stderr where that is a terminal.
            tell: takes a line for what is read, and for each thing that is odd and may be right.

        Raises:
            DataError: there are problems; names all of them. Validation data of one class alone
                are none: their mean IoU will be nan.
        """
        report = self.counted(progress=progress, tell=tell)
        reports = [report]
        if self.val is not None:
            reports.append(self._checked(self.val, progress, tell))
        allow_empty = self.config.allow_empty
        problems = [
            (each, each.bad(allow_empty=allow_empty, allow_one_class=each is not report))
            for each in reports
        ]
        problems = [(each, bad) for each, bad in problems if bad]
        if problems:
            raise DataError(problem_text(problems), report)
        for each in reports:
            allowed = [p.message for p in each.problems if p.kind == "one class"]
            for text in (*each.notes, *allowed):
                if tell is not None:
                    tell(f"warning: {text}")
        return report

    def counted(
        self, *, progress: bool = False, tell: Callable[[str], None] | None = None
    ) -> DataReport:
        """The report of the training data, made once: pixels and images of each class."""
        if self.report is None:
            self.report = self._checked(self.train, progress, tell)
        return self.report

    def _checked(
        self,
        dataset: SegmentationDataset,
        progress: bool,
        tell: Callable[[str], None] | None,
    ) -> DataReport:
        config = self.config
        return check_remembered(
            dataset,
            workers=config.workers,
            progress=progress,
            recheck=config.recheck,
            tell=tell,
        )

    def bootstrap(self) -> int:
        """Duplicates the training images that ``config.bootstrap`` asks for; their new number."""
        if self.config.bootstrap and not self._bootstrapped:
            report = self.counted()
            self.train = self.train.select(
                bootstrap_indices(
                    report.images_of,
                    len(self.train),
                    classes=_class_list(self.config.bootstrap),
                    factor=self.config.bootstrap_factor,
                    names=self.train.classes.classes,
                )
            )
            self._bootstrapped = True
        return len(self.train)

    def _classes_to_paste(self) -> list[int]:
        given = self.config.copy_paste
        if not given:
            return []
        names = self.train.classes.of_labels().classes
        try:
            return class_ids(given, range(len(names)), names)
        except ValueError as error:
            raise OptionError("copy_paste", f"has {error}") from error

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.bootstrap()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return len(self.train) // self.config.batch_size

    def source_of(self, index: int) -> str:
        """Where a training sample comes from, for messages."""
        return str(self.train.samples[index].image)

    def augmented(self) -> AugmentedDataset:
        """The training images under the config's transform."""
        config = self.config
        transform = training_transform(config, self.mean, self.train.ignore_index, self.input_size)
        if config.copy_paste:
            own = transform if transform is not None else Compose()
            transform = CopyPaste(own, self.train, self._pasted, config.copy_paste_probability)
        return AugmentedDataset(self.train, transform, seed=config.seed)

    def train_dataloader(self) -> TrainLoader:
        config = self.config
        if self._loader is None:
            rank, world = _processes(self.trainer)
            batches = TrainBatches(
                len(self.train),
                config.batch_size,
                accumulate=config.accumulate,
                rank=rank,
                world=world,
                seed=config.seed,
            )
            self._loader = TrainLoader(
                self.augmented(), batches, workers=config.workers, pin_memory=_on_gpu(self.trainer)
            )
        return self._loader

    def val_dataloader(self) -> DataLoader[IndexedItem] | list[IndexedItem]:
        if self.val is None:
            return []
        rank, world = _processes(self.trainer)
        return DataLoader(
            IndexedItems(self.val),
            batch_size=self.config.val_batch_size,
            sampler=ShardSampler(len(self.val), rank, world),
            num_workers=self.config.workers,
            collate_fn=list,
            # Without one each pass draws from the global generator of the training.
            generator=torch.Generator(),
        )


class TrainBatches(Sampler[list[int]]):
    """This process's micro-batches of an epoch: a pure function of (seed, epoch).

    The epoch's permutation of the samples is cut into global batches; each of these into
    ``accumulate`` parts, each of these into one share a process. So the images of a step do not
    depend on the number of processes or parts.

    Args:
        length: number of samples.
        batch_size: of the global batch.
        accumulate, world: parts and processes; their product divides ``batch_size``.
        rank: this process.
        seed: any integer.

    Raises:
        ValueError: a batch that cannot be divided, or more images a batch than there are.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
    ) -> None:
        if batch_size % (accumulate * world):
            raise ValueError(
                f"batch_size is {batch_size}, which {world} processes with {accumulate} parts each "
                f"cannot share evenly; use a multiple of {world * accumulate}"
            )
        if not 1 <= batch_size <= length:
            raise ValueError(
                f"batch_size is {batch_size} and there are {length} images to train on; use at "
                f"most {length}"
            )
        self.length = length
        self.batch_size = batch_size
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.seed = seed
        self.epoch = 0
        # Micro-batches of the present epoch that are left out, done before an interruption.
        self.skip = 0

    @property
    def sampler(self) -> TrainBatches:
        """Itself: Lightning tells the epoch to the batch sampler's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is for."""
        if epoch != self.epoch:
            self.epoch, self.skip = epoch, 0

    def __len__(self) -> int:
        return self.length // self.batch_size * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        order = permutation(self.length, self.seed, self.epoch)
        share = self.batch_size // (self.accumulate * self.world)
        for part in range(self.skip, len(self)):
            first = (part * self.world + self.rank) * share
            yield order[first : first + share].tolist()


class TrainLoader(DataLoader[Any]):
    """Batches of an :class:`AugmentedDataset`; resumes in the middle of an epoch.

    ``state_dict`` counts the batches that were handed out; after ``load_state_dict`` the next
    iteration begins behind them.
    """

    def __init__(
        self,
        dataset: AugmentedDataset,
        batches: TrainBatches,
        *,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            _Indexed(dataset),
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            collate_fn=_collate,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),
        )
        self._augmented = dataset
        self._batches = batches
        self._given = 0

    def __iter__(self) -> Any:
        # A generator: what Lightning makes only to look whether it can iterate starts no workers,
        # and the epoch is read when the first batch is asked for.
        batches = self._batches
        self._augmented.set_epoch(batches.epoch)
        self._given = batches.skip
        for batch in super().__iter__():
            self._given += 1
            yield batch
        batches.skip = 0

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of its batches handed out."""
        return {"epoch": self._batches.epoch, "batches": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on behind the batches of ``state``."""
        self._batches.epoch, self._batches.skip = state["epoch"], state["batches"]
        self._given = state["batches"]


def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the samples in an epoch."""
    words = [seed & 0xFFFFFFFFFFFFFFFF, epoch, 0x6F72646572]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words))).permutation(length)


class _Indexed(Dataset[Any]):
    """(image, labels, index): a message can name the file."""

    def __init__(self, dataset: AugmentedDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int] | Exception:
        try:
            return (*self.dataset[index], index)
        # A worker would pass on the exception's text alone, and some lose their arguments.
        except (ValueError, OSError) as error:
            return error


def _collate(items: list[Any]) -> Batch:
    for item in items:
        if isinstance(item, Exception):
            raise item
    sizes = {tuple(image.shape) for image, _, _ in items}
    if len(sizes) > 1:
        shown = ", ".join(f"{w}x{h}" for _, h, w in sorted(sizes))
        raise ValueError(
            f"the transform gave photos of different sizes for one batch ({shown}); let it end "
            "with a crop, or use batch_size=1"
        )
    images, labels, indices = zip(*items, strict=True)
    # Masks of one data set may differ in type where the padding's label needs a wider one.
    wide = max((label.dtype for label in labels), key=lambda dtype: dtype.itemsize)
    return (
        torch.stack(images),
        torch.stack([label.to(wide) for label in labels]),
        torch.tensor(indices),
    )


def _ignore_signals(worker: int) -> None:
    # Ctrl+C and job schedulers signal the workers too; the training still needs their batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _class_list(names: Sequence[str | int]) -> list[int | str] | None:
    if list(names) == ["rare"]:
        return None
    return [int(name) if str(name).isdecimal() else name for name in names]


def _processes(trainer: lightning.Trainer | None) -> tuple[int, int]:
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def _on_gpu(trainer: lightning.Trainer | None) -> bool:
    return trainer is not None and trainer.strategy.root_device.type == "cuda"
