"""Images in, class names and colours, and the step from a photo to a network's input."""

from typing import TYPE_CHECKING

from deeplab_fast.data.classes import ClassSet, class_set, generic_classes, pascal_colour_map
from deeplab_fast.data.images import ImageReadError, as_rgb_array, list_images, read_image

if TYPE_CHECKING:
    from deeplab_fast.data.preprocess import InputSizeError, Preprocess, PreprocessBGR

__all__ = [
    "ClassSet",
    "ImageReadError",
    "InputSizeError",
    "Preprocess",
    "PreprocessBGR",
    "as_rgb_array",
    "class_set",
    "generic_classes",
    "list_images",
    "pascal_colour_map",
    "read_image",
]


def __getattr__(name: str) -> object:
    # The step to a network's input needs PyTorch; names of data sets and classes do not.
    if name in ("InputSizeError", "Preprocess", "PreprocessBGR"):
        from deeplab_fast.data import preprocess

        return getattr(preprocess, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
