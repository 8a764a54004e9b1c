"""Exported files as ``--weights``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from deeplab_fast.cli.common import UsageError, check_backend

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from deeplab_fast.exporting import ExportedModel

# Options that choose or change a model that is built from weights.
_OF_WEIGHTS = ("model", "num_classes", "output_stride", "reset_head", "weights_part")


def add_runtime_argument(add: Callable[..., object]) -> None:
    add(
        "--runtime",
        type=str | None,
        metavar="NAME",
        help="what runs --weights FILE.onnx: onnxruntime or openvino; default: onnxruntime",
    )


def exported_model(config: Namespace) -> ExportedModel | None:
    """The exported file that ``--weights`` names, in its runtime; None where it names none.

    Raises:
        UsageError: it cannot be run, options are for models that are built from weights, or a
            runtime was given for such a model.
    """
    from deeplab_fast.exporting import is_exported, load_exported

    if not config.weights or not is_exported(config.weights):
        if config.runtime is None:
            return None
        raise UsageError(
            f"--runtime {config.runtime} is for exported files (.onnx, .xml, .pt2, .pt2-package); "
            "leave it out"
        )
    check_backend(config)
    given = [
        f"--{name.replace('_', '-')}"
        for name in (*_OF_WEIGHTS, "model_from", "no_accelerate", "dtype")
        if config.get(name)
    ]
    if config.device not in ("auto", "cpu"):
        given.append(f"--device {config.device}")
    try:
        model = load_exported(config.weights, runtime=config.runtime)
    except (ValueError, ImportError, OSError) as error:
        raise UsageError(f"--weights {config.weights}: {error}") from error
    own = model.description
    if own.photos:
        given += [f"--{name}" for name in ("mean", "std") if config.get(name) is not None]
        if own.resize is not None and config.size is not None:
            given.append("--size")
    if given:
        raise UsageError(
            f"{', '.join(given)}: {model.name} is an exported file ({own.input_text} -> "
            f"{own.result_text}), in which that is fixed, and runs on the CPU; leave it out, or "
            "export the model again"
        )
    return model
