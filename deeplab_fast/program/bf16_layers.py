"""The layers of a program in bf16 on the CPU: maps are bf16, vectors of an image and sums fp32.

The photo is read in fp32 and rounded by the first convolution; the last convolutions of the heads
give logits in a dtype of one's choice. Modules that no rule knows run in fp32, on a copy of their
map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.prepared_bf16 import DTYPE, Bf16Conv
from ..ops.prepared_bf16_aspp import Bf16Aspp, Bf16Project
from .cpu_layers import (
    AsppLayer,
    ConvLayer,
    CpuForms,
    PooledLayer,
    ProjectLayer,
    SqueezeExcitationLayer,
    WideProjectLayer,
    means,
)
from .functional import Function, cast
from .layers import (
    AtenLayer,
    Chain,
    ConvSpec,
    Layer,
    MapLayer,
    PlainLayer,
    Program,
    ScalingLayer,
    Single,
    SqueezeSpec,
    Step,
    SumOfConvs,
)
from .network import Network


class Bf16Forms(CpuForms):
    """`inference.Forms` of fp32 weights on the CPU, in bf16.

    Args:
        logits_dtype: of the results of the heads: float32 or bfloat16.
    """

    def __init__(self, logits_dtype: torch.dtype = torch.float32) -> None:
        self._logits_dtype = logits_dtype

    def conv(self, spec: ConvSpec, max_extra_bytes: int | None) -> MapLayer:
        return Bf16ConvLayer(spec, max_extra_bytes)

    def aspp(self, name: str, specs: Sequence[ConvSpec], max_extra_bytes: int | None) -> MapLayer:
        return Bf16AsppLayer(name, specs, max_extra_bytes)

    def pooled(self, spec: ConvSpec) -> Layer:
        return Bf16PooledLayer(spec)

    def project(self, spec: ConvSpec, channels: int, max_extra_bytes: int | None) -> MapLayer:
        wide = Bf16ProjectLayer if spec.is_pointwise else Bf16WideProjectLayer
        return wide(spec, channels, max_extra_bytes)

    def squeeze_excitation(self, spec: SqueezeSpec) -> ScalingLayer:
        return Bf16SqueezeExcitationLayer(spec)

    def free(self, name: str, module: nn.Module) -> Layer:
        return AtenLayer(name, module)

    def plain(self, name: str, module: nn.Module) -> PlainLayer:
        return Bf16PlainLayer(name, module)

    def finish(self, model: Network, program: Program) -> None:
        dtype = self._logits_dtype
        heads = []
        for name, feature, head in program.heads:
            last = list(_last(head))
            convs = [layer for layer in last if isinstance(layer, Bf16ConvLayer)]
            if last and len(convs) == len(last):
                for conv in convs:
                    conv.gives(dtype)
                heads.append((name, feature, head))
            else:
                heads.append((name, feature, Chain([head, Single(CastLayer(name, dtype))])))
        program.heads = tuple(heads)


class Bf16ConvLayer(ConvLayer):
    """act(scale * conv(x) + shift [+ residual]) of bf16 maps."""

    result_dtype = DTYPE
    kind = Bf16Conv

    def gives(self, dtype: torch.dtype) -> None:
        """Make results and residuals of another dtype."""
        self.result_dtype = dtype
        for conv in self.convs:
            assert isinstance(conv, Bf16Conv)
            conv.out_dtype = dtype

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        # The photo itself, where a model begins with a block.
        residual = None if residual is None else residual.to(self.result_dtype)
        return super().__call__(x, residual, out)

    def function(self) -> Function:
        run = super().function()

        def rounded(x: Tensor, residual: Tensor | None = None) -> Tensor:
            return run(x, None if residual is None else cast(residual, self.result_dtype))

        return rounded


class Bf16AsppLayer(AsppLayer):
    """The branches of an ASPP, of bf16 maps."""

    result_dtype = DTYPE
    kind = Bf16Aspp


class Bf16ProjectLayer(ProjectLayer):
    """The projection of bf16 branches and the pooled vector, without their concat."""

    result_dtype = DTYPE
    kind = Bf16Project


class Bf16WideProjectLayer(WideProjectLayer):
    """As `WideProjectLayer` of bf16 branches; the pooled vector's part is computed in fp32."""

    result_dtype = DTYPE
    kind = Bf16Conv


class Bf16PooledLayer(PooledLayer):
    """As `PooledLayer` of a bf16 map: the mean, and the vector, are fp32."""

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(means(x))


class Bf16SqueezeExcitationLayer(SqueezeExcitationLayer):
    """As `SqueezeExcitationLayer` of a bf16 map: means and factors are computed in fp32."""

    result_dtype = DTYPE

    def __call__(self, x: Tensor) -> Tensor:
        scale = self._factors(means(x))[:, :, None, None].to(x.dtype)
        return x.mul_(scale) if self.in_place else x * scale


class Bf16PlainLayer(PlainLayer):
    """A module that no rule knows, in fp32."""

    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x.float())

    def function(self) -> Function:
        run = super().function()
        return lambda x: run(cast(x, torch.float32))


class CastLayer(Layer):
    """A map in another dtype: logits that are not made by a convolution."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__(name)
        self.result_dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        return x.to(self.result_dtype)

    def function(self) -> Function:
        return lambda x: cast(x, self.result_dtype)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)


def _last(step: Step) -> Iterator[Layer]:
    """The layers that give a step's result."""
    if isinstance(step, Chain):
        yield from _last(step.steps[-1])
    elif isinstance(step, SumOfConvs):
        yield from step.convs
    elif isinstance(step, Single):
        yield step.layer
