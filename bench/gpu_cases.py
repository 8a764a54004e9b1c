"""Whole models whose inference is measured on a GPU, and predicted for one."""

from __future__ import annotations

from typing import NamedTuple


class GpuCase(NamedTuple):
    """A model and its images."""

    backbone: str
    output_stride: int
    batch: int
    height: int
    width: int

    @property
    def image(self) -> str:
        """The size of its images: "520" of square ones, "1024x2048" of others."""
        square = self.height == self.width
        return str(self.height) if square else f"{self.height}x{self.width}"

    def __str__(self) -> str:
        return f"{self.backbone} os{self.output_stride} b{self.batch} {self.image}"


# The most telling first. torchvision's MobileNetV3 has output stride 16; 16 images of 1024x2048 are
# for one model, as they take most of a GPU's memory and of its time.
CASES = (
    GpuCase("r50", 8, 1, 520, 520),
    GpuCase("r50", 8, 16, 520, 520),
    GpuCase("mbv3", 16, 1, 520, 520),
    GpuCase("r50", 16, 16, 513, 513),
    GpuCase("r50", 8, 1, 1024, 2048),
    GpuCase("mbv3", 16, 16, 520, 520),
    GpuCase("r101", 8, 16, 520, 520),
    GpuCase("r50", 16, 1, 513, 513),
    GpuCase("mbv3", 16, 1, 1024, 2048),
    GpuCase("r101", 8, 1, 520, 520),
    GpuCase("r101", 16, 16, 513, 513),
    GpuCase("r101", 16, 1, 513, 513),
    GpuCase("r101", 8, 1, 1024, 2048),
    GpuCase("r50", 8, 16, 1024, 2048),
)
