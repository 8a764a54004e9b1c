"""What an exported file says about itself, in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from deeplab_fast._documents import shown
from deeplab_fast.data.preprocess import Preprocess, PreprocessBGR

# The key of the whole description; the others are for readers that want one thing.
KEY = "deeplab_fast"
# Longer texts, and more of them, no description has.
_LONGEST = 10_000_000
_MOST_CLASSES = 1_000_000
# Of a network that halves its maps ten times.
_LARGEST_STEP = 1024
# Along a side: what a file asks for is allocated.
_LARGEST_SIDE = 65536
_CHANNELS = {"RGB": Preprocess, "BGR": PreprocessBGR}


class DescriptionError(ValueError):
    """Metadata that `deeplab_fast.export` did not write; the message says what is wrong."""


@dataclass(frozen=True)
class Description:
    """The inputs, results and meaning of an exported file.

    Attributes:
        labels: the result is "labels" [N, H, W], uint8 up to 256 classes, else int64; else "logits"
            [N, C, H, W] in float32. H and W are those of the input.
        photos: "images" are uint8 [N, H, W, 3], R, G, B; else float32 [N, 3, H, W], normalised.
        num_classes: C; of 1 the label is 1 where the logit is above 0.
        classes, palette: names and colours (R, G, B) of the classes, or None.
        channels: "RGB" or "BGR", the order that the network takes.
        mean, std: of the channels in that order, in units of the 0..1 image.
        resize: the network's input size for photos as `Preprocess.size` has it, None for their own.
            A file of photos resizes them itself.
        batch, size: fixed N and (H, W), or None.
        multiple: H and W are multiples of it.
        smallest: the least H and W.
        precision: "fp32", "fp16", "bf16" or "int8".
        model: what it was made from, a builder's or a class's name.
        version: of the package that wrote it.
    """

    labels: bool
    photos: bool
    num_classes: int
    classes: tuple[str, ...] | None
    palette: tuple[tuple[int, int, int], ...] | None
    channels: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: int | tuple[int, int] | None
    batch: int | None
    size: tuple[int, int] | None
    multiple: int
    smallest: int
    precision: str
    model: str
    version: str

    @property
    def preprocess(self) -> Preprocess:
        """From photos to what the network takes."""
        return _CHANNELS[self.channels](self.mean, self.std, self.resize)

    @property
    def result(self) -> str:
        """The name of the result."""
        return "labels" if self.labels else "logits"

    @property
    def result_dtype(self) -> torch.dtype:
        """Of the result."""
        if not self.labels:
            return torch.float32
        return torch.uint8 if self.num_classes <= 256 else torch.int64

    @property
    def input_text(self) -> str:
        """The input as messages have it."""
        n = "N" if self.batch is None else str(self.batch)
        h, w = ("H", "W") if self.size is None else map(str, self.size)
        return f"images uint8 [{n},{h},{w},3]" if self.photos else f"images float32 [{n},3,{h},{w}]"

    @property
    def result_text(self) -> str:
        """The result as messages have it."""
        n = "N" if self.batch is None else str(self.batch)
        h, w = ("H", "W") if self.size is None else map(str, self.size)
        if not self.labels:
            return f"logits float32 [{n},{self.num_classes},{h},{w}]"
        return f"labels {'uint8' if self.num_classes <= 256 else 'int64'} [{n},{h},{w}]"

    def result_shape(self, batch: int, height: int, width: int) -> tuple[int, ...]:
        """Of the result for an input of this size."""
        size = (height, width)
        return (batch, *size) if self.labels else (batch, self.num_classes, *size)

    def reason_against(self, batch: int, height: int, width: int) -> str:
        """Why the file does not take inputs of this size, "" where it does."""
        if self.size is not None and (height, width) != self.size:
            return (
                f"the input has {height}x{width} pixels and the file takes "
                f"{self.size[0]}x{self.size[1]} only; bring it to that size, or export again with "
                "dynamic=True and without a size"
            )
        if self.batch is not None and batch != self.batch:
            return (
                f"the input has {batch} images and the file takes {self.batch} at a time; split "
                "it, or export again with dynamic=True"
            )
        if min(height, width) < self.smallest:
            return (
                f"the input has {height}x{width} pixels and the file takes {self.smallest} or more "
                "along each side; enlarge it, or export with that size fixed"
            )
        if height % self.multiple or width % self.multiple:
            return (
                f"the input has {height}x{width} pixels and the file takes multiples of "
                f"{self.multiple} along each side; pad it"
            )
        return ""

    def as_strings(self) -> dict[str, str]:
        """As metadata: the whole as JSON under `KEY`, and what other readers ask for by name."""
        found = {KEY: json.dumps(asdict(self)), "mean": json.dumps(self.mean)}
        found |= {"std": json.dumps(self.std), "channels": self.channels}
        if self.classes is not None:
            found["classes"] = json.dumps(self.classes)
        if self.palette is not None:
            found["palette"] = json.dumps(self.palette)
        return found

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], name: str) -> Description:
        """The description that `as_strings` wrote into the file of this name.

        Raises:
            DescriptionError: there is none, or it is another's.
        """
        text = strings.get(KEY)
        if text is None:
            raise DescriptionError(
                f"{name} does not say what it takes and gives: its metadata has no {KEY!r}; "
                "expected a file that deeplab_fast.export wrote"
            )
        try:
            if len(text) > _LONGEST:
                raise ValueError(f"{len(text)} characters")
            return cls(**_checked(json.loads(text)))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise DescriptionError(
                f"{name}: its metadata {KEY!r} is not what deeplab_fast.export writes: "
                f"{type(error).__name__}: {shown(str(error), 200)}; export the model again"
            ) from error


def _checked(value: Any) -> dict[str, Any]:
    """The arguments of a `Description` in JSON's types; raises where one is of another kind."""
    own = set(Description.__dataclass_fields__)
    if not isinstance(value, dict) or set(value) != own:
        raise ValueError(
            f"it has {sorted(value)[:20]}" if isinstance(value, dict) else "no mapping"
        )
    for name in ("labels", "photos"):
        if not isinstance(value[name], bool):
            raise ValueError(f"{name} is {value[name]!r}")
    _whole("num_classes", value["num_classes"], _MOST_CLASSES)
    for name in ("multiple", "smallest"):
        _whole(name, value[name], _LARGEST_STEP)
    if value["batch"] is not None:
        _whole("batch", value["batch"], _MOST_CLASSES)
    for name in ("precision", "model", "version"):
        if not isinstance(value[name], str):
            raise ValueError(f"{name} is {value[name]!r}")
    if value["channels"] not in _CHANNELS:
        raise ValueError(f"channels is {value['channels']!r}")
    size = value["size"]
    if size is not None:
        size = tuple(_whole("size", n, _LARGEST_SIDE) for n in size)
        if len(size) != 2:
            raise ValueError(f"size is {size}")
    resize = value["resize"]
    resize = tuple(resize) if isinstance(resize, list) else resize
    # It checks what it is given.
    preprocess = Preprocess(value["mean"], value["std"], resize)
    for side in (resize,) if isinstance(resize, int) else resize or ():
        _whole("resize", side, _LARGEST_SIDE)
    classes, palette = value["classes"], value["palette"]
    labels = max(2, value["num_classes"])
    if classes is not None:
        classes = tuple(classes)
        if not all(isinstance(c, str) for c in classes) or len(classes) > labels:
            raise ValueError("classes are no names of its classes")
    if palette is not None:
        palette = tuple(tuple(_whole("palette", c, 255, 0) for c in colour) for colour in palette)
        if any(len(colour) != 3 for colour in palette) or len(palette) > labels:
            raise ValueError("palette has no colours of its classes")
    return {
        **value,
        "size": size,
        "resize": preprocess.size,
        "mean": preprocess.mean,
        "std": preprocess.std,
        "classes": classes,
        "palette": palette,
    }


def _whole(name: str, value: object, most: int, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, no whole number from {least} to {most}")
    return value
