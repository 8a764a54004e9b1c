"""Models of other libraries as predict takes them: logits, sizes, classes, preprocessing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_fast.data.preprocess import Preprocess, PreprocessBGR
from deeplab_fast.engine.eval_form import eval_logits
from deeplab_fast.engine.runner import is_out_of_memory, preprocess_of

__all__ = ["AdaptedModel", "AssumedPreprocess", "as_segmenter"]

# Beyond it no network of the usual five halvings asks for more.
_DIVISOR = 32
# Sides of a picture that tells the number of classes. The first is the cheapest; the others are
# those of networks that have one fixed size.
_PROBES = (64, 224, 256, 384, 512, 513)
# Of Hugging Face's models, by config.model_type: the default of their image processors.
_PROCESSORS: dict[str, Preprocess] = {
    "mobilenet_v2": Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "mobilevit": PreprocessBGR(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    "mobilevitv2": PreprocessBGR(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
}
# What may stand behind an activation without changing what its values are.
_TRANSPARENT = (nn.Identity, nn.Upsample, nn.Dropout, nn.Dropout2d)


@dataclass(frozen=True)
class AssumedPreprocess(Preprocess):
    """ImageNet's preprocessing for a model that does not tell its own; its first picture warns.

    Args:
        model: what the warning calls the model.
    """

    model: str = "the model"

    def batch(
        self,
        pixels: Tensor,
        *,
        size: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        if not getattr(self, "_told", False):
            object.__setattr__(self, "_told", True)
            self.tell(stacklevel=3)
        return super().batch(pixels, size=size, device=device)

    def tell(self, stacklevel: int = 2) -> None:
        """Warn of what is assumed."""
        warnings.warn(
            f"nothing tells how photos for {self.model} are normalised; assumed are R, G, B in "
            f"0..1 with ImageNet's mean {self.mean} and std {self.std}. If it was trained "
            "otherwise the labels are wrong: pass preprocess=deeplab_fast.data.Preprocess("
            "mean=..., std=...), on the command line --mean and --std",
            UserWarning,
            stacklevel=stacklevel,
        )


def as_segmenter(
    model: nn.Module,
    *,
    preprocess: Preprocess | None = None,
    align_corners: bool | None = None,
    activation: str | None = None,
    divisor: int | None = None,
) -> nn.Module:
    """What ``predict`` and ``evaluate`` run of a model of any library.

    A model with ``forward_logits`` and ``align_corners``, as those that this package builds, is
    returned as it is, any other inside an :class:`AdaptedModel`. DistributedDataParallel and
    DataParallel are taken off: predict runs on one device, and the former would wait for the other
    processes in every call.

    Args:
        model: called as ``model(x)`` with a normalised float tensor [N, 3, H, W]. It returns logits
            [N, C, h, w] of any resolution: as a tensor, in a mapping under "out" (torchvision) or
            "logits", in an object with ``logits`` (transformers), or as the first of a tuple or
            list (smp with aux_params).
        preprocess: from 8-bit RGB to x. None: the model's own ``preprocess``, what mmsegmentation's
            data_preprocessor holds, the default of transformers' image processors for MobileNetV2
            and MobileViT, mean and std of a timm encoder, ImageNet's for torchvision; for others
            ImageNet's too, with a warning (:class:`AssumedPreprocess`).
        align_corners: how logits are interpolated to the photo's size; matters for those of low
            resolution. None: the model's own attribute (mmsegmentation), else False, which is
            transformers' too.
        activation: what the model ends with: "identity", "sigmoid", "softmax", "logsoftmax" or
            "tanh". None looks at the end of a ``segmentation_head`` (smp) or of a Sequential.
        divisor: of the heights and widths that the model takes. None: smp's
            ``encoder.output_stride`` where it wants that, else 1, and 32 from the moment the model
            raises for a size.

    Raises:
        ValueError: no module; an activation that leaves no logits; options for a model that has its
            own.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"the model is a {type(model).__name__}, expected a torch.nn.Module that maps images "
            "[N,3,H,W] to logits [N,C,h,w]; wrap a function in a module with that forward"
        )
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    options = {
        "preprocess": preprocess,
        "align_corners": align_corners,
        "activation": activation,
        "divisor": divisor,
    }
    if hasattr(model, "forward_logits") and hasattr(model, "align_corners"):
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)}: {type(model).__name__} has forward_logits and is taken as it "
                "is; expected no options for it. Set its own attributes"
            )
        return model
    return AdaptedModel(model, preprocess, align_corners, activation, divisor)


class AdaptedModel(nn.Module):
    """A model of another library with what ``predict`` calls; made by :func:`as_segmenter`.

    The model is the submodule ``model``: modes, devices and dtypes are its own, and nothing on it
    is changed. Its calls run without gradients but outside inference mode, so that tensors that it
    keeps can be trained with later, and on a copy of x, which it may change.

    **Sizes.** An image whose sides the model refuses is padded at the right and at the bottom with
    0, the mean colour where x is normalised, to multiples of ``divisor``, and the logits are
    cropped; those of low resolution are first interpolated to the padded size. Labels near these
    two borders depend on the padding.

    **Activations.** smp's heads may end in one. The head is not changed: probabilities are brought
    back to logits, log p of a softmax, log p - log(1 - p) of a sigmoid, atanh of a tanh; a
    log-softmax is one already. Where p is 0 or 1 they stay finite: p of a sigmoid that rounded to 1
    (logits above 16.6 in float32) counts as 1 - 2^-25 and larger ones cannot be told apart. Classes
    exclude each other, also behind a sigmoid: of several the one with the largest logit is the
    label, and its probability is the softmax of the logits. One class has predict's threshold of
    0.5, also where the library has another (mmsegmentation 0.3).

    Attributes:
        model: the model itself.
        library_class: its class, for messages.
        align_corners, preprocess, activation, divisor: as :func:`as_segmenter` has them.
        classes, palette: names and colours of the classes where the model tells them (transformers'
            ``config.id2label``, mmsegmentation's ``dataset_meta``, its own ``classes``), or None.
        precision: "fp32": it runs as it is, and has no other.
        logits_stride: rows of the last input for each row of its logits; 1 before.
    """

    precision = "fp32"

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess | None = None,
        align_corners: bool | None = None,
        activation: str | None = None,
        divisor: int | None = None,
    ) -> None:
        super().__init__()
        if divisor is not None and (type(divisor) is not int or divisor < 1):
            raise ValueError(f"divisor is {divisor!r}, expected an integer above 0, e.g. 32")
        self.model = model
        self.training = model.training
        core = getattr(model, "_orig_mod", model)
        self.library_class = type(core).__name__
        own = getattr(core, "align_corners", None)
        self.align_corners = bool(own is True if align_corners is None else align_corners)
        told = _preprocess_of(core) if preprocess is None else None
        self.preprocess = told or preprocess_of(model, preprocess)
        self.activation = _activation_of(core) if activation is None else _checked(activation)
        self.divisor = divisor or _divisor_of(core)
        self.classes, self.palette = _names_of(core)
        self.logits_stride = 1
        # Values that are no probabilities belie an activation that was given; and values that are
        # some are strange where none was seen.
        self._doubts = activation in ("sigmoid", "softmax")
        self._wonders = self.activation is None
        self._num_classes: int | None = None

    @property
    def num_classes(self) -> int:
        """C, from the last logits, or from those of a small picture of zeros before any call."""
        if self._num_classes is None:
            self._num_classes = self._probed()
        return self._num_classes

    def train(self, mode: bool = True) -> AdaptedModel:
        self.training = mode
        try:
            self.model.train(mode)
        except NotImplementedError:
            # An exported program has the mode that it was exported in.
            pass
        return self

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`forward_logits`."""
        return self.forward_logits(x)

    def forward_logits(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> logits [N, C, h, w].

        Raises:
            ValueError: the model returns something else.
        """
        return self.forward_logits_of(self.model, x)

    def forward_logits_of(self, model: nn.Module, x: Tensor) -> Tensor:
        """As :meth:`forward_logits`, by a view of the model or the model itself."""
        if torch.compiler.is_exporting():
            # A graph has one size of logits, and takes no other input in place of its own.
            return self._before_activation(self._map_in(model(x), x.shape[0]))
        with torch.inference_mode(False), torch.no_grad():
            logits = self._logits(model, x)
        self._num_classes = logits.shape[1]
        self.logits_stride = max(1, round(x.shape[-2] / logits.shape[-2]))
        return logits

    def _logits(self, model: nn.Module, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        padded = _padded(x, self.divisor)
        try:
            output = model(padded)
        except (RuntimeError, ValueError, AssertionError) as error:
            wider = _padded(x, _DIVISOR)
            if is_out_of_memory(error) or wider.shape == padded.shape:
                raise
            try:
                output = model(wider)
            except (RuntimeError, ValueError, AssertionError):
                raise error from None
            self.divisor, padded = _DIVISOR, wider
        logits = self._before_activation(self._map_in(output, x.shape[0]))
        if padded.shape == x.shape:
            return logits
        if logits.shape[-2:] != padded.shape[-2:]:
            logits = F.interpolate(
                logits, padded.shape[-2:], mode="bilinear", align_corners=self.align_corners
            )
        return logits[..., :height, :width]

    def _map_in(self, output: object, images: int) -> Tensor:
        """The logits in what the model returned."""
        found: object = output
        if isinstance(output, Mapping):
            found = output.get("out", output.get("logits"))
        elif isinstance(getattr(output, "logits", None), Tensor):
            found = getattr(output, "logits", None)
        elif isinstance(output, (tuple, list)) and output:
            found = output[0]
        if (
            isinstance(found, Tensor)
            and found.is_floating_point()
            and found.ndim == 4
            and found.shape[0] == images
            and 0 not in found.shape[1:]
        ):
            return found
        raise ValueError(
            f"{self.library_class} returned {_described(output)} for {images} image(s); expected "
            "float logits [N,C,h,w]: a tensor, a mapping with 'out' or 'logits', an object with "
            ".logits, or a tuple or list whose first is the tensor. Wrap the model in a module "
            "whose forward returns that map"
        )

    def _before_activation(self, y: Tensor) -> Tensor:
        if (self._doubts or self._wonders) and not (
            y.is_cuda and torch.cuda.is_current_stream_capturing()
        ):
            self._look_at(y)
            self._doubts = self._wonders = False
        invert = _INVERSES.get(self.activation or "identity")
        if self.activation == "softmax" and y.shape[1] == 1:
            raise ValueError(
                f"{self.library_class} ends in a softmax over its one class, which is 1 at every "
                "pixel; expected several classes, or a sigmoid. Build it with the activation None"
            )
        return y if invert is None else invert(y)

    def _look_at(self, y: Tensor) -> None:
        """Whether the values are what the activation, or its absence, makes them."""
        low, high = (float(v) for v in torch.aminmax(y[..., ::8, ::8]))
        if self._doubts and not math.isnan(low) and not (low > -1e-3 and high < 1 + 1e-3):
            raise ValueError(
                f"activation={self.activation!r} was given and {self.library_class} returns values "
                f"from {low:.3g} to {high:.3g}, expected 0 to 1; leave activation out, or pass "
                "'identity' for logits"
            )
        if not self._wonders or not 0 <= low <= high <= 1:
            return
        low, high = (float(v) for v in torch.aminmax(y))
        if not 0 <= low <= high <= 1:
            return
        if y.shape[1] > 1 and float((y.float().sum(1) - 1).abs().amax()) > 1e-2:
            return
        name = "sigmoid" if y.shape[1] == 1 else "softmax"
        warnings.warn(
            f"{self.library_class} returns values between 0 and 1 only, as behind a {name}; they "
            "are taken as logits, and labels or probabilities are wrong if they are none. Pass "
            f"deeplab_fast.engine.adapter.as_segmenter(model, activation={name!r}), or "
            "activation='identity' to say that they are logits",
            UserWarning,
            stacklevel=2,
        )

    def _probed(self) -> int:
        state = (t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())
        like = next(state, torch.empty(0))
        first: Exception | None = None
        for side in _PROBES:
            x = torch.zeros(1, 3, side, side, dtype=like.dtype, device=like.device)
            try:
                return eval_logits(self, x).shape[1]
            # A model's own code may raise anything; an AttributeError here would read as a missing
            # attribute of this class.
            except Exception as error:
                if _is_ours(error):
                    raise
                first = first or error
        raise ValueError(
            f"{self.library_class} raised {type(first).__name__} for a picture of zeros [1,3,"
            f"{_PROBES[0]},{_PROBES[0]}], which was to tell its number of classes: {first}. "
            "Expected a model that maps RGB images of any size to logits; call model.eval()(x) "
            "yourself to see where it fails"
        ) from first


def _is_ours(error: Exception) -> bool:
    """Whether this file refused what a model returned."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename == __file__


def _padded(x: Tensor, divisor: int) -> Tensor:
    """A copy of x whose sides are multiples of the divisor, 0 at its right and bottom."""
    bottom, right = (-n % divisor for n in x.shape[-2:])
    return F.pad(x, (0, right, 0, bottom)) if bottom or right else x.clone()


def _described(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {list(output.shape)} of {str(output.dtype).removeprefix('torch.')}"
    if isinstance(output, Mapping):
        parts = ", ".join(f"{key!r}: {_described(value)}" for key, value in output.items())
        return f"a {type(output).__name__} with {{{parts}}}"
    if isinstance(output, (tuple, list)):
        parts = ", ".join(_described(value) for value in output)
        return f"a {type(output).__name__} of ({parts})"
    return "None" if output is None else f"a {type(output).__name__}"


# Activations.


def _checked(activation: str) -> str:
    allowed = ("identity", *_INVERSES, "logsoftmax")
    if activation not in allowed:
        raise ValueError(
            f"activation is {activation!r}, expected one of {', '.join(allowed)}, or None for what "
            "the model shows"
        )
    return activation


def _logits_of_softmax(p: Tensor) -> Tensor:
    p = p.double() if p.dtype == torch.float64 else p.float()
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def _logits_of_sigmoid(p: Tensor) -> Tensor:
    # What rounds to 1 lies within half of the last place below it.
    rest = torch.finfo(p.dtype).eps / 4
    p = p.double() if p.dtype == torch.float64 else p.float()
    return p.clamp_min(torch.finfo(p.dtype).tiny).log() - (1 - p).clamp_min(rest).log()


def _logits_of_tanh(y: Tensor) -> Tensor:
    rest = torch.finfo(y.dtype).eps / 4
    y = y.double() if y.dtype == torch.float64 else y.float()
    return ((1 + y).clamp_min(rest).log() - (1 - y).clamp_min(rest).log()) / 2


_INVERSES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": _logits_of_sigmoid,
    "softmax": _logits_of_softmax,
    "tanh": _logits_of_tanh,
}


def _activation_of(core: nn.Module) -> str | None:
    """What a model ends with, None where its structure does not tell."""
    head = getattr(core, "segmentation_head", None)
    in_head = isinstance(head, nn.Module)
    last, wrapped = _last(head if isinstance(head, nn.Module) else core)
    if last is None or (last is core and not in_head):
        return None
    if isinstance(last, nn.Sigmoid):
        return "sigmoid"
    if isinstance(last, nn.Tanh):
        return "tanh"
    if isinstance(last, nn.Softmax2d):
        return "softmax"
    if isinstance(last, (nn.Softmax, nn.LogSoftmax)) and last.dim in (None, 1, -3):
        return "softmax" if isinstance(last, nn.Softmax) else "logsoftmax"
    if isinstance(last, nn.Conv2d):
        return "identity"
    if wrapped or isinstance(last, (nn.Softmax, nn.LogSoftmax)):
        raise ValueError(
            f"{type(core).__name__} ends in {last}, behind which there are no logits; expected no "
            "activation, a sigmoid, tanh, softmax or log-softmax over the classes. Build it "
            "without, or pass activation='identity' to as_segmenter to take its values as logits"
        )
    return None


def _last(module: nn.Module) -> tuple[nn.Module | None, bool]:
    """The last module of a Sequential that changes values; whether smp's Activation holds it."""
    if isinstance(module, nn.Sequential):
        for child in reversed(module):
            last, wrapped = _last(child)
            if last is not None:
                return last, wrapped
        return None, False
    inner = getattr(module, "activation", None)
    if type(module).__name__ == "Activation" and isinstance(inner, nn.Module):
        return _last(inner)[0], True
    return (None if isinstance(module, _TRANSPARENT) else module), False


# What a model tells about itself.


def _divisor_of(core: nn.Module) -> int:
    wanted = getattr(core, "requires_divisible_input_shape", False)
    stride = getattr(getattr(core, "encoder", None), "output_stride", None)
    return stride if wanted and isinstance(stride, int) and stride > 0 else 1


def _preprocess_of(core: nn.Module) -> Preprocess:
    own = getattr(core, "preprocess", None)
    if isinstance(own, Preprocess):
        return own
    library = getattr(core, "data_preprocessor", None)
    mean, std = (getattr(library, name, None) for name in ("mean", "std"))
    if isinstance(mean, Tensor) and isinstance(std, Tensor) and mean.numel() == std.numel() == 3:
        # mmsegmentation reads files as B, G, R in 0..255.
        kind = Preprocess if getattr(library, "channel_conversion", False) else PreprocessBGR
        return kind(_three(mean), _three(std))
    processor = _PROCESSORS.get(str(getattr(getattr(core, "config", None), "model_type", "")))
    if processor is not None:
        return processor
    for module in core.modules():
        cfg = getattr(module, "pretrained_cfg", None)
        if isinstance(cfg, Mapping) and cfg.get("mean") and cfg.get("std"):
            if len(cfg["mean"]) == len(cfg["std"]) == 3:
                return Preprocess(tuple(cfg["mean"]), tuple(cfg["std"]))
    if type(core).__module__.startswith("torchvision.models.segmentation"):
        return Preprocess()
    return AssumedPreprocess(model=type(core).__name__)


def _three(values: Tensor) -> tuple[float, float, float]:
    first, second, third = (value / 255 for value in values.flatten().tolist())
    return first, second, third


def _names_of(
    core: nn.Module,
) -> tuple[tuple[str, ...] | None, tuple[tuple[int, int, int], ...] | None]:
    """Class names and colours that a model tells."""
    by_id = getattr(getattr(core, "config", None), "id2label", None)
    if isinstance(by_id, Mapping) and by_id:
        names = _texts([by_id.get(i) for i in range(len(by_id))])
        # The names that a configuration has where nobody gave any.
        if names is not None and names != tuple(f"LABEL_{i}" for i in range(len(names))):
            return names, None
    meta = getattr(core, "dataset_meta", None)
    source: Any = meta if isinstance(meta, Mapping) else vars(core)
    names = _texts(source.get("classes"))
    colours = source.get("palette")
    if names is None or not isinstance(colours, Sequence) or len(colours) != len(names):
        return names, None
    return names, tuple((int(r), int(g), int(b)) for r, g, b in colours)


def _texts(values: object) -> tuple[str, ...] | None:
    if not isinstance(values, (list, tuple)) or not values:
        return None
    return tuple(values) if all(isinstance(v, str) and v for v in values) else None
