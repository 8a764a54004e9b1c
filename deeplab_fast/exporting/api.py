"""`deeplab_fast.export`: a model as a file for another runtime."""

from __future__ import annotations

import copy
import logging
import operator
import os
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deeplab_fast._version import __version__
from deeplab_fast.data.images import as_rgb_array
from deeplab_fast.data.preprocess import Preprocess, PreprocessBGR
from deeplab_fast.dispatch.declare import decompositions
from deeplab_fast.engine.adapter import AdaptedModel, AssumedPreprocess, as_segmenter
from deeplab_fast.exporting.check import Check, allowed_error, check, is_close
from deeplab_fast.exporting.description import Description, DescriptionError
from deeplab_fast.exporting.formats import OPSET, check_packages, check_suffix, write
from deeplab_fast.exporting.graph import (
    SMALLEST,
    ExportError,
    ExportGraph,
    exported_program,
    exporter,
    folded,
)
from deeplab_fast.exporting.load import ExportedModel
from deeplab_fast.exporting.runtimes import RUNTIMES
from deeplab_fast.models.deeplabv3 import DeepLabV3
from deeplab_fast.program.frozen import freeze
from deeplab_fast.program.network import Network
from deeplab_fast.program.optimize import OptimizedDeepLabV3

if TYPE_CHECKING:
    import numpy as np
    from torch.export import ExportedProgram

__all__ = ["ExportError", "ExportReport", "export"]

logger = logging.getLogger("deeplab_fast")

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PRECISIONS = {
    ".onnx": ("fp32", "fp16", "int8"),
    ".xml": ("fp32", "fp16", "int8"),
    ".pt2": ("fp32", "fp16", "bf16", "int8"),
    ".pt2-package": ("fp32", "bf16"),
}
# Of a file with a fixed size that nobody names: torchvision's.
_USUAL_SIDE = 520


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote, and how it was found to compute.

    Attributes:
        path: the file.
        description: what it takes and gives.
        bytes: of the file, its weights included.
        check: its results beside the model's, None where that was not asked for.
    """

    path: Path
    description: Description
    bytes: int
    check: Check | None

    def __str__(self) -> str:
        own = self.description
        opset = f", opset {OPSET}" if self.path.suffix == ".onnx" else ""
        text = (
            f"{self.path}: {own.input_text} -> {own.result_text}, {own.precision}{opset}, "
            f"{self.bytes / 1e6:.1f} MB"
        )
        return text + ("\nnot run" if self.check is None else f"\n{self.check}")


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    size: Sequence[int] | int | None = None,
    dynamic: bool = True,
    labels: bool = False,
    preprocessing: bool = False,
    precision: str = "fp32",
    check: bool | str | os.PathLike[str] = True,
) -> ExportReport:
    """Write a model as a file for another runtime, and run that beside the model.

        .onnx          ONNX, opset 18: ONNX Runtime, OpenVINO and others that read it
        .xml           OpenVINO's IR, with a .bin of the weights beside it
        .pt2           a torch.export program: torch.export.load, no Python code of the model
        .pt2-package   AOTInductor: machine code for this kind of CPU, for C++ and Python; takes a
                       C++ compiler and, where sizes are open, minutes; checks no sizes when run

    The graph has one input and one result:

        images  float32 [N, 3, H, W], normalised by `model.preprocess`; with `preprocessing` uint8
                [N, H, W, 3], R, G, B, as photos lie in memory
        logits  float32 [N, C, H, W], as `model(images)["out"]`; with `labels`
        labels  uint8 [N, H, W], int64 above 256 classes: argmax of the logits, of one class whether
                its logit is above 0

    Batch norms are folded into the convolutions' weights, the auxiliary head is left out. With
    `preprocessing` photos are also resized by `model.preprocess.size`, and results have the photo's
    size: the labels are those of `model.predict`. Class names, palette, mean and std are in the
    file's metadata, one JSON text under "deeplab_fast".

    Args:
        model: of this package, one that `optimize` made (what it computes is exported: it has its
            folded weights only), or any other that `predict` takes and torch.export follows. It is
            not changed; it is exported as in eval mode.
        path: the file, by whose suffix the format is chosen.
        size: height and width of the input, an int for a square, fixed; None for any from 33
            pixels along each side on (of another library's model in multiples that it asks for).
        dynamic: False fixes batch and size: one image, and where `size` is None the size of
            `model.preprocess`, or 520x520. True leaves the batch open, and where `size` is None the
            size too.
        labels: reduce logits to labels in the graph.
        preprocessing: take uint8 photos.
        precision: "fp32"; "fp16", weights and maps in float16 (not .pt2-package); "bf16" likewise
            (.pt2, .pt2-package); "int8", of a calibrated model, with pairs of QuantizeLinear and
            DequantizeLinear around the wide convolutions, whose weights have 7 bits so that no
            CPU's 16-bit sums overflow. Input and logits are float32 in each.
        check: run the file, in ONNX Runtime, OpenVINO or PyTorch, on a photo that comes with the
            package, or on this one, and compare it with the model; of dynamic files at two sizes
            and batches.

    Returns:
        What was written and how far its results are from the model's; `print` it.

    Raises:
        ValueError: arguments that do not fit the model or the format, or a photo that cannot be
            read (ImageReadError).
        ImportError: the libraries of the format are missing; says which.
        ExportError: the model does not become such a file, or the file computes something else.
            Nothing is written then.
        FileNotFoundError, PermissionError: no such folder, or one that cannot be written to.

    Warns:
        UserWarning: in precisions below fp32, fewer than 99 % of the labels are those of fp32; or
            nothing tells how photos for another library's model are normalised.
    """
    path = Path(path)
    suffix = check_suffix(path)
    if precision not in _PRECISIONS[suffix]:
        raise ValueError(
            f"precision is {precision!r}, and a {suffix} file has {', '.join(_PRECISIONS[suffix])}"
        )
    for name, value in (("dynamic", dynamic), ("labels", labels), ("preprocessing", preprocessing)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}, expected True or False")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.parent} (to write {path.name} in)")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(
            f"the folder {path.parent} cannot be written to (for {path.name}); name another one"
        )
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it, e.g. {path / ('model' + suffix)}")
    weights = path.with_suffix(".bin")
    if suffix == ".xml" and weights.is_dir():
        raise ValueError(
            f"{weights} is a folder, and the weights are to be written there: name "
            f"another file than {path.name}"
        )
    photo = None if isinstance(check, bool) else as_rgb_array(check)
    check_packages(
        suffix, () if check is False or "torch" in RUNTIMES[suffix] else RUNTIMES[suffix][:1]
    )
    plain, called = _prepared(model)
    description = _described(plain, called, size, dynamic, labels, preprocessing, precision)
    with exporter(), torch.autocast("cpu", enabled=False):
        graph = ExportGraph(_traced(plain, precision), description, suffix in (".onnx", ".xml"))
        program = _program(graph, description)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        written = write(program, description, Path(folder), path.name)
        result = None
        if check is not False:
            graph = ExportGraph(plain, description)
            bound = allowed_error(plain, precision)
            with torch.autocast("cpu", enabled=False):
                result = _checked(ExportedModel(written[-1]), graph, photo, bound)
        size_of_all = sum(each.stat().st_size for each in written)
        for each in written:
            os.replace(each, path.with_name(each.name))
    report = ExportReport(path, description, size_of_all, result)
    logger.info("%s", report)
    return report


def _program(graph: ExportGraph, description: Description) -> ExportedProgram:
    """The program of a graph, of PyTorch's operations, without batch norms behind convolutions."""
    # In fp32: the statistics' roots would lose digits.
    graph = folded(graph, description)
    dtype = _DTYPES.get(description.precision, torch.float32)
    if dtype != torch.float32:
        graph = graph.converted(dtype)
    program = exported_program(graph, description)
    own = decompositions()
    if any(node.target in own for node in program.graph.nodes):
        program = program.run_decompositions(own)
    return program


def _prepared(model: nn.Module) -> tuple[nn.Module, str]:
    """A model as the file is compared with, apart from the caller's, and what it is called."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"the model is a {type(model).__name__}, expected a torch.nn.Module that maps images "
            "[N,3,H,W] to logits"
        )
    if isinstance(model, ExportedModel):
        raise ValueError(f"the model is the exported file {model.name}; export what it came from")
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise ValueError(
            f"the model is a {type(model).__name__}, which torch.export does not follow; export "
            "the module that it was scripted or traced from"
        )
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"the {type(model).__name__} has tensors on the meta device, which have no values; "
            "expected weights: load them first"
        )
    # A compiled model's own modules are what is compiled.
    model = getattr(model, "_orig_mod", model)
    segmenter = as_segmenter(model)
    if isinstance(model, Network) and _has_own_forward(model):
        # Its results are what it is called for.
        own: Any = model
        segmenter = AdaptedModel(model, own.preprocess, model.align_corners)
    if isinstance(segmenter, OptimizedDeepLabV3):
        if segmenter.device is not None and segmenter.device.type != "cpu":
            raise ValueError(
                f"the model was optimised on {segmenter.device}, and files are written from the "
                "CPU; export the model that it was made from"
            )
        name = segmenter.config[0] if segmenter.config else "an optimised model"
        return segmenter, name
    with torch.inference_mode(False):
        plain = _copied(segmenter)
    name = type(plain).__name__
    if isinstance(plain, AdaptedModel):
        name = plain.library_class
    elif isinstance(plain, Network):
        name = plain.config[0] if plain.config else name
    return plain, name


def _has_own_forward(model: Network) -> bool:
    """Whether a call does more than the logits of all heads and their interpolation."""
    hooks = model._forward_hooks or model._forward_pre_hooks
    return bool(hooks) or "forward" in vars(model) or type(model).forward is not DeepLabV3.forward


def _copied(model: nn.Module) -> nn.Module:
    """In eval mode, in fp32, on the CPU, without the auxiliary head."""
    memo: dict[int, Any] = {}
    if isinstance(model, Network) and model.aux_classifier is not None:
        # Its weights need no copy.
        memo[id(model.aux_classifier)] = None
    plain = copy.deepcopy(model, memo).eval().to("cpu")
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in plain.parameters()):
        plain = plain.to(torch.float32)
    if isinstance(plain, AdaptedModel):
        plain.model.eval()
    elif isinstance(plain, Network):
        # What the file is compared with.
        plain.precision = "fp32"
    return plain


def _described(
    plain: nn.Module,
    name: str,
    size: Sequence[int] | int | None,
    dynamic: bool,
    labels: bool,
    preprocessing: bool,
    precision: str,
) -> Description:
    own: Any = plain
    preprocess = getattr(plain, "preprocess", None)
    # Others may do more than their mean and std say.
    if type(preprocess) not in (Preprocess, PreprocessBGR, AssumedPreprocess):
        raise ValueError(
            f"model.preprocess is {preprocess!r}, which no file can describe; expected a "
            "deeplab_fast.data.Preprocess: set one, e.g. Preprocess(mean=(0.5,) * 3)"
        )
    assert isinstance(preprocess, Preprocess)
    if isinstance(preprocess, AssumedPreprocess):
        preprocess.tell(stacklevel=4)
    channels = "BGR" if isinstance(preprocess, PreprocessBGR) else "RGB"
    multiple = plain.divisor if isinstance(plain, AdaptedModel) else 1
    if preprocessing and multiple > 1 and preprocess.size is not None:
        raise ValueError(
            f"{name} takes multiples of {multiple} along each side and its preprocessing resizes "
            f"photos to {preprocess.size}; expected one of them: set model.preprocess to one "
            "without a size, or leave preprocessing out"
        )
    fixed = _size(size, multiple)
    if fixed is None and not dynamic:
        height, width = preprocess.target_size(_USUAL_SIDE, _USUAL_SIDE)
        fixed = (-(-height // multiple) * multiple, -(-width // multiple) * multiple)
    classes, palette = own.classes, own.palette
    described = Description(
        labels=labels,
        photos=preprocessing,
        num_classes=own.num_classes,
        classes=None if classes is None else tuple(map(str, classes)),
        palette=None if palette is None else tuple((int(r), int(g), int(b)) for r, g, b in palette),
        channels=channels,
        mean=preprocess.mean,
        std=preprocess.std,
        resize=preprocess.size,
        batch=None if dynamic else 1,
        size=fixed,
        multiple=multiple,
        smallest=1 if fixed is not None else SMALLEST,
        precision=precision,
        model=name,
        version=__version__,
    )
    try:
        # What reads it is as strict as it must be with any file.
        return Description.from_strings(described.as_strings(), name)
    except (DescriptionError, TypeError) as error:
        raise ValueError(
            f"no file can say of {name} what it is: {error.__cause__ or error}; expected names "
            "and colours of 0 to 255 for its classes: set model.classes and model.palette to such, "
            "or None"
        ) from error


def _size(size: Sequence[int] | int | None, multiple: int) -> tuple[int, int] | None:
    """The fixed (height, width), None for any."""
    if size is None:
        return None
    # Checked as that of a picture is.
    try:
        # NumPy's numbers too.
        both: Any = size if isinstance(size, Iterable) else (size, size)
        fixed = Preprocess(size=tuple(operator.index(side) for side in both)).size  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"size is {size!r}, expected (height, width) in pixels, an int for a square, or None"
        ) from error
    assert isinstance(fixed, tuple)
    if any(side % multiple for side in fixed):
        raise ValueError(
            f"size is {fixed} and the model takes multiples of {multiple} along each side; pass "
            f"{tuple(-(-side // multiple) * multiple for side in fixed)}"
        )
    return fixed


class _Frozen(nn.Module):
    """A program of fixed weights as the graph calls a model."""

    def __init__(self, plain: Network, precision: str) -> None:
        super().__init__()
        self.align_corners = plain.align_corners
        self._frozen, reason = freeze(plain, False, None, None, precision, portable=True)
        if self._frozen is None:
            raise ValueError(
                f"{type(plain).__name__} cannot be exported in {precision}: {reason}; expected a "
                "model of this package whose modules are known: export it in fp32"
            )

    def forward_logits(self, x: Tensor) -> Tensor:
        assert self._frozen is not None
        return self._frozen.exported(x, False)["out"]


def _traced(plain: nn.Module, precision: str) -> nn.Module:
    """What torch.export follows: of int8 another than what the file is compared with."""
    if isinstance(plain, OptimizedDeepLabV3):
        own = plain.precision or "fp32"
        if own != precision:
            raise ValueError(
                f"precision is {precision} and the model was optimised in {own}, whose weights it "
                f"has; pass precision={own!r}, or export the model that it was made from"
            )
        return plain
    if precision == "int8":
        if not isinstance(plain, Network):
            raise ValueError(
                f"precision is 'int8' and {type(plain).__name__} has no calibration; expected a "
                "model of this package after model.calibrate(photos), or another precision"
            )
        if plain.calibration is None:
            raise ValueError(
                "precision is 'int8' and the model is not calibrated; call model.calibrate(photos) "
                "first, or 'deeplab-fast calibrate'"
            )
        return _Frozen(plain, precision)
    return plain


def _checked(
    loaded: ExportedModel,
    graph: ExportGraph,
    photo: np.ndarray | None,
    bound: float,
) -> Check:
    result = check(loaded, graph, photo, bound)
    if not is_close(result):
        warnings.warn(
            f"{loaded.name} in {loaded.description.precision}: {result.same:.2%} of the labels are "
            "those of fp32 on the photo; look at its results before it is used, or export in fp32",
            UserWarning,
            stacklevel=3,
        )
    return result
