"""What every backbone shares: named features out of a chain of modules, and its dilation plan."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ..program import match


class Backbone(Protocol):
    """What the models and their builders know of a backbone, beside that it is a module."""

    out_channels: int
    aux_channels: int
    output_stride: int

    def set_output_stride(self, output_stride: int) -> None:
        """Exchange strides for dilation or back, in place."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """As of nn.Module."""


class IntermediateLayerGetter(nn.ModuleDict):
    """Runs modules in order and returns the outputs of the named ones, as torchvision's does.

    Args:
        model: its children are run in the order of their registration, up to the last one named.
        return_layers: name of a child -> name of its output.

    Raises:
        ValueError: a name that is no child.
    """

    _version = 2
    __annotations__ = {"return_layers": dict[str, str]}

    def __init__(self, model: nn.Module, return_layers: dict[str, str]) -> None:
        children = dict(model.named_children())
        if not set(return_layers).issubset(children):
            raise ValueError("return_layers are not present in model")
        last = max(list(children).index(name) for name in return_layers)
        super().__init__(OrderedDict(list(children.items())[: last + 1]))
        self.return_layers = {str(k): str(v) for k, v in return_layers.items()}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = OrderedDict()
        for name, module in self.items():
            x = module(x)
            if name in self.return_layers:
                out_name = self.return_layers[name]
                out[out_name] = x
        return out


@match.rule(IntermediateLayerGetter)
def _stages(getter: IntermediateLayerGetter) -> match.Features:
    stages: list[tuple[list[nn.Module], str | None]] = []
    members: list[nn.Module] = []
    for name, module in getter.items():
        members.append(module)
        if name in getter.return_layers:
            stages.append((members, getter.return_layers[name]))
            members = []
    if members:
        stages.append((members, None))
    return match.Features(getter, stages)


@dataclass(frozen=True)
class StagePlan:
    """Stride of a stage's first block, and the dilations of each of its blocks.

    Of the two dilations of a block the first is that of the filter which has the stride, the second
    that of the filters behind it.
    """

    stride: int
    dilations: tuple[tuple[int, int], ...]


def plan_stages(
    strides: Sequence[int],
    blocks: Sequence[int],
    dilated: Sequence[bool],
    multi_grid: Sequence[int] | None,
    multi_grid_stages: Sequence[bool],
    contract_dilation: bool,
) -> list[StagePlan]:
    """Exchange strides for dilation (arXiv 1706.05587, sections 3.1 and 3.2).

    A dilated stage keeps stride 1 and multiplies the dilation by the stride it gave up.

    Args:
        strides: stride of each stage.
        blocks: number of blocks in each stage.
        dilated: whether a stage gives up its stride.
        multi_grid: unit rates of the blocks of a stage, multiplied by the stage's dilation.
        multi_grid_stages: stages to which `multi_grid` applies; all their blocks have its rates.
        contract_dilation: in any other dilated stage the filter that gave up the stride keeps the
            dilation before it, as the stride acted behind that filter: so the features at a smaller
            output stride contain those at a larger one. False dilates all filters alike.
    """
    plans = []
    dilation = 1
    for stride, count, give_up, unit in zip(
        strides, blocks, dilated, multi_grid_stages, strict=True
    ):
        before = dilation
        if give_up:
            dilation, stride = dilation * stride, 1
        if multi_grid is not None and unit:
            rates = [(dilation * m, dilation * m) for m in multi_grid]
        else:
            rates = [(dilation, dilation)] * count
            if contract_dilation:
                rates[0] = (before, dilation)
        plans.append(StagePlan(stride, tuple(rates)))
    return plans


def set_dilation(conv: nn.Conv2d, dilation: int) -> None:
    """Dilate a convolution of odd kernel in place, keeping its output size. Weights stay."""
    conv.dilation = (dilation, dilation)
    rows, columns = (dilation * (k // 2) for k in conv.kernel_size)
    conv.padding = (rows, columns)
    # What nn.Conv2d pads by where padding_mode is not "zeros": left, right, top, bottom.
    conv._reversed_padding_repeated_twice = [columns, columns, rows, rows]


# Of rows and columns; one number where a user set it so.
_Extent = int | tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Where a convolution reads, and how far apart it writes."""

    stride: _Extent
    dilation: _Extent
    padding: str | tuple[int, ...]
    reversed_padding: tuple[int, ...]

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        rest = conv._reversed_padding_repeated_twice
        padding = conv.padding
        return cls(
            conv.stride,
            conv.dilation,
            padding if isinstance(padding, str) else _pair(padding),
            tuple(rest),
        )

    def put_on(self, conv: nn.Conv2d) -> None:
        vars(conv).update(stride=self.stride, dilation=self.dilation, padding=self.padding)
        conv._reversed_padding_repeated_twice = list(self.reversed_padding)

    def moved(self, before: Geometry, after: Geometry) -> Geometry:
        """What was set by hand where a plan had `before`, for a plan that has `after`.

        Raises:
            ValueError: there is nothing that sees the same pixels of the image.
        """
        if self.stride == before.stride:
            stride = after.stride
        elif before.stride == after.stride:
            stride = self.stride
        else:
            raise ValueError(
                f"stride {self.stride}, where the output stride decides between {before.stride} "
                f"and {after.stride}"
            )
        return Geometry(
            stride,
            _scaled("dilation", self.dilation, before, after),
            self.padding
            if isinstance(self.padding, str)
            else _scaled("padding", self.padding, before, after),
            _scaled("padding", self.reversed_padding, before, after),
        )


def _pair(value: int | Iterable[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _scaled(what: str, values: _Extent, before: Geometry, after: Geometry) -> tuple[int, ...]:
    old, new = _pair(before.dilation)[0], _pair(after.dilation)[0]
    if any(v * new % old for v in _pair(values)):
        raise ValueError(f"{what} {values}, which times {new}/{old} is no whole number")
    return tuple(v * new // old for v in _pair(values))


def set_stride(conv: nn.Conv2d, stride: int) -> None:
    """Change a convolution's stride in place."""
    conv.stride = (stride, stride)
