"""Ranges of a model's maps, measured on images: what int8 needs to know beside the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Range = tuple[float, float]

# More layers than any model has, and longer names.
_MOST_RANGES, _LONGEST_NAME = 10_000, 500
# Beyond it no map has a value.
_LARGEST = torch.finfo(torch.float32).max


class CalibrationError(ValueError):
    """A calibration that does not fit the model, or cannot be made; the message says why."""


@dataclass(frozen=True)
class Calibration:
    """The ranges of the maps of one model with one set of weights.

    Attributes:
        ranges: (low, high) of the results of the layers, by the layers' names.
        method: how they were chosen, a name of `calibrate.candidates`.
        images: on how many images.
        fingerprint: of the weights that they were measured with.
        agreement: part of the images' pixels whose labels in int8 are those of fp32.
    """

    ranges: Mapping[str, Range]
    method: str
    images: int
    fingerprint: str
    agreement: float

    def check(self, model: nn.Module) -> None:
        """Raises CalibrationError where the model has other weights."""
        if fingerprint(model) != self.fingerprint:
            raise CalibrationError(
                "the model's weights are not those that its int8 ranges were measured with; call "
                "model.calibrate(images) again, or set model.precision to fp32"
            )

    def as_plain(self) -> dict[str, object]:
        """As JSON's types."""
        return {
            "ranges": {name: list(both) for name, both in self.ranges.items()},
            "method": self.method,
            "images": self.images,
            "fingerprint": self.fingerprint,
            "agreement": self.agreement,
        }

    @classmethod
    def from_plain(cls, value: object) -> Calibration:
        """The calibration that `as_plain` wrote.

        Raises:
            CalibrationError: something else.
        """
        if not isinstance(value, Mapping):
            raise CalibrationError(f"the calibration is a {type(value).__name__}, no mapping")
        ranges = value.get("ranges")
        if not isinstance(ranges, Mapping) or len(ranges) > _MOST_RANGES:
            raise CalibrationError(
                f"the calibration's ranges are no mapping of at most {_MOST_RANGES}"
            )
        method, images = value.get("method"), value.get("images")
        mark, agreement = value.get("fingerprint"), value.get("agreement")
        if not (_is_text(method) and _is_text(mark)):
            raise CalibrationError("the calibration's method or fingerprint is no short text")
        if type(images) is not int or images < 1:
            raise CalibrationError(f"the calibration's number of images is {images!r}")
        same = _number(agreement)
        if same is None or not 0 <= same <= 1:
            raise CalibrationError(f"the calibration's agreement is {agreement!r}, not 0 to 1")
        found = {_name(name): _range(name, both) for name, both in ranges.items()}
        return cls(found, str(method), images, str(mark), same)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME


def _number(value: object) -> float | None:
    """A finite number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # Whole numbers may be too large to be one.
    return float(value) if abs(value) <= _LARGEST else None


def _name(name: object) -> str:
    if not isinstance(name, str) or not _is_text(name):
        raise CalibrationError("the calibration's ranges have a name that is no short text")
    return name


def _range(name: object, both: object) -> Range:
    pair = both if isinstance(both, (list, tuple)) and len(both) == 2 else (None, None)
    low, high = map(_number, pair)
    if low is None or high is None or low > high:
        raise CalibrationError(
            f"the calibration's range of {name} is no pair of finite numbers (low, high)"
        )
    return low, high


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights and statistics of a model, by name, as fp32 numbers.

    Those of the auxiliary head, which is not calibrated, do not count: a model may lose it.
    It takes a second for each GB, and does not depend on the machine.
    """
    return fingerprint_of({**dict(model.named_parameters()), **dict(model.named_buffers())})


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """`fingerprint` of a model with these tensors."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        if name.startswith("aux_classifier."):
            continue
        # The others count batches of training.
        if tensor.is_floating_point():
            values = tensor.detach().to("cpu", torch.float32).contiguous()
            found.update(f"{name} {list(values.shape)}\n".encode())
            found.update(values.numpy().data)
    return found.hexdigest()
