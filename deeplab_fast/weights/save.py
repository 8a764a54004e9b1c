"""Writing a model into a file, whole or not at all, with what makes it again."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..dispatch.files import write_atomically
from ..program.calibration import Calibration, fingerprint, fingerprint_of
from ._common import ARCHIVE_NAME, CHECKSUM_KEY, METADATA_KEY, SHOWN, unwrapped
from .checksum import checksum
from .registry import preprocess_kinds
from .safetensors_file import write_safetensors
from .settings import plain, rebuilding
from .told import what_no_file_gives


def model_metadata(model: nn.Module) -> dict[str, Any]:
    """What rebuilds a model, as JSON's types: builder, options, classes, palette, preprocess, and
    the ranges of its maps for int8 where it is calibrated.

    "settings" has what differs from the builder's model (modules exchanged, values set by hand),
    "lost" names what cannot be written down. `inspect_weights`, `from_checkpoint` and
    `load_weights` use it, in the header of a .safetensors file, under the key "deeplab_fast" beside
    "model" in a torch.save container, and in the `_metadata` of a state dict.
    """
    model = unwrapped(model)
    metadata: dict[str, Any] = {}
    lost: list[str] = []
    for name in ("num_classes", "classes", "palette"):
        value = getattr(model, name, None)
        if value is not None:
            metadata[name] = _listed(value)
    config = builders_config(model)
    if config is not None:
        name, options = config
        again = rebuilding(model, name, options)
        metadata |= {"model": name, "options": again.options, "settings": again.settings}
        lost += again.lost
    elif getattr(model, "config", None) is not None:
        lost.append(
            f"config: {type(model.config).__name__}, not the builder's name and its options as the "
            "builder left it"
        )
    calibration = getattr(model, "calibration", None)
    if isinstance(calibration, Calibration):
        metadata["calibration"] = calibration.as_plain()
    preprocess = getattr(model, "preprocess", None)
    if preprocess is not None:
        kind = type(preprocess).__name__
        if preprocess_kinds().get(kind) is type(preprocess):
            metadata |= {"preprocess": asdict(preprocess), "preprocess_kind": kind}
        else:
            lost.append(f"preprocess: an object of class {kind}")
    for name, value in list(metadata.items()):
        try:
            metadata[name] = json.loads(json.dumps(plain(value)))
        except (TypeError, ValueError) as error:
            del metadata[name]
            lost.append(f"{name}: {error}")
    lost += what_no_file_gives(metadata)
    if lost:
        metadata["lost"] = lost
    return metadata


def builders_config(model: nn.Module) -> tuple[str, Mapping[str, Any]] | None:
    """The builder's name and its options; None where `model.config` is something else."""
    value = getattr(model, "config", None)
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return None
    name, options = value
    return (name, options) if isinstance(name, str) and isinstance(options, Mapping) else None


def _listed(value: object) -> object:
    """Arrays, tensors and ranges as lists; other values as they are."""
    if isinstance(value, range):
        return list(value)
    try:
        # Tensors that have no values (meta, fake) refuse.
        return value.tolist() if hasattr(value, "tolist") else value
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return value


def save_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    strict: bool = True,
) -> Path:
    """Write a model's state dict under a temporary name in the same folder, then rename it.

    The same model gives the same bytes, which are on the disk when it returns. A checksum of the
    tensors goes with them, which reading the file holds them against.

    `from_checkpoint` of the file gives the model back: what a user set or exchanged is written with
    the weights (see `model_metadata`), a calibration for int8 too. Hooks, the precision and the
    choice of training or eval mode are not.

    Args:
        model: also inside DistributedDataParallel or torch.compile, whose prefixes are left out.
        path: .safetensors, or .pth or .pt (a plain state dict, which torchvision's load_state_dict
            takes where the model is one of its own; what rebuilds it is in its `_metadata`).
        dtype: what floating-point tensors are stored in, torch.float16 for a file of half the
            size; None keeps theirs. Loading converts back to the model's.
        strict: refuse a model that the file could not rebuild; False writes the tensors of any, for
            `load_weights` into a model that is built and changed the same way.

    Returns:
        The path.

    Raises:
        ValueError: another suffix; a value that the dtype cannot hold; with `strict` what cannot be
            rebuilt (modules of foreign classes, parametrizations, shared or additional tensors).
            Nothing is written then.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"weights are saved as .safetensors, .pth or .pt, got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent} (to save {path.name} in)")
    model = unwrapped(model)
    metadata = model_metadata(model)
    if strict and "lost" in metadata:
        raise ValueError(
            f"{path.name} could not give this model back: {'; '.join(metadata['lost'][:SHOWN])}. "
            "Undo that, or pass strict=False to write the tensors all the same, for load_weights "
            "into a model that you build and change the same way"
        )
    # With what it carries beside its tensors, as torch.save takes it.
    state = model.state_dict()
    for key, value in state.items():
        state[key] = _stored(key, value.detach().cpu().contiguous(), dtype)
    if dtype is not None and "calibration" in metadata:
        weights = fingerprint(model)
        kept = getattr(state, "_metadata", {}).get("", {}).get(METADATA_KEY, {})
        for about in (metadata, kept):
            found = about.get("calibration", {})
            # What was measured holds for the weights as they come back too.
            if found.get("fingerprint") == weights:
                found["fingerprint"] = fingerprint_of(state)
    mark = checksum(state)

    def write(file: BinaryIO) -> None:
        if path.suffix == ".safetensors":
            header = {"format": "pt", METADATA_KEY: json.dumps(metadata)}
            write_safetensors(state, {**header, CHECKSUM_KEY: json.dumps(mark)}, file)
        else:
            torch.save(state, file)
            _append_checksum(file, mark)

    write_atomically([(path, write)], durable=True)
    return path


def _append_checksum(file: BinaryIO, mark: Mapping[str, str]) -> None:
    """Put the checksum into torch.save's archive, as an entry that its readers pass over."""
    entry = zipfile.ZipInfo(f"{ARCHIVE_NAME}/{CHECKSUM_KEY}")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(entry, json.dumps(mark))


def _stored(key: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not value.is_floating_point():
        return value
    converted = value.to(dtype)
    if not torch.equal(converted.isfinite(), value.isfinite()):
        raise ValueError(f"{key} has values that {dtype} cannot hold; leave dtype out")
    return converted
