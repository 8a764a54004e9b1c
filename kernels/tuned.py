"""Launch configurations that `python -m bench.tune` has measured, read back from its files.

    configs/GPU/KERNEL.json         GPU: the device's name, _ for what is no letter, digit or . _ -

    {"version": 1, "kernel": KERNEL, "gpu": the device's name, "triton": "3.7.1",
     "entries": [{"key": {...}, "config": {...}}, ...]}

A key is what the analytic choice would rest on (`configs.TUNABLE` has the dataclasses), a config
what it would give. A file is read when a kernel first runs on a device of its name, once in a
process. It is ignored as a whole, with one line in the log that says why, where any of it does not
fit: another version, another Triton (registers and shared memory are its compiler's), fields that
are unknown, missing or of another type, more shared memory than the device has, a configuration
that is none of the kernel's candidates and so was never compiled by the tests.

`DEEPLAB_FAST_TUNED=0` leaves all files unread. Importing this module does not import Triton.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configs import Device

logger = logging.getLogger("deeplab_fast")

FOLDER = Path(__file__).resolve().parent / "configs"
ENVIRONMENT_VARIABLE = "DEEPLAB_FAST_TUNED"
# Of the files: raised when keys, configurations or the kernels behind them change their meaning.
VERSION = 1


@dataclass(frozen=True)
class Tunable:
    """What the entries of a kernel's file are.

    Attributes:
        key: frozen dataclass of the facts of a call.
        config: frozen dataclass of a configuration.
        candidates: (key, device) -> configurations that may be chosen.
        problem: (key, config, device) -> why a configuration cannot run on a device, or "".
    """

    key: type
    config: type
    candidates: Callable[[Any, Device], list[Any]]
    problem: Callable[[Any, Any, Device], str] = lambda key, config, device: ""


def path_of(folder: Path, gpu: str, kernel: str) -> Path:
    """The file of a kernel on a GPU of this name."""
    return folder / re.sub(r"[^A-Za-z0-9._-]+", "_", gpu) / f"{kernel}.json"


def find(kernel: str, tunable: Tunable, key: Any, device: Device) -> Any | None:
    """The measured configuration of a call; None where there is none.

    Args:
        kernel: name of the file.
        tunable: what its entries are.
        key: the call, an instance of `tunable.key`.
        device: the GPU.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0":
        return None
    return _entries(kernel, tunable, device).get(key)


def read(path: Path, kernel: str, tunable: Tunable, device: Device) -> dict[Any, Any]:
    """Configurations by key.

    Raises:
        ValueError: the file does not fit, with the first reason.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"it cannot be read ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise ValueError('it is no object with a list of "entries"')
    facts = {
        "version": (content.get("version"), VERSION),
        "kernel": (content.get("kernel"), kernel),
        "gpu": (content.get("gpu"), device.name),
        "triton": (minor(content.get("triton")), minor(installed_triton())),
    }
    for name, (found, expected) in facts.items():
        if found != expected:
            raise ValueError(f"it is of {name} {found!r}, here it is {expected!r}")
    made: dict[Any, Any] = {}
    for number, entry in enumerate(content["entries"]):
        try:
            key, config = _entry(entry, tunable, device)
        except ValueError as error:
            raise ValueError(f"entry {number}: {error}") from error
        if key in made:
            raise ValueError(f"entry {number}: its key is that of an entry before")
        made[key] = config
    return made


def installed_triton() -> str:
    """Version of Triton, without importing it; "" where it has none to show."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def minor(version: Any) -> str:
    """Major and minor number of a version: what a measurement depends on."""
    return ".".join(str(version).split(".")[:2])


@cache
def _entries(kernel: str, tunable: Tunable, device: Device) -> dict[Any, Any]:
    path = path_of(FOLDER, device.name, kernel)
    if not path.is_file():
        return {}
    try:
        return read(path, kernel, tunable, device)
    except ValueError as error:
        logger.warning(
            "%s is ignored, configurations are chosen by the analytic model: %s "
            "(python -m bench.tune writes it anew, %s=0 leaves it unread)",
            path,
            error,
            ENVIRONMENT_VARIABLE,
        )
        return {}


def _entry(entry: Any, tunable: Tunable, device: Device) -> tuple[Any, Any]:
    if not isinstance(entry, dict) or not {"key", "config"} <= entry.keys():
        raise ValueError('it is no object with "key" and "config"')
    key = _made(tunable.key, entry["key"])
    config = _made(tunable.config, entry["config"])
    reason = tunable.problem(key, config, device)
    if not reason and config not in tunable.candidates(key, device):
        reason = f"{config} is no candidate for this kernel, device and key"
    if reason:
        raise ValueError(reason)
    return key, config


def _made(kind: type, given: Any) -> Any:
    """An instance of a dataclass from what JSON made of another.

    Raises:
        ValueError: fields are unknown, missing or of another type.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    if not isinstance(given, dict):
        raise ValueError(f"{kind.__name__} is {given!r}, expected an object")
    for names, what in ((given.keys() - fields, "unknown"), (fields.keys() - given, "missing")):
        if names:
            raise ValueError(f"{kind.__name__}: {what} field {', '.join(sorted(names))}")
    return kind(**{name: _value(name, hint, given[name]) for name, hint in fields.items()})


def _value(name: str, hint: Any, given: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _made(hint, given)
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if not isinstance(given, list):
            raise ValueError(f"{name} is {given!r}, expected a list")
        if parts[-1] is Ellipsis:
            parts = parts[:1] * len(given)
        if len(parts) != len(given):
            raise ValueError(f"{name} is {given!r}, expected {len(parts)} values")
        return tuple(_value(name, part, each) for part, each in zip(parts, given, strict=True))
    # Not isinstance: true and false are integers too.
    if type(given) is not hint:
        raise ValueError(f"{name} is {given!r}, expected {hint.__name__}")
    return given
