"""Checkpoint files: what is in them."""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._documents import parse_json, read_document
from ._common import (
    ARCHIVE_NAME,
    CHECKSUM_KEY,
    METADATA_KEY,
    SHOWN,
    CheckpointError,
    Source,
    StateDict,
    one_line,
    shorten,
)
from .checksum import check
from .layouts import NOT_MODEL, Origin, known_layout
from .pickled import (
    ForeignObjectError,
    TooLargeError,
    UnreadableError,
    UnsupportedError,
    archive_entries,
    archive_text,
    read_archive,
    read_legacy,
)
from .where import PRETRAINED, find_weights

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
    "state_dict_ema",
    "ema",
)
# Prefixes that wrappers put before every key.
_PREFIXES = ("model.", "net.", "network.", "segmentor.")
_HEAD_BYTES = 4096
# The bound of the safetensors library.
_LONGEST_HEADER = 100_000_000
# More than any network and its containers have.
_MOST_TENSORS, _LONGEST_NAME = 20_000, 1_000
_DEEPEST, _MOST_WAYS = 50, 100_000
# Of the arrays of an .npz file together, beside a multiple of its size: weights hardly compress.
_UNPACKED, _MOST_TIMES = 256 << 20, 16


# Lightning's WeightAveraging keeps here what it goes on training with; its model, the averaged one,
# is the "state_dict" beside it.
FOR_RESUMING = "current_model_state"


@dataclass(frozen=True)
class Checkpoint:
    """What a file or a state dict holds; `label` names it in messages."""

    label: str
    state: StateDict
    # The package's own facts, and what else says how the model was built.
    metadata: dict[str, Any] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)


def read_state_dict(path: str | os.PathLike[str], *, part: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, on the CPU, without running code from it.

    Files: .pth, .pt, .ckpt, .bin and the like as torch.save writes them (memory-mapped where the
    format allows it), .safetensors, and numpy's .npz. The content decides, not the suffix. Names of
    embedded models and folders stand for the files that `find_weights` names. Training checkpoints
    are opened ("model", "state_dict", "model_state", "model_state_dict", ...), and the prefixes of
    wrappers are taken off ("module.", "_orig_mod.", Lightning's "model.").

    Args:
        path: of the file or folder, or the name of an embedded model.
        part: which network of a checkpoint with several: the key it is kept under ("model_ema"), or
            the prefix of its tensors ("student"); "model/student" where both are needed, "." for
            the tensors that have no prefix beside others that have one.

    Returns:
        Names as in the file, otherwise; values that are no tensors or arrays are left out.

    A file is data: no name in it is imported or called, it opens no other file, and what it claims
    is held against its size before memory is taken.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, damaged, one that only runs code to load, one that claims
            more than it has, or one with several networks where `part` names none of them; the
            message lists them.
    """
    return open_checkpoint(os.fspath(path), part).state


def read_content(path: str | os.PathLike[str]) -> Any:
    """What a checkpoint file holds, containers and all; files and errors of `read_state_dict`.

    Beside tensors: Python's plain types, NumPy's numbers, arrays of numbers and texts,
    argparse.Namespace, paths as pure ones of pathlib, which have no .exists(). NumPy's numbers as
    keys, and its texts, are Python's. Dates of NumPy, and objects of classes that
    torch.serialization.add_safe_globals was given, are left out: an object without use stands in
    their places. Tensors of an archive of torch.save are views of the mapped file; writing to
    one does not change it. Those of its format before 1.6, and views whose conjugate or negative
    bit is set, are in memory of their own.
    """
    return _content(find_weights(path))[0]


def _read(path: str | os.PathLike[str], part: str | None) -> Checkpoint:
    path = find_weights(path)
    content, metadata, header = _content(path)
    origin = Origin(path.name, header, _config_beside(path), _meta(content))
    return _opened(content, str(path), part, metadata, origin)


def _content(path: Path) -> tuple[object, dict[str, Any], dict[str, str]]:
    """What a file holds, the package's own facts in it, and a .safetensors file's header."""
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
    return content, metadata, header


def _config_beside(path: Path) -> dict[str, Any]:
    """What save_pretrained wrote about the model beside its weights."""
    file = path.with_name("config.json")
    if path.name not in PRETRAINED or not file.is_file():
        return {}
    try:
        config = read_document(file)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{file}, which says how the model of {path.name} is built, cannot be read: {error}. "
            "Copy it again, or move the weights away from it to load them without"
        ) from error
    return config if isinstance(config, dict) else {}


def _meta(content: object) -> dict[str, Any]:
    meta = content.get("meta") if isinstance(content, Mapping) else None
    return dict(meta) if isinstance(meta, Mapping) else {}


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
        names = list(archive_entries(path))
    except (UnreadableError, OSError) as error:
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
            names = list(file.keys())
            _check_names(names, path)
            state = {key: file.get_tensor(key) for key in names}
    # It raises AttributeError and TypeError for dtypes that this PyTorch does not have.
    except (SafetensorError, OSError, AttributeError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no readable .safetensors file, or was not written to its end "
            f"({one_line(error)}): download or copy it again"
        ) from error
    try:
        metadata = parse_json(header.get(METADATA_KEY, "{}"))
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its metadata {METADATA_KEY!r} is no JSON that can be read: "
            f"{one_line(error)}; download or copy it again"
        ) from error
    check(_json_of(header.get(CHECKSUM_KEY)), state, str(path))
    return state, metadata if isinstance(metadata, dict) else {}, header


def _json_of(text: str | None) -> object:
    """A checksum; None where there is none that can be read."""
    try:
        return None if text is None else parse_json(text)
    except ValueError:
        return None


def _read_npz(path: Path) -> dict[str, Any]:
    """The arrays; what they claim is held against what their entries have before memory is."""
    import numpy as np

    found: dict[str, Any] = {}
    size, total = path.stat().st_size, 0
    try:
        with zipfile.ZipFile(path) as archive:
            _check_names(archive.namelist(), path)
            for entry in archive.infolist():
                total += entry.file_size
                if total > max(_UNPACKED, _MOST_TIMES * size):
                    raise CheckpointError(
                        f"{path} has {size} bytes and unpacks to more than {_MOST_TIMES} times of "
                        f"that and {_UNPACKED >> 20} MiB; if you trust it, write its arrays with "
                        "numpy.savez, which does not pack them"
                    )
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{one_line(entry.filename)} is packed in another way")
                with archive.open(entry) as file:
                    found[entry.filename.removesuffix(".npy")] = _array(np, file, entry)
    # A damaged entry raises what its packing raises.
    except CheckpointError:
        raise
    except (ValueError, OSError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile) as error:
        raise _bad_npz(path, error) from error
    # zlib's own, which is imported by what unpacks.
    except Exception as error:
        if type(error).__module__ != "zlib":
            raise
        raise _bad_npz(path, error) from error
    return found


def _bad_npz(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is no readable .npz file of plain arrays: {one_line(error)}; expected what "
        "numpy.savez writes of arrays of numbers"
    )


def _array(np: Any, file: Any, entry: zipfile.ZipInfo) -> Any:
    """An array of numbers or texts; ValueError for one of objects or records."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{one_line(entry.filename)} has the format {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
    shape, columns, dtype = (read or np.lib.format.read_array_header_2_0)(file)
    if dtype.hasobject or dtype.kind == "V":
        raise ValueError(f"{one_line(entry.filename)} is an array of {one_line(dtype)}")
    left = entry.file_size - file.tell()
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != left:
        raise ValueError(
            f"{one_line(entry.filename)} claims the shape {one_line(shape)} of {dtype}, and "
            f"{left} bytes follow"
        )
    if dtype.itemsize == 0:
        raise ValueError(f"{one_line(entry.filename)} is an array of {dtype}")
    data = file.read(left)
    if len(data) != left:
        raise ValueError(f"{one_line(entry.filename)} ends too early")
    # A bytearray, for an array that can be written to.
    return np.frombuffer(bytearray(data), dtype).reshape(shape, order="F" if columns else "C")


def _read_torch(path: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    try:
        content = read_archive(path) if kind == "zip" else read_legacy(path)
    except ForeignObjectError as error:
        raise CheckpointError(
            f"{path} contains an object of {one_line(error.name)}, which would run code to load; "
            "only plain tensors and containers are read. Register the class, with "
            "torch.serialization.add_safe_globals, to leave its objects out. Or, if you trust the "
            f"file, convert it where that class can be imported: {_RECIPE}"
        ) from error
    except UnsupportedError as error:
        raise CheckpointError(
            f"{path} has more than is read, or another kind: {one_line(error)}. Expected what "
            "torch.save writes of a state dict, beside plain values. If you trust the file, save "
            f"its state dict alone: {_RECIPE}"
        ) from error
    except TooLargeError as error:
        raise CheckpointError(
            f"{path} claims more than it has: {one_line(error)}. Expected what torch.save writes "
            "of a state dict; download it again, or save its state dict alone"
        ) from error
    except UnreadableError as error:
        raise CheckpointError(
            f"{path} is damaged or was not written to its end ({one_line(error)}): download or "
            "copy it again"
        ) from error
    if kind == "zip" and isinstance(content, Mapping):
        text = archive_text(path, f"{ARCHIVE_NAME}/{CHECKSUM_KEY}")
        check(_json_of(text), tensors_in(content), str(path))
    metadata = content.get(METADATA_KEY) if isinstance(content, Mapping) else None
    return content, dict(metadata) if isinstance(metadata, Mapping) else {}


# Of a whole module, of a container of one or of a state dict, and of a plain state dict.
_RECIPE = (
    "c = torch.load(path, map_location='cpu', weights_only=False); "
    f"c = next((c[k] for k in {_CONTAINERS} if isinstance(c, dict) and k in c), c); "
    "torch.save(c.state_dict() if hasattr(c, 'state_dict') else c, 'weights.pth')"
)


def _opened(
    content: object,
    label: str,
    part: str | None,
    metadata: dict[str, Any],
    origin: Origin,
    given: object = None,
) -> Checkpoint:
    wanted = part.split("/") if part else []
    check_nesting(content, label)
    raw = _find_state(content, label, wanted)
    state = tensors_in(raw)
    if not state:
        shown = list(raw.items())[:SHOWN]
        held = ", ".join(f"{one_line(repr(k))} ({type(v).__name__})" for k, v in shown)
        raise CheckpointError(
            f"{label} holds no tensors where they are expected; it has {held or 'nothing'}. "
            f"Expected a state dict, or one under {', '.join(_CONTAINERS[:4])}"
        )
    check_dense(state, label, meta=content is given)
    _check_names(list(state), label)
    originals = _unwrapped_names(list(state), label, wanted)
    if wanted:
        raise CheckpointError(
            f"{label} has no part {'/'.join(wanted)!r}; leave part out, or name one of: "
            f"{', '.join(_parts(content, originals)) or 'there are none'}"
        )
    if not metadata:
        metadata = _kept_beside(raw, originals)
    return Checkpoint(label, {k: state[o] for k, o in originals.items()}, metadata, origin)


def _find_state(content: object, label: str, wanted: list[str]) -> Mapping[Any, Any]:
    """The state dict inside a checkpoint's containers; takes the name that it goes by off."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{label} holds a {type(content).__name__}, expected a state dict (names to tensors)"
        )
    networks = _networks(content)
    if wanted and wanted[0] in networks:
        return _find_state(content[wanted.pop(0)], label, wanted)
    known = [n for n in networks if n != FOR_RESUMING and _is_known(content[n])]
    # Of several that are none of ours the usual names are those of the model.
    rivals = known or [n for n in networks if n in _CONTAINERS]
    if len(rivals) > 1:
        raise _several(label, rivals, "under the keys")
    return _find_state(content[rivals[0]], label, wanted) if rivals else content


def _several(label: str, names: list[str], where: str) -> CheckpointError:
    return CheckpointError(
        f"{label} holds more than one network, {where} {', '.join(names)}: choose one with part= "
        f"(--weights-part), for instance deeplab_fast.from_checkpoint(path, part={names[0]!r}); "
        "load_weights, inspect_weights and read_state_dict take part too"
    )


def _networks(content: Mapping[Any, Any]) -> list[str]:
    """Keys under which state dicts lie, the usual ones first."""
    usual = [
        n for n in _CONTAINERS if isinstance(content.get(n), Mapping) and _has_tensors(content[n])
    ]
    others = [
        k
        for k, v in content.items()
        if isinstance(k, str) and k not in _CONTAINERS and isinstance(v, Mapping) and _is_known(v)
    ]
    return [*usual, *others]


def _is_known(content: Mapping[Any, Any]) -> bool:
    """Whether a state dict, also in containers, is one of a model that this package knows."""
    inside = [content[n] for n in _CONTAINERS if isinstance(content.get(n), Mapping)]
    if any(_is_known(value) for value in inside):
        return True
    names = list(tensors_in(content))
    if not names:
        return False
    bare = _without_prefixes({without_wrappers(n): n for n in names})
    return known_layout(bare) is not None or bool(_groups(bare))


def tensors_in(content: Mapping[Any, Any]) -> StateDict:
    return {
        key: tensor
        for key, value in content.items()
        if isinstance(key, str) and (tensor := _as_tensor(value)) is not None
    }


def _parts(content: object, originals: Mapping[str, str]) -> list[str]:
    return [*(_networks(content) if isinstance(content, Mapping) else ()), *_groups(originals)]


def _has_tensors(content: Mapping[Any, Any]) -> bool:
    return any(
        _as_tensor(v) is not None or (isinstance(v, Mapping) and _has_tensors(v))
        for v in content.values()
    )


def _as_tensor(value: object) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    if type(value).__module__ == "numpy" and getattr(value, "dtype", None) is not None:
        import numpy as np

        array = np.asarray(value)
        if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
            return None
        return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
    return None


def without_wrappers(key: str) -> str:
    return re.sub(r"(?:(?<=\.)|^)(?:(?:module|_orig_mod)\.)+", "", key)


def _unwrapped_names(names: list[str], label: str, wanted: list[str]) -> dict[str, str]:
    """Names without the prefixes of wrappers -> names in the file; of the part that is wanted."""
    bare = _without_prefixes({without_wrappers(name): name for name in names})
    while True:
        whole = known_layout(bare)
        groups = _groups(bare)
        others = [k for k in bare if k.partition(".")[0] not in groups and not _beside(k)]
        if wanted and wanted[0] in groups:
            chosen = wanted.pop(0)
        elif wanted and wanted[0] == "." and groups and others:
            wanted.pop(0)
            return {k: bare[k] for k in bare if k.partition(".")[0] not in groups}
        elif len(groups) == 1 and not others:
            chosen = groups[0]
        elif groups and (whole is not None or len(groups) > 1):
            raise _several(label, [*(["."] if whole else []), *groups], "by the prefixes")
        elif groups:
            raise CheckpointError(
                f"{label} holds a network under {groups[0]}. beside other tensors "
                f"({shorten(others)}); pass part={groups[0]!r} (--weights-part) to load it without "
                "them"
            )
        else:
            return bare
        bare = _without_prefixes(
            {
                key.removeprefix(f"{chosen}."): original
                for key, original in bare.items()
                if key.startswith(f"{chosen}.")
            }
        )


def _without_prefixes(names: dict[str, str]) -> dict[str, str]:
    while True:
        own = [key for key in names if not _beside(key)]
        prefix = next((p for p in _PREFIXES if own and all(k.startswith(p) for k in own)), None)
        if prefix is None:
            return names
        names = {k.removeprefix(prefix): original for k, original in names.items()}


def _beside(key: str) -> bool:
    return NOT_MODEL.fullmatch(key) is not None


def _groups(names: Mapping[str, str]) -> list[str]:
    """First parts of names behind which the names of a whole network stand."""
    whole = known_layout(names)
    grouped: dict[str, list[str]] = {}
    for name in names:
        first, _, rest = name.partition(".")
        if rest and not _beside(name) and (whole is None or not whole.has(name)):
            grouped.setdefault(first, []).append(rest)
    found = []
    for first, rests in grouped.items():
        layout = known_layout(rests)
        # A ResNet alone is the backbone of something else.
        if layout is not None and layout.name != "imagenet":
            found.append(first)
    return found


def _kept_beside(raw: Mapping[Any, Any], originals: Mapping[str, str]) -> dict[str, Any]:
    """The package's facts that a state dict carries, as `DeepLabV3.state_dict` returns it."""
    about = getattr(raw, "_metadata", None)
    if not isinstance(about, Mapping):
        return {}
    prefixes = {o.removesuffix(k).rstrip(".") for k, o in originals.items() if o.endswith(k)}
    for prefix in prefixes:
        module = about.get(prefix)
        facts = module.get(METADATA_KEY) if isinstance(module, Mapping) else None
        if isinstance(facts, Mapping):
            return dict(facts)
    return {}


def check_dense(state: StateDict, label: str, meta: bool = False) -> None:
    """Raises CheckpointError for tensors that are no plain numbers; `meta`: names and shapes do."""
    others = [k for k, v in state.items() if v.is_quantized or v.layout != torch.strided]
    others += [k for k, v in state.items() if v.is_nested]
    if others:
        raise CheckpointError(
            f"{label} has quantised or sparse tensors ({shorten(others)}); convert them to dense "
            "float tensors"
        )
    empty = [] if meta else [k for k, v in state.items() if v.is_meta]
    if empty:
        raise CheckpointError(
            f"{label} has tensors without plain values ({shorten(empty)}), meta, quantised or "
            "sparse ones; convert them to dense float tensors"
        )


def check_nesting(content: object, label: str) -> None:
    """Raises CheckpointError for containers in which no walk comes to an end, or late."""
    ways: dict[int, int] = {}
    # The ids of the containers above; a container is left when those in it are counted.
    above: set[int] = set()
    todo: list[tuple[Mapping[Any, Any], bool]] = []
    if isinstance(content, Mapping):
        todo.append((content, False))
    while todo:
        inner, leave = todo.pop()
        if leave:
            above.remove(id(inner))
            below = [v for v in inner.values() if isinstance(v, Mapping)]
            # Names are held against patterns: each counts as often as a walk comes to it.
            own = sum(isinstance(v, Tensor) for v in inner.values())
            ways[id(inner)] = 1 + own + sum(ways[id(v)] for v in below)
            if ways[id(inner)] > _MOST_WAYS:
                raise CheckpointError(
                    f"{label} has containers in containers, or tensors in them, in more than "
                    f"{_MOST_WAYS} ways, expected a state dict; save its state dict alone"
                )
            continue
        if id(inner) in ways:
            continue
        if id(inner) in above or len(above) >= _DEEPEST:
            raise CheckpointError(
                f"{label} has containers that hold themselves, or lie more than {_DEEPEST} deep in "
                "one another; expected a state dict; save its state dict alone"
            )
        above.add(id(inner))
        todo.append((inner, True))
        todo += [(v, False) for v in inner.values() if isinstance(v, Mapping)]


def _check_names(names: Sequence[str], label: object) -> None:
    if len(names) > _MOST_TENSORS:
        raise CheckpointError(
            f"{label} has {len(names)} tensors, at most {_MOST_TENSORS} are read; save the "
            "network's state dict alone"
        )
    longest = max(names, key=len, default="")
    if len(longest) > _LONGEST_NAME:
        raise CheckpointError(
            f"{label} has a tensor with a name of {len(longest)} characters "
            f"({one_line(longest)}), at most {_LONGEST_NAME} are read; rename it"
        )


def open_checkpoint(source: Source, part: str | None = None) -> Checkpoint:
    """Read a path, or take a state dict as it is; arguments and errors as of `read_state_dict`."""
    if isinstance(source, Mapping):
        metadata = source.get(METADATA_KEY)
        return _opened(
            source,
            "the state dict",
            part,
            dict(metadata) if isinstance(metadata, Mapping) else {},
            Origin(meta=_meta(source)),
            given=source,
        )
    if isinstance(source, (str, os.PathLike)):
        return _read(source, part)
    raise TypeError(
        f"weights must be the path of a checkpoint or a state dict, got {type(source).__name__}"
    )
