"""Where weights lie: files, folders of other libraries and of training runs, embedded names."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from ._common import CheckpointError, shorten
from .embedded import embedded_path, list_embedded

# What smp's and other libraries' save_pretrained call the weights, beside a config.json.
PRETRAINED = ("model.safetensors", "pytorch_model.bin")
# Of a training run, the best first: what it ends with, and what one that was cut off left.
_OF_RUN = (
    "model.safetensors",
    "stage2/model.safetensors",
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
    "stage2/checkpoints/best.ckpt",
    "stage2/checkpoints/last.ckpt",
    "stage1/model.safetensors",
    "stage1/checkpoints/best.ckpt",
    "stage1/checkpoints/last.ckpt",
)
_SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors", ".npz", ".bin")


def find_weights(source: str | os.PathLike[str]) -> Path:
    """The file that a name, a file or a folder stands for.

    Args:
        source: the name of an embedded model ("camvid"; "./camvid" is a file or folder of that
            name), a file, a folder of `save_pretrained` (model.safetensors or pytorch_model.bin),
            or the folder of a training run: its model.safetensors, or what a run that was cut off
            left, checkpoints/best.ckpt before last.ckpt, stage 2 before stage 1.

    Raises:
        FileNotFoundError: no such file, and no embedded model of that name.
        CheckpointError: a folder without weights.
    """
    text, path = os.fspath(source), Path(source)
    if text in list_embedded() and not path.is_file():
        return embedded_path(text)
    if path.is_dir():
        for name in (*PRETRAINED, *_OF_RUN):
            if (path / name).is_file():
                return path / name
        inside = sorted(p.name for p in path.iterdir() if p.suffix in _SUFFIXES)
        raise CheckpointError(
            f"{path} is a folder without weights, expected one of a training run or of "
            f"save_pretrained ({' or '.join(PRETRAINED)} in it), or a checkpoint file"
            + (f"; it holds {shorten(inside)}" if inside else "")
        )
    if not path.exists():
        near = difflib.get_close_matches(text, list_embedded(), 1, 0.7)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(
            f"no such checkpoint: {path}; expected a file, the folder of a run, or the name of an "
            f"embedded model ({', '.join(list_embedded())}){hint}"
        )
    if not path.is_file():
        raise CheckpointError(
            f"{path} is a pipe, a device or a socket, expected a file of weights or the folder of "
            "a run; write what it gives into a file first"
        )
    return path
