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

from .steps import FORMS, Size

INFERENCE = (
    "aspp_branches",
    "aspp_project",
    "conv_bn_act",
    "upsample_argmax",
    "upsample_softmax_add",
)
TRAINING = (
    "aspp_convs",
    "aspp_convs_backward",
    "batch_stats",
    "bn_act",
    "bn_act_reduce",
    "bn_act_backward",
    "upsample_cross_entropy",
    "upsample_confusion",
)
OPS = (*INFERENCE, *TRAINING)
_NORM_OPS = ("batch_stats", "bn_act", "bn_act_reduce", "bn_act_backward")
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
        seen = _Seen.of(model, (batch, 3, *image))
        found += seen.inference()
        if batch == batches[-1]:
            found += seen.training()
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
    for work in sorted(found, key=lambda w: (FORMS[w.op].index(w.form), -_elements(w.size))):
        chosen.setdefault(work.op, work)
    return list(chosen.values())


@dataclass
class _Seen:
    """What went through a model.

    Attributes:
        input: shape of the images.
        logits: shape of the main logits before upsampling.
        norms: maps that batch norms saw.
        pointwise: of 1x1 convolutions.
        aspp: of the branches and the projection; None for a model without.
        acts: activations that the model has.
    """

    input: tuple[int, int, int, int]
    logits: tuple[int, ...]
    norms: list[Size]
    pointwise: list[Size]
    aspp: Size | None
    acts: list[str]

    @classmethod
    def of(cls, model: nn.Module, shape: tuple[int, int, int, int]) -> _Seen:
        """Run a copy of a model on the meta device."""
        from ..nn.aspp import ASPP

        meta: Any = copy.deepcopy(model).to("meta").eval()
        meta.fast = meta.fused = False
        norms: list[Size] = []
        pointwise: list[Size] = []
        aspp: list[Size] = []

        def at(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            n, c, h, w = inputs[0].shape
            if isinstance(module, nn.BatchNorm2d) and h * w > 1:
                norms.append(Size(n, c, h, w))
            elif isinstance(module, ASPP):
                aspp.append(_aspp_size(module, (n, c, h, w)))
            elif isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and h * w > 1:
                if module.groups == 1 and module.bias is None:
                    k, stride = module.out_channels, module.stride[0]
                    pointwise.append(Size(n, c, h, w, filters=k, stride=stride))

        for module in meta.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.Conv2d, ASPP)):
                module.register_forward_hook(at)
        with torch.no_grad():
            logits = meta.forward_logits(torch.empty(shape, device="meta"))
        acts = [act for kind, act in _ACTS.items() if any(type(m) is kind for m in meta.modules())]
        return cls(
            shape,
            tuple(logits.shape),
            norms,
            pointwise,
            aspp[0] if aspp else None,
            acts or ["relu"],
        )

    def inference(self) -> list[Work]:
        """The ops of eval mode."""
        found = []
        if self.aspp is not None:
            found.append(Work("aspp_branches", "plain", self.aspp))
            found += [Work("aspp_project", form, self._project()) for form in ("plain", "classes")]
        wide = [s for s in self.pointwise if s.filters > s.c]
        narrow = [s for s in self.pointwise if s.filters <= s.c]
        found += [Work("conv_bn_act", "relu", s) for s in _spread(narrow)]
        found += [Work("conv_bn_act", "relu+residual", s) for s in _spread(wide)]
        found += [Work("conv_bn_act", "plain", s) for s in _spread(wide)[:1]]
        found += [Work("conv_bn_act", "residual", s) for s in _spread(wide)[:1]]
        for op in ("upsample_argmax", "upsample_softmax_add"):
            found += [Work(op, form, self._upsampled()) for form in FORMS[op]]
        return found

    def training(self) -> list[Work]:
        """The ops of a training step and of an evaluation."""
        found = []
        if self.aspp is not None:
            found += [Work(op, "plain", self.aspp) for op in ("aspp_convs", "aspp_convs_backward")]
        for size in _spread(self.norms):
            found.append(Work("batch_stats", "plain", size))
            for op in _NORM_OPS[1:]:
                forms = [*self.acts, "plain", "residual", "relu+residual"]
                found += [Work(op, form, size) for form in forms]
        for op in ("upsample_cross_entropy", "upsample_confusion"):
            found.append(Work(op, "plain", self._upsampled()))
        return found

    def _upsampled(self) -> Size:
        n, c, h, w = self.logits
        return Size(n, c, h, w, self.input[2], self.input[3])

    def _project(self) -> Size:
        assert self.aspp is not None
        s = self.aspp
        return Size(
            s.n,
            s.filters * (1 + len(s.rates)),
            s.h,
            s.w,
            filters=s.filters,
            pooled=s.filters,
            classes=self.logits[1],
        )


def _aspp_size(module: nn.Module, shape: tuple[int, int, int, int]) -> Size:
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    rates = tuple(m.dilation[0] for m in convs if m.kernel_size == (3, 3) and m.dilation[0] > 1)
    return Size(*shape, filters=convs[0].out_channels, rates=rates)


def _elements(size: Size) -> int:
    return size.n * max(size.c * size.h * size.w, size.c * size.height * size.width)


def _spread(sizes: Iterable[Size]) -> list[Size]:
    """The largest, the smallest and the one in the middle, each once."""
    ordered = sorted(set(sizes), key=lambda s: (_elements(s), s.filters, s.stride), reverse=True)
    if not ordered:
        return []
    return list(dict.fromkeys((ordered[0], ordered[len(ordered) // 2], ordered[-1])))
