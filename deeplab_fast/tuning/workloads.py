"""The ops and sizes that models call, found by running them on the meta device.

Of the many convolutions and batch norms of a model those with the most work, the least, and one in
between stand for all: a record answers for other sizes by the nearest.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch.declare import INFERENCE, find, gpu_ops
from ..dispatch.examples import Shapes, Size, elements
from ..nn.aspp import ASPP

OPS = tuple(op.name for op in gpu_ops())
_ACTS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
}


@dataclass(frozen=True)
class Work:
    """A form of an op, and a size that it is called at."""

    op: str
    form: str
    size: Size


def of_model(model: nn.Module, image: tuple[int, int], batches: Sequence[int]) -> list[Work]:
    """What a model calls on the GPU in inference, and in training at the last of the batches.

    Args:
        model: a DeepLabv3 of this package; it is not changed.
        image: (height, width) of its input.
        batches: images of a call.
    """
    found: list[Work] = []
    for batch in batches:
        shapes = _shapes(model, (batch, 3, *image))
        for op in gpu_ops():
            if op.use == INFERENCE or batch == batches[-1]:
                found += [Work(op.name, *work) for work in op.examples.works(shapes)]
    return list(dict.fromkeys(found))


def selected(works: Iterable[Work], ops: Sequence[str] | None, quick: bool) -> list[Work]:
    """The works of some ops; quick ones are one form, at the largest size, of each op.

    Raises:
        ValueError: there is no op of such a name.
    """
    if unknown := sorted(set(ops or ()) - set(OPS)):
        raise ValueError(f"no op is named {unknown[0]!r}; there are: {', '.join(OPS)}")
    found = [work for work in works if ops is None or work.op in ops]
    if not quick:
        return found
    chosen: dict[str, Work] = {}
    # The commonest of its forms that the models have.
    for work in sorted(found, key=_commonness):
        chosen.setdefault(work.op, work)
    return list(chosen.values())


def _commonness(work: Work) -> tuple[int, int]:
    return find(work.op).examples.forms.index(work.form), -elements(work.size)


def _shapes(model: nn.Module, shape: tuple[int, int, int, int]) -> Shapes:
    """What goes through a copy of a model on the meta device, at a shape of the images."""
    meta: Any = copy.deepcopy(model).to("meta").eval()
    meta.fast = meta.fused = False
    norms: list[Size] = []
    pointwise: list[Size] = []
    aspp: list[Size] = []
    filters: list[tuple[int, int, int, int]] = []

    def at(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        n, c, h, w = inputs[0].shape
        if isinstance(module, nn.BatchNorm2d) and h * w > 1:
            norms.append(Size(n, c, h, w))
        elif isinstance(module, ASPP):
            aspp.append(_aspp_size(module, (n, c, h, w)))
        elif isinstance(module, nn.Conv2d) and module.bias is None:
            k, depth, rows, cols = module.weight.shape
            filters.append((k, depth, rows, cols))
            if (rows, cols) == (1, 1) and h * w > 1 and module.groups == 1:
                pointwise.append(Size(n, c, h, w, filters=k, stride=module.stride[0]))

    for module in meta.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Conv2d, ASPP)):
            module.register_forward_hook(at)
    with torch.no_grad():
        n, c, h, w = meta.forward_logits(torch.empty(shape, device="meta")).shape
    acts = [act for kind, act in _ACTS.items() if any(type(m) is kind for m in meta.modules())]
    return Shapes(
        Size(n, c, h, w, shape[2], shape[3]),
        tuple(norms),
        tuple(pointwise),
        aspp[0] if aspp else None,
        tuple(acts or ["relu"]),
        tuple(filters),
    )


def _aspp_size(module: nn.Module, shape: tuple[int, int, int, int]) -> Size:
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    rates = tuple(m.dilation[0] for m in convs if m.kernel_size == (3, 3) and m.dilation[0] > 1)
    return Size(*shape, filters=convs[0].out_channels, rates=rates)
