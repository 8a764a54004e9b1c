"""Training runs: from a config to a folder with weights, metrics and checkpoints."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from deeplab_fast._documents import shown
from deeplab_fast.dispatch.files import is_full
from deeplab_fast.engine.config import NO_WEIGHTS, OptionError, TrainConfig, one_of, train_config
from deeplab_fast.engine.run_folder import (
    FolderWatch,
    TrainResult,
    check_resumable,
    checkpoint_to_resume,
    clear_left,
    finished_result,
    forget_result,
    is_finished,
    is_no_fault_of_content,
    progress_of,
    write_changes,
    write_result,
    write_run_files,
    write_stages,
)
from deeplab_fast.engine.start import (
    build_model,
    from_checkpoints,
    start_text,
    told_by_weights,
)
from deeplab_fast.engine.trainer import (
    TrainingUnavailable,
    backends_restored,
    import_lightning,
    is_first,
    new_trainer,
    trainer_arguments,
    without_hints,
)

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

    from deeplab_fast.engine.callbacks import RunCheckpoint
    from deeplab_fast.engine.datamodule import SegmentationData
    from deeplab_fast.engine.metrics import Metrics
    from deeplab_fast.engine.module import SegmentationModule
    from deeplab_fast.models import DeepLabV3

__all__ = [
    "Prepared",
    "TrainResult",
    "TrainingUnavailable",
    "build_model",
    "fit",
    "fit_stages",
    "prepare",
    "validate",
]


@backends_restored()
def fit(
    config: TrainConfig,
    *,
    resume: bool | str | os.PathLike[str] = False,
    model: DeepLabV3 | None = None,
    data: SegmentationData | None = None,
    callbacks: Sequence[Callback] = (),
    tell: Callable[[str], None] | None = None,
    quiet: bool = False,
    progress: bool | None = None,
) -> TrainResult:
    """Trains a model and leaves a folder that says how.

    ``config.output`` gets ``config.yaml`` (runs again with ``--config``), ``versions.json``,
    ``metrics.jsonl``, ``results.csv``, ``tensorboard/``, ``checkpoints/last.ckpt`` and
    ``best.ckpt``, pictures (:class:`~deeplab_fast.engine.report.RunReport`), and at the end
    ``model.safetensors`` at the output stride of the validation (the averaged weights with
    ``config.ema``) and ``result.json`` with the scores. Under torchrun or SLURM every process calls
    this.

    Args:
        config: ``TrainConfig`` (see ``train_config`` for the presets).
        resume: True goes on from ``checkpoints/last.ckpt`` where there is one; a path from that
            checkpoint.
        model, data: in place of those that the config names: a model, a ``SegmentationData``.
        callbacks: further Lightning callbacks.
        tell: takes the lines about the progress (:class:`~deeplab_fast.engine.progress.Progress`
            has their rule); by default they are printed. The first process tells. They name options
            as the command line does: ``--input-size`` is ``input_size``.
        quiet: prints nothing.
        progress: a bar on stderr in place of the lines of the steps; by default where stderr is a
            terminal.

    A run that fails before its first step leaves no folder that was not there.

    Raises:
        TrainingUnavailable: Lightning cannot be imported.
        OptionError: an option that is not allowed (a ValueError too).
        ValueError, OSError: options, data, weights or a checkpoint that do not fit.
        NonFiniteLoss: a loss that is nan or infinite; names the batch.
        CaptureFailed: with ``config.cuda_graph`` a step that waits for the device.
        MemoryError: names the batch and what to lower.
        CheckpointNotWritten: a full disk; the former checkpoint is whole.
    """
    import_lightning()
    from deeplab_fast.engine import callbacks as parts
    from deeplab_fast.engine.averaging import ExponentialAverage
    from deeplab_fast.engine.progress import Progress
    from deeplab_fast.engine.report import RunReport
    from deeplab_fast.engine.sources import write_split

    tell, progress = _speech(tell, quiet, progress)
    if not config.output:
        raise OptionError("output", "is missing: which folder shall the run go to?")
    if config.epochs is None and config.steps is None:
        raise OptionError("epochs", "or steps is missing: how long shall the training be?")
    # Without "..", which means another folder once the one before it is made.
    folder = Path(os.path.normpath(config.output))
    began = time.time()
    checkpoint = checkpoint_to_resume(folder, resume)
    if resume and is_first():
        clear_left(folder, began)
    if resume is True and (done := finished_result(folder, config)) is not None:
        tell(
            f"the run in {folder} is finished, {done.steps} steps; it goes on with more epochs or "
            "steps"
        )
        return done
    ready = prepare(config, model, data, checkpoint, tell=tell, progress=progress)
    config, data, module, steps = ready.config, ready.data, ready.module, ready.steps
    saver = parts.RunCheckpoint(
        folder / "checkpoints",
        minutes=config.checkpoint_minutes,
        max_seconds=config.max_seconds,
        max_steps=steps,
    )
    average = ExponentialAverage(config.ema) if config.ema else None
    name = (getattr(module.model, "config", None) or (type(module.model).__name__,))[0]
    report = RunReport(folder, tell, title=f"{folder}, {name}", pictures=config.pictures)
    with without_hints():
        trainer = new_trainer(
            config,
            folder,
            arguments=ready.arguments,
            epochs=_epochs(steps, data.steps_per_epoch, checkpoint),
            validates=ready.validates,
            callbacks=[
                *([average] if average is not None else []),
                parts.MetricsFile(folder / "metrics.jsonl", config.log_every),
                Progress(tell, steps, saver, every=config.log_every, bar=progress),
                report,
                *_early_stopping(config),
                *callbacks,
                saver,
            ],
            tell=tell,
        )
    _tell_of_start(config, module, data, steps, checkpoint, tell)
    with _nothing_half_made(folder, trainer):
        if trainer.is_global_zero:
            # What a run that goes on had come to is no end of what its config now asks for.
            forget_result(folder)
            write_run_files(folder, config)
            if ready.changes is not None:
                write_changes(folder, ready.changes)
            moved = write_split(data.train, data.val, folder / "split.csv")
            if moved and checkpoint is not None:
                tell(f"warning: {moved}")
        watch = FolderWatch(folder)
        with watch.told():
            stopped = _run(trainer, module, data, checkpoint)
    weights = exported = None
    averaged = None if average is None else average.averaged
    trained = module if averaged is None else averaged
    if stopped is None:
        best = config.export == "best" and saver.best_score is not None
        best = best and saver.best_path.exists()
        exported = "best" if best else "last"
        if trainer.is_global_zero:
            with watch.told():
                weights = _export(config, folder, trained, saver if best else None, tell)
            report.finish(
                trained,
                data.val,
                trainer.strategy.root_device,
                title=f"{weights}, {name}",
                step=saver.best_step if best else module.validated_step,
                confusion=saver.best_confusion if best else module.confusion,
                images=saver.best_images if best else module.images,
            )
    ended = None
    if saver.out_of_time:
        stopped = f"stopped after {config.max_time}"
    elif stopped is None and trainer.global_step < steps:
        ended = _why_early(trainer)
    last = _metrics_of("last", module, saver)
    result = TrainResult(
        folder=folder,
        weights=weights,
        last_checkpoint=saver.last_path,
        best_checkpoint=saver.best_path if saver.best_path.exists() else None,
        steps=trainer.global_step,
        miou=None if last is None else last.miou,
        best_miou=saver.best_score,
        finished=stopped is None,
        stopped=stopped,
        ended=ended,
        metrics=_metrics_of(exported, module, saver),
        last_metrics=last,
        exported=exported,
        exported_step={"best": saver.best_step, "last": trainer.global_step}.get(exported or ""),
    )
    if trainer.is_global_zero:
        with watch.told():
            write_result(result)
        clear_left(folder, began)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # A second stage reads what the first process wrote.
        torch.distributed.barrier()
    return result


def _speech(
    tell: Callable[[str], None] | None, quiet: bool, progress: bool | None
) -> tuple[Callable[[str], None], bool]:
    """What takes the lines, and whether there is a bar; nothing in any process but the first."""
    from deeplab_fast.engine.progress import say

    if not is_first():
        return (lambda text: None), False
    if progress is None:
        progress = sys.stderr.isatty() and not quiet
    return tell or ((lambda text: None) if quiet else say), progress


@dataclass(frozen=True)
class Prepared:
    """What a trainer needs: the config with what its weights tell, the data, read, the module, the
    steps of the run, the trainer's own arguments, and the options that a resumed run changes."""

    config: TrainConfig
    data: SegmentationData
    module: SegmentationModule
    steps: int
    arguments: dict[str, Any]
    changes: dict[str, Any] | None

    @property
    def validates(self) -> bool:
        """Whether there are validations."""
        return self.data.val is not None and self.config.val_every > 0


def prepare(
    config: TrainConfig,
    model: DeepLabV3 | None = None,
    data: SegmentationData | None = None,
    checkpoint: Path | None = None,
    *,
    tell: Callable[[str], None],
    progress: bool = False,
) -> Prepared:
    """What :func:`fit` trains: options first, then weights, then the files of the data.

    Args:
        config: ``epochs`` or ``steps`` may be missing: one epoch then.
        model, data, tell, progress: as of :func:`fit`.
        checkpoint: that the run goes on from.

    Raises:
        As :func:`fit`.
    """
    from deeplab_fast.engine.datamodule import SegmentationData

    arguments = _checked_options(config, Path(config.output or "."))
    if model is None:
        told = config if checkpoint is None else from_checkpoints(config, checkpoint)
        told = told_by_weights(told)
        if config.classes is None and told.classes:
            names = [*told.classes[:4], *(["..."] if len(told.classes) > 4 else [])]
            tell(
                f"the classes are taken to be the {len(told.classes)} of {config.weights}: "
                f"{', '.join(names)}; --classes a,b,c names yours"
            )
        config = config.replace(model=told.model, classes=told.classes)
    data = data if data is not None else SegmentationData(config)
    if config.early_stopping is not None and data.val is None:
        raise OptionError(
            "early_stopping", f"is {config.early_stopping} and there are no data to validate on"
        )
    if model is None:
        # What a checkpoint replaces is no news, and needs no file.
        say = tell if checkpoint is None else None
        built = config if checkpoint is None else from_checkpoints(config, checkpoint)
        model = build_model(built, data.train.outputs, data.train.classes, tell=say)
    elif config.input_size is not None and getattr(model, "preprocess", None) is not None:
        model.preprocess = replace(model.preprocess, size=config.input_size or None)
    changes = None if checkpoint is None else check_resumable(checkpoint, config, tell)
    _check_data(config, data, tell, progress)
    module, steps = _module(config, model, data, tell)
    return Prepared(config, data, module, steps, arguments, changes)


def _epochs(steps: int, an_epoch: int, checkpoint: Path | None) -> int:
    """Epochs that are enough for so many steps, also behind epochs of another length."""
    plain = math.ceil(steps / an_epoch)
    if checkpoint is None:
        return plain
    done, epoch = progress_of(checkpoint)
    if epoch * an_epoch <= done <= (epoch + 1) * an_epoch:
        return plain
    # RunCheckpoint ends the run at its last step.
    return epoch + 1 + math.ceil(max(0, steps - done) / an_epoch)


def _checked_options(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """The trainer's arguments; what options name is looked up before any file of data is read."""
    from deeplab_fast.backends import BACKENDS, use_backend
    from deeplab_fast.engine.sources import training_transform

    if config.backend not in (None, "auto", *BACKENDS):
        raise OptionError(
            "backend", f"is {config.backend!r}, expected {one_of(config.backend, BACKENDS)}"
        )
    with use_backend(config.backend or "auto"):
        training_transform(config)
    return trainer_arguments(config, folder)


def _check_data(
    config: TrainConfig,
    data: SegmentationData,
    tell: Callable[[str], None],
    progress: bool,
) -> None:
    """Reads the data where the config says so, duplicates what is to be seen more often."""
    for note in data.notes:
        tell(note)
    if not config.bootstrap:
        _check_length(config, data)
    # The other processes end with this one.
    if config.check_data and is_first():
        report = data.check(progress=progress, tell=tell)
        advice = imbalance_advice(report.pixels, data.train.classes.classes, config)
        if advice:
            tell(advice)
    data.bootstrap()
    _check_length(config, data)


def _check_length(config: TrainConfig, data: SegmentationData) -> None:
    if data.steps_per_epoch < 1:
        raise OptionError(
            "batch_size",
            f"is {config.batch_size} and there are {len(data.train)} images to train on; use at "
            f"most {len(data.train)}",
        )


# Below, statistics of a batch differ from those of all images enough to spoil validations: in
# batches of 4 the mIoU fell while the loss fell, with the backbone's statistics kept it rose.
_FEW_IMAGES = 8
# A class with fewer pixels than this part of an even share is seldom learnt without help.
_RARE = 0.1


def imbalance_advice(pixels: Sequence[int], names: Sequence[str], config: TrainConfig) -> str:
    """What would help classes of few pixels, "" where none are few or something is done already.

    Args:
        pixels: of each class in the training data.
        names: of the classes.
        config: a loss that counts all pixels alike, without weights or duplicated images, is what
            is advised on.
    """
    counts = [int(n) for n in pixels]
    total = sum(counts)
    plain = config.loss == "cross_entropy" and config.class_weights in (None, *NO_WEIGHTS)
    if not total or len(counts) < 2 or not plain or config.bootstrap:
        return ""
    present = [(n / total, name) for n, name in zip(counts, names, strict=True) if n]
    rare = sorted(each for each in present if each[0] < _RARE / len(present))
    if not rare:
        return ""
    shown = ", ".join(f"{name} {share:.2%}" for share, name in rare[:5])
    more = f" and {len(rare) - 5} more" if len(rare) > 5 else ""
    share, name = max(present)
    return (
        f"note: few pixels are of {shown}{more} (most are of {name}, {share:.0%}): "
        "--class-weights inverse_log or median_frequency, --loss cross_entropy+dice or "
        "--bootstrap [rare] help them"
    )


def _early_stopping(config: TrainConfig) -> list[Callback]:
    if config.early_stopping is None:
        return []
    from deeplab_fast.engine.callbacks import EarlyStop

    return [EarlyStop(config.early_stopping)]


def _why_early(trainer: Trainer) -> str:
    """Why a trainer that was not interrupted ended before its last step."""
    from lightning.pytorch.callbacks import EarlyStopping

    if trainer.current_epoch >= (trainer.max_epochs or 0):
        return (
            "the trainer's epochs were over: limit_train_batches or another of its arguments makes "
            "them shorter"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.wait_count >= callback.patience:
            best = float(callback.best_score)
            shown = f"{100 * best:.2f} %" if callback.monitor == "val/miou" else f"{best:.4g}"
            return (
                f"early stop: {callback.monitor} was not better than {shown} in "
                f"{callback.patience} validations"
            )
    return "early stop: a callback of the trainer asked for it"


@contextmanager
def _nothing_half_made(folder: Path, trainer: Trainer) -> Iterator[None]:
    """Takes away the folder of a run that failed before its first step, where it was new."""
    # The run's folder has no "..": each of these is made by the run, or by nobody.
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        begun = trainer.global_step or (folder / "checkpoints").exists()
        if trainer.is_global_zero and new and not begun:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in new[1:]:
                with suppress(OSError):
                    parent.rmdir()
        raise


def _module(
    config: TrainConfig, model: DeepLabV3, data: SegmentationData, tell: Callable[[str], None]
) -> tuple[SegmentationModule, int]:
    """What Lightning trains, and the steps of the run."""
    from deeplab_fast.engine.module import SegmentationModule

    preprocess = getattr(model, "preprocess", None)
    if preprocess is not None:
        data.mean, data.input_size = preprocess.mean, preprocess.size
    steps = config.steps or (config.epochs or 1) * data.steps_per_epoch
    module = SegmentationModule(
        model,
        config,
        classes=data.train.classes,
        ignore_index=data.train.ignore_index,
        class_weights=_class_weights(config, data),
        total_steps=steps,
        name=data.source_of,
        tell=tell,
    )
    return module, steps


def _tell_of_start(
    config: TrainConfig,
    module: SegmentationModule,
    data: SegmentationData,
    steps: int,
    checkpoint: Path | None,
    tell: Callable[[str], None],
) -> None:
    model = module.model
    what = f"{config.model or type(model).__name__} ({_count(model)} parameters"
    what += f", {len(module.classes)} classes)"
    start = f"resuming from {checkpoint}" if checkpoint is not None else start_text(config)
    tell(f"{what}, {start}")
    tell(
        f"{steps} steps of {config.batch_size} images, {data.steps_per_epoch} an epoch, from "
        f"{len(data.train)} images"
    )
    size = data.input_size
    if size is not None:
        what = f"a shorter side of {size}" if isinstance(size, int) else f"{size[0]}x{size[1]}"
        scaled = "training and validation" if config.transform == "paper" else "validation"
        tell(
            f"photos are brought to {what} pixels in {scaled}, as the model's predict does "
            "(--input-size 0: they stay as they are)"
        )
    images = config.batch_size // config.accumulate
    pretrained = config.weights is not None or config.weights_backbone is not None
    kept = config.freeze_batch_norm or config.freeze_backbone_statistics
    if checkpoint is None and pretrained and not kept and images < _FEW_IMAGES:
        tell(
            f"note: the batch norms' statistics are of {images} images a pass, so few that "
            "validation may get worse while the loss falls: --freeze-backbone-statistics keeps "
            "those of the weights"
        )
    unsettled = _unsettled_share(model, steps)
    if unsettled > 0.05 and config.weights is None:
        tell(
            f"warning: after {steps} steps {unsettled:.0%} of the running statistics of some batch "
            "norms are still those from before the training; train longer, or raise "
            "batch_norm_momentum"
        )


def _run(
    trainer: Trainer, module: SegmentationModule, data: SegmentationData, checkpoint: Path | None
) -> str | None:
    """Trains; why it was stopped, None at the end or after the time."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from deeplab_fast.backends import use_backend
    from deeplab_fast.engine.callbacks import Stopped

    backend = module.config.backend
    with without_hints(), use_backend(backend) if backend else nullcontext():
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        except Stopped as stop:
            return str(stop)
        # Of its own content: a key that is missing, a tensor of another shape, ...
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
            if checkpoint is None or is_no_fault_of_content(error) or not _is_restoring(error):
                raise
            raise ValueError(
                f"{checkpoint} does not fit the run ({type(error).__name__}: {shown(error, 300)}); "
                "it is damaged, or of another run: copy it again, or begin another run"
            ) from error
        # What a callback of the user's needs, a logger for instance.
        except MisconfigurationException as error:
            text = " ".join(str(error).split())
            raise OptionError("trainer", f"does not fit: {text}") from error
        finally:
            module.end_validation()
            module.drop_graphs()
    return None


def _is_restoring(error: BaseException) -> bool:
    """Whether an error came up while Lightning put a checkpoint's content into a run."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(
        Path(frame.filename).name == "checkpoint_connector.py" and "restore" in frame.name
        for frame in frames
    )


def fit_stages(
    config: TrainConfig,
    *,
    stages: int = 1,
    stage2: dict[str, Any] | None = None,
    **options: Any,
) -> list[TrainResult]:
    """:func:`fit` once, or the paper's two stages one after the other.

    With two, the stages go to ``stage1`` and ``stage2`` in ``config.output``. The second starts
    from the first one's ``model.safetensors`` with batch norm frozen, at output stride 8, with a
    tenth of the learning rate. A resumed call passes over a stage that is finished.

    Args:
        config: of the first stage.
        stages: 1 or 2.
        stage2: fields of ``TrainConfig`` that differ in the second stage beyond that.
        options: as of :func:`fit`.

    Returns:
        A result a stage; only the first where it was stopped.

    Source: arXiv 1706.05587, section 4.1.
    """
    if stages not in (1, 2):
        raise ValueError(f"stages is {stages!r}, expected 1 or 2")
    if stages == 1:
        if stage2:
            raise ValueError("stage2 has options and stages is 1; set stages to 2, or leave it out")
        return [fit(config, **options)]
    if not config.output:
        raise ValueError("output is missing: which folder shall the run go to?")
    folder = Path(config.output)
    one = config.replace(output=str(folder / "stage1"))
    two = second_stage(config, str(folder / "stage1" / "model.safetensors"), stage2 or {})
    two = two.replace(output=str(folder / "stage2"))
    results: list[TrainResult] = []
    if not (options.get("resume") and is_finished(folder / "stage1")):
        import_lightning()
        from lightning.pytorch.callbacks import LambdaCallback

        # With the run's first files: a failure before leaves nothing.
        record = LambdaCallback(
            on_train_start=lambda trainer, module: (
                write_stages(folder, stage2 or {}) if trainer.is_global_zero else None
            )
        )
        first = {**options, "callbacks": [*options.get("callbacks", ()), record]}
        results.append(fit(one, **first))
        if not results[0].finished:
            return results
    results.append(fit(two, **options))
    return results


def second_stage(config: TrainConfig, weights: str, changes: dict[str, Any]) -> TrainConfig:
    """The config of the second stage: batch norm frozen, output stride 8, a tenth of the rate."""
    values = {
        # As they are: a record has no objects of the trainer.
        **{each.name: getattr(config, each.name) for each in fields(config)},
        "weights": weights,
        "weights_part": None,
        "weights_backbone": None,
        "reset_head": False,
        "freeze_batch_norm": True,
        "batch_norm_momentum": None,
        "output_stride": 8,
        "lr": config.lr / 10,
        # Those of the first stage's stride; the weights' file tells them.
        "model_options": {
            name: value
            for name, value in config.model_options.items()
            if name not in ("atrous_rates", "output_stride")
        },
        **changes,
    }
    for one, other in (("epochs", "steps"), ("steps", "epochs")):
        if changes.get(one) is not None:
            values[other] = None
    return train_config(**values)


def validate(
    config: TrainConfig,
    *,
    model: DeepLabV3 | None = None,
    data: SegmentationData | None = None,
    progress: bool = False,
) -> Metrics:
    """The ``Metrics`` of a config's model on its validation data, as the training would score it.

    Args:
        config: ``TrainConfig``; without ``weights`` the model is untrained.
        model, data: in place of those that the config names.
        progress: a bar on stderr where that is a terminal.

    Raises:
        As :func:`fit`.
    """
    from deeplab_fast.engine.evaluate import evaluate
    from deeplab_fast.engine.sources import open_validation

    if model is None:
        config = told_by_weights(config)
    val = open_validation(config) if data is None else data.val
    if val is None:
        raise ValueError(
            "the data have no part to validate on: give --val-fraction above 0 or --val-data, in "
            "Python SegmentationData(val=...)"
        )
    if model is None:
        model = build_model(config, val.outputs, val.classes)
    on_cpu = config.trainer.get("accelerator") == "cpu" or not torch.cuda.is_available()
    return evaluate(
        model,
        val,
        output_stride=config.eval_output_stride,
        batch_size=config.val_batch_size,
        workers=config.workers,
        device="cpu" if on_cpu else "cuda",
        progress=progress,
    ).metrics


def _class_weights(config: TrainConfig, data: SegmentationData) -> Sequence[float] | None:
    weights = config.class_weights
    if weights is None or isinstance(weights, (list, tuple)):
        return weights
    if weights in NO_WEIGHTS:
        return None
    from deeplab_fast.engine.losses import WeightMethod, class_weights_from_counts

    return class_weights_from_counts(data.counted().pixels, cast(WeightMethod, weights))


def _metrics_of(
    exported: str | None, module: SegmentationModule, saver: RunCheckpoint
) -> Metrics | None:
    """Of the exported weights; of the last validation where nothing was exported."""
    from deeplab_fast.engine.metrics import Metrics

    if exported != "best" and module.metrics is not None:
        return module.metrics
    counts = saver.best_confusion if exported == "best" else saver.last_confusion
    if counts is None:
        return None
    # Where logits were not finite there is no score, and no best.
    return Metrics.from_confusion(counts, module.classes.classes)


def _export(
    config: TrainConfig,
    folder: Path,
    module: SegmentationModule,
    saver: RunCheckpoint | None,
    tell: Callable[[str], None],
) -> Path:
    """Writes model.safetensors, at the output stride of the validation: the best of ``saver``."""
    from deeplab_fast.engine.runner import at_output_stride
    from deeplab_fast.weights import load_weights, save_weights

    model = module.model
    if saver is not None:
        load_weights(model, saver.best_path)
    elif config.export == "best":
        tell("no validation had a mIoU: model.safetensors has the last weights")
    stride = config.eval_output_stride
    with at_output_stride(model, stride) as strided, _without_class_weights(config, module):
        try:
            return save_weights(strided, folder / "model.safetensors", strict=False)
        except OSError as error:
            if is_full(error):
                raise OSError(
                    error.errno,
                    f"no space left for {folder / 'model.safetensors'}; the checkpoints are whole: "
                    "make room, then write it with --resume",
                ) from error
            raise


@contextmanager
def _without_class_weights(config: TrainConfig, module: SegmentationModule) -> Iterator[None]:
    """The model with `undo_class_weights` times the log of the class weights off its last bias."""
    shift = module.taken_back()
    if shift is None:
        yield
        return
    last = [m for m in module.model.classifier.modules() if isinstance(m, nn.Conv2d)][-1]
    if last.bias is None:
        raise ValueError(
            "undo_class_weights: the model's last convolution has no bias; set it to 0"
        )
    before = last.bias.detach().clone()
    with torch.no_grad():
        last.bias += shift.to(before)
    try:
        yield
    finally:
        with torch.no_grad():
            last.bias.copy_(before)


def _unsettled_share(model: nn.Module, steps: int) -> float:
    """The largest weight that a batch norm's first statistics have left after so many steps."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    shares = [
        (1.0 - layer.momentum) ** steps
        for layer in layers
        if layer.momentum is not None and not getattr(layer, "frozen_statistics", False)
    ]
    return max(shares, default=0.0)


def _count(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
