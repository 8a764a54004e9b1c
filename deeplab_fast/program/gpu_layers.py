"""The layers of a program on a GPU: their filters are folded from the model's tensors at each call.

A layer is called with the `Folded` filters of the whole program and maps in channels_last.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch.declare import Implementation, describe, implementations
from ..ops.folded_aspp import FoldedAspp, FoldedProject
from ..ops.folded_conv import Filters, FoldedConv, Memo, Settings, of_vectors, ours
from ..ops.prepared import Plan
from ..plan import fold
from . import functional
from .functional import Function
from .layers import (
    CHANNELS_LAST,
    AtenLayer,
    ConvSpec,
    InvertedResidualSpec,
    Layer,
    MapLayer,
    PlainLayer,
    Program,
    SamePadding,
    ScalingLayer,
    SqueezeSpec,
    spread,
)
from .network import Network
from .staleness import is_dense
from .trace import filled

# Elements, in any dtype a multiple of 32 bytes.
_ALIGNMENT = 16
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def on_gpu(x: Tensor) -> bool:
    """Whether these layers are those of a call on x, or of weights like x."""
    return x.is_cuda


class Values(NamedTuple):
    """The filters of all convolutions, folded, in few allocations.

    flat: of `fold_filters`.
    shapes: of each convolution's filters.
    shift, bias, one, zero: of all convolutions, as in `Filters`.
    sizes: of each convolution's part of these, and of what lies between it and the next one.
    """

    flat: Tensor
    shapes: list[fold.Shape]
    shift: Tensor
    bias: Tensor
    one: Tensor
    zero: Tensor
    sizes: list[int]

    def filters(self) -> list[Filters]:
        """Of each convolution, views."""
        vectors = [
            vector.split(self.sizes)[::2] for vector in (self.shift, self.bias, self.one, self.zero)
        ]
        parts = zip(fold.views(self.flat, self.shapes), *vectors, strict=True)
        return [Filters(*each) for each in parts]


class Folded(NamedTuple):
    """What layers are called with.

    filters: of all convolutions.
    dtype: of the maps.
    settings: what choices of kernels depend on.
    autocast: the dtype of autocast where the model was called, None without.
    device: of the maps.
    converts: maps may come in another dtype or layout, from modules that run as they are.
    """

    filters: Sequence[Filters]
    dtype: torch.dtype
    settings: Settings
    autocast: torch.dtype | None
    device: torch.device
    converts: bool


class Sources:
    """The tensors of a model that its program reads, and their folding.

    With batch norm, in fp32 and rounded once to the dtype of the maps:

        scale = weight / sqrt(variance + eps)
        filters = scale * convolution's weight
        shift = bias + (convolution's bias - mean) * scale
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._specs: list[ConvSpec] = []
        self._choices: Memo[Implementation] = Memo()
        self._constants: Constants | None = None

    def add(self, spec: ConvSpec) -> int:
        """The number of its filters in what `fold` gives."""
        assert self._constants is None
        self._specs.append(spec)
        return len(self._specs) - 1

    def in_place(self) -> bool:
        """Whether all tensors still have the memory that they had when it was prepared."""
        constants = self.prepare()
        return [t.data_ptr() for t in constants.tensors] == constants.addresses

    def fold(self, dtype: torch.dtype, settings: Settings) -> Values:
        """The filters of all convolutions, from what the tensors hold now.

        Args:
            dtype: of the maps.
            settings: those of now.
        """
        c = self.prepare()
        scale = torch.cat(c.variances).to(torch.float32).add_(c.eps).rsqrt_()
        scale.mul_(torch.cat(c.weights))
        mean = torch.cat(c.means).to(torch.float32)
        if c.biases:
            mean.sub_(torch.cat(c.biases))
        shift = torch.cat(c.shifts).to(torch.float32).addcmul_(mean, scale, value=-1)

        def choose() -> Implementation:
            desc = describe("fold_filters", c.filters, scale, dtype)
            return ours(desc) or implementations("fold_filters")["reference"]

        kernel = self._choices.get((dtype, settings), choose)
        flat = kernel.run(c.filters, scale, dtype)
        if c.places is not None:
            shift = shift.index_select(0, c.places)
        return Values(flat, c.shapes, shift, shift.to(dtype), c.one, c.zero, c.sizes)

    def shapes(self, dtype: torch.dtype) -> list[Filters]:
        """As `fold`, on the meta device: shapes alone."""
        found = []
        for spec in self._specs:
            weight = torch.empty(spec.weight.shape, dtype=dtype, device="meta")
            vector = torch.empty(spec.weight.shape[0], device="meta")
            found.append(Filters(weight, vector, vector, vector, vector))
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of the filters."""
        return self._specs[0].weight.dtype

    def prepare(self) -> Constants:
        """The lists that `fold` reads, made at the first call; nothing can be added any more."""
        if self._constants is None:
            with torch.inference_mode(False), torch.no_grad():
                self._constants = Constants(self._specs, self._device)
        return self._constants


class Constants:
    """Lists of tensors, as `Sources.fold` joins them; ones and zeros stand for what is None."""

    def __init__(self, specs: Sequence[ConvSpec], device: torch.device) -> None:
        self.filters = [spec.weight for spec in specs]
        self.shapes = fold.shapes_of(self.filters)
        counts = [w.shape[0] for w in self.filters]
        # Kernels are chosen for the alignment of their vectors.
        self.sizes = [n for count in counts for n in (count, -count % _ALIGNMENT)]
        starts = torch.tensor([0, *self.sizes]).cumsum(0)[:-1:2].tolist()
        self.places: Tensor | None = None
        if any(self.sizes[1::2]):
            places = torch.zeros(sum(self.sizes), dtype=torch.int64)
            first = 0
            for start, count in zip(starts, counts, strict=True):
                places[start : start + count] = torch.arange(first, first + count)
                first += count
            self.places = places.to(device)
        self.one = torch.ones(sum(self.sizes), device=device)
        self.zero = torch.zeros(sum(self.sizes), device=device)
        self.weights: list[Tensor] = []
        self.shifts: list[Tensor] = []
        self.means: list[Tensor] = []
        self.variances: list[Tensor] = []
        self.biases: list[Tensor] = []
        eps = []
        ones, zeros = (v.split(self.sizes)[::2] for v in (self.one, self.zero))
        for spec, one, zero in zip(specs, ones, zeros, strict=True):
            norm = spec.norm
            self.variances.append(one if norm is None else norm.variance)
            eps += [0.0 if norm is None else norm.eps] * len(one)
            self.weights.append(one if norm is None else _or(norm.weight, one))
            self.means.append(zero if norm is None else _or(norm.mean, zero))
            # Without a norm the convolution's own bias is the shift.
            self.shifts.append(_or(spec.bias if norm is None else norm.bias, zero))
            self.biases.append(zero if norm is None else _or(spec.bias, zero))
        if not any(spec.norm is not None and spec.bias is not None for spec in specs):
            self.biases = []
        self.eps = torch.tensor(eps, dtype=torch.float32, device=device)
        lists = (self.filters, self.weights, self.shifts, self.means, self.variances, self.biases)
        self.tensors = [t for tensors in lists for t in tensors]
        self.addresses = [t.data_ptr() for t in self.tensors]


class GpuForms:
    """`inference.Forms` of a GPU.

    Args:
        device: of the weights.
        dtype: of the filters.
        frozen: None, or the dtype of maps where filters are folded once, for good.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, frozen: torch.dtype | None = None
    ) -> None:
        self.sources = Sources(device)
        self._device, self._dtype = device, dtype
        self._frozen, self._frozen_dtype = frozen is not None, frozen
        self.keeps_values = self._frozen
        self.what = f"dense fp16, bf16 or fp32, one dtype for all, on {device}"

    def takes(self, tensor: Tensor) -> bool:
        return self.takes_vector(tensor) and tensor.dtype == self._dtype

    def takes_vector(self, tensor: Tensor) -> bool:
        return is_dense(tensor) and tensor.dtype in DTYPES and tensor.device == self._device

    def conv(self, spec: ConvSpec, max_extra_bytes: int | None) -> MapLayer:
        return ConvLayer(spec, self.sources)

    def aspp(self, name: str, specs: Sequence[ConvSpec], max_extra_bytes: int | None) -> MapLayer:
        return AsppLayer(name, specs, self.sources, self._frozen)

    def pooled(self, spec: ConvSpec) -> Layer:
        return PooledLayer(spec, self.sources)

    def project(self, spec: ConvSpec, channels: int, max_extra_bytes: int | None) -> MapLayer:
        if spec.is_pointwise:
            return ProjectLayer(spec, channels, self.sources, self._frozen)
        return WideProjectLayer(spec, channels, self.sources)

    def squeeze_excitation(self, spec: SqueezeSpec) -> ScalingLayer:
        return SqueezeExcitationLayer(spec, self.sources)

    def inverted_residual(self, spec: InvertedResidualSpec, max_extra_bytes: int | None) -> None:
        return None

    def free(self, name: str, module: nn.Module) -> Layer:
        return AtenLayer(name, module)

    def plain(self, name: str, module: nn.Module) -> PlainLayer:
        # A frozen program has a copy of it.
        return UnknownLayer(name, module.to(self._frozen_dtype) if self._frozen else module)

    def finish(self, model: Network, program: Program) -> None:
        pass


class FoldedLayer(Layer):
    """A layer that is called with the filters of the program before its maps."""

    def call(self, folded: Folded, *tensors: Any) -> Tensor:
        """Its result."""
        raise NotImplementedError

    def folded_function(self, folded: Folded) -> Function:
        """As `Layer.function`."""
        raise NotImplementedError(f"{type(self).__name__} {self.name} cannot be exported")

    def folded_plans(self, folded: Folded, *shapes: Any) -> tuple[Plan, ...]:
        """As `Layer.plans`."""
        return ()


class ConvLayer(FoldedLayer, MapLayer):
    """act(conv(x) + shift [+ residual])."""

    def __init__(self, spec: ConvSpec, sources: Sources) -> None:
        super().__init__(spec.name)
        kernel = tuple(spec.weight.shape[2:])
        same = SamePadding(kernel, spec.stride, spec.dilation)
        self._same = same if spec.padding == "same" and same.can_be_uneven else None
        padding = same.halves if isinstance(spec.padding, str) else spec.padding
        geometry = (spec.dilation, spec.groups, spec.act)
        self._conv = FoldedConv(spec.stride, padding, *geometry)
        self._padded = FoldedConv(spec.stride, (0, 0), *geometry)
        self._filters = tuple(spec.weight.shape)
        self._index = sources.add(spec)

    def call(self, folded: Folded, x: Tensor, residual: Tensor | None = None) -> Tensor:
        sides = None if self._same is None else self._same.sides(x.shape)
        conv = self._conv
        if sides is not None:
            conv, x = self._padded, F.pad(x, sides)
        return conv(x, folded.filters[self._index], folded.settings, residual)

    def folded_function(self, folded: Folded) -> Function:
        conv, same = _conv(self._conv, folded.filters[self._index]), self._same

        def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
            return conv(x, residual, None if same is None else same.sides(x.shape))

        return run

    def output_shape(self, shape: Sequence[int], residual: object = None) -> tuple[int, ...]:
        conv, shape = self._at(shape)
        return conv.call(shape, self._filters, False, torch.float32, torch.device("cpu")).output

    def folded_plans(
        self, folded: Folded, shape: Sequence[int], residual: object = None
    ) -> tuple[Plan, ...]:
        conv, shape = self._at(shape)
        call = conv.call(shape, self._filters, residual is not None, folded.dtype, folded.device)
        return (conv.plan(call, folded.settings),)

    def _at(self, shape: Sequence[int]) -> tuple[FoldedConv, Sequence[int]]:
        sides = None if self._same is None else self._same.sides(shape)
        if sides is None:
            return self._conv, shape
        left, right, top, bottom = sides
        n, c, height, width = shape
        return self._padded, (n, c, height + top + bottom, width + left + right)


class AsppLayer(FoldedLayer, MapLayer):
    """The branches of an ASPP: [N, C, H, W] -> [N, sum K, H, W]."""

    def __init__(
        self, name: str, specs: Sequence[ConvSpec], sources: Sources, frozen: bool
    ) -> None:
        super().__init__(name)
        kernels, dilations = [s.weight.shape[2] for s in specs], [s.dilation[0] for s in specs]
        self._aspp = FoldedAspp(kernels, dilations, frozen)
        self._channels = sum(s.weight.shape[0] for s in specs)
        first, *_ = [sources.add(spec) for spec in specs]
        self._indices = slice(first, first + len(specs))

    def call(self, folded: Folded, x: Tensor) -> Tensor:
        return self._aspp(x, folded.filters[self._indices], folded.settings)

    def folded_function(self, folded: Folded) -> Function:
        parts = zip(self._aspp.convs, folded.filters[self._indices], strict=True)
        return functional.branches([_conv(*part) for part in parts], self._aspp.dilations)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[0], self._channels, *shape[2:])

    def folded_plans(self, folded: Folded, shape: Sequence[int]) -> tuple[Plan, ...]:
        filters = folded.filters[self._indices]
        return self._aspp.plan(shape, filters, folded.settings, folded.dtype, folded.device)

    @property
    def extra_bytes(self) -> int:
        return self._aspp.extra_bytes


class ProjectLayer(FoldedLayer, MapLayer):
    """The projection of the branches and the pooled vector, without their concat."""

    def __init__(self, spec: ConvSpec, channels: int, sources: Sources, frozen: bool) -> None:
        super().__init__(spec.name)
        self._channels = spec.weight.shape[0]
        self._project = FoldedProject(spec.act, frozen)
        to_branches, to_pooled = spec.split(channels)
        self._to_branches, self._to_pooled = sources.add(to_branches), sources.add(to_pooled)

    def call(self, folded: Folded, branches: Tensor, pooled: Tensor) -> Tensor:
        to_branches, to_pooled = (
            folded.filters[index] for index in (self._to_branches, self._to_pooled)
        )
        return self._project(branches, pooled, to_branches, to_pooled, folded.settings)

    def folded_function(self, folded: Folded) -> Function:
        to_branches, to_pooled = (
            folded.filters[index] for index in (self._to_branches, self._to_pooled)
        )
        weight = torch.cat([to_branches.weight, to_pooled.weight], 1)
        return functional.project(weight, to_branches.shift.clone(), self._project.act)

    def output_shape(self, branches: Sequence[int], pooled: object) -> tuple[int, ...]:
        return (branches[0], self._channels, *branches[2:])

    def folded_plans(
        self, folded: Folded, branches: Sequence[int], pooled: Sequence[int]
    ) -> tuple[Plan, ...]:
        filters = folded.filters[self._to_branches]
        options = (folded.settings, folded.dtype, folded.device)
        return (self._project.plan(branches, pooled[1], filters, *options),)

    @property
    def extra_bytes(self) -> int:
        return self._project.extra_bytes


class WideProjectLayer(FoldedLayer, MapLayer):
    """As `cpu_layers.WideProjectLayer`."""

    def __init__(self, spec: ConvSpec, channels: int, sources: Sources) -> None:
        super().__init__(spec.name)
        self._kernel = tuple(spec.weight.shape[2:])
        # A square odd kernel.
        padding = [k // 2 for k in self._kernel]
        self._branches = FoldedConv((1, 1), padding, (1, 1), 1, spec.act)
        self._pooled = FoldedConv((1, 1), padding, (1, 1), 1, None)
        to_branches, to_pooled = spec.split(channels)
        self._filters = tuple(to_branches.weight.shape)
        self._to_branches, self._to_pooled = sources.add(to_branches), sources.add(to_pooled)

    def call(self, folded: Folded, branches: Tensor, pooled: Tensor) -> Tensor:
        height, width = branches.shape[2:]
        rows, columns = self._kernel
        constant = pooled[:, :, None, None].expand(-1, -1, min(rows, height), min(columns, width))
        few = self._pooled(
            constant.contiguous(memory_format=CHANNELS_LAST),
            folded.filters[self._to_pooled],
            folded.settings,
        )
        few = spread(spread(few, rows, 2, height), columns, 3, width)
        few = few.contiguous(memory_format=CHANNELS_LAST)
        return self._branches(branches, folded.filters[self._to_branches], folded.settings, few)

    def folded_function(self, folded: Folded) -> Function:
        conv = _conv(self._branches, folded.filters[self._to_branches])
        return functional.wide_project(conv, folded.filters[self._to_pooled].weight)

    def output_shape(self, branches: Sequence[int], pooled: object) -> tuple[int, ...]:
        return (branches[0], self._filters[0], *branches[2:])

    def folded_plans(
        self, folded: Folded, branches: Sequence[int], pooled: object
    ) -> tuple[Plan, ...]:
        conv = self._branches
        call = conv.call(branches, self._filters, True, folded.dtype, folded.device)
        return (conv.plan(call, folded.settings),)


class PooledLayer(FoldedLayer):
    """act(linear(mean of x over its pixels)): [N, C, H, W] -> [N, K]."""

    def __init__(self, spec: ConvSpec, sources: Sources) -> None:
        super().__init__(spec.name)
        self._linear = _Linear(spec, sources)

    def call(self, folded: Folded, x: Tensor) -> Tensor:
        return self._linear(folded, x.mean((2, 3)))

    def folded_function(self, folded: Folded) -> Function:
        linear = self._linear.function(folded)
        return lambda x: linear(x.mean((2, 3)))

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[0], self._linear.channels)


class SqueezeExcitationLayer(FoldedLayer, ScalingLayer):
    """Squeeze-excitation, in place on x where it is the program's own."""

    def __init__(self, spec: SqueezeSpec, sources: Sources) -> None:
        super().__init__(spec.name)
        self._fc1, self._fc2 = _Linear(spec.fc1, sources), _Linear(spec.fc2, sources)
        self._hidden, self._gate = copy.deepcopy(spec.hidden), copy.deepcopy(spec.gate)

    def call(self, folded: Folded, x: Tensor) -> Tensor:
        vector = self._fc1(folded, x.mean((2, 3)))
        vector = vector if self._hidden is None else self._hidden(vector)
        scale = self._gate(self._fc2(folded, vector))[:, :, None, None]
        return x.mul_(scale) if self.in_place else x * scale

    def folded_function(self, folded: Folded) -> Function:
        fc1, fc2 = self._fc1.function(folded), self._fc2.function(folded)

        def run(x: Tensor) -> Tensor:
            vector = fc1(x.mean((2, 3)))
            vector = vector if self._hidden is None else self._hidden(vector)
            return x * self._gate(fc2(vector))[..., None, None]

        return run

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)


class UnknownLayer(FoldedLayer, PlainLayer):
    """As `PlainLayer`, under the caller's autocast; what follows takes any result (`execute`)."""

    def call(self, folded: Folded, x: Tensor) -> Any:
        with _autocast(folded):
            return self.module(filled(x, Tensor.contiguous))

    def folded_function(self, folded: Folded) -> Function:
        return self.function()


class _Linear:
    """A 1x1 convolution on vectors [N, C], with its batch norm and activation."""

    def __init__(self, spec: ConvSpec, sources: Sources) -> None:
        self.channels = spec.weight.shape[0]
        self._act = spec.act
        self._index = sources.add(spec)

    def __call__(self, folded: Folded, x: Tensor) -> Tensor:
        filters = folded.filters[self._index]
        return of_vectors(x, filters.weight, filters.bias, self._act, folded.settings)

    def function(self, folded: Folded) -> Function:
        """As `Layer.function`."""
        filters = folded.filters[self._index]
        weight, bias = filters.weight[:, :, 0, 0].clone(), filters.bias.clone()
        return lambda x: functional.activated(F.linear(x, weight, bias), self._act)


def _conv(conv: FoldedConv, filters: Filters) -> functional.Conv:
    # Copies: the filters of all layers are views of one allocation.
    weight, shift = filters.weight.clone(), filters.shift.clone()
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return functional.Conv(weight, shift, *geometry, conv.act)


def execute(folded: Folded, layer: Layer, *tensors: Tensor | None) -> Tensor:
    """The `run` of a program on folded filters."""
    if not isinstance(layer, FoldedLayer):
        return layer(*tensors)
    if folded.converts and not isinstance(layer, UnknownLayer):
        dtype = folded.dtype
        tensors = tuple(
            t if t is None or t.dim() != 4 else t.to(dtype=dtype, memory_format=CHANNELS_LAST)
            for t in tensors
        )
    return layer.call(folded, *tensors)


@contextmanager
def outside_autocast(device: torch.device) -> Iterator[None]:
    """Dtypes are the program's own."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _autocast(folded: Folded) -> AbstractContextManager[object]:
    if folded.autocast is None:
        return nullcontext()
    return torch.autocast(folded.device.type, dtype=folded.autocast)


def _or(value: Tensor | None, default: Tensor) -> Tensor:
    return default if value is None else value
