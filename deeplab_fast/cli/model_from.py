"""``--model-from``: a model that the user's own code builds."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

from deeplab_fast.cli.common import UsageError, check_backend, load_model, tell

if TYPE_CHECKING:
    from collections.abc import Callable

    from jsonargparse import Namespace
    from torch import nn

    from deeplab_fast.cli.common import Model
    from deeplab_fast.engine.adapter import AdaptedModel

# Options that choose or change a model of this package.
_OURS = ("model", "num_classes", "output_stride", "reset_head")
_SHOWN_FRAMES = 4


def load_any_model(config: Namespace, command: str) -> tuple[Model, str]:
    """The model that ``--model-from`` or ``--weights`` names, and what it is called."""
    if config.model_from:
        return load_own_model(config, command)
    if config.get("no_accelerate"):
        raise UsageError(
            "--no-accelerate is for models of --model-from; expected that option too. Models of "
            "this package are fast by themselves: leave it out"
        )
    return load_model(config, command)


def load_own_model(config: Namespace, command: str) -> tuple[AdaptedModel, str]:
    """The model that ``--model-from`` builds, with ``--weights`` in it, as predict takes it.

    It is accelerated, but where its code did that already or with ``--no-accelerate``.

    Returns:
        The model and the text of ``--model-from``.

    Raises:
        UsageError: there is no such function, it fails, or gives no model; weights that do not fit;
            options that are for models of this package.
    """
    from deeplab_fast import DeepLabV3
    from deeplab_fast.engine.adapter import AdaptedModel, as_segmenter
    from deeplab_fast.weights import load_module, load_weights

    check_backend(config)
    spec = config.model_from
    given = [f"--{name.replace('_', '-')}" for name in _OURS if config.get(name)]
    if given:
        raise UsageError(
            f"--model-from and {', '.join(given)} were both given; expected one of them: the "
            "function builds the model, with its classes and strides"
        )
    if config.weights_part and not config.weights:
        raise UsageError("--weights-part names a part of --weights FILE, which is missing")
    model = built(spec)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            segmenter = as_segmenter(model)
            inner = segmenter.model if isinstance(segmenter, AdaptedModel) else segmenter
            if config.weights and isinstance(inner, DeepLabV3):
                load_weights(inner, config.weights, part=config.weights_part)
            elif config.weights:
                load_module(inner, config.weights, part=config.weights_part)
            segmenter.eval()
            # Without the option the command runs nothing that would be faster.
            if config.get("no_accelerate") is False:
                _accelerate(inner, command)
            # What the model returns shows here, before anything is written.
            missing = [n for n in ("num_classes", "preprocess") if not hasattr(segmenter, n)]
    except (ValueError, OSError, RuntimeError) as error:
        raise UsageError(f"--model-from {spec}: {error}") from error
    if missing:
        raise UsageError(
            f"--model-from {spec}: {type(segmenter).__name__} has forward_logits but no "
            f"{' and no '.join(missing)}; expected both, or a model without forward_logits, which "
            "is called. Set them on the model"
        )
    for warning in caught:
        tell(command, f"warning: {warning.message}")
    return cast("AdaptedModel", segmenter), spec


def _accelerate(model: nn.Module, command: str) -> None:
    from deeplab_fast import accelerate, accelerate_report

    try:
        # Its own choice of what is left alone stands.
        if not accelerate_report(model).accelerated:
            accelerate(model, training=False)
    except TypeError as error:
        # A scripted model.
        tell(command, f"note: the model runs as it is: {error}")


def built(spec: str) -> nn.Module:
    """What ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION`` returns, called without arguments.

    The current folder, and that of FILE.py, are put before ``sys.path``.

    Raises:
        UsageError: there is no such function, it fails, or it returns no module.
    """
    from torch import nn

    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name:
        raise UsageError(
            f"--model-from {spec}: expected MODULE:FUNCTION, e.g. my_package.models:build, or "
            "FILE.py:FUNCTION"
        )
    function: object = _imported(source, spec)
    for part in name.split("."):
        if not hasattr(function, part):
            raise UsageError(
                f"--model-from {spec}: {source} has no {name}; expected a function of it that "
                f"takes no arguments and returns a torch.nn.Module. It has: {_callables(function)}"
            )
        function = getattr(function, part)
    if isinstance(function, nn.Module):
        raise UsageError(
            f"--model-from {spec} is a {type(function).__name__}, expected a function that returns "
            f"it: def build(): return {name}"
        )
    if not callable(function):
        raise UsageError(
            f"--model-from {spec} is a {type(function).__name__}, expected a function that takes "
            "no arguments and returns a torch.nn.Module"
        )
    model = _run(cast("Callable[[], object]", function), spec)
    if not isinstance(model, nn.Module):
        what = "None" if model is None else f"a {type(model).__name__}"
        raise UsageError(
            f"--model-from {spec} returned {what}, expected a torch.nn.Module that maps images "
            "[N,3,H,W] to logits [N,C,h,w]; return the model alone"
        )
    return model


def _callables(module: object) -> str:
    """What a module defines that could be called."""
    own = [
        name
        for name, value in getattr(module, "__dict__", {}).items()
        if callable(value) and getattr(value, "__module__", "") == getattr(module, "__name__", None)
    ]
    return ", ".join(own) or "none"


def _imported(source: str, spec: str) -> ModuleType:
    folder = os.getcwd()
    if not source.endswith(".py"):
        if folder not in sys.path:
            sys.path.insert(0, folder)
        importlib.invalidate_caches()
        try:
            return cast(ModuleType, _run(lambda: importlib.import_module(source), spec))
        except UsageError as error:
            missing = error.__cause__
            # One that the module itself imports is its own fault.
            if not isinstance(missing, ModuleNotFoundError) or missing.name is None:
                raise
            if not f"{source}.".startswith(f"{missing.name}."):
                raise
            raise UsageError(
                f"--model-from {spec}: no module is named {missing.name!r}, expected one in the "
                f"current folder ({folder}) or installed; for a file write path/to/file.py:"
                "FUNCTION"
            ) from missing
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"--model-from {spec}: {source} is no file, expected FILE.py:FUNCTION")
    for each in (folder, os.path.abspath(path.parent)):
        if each not in sys.path:
            sys.path.insert(0, each)
    # A name of its own: the file may be called like an installed module.
    name = f"deeplab_fast_model_from_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    # Dataclasses and pickles look their module up there.
    sys.modules[name] = module
    loader = found.loader
    _run(lambda: loader.exec_module(module), spec)
    return module


def _run(call: Callable[[], object], spec: str) -> object:
    """The user's code; UsageError with the last lines of its traceback where it fails."""
    try:
        return call()
    # It may raise anything, and a script without a main guard may leave.
    except (Exception, SystemExit) as error:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename not in (__file__, importlib.__file__)
            and not frame.filename.startswith("<frozen importlib")
        ]
        lines = traceback.format_list(frames[-_SHOWN_FRAMES:])
        lines += traceback.format_exception_only(error)
        raise UsageError(
            f"--model-from {spec}: its code failed with {type(error).__name__}; expected a "
            "function that builds the model without arguments. Its traceback ends with\n"
            + "".join(lines).rstrip()
        ) from error
