"""What an exported file computes, as a module that torch.export can follow."""

from __future__ import annotations

import contextlib
import copy
import importlib
import operator
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from deeplab_fast.engine.runner import is_out_of_memory
from deeplab_fast.exporting.description import Description
from deeplab_fast.nn.aspp import SingleValueBatchNorm2d

if TYPE_CHECKING:
    from torch.export import ExportedProgram

INPUT = "images"
# torch.export takes sizes apart from which no map of the usual five halvings has one pixel alone:
# a size of 1 means repetition to it.
SMALLEST = 33
# What dynamic sizes are traced with: no two alike, and none that another has as a part.
_TRACED = (2, 6 * SMALLEST, 8 * SMALLEST)
_SHOWN = 400
# Far above what folding rounds, and below what a bias that is not read changes.
_FOLDED = 1e-3
_lock = threading.RLock()


class ExportError(RuntimeError):
    """A model that cannot be exported as asked, or a file that does not compute what it does."""


class ExportGraph(nn.Module):
    """images -> logits or labels, as the description has them.

        x      = (resize(images) / 255 - mean) / std          # of photos
        full   = interpolate(model(x), size of images)         # bilinear
        labels = argmax_c full                                 # first of equals

    Args:
        model: has `forward_logits` and `align_corners`, in eval mode.
        description: what the file takes and gives.
        in_matrices: resize photos by products of matrices, for formats that OpenVINO reads: 2026.4
            ignores that an ONNX Resize is to be antialiased.
    """

    def __init__(
        self, model: nn.Module, description: Description, in_matrices: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self._description = description
        self._in_matrices = in_matrices
        # Of its weights; an optimised model has none.
        self._dtype = next((p.dtype for p in model.parameters()), torch.float32)
        self._align_corners = bool(model.align_corners)
        # Constants: buffers would come first in the order of inputs of some runtimes.
        self._mean = _channels(description.mean)
        self._std = _channels(description.std)

    def forward(self, images: Tensor) -> Tensor:
        if not self._description.photos:
            return self._result(images, images.shape[2], images.shape[3])
        levels = self.levels(images)
        if self._description.resize is not None:
            levels = levels.round()
        return self.of_levels(levels, images.shape[1], images.shape[2])

    def levels(self, photos: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> levels 0..255, float32 [N, 3, h, w] of the network's size and order
        of channels, before they are rounded to whole ones as `Preprocess.batch` does."""
        height, width = photos.shape[1], photos.shape[2]
        x = photos.permute(0, 3, 1, 2)
        if self._description.channels == "BGR":
            x = x.flip(1)
        x = x.to(torch.float32)
        resize = self._description.resize
        if resize is None:
            return x
        if isinstance(resize, int):
            # No comparison: what is symbolic would have to be decided.
            short = torch.sym_min(height, width)
            resize = (resize * height // short, resize * width // short)
        return self._resized(x, resize)

    def of_levels(self, levels: Tensor, height: int, width: int) -> Tensor:
        """The result, of this size, for levels [N, 3, h, w]."""
        return self._result((levels / 255 - self._mean) / self._std, height, width)

    def with_logits(self) -> ExportGraph:
        """The same model's logits, whatever its own result is."""
        return ExportGraph(self.model, replace(self._description, labels=False), self._in_matrices)

    def converted(self, dtype: torch.dtype) -> ExportGraph:
        """A copy with the model's weights in another dtype."""
        with torch.inference_mode(False), torch.no_grad():
            model = copy.deepcopy(self.model).to(dtype)
        return ExportGraph(model, self._description, self._in_matrices)

    def _result(self, x: Tensor, height: int, width: int) -> Tensor:
        forward: Any = self.model.forward_logits
        logits = forward(x if self._dtype == x.dtype else x.to(self._dtype))
        full = F.interpolate(
            logits if logits.dtype == torch.float32 else logits.to(torch.float32),
            (height, width),
            mode="bilinear",
            align_corners=self._align_corners,
        )
        if not self._description.labels:
            return full
        if self._description.num_classes == 1:
            return (full[:, 0] > 0).to(torch.uint8)
        labels = full.argmax(1)
        return labels.to(torch.uint8) if self._description.num_classes <= 256 else labels

    def _resized(self, x: Tensor, size: Sequence[int]) -> Tensor:
        if not self._in_matrices:
            return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        rows = resize_matrix(x.shape[2], size[0], x.device)
        columns = resize_matrix(x.shape[3], size[1], x.device)
        # A constant matrix from the right becomes a layer of OpenVINO's, and 2026.4 fails to fuse
        # the normalisation of channels into one: so none comes last.
        return torch.matmul(rows, torch.matmul(x, columns.t()))


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu").view(1, 3, 1, 1)


def resize_matrix(size: int, target: int, device: torch.device | None = None) -> Tensor:
    """The rows of antialiased bilinear interpolation along one axis: fp32 [target, size].

        w[i, j] = max(0, 1 - |j + 1/2 - (i + 1/2) scale| / max(scale, 1)),  scale = size / target

    with rows divided by their sums, as torch.nn.functional.interpolate(antialias=True) has it.
    """
    inputs = torch.arange(size, dtype=torch.float32, device=device) + 0.5
    # Whole numbers, which may be symbolic, become tensors here.
    outputs = torch.arange(target, dtype=torch.float32, device=device) + 0.5
    scale = inputs.new_full((1,), 1.0) * size / target
    distance = (inputs[None, :] - outputs[:, None] * scale).abs()
    weights = (1 - distance / scale.clamp(min=1.0)).clamp(min=0.0)
    return weights / weights.sum(1, keepdim=True)


def exported_program(graph: ExportGraph, description: Description) -> ExportedProgram:
    """The graph as torch.export has it, for the sizes that the description names.

    Raises:
        ExportError: torch.export cannot follow the model, or only for some sizes.
    """
    from torch.export import Dim, export

    dims: Any = {}
    rows = 1 if description.photos else 2
    if description.batch is None:
        dims[0] = Dim("batch", min=1)
    if description.size is None:
        for place, name in ((rows, "height"), (rows + 1, "width")):
            if description.multiple == 1:
                dims[place] = Dim(name, min=description.smallest)
            else:
                least = -(-description.smallest // description.multiple)
                dims[place] = description.multiple * Dim(f"{name}_steps", min=least)
    dtype = _input_dtype(description)
    example = torch.zeros(example_shape(description), dtype=dtype, device="cpu")
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")
            program = export(graph, (example,), dynamic_shapes=(dims,), strict=False)
    # The model's own code may raise anything.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        what = " ".join(str(error).split())[:_SHOWN] or type(error).__name__
        advice = "wrap it in a module that torch.export follows"
        if description.size is None:
            advice = "name a size, e.g. size=(512, 1024), which fixes height and width"
        raise ExportError(
            f"torch.export does not follow {description.model} for {description.input_text}: "
            f"{what}; {advice}"
        ) from error
    return program


def write_elsewhere(program: ExportedProgram) -> None:
    """Lets activations and sums in place give a new map instead, where nobody else sees the one
    that they would change; changes the program, not what it computes.

    torch.onnx.export takes those in place apart, which with symbolic sizes was half of its time:
    0.2 s for each ReLU6 (bench/NOTES.md). What runs as it is keeps them, and their memory.
    """
    aten = torch.ops.aten
    elsewhere = {
        aten.add_.Tensor: aten.add.Tensor,
        aten.hardsigmoid_.default: aten.hardsigmoid.default,
        aten.hardswish_.default: aten.hardswish.default,
        aten.hardtanh_.default: aten.hardtanh.default,
        aten.relu_.default: aten.relu.default,
        aten.relu6_.default: aten.relu6.default,
        aten.silu_.default: aten.silu.default,
    }
    makes_new = {aten.conv2d.default, aten.batch_norm.default, *elsewhere.values()}
    for node in program.graph.nodes:
        if node.target not in elsewhere:
            continue
        alone = node.args[0].target in makes_new and len(node.args[0].users) == 1
        # In place the dtype is that of the first, else the larger one.
        dtypes = {getattr(given.meta["val"], "dtype", None) for given in node.all_input_nodes}
        if alone and len(dtypes) == 1:
            node.target = elsewhere[node.target]
    program.graph_module.recompile()


@contextlib.contextmanager
def pools_of_any_size() -> Iterator[None]:
    """Pooling does not tell odd from even sizes apart, as it does in PyTorch before 2.13.

    It asks there whether a remainder has the sign of its divisor, which is always so.
    """
    meta: Any = importlib.import_module("torch._meta_registrations")
    before = getattr(meta, "div_rtn", None)
    if before is None:
        yield
        return
    meta.div_rtn = operator.floordiv
    try:
        yield
    finally:
        meta.div_rtn = before


def folded(graph: ExportGraph, description: Description) -> ExportGraph:
    """A copy with batch norms in the convolutions before them; the graph where there are none.

    Of convolutions whose only reader is a module of batch norm that does nothing else, and of
    weights that nothing else reads.

    Raises:
        ExportError: torch.export cannot follow the model.
    """
    if not any(map(_is_norm_alone, graph.modules())):
        return graph
    # Which modules follow each other does not depend on the size, and one size is followed sooner.
    program = exported_program(graph, replace(description, size=_sides(description)))
    pairs = [
        (conv, norm)
        for conv, norm in _norms_behind_convolutions(program)
        if _is_norm_alone(graph.get_submodule(norm))
        and isinstance(graph.get_submodule(conv), nn.Conv2d)
    ]
    with torch.inference_mode(False), torch.no_grad():
        own = copy.deepcopy(graph)
        for conv_name, norm_name in pairs:
            conv: Any = own.get_submodule(conv_name)
            norm: Any = own.get_submodule(norm_name)
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight,
                conv.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
            parent, _, leaf = norm_name.rpartition(".")
            setattr(own.get_submodule(parent), leaf, nn.Identity())
        # A class of its own may read the weight and no bias, and a module have several names.
        shape = example_shape(replace(description, batch=1))
        source = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, shape, generator=source, dtype=torch.uint8, device="cpu")
        example = noise if description.photos else noise.to(torch.float32) / 255
        try:
            before, after = (each.with_logits()(example) for each in (graph, own))
        # A batch norm's statistics may be read by other code.
        except AttributeError:
            return graph
        is_same = float((before - after).norm()) <= _FOLDED * float(before.norm())
    return own if is_same else graph


def _norms_behind_convolutions(program: ExportedProgram) -> Iterator[tuple[str, str]]:
    """(name of a convolution, name of the batch norm that alone reads it)."""
    parts = {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.target is not None
    }

    def owner(value: Any, leaf: str) -> str | None:
        """The module whose tensor of this name a node is, which nothing else reads."""
        name = parts.get(getattr(value, "name", ""), "")
        return name.removesuffix(leaf) if name.endswith(leaf) and len(value.users) == 1 else None

    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.batch_norm.default or node.args[5]:
            continue
        conv = node.args[0]
        if conv.target is not torch.ops.aten.conv2d.default or len(conv.users) != 1:
            continue
        conv_name, norm_name = owner(conv.args[1], ".weight"), owner(node.args[3], ".running_mean")
        if conv_name is not None and norm_name is not None:
            yield conv_name, norm_name


def _is_norm_alone(module: nn.Module) -> bool:
    """A batch norm that does nothing else."""
    known = (nn.BatchNorm2d, nn.SyncBatchNorm, SingleValueBatchNorm2d)
    plain = any(type(module).forward is kind.forward for kind in known)
    return plain and not (module._forward_hooks or module._forward_pre_hooks)


def example_shape(description: Description) -> tuple[int, ...]:
    """The shape of an input that torch.export follows the graph with."""
    n = _TRACED[0] if description.batch is None else description.batch
    height, width = _sides(description)
    return (n, height, width, 3) if description.photos else (n, 3, height, width)


def _sides(description: Description) -> tuple[int, int]:
    if description.size is not None:
        return description.size
    multiple = description.multiple
    height, width = (-(-side // multiple) * multiple for side in _TRACED[1:])
    return height, width


def _input_dtype(description: Description) -> torch.dtype:
    return torch.uint8 if description.photos else torch.float32


@contextlib.contextmanager
def exporter() -> Iterator[None]:
    """Around calls of PyTorch's exporters: no notes on what they leave out, pools of any size, and
    one thread at a time, as their state is the process's."""
    import logging

    names = (
        "torch.onnx",
        "onnxscript",
        "onnx_ir",
        "torch.export",
        "torch._inductor",
        "torch._export",
    )
    loggers = [logging.getLogger(name) for name in names]
    with _lock, warnings.catch_warnings(), pools_of_any_size():
        levels = [logger.level for logger in loggers]
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
