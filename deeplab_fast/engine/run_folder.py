"""The folder of a training run: what it holds, what it can be resumed from, how it ended."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deeplab_fast.dispatch.files import write_atomically
from deeplab_fast.engine.config import OptionError, TrainConfig, to_yaml
from deeplab_fast.weights import read_content

if TYPE_CHECKING:
    from deeplab_fast.engine.metrics import Metrics

__all__ = [
    "TrainResult",
    "check_resumable",
    "checkpoint_to_resume",
    "config_beside",
    "finished_result",
    "is_finished",
    "progress_of",
    "read_stages",
    "run_config",
    "write_changes",
    "write_result",
    "write_run_files",
    "write_stages",
]


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
        "pictures",
        "check_data",
        "recheck",
        "val_batch_size",
        "backend",
        "cuda_graph",
        "trainer",
        "root",
        "val_root",
        "weights",
        "weights_part",
        "weights_backbone",
        "reset_head",
    }
)


@dataclass(frozen=True)
class TrainResult:
    """What ``fit`` made.

    ``miou`` and ``best_miou`` are of the last and the best validation, None without one;
    ``metrics`` is of the weights in ``weights`` (``exported``: "best" or "last", after step
    ``exported_step``), ``last_metrics`` of the last validation. All scores are in 0..1.
    ``finished`` is False where the wall time or a signal ended the run; it goes on with
    ``resume=True``. ``ended`` says why a finished run has fewer steps than it was given.
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
    ended: str | None = None
    metrics: Metrics | None = None
    last_metrics: Metrics | None = None
    exported: str | None = None
    exported_step: int | None = None


def checkpoint_to_resume(folder: Path, resume: bool | str | os.PathLike[str]) -> Path | None:
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


# What the state of the optimizer and the weights depend on.
_FIXED = ("model", "model_options", "optimizer", "decay_norm_and_bias", "freeze")


def run_config(folder: str | os.PathLike[str]) -> TrainConfig | None:
    """The options of the run in a folder, its config.yaml; None where there is none.

    Raises:
        ValueError: the file is no config of a run.
    """
    import yaml

    path = Path(folder) / "config.yaml"
    if not path.is_file():
        return None
    try:
        return TrainConfig(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no config of a training run ({' '.join(str(error).split())[:200]})"
        ) from error


def config_beside(weights: str | os.PathLike[str]) -> TrainConfig | None:
    """The options of the run that left these weights in its folder, None of others."""
    from deeplab_fast.weights import find_weights

    try:
        path = find_weights(weights)
        folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        return run_config(folder)
    except (ValueError, OSError):
        return None


def write_stages(folder: Path, stage2: Mapping[str, Any]) -> None:
    """Records, as its first stage begins, what a run's second stage has of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    text = to_yaml({"stage2": dict(stage2)}).encode("utf-8")
    write_atomically([(folder / "stages.yaml", lambda file: file.write(text))])


def read_stages(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The second stage's own options of a run of two, None where the run has one."""
    import yaml

    try:
        content = yaml.safe_load((Path(folder) / "stages.yaml").read_text(encoding="utf-8"))
        return dict(content["stage2"])
    except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError):
        return None


def finished_result(folder: Path, config: TrainConfig) -> TrainResult | None:
    """What a finished run of these options came to; None where there is more to do.

    Scores are those in its result.json, without the counts they were made of.
    """
    before = run_config(folder)
    if before is None or not is_finished(folder):
        return None
    weights = folder / "model.safetensors"
    same = {name for name in _FREE if name != "export"} | {"classes"}
    changed = [
        name
        for name, value in config.as_dict().items()
        if name not in same and value != before.as_dict()[name]
    ]
    # Of weights that tell the model the record has its name.
    if config.model is None:
        changed = [name for name in changed if name != "model"]
    if changed or not weights.exists():
        return None
    values = json.loads((folder / "result.json").read_text())
    best = folder / "checkpoints" / "best.ckpt"
    return TrainResult(
        folder=folder,
        weights=weights,
        last_checkpoint=folder / "checkpoints" / "last.ckpt",
        best_checkpoint=best if best.exists() else None,
        steps=values["steps"],
        miou=values["val_miou"],
        best_miou=values["best_val_miou"],
        finished=True,
        ended=values.get("ended"),
        exported=values.get("exported"),
        exported_step=values.get("exported_step"),
    )


def progress_of(checkpoint: Path) -> tuple[int, int]:
    """Steps done and the number of the epoch, from 0, in a checkpoint of a run."""
    content = read_content(checkpoint)
    return int(content["global_step"]), int(content["epoch"])


def check_resumable(
    path: Path, config: TrainConfig, tell: Callable[[str], None]
) -> dict[str, Any] | None:
    """Tells which options differ from the checkpoint's, and refuses those that cannot.

    Returns:
        What :func:`write_changes` takes, None where none differ.

    Raises:
        OptionError: another model or optimizer, other parameters to train, or no averaged weights
            where the run had them.
        ValueError: no checkpoint of a training run.
    """
    try:
        content = read_content(path)
        before = dict(content["train_config"])
    except Exception as error:
        raise ValueError(
            f"{path} is no checkpoint of a training run ({' '.join(str(error).split())[:200]})"
        ) from error
    now = json.loads(json.dumps(config.as_dict()))
    # An option that the run's version did not have was what is now its default.
    before = json.loads(json.dumps({**type(config)().as_dict(), **before}))
    changed = {
        name: f"{name} {before.get(name)!r} -> {value!r}"
        for name, value in now.items()
        if name not in _FREE and before.get(name) != value
    }
    fixed = [name for name in _FIXED if name in changed]
    fixed += [
        name
        for name in ("freeze_batch_norm", "aux_weight")
        if bool(before.get(name)) != bool(now[name])
    ]
    fixed += ["ema"] if before.get("ema") and not now["ema"] else []
    if fixed:
        raise OptionError(
            fixed[0],
            f"is {now[fixed[0]]!r} and the run that is resumed has {before.get(fixed[0])!r}; "
            "expected the same: the optimizer and the weights of the checkpoint are for that. "
            f"Begin another run with --weights {path.parent.parent}",
        )
    if changed:
        tell(
            f"warning: from step {content.get('global_step')} on with {', '.join(changed.values())}"
            "; the result will differ from that of an uninterrupted run"
        )
        values = {name: [before.get(name), now[name]] for name in changed}
        return {"from_step": content.get("global_step"), "changed": values}
    return None


def write_changes(folder: Path, changes: Mapping[str, Any]) -> None:
    """Adds a line to changes.jsonl: from which step on which options had which other value."""
    path = folder / "changes.jsonl"
    former = path.read_text("utf-8") if path.exists() else ""
    text = (former + json.dumps(changes) + "\n").encode("utf-8")
    write_atomically([(path, lambda file: file.write(text))])


def write_run_files(folder: Path, config: TrainConfig) -> None:

    folder.mkdir(parents=True, exist_ok=True)
    text = to_yaml(config.as_dict())
    versions = json.dumps(_versions(), indent=2) + "\n"
    write_atomically(
        [
            (folder / "config.yaml", lambda file: file.write(text.encode("utf-8"))),
            (folder / "versions.json", lambda file: file.write(versions.encode("utf-8"))),
        ]
    )


def write_result(result: TrainResult) -> None:

    values = {
        "finished": result.finished,
        "stopped": result.stopped,
        "ended": result.ended,
        "steps": result.steps,
        "val_miou": result.miou,
        "best_val_miou": result.best_miou,
        "exported": result.exported,
        "exported_step": result.exported_step,
        "metrics": None if result.metrics is None else result.metrics.as_dict(),
    }
    # JSON has no nan, the mIoU of no labels.
    known = {k: None if v != v else v for k, v in values.items()}
    text = json.dumps(known, indent=2, allow_nan=False) + "\n"
    path = result.folder / "result.json"
    write_atomically([(path, lambda file: file.write(text.encode("utf-8")))])


def is_finished(folder: Path) -> bool:
    """Whether a run in this folder came to its end."""
    try:
        return bool(json.loads((folder / "result.json").read_text())["finished"])
    except (OSError, ValueError, KeyError):
        return False


def _versions() -> dict[str, Any]:
    import lightning
    import numpy

    from deeplab_fast._version import __version__

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
