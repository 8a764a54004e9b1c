"""The folder of a training run: what it holds, what it can be resumed from, how it ended."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deeplab_fast._documents import DocumentError, read_document, shown
from deeplab_fast.dispatch.files import is_full, remove_left, write_atomically
from deeplab_fast.engine.config import OptionError, TrainConfig, to_yaml
from deeplab_fast.engine.runner import is_out_of_memory
from deeplab_fast.weights import read_content

if TYPE_CHECKING:
    from deeplab_fast.engine.metrics import Metrics

__all__ = [
    "FolderWatch",
    "RunFolderError",
    "TrainResult",
    "check_resumable",
    "checkpoint_to_resume",
    "clear_left",
    "config_beside",
    "finished_result",
    "forget_result",
    "is_finished",
    "is_no_fault_of_content",
    "progress_of",
    "read_stages",
    "run_config",
    "write_changes",
    "write_result",
    "write_run_files",
    "write_stages",
]


class RunFolderError(OSError):
    """The folder of a run, or a file of it, cannot be written: gone, read-only, full."""

    def __str__(self) -> str:
        return str(self.strerror or self.args)


_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class FolderWatch:
    """Tells why a run cannot write: what became of its folder since it was made.

    The folder is gone where its name is, or where none is left of the files that it had at first:
    another one was made in its place, or its disk was unmounted. Inodes tell nothing: those of
    network and user space file systems may change.

    Args:
        folder: of the run, which is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = [folder / name for name in _FIRST if (folder / name).exists()]

    def check(self) -> None:
        """Raises RunFolderError where another folder, or none, has the name."""
        if _is_missing(self.folder) or (self._files and all(map(_is_missing, self._files))):
            raise RunFolderError(
                errno.ENOENT,
                f"the folder of the run, {self.folder}, is gone: it was moved, removed or "
                "unmounted while the run went on, which ends here. Where it is now, --resume goes "
                "on from its last checkpoint; else start again",
            )

    @contextmanager
    def told(self) -> Iterator[None]:
        """Makes of an OSError about a file of the run one that says what to do."""
        try:
            yield
        except RunFolderError:
            self.check()
            raise
        except OSError as error:
            self.check()
            if is_full(error):
                text = (
                    f"no space left for {error.filename or self.folder}; the checkpoints are "
                    "whole: make room, then go on with --resume"
                )
            elif error.errno in _READ_ONLY and self._holds(error.filename):
                text = (
                    f"{error.filename} cannot be written ({error.strerror}); the checkpoints are "
                    "whole: let the folder be written again, then go on with --resume"
                )
            else:
                raise
            raise RunFolderError(error.errno, text) from error

    def _holds(self, file: object) -> bool:
        if not isinstance(file, (str, os.PathLike)):
            return False
        return Path(os.path.abspath(file)).is_relative_to(os.path.abspath(self.folder))


# Written before the first step, and not again.
_FIRST = ("config.yaml", "versions.json")


def _is_missing(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    # A stale handle, a server that does not answer: whether it is there is not known.
    except OSError:
        return False
    return False


def clear_left(folder: Path, before: float) -> None:
    """Removes the temporary files that killed runs left in a run's folder.

    Args:
        folder: of the run, which its first process alone clears.
        before: when this process began with the run, in seconds since the epoch.
    """
    for each in (folder, folder / "checkpoints", folder / "panels"):
        remove_left(each, before)


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
        OSError: it cannot be read.
    """
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        return None
    try:
        values = read_document(path)
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise ValueError(f"{shown(values)}, expected lines of option: value")
        return TrainConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no config of a training run ({shown(error, 300)}); it is damaged or of "
            "another version: give the run's options again with --config or --preset, or begin "
            "another run"
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
    """The second stage's own options of a run of two, None where the run has one.

    Raises:
        ValueError: the record is damaged.
        OSError: it cannot be read.
    """
    path = Path(folder) / "stages.yaml"
    try:
        content = read_document(path)
        stage2 = content["stage2"] if isinstance(content, dict) else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (DocumentError, KeyError) as error:
        raise ValueError(_damaged_stages(path, shown(error, 300))) from error
    if not isinstance(stage2, dict) or not all(isinstance(key, str) for key in stage2):
        raise ValueError(_damaged_stages(path, shown(content)))
    return stage2


def _damaged_stages(path: Path, why: str) -> str:
    return (
        f"{path}, which says what a run's second stage has of its own, is damaged ({why}): remove "
        "it, and give --stages 2 and the options --stage2 again"
    )


def finished_result(folder: Path, config: TrainConfig) -> TrainResult | None:
    """What a finished run of these options came to; None where there is more to do.

    Scores are those in its result.json, without the counts they were made of.
    """
    result = _result(folder)
    if not result.get("finished"):
        return None
    try:
        before = run_config(folder)
    # One that is damaged is written anew.
    except ValueError:
        return None
    if before is None:
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
    best = folder / "checkpoints" / "best.ckpt"
    return TrainResult(
        folder=folder,
        weights=weights,
        last_checkpoint=folder / "checkpoints" / "last.ckpt",
        best_checkpoint=best if best.exists() else None,
        steps=result["steps"],
        miou=result["val_miou"],
        best_miou=result["best_val_miou"],
        finished=True,
        ended=result["ended"],
        exported=result["exported"],
        exported_step=result["exported_step"],
    )


def progress_of(checkpoint: Path) -> tuple[int, int]:
    """Steps done and the number of the epoch, from 0, in a checkpoint of a run."""
    content = _read_checkpoint(checkpoint)
    return content["global_step"], content["epoch"]


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of a run, its tensors on the disk.

    Raises:
        ValueError: it is none, or damaged.
        OSError, MemoryError: it cannot be read now.
    """
    try:
        content = read_content(path)
        for name, kind in _OF_CHECKPOINT.items():
            if name not in content:
                raise ValueError(f"it has no {name}")
            if not isinstance(content[name], kind):
                raise ValueError(f"its {name} is a {type(content[name]).__name__}")
            if kind is list and not content[name]:
                raise ValueError(f"its {name} are none")
        # Plain values, as they were written.
        content["train_config"] = json.loads(json.dumps(content["train_config"]))
    # Of its content too: a list for a mapping, options that are tensors, ...
    except Exception as error:
        if is_no_fault_of_content(error):
            raise
        raise ValueError(
            f"{path} is no checkpoint of a training run ({shown(error, 200)}); {_instead(path)}"
        ) from error
    return dict(content)


def is_no_fault_of_content(error: BaseException) -> bool:
    """Whether memory ran out, or a disk failed: nothing is known of the file that was read then."""
    each: BaseException | None = error
    while each is not None:
        # That is what a place in a file is called that cannot be.
        if is_out_of_memory(each) or (isinstance(each, OSError) and each.errno != errno.EINVAL):
            return True
        each = each.__cause__
    return False


_OF_CHECKPOINT: dict[str, type] = {
    "global_step": int,
    "epoch": int,
    "state_dict": dict,
    "train_config": dict,
    "loops": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}


def _instead(path: Path) -> str:
    """What may be gone on from in place of a checkpoint that is damaged."""
    best = path.with_name("best.ckpt")
    if path.name == "last.ckpt" and best.is_file():
        with suppress(ValueError):
            step = _read_checkpoint(best)["global_step"]
            return f"{best} is whole, of step {step}: copy it to {path.name} to go on from there"
    return "copy it again, or begin another run"


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
    content = _read_checkpoint(path)
    before = content["train_config"]
    now = json.loads(json.dumps(config.as_dict()))
    # An option that the run's version did not have was what is now its default.
    before = {**json.loads(json.dumps(type(config)().as_dict())), **before}
    changed = {
        name: f"{name} {shown(before.get(name), 200)} -> {shown(value, 200)}"
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
            f"is {now[fixed[0]]!r} and the run that is resumed has "
            f"{shown(repr(before.get(fixed[0])), 300)}; "
            "expected the same: the optimizer and the weights of the checkpoint are for that. "
            f"Begin another run with --weights {path.parent.parent}",
        )
    for name, done in (("steps", content["global_step"]), ("epochs", content["epoch"])):
        if now[name] is not None and now[name] < done:
            raise OptionError(
                name,
                f"is {now[name]} and the run that is resumed is at {done}; expected {done} or "
                f"more, or another run with --weights {path.parent.parent}",
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
    former = path.read_text("utf-8", "replace") if path.is_file() else ""
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


def forget_result(folder: Path) -> None:
    """Removes the record of how a run ended."""
    (folder / "result.json").unlink(missing_ok=True)


def is_finished(folder: Path) -> bool:
    """Whether a run in this folder came to its end."""
    return bool(_result(folder).get("finished"))


def _result(folder: Path) -> dict[str, Any]:
    """The record of how a run ended; empty where there is none that is whole."""
    try:
        values = read_document(folder / "result.json")
    except (OSError, DocumentError):
        return {}
    known = {name: None for name in ("ended", "exported", "exported_step")}
    values = {**known, **values} if isinstance(values, dict) else {}
    number = (int, float, type(None))
    whole = (
        isinstance(values.get("finished"), bool)
        and isinstance(values.get("steps"), int)
        and all(isinstance(values.get(n, ""), number) for n in ("val_miou", "best_val_miou"))
        and isinstance(values["exported_step"], (int, type(None)))
        and all(isinstance(values[n], (str, type(None))) for n in ("ended", "exported"))
    )
    return values if whole else {}


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
