"""Cases of whole models: full-resolution logits, labels, and training steps.

The exact result is that of torchvision's model in fp32 without TF32: a float64 pass of a network
takes longer than all that is measured with it.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_fast import get_model, load, ops
from deeplab_fast.data import Preprocess, read_image
from deeplab_fast.dispatch.examples import IGNORED, LABELS, VALUES
from deeplab_fast.testing import import_torchvision

from . import photos
from .costs import Cost, network_cost
from .files import scratch
from .op_cases import OS8_RATES, OS16_RATES
from .registry import (
    GRADIENT,
    STEP,
    Arguments,
    Case,
    network_tolerance,
    register_case,
    shape_name,
    without_dropout,
)

BUILDERS = {"r50": "resnet50", "r101": "resnet101", "mbv3": "mobilenet_v3_large"}
# Main path of a forward pass, for tolerances: convolutions one behind another.
DEPTH = {"r50": 53, "r101": 104, "mbv3": 51, "camvid": 51}


def torchvision_model(backbone: str, output_stride: int, classes: int) -> nn.Module:
    """torchvision's DeepLabV3 with random weights and without the auxiliary head.

    torchvision's builders have no output stride; at 16 the ResNets are put together as they do it.
    """
    models = import_torchvision().models
    if backbone == "mbv3":
        return models.segmentation.deeplabv3_mobilenet_v3_large(
            weights_backbone=None, num_classes=classes
        )
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3

    dilated = [False, output_stride == 8, True]
    net = getattr(models, BUILDERS[backbone])(weights=None, replace_stride_with_dilation=dilated)
    body = IntermediateLayerGetter(net, {"layer4": "out"})
    rates = OS8_RATES if output_stride == 8 else OS16_RATES
    return DeepLabV3(body, DeepLabHead(2048, classes, rates))


class FullLogits(nn.Module):
    """The main logits out of a model's dict."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)["out"]


class Labels(FullLogits):
    """Labels as users take them from a model: argmax of its full-resolution logits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


class Loss(FullLogits):
    """Cross entropy of full-resolution logits."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(x), target, ignore_index=IGNORED)


class FusedLoss(FullLogits):
    """Cross entropy on the low-resolution logits of a model of deeplab_fast."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        logits = self.model.forward_logits(x)
        return ops.upsample_cross_entropy(
            logits, target, ignore_index=IGNORED, align_corners=self.model.align_corners
        )


class Predict(FullLogits):
    """Labels by `model.predict`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model.predict(x)


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """A network on a batch of images, with torchvision's weights."""

    kind: ClassVar[str] = "model"
    oracle_dtype: ClassVar[torch.dtype] = torch.float32
    # A model takes its images as its users hold them.
    own_layout: ClassVar[torch.memory_format] = torch.contiguous_format
    output: ClassVar[type[FullLogits]]
    own_output: ClassVar[type[FullLogits]]

    backbone: str
    output_stride: int
    n: int
    height: int
    width: int
    classes: int = 21

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return STEP in self.modes

    def wrap(self, model: nn.Module, output: type[FullLogits]) -> nn.Module:
        """A model as the case runs it; dropout's masks would differ between layouts."""
        return without_dropout(output(model)).train(self.training)

    def plain_model(self) -> nn.Module:
        """The network by PyTorch's own modules."""
        return torchvision_model(self.backbone, self.output_stride, self.classes)

    def make_module(self) -> nn.Module:
        return self.wrap(self.plain_model(), self.output)

    def make_inputs(self, device: str, seed: int) -> tuple[Tensor, ...]:
        return (torch.randn(self.n, 3, self.height, self.width),)

    def own_model(self, args: Arguments) -> nn.Module:
        """deeplab_fast's model with the weights of torchvision's."""
        with torch.device(next(args.module.parameters()).device):
            model = get_model(
                f"deeplabv3_{BUILDERS[self.backbone]}",
                num_classes=self.classes,
                output_stride=self.output_stride,
            )
        model.load_state_dict(args.module.model.state_dict())
        return model

    def own(self, args: Arguments) -> nn.Module:
        return self.wrap(self.own_model(args), self.own_output)

    def network_cost(self, itemsize: int) -> Cost:
        """Cost up to the low-resolution logits."""
        with torch.device("meta"):
            model = self.plain_model().to("meta").eval()
            x = torch.empty(self.n, 3, self.height, self.width)
        return network_cost(model, [x], itemsize)

    def with_output(self, cost: Cost, moved: int) -> Cost:
        """The cost with the bytes of the result."""
        return Cost(cost.dense_macs, cost.live_macs, cost.bytes + moved, cost.convolutions)

    @property
    def pixels(self) -> int:
        """Pixels of a batch."""
        return self.n * self.height * self.width

    def tolerance(self, kind: str) -> float:
        return network_tolerance(DEPTH[self.backbone])


@dataclass(frozen=True, kw_only=True)
class ModelLogits(ModelCase):
    """Full-resolution logits of a batch of images."""

    output: ClassVar[type[FullLogits]] = FullLogits
    own_output: ClassVar[type[FullLogits]] = FullLogits

    def cost(self, mode: str, itemsize: int) -> Cost:
        return self.with_output(self.network_cost(itemsize), self.pixels * self.classes * itemsize)


@dataclass(frozen=True, kw_only=True)
class ModelLabels(ModelCase):
    """Labels of a batch of images."""

    output: ClassVar[type[FullLogits]] = Labels
    own_output: ClassVar[type[FullLogits]] = Labels
    judged: ClassVar[int] = 1
    # Images to calibrate on; random ones are all alike.
    calibrated: ClassVar[int] = 2

    @property
    def judged_on(self) -> str:
        return "random images"

    def oracle(self, module: nn.Module) -> nn.Module:
        return FullLogits(module.model).eval()

    def predict(self, args: Arguments, precision: str = "fp32") -> nn.Module:
        """deeplab_fast's model through `predict`, in a precision on the CPU."""
        model = self.own_model(args).eval()
        if precision == "int8":
            kept = self.file(args, "calibration")
            if kept.exists():
                model.calibration = pickle.loads(kept.read_bytes())
            else:
                model.calibrate(torch.cat(self.calibration()))
                kept.write_bytes(pickle.dumps(model.calibration))
        model.precision = precision
        return self.wrap(model, Predict)

    def file(self, args: Arguments, ending: str) -> Path:
        """Where something made of the case's weights is kept for a run (`files.scratch`)."""
        state = 0
        for t in args.module.state_dict().values():
            state = zlib.crc32(t.contiguous().reshape(-1).view(torch.uint8).numpy(), state)
        return scratch() / f"{self.op}-{self.shape}-{state:08x}-{ending}"

    def calibration(self) -> list[Tensor]:
        """Images [1, 3, H, W] like those of the sets, and none of them, for quantization."""
        torch.manual_seed(-1)
        return [torch.randn(1, 3, self.height, self.width) for _ in range(self.calibrated)]

    def cost(self, mode: str, itemsize: int) -> Cost:
        return self.with_output(self.network_cost(itemsize), self.pixels)

    def kinds(self, mode: str) -> tuple[str, ...]:
        return (LABELS,)


@cache
def _preprocess(name: str) -> Preprocess:
    return load(name).preprocess


@dataclass(frozen=True, kw_only=True)
class EmbeddedLabels(ModelLabels):
    """Labels of photos by a model that comes with the package, with its trained weights.

    `backbone` is the model's name; the exact result is that of its plain modules.
    """

    trained: ClassVar[bool] = True
    judged: ClassVar[int] = 16
    # Of recipes that take hundreds: the ranges of a trained model's maps hardly move beyond a few.
    calibrated: ClassVar[int] = 8

    @property
    def judged_on(self) -> str:
        return f"{self.judged} {photos.source()}"

    def plain_model(self) -> nn.Module:
        with torch.device("cpu"):
            model = load(self.backbone)
        model.fast = False
        return model

    def make_inputs(self, device: str, seed: int) -> tuple[Tensor, ...]:
        if device == "meta":
            return super().make_inputs(device, seed)
        return (self.photo(photos.judged(), seed).to(device),)

    def photo(self, found: Sequence[Path], number: int) -> Tensor:
        """A photo as the network takes it, counted round, at the case's size."""
        image = torch.from_numpy(read_image(found[number % len(found)])).permute(2, 0, 1)
        return _preprocess(self.backbone).batch(image[None], size=(self.height, self.width))

    def calibration(self) -> list[Tensor]:
        return [self.photo(photos.for_calibration(), i) for i in range(self.calibrated)]

    def own_model(self, args: Arguments) -> nn.Module:
        return load(self.backbone)


@dataclass(frozen=True, kw_only=True)
class ModelTrain(ModelCase):
    """A training step: forward, cross entropy, backward, SGD with momentum."""

    output: ClassVar[type[FullLogits]] = Loss
    own_output: ClassVar[type[FullLogits]] = FusedLoss

    def make_inputs(self, device: str, seed: int) -> tuple[Tensor, ...]:
        target = torch.randint(0, self.classes, (self.n, self.height, self.width))
        ignored = torch.rand(self.n, self.height, self.width) < 0.05
        return *super().make_inputs(device, seed), torch.where(ignored, IGNORED, target)

    def cost(self, mode: str, itemsize: int) -> Cost:
        with torch.device("meta"):
            model = torchvision_model(self.backbone, self.output_stride, self.classes)
        # SGD reads parameter, gradient and momentum and writes parameter and momentum, in fp32.
        optimizer = 5 * 4 * sum(p.numel() for p in model.parameters())
        labels = self.pixels * torch.int64.itemsize
        return self.network_cost(itemsize).with_gradient(optimizer + labels)

    def kinds(self, mode: str) -> tuple[str, ...]:
        return VALUES, GRADIENT


_LABELS_COMPILE = {"compile": "its compilation takes minutes; model_labels has its figure"}
_STEP_COMPILE = {"compile": "compiling a training step takes minutes on a CPU"}
_CPU_COMPILE = {"compile": "its compilation takes a minute or more on a CPU"}


def _cases() -> list[Case]:
    found: list[Case] = []
    # backbone, output stride, image, batch, classes, suites of logits, suites of labels
    for backbone, output_stride, size, n, classes, logits, labels in (
        ("r50", 8, (520, 520), 1, 21, ("gpu",), ("cpu", "gpu", "rivals")),
        ("r50", 16, (513, 513), 16, 21, ("gpu",), ("gpu",)),
        ("r50", 8, (520, 520), 16, 21, ("gpu",), ("gpu",)),
        ("r101", 8, (520, 520), 16, 21, (), ("gpu",)),
        ("mbv3", 16, (520, 520), 1, 21, ("cpu", "gpu"), ("cpu", "gpu", "rivals")),
        ("mbv3", 16, (257, 257), 1, 21, (), ("quick",)),
        ("r50", 16, (520, 520), 1, 21, (), ("cpu", "gpu")),
        ("r101", 16, (520, 520), 1, 21, (), ("cpu", "gpu")),
        ("r101", 8, (520, 520), 1, 21, (), ("gpu",)),
        ("r101", 16, (513, 513), 16, 21, (), ("gpu",)),
        ("r50", 8, (1024, 2048), 1, 19, (), ("gpu",)),
        ("mbv3", 16, (1024, 2048), 1, 19, (), ("cpu", "gpu", "rivals")),
        ("mbv3", 16, (520, 520), 16, 21, (), ("gpu",)),
    ):
        named = f"{backbone}-os{output_stride}"
        if (backbone, size) == ("r50", (1024, 2048)):
            named = "cityscapes"
        side = size[0] if size[0] == size[1] else size
        shape = shape_name(named, side, f"b{n}")
        given = {
            "shape": shape,
            "backbone": backbone,
            "output_stride": output_stride,
            "n": n,
            "height": size[0],
            "width": size[1],
            "classes": classes,
        }
        if labels:
            # Of the models of a suite on a CPU one ResNet and one MobileNet are compiled.
            compiled = (backbone, output_stride, size) in (
                ("mbv3", 16, (520, 520)),
                ("r50", 8, (520, 520)),
            )
            left_out = {"quick": _CPU_COMPILE} | ({} if compiled else {"cpu": _CPU_COMPILE})
            found.append(
                ModelLabels(
                    op="model_labels", suites=labels, left_out=left_out, headline=True, **given
                )
            )
        if logits:
            left_out = {"cpu": _LABELS_COMPILE, "gpu": _LABELS_COMPILE}
            found.append(
                ModelLogits(
                    op="model_logits", suites=logits, left_out=left_out, headline=True, **given
                )
            )
    for height, width in ((520, 520), (360, 480)):
        side = height if height == width else (height, width)
        found.append(
            EmbeddedLabels(
                op="model_labels",
                shape=shape_name("camvid-os16", side, "b1"),
                suites=("rivals",),
                headline=True,
                backbone="camvid",
                output_stride=16,
                n=1,
                height=height,
                width=width,
                classes=11,
            )
        )
    for backbone, output_stride, side, n, suites in (
        ("r50", 16, 513, 16, ("gpu",)),
        ("mbv3", 16, 513, 16, ("gpu",)),
        ("r101", 16, 513, 16, ("gpu",)),
        ("r50", 16, 513, 2, ("cpu",)),
        ("r50", 16, 257, 2, ("cpu",)),
        ("mbv3", 16, 257, 4, ("cpu",)),
        ("mbv3", 16, 129, 2, ("quick",)),
    ):
        found.append(
            ModelTrain(
                op="model_train",
                shape=shape_name(f"{backbone}-os{output_stride}", side, f"b{n}"),
                suites=suites,
                modes=(STEP,),
                headline=True,
                left_out={"cpu": _STEP_COMPILE, "quick": _STEP_COMPILE},
                backbone=backbone,
                output_stride=output_stride,
                n=n,
                height=side,
                width=side,
            )
        )
    return found


for _case in _cases():
    register_case(_case)
