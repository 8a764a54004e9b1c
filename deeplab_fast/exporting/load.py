"""Exported files as models that `predict` takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplab_fast.data.images import ImageLike, as_rgb_array
from deeplab_fast.data.preprocess import InputSizeError, Preprocess, check_input_size
from deeplab_fast.engine.predict import PredictOptions, check_tensor, checked_images, predict
from deeplab_fast.engine.runner import is_out_of_memory, preprocess_of
from deeplab_fast.exporting.description import Description
from deeplab_fast.exporting.formats import FORMATS, check_suffix
from deeplab_fast.exporting.runtimes import start


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether a name is that of an exported file."""
    return Path(path).suffix in FORMATS


def load_exported(path: str | os.PathLike[str], *, runtime: str | None = None) -> ExportedModel:
    """A file that `deeplab_fast.export` wrote, as a model with `predict`.

    Args:
        path: .onnx, .xml, .pt2 or .pt2-package. A .pt2-package has machine code, and a .pt2 may
            have pickles, that run when it is loaded: load none that you do not trust.
        runtime: "onnxruntime" or "openvino" for .onnx; None for the usual one of the format.

    Raises:
        ValueError: another file, one that is damaged, or a runtime that does not take it.
        ImportError: the runtime is not installed.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    check_suffix(path)
    return ExportedModel(path, runtime)


class ExportedModel(nn.Module):
    """An exported file in its runtime, on the CPU; made by `load_exported`.

    A file of logits takes all that `predict` does: several scales, flips and windows. One that
    takes photos (`preprocessing=True`) and resizes them takes whole photos at scale 1; one of
    labels gives its labels.

    Attributes:
        description: what the file takes and gives.
        runtime: the library that runs it, with its version.
        num_classes, classes, palette, preprocess, align_corners: as of a `DeepLabV3`.
    """

    # Logits have the input's size already.
    align_corners = False
    logits_stride = 1

    def __init__(self, path: Path, runtime: str | None = None) -> None:
        super().__init__()
        super().train(False)
        self._run = start(path, runtime)
        self._origin = (path, runtime)
        self.name = self.library_class = path.name
        self.runtime = self._run.name
        self.description = Description.from_strings(self._run.strings, path.name)
        self.num_classes = self.description.num_classes
        self.precision = self.description.precision
        self.classes, self.palette = self.description.classes, self.description.palette
        # The file normalises: it gets the levels 0..255.
        self.preprocess = (
            Preprocess((0.0,) * 3, (1 / 255,) * 3)
            if self.description.photos
            else self.description.preprocess
        )

    def forward(self, images: Tensor) -> Tensor:
        """The file's result for an input as `description` has it.

        Raises:
            InputSizeError: a size that it does not take.
            ValueError: another shape or dtype.
        """
        own = self.description
        wanted = torch.uint8 if own.photos else torch.float32
        if (
            not isinstance(images, Tensor)
            or images.dim() != 4
            or images.dtype != wanted
            or images.shape[3 if own.photos else 1] != 3
            or images.device.type != "cpu"
        ):
            is_tensor = isinstance(images, Tensor)
            got = f"{images.dtype} {list(images.shape)} on {images.device}" if is_tensor else None
            raise ValueError(
                f"the input is {got or type(images).__name__}; {self.name} takes a tensor "
                f"{own.input_text} on the CPU"
            )
        rows = 1 if own.photos else 2
        batch, height, width = images.shape[0], images.shape[rows], images.shape[rows + 1]
        if reason := own.reason_against(batch, height, width):
            raise InputSizeError(f"{self.name}: {reason}{self._advice}")
        if own.photos:
            # The file resizes them itself.
            check_input_size((height, width), own.preprocess.target_size(height, width))
        shape = own.result_shape(batch, height, width)
        if batch == 0:
            # OpenVINO 2026.4 gives the results of the call before.
            return torch.empty(shape, dtype=own.result_dtype)
        try:
            result = self._run(images)
        # Each library has errors of its own.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            what = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{self.name} cannot be run in {self.runtime} for {list(images.shape)}: {what}; "
                f"expected {own.input_text}, as it says of itself: export the model again"
            ) from error
        if tuple(result.shape) != shape or result.dtype != own.result_dtype:
            raise ValueError(
                f"{self.name} gave {result.dtype} {list(result.shape)}; expected "
                f"{own.result_text}, as it says of itself: export the model again"
            )
        return result

    @property
    def _advice(self) -> str:
        """What changes the size of photos."""
        resize = self.preprocess.size
        if resize is None:
            return ""
        return (
            f". Photos are resized to {resize} before (preprocess.size): pass preprocess= with "
            "another size, on the command line --size, 0 for the photo's own"
        )

    def forward_logits(self, x: Tensor) -> Tensor:
        """[N, 3, H, W], normalised, or of a file of photos levels 0..255, -> [N, C, H, W].

        Raises:
            InputSizeError: a size that it does not take.
            ValueError: a file of labels.
        """
        if self.description.labels:
            raise ValueError(
                f"{self.name} gives labels and no logits; expected a file of logits for several "
                "scales, flips, windows, probabilities or a threshold: leave them out, or export "
                "again with labels=False"
            )
        if self.description.photos:
            x = x.round().clamp(0, 255).to(torch.uint8)
        return self._padded(x)

    def predict(self, images: Tensor | ImageLike | list[ImageLike], **options: Any) -> Any:
        """Label maps of photos or tensors; see `deeplab_fast.engine.predict.predict`.

        Raises:
            InputSizeError: a photo of a size that the file does not take.
            ValueError: options that it has no answer to.
        """
        self.check_options(**options)
        own = self.description
        options = {k: v for k, v in options.items() if k not in ("precision", "dtype", "device")}
        ready = isinstance(images, Tensor) and images.is_floating_point()
        if own.photos and ready:
            raise ValueError(
                f"the images are a tensor of {cast(Tensor, images).dtype} and {self.name} "
                "normalises photos itself; pass a uint8 tensor [N,3,H,W], a path or an array"
            )
        if not own.labels:
            return predict(self, images, **options)
        preprocess = preprocess_of(self, options.get("preprocess"))
        if isinstance(images, Tensor):
            check_tensor(images)
            batch = images if images.dim() == 4 else images[None]
            if ready:
                labels = self._padded(batch.to(torch.float32))
            elif not len(batch):
                labels = torch.empty((0, *batch.shape[2:]), dtype=own.result_dtype)
            else:
                labels = torch.stack([self._labels(each[None], preprocess) for each in batch])
            return labels if images.dim() == 4 else labels[0]
        found = []
        for image in checked_images(images):
            pixels = torch.from_numpy(as_rgb_array(image)).permute(2, 0, 1)
            found.append(self._labels(pixels[None], preprocess).numpy())
        return found if isinstance(images, (list, tuple)) else found[0]

    def check_options(self, **options: Any) -> None:
        """Raises ValueError for options of `predict` that the file has no answer to."""
        own, asked = self.description, _asked(options)
        fp32 = ("fp32", "torch.float32")
        for name, allowed in (
            ("precision", (own.precision,)),
            ("dtype", fp32),
            ("device", ("cpu",)),
        ):
            value = options.get(name)
            if value is not None and str(value) not in allowed:
                raise ValueError(
                    f"{name} is {value} and {self.name} computes in {own.precision} on the CPU; "
                    "leave it out, or export the model another way"
                )
        if own.photos and (given := asked & {"scales", "tile", "preprocess"}):
            if own.resize is not None or "preprocess" in given:
                raise ValueError(
                    f"{', '.join(sorted(given))}: {self.name} takes photos and resizes and "
                    "normalises them itself; leave that out, or export with preprocessing=False"
                )
        if own.labels and (given := asked - {"preprocess"}):
            raise ValueError(
                f"{', '.join(sorted(given))}: {self.name} gives labels and no logits; leave that "
                "out, or export with labels=False"
            )

    def _labels(self, photo: Tensor, preprocess: Preprocess) -> Tensor:
        """uint8 [1, 3, H, W] -> labels [H, W]."""
        if self.description.photos:
            return self._padded(photo)[0]
        height, width = photo.shape[2:]
        if preprocess.target_size(height, width) != (height, width):
            raise InputSizeError(
                f"{self.name} gives labels of the size of its input, for which a photo of "
                f"{height}x{width} is resized (to {preprocess.size}); expected a file that gives "
                "labels of the photo's own size: export with preprocessing=True, or labels=False"
            )
        return self._padded(preprocess.batch(photo))[0]

    def _padded(self, x: Tensor) -> Tensor:
        """The result for [N, 3, H, W] of any size, which is padded at the right and at the bottom
        with the mean colour to multiples that the file takes."""
        own = self.description
        height, width = x.shape[2:]
        bottom, right = (-side % own.multiple for side in (height, width))
        if own.size is None and (bottom or right):
            # The network's own order of channels; photos have R, G, B.
            mean = own.mean if own.channels == "RGB" else own.mean[::-1]
            levels = [round(255 * m) if own.photos else 0 for m in mean]
            wide = x.new_empty((*x.shape[:2], height + bottom, width + right))
            wide.copy_(torch.tensor(levels, dtype=x.dtype)[None, :, None, None].expand_as(wide))
            wide[..., :height, :width] = x
            x = wide
        y = self(x.permute(0, 2, 3, 1) if own.photos else x)
        return y[..., :height, :width]

    def __reduce__(self) -> tuple[type[ExportedModel], tuple[Path, str | None]]:
        # Libraries' objects are neither copied nor pickled: the file is loaded again.
        return ExportedModel, self._origin

    def __deepcopy__(self, memo: object) -> ExportedModel:
        return ExportedModel(*self._origin)

    def train(self, mode: bool = True) -> ExportedModel:
        """Only `train(False)`.

        Raises:
            RuntimeError: training mode is asked for.
        """
        if mode:
            raise RuntimeError(
                f"{self.name} is an exported file and cannot train; train the model that it was "
                "made from and export again"
            )
        return self


def _asked(options: dict[str, Any]) -> set[str]:
    """The options of a call to `predict` that need more than one pass and its labels."""
    names = ("scales", "flip", "tile", "overlap", "batch_size", "return_prob", "threshold")
    others = ("preprocess", "precision", "dtype", "device", "progress")
    if unknown := sorted(set(options) - {*names, *others}):
        raise TypeError(
            f"predict got {', '.join(unknown)}; its options are {', '.join((*names, *others))}"
        )
    checked = PredictOptions.checked(**{k: options[k] for k in names if k in options})
    found = {name for name in ("flip", "return_prob") if getattr(checked, name)}
    found |= {name for name in ("tile", "threshold") if getattr(checked, name) is not None}
    if checked.scales != (1.0,):
        found.add("scales")
    return found | ({"preprocess"} if options.get("preprocess") is not None else set())
