"""Photos for models with trained weights: CamVid's beside the repository, else those at hand."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from deeplab_fast.data.datasets import open_dataset

from .files import ROOT

# Photos that come inside installed packages, no download, those of the most known classes first.
_PACKAGES = (
    ("deeplab_fast", "embedded/street.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/motorcycle_left.png"),
    ("sklearn", "datasets/images/flower.jpg"),
)
_CAMVID = ROOT.parent / "shared" / "data" / "camvid"
# CamVid's photos are frames of videos, neighbours nearly the same.
_JUDGED_STEP, _CALIBRATION_STEP = 6, 45


@cache
def source() -> str:
    """What the photos are, for whoever reads a figure."""
    return "CamVid photos" if _CAMVID.is_dir() else "photos of packages"


@cache
def judged() -> tuple[Path, ...]:
    """Photos to compare labels on.

    Raises:
        FileNotFoundError: there are no photos.
    """
    if _CAMVID.is_dir():
        return tuple(s.image for s in open_dataset("camvid", _CAMVID, "val").samples)[
            ::_JUDGED_STEP
        ]
    return _of_packages()[::2]


@cache
def for_calibration() -> tuple[Path, ...]:
    """Other photos, to calibrate on.

    Raises:
        FileNotFoundError: there are no photos.
    """
    if _CAMVID.is_dir():
        return _camvid("train")[::_CALIBRATION_STEP]
    return _of_packages()[1::2]


def _camvid(split: str) -> tuple[Path, ...]:
    return tuple(sample.image for sample in open_dataset("camvid", _CAMVID, split).samples)


def _of_packages() -> tuple[Path, ...]:
    found = []
    for package, name in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin).parent / name
            if path.is_file():
                found.append(path)
    if len(found) < 2:
        raise FileNotFoundError(
            "there are no photos: install scikit-learn and scikit-image, which come with some"
        )
    return tuple(found)
