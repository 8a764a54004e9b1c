"""Lightning's trainer as a training run wants it, in the processes that were started."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from deeplab_fast._documents import shown
from deeplab_fast.engine.config import MADE_IN_PYTHON, OptionError, TrainConfig, did_you_mean
from deeplab_fast.engine.imports import path_of_lightning

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loggers import Logger

__all__ = [
    "TrainingUnavailable",
    "backends_restored",
    "import_lightning",
    "is_first",
    "new_trainer",
    "trainer_arguments",
    "without_hints",
]


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


# Arguments of lightning.Trainer that may be objects, which belong to one trainer.
_OBJECTS = ("callbacks", "logger", "strategy", "profiler", "plugins")
# Of lightning.Trainer's arguments those that options of the package stand for.
_OURS = ("max_epochs", "max_steps", "accumulate_grad_batches", "max_time")


def trainer_arguments(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """``config.trainer`` as ``lightning.Trainer`` takes it.

    Callbacks, loggers, a strategy and a profiler may be objects, or be named by class, as
    jsonargparse has it: an import path or the name of one of Lightning's, or a mapping with
    ``class_path`` and ``init_args``. Loggers write into the run's folder where they are not told
    another ``save_dir``.

    Raises:
        OptionError: an argument that there is not, or a class that cannot be made.
    """
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy

    given = dict(config.trainer)
    known = signature(Trainer).parameters
    for name in given:
        if name in _OURS:
            raise OptionError(
                f"trainer.{name}", "is set by the options epochs, steps, accumulate and max_time"
            )
        if name not in known:
            raise OptionError(
                f"trainer.{name}",
                f"is no argument of lightning.Trainer{did_you_mean(name, known)}",
            )
    _check_processes(given)
    _check_trainer({k: v for k, v in given.items() if k not in _OBJECTS})
    kinds: dict[str, tuple[type, bool]] = {
        "callbacks": (Callback, True),
        "logger": (Logger, True),
        "strategy": (Strategy, False),
        "profiler": (Profiler, False),
    }
    for name, (kind, several) in kinds.items():
        value = given.get(name)
        # Lightning has names of its own for these two.
        if value is None or isinstance(value, bool) or (not several and isinstance(value, str)):
            continue
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        made = [_made(f"trainer.{name}", kind, each, folder) for each in values]
        given[name] = made if several else made[0]
    return given


def _check_processes(given: Mapping[str, Any]) -> None:
    """As many devices as there are, before a process is started for each."""
    nodes = given.get("num_nodes", 1)
    if not isinstance(nodes, int) or isinstance(nodes, bool) or not 1 <= nodes <= _MOST_NODES:
        raise OptionError(
            "trainer.num_nodes", f"is {shown(nodes)}, expected 1 to {_MOST_NODES} machines"
        )
    devices = given.get("devices", "auto")
    if devices in ("auto", -1, "-1") or devices is None:
        return
    on_gpu = given.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    gpus = torch.cuda.device_count() if on_gpu else 0
    # On CPUs more than there are of them are slow, and still right.
    most = gpus or max(_PROCESSES, 4 * (os.cpu_count() or 1))
    what = "GPUs of this machine" if gpus else "processes on this machine"
    if isinstance(devices, str):
        devices = (
            [each for each in devices.split(",") if each.strip()] if "," in devices else devices
        )
    try:
        count = len(devices) if isinstance(devices, (list, tuple)) else int(devices)
    except (TypeError, ValueError):
        # What it takes is Lightning's to say; of thousands of digits Python makes no number.
        count = 1 if len(str(devices)) < 20 else most + 1
    if not 1 <= count <= most:
        raise OptionError("trainer.devices", f"is {shown(devices)}, expected 1 to {most} {what}")


_MOST_NODES = 10_000
# Each takes some 0.5 GB before it has a model.
_PROCESSES = 64


def _check_trainer(arguments: Mapping[str, Any]) -> None:
    import lightning

    if not arguments:
        return
    with without_hints():
        _trainer_of(lightning, {**arguments, "logger": False, "enable_checkpointing": False})


def _trainer_of(lightning: ModuleType, arguments: Mapping[str, Any]) -> Trainer:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        return lightning.Trainer(**arguments)
    except (MisconfigurationException, TypeError, ValueError, ImportError) as error:
        raise OptionError("trainer", f"does not fit: {error}") from error


def _made(option: str, kind: type, value: object, folder: Path) -> object:
    """An object of this kind, from itself or from a name of its class and arguments."""
    if isinstance(value, kind):
        return value
    if isinstance(value, Mapping) and value.get(MADE_IN_PYTHON):
        raise OptionError(
            option,
            f"has {value.get('class_path')}, which was made in Python, so that its arguments are "
            "not in this record: give class_path and init_args",
        )
    if not isinstance(value, (str, Mapping)):
        raise OptionError(
            option,
            f"has {value!r}, expected a {kind.__name__}, the import path of one, or class_path and "
            "init_args",
        )
    from jsonargparse import ArgumentParser

    own = _classes_beside(kind)
    spec: dict[str, Any] = {"class_path": value} if isinstance(value, str) else dict(value)
    name = str(spec.get("class_path"))
    spec["class_path"] = path_of_lightning(name)
    if "." not in name and name not in own:
        raise OptionError(
            option, f"has {name}, which Lightning does not have{did_you_mean(name, own)}"
        )
    if name in own and "save_dir" in signature(own[name]).parameters:
        spec["init_args"] = {"save_dir": str(folder), **(spec.get("init_args") or {})}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=kind)
    try:
        return parser.instantiate(parser.parse_object({"it": spec}))["it"]
    # The class's own code may raise anything.
    except Exception as error:
        text = " ".join(str(error).split()).removeprefix('Parser key "it":')
        text = text.rpartition("Problem with given class_path")[2].strip(" :")[:400]
        raise OptionError(option, f"has {name}, which cannot be made: {text}") from error


def _classes_beside(kind: type) -> dict[str, type]:
    """Lightning's own classes of this kind by name, imported: only so can their names be short."""
    package = importlib.import_module(".".join(kind.__module__.split(".")[:3]))
    return {
        name: each
        for name in dir(package)
        if isinstance(each := getattr(package, name), type) and issubclass(each, kind)
    }


def new_trainer(
    config: TrainConfig,
    folder: Path,
    *,
    arguments: Mapping[str, Any],
    epochs: int,
    validates: bool,
    callbacks: list[Callback],
    tell: Callable[[str], None],
) -> Trainer:
    """``lightning.Trainer`` with the config's options, and ``trainer_arguments`` above them.

    Raises:
        ValueError: arguments that the trainer does not take.
    """
    import lightning
    from lightning.pytorch.callbacks import ProgressBar

    from deeplab_fast.engine.callbacks import AtomicCheckpointIO

    given = {**_launched(), **arguments}
    values: dict[str, Any] = {
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
    lists: dict[str, Sequence[object]] = {
        "callbacks": callbacks,
        "logger": _tensorboard(config, folder, tell),
        "plugins": [AtomicCheckpointIO()],
    }
    if given.get("logger") is False:
        lists["logger"] = []
    for name, own in lists.items():
        extra = given.pop(name, None)
        more = [] if extra is None or isinstance(extra, bool) else extra
        values[name] = [*own, *(more if isinstance(more, (list, tuple)) else [more])]
    # The run has a bar of its own.
    bars = [each for each in values["callbacks"] if isinstance(each, ProgressBar)]
    values["enable_progress_bar"] = bool(bars)
    # An empty list would mean Lightning's own logger.
    values["logger"] = values["logger"] or False
    return _trainer_of(lightning, {**values, **given})


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
def backends_restored() -> Iterator[None]:
    """Gives PyTorch's backends back as they were: a trainer sets them for the whole process."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before[:2]
        torch.use_deterministic_algorithms(before[2], warn_only=warns)


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
