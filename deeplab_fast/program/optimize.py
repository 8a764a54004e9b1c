"""`deeplab_fast.optimize`: a model as a frozen inference module with prepared weights."""

from __future__ import annotations

import copy
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..dispatch.precision import check_precision
from .fast_path import upsampled, with_memory_of
from .frozen import Frozen, freeze
from .gpu_layers import outside_autocast
from .network import Network
from .report import LayerReport, layer_reports, table

logger = logging.getLogger("deeplab_fast")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def optimize(
    model: Network,
    *,
    keep_aux: bool = False,
    max_extra_bytes: int | None = None,
    dtype: torch.dtype | str | None = None,
    precision: str | None = None,
) -> OptimizedDeepLabV3:
    """A frozen copy of a model for inference, with kernels and weights chosen for good.

    Batch norms are folded, residuals and activations run in the convolutions' epilogues, weights
    are prepared for the kernel that each layer takes; dropout is left out, as in eval mode,
    whatever mode the model is in. Outputs equal those of `model.eval()` within rounding. What a
    model does by itself in eval mode (see `DeepLabV3`) is the same, but for the check at each call
    whether it has changed, and on a GPU the folding of its weights, which a frozen module does not
    need.

    The model is not touched and not referred to: after `model.load_state_dict(...)` optimise again.
    Modules that are not known here are copied and run as they are. A model that cannot be folded at
    all (`reasons` of the result says why: forward hooks, weights of float64 or, on the CPU, of
    anything but float32) is copied as a whole.

    Args:
        model: a model of this package, in any mode.
        keep_aux: keep the auxiliary head, whose logits are then in the output.
        max_extra_bytes: bound on prepared weights beyond one copy of the weights, 0 for none; None
            for no bound. Each layer gets the part of it that its weights have of the model's. On a
            GPU the bound on CUDA graphs (`DeepLabV3.max_extra_bytes`).
        dtype: of weights, maps and logits: float16, bfloat16 or float32 on a GPU ("fp16", "bf16",
            "fp32"), from the model's weights rounded once; None for that of the weights.
        precision: on the CPU "fp32", "bf16" or "int8", with logits in float32 (see `DeepLabV3`);
            None for the model's own. On a GPU "fp32" and "bf16" are dtypes.

    Raises:
        TypeError: a model of another library.
        ValueError: a negative bound, or a dtype or precision that there is not, on this CPU or for
            this model.
    """
    if not isinstance(model, Network):
        raise TypeError(
            f"optimize takes the models that deeplab_fast builds, got {type(model).__name__}; load "
            "the weights into one, e.g. deeplab_fast.from_checkpoint(path)"
        )
    if max_extra_bytes is not None and max_extra_bytes < 0:
        raise ValueError(f"max_extra_bytes must be at least 0, got {max_extra_bytes}")
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}, or None")
        dtype = _DTYPES[dtype]
    if precision is not None:
        check_precision(precision)
    return OptimizedDeepLabV3(model, keep_aux, max_extra_bytes, dtype, precision)


class OptimizedDeepLabV3(nn.Module):
    """What `optimize` returns: the outputs of a DeepLabV3 in eval mode, without gradients.

    Attributes:
        num_classes, output_stride, atrous_rates, align_corners, preprocess, classes, palette,
            config: as of the model that it was made from.
        reasons: why the model could not be folded and runs as a copy; empty where it could.
        cuda_graphs, max_extra_bytes: as of a `DeepLabV3`, of which they may be set.
        dtype, device: of the logits; None of a model that runs as a copy.
        precision: what it computes in on the CPU; None on a GPU and of a copy.

    torch.export.export and torch.onnx.export(..., dynamo=True) take it, in PyTorch's non-strict
    mode, with sizes that are fixed or dynamic: folded convolutions are then nodes of this package's
    ops, or PyTorch's where they stand for these. TorchScript does not take it.

    Input: float32 [N, 3, H, W] on the CPU; on a GPU float16, bfloat16 or float32, cast to `dtype`
    (of a copied model: as that takes it); autocast has no effect. Sizes may change from call to
    call; several threads may call at once. It can be deep-copied, and pickled for the same version
    of the package. It has no parameters and no buffers: `state_dict()` is empty, and neither
    `load_state_dict`, `.to()` to another dtype or device nor `train()` are possible; change the
    model it came from and optimise again. A model that runs as a copy has the parameters of `copy`,
    and can be moved.
    """

    def __init__(
        self,
        model: Network,
        keep_aux: bool,
        max_extra_bytes: int | None,
        dtype: torch.dtype | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        super().train(False)
        self.num_classes = model.num_classes
        self.output_stride = getattr(model.backbone, "output_stride", None)
        self.atrous_rates = model.atrous_rates
        self.align_corners = model.align_corners
        self.preprocess = model.preprocess
        self.classes, self.palette = model.classes, model.palette
        self.config = copy.deepcopy(model.config)
        self.cuda_graphs, self.max_extra_bytes = model.cuda_graphs, max_extra_bytes
        frozen, reason = freeze(model, keep_aux, max_extra_bytes, dtype, precision)
        self.reasons: tuple[str, ...] = (reason,) if reason else ()
        self._keep_aux = keep_aux and model.aux_classifier is not None
        self._frozen: Frozen | None = frozen
        self.dtype = None if frozen is None else frozen.dtype
        self.device = None if frozen is None else frozen.device
        on_cpu = frozen is not None and frozen.device.type == "cpu"
        self.precision = frozen.precision if frozen is not None and on_cpu else None
        self.copy: Network | None = None
        if frozen is None:
            logger.warning("optimize: the model is copied and runs its plain modules: %s", reason)
            self.copy = copy.deepcopy(model).eval()

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks first.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(_no_torchscript("torch.jit.script"))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Full-resolution logits {"out"[, "aux"]}, as `DeepLabV3` returns them."""
        if torch.compiler.is_exporting():
            return upsampled(self._exported(x, self._keep_aux), x.shape[-2:], self.align_corners)
        logits = _uncompiled(self._logits)(x, self._keep_aux)
        free = self._frozen.free if self._frozen is not None else bool
        return with_memory_of(free, upsampled, logits, x.shape[-2:], self.align_corners)

    def forward_logits(self, x: Tensor) -> Tensor:
        """The main logits before upsampling: [N, 3, H, W] -> [N, num_classes, h, w]."""
        if torch.compiler.is_exporting():
            return self._exported(x, False)["out"]
        return _uncompiled(self._logits)(x, False)["out"]

    def predict(self, images: Any, **options: Any) -> Any:
        """Label maps of photos or tensors; see `deeplab_fast.engine.predict.predict`."""
        from ..engine.predict import predict

        return predict(self, images, **options)

    def layers(
        self, shape: Sequence[int] = (520, 520), *, measure: bool = False, repeats: int = 5
    ) -> list[LayerReport]:
        """What runs for inputs of a shape, layer by layer.

        Args:
            shape: (N, 3, H, W), or (H, W) for one image.
            measure: run the model on zeros and time each layer.
            repeats: measured runs, of which the median is reported.

        Raises:
            ValueError: a shape that does not fit, or a model that runs as a copy.
        """
        if self._frozen is None:
            raise ValueError(f"the model runs its plain modules: {self.reasons[0]}")
        full = (1, 3, *shape) if len(shape) == 2 else tuple(shape)
        if len(full) != 4 or min(full) < 1 or repeats < 1:
            raise ValueError(
                f"shape must be (H, W) or (N, 3, H, W) and repeats at least 1, got {tuple(shape)} "
                f"and {repeats}"
            )
        return layer_reports(self._frozen, full, self._keep_aux, measure, repeats)

    def table(
        self, shape: Sequence[int] = (520, 520), *, measure: bool = False, repeats: int = 5
    ) -> str:
        """`layers` as text: kernel, multiply-adds, predicted and measured time, extra memory."""
        reports = self.layers(shape, measure=measure, repeats=repeats)
        return table(reports, self.held_bytes)

    @property
    def held_bytes(self) -> int:
        """Bytes of weights held now, and of CUDA graphs; forms that are prepared on first use count
        from then on."""
        if self._frozen is not None:
            return self._frozen.held_bytes
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    @property
    def activation_bytes(self) -> int:
        """Bytes of memory for maps that is kept between calls on the CPU: see `DeepLabV3`."""
        return 0 if self._frozen is None else self._frozen.activation_bytes

    @property
    def extra_bytes(self) -> int:
        """Bytes held now beyond one copy of the weights."""
        return 0 if self._frozen is None else self._frozen.extra_bytes

    def train(self, mode: bool = True) -> OptimizedDeepLabV3:
        """Only `train(False)`.

        Raises:
            RuntimeError: training mode is asked for.
        """
        if mode:
            raise RuntimeError(
                "an optimised model cannot train: its batch norms are folded; train the model that "
                "it was made from and call deeplab_fast.optimize again"
            )
        return self

    def load_state_dict(self, *args: object, **options: object) -> NoReturn:
        """Not possible.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "an optimised model holds prepared weights only; load into the model that it was made "
            "from and call deeplab_fast.optimize again"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedDeepLabV3:
        if self.copy is not None:
            super()._apply(fn, recurse)
            return self
        assert self._frozen is not None
        probe = torch.empty(0, dtype=self._frozen.dtype, device=self._frozen.device)
        converted = fn(probe)
        if (converted.dtype, converted.device) != (probe.dtype, probe.device):
            raise RuntimeError(
                f"an optimised model stays {probe.dtype} on {probe.device}; convert the model that "
                "it was made from and call deeplab_fast.optimize again"
            )
        return self

    def _exported(self, x: Tensor, aux: bool) -> dict[str, Tensor]:
        """As `_logits`, where torch.export traces."""
        if self.copy is not None:
            return _plain_logits(self.copy, x, aux)
        if torch.compiler.is_dynamo_compiling():
            raise RuntimeError(
                "torch.export.export(..., strict=True) of an optimised model; it can be exported "
                "with strict=False, which is the default: leave it out, or export the model that "
                "it was made from"
            )
        frozen = self._frozen
        assert frozen is not None
        _check_input(frozen, x)
        device = frozen.device.type
        # A region of the program, which one that needs none is better without.
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return frozen.exported(x, aux)
        return frozen.exported(x, aux)

    def _logits(self, x: Tensor, aux: bool) -> dict[str, Tensor]:
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            raise RuntimeError(
                "an optimised model has no gradients; pass x.detach(), or use the model that it "
                "was made from"
            )
        if torch.jit.is_tracing():
            raise RuntimeError(
                _no_torchscript("torch.jit.trace, or torch.onnx.export with dynamo=False,")
            )
        if self.copy is not None:
            with torch.no_grad():
                return _plain_logits(self.copy, x, aux)
        frozen = self._frozen
        assert frozen is not None
        _check_input(frozen, x)
        with outside_autocast(frozen.device):
            return frozen.logits(x, aux, self.cuda_graphs, self.max_extra_bytes)


def _no_torchscript(what: str) -> str:
    return (
        f"{what} of an optimised model, whose kernels TorchScript does not have; allowed are "
        "torch.export.export and torch.onnx.export(..., dynamo=True): call "
        'deeplab_fast.export(model, "model.onnx") or deeplab_fast.export(model, "model.pt2"), or '
        "script or trace the model that it was made from"
    )


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` where torch.compile does not look."""
    # Importing the compiler takes seconds; code that compiles has done it.
    dynamo = sys.modules.get("torch._dynamo")
    return function if dynamo is None else dynamo.disable(function)


def _plain_logits(model: Network, x: Tensor, aux: bool) -> dict[str, Tensor]:
    features = model.backbone(x)
    logits = OrderedDict(out=model.classifier(features["out"]))
    if aux and model.aux_classifier is not None:
        logits["aux"] = model.aux_classifier(features["aux"])
    return logits


def _check_input(frozen: Frozen, x: object) -> None:
    if not isinstance(x, Tensor) or x.dim() != 4:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"the input must be a tensor [N, 3, H, W], got {got}")
    if not frozen.takes(x):
        dtypes = (str(dtype).removeprefix("torch.") for dtype in (x.dtype, frozen.dtype))
        got, own = dtypes
        raise ValueError(
            f"the input is {got} on {x.device}; this model was optimised for {own} on "
            f"{frozen.device}: convert the input, or optimise a model of that dtype on that device"
        )
    channels = frozen.program.in_channels
    if channels is not None and x.shape[1] != channels:
        raise ValueError(
            f"the input {list(x.shape)} has {x.shape[1]} channels, the weight wants {channels}; "
            "convert it"
        )
