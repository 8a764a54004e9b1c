"""Photos for models with trained weights: CamVid's beside the repository, else the demo's."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from deeplab_fast import demo
from deeplab_fast.data.datasets import open_dataset

from .files import ROOT

_CAMVID = ROOT.parent / "shared" / "data" / "camvid"
# CamVid's photos are frames of videos, neighbours nearly the same.
_JUDGED_STEP, _CALIBRATION_STEP = 6, 45


@cache
def source() -> str:
    """What the photos are, for whoever reads a figure."""
    return "CamVid photos" if _CAMVID.is_dir() else "photos of the demo"


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
    return _demo()[::2]


@cache
def for_calibration() -> tuple[Path, ...]:
    """Other photos, to calibrate on.

    Raises:
        FileNotFoundError: there are no photos.
    """
    if _CAMVID.is_dir():
        return _camvid("train")[::_CALIBRATION_STEP]
    return _demo()[1::2]


def _camvid(split: str) -> tuple[Path, ...]:
    return tuple(sample.image for sample in open_dataset("camvid", _CAMVID, split).samples)


def _demo() -> tuple[Path, ...]:
    found = tuple(demo.photos())
    if len(found) < 2:
        raise FileNotFoundError(
            "there are no photos: install scikit-learn and scikit-image, which come with some"
        )
    return found
