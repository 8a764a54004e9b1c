"""Training runs: from a config to a folder with weights, metrics and checkpoints."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["TrainResult", "TrainingUnavailable", "build_model", "fit", "fit_stages", "validate"]

# Of the options only these may differ in a resumed run without changing its result.
_FREE = frozenset(
    {
        "output",
        "workers",
        "max_time",
        "checkpoint_minutes",
        "export",
        "log_every",
        "tensorboard",
        "check_data",
        "val_batch_size",
        "backend",
        "trainer",
        "root",
        "val_root",
        "weights",
        "weights_part",
        "weights_backbone",
        "reset_head",
    }
)


class TrainingUnavailable(ImportError):
    """Lightning is missing, or cannot be imported; the message says what to install."""


@dataclass(frozen=True)
class TrainResult:
    """What :func:`fit` made.

    ``miou`` and ``best_miou`` are of the last and the best validation, None without one.
    ``finished`` is False where the wall time or a signal ended the run; it goes on with
    ``resume=True``.
    """

    folder: Path
    weights: Path | None
    last_checkpoint: Path
    best_checkpoint: Path | None
    steps: int
    miou: float | None
    best_miou: float | None
    finished: bool
    stopped: str | None = None
    metrics: Any = None


def import_lightning() -> Any:
    """The module ``lightning``.

    Raises:
        TrainingUnavailable: it is not installed, or torchvision, which it imports where there is
            one, does not fit this PyTorch.
    """
    try:
        import lightning
    except ImportError as error:
        raise TrainingUnavailable(
            f"training needs Lightning, which cannot be imported ({error}): "
            "pip install deeplab_fast[train]"
        ) from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        raise TrainingUnavailable(
            f"Lightning cannot be imported: the installed torchvision does not fit PyTorch "
            f"{torch.__version__} ({error}). Install the torchvision of this PyTorch build, or "
            "remove it (pip uninstall torchvision): training does not need it"
        ) from error
    return lightning


def build_model(config: Any, num_classes: int, classes: Any = None) -> nn.Module:
    """The model that a config names, with its start weights and the classes of the data.

    Args:
        config: ``TrainConfig``.
        num_classes: logits of the model: the data set's ``outputs``.
        classes: ``ClassSet`` put on the model.

    Raises:
        ValueError, OSError: options or weights that do not fit.
    """
    from deeplab_fast.models import get_model
    from deeplab_fast.weights import inspect_weights, model_from_file

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
        if config.weights is None:
            model: Any = get_model(config.model, num_classes=num_classes, **options)
        else:
            model = model_from_file(
                config.weights,
                config.model,
                part=config.weights_part,
                reset_head=config.reset_head,
                num_classes=num_classes,
                **options,
            )
    except TypeError as error:
        raise ValueError(f"model_options: {error}") from error
    if stride is not None and model.output_stride != stride:
        model.set_output_stride(stride)
    if config.input_size is not None:
        model.preprocess = dataclasses.replace(model.preprocess, size=config.input_size)
    if classes is not None:
        model.classes = tuple(classes.classes)
        model.palette = None if classes.palette is None else tuple(classes.palette)
    return model


def fit(
    config: Any,
    *,
    resume: bool | str | os.PathLike[str] = False,
    model: nn.Module | None = None,
    data: Any = None,
    callbacks: Any = (),
    tell: Callable[[str], None] | None = None,
    progress: bool = False,
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
        tell: takes lines about the progress.
        progress: Lightning's progress bar.

    Raises:
        TrainingUnavailable: Lightning cannot be imported.
        ValueError, OSError: options, data, weights or a checkpoint that do not fit.
        NonFiniteLoss: a loss that is nan or infinite; names the batch.
        MemoryError: names the batch and what to lower.
        CheckpointNotWritten: a full disk; the former checkpoint is whole.
    """
    import_lightning()
    from deeplab_fast import use_backend
    from deeplab_fast.engine import callbacks as parts
    from deeplab_fast.engine.datamodule import SegmentationData
    from deeplab_fast.engine.module import SegmentationModule
    from deeplab_fast.engine.sources import training_transform

    tell = tell or (lambda text: None)
    if not config.output:
        raise ValueError("output is missing: which folder shall the run go to?")
    if config.epochs is None and config.steps is None:
        raise ValueError("epochs or steps is missing: how long shall the training be?")
    folder = Path(config.output)
    checkpoint = _checkpoint_to_resume(folder, resume)
    with use_backend(config.backend or "auto"):
        training_transform(config)
    if data is None:
        data = SegmentationData(config)
    # The other processes end with this one.
    if config.check_data and is_first():
        tell(f"checking {data.train}" + (f" and {data.val}" if data.val is not None else ""))
        data.check(progress=progress, tell=tell)
    data.bootstrap()
    if model is None:
        model = build_model(config, data.train.outputs, data.train.classes)
    preprocess: Any = getattr(model, "preprocess", None)
    if preprocess is not None:
        data.mean = preprocess.mean
    if data.steps_per_epoch < 1:
        raise ValueError(
            f"batch_size is {config.batch_size} and there are {len(data.train)} images to train "
            f"on; use at most {len(data.train)}"
        )
    steps = config.steps or config.epochs * data.steps_per_epoch
    module = SegmentationModule(
        model,
        config,
        classes=data.train.classes,
        ignore_index=data.train.ignore_index,
        class_weights=_class_weights(config, data),
        total_steps=steps,
        name=data.source_of,
    )
    saver = parts.RunCheckpoint(
        folder / "checkpoints",
        minutes=config.checkpoint_minutes,
        max_seconds=config.max_seconds,
        max_steps=steps,
    )
    average = parts.ExponentialAverage(config.ema) if config.ema else None
    with _quiet():
        trainer = _trainer(
            config,
            folder,
            epochs=math.ceil(steps / data.steps_per_epoch),
            validates=data.val is not None and config.val_every > 0,
            callbacks=[
                *([average] if average is not None else []),
                parts.MetricsFile(folder / "metrics.jsonl", config.log_every),
                parts.Progress(tell, steps, saver),
                *callbacks,
                saver,
            ],
            loggers=_tensorboard(config, folder, tell),
            progress=progress,
        )
    if checkpoint is not None:
        _check_resumable(checkpoint, config, tell)
    if trainer.is_global_zero:
        _write_run_files(folder, config)
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
    stopped = None
    with _quiet(), use_backend(config.backend) if config.backend else nullcontext():
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        except parts.Stopped as stop:
            stopped = str(stop)
        finally:
            module.end_validation()
    weights = None
    finished = stopped is None and not saver.out_of_time
    if stopped is None and trainer.is_global_zero:
        averaged = None if average is None else average.averaged
        weights = _export(config, folder, module if averaged is None else averaged, saver, tell)
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
        finished=finished,
        stopped=stopped,
        metrics=module.metrics,
    )
    if trainer.is_global_zero:
        _write_result(result)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # A second stage reads what the first process wrote.
        torch.distributed.barrier()
    return result


def fit_stages(
    config: Any,
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
    if not (options.get("resume") and _is_finished(folder / "stage1")):
        results.append(fit(one, **options))
        if not results[0].finished:
            return results
    results.append(fit(two, **options))
    return results


def second_stage(config: Any, weights: str, changes: dict[str, Any]) -> Any:
    """The config of the second stage: batch norm frozen, output stride 8, a tenth of the rate."""
    from deeplab_fast.engine.config import train_config

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
    config: Any,
    *,
    model: nn.Module | None = None,
    data: Any = None,
    progress: bool = False,
) -> Any:
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


def _trainer(
    config: Any,
    folder: Path,
    *,
    epochs: int,
    validates: bool,
    callbacks: list[Any],
    loggers: list[Any],
    progress: bool,
) -> Any:
    from deeplab_fast.engine.callbacks import AtomicCheckpointIO, new_trainer

    given = {**_launched(), **config.trainer}
    arguments: dict[str, Any] = {
        "default_root_dir": str(folder),
        "max_epochs": epochs,
        "accumulate_grad_batches": config.accumulate,
        "gradient_clip_val": config.clip_norm,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": max(1, config.val_every),
        "limit_val_batches": 1.0 if validates else 0,
        "log_every_n_steps": config.log_every,
        "enable_progress_bar": progress,
        "enable_model_summary": False,
        "benchmark": not given.get("deterministic", False),
        # Frozen batch norms have nothing to share.
        "sync_batchnorm": not config.freeze_batch_norm and _several_gpus(given),
    }
    taken = sorted(set(given) & {"max_epochs", "max_steps", "accumulate_grad_batches", "max_time"})
    if taken:
        raise ValueError(
            f"trainer.{taken[0]}: use the options epochs, steps, accumulate and max_time instead"
        )
    lists = {"callbacks": callbacks, "logger": loggers, "plugins": [AtomicCheckpointIO()]}
    for name, own in lists.items():
        extra = given.pop(name, None) or []
        arguments[name] = [*own, *(extra if isinstance(extra, (list, tuple)) else [extra])]
    # An empty list would mean Lightning's own logger.
    arguments["logger"] = arguments["logger"] or False
    return new_trainer(**{**arguments, **given})


def _launched() -> dict[str, Any]:
    """Trainer arguments for the processes that torchrun or SLURM has started."""
    from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    each, nodes = 1, 1
    if TorchElasticEnvironment.detect():
        each = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        nodes = int(os.environ.get("WORLD_SIZE", "1")) // each
    elif SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        each = int(os.environ.get("SLURM_NTASKS", "1")) // nodes
    if each * nodes == 1:
        return {}
    return {"devices": each, "num_nodes": nodes, "strategy": "ddp"}


def _several_gpus(given: dict[str, Any]) -> bool:
    if given.get("accelerator", "auto") not in ("auto", "gpu", "cuda"):
        return False
    if not torch.cuda.is_available():
        return False
    devices = given.get("devices", "auto")
    if devices in ("auto", -1, "-1"):
        count = torch.cuda.device_count()
    elif isinstance(devices, str) and "," in devices:
        count = len([part for part in devices.split(",") if part])
    else:
        count = len(devices) if isinstance(devices, (list, tuple)) else int(devices)
    return count * int(given.get("num_nodes", 1)) > 1


def _tensorboard(config: Any, folder: Path, tell: Callable[[str], None]) -> list[Any]:
    if not config.tensorboard:
        return []
    from lightning.pytorch.loggers import TensorBoardLogger

    try:
        return [TensorBoardLogger(str(folder), name="tensorboard", version="")]
    except ModuleNotFoundError:
        tell("no TensorBoard logs: pip install tensorboard, or tensorboard=false")
        return []


def _class_weights(config: Any, data: Any) -> Any:
    weights = config.class_weights
    if weights is None or isinstance(weights, (list, tuple)):
        return weights
    if weights in ("none", "null", ""):
        return None
    from deeplab_fast.engine.losses import class_weights_from_counts

    return class_weights_from_counts(data.counted().pixels, weights)


def _checkpoint_to_resume(folder: Path, resume: bool | str | os.PathLike[str]) -> Path | None:
    last = folder / "checkpoints" / "last.ckpt"
    if isinstance(resume, (str, os.PathLike)):
        if not Path(resume).is_file():
            raise FileNotFoundError(f"resume: no such checkpoint: {resume}")
        return Path(resume)
    if resume:
        return last if last.exists() else None
    if last.exists() or (folder / "model.safetensors").exists():
        raise ValueError(
            f"{folder} holds a run already; go on with it (--resume), or name another folder"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file; name a folder")
    return None


def _check_resumable(path: Path, config: Any, tell: Callable[[str], None]) -> None:
    """Tells which options differ from the checkpoint's."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        before = dict(content["train_config"])
    except Exception as error:
        raise ValueError(
            f"{path} is no checkpoint of a training run ({' '.join(str(error).split())[:200]})"
        ) from error
    now = json.loads(json.dumps(config.as_dict()))
    # An option that the run's version did not have was what is now its default.
    before = json.loads(json.dumps({**type(config)().as_dict(), **before}))
    changed = [
        f"{name} {before.get(name)!r} -> {value!r}"
        for name, value in now.items()
        if name not in _FREE and before.get(name) != value
    ]
    if changed:
        tell(
            "warning: other options than the run began with, its result will differ from an "
            f"uninterrupted one: {', '.join(changed)}"
        )


def _write_run_files(folder: Path, config: Any) -> None:
    from deeplab_fast.engine.config import to_yaml
    from deeplab_fast.engine.outputs import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    text = to_yaml(config.as_dict())
    versions = json.dumps(_versions(), indent=2) + "\n"
    write_atomically(
        [
            (folder / "config.yaml", lambda file: file.write(text.encode("utf-8"))),
            (folder / "versions.json", lambda file: file.write(versions.encode("utf-8"))),
        ]
    )


def _write_result(result: TrainResult) -> None:
    from deeplab_fast.engine.outputs import write_atomically

    values = {
        "finished": result.finished,
        "stopped": result.stopped,
        "steps": result.steps,
        "val_miou": result.miou,
        "best_val_miou": result.best_miou,
        "metrics": None if result.metrics is None else result.metrics.as_dict(),
    }
    # JSON has no nan, the mIoU of no labels.
    known = {k: None if v != v else v for k, v in values.items()}
    text = json.dumps(known, indent=2, allow_nan=False) + "\n"
    path = result.folder / "result.json"
    write_atomically([(path, lambda file: file.write(text.encode("utf-8")))])


def _is_finished(folder: Path) -> bool:
    """Whether a run in this folder came to its end."""
    try:
        return bool(json.loads((folder / "result.json").read_text())["finished"])
    except (OSError, ValueError, KeyError):
        return False


def _versions() -> dict[str, Any]:
    import lightning
    import numpy

    from deeplab_fast import __version__

    found: dict[str, Any] = {
        "deeplab_fast": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": lightning.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        or [f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"],
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    return found


def _commit() -> str | None:
    """The commit of the checkout that the package lies in, with "+changes"; None without one."""
    here = Path(__file__).resolve().parent
    if not (here.parent.parent / ".git").exists():
        return None
    try:
        run: dict[str, Any] = {"cwd": here, "capture_output": True, "text": True, "timeout": 10}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run, check=True).stdout.strip()
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        changes = subprocess.run(status, **run, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")


def _export(
    config: Any, folder: Path, module: Any, saver: Any, tell: Callable[[str], None]
) -> Path:
    """Writes model.safetensors, at the output stride of the validation."""
    from deeplab_fast.engine.runner import at_output_stride
    from deeplab_fast.weights import load_weights, save_weights

    model = module.model
    if config.export == "best":
        if saver.best_path.exists():
            load_weights(model, saver.best_path)
        else:
            tell("warning: no validation had a mIoU, so the last weights are saved, not the best")
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
def _without_class_weights(config: Any, module: Any) -> Iterator[None]:
    """The model with `undo_class_weights` times the log of the class weights off its last bias."""
    part, weights = config.undo_class_weights, module.loss.class_weights
    if not part or weights is None:
        yield
        return
    last = [m for m in module.model.classifier.modules() if isinstance(m, nn.Conv2d)][-1]
    if last.bias is None:
        raise ValueError(
            "undo_class_weights: the model's last convolution has no bias; set it to 0"
        )
    before = last.bias.detach().clone()
    with torch.no_grad():
        # A class of weight 0 was never trained: its logit stays.
        logs = weights.to(before).where(weights.to(before) > 0, 1.0).log()
        # The one logit of one class is the difference of the two.
        last.bias -= part * (logs if len(before) > 1 else logs[1:] - logs[:1])
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


def is_first() -> bool:
    """Whether this is the first of several processes, before they are joined."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) in (None, 0)


def _count(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's hints on how to train faster are not for the users of this package."""
    import warnings

    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    before = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for text in (
                r".*does not have many workers.*",
                r".*in eval mode at the start of training.*",
                r".*smaller than the logging interval.*",
                r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
            ):
                warnings.filterwarnings("ignore", text)
            yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)
