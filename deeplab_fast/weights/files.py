"""Checkpoint files in and out: what is in them, and writing them whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._common import METADATA_KEY, SHOWN, CheckpointError, Source, StateDict, shorten, unwrapped
from .layouts import NOT_MODEL

_CONTAINERS = (
    "model_state_dict",
    "model_state",
    "state_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "model_ema",
)
# Prefixes that wrappers put before every key.
_PREFIXES = ("model.", "net.", "network.", "segmentor.")
_HEAD_BYTES = 4096
# The bound of the safetensors library.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Checkpoint:
    """What a file or a state dict holds; `label` names it in messages."""

    label: str
    state: StateDict
    # The package's own facts, and the other text entries of a .safetensors header.
    metadata: dict[str, Any] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, on the CPU, without running code from it.

    Files: .pth, .pt, .ckpt, .bin and the like as torch.save writes them (memory-mapped where the
    format allows it), .safetensors, and numpy's .npz. The content decides, not the suffix. Training
    checkpoints are opened ("model", "state_dict", "model_state", "model_state_dict", ...), and the
    prefixes of wrappers are taken off ("module.", "_orig_mod.", Lightning's "model.").

    Returns:
        Names as in the file, otherwise; values that are no tensors or arrays are left out.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, damaged, or one that only runs code to load.
    """
    return _read(path).state


def _read(path: str | os.PathLike[str]) -> Checkpoint:
    path = Path(path)
    if path.is_dir():
        inside = sorted(
            p.name for p in path.iterdir() if p.suffix in (".pth", ".pt", ".safetensors", ".npz")
        )
        raise CheckpointError(
            f"{path} is a folder, expected a checkpoint file"
            + (f"; it holds {shorten(inside)}" if inside else "")
        )
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    kind = _kind(path, head)
    header: dict[str, str] = {}
    if kind == "safetensors":
        content, metadata, header = _read_safetensors(path)
    elif kind == "npz":
        content, metadata = _read_npz(path), {}
    else:
        content, metadata = _read_torch(path, kind)
    label = str(path)
    state = _strip_prefixes(_find_state(content, label), label)
    return Checkpoint(label, state, metadata, header)


def _kind(path: Path, head: bytes) -> str:
    """What a file is, by its first bytes: "zip", "npz", "legacy" (torch) or "safetensors"."""
    # First: the length that such a file begins with can look like the beginning of any other kind.
    if _is_safetensors(head):
        return "safetensors"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:64].lower()
    refusals = (
        (not head, "is empty"),
        (text.startswith(b"<"), "is a web page (HTML or XML), not a checkpoint: download it again"),
        (
            text.startswith(b"version https://git-lfs"),
            "is a Git LFS pointer, not the file itself: run `git lfs pull`, or download it again",
        ),
        (
            head[4:8] == b"TFL3",
            "is a TensorFlow Lite model; save its weights, named by scope, as .safetensors or .npz",
        ),
        (head.startswith(b"\x89HDF"), "is an HDF5 (Keras) file; save its arrays as .npz"),
        (head.startswith(b"\x1f\x8b"), "is a gzip archive; unpack it first"),
        (head.startswith(b"\x93NUMPY"), "is a single array; save named arrays with numpy.savez"),
        (
            path.suffix in (".index", ".meta") or ".data-" in path.suffix,
            "is part of a TensorFlow checkpoint; save its variables by name as .npz: "
            "r = tf.train.load_checkpoint(prefix); numpy.savez(file, **{n: r.get_tensor(n) "
            "for n in r.get_variable_to_shape_map()})",
        ),
    )
    for refused, why in refusals:
        if refused:
            raise CheckpointError(f"{path} {why}")
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if head.startswith(b"\x80"):
        return "legacy"
    raise CheckpointError(
        f"{path} is not a checkpoint: it starts with {head[:8]!r}; expected a file written by "
        "torch.save, safetensors or numpy.savez"
    )


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a header (8 bytes) and the header, a JSON object.

    No pickle and no text does: their first eight bytes are a number beyond the longest header that
    the format allows.
    """
    length = int.from_bytes(head[:8], "little")
    return length <= _LONGEST_HEADER and re.match(rb'\{\s*["}]', head[8:]) is not None


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or was not written to its end ({error}): download or copy it again"
        ) from error
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript archive; save its tensors first: "
            "torch.save(torch.jit.load(path).state_dict(), 'weights.pth')"
        )
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return "zip"
    raise CheckpointError(
        f"{path} is a zip archive without a checkpoint in it; it holds {shorten(names)}"
    )


def _read_safetensors(path: Path) -> tuple[StateDict, dict[str, Any], dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            f"{path}: reading .safetensors needs `pip install safetensors`"
        ) from error
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no readable .safetensors file, or was not written to its end ({error})"
        ) from error
    try:
        metadata = json.loads(header.get(METADATA_KEY, "{}"))
    except ValueError:
        metadata = {}
    return state, metadata if isinstance(metadata, dict) else {}, header


def _read_npz(path: Path) -> dict[str, Any]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is no readable .npz file of plain arrays: {error}"
        ) from error


def _read_torch(path: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        with _harmless_globals():
            if path.suffix == ".safetensors":
                # torch.load goes by this suffix, whatever the file is.
                with path.open("rb") as file:
                    content = torch.load(file, **options)
            else:
                content = torch.load(os.fspath(path), mmap=kind == "zip", **options)
    # torch raises RuntimeError, UnpicklingError, EOFError, KeyError and more for damaged files.
    except Exception as error:
        refused = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error))
        if refused is None:
            reason = str(error).strip().splitlines()
            raise CheckpointError(
                f"{path} is damaged or was not written to its end "
                f"({type(error).__name__}: {reason[0][:200] if reason else ''})"
            ) from error
        raise CheckpointError(
            f"{path} contains an object of {refused[1]}, which would run code to load; only plain "
            "tensors and containers are read. If you trust the file, convert it where that class "
            "can be imported: c = torch.load(path, map_location='cpu', weights_only=False); "
            "torch.save(c.state_dict() if hasattr(c, 'state_dict') else c['model'], "
            "'weights.pth') - with the checkpoint's own key in place of 'model'"
        ) from error
    metadata = content.get(METADATA_KEY) if isinstance(content, Mapping) else None
    return content, dict(metadata) if isinstance(metadata, Mapping) else {}


class _Inert:
    """Stands in for an object that is of no use here, so that its class is not imported."""


# mmengine's training checkpoints keep their loss curves in these.
_BESIDE_WEIGHTS = ("mmengine.logging.history_buffer.HistoryBuffer",)


@contextlib.contextmanager
def _harmless_globals() -> Iterator[None]:
    """Allow what training scripts keep beside the weights and what runs no code of its own.

    torchvision's and WZMIAOMIAO's scripts save an argparse.Namespace, others numpy's numbers and
    paths.
    """
    import argparse
    import importlib
    import pathlib

    import numpy as np

    # NumPy 2 renamed the module; files of both kinds exist.
    core = importlib.import_module(
        f"numpy.{'_core' if hasattr(np, '_core') else 'core'}.multiarray"
    )
    scalar, reconstruct = core.scalar, core._reconstruct
    dtypes = {type(np.dtype(t)) for t in np.sctypeDict.values()}
    allowed: list[Any] = [argparse.Namespace, np.dtype, np.ndarray, *dtypes]
    allowed += [pathlib.PosixPath, pathlib.PurePosixPath]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        allowed += [(scalar, f"{module}.scalar"), (reconstruct, f"{module}._reconstruct")]
    allowed += [(_Inert, name) for name in _BESIDE_WEIGHTS]
    with torch.serialization.safe_globals(allowed):
        yield


def _find_state(content: Any, label: str) -> StateDict:
    """The state dict inside a checkpoint's containers."""
    if isinstance(content, Mapping):
        for name in _CONTAINERS:
            if isinstance(content.get(name), Mapping) and _has_tensors(content[name]):
                return _find_state(content[name], label)
        state = {
            key: tensor
            for key, value in content.items()
            if isinstance(key, str) and (tensor := _as_tensor(value)) is not None
        }
        if state:
            return state
        held = ", ".join(f"{k!r} ({type(v).__name__})" for k, v in list(content.items())[:SHOWN])
        raise CheckpointError(
            f"{label} holds no tensors where they are expected; it has {held or 'nothing'}. "
            f"Expected a state dict, or one under {', '.join(_CONTAINERS[:4])}"
        )
    raise CheckpointError(
        f"{label} holds a {type(content).__name__}, expected a state dict (names to tensors)"
    )


def _has_tensors(content: Mapping[Any, Any]) -> bool:
    return any(
        _as_tensor(v) is not None or (isinstance(v, Mapping) and _has_tensors(v))
        for v in content.values()
    )


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    if type(value).__module__ == "numpy" and getattr(value, "dtype", None) is not None:
        import numpy as np

        array = np.asarray(value)
        return torch.from_numpy(array.copy()) if array.dtype.kind in "fiub" else None
    return None


def _strip_prefixes(state: StateDict, label: str) -> StateDict:
    state = {
        re.sub(r"(?:(?<=\.)|^)(?:(?:module|_orig_mod)\.)+", "", key): value
        for key, value in _checked(state, label).items()
    }
    while True:
        own = [key for key in state if not NOT_MODEL.fullmatch(key)]
        prefix = next((p for p in _PREFIXES if own and all(k.startswith(p) for k in own)), None)
        if prefix is None:
            return state
        state = {k.removeprefix(prefix): v for k, v in state.items()}


def _checked(state: StateDict, label: str) -> StateDict:
    quantised = [k for k, v in state.items() if v.is_quantized or v.is_sparse]
    if quantised:
        raise CheckpointError(
            f"{label} has quantised or sparse tensors ({shorten(quantised)}); convert them to "
            "dense float tensors"
        )
    return state


def open_checkpoint(source: Source) -> Checkpoint:
    """Read a path, or take a state dict as it is; errors as of `read_state_dict`."""
    if isinstance(source, Mapping):
        label = "the state dict"
        metadata = source.get(METADATA_KEY)
        return Checkpoint(
            label,
            _strip_prefixes(_find_state(source, label), label),
            dict(metadata) if isinstance(metadata, Mapping) else {},
        )
    if isinstance(source, (str, os.PathLike)):
        return _read(source)
    raise TypeError(
        f"weights must be the path of a checkpoint or a state dict, got {type(source).__name__}"
    )


def model_metadata(model: nn.Module) -> dict[str, Any]:
    """What rebuilds a model, as JSON's types: builder, options, classes, palette, preprocess.

    `read_state_dict` ignores it, `inspect_weights` and `load_weights` use it, in the header of a
    .safetensors file and under the key "deeplab_fast" beside "model" in a torch.save container.
    """
    from dataclasses import asdict

    model = unwrapped(model)
    metadata: dict[str, Any] = {}
    config = getattr(model, "config", None)
    if config is not None:
        name, options = config
        metadata["model"] = name
        skipped = ("num_classes", "aux_loss")
        metadata["options"] = {k: v for k, v in options.items() if k not in skipped}
    for name in ("num_classes", "classes", "palette"):
        value = getattr(model, name, None)
        if value is not None:
            metadata[name] = value
    preprocess = getattr(model, "preprocess", None)
    if preprocess is not None:
        metadata["preprocess"] = asdict(preprocess)
    return json.loads(json.dumps(metadata))


def save_weights(
    model: nn.Module, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> Path:
    """Write a model's state dict under a temporary name in the same folder, then rename it.

    Args:
        model: also inside DistributedDataParallel or torch.compile, whose prefixes are left out.
        path: .safetensors (with `model_metadata`), or .pth or .pt (a plain state dict, which
            torchvision's load_state_dict takes where the model is one of its own).
        dtype: what floating-point tensors are stored in, torch.float16 for a file of half the
            size; None keeps theirs. Loading converts back to the model's.

    Returns:
        The path.

    Raises:
        ValueError: another suffix; a value that the dtype cannot hold.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"weights are saved as .safetensors, .pth or .pt, got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent} (to save {path.name} in)")
    model = unwrapped(model)
    state = {
        k: _stored(k, v.detach().cpu().contiguous(), dtype) for k, v in model.state_dict().items()
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            header = {"format": "pt", METADATA_KEY: json.dumps(model_metadata(model))}
            save_file(state, temporary, metadata=header)
            # safetensors leaves a file that only its owner can read.
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)
        else:
            torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _stored(key: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not value.is_floating_point():
        return value
    converted = value.to(dtype)
    if not torch.equal(converted.isfinite(), value.isfinite()):
        raise ValueError(f"{key} has values that {dtype} cannot hold; leave dtype out")
    return converted
