"""A model and data so small that training takes milliseconds a step; also a script for processes.

``python tiny_training.py train ...`` is ``deeplab-fast train ...`` with the model tiny_deeplabv3,
beside a torchvision that was built for another PyTorch.
"""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from deeplab_fast import testing
from deeplab_fast.models import DeepLabV3
from deeplab_fast.models.backbone import set_dilation, set_stride
from deeplab_fast.nn import HEADS, FCNHead
from deeplab_fast.weights.registry import ModelEntry, register

CLASSES = 4
NAMES = ("grey", "red", "green", "blue")
COLOURS = np.array(((128, 128, 128), (220, 40, 40), (40, 200, 40), (40, 40, 220)), np.uint8)


class TinyBackbone(nn.Module):
    """Four 3x3 convolutions of stride 2; the last gives its stride up for dilation."""

    capturable = True

    def __init__(self, output_stride=16, aux=False):
        super().__init__()
        widths = (3, 8, 8, 16, 16)
        for i, (a, b) in enumerate(pairwise(widths)):
            block = nn.Sequential(
                nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()
            )
            self.add_module(f"block{i}", block)
        self.aux = aux
        self.out_channels, self.aux_channels = 16, 16
        self.set_output_stride(output_stride)

    def set_output_stride(self, output_stride):
        set_stride(self.block3[0], output_stride // 8)
        set_dilation(self.block3[0], 16 // output_stride)
        self.output_stride = output_stride

    def forward(self, x):
        x = self.block2(self.block1(self.block0(x)))
        return {"out": self.block3(x), **({"aux": x} if self.aux else {})}


def tiny_deeplabv3(
    *, num_classes=CLASSES, aux_loss=False, output_stride=16, atrous_rates=None, dropout=0.1
):
    """DeepLabv3 with real atrous branches and 20,000 parameters."""
    rates = tuple(atrous_rates or {16: (1, 2), 8: (2, 4)}[output_stride])
    backbone = TinyBackbone(output_stride, aux_loss)
    head = HEADS["paper"](16, num_classes, rates, aspp_channels=8, dropout=dropout)
    aux = FCNHead(16, num_classes) if aux_loss else None
    model = DeepLabV3(backbone, head, aux)
    options = {"output_stride": output_stride, "atrous_rates": rates, "dropout": dropout}
    model.config = (
        "tiny_deeplabv3",
        {"num_classes": num_classes, "aux_loss": aux_loss, **options},
    )
    return model


register(ModelEntry((tiny_deeplabv3,)))


def scene(index, height=40, width=48):
    """A photo whose colours tell its labels, in four rectangles, with a border to ignore."""
    rng = np.random.default_rng(index)
    label = np.empty((height, width), np.uint8)
    middle_y, middle_x = rng.integers(12, height - 12), rng.integers(12, width - 12)
    kinds = rng.permutation(CLASSES)
    label[:middle_y, :middle_x], label[:middle_y, middle_x:] = kinds[0], kinds[1]
    label[middle_y:, :middle_x], label[middle_y:, middle_x:] = kinds[2], kinds[3]
    noise = rng.integers(-30, 31, (height, width, 3))
    image = (COLOURS[label].astype(int) + noise).clip(0, 255).astype(np.uint8)
    label[:2] = 255
    return image, label


def write_scenes(root, count=12, split=None):
    """images/ and masks/ of PNGs, with classes.txt."""
    root = Path(root)
    for folder in ("images", "masks"):
        (root / folder / (split or "")).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image, label = scene(i)
        Image.fromarray(image).save(root / "images" / (split or "") / f"s{i:02d}.png")
        Image.fromarray(label).save(root / "masks" / (split or "") / f"s{i:02d}.png")
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root


def binary_scenes(root, foreground):
    """The scenes with class 1 against the rest, as masks of 0 and ``foreground``."""
    write_scenes(root, 8)
    for path in (root / "masks").iterdir():
        label = np.asarray(Image.open(path))
        label = np.where(label == 1, foreground, 0).astype(np.uint8)
        Image.fromarray(label).save(path)
    return root


def recipe(root):
    """Options of a run on these scenes, all of them to train and to validate on."""
    return {
        "data": "folder",
        "root": str(root),
        "split": "all",
        "val_split": "all",
        "classes": str(root / "classes.txt"),
        "model": "tiny_deeplabv3",
        "crop": 32,
        "batch_size": 4,
        "check_data": False,
        "tensorboard": False,
        "pictures": False,
    }


def inner_crop(image, label, generator):
    """The labelled 32x32 pixels in the middle: the same number in every image."""
    return image[4:36, 8:40], label[4:36, 8:40]


def with_nan(image, label, generator):
    """Normalised photos; one of them, s05, has a hole."""
    pixels = torch.from_numpy(np.ascontiguousarray(image[4:36, 8:40])).permute(2, 0, 1) / 255.0
    own, _ = scene(5)
    if np.array_equal(image, own):
        pixels[0, 3, 3] = float("nan")
    return pixels, label[4:36, 8:40]


def main():
    torch.set_num_threads(1)
    testing.import_torchvision()
    from deeplab_fast.cli import main as run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
