"""Lightning's trainer as a training run wants it, in the processes that were started."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from deeplab_fast.engine.config import TrainConfig

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loggers import Logger

__all__ = ["TrainingUnavailable", "import_lightning", "is_first", "new_trainer", "without_hints"]


class TrainingUnavailable(ImportError):
    """Lightning is missing, or cannot be imported; the message says what to install."""


def import_lightning() -> ModuleType:
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


def new_trainer(
    config: TrainConfig,
    folder: Path,
    *,
    epochs: int,
    validates: bool,
    callbacks: list[Callback],
    tell: Callable[[str], None],
) -> Trainer:
    """``lightning.Trainer`` with the config's options and those that the user gave it.

    Raises:
        ValueError: arguments that the trainer does not take.
    """
    import lightning
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import ProgressBar

    from deeplab_fast.engine.callbacks import AtomicCheckpointIO

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
    lists: dict[str, Sequence[object]] = {
        "callbacks": callbacks,
        "logger": _tensorboard(config, folder, tell),
        "plugins": [AtomicCheckpointIO()],
    }
    for name, own in lists.items():
        extra = given.pop(name, None) or []
        arguments[name] = [*own, *(extra if isinstance(extra, (list, tuple)) else [extra])]
    # The run has a bar of its own.
    bars = [each for each in arguments["callbacks"] if isinstance(each, ProgressBar)]
    arguments["enable_progress_bar"] = bool(bars)
    # An empty list would mean Lightning's own logger.
    arguments["logger"] = arguments["logger"] or False
    try:
        return lightning.Trainer(**{**arguments, **given})
    except (MisconfigurationException, TypeError, ValueError, ImportError) as error:
        raise ValueError(f"trainer: {error}") from error


def _launched() -> dict[str, int | str]:
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


def _several_gpus(given: Mapping[str, Any]) -> bool:
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


def _tensorboard(config: TrainConfig, folder: Path, tell: Callable[[str], None]) -> list[Logger]:
    if not config.tensorboard:
        return []
    from lightning.pytorch.loggers import TensorBoardLogger

    try:
        return [TensorBoardLogger(str(folder), name="tensorboard", version="")]
    except ModuleNotFoundError:
        tell("no TensorBoard logs: pip install tensorboard, or tensorboard=false")
        return []


def is_first() -> bool:
    """Whether this is the first of several processes, before they are joined."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) in (None, 0)


@contextmanager
def without_hints() -> Iterator[None]:
    """Lightning's hints on how to train faster are not for the users of this package."""
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
