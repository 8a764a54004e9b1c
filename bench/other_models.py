"""Cases of other libraries' models: as their users run them, and after `accelerate`.

Labels are the argmax of what the model returns, a training step the cross entropy of that at full
size, backward and SGD. The exact result is that of the model itself, as for `model_cases`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_fast import accelerate, accelerate_report
from deeplab_fast.dispatch.examples import IGNORED, LABELS, VALUES
from deeplab_fast.testing import import_torchvision

from .costs import Cost
from .model_cases import FullLogits, ModelCase
from .registry import (
    GRADIENT,
    STEP,
    Arguments,
    Case,
    Runnable,
    network_tolerance,
    register_case,
    shape_name,
)


class _Logits(FullLogits):
    """The logits of what a library's model returns, at its input's size."""

    def forward(self, x: Tensor) -> Tensor:
        result = self.model(x)
        if isinstance(result, Mapping):
            result = result["out"] if "out" in result else result["logits"]
        if result.shape[-2:] != x.shape[-2:]:
            result = F.interpolate(result, x.shape[-2:], mode="bilinear", align_corners=False)
        return result


class _Labels(_Logits):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


class _Loss(_Logits):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(x), target, ignore_index=IGNORED)


@dataclass(frozen=True, kw_only=True)
class OtherModel(ModelCase):
    """A library's model on a batch of images; `backbone` is `library name`."""

    def plain_model(self) -> nn.Module:
        return _BUILD[self.backbone.split()[0]](*self.backbone.split()[1:], classes=self.classes)

    def own_model(self, args: Arguments) -> nn.Module:
        return accelerate(copy.deepcopy(args.module.model))

    def own(self, args: Arguments) -> nn.Module:
        # Compared with its own forward as it runs here.
        return self.wrap(self.own_model(args), self.own_output)

    def built(self, args: Arguments) -> nn.Module:
        """The model that our builder makes, with the same weights."""
        from deeplab_fast import get_model

        model = get_model(self.backbone.split()[1], num_classes=self.classes)
        model.load_state_dict(args.module.model.state_dict())
        return self.wrap(model, self.own_output)

    @property
    def has_builder(self) -> bool:
        """Whether there is one."""
        return self.backbone.startswith("torchvision deeplabv3")

    def facts(self, run: Runnable) -> dict[str, tuple[float, str]]:
        report = accelerate_report(run.module.model)
        if not any(row.runs == "region" for row in report.rows):
            return {}
        return {"modules": (report.accelerated, f"of {report.total}")}

    def tolerance(self, kind: str) -> float:
        # The deepest of them.
        return network_tolerance(104)


@dataclass(frozen=True, kw_only=True)
class OtherLabels(OtherModel):
    """Labels of a batch of images."""

    # Results follow the weights, and the argmax of contiguous logits takes as long as a MobileNet.
    own_layout: ClassVar[torch.memory_format] = torch.channels_last
    output: ClassVar[type[FullLogits]] = _Labels
    own_output: ClassVar[type[FullLogits]] = _Labels

    def oracle(self, module: nn.Module) -> nn.Module:
        return _Logits(module.model).eval()

    def cost(self, mode: str, itemsize: int) -> Cost:
        return self.with_output(self.network_cost(itemsize), self.pixels)

    def kinds(self, mode: str) -> tuple[str, ...]:
        return (LABELS,)


@dataclass(frozen=True, kw_only=True)
class OtherTrain(OtherModel):
    """A training step."""

    output: ClassVar[type[FullLogits]] = _Loss
    own_output: ClassVar[type[FullLogits]] = _Loss

    def make_inputs(self, device: str, seed: int) -> tuple[Tensor, ...]:
        target = torch.randint(0, self.classes, (self.n, self.height, self.width))
        return *super().make_inputs(device, seed), target

    def cost(self, mode: str, itemsize: int) -> Cost:
        with torch.device("meta"):
            model = self.plain_model()
        # SGD reads parameter, gradient and momentum and writes parameter and momentum, in fp32.
        optimizer = 5 * 4 * sum(p.numel() for p in model.parameters())
        labels = self.pixels * torch.int64.itemsize
        return self.network_cost(itemsize).with_gradient(optimizer + labels)

    def kinds(self, mode: str) -> tuple[str, ...]:
        return VALUES, GRADIENT


def _torchvision(name: str, classes: int) -> nn.Module:
    segmentation = import_torchvision().models.segmentation
    return getattr(segmentation, name)(weights_backbone=None, num_classes=classes)


def _smp(name: str, encoder: str, classes: int) -> nn.Module:
    import_torchvision()
    import segmentation_models_pytorch as smp

    return getattr(smp, name)(encoder, encoder_weights=None, classes=classes)


def _transformers(name: str, classes: int) -> nn.Module:
    import_torchvision()
    import transformers

    config: Any = getattr(transformers, f"{name}Config")(num_labels=classes)
    model: nn.Module = getattr(transformers, f"{name}ForSemanticSegmentation")(config)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            # Of 0.02 without trained norms, nothing but denormal numbers is left at the end.
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
    return model


_BUILD = {"torchvision": _torchvision, "smp": _smp, "transformers": _transformers}


def _cases() -> list[Case]:
    found: list[Case] = []
    # library and model, side of the image of labels, and of 4 images in a training step: the norm
    # of the pooled map of two of them amplifies rounding
    for backbone, side, trained in (
        ("torchvision deeplabv3_resnet50", 520, 193),
        ("torchvision deeplabv3_mobilenet_v3_large", 520, 257),
        ("torchvision lraspp_mobilenet_v3_large", 520, 257),
        ("smp DeepLabV3 resnet50", 512, 192),
        ("smp DeepLabV3Plus resnet50", 512, 256),
        ("smp DeepLabV3Plus mobilenet_v2", 512, 256),
        ("smp DeepLabV3Plus efficientnet-b0", 512, 256),
        ("smp DeepLabV3Plus tu-regnety_004", 512, 256),
        ("transformers MobileNetV2", 512, 256),
        ("transformers MobileViT", 512, 256),
    ):
        n = 4
        given = {
            "suites": ("accelerate",),
            "backbone": backbone,
            "output_stride": 16,
            "headline": True,
        }
        name = backbone.replace(" ", "-")
        found += [
            OtherLabels(
                op="other_labels",
                shape=shape_name(name, side, "b1"),
                n=1,
                height=side,
                width=side,
                **given,
            ),
            OtherTrain(
                op="other_train",
                shape=shape_name(name, trained, f"b{n}"),
                n=n,
                height=trained,
                width=trained,
                modes=(STEP,),
                **given,
            ),
        ]
    return found


for _case in _cases():
    register_case(_case)
