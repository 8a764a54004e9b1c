"""What a configuration would import: only names that are known may come from a file.

A transform, a callback, a logger, a strategy or a profiler may be named by the import path of any
callable. Whoever types one, or passes it from Python, has chosen it; a file may be anybody's. From
a file are taken the package's own transforms and those of Lightning's classes that run no foreign
code, with arguments that are plain values.
"""

from __future__ import annotations

import json
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from deeplab_fast._documents import shown

__all__ = ["TRANSFORMS", "Import", "check_imports", "imports_of"]

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


@dataclass(frozen=True)
class Import:
    """A name in a configuration that would be imported and called.

    ``option`` is that of a training run, ``name`` the import path, ``key`` all that was written:
    two with the same key do the same.
    """

    option: str
    name: str
    key: str


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
            yield Import(option, str(name), _key(name))
    stage2 = values.get("stage2")
    if isinstance(stage2, Mapping):
        for each in _imports(stage2):
            yield Import(f"stage2.{each.option}", each.name, each.key)
    trainer = values.get("trainer")
    if isinstance(trainer, Mapping):
        for argument, value in trainer.items():
            for spec in value if isinstance(value, (list, tuple)) else (value,):
                if not _is_safe(argument, spec):
                    yield Import(f"trainer.{argument}", _named(spec), _key(spec))


def check_imports(
    values: Mapping[str, Any], source: str, chosen: Mapping[str, Any] | None = None
) -> None:
    """Raises ValueError for what a file would import.

    Args:
        values: what the file has, as :func:`imports_of` takes it.
        source: of the file, for the message.
        chosen: what was typed: the same there is allowed.
    """
    typed = {(each.option, each.key) for each in imports_of(chosen or {})}
    for each in imports_of(values):
        if (each.option, each.key) in typed:
            continue
        option = each.option.replace("_", "-")
        if option == "model-from":
            known = "no code"
        elif option.endswith("transform"):
            known = f"only {', '.join(TRANSFORMS)}"
        else:
            known = "only Lightning's own classes with plain values"
        raise ValueError(
            f"{shown(source, 300)} has --{shown(option)} {shown(each.name)}, code that would be "
            f"imported and run; from a file {known} may come. If you trust the file, add "
            "--allow-imports"
        )


def _is_safe(argument: object, value: object) -> bool:
    """Whether an argument of the trainer imports nothing, or only what is known."""
    if argument not in _SAFE:
        return not _has_class(value)
    if value is None or isinstance(value, (bool, int, float)):
        return True
    if isinstance(value, str):
        if argument in _REGISTERED:
            return True
        value = {"class_path": value}
    if not isinstance(value, Mapping):
        return not _has_class(value)
    if "class_path" not in value:
        return not _has_class(value)
    given = value.get("init_args") or {}
    cls = _safe_class(argument, value.get("class_path"))
    if cls is None or not isinstance(given, Mapping) or not value.keys() <= _SPEC:
        return False
    plain = _plain_parameters(cls)
    return all(name in plain and _is_plain(each) for name, each in given.items())


_SPEC = {"class_path", "init_args"}


def _safe_class(argument: str, name: object) -> type | None:
    if not isinstance(name, str) or name.rpartition(".")[2] not in _SAFE[argument]:
        return None
    package, short = _PACKAGES[argument], name.rpartition(".")[2]
    try:
        cls = getattr(import_module(package), short, None)
    # No Lightning, or one beside a torchvision that does not fit; training says so.
    except (ImportError, RuntimeError):
        return None
    if not isinstance(cls, type) or not cls.__module__.startswith("lightning.pytorch."):
        return None
    return cls if name in (short, f"{package}.{short}", f"{cls.__module__}.{short}") else None


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
