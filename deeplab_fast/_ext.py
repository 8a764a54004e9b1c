"""Loads the compiled extensions and keeps the reason where one is missing.

    CPU    deeplab_fast._C        C++ ops for the CPU and the facts of this build
    CUDA   deeplab_fast._C_cuda   CUDA C++ ops for sm_80 and newer
    SM90   deeplab_fast._C_sm90   CUDA C++ ops for sm_90a only

Loading registers an extension's ops with torch's dispatcher. It never raises and does not
initialise CUDA. It warns of an extension that failed to compile, because pip hides the output of
such a build; of C++ ops that are missing for another reason the first call warns that they would
have run (`warn_of_missing_cpu`). DEEPLAB_FAST_DISABLE_EXT=1 leaves all three out. For tests on a
GPU, DEEPLAB_FAST_SM90_VARIANT=nofence or acquire_cluster loads _C_sm90_nofence or
_C_sm90_acquire_cluster in place of _C_sm90: the same ops, compiled with one choice of
aspp_sm90.cuh the other way.
"""

import importlib
import json
import os
import re
import sys
import warnings
from dataclasses import dataclass, field, replace
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_FOLDER = Path(__file__).parent
_PYTHON = sys.implementation.cache_tag
_DISABLED = os.environ.get("DEEPLAB_FAST_DISABLE_EXT") == "1"
_VARIANTS = ("nofence", "acquire_cluster")
_REBUILD = "rebuild with `pip install --no-build-isolation --no-deps .` in its source folder"


@dataclass(frozen=True)
class Extension:
    """One compiled extension.

    Attributes:
        name: its module name, such as "deeplab_fast._C".
        loaded: whether its ops are registered.
        reason: why it is not loaded, with what to do; empty when it is.
        build: the facts of build.json for this Python (torch, cuda, archs, compiler, flags,
            debug, extensions); empty when there are none.
        module: the Python module; None when not loaded, and for the CUDA extensions, which have
            no Python part.
    """

    name: str
    loaded: bool
    reason: str
    build: dict[str, Any] = field(repr=False)
    module: ModuleType | None = None


def _read_builds() -> dict[str, dict[str, Any]]:
    """build.json: the facts of each Python that was built for, by its cache_tag."""
    try:
        builds = json.loads((_FOLDER / "build.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    entries = builds.items() if isinstance(builds, dict) else ()
    # Older versions of the package wrote the facts of one Python, without its tag.
    return {tag: own for tag, own in entries if isinstance(own, dict) and "extensions" in own}


def _minor(version: str) -> str:
    """The part of a torch version that fixes its C++ ABI: "2.13.0+cpu" -> "2.13"."""
    return ".".join(version.split(".")[:2])


def _failure(name: str, build: dict[str, Any]) -> str:
    """What the compiler failed with, and which compiler; empty where none failed."""
    entry = build.get("extensions", {}).get(name, {})
    if not entry.get("error"):
        return ""
    compiler = build.get("compiler") if name == "_C" else f"nvcc {build.get('cuda')}"
    return f"{entry['reason']} ({compiler}, torch {build.get('torch')})"


def _not_built(name: str, build: dict[str, Any]) -> str:
    if failure := _failure(name, build):
        return f"not built: {failure}; put that right and {_REBUILD}"
    reason = build.get("extensions", {}).get(name, {}).get("reason")
    if reason:
        return f"not built: {reason}"
    if build:
        return f"not built: its file is missing; {_REBUILD}"
    files = (path.name for path in _FOLDER.glob(f"{name}.*") if path.suffix in (".so", ".pyd"))
    others = sorted(_builds) or sorted(files)
    if others:
        return f"built for another Python only ({', '.join(others)}), not for {_PYTHON}; {_REBUILD}"
    return f"not built: this copy of the package was never installed; {_REBUILD}"


def _warn(message: str) -> None:
    """A RuntimeWarning at the line that led here: not of this package, torch or the imports."""
    own = (str(__package__).partition(".")[0], "importlib", "torch")
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in own:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        RuntimeWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _load(name: str, build: dict[str, Any], *, stable_abi: bool) -> Extension:
    full_name = f"{__package__}.{name}"

    def missing(reason: str) -> Extension:
        return Extension(full_name, False, reason, build)

    if _DISABLED:
        return missing("switched off by DEEPLAB_FAST_DISABLE_EXT=1")
    files = (_FOLDER / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        return missing(_not_built(name, build))
    if stable_abi and torch.version.cuda is None:
        return missing(f"built, but torch {torch.__version__} has no CUDA")
    built_for = build.get("torch")
    # Only the stable ABI outlives a torch release.
    if built_for and not stable_abi and _minor(built_for) != _minor(torch.__version__):
        return missing(f"built for torch {built_for}, not for {torch.__version__}; {_REBUILD}")
    try:
        if stable_abi:
            torch.ops.load_library(str(path))
            return Extension(full_name, True, "", build)
        return Extension(full_name, True, "", build, importlib.import_module(full_name))
    except Exception as error:
        symbol = re.search(r"undefined symbol: (\S+)", str(error))
        if symbol:
            return missing(f"built for another torch: no symbol {symbol.group(1)}; {_REBUILD}")
        return missing(f"cannot be loaded ({type(error).__name__}: {error}); {_REBUILD}")


def _load_sm90(build: dict[str, Any], variant: str) -> Extension:
    if not variant:
        return _load("_C_sm90", build, stable_abi=True)
    if variant not in _VARIANTS:
        reason = f"DEEPLAB_FAST_SM90_VARIANT={variant} is not allowed: use {' or '.join(_VARIANTS)}"
        return Extension(f"{__package__}._C_sm90", False, reason, build)
    found = _load(f"_C_sm90_{variant}", build, stable_abi=True)
    if found.loaded or f"_C_sm90_{variant}" in build.get("extensions", {}):
        return found
    how = f"only DEEPLAB_FAST_SM90_VARIANTS={variant} at build time makes this variant"
    return replace(found, reason=f"{found.reason}; {how}")


_builds = _read_builds()
_build = _builds.get(_PYTHON, {})
CPU = _load("_C", _build, stable_abi=False)
CUDA = _load("_C_cuda", _build, stable_abi=True)
SM90 = _load_sm90(_build, os.environ.get("DEEPLAB_FAST_SM90_VARIANT", ""))

_failures = [
    f"{extension.name} {failure}"
    for extension in (CPU, CUDA, SM90)
    if not (extension.loaded or _DISABLED)
    and (failure := _failure(extension.name.rpartition(".")[2], _build))
]
if _failures:
    _warn(
        f"{'; '.join(_failures)}. Without it deeplab_fast is slower. To end this warning, put "
        f"that right and {_REBUILD}, or build with DEEPLAB_FAST_BUILD_EXT=0 for pure Python, or "
        "run with DEEPLAB_FAST_DISABLE_EXT=1."
    )

# Once in a process; not of what the user chose, or was told of above.
_silent = _DISABLED or bool(_failures) or CPU.reason.endswith("DEEPLAB_FAST_BUILD_EXT=0")


def warn_of_missing_cpu() -> None:
    """Warns, once, that a call runs in PyTorch alone because the C++ ops are missing, and how to
    get them; called where they would have run."""
    global _silent
    if _silent or CPU.loaded:
        return
    _silent = True
    cure = "" if "pip install" in CPU.reason else f"; put that right and {_REBUILD}"
    _warn(
        "deeplab_fast runs in PyTorch alone, and slower, on this CPU: its C++ operators are "
        f"{CPU.reason}{cure}. DEEPLAB_FAST_DISABLE_EXT=1 does without them and without this "
        "warning."
    )
