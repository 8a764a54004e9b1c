"""What a configuration would import: only names that are known may come from a file.

A transform, a callback, a logger, a strategy or a profiler may be named by the import path of any
callable. Whoever types one, or passes it from Python, has chosen it; a file may be anybody's. From
a file are taken the package's own transforms and those of Lightning's classes that run no foreign
code, with arguments that are plain values.
"""

from __future__ import annotations

import json
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from deeplab_fast._documents import shown

__all__ = ["TRANSFORMS", "Import", "check_imports", "imports_of", "path_of_lightning"]

TRANSFORMS = ("paper", "torchvision", "none")
"""The package's own, by name."""

# Not LambdaCallback and others whose arguments are callables; not loggers that send what they log
# to a server.
_SAFE = {
    "callbacks": (
        *("BatchSizeFinder", "DeviceStatsMonitor", "EarlyStopping", "EMAWeightAveraging"),
        *("GradientAccumulationScheduler", "LearningRateFinder", "LearningRateMonitor"),
        *("ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint", "RichModelSummary"),
        *("RichProgressBar", "SpikeDetection", "StochasticWeightAveraging", "Timer"),
        "TQDMProgressBar",
    ),
    "logger": ("CSVLogger", "TensorBoardLogger"),
    "strategy": ("DDPStrategy", "SingleDeviceStrategy"),
    "profiler": ("AdvancedProfiler", "PassThroughProfiler", "SimpleProfiler"),
}
_PACKAGES = {
    "callbacks": "lightning.pytorch.callbacks",
    "logger": "lightning.pytorch.loggers",
    "strategy": "lightning.pytorch.strategies",
    "profiler": "lightning.pytorch.profilers",
}
# Of these a text is a name of Lightning's registries, no class.
_REGISTERED = ("strategy", "profiler")

# Arguments that signatures do not tell: passed on by name to PyTorch's class, or of a type that
# only type checkers see.
_SWITCHES = {
    "DDPStrategy": (
        *("broadcast_buffers", "bucket_cap_mb", "check_reduction", "find_unused_parameters"),
        *("gradient_as_bucket_view", "init_sync", "skip_all_reduce_unused_params", "static_graph"),
    ),
    "TensorBoardLogger": ("flush_secs", "max_queue", "purge_step"),
}
# A text is no path of a class for them: jsonargparse would import one.
_DEVICES = {
    "EMAWeightAveraging": ("device",),
    "SingleDeviceStrategy": ("device",),
    "StochasticWeightAveraging": ("device",),
}
_DEVICE = re.compile(r"[a-z]+(:[0-9]+)?")


@dataclass(frozen=True)
class Import:
    """A name in a configuration that would be imported and called.

    ``option`` is that of a training run, ``name`` the import path, ``key`` all that was written:
    two with the same key do the same. ``why`` says what of it is not known to be safe, and what
    may come.
    """

    option: str
    name: str
    key: str
    why: str


def imports_of(values: Mapping[str, Any]) -> list[Import]:
    """What the options of a run, or those of a file, would import that is not known to be safe.

    Args:
        values: plain values by the names of options, also ``model_from`` and ``stage2``; anything
            may be in them.
    """
    return list(_imports(values))


def _imports(values: Mapping[str, Any]) -> Iterator[Import]:
    for option in ("transform", "model_from"):
        name = values.get(option)
        if name is not None and (option != "transform" or name not in TRANSFORMS):
            known = ", ".join(TRANSFORMS) if option == "transform" else ""
            known = f"only {known}" if known else "no code"
            yield Import(option, str(name), _key(name), f"{_CODE}; from a file {known} may come")
    stage2 = values.get("stage2")
    if isinstance(stage2, Mapping):
        for each in _imports(stage2):
            yield replace(each, option=f"stage2.{each.option}")
    trainer = values.get("trainer")
    if isinstance(trainer, Mapping):
        for argument, value in trainer.items():
            for spec in value if isinstance(value, (list, tuple)) else (value,):
                why = _refused(argument, spec)
                if why:
                    yield Import(f"trainer.{argument}", _named(spec), _key(spec), why)


def check_imports(
    values: Mapping[str, Any],
    source: str,
    chosen: Mapping[str, Any] | None = None,
    advice: str = "add --allow-imports",
) -> None:
    """Raises ValueError for what a file would import.

    Args:
        values: what the file has, as :func:`imports_of` takes it.
        source: of the file, for the message.
        chosen: what was typed: the same there is allowed.
        advice: what somebody who trusts the file does.
    """
    typed = {(each.option, each.key) for each in imports_of(chosen or {})}
    for each in imports_of(values):
        if (each.option, each.key) in typed:
            continue
        option = each.option.replace("_", "-")
        raise ValueError(
            f"{shown(source, 300)} has --{shown(option)} {shown(each.name)}, {each.why}. If you "
            f"trust the file, {advice}"
        )


def path_of_lightning(name: str) -> str:
    """The path in ``lightning``, whose trainer it is, of a class of ``pytorch_lightning``.

    That package has a copy of each class, which is none of the trainer's. Another name stays.
    """
    package, dot, rest = name.partition(".")
    return f"lightning.pytorch.{rest}" if dot and package == "pytorch_lightning" else name


_CODE = "code that would be imported and run"


def _refused(argument: object, value: object) -> str:
    """Why an argument of the trainer may not come from a file; "" where it imports nothing, or
    only what is known."""
    if argument not in _SAFE or value is None or isinstance(value, (bool, int, float)):
        return _without_class(argument, value)
    if isinstance(value, str):
        if argument in _REGISTERED:
            return ""
        value = {"class_path": value}
    if not isinstance(value, Mapping) or "class_path" not in value:
        return _without_class(argument, value)
    name = value["class_path"]
    cls = _safe_class(argument, name)
    if isinstance(cls, str):
        return cls
    if not value.keys() <= _SPEC:
        more = ", ".join(shown(each) for each in value if each not in _SPEC)
        return f"with {more} beside class_path and init_args, which alone may come from a file"
    given = value.get("init_args")
    if given is not None and not isinstance(given, Mapping):
        return f"with init_args {shown(given)}, expected a map of names to values"
    for each, what in (given or {}).items():
        why = _refused_argument(cls, each, what)
        if why:
            return f"with its argument {shown(each)}, {why}"
    return ""


_SPEC = {"class_path", "init_args"}


def _without_class(argument: object, value: object) -> str:
    if not _has_class(value):
        return ""
    if argument in _SAFE:
        return f"{_CODE}: a class_path within a list or another value"
    return f"{_CODE}; from a file no class may come for this argument"


def _refused_argument(cls: type, name: object, value: object) -> str:
    """Why an argument of a listed class may not come from a file, "" where it may."""
    plain, switches = _plain_parameters(cls), _SWITCHES.get(cls.__name__, ())
    devices = _DEVICES.get(cls.__name__, ())
    if name in devices:
        good = value is None or isinstance(value, int) or isinstance(value, str)
        if good and (not isinstance(value, str) or _DEVICE.fullmatch(value)):
            return ""
        return f"which is {shown(repr(value))}; from a file a device such as cpu or cuda:0 may come"
    if name in switches:
        if value is None or isinstance(value, (bool, int, float)):
            return ""
        return f"which is {shown(repr(value))}; from a file true, false or a number may come"
    if name not in plain:
        known = ", ".join(sorted({*plain, *switches, *devices})) or "no arguments"
        return (
            "which is not known to take plain values alone: it may be a callable or an object, "
            f"code that would be imported and run; from a file may come {known}"
        )
    if _is_plain(value):
        return ""
    return (
        f"which is {shown(repr(value))}; from a file numbers and texts may come, no classes and no "
        "addresses of other machines"
    )


def _safe_class(argument: object, name: object) -> type | str:
    """A listed class by its name, or why there is none."""
    listed = _SAFE[str(argument)]
    short = name.rpartition(".")[2] if isinstance(name, str) else ""
    if not isinstance(name, str) or short not in listed:
        return (
            f"{_CODE}; from a file only these classes of Lightning may come, with plain values: "
            + ", ".join(listed)
        )
    package, path = _PACKAGES[str(argument)], path_of_lightning(name)
    try:
        cls = getattr(import_module(package), short, None)
    # No Lightning, or one beside a torchvision that does not fit; training says so.
    except (ImportError, RuntimeError) as error:
        return f"and Lightning, which would tell what that is, cannot be imported ({shown(error)})"
    if not isinstance(cls, type) or not cls.__module__.startswith("lightning.pytorch."):
        return f"which the installed Lightning does not have in {package}"
    if path not in (short, f"{package}.{short}", f"{cls.__module__}.{short}"):
        return f"{_CODE}; Lightning's own is {short}, which may come from a file"
    return cls


def _plain_parameters(cls: type) -> set[str]:
    """The parameters of a class that take plain values alone: no callables, no objects."""
    try:
        hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    # Names that Lightning imports for type checkers only.
    except NameError:
        return set()
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return {
        name
        for name, each in signature(cls).parameters.items()
        if each.kind in kinds and name in hints and _takes_plain(hints[name])
    }


def _takes_plain(hint: object) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return True
    if origin in (Union, types.UnionType):
        return all(map(_takes_plain, get_args(hint)))
    if origin is not None:
        inner = [each for each in get_args(hint) if each is not ...]
        return _takes_plain(origin) and all(map(_takes_plain, inner))
    return hint in _PLAIN


_PLAIN = frozenset(
    {bool, int, float, str, list, tuple, dict, type(None), Path, timedelta}
    | {os.PathLike, Sequence, Mapping}
)


def _is_plain(value: object) -> bool:
    """Numbers and texts, none of them the address of another machine."""
    if isinstance(value, Mapping):
        return all(_is_plain(key) and _is_plain(each) for key, each in value.items()) and (
            "class_path" not in value
        )
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return "://" not in value
    return value is None or isinstance(value, (bool, int, float))


def _has_class(value: object) -> bool:
    if isinstance(value, Mapping):
        return "class_path" in value or any(map(_has_class, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_has_class, value))


def _named(spec: object) -> str:
    name = spec.get("class_path") if isinstance(spec, Mapping) else spec
    return str(spec if name is None else name)


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=repr)
