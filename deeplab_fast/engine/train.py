"""Training runs: from a config to a folder with weights, metrics and checkpoints."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from deeplab_fast.engine.config import TrainConfig, train_config
from deeplab_fast.engine.run_folder import (
    TrainResult,
    check_resumable,
    checkpoint_to_resume,
    is_finished,
    write_result,
    write_run_files,
)
from deeplab_fast.engine.trainer import (
    TrainingUnavailable,
    import_lightning,
    is_first,
    new_trainer,
    without_hints,
)

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

    from deeplab_fast.data.classes import ClassSet
    from deeplab_fast.engine.callbacks import RunCheckpoint
    from deeplab_fast.engine.datamodule import SegmentationData
    from deeplab_fast.engine.metrics import Metrics
    from deeplab_fast.engine.module import SegmentationModule
    from deeplab_fast.models import DeepLabV3

__all__ = ["TrainResult", "TrainingUnavailable", "build_model", "fit", "fit_stages", "validate"]


def build_model(
    config: TrainConfig, num_classes: int, classes: ClassSet | None = None
) -> DeepLabV3:
    """The model that a config names, with its start weights and the classes of the data.

    Args:
        config: ``TrainConfig``.
        num_classes: logits of the model: the data set's ``outputs``.
        classes: ``ClassSet`` put on the model.

    Raises:
        ValueError, OSError: options or weights that do not fit.
    """
    from deeplab_fast.models import get_model
    from deeplab_fast.weights import from_checkpoint, inspect_weights

    options: dict[str, Any] = {}
    if config.weights is not None:
        found = inspect_weights(config.weights, part=config.weights_part)
        if found.model == config.model:
            options.update(found.options)
    options.update(config.model_options)
    stride = config.output_stride
    # Rates that the file tells are at the file's stride, and change with set_output_stride; those
    # of the config and of the builder are at the training's.
    of_file = {"output_stride", "atrous_rates"} & options.keys()
    if stride is not None and ("atrous_rates" in config.model_options or not of_file):
        options["output_stride"] = stride
    if config.aux_weight:
        options["aux_loss"] = True
    if config.weights_backbone is not None:
        options["weights_backbone"] = config.weights_backbone
    torch.manual_seed(config.seed)
    try:
        # The builder refuses what from_checkpoint would take for its own arguments.
        own = signature(from_checkpoint).parameters.keys() & config.model_options.keys()
        if config.weights is None or own:
            built = get_model(config.model, num_classes=num_classes, **options)
        else:
            built = from_checkpoint(
                config.weights,
                model=config.model,
                part=config.weights_part,
                reset_head=config.reset_head,
                num_classes=num_classes,
                **options,
            )
    except TypeError as error:
        raise ValueError(f"model_options: {error}") from error
    model = cast("DeepLabV3", built)
    if stride is not None and model.output_stride != stride:
        model.set_output_stride(stride)
    if config.input_size is not None:
        model.preprocess = dataclasses.replace(model.preprocess, size=config.input_size)
    if classes is not None:
        model.classes = tuple(classes.classes)
        model.palette = None if classes.palette is None else tuple(classes.palette)
    return model


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
    ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/last.ckpt`` and ``best.ckpt``, and at the end
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
            has their rule); by default they are printed. The first process tells.
        quiet: prints nothing.
        progress: a bar on stderr in place of the lines of the steps; by default where stderr is a
            terminal.

    Raises:
        TrainingUnavailable: Lightning cannot be imported.
        ValueError, OSError: options, data, weights or a checkpoint that do not fit.
        NonFiniteLoss: a loss that is nan or infinite; names the batch.
        CaptureFailed: with ``config.cuda_graph`` a step that waits for the device.
        MemoryError: names the batch and what to lower.
        CheckpointNotWritten: a full disk; the former checkpoint is whole.
    """
    import_lightning()
    from deeplab_fast.backends import use_backend
    from deeplab_fast.engine import callbacks as parts
    from deeplab_fast.engine.averaging import ExponentialAverage
    from deeplab_fast.engine.progress import Progress
    from deeplab_fast.engine.sources import training_transform, write_split

    tell, progress = _speech(tell, quiet, progress)
    if not config.output:
        raise ValueError("output is missing: which folder shall the run go to?")
    if config.epochs is None and config.steps is None:
        raise ValueError("epochs or steps is missing: how long shall the training be?")
    folder = Path(config.output)
    checkpoint = checkpoint_to_resume(folder, resume)
    with use_backend(config.backend or "auto"):
        training_transform(config)
    data = _checked_data(config, data, tell, progress)
    if model is None:
        model = build_model(config, data.train.outputs, data.train.classes)
    module, steps = _module(config, model, data, tell)
    saver = parts.RunCheckpoint(
        folder / "checkpoints",
        minutes=config.checkpoint_minutes,
        max_seconds=config.max_seconds,
        max_steps=steps,
    )
    average = ExponentialAverage(config.ema) if config.ema else None
    with without_hints():
        trainer = new_trainer(
            config,
            folder,
            epochs=math.ceil(steps / data.steps_per_epoch),
            validates=data.val is not None and config.val_every > 0,
            callbacks=[
                *([average] if average is not None else []),
                parts.MetricsFile(folder / "metrics.jsonl", config.log_every),
                Progress(tell, steps, saver, every=config.log_every, bar=progress),
                *callbacks,
                saver,
            ],
            tell=tell,
        )
    if checkpoint is not None:
        check_resumable(checkpoint, config, tell)
    if trainer.is_global_zero:
        write_run_files(folder, config)
        moved = write_split(data.train, data.val, folder / "split.csv")
        if moved and checkpoint is not None:
            tell(f"warning: {moved}")
    _tell_of_start(config, module, data, steps, checkpoint, tell)
    stopped = _run(trainer, module, data, checkpoint)
    weights = exported = None
    averaged = None if average is None else average.averaged
    trained = module if averaged is None else averaged
    if stopped is None:
        best = config.export == "best" and saver.best_score is not None
        best = best and saver.best_path.exists()
        exported = "best" if best else "last"
        if trainer.is_global_zero:
            weights = _export(config, folder, trained, saver if best else None, tell)
    if saver.out_of_time:
        stopped = f"stopped after {config.max_time}"
    result = TrainResult(
        folder=folder,
        weights=weights,
        last_checkpoint=saver.last_path,
        best_checkpoint=saver.best_path if saver.best_path.exists() else None,
        steps=trainer.global_step,
        miou=None if module.metrics is None else module.metrics.miou,
        best_miou=saver.best_score,
        finished=stopped is None,
        stopped=stopped,
        metrics=_metrics_of(exported, module, saver),
        last_metrics=module.metrics,
        exported=exported,
        exported_step={"best": saver.best_step, "last": trainer.global_step}.get(exported or ""),
    )
    if trainer.is_global_zero:
        write_result(result)
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


def _checked_data(
    config: TrainConfig,
    data: SegmentationData | None,
    tell: Callable[[str], None],
    progress: bool,
) -> SegmentationData:
    """The data to train on, checked where the config says so and bootstrapped."""
    from deeplab_fast.engine.datamodule import SegmentationData

    if data is None:
        data = SegmentationData(config)
    for note in data.train.notes:
        tell(note)
    # The other processes end with this one.
    if config.check_data and is_first():
        data.check(progress=progress, tell=tell)
    data.bootstrap()
    if data.steps_per_epoch < 1:
        raise ValueError(
            f"batch_size is {config.batch_size} and there are {len(data.train)} images to train "
            f"on; use at most {len(data.train)}"
        )
    return data


def _module(
    config: TrainConfig, model: DeepLabV3, data: SegmentationData, tell: Callable[[str], None]
) -> tuple[SegmentationModule, int]:
    """What Lightning trains, and the steps of the run."""
    from deeplab_fast.engine.module import SegmentationModule

    preprocess = getattr(model, "preprocess", None)
    if preprocess is not None:
        data.mean = preprocess.mean
    steps = config.steps or (config.epochs or 0) * data.steps_per_epoch
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
    first = "resuming from" if checkpoint is not None else "training"
    tell(
        f"{first} {checkpoint or type(model).__name__}: {steps} steps of {config.batch_size} "
        f"images, {data.steps_per_epoch} an epoch, {_count(model)} parameters"
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
    from deeplab_fast.backends import use_backend
    from deeplab_fast.engine.callbacks import Stopped

    backend = module.config.backend
    with without_hints(), use_backend(backend) if backend else nullcontext():
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        except Stopped as stop:
            return str(stop)
        finally:
            module.end_validation()
            module.drop_graphs()
    return None


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
        results.append(fit(one, **options))
        if not results[0].finished:
            return results
    results.append(fit(two, **options))
    return results


def second_stage(config: TrainConfig, weights: str, changes: dict[str, Any]) -> TrainConfig:
    """The config of the second stage: batch norm frozen, output stride 8, a tenth of the rate."""
    values = {
        **config.as_dict(),
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

    val = open_validation(config) if data is None else data.val
    if val is None:
        raise ValueError("the data have no part to validate on; pass SegmentationData(val=...)")
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
    if weights in ("none", "null", ""):
        return None
    from deeplab_fast.engine.losses import WeightMethod, class_weights_from_counts

    return class_weights_from_counts(data.counted().pixels, cast(WeightMethod, weights))


def _metrics_of(
    exported: str | None, module: SegmentationModule, saver: RunCheckpoint
) -> Metrics | None:
    """Of the exported weights; of the last validation where nothing was exported."""
    from deeplab_fast.engine.metrics import Metrics

    if exported != "best":
        return module.metrics
    if saver.best_confusion is None:
        return None
    # Where logits were not finite there is no score, and no best.
    return Metrics.from_confusion(saver.best_confusion, module.classes.classes)


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
    with at_output_stride(model, stride), _without_class_weights(config, module):
        try:
            return save_weights(model, folder / "model.safetensors", strict=False)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
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
