"""The DeepLabv3 model: backbone, head, auxiliary head, bilinear upsampling of the logits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.images import ImageLike
from ..data.preprocess import Preprocess
from ..engine.eval_form import gate_of
from ..nn.aspp import ASPPConv
from ..nn.heads import DeepLabV2Head
from ..program import match, training
from ..program.fast_path import FastPath
from ..program.leading import Leading
from ..program.network import Network
from ..weights.save import model_metadata
from .backbone import Backbone, Geometry, set_dilation

if TYPE_CHECKING:
    from ..program.calibrate import CalibrationReport

OUTPUT_STRIDES = (8, 16)


class DeepLabV3(Network):
    """DeepLabv3 (arXiv 1706.05587), with torchvision's interface and state_dict keys.

        model(x) = {"out": upsample(classifier(backbone(x)["out"]), size of x)[, "aux": ...]}

    Args:
        backbone: returns a dict with the feature map "out" and, for the auxiliary head, "aux".
        classifier: feature map -> low-resolution logits.
        aux_classifier: the same for "aux", used in training, or None.
        align_corners: how logits are upsampled, as in torch.nn.functional.interpolate.

    Attributes:
        preprocess: what turns an 8-bit RGB photo into an input (`deeplab_fast.data.Preprocess`).
        classes, palette: names and colours of the classes, or None where they are not known.
        config: (builder name, options) that make this model again, or None.

        fast: False switches the fast path off.
        fused: False makes calls that need gradients run the plain modules.
        max_extra_bytes: bound on its prepared weights beyond one copy of the weights, 0 for none;
            None for no bound. Each layer gets the part of it that its weights have of the model's.
            8-bit weights of int8, half the bytes of a copy, are held in any case.
            On a GPU the bound on the memory of CUDA graphs; None there for a sixteenth of the
            device's.
        precision: what calls on the CPU that take the fast path compute in: "fp32"; "bf16", maps
            and weights in bfloat16 and sums in fp32, where the CPU has instructions for it; "int8",
            once `calibrate` has seen some photos. Under CPU autocast to bfloat16 calls compute in
            bf16. Logits are float32, under autocast bfloat16. `predict(precision=...)` chooses for
            one call.
        calibration: ranges of the maps for int8, from `calibrate` or a file, or None.
        cuda_graphs: on a GPU, None captures calls in CUDA graphs where their launches take longer
            than the GPU's work, True all that repeat, False none.

    In eval mode and without gradients (`torch.inference_mode()` or `torch.no_grad()`), on float32
    inputs on the CPU, calls take the fast path: batch norms folded, weights prepared for the kernel
    of each layer on the first call, the same numbers within fp32 rounding. Any change of the model
    is noticed at the next call and costs one preparation: each call compares the modules, version
    counters and storage of all tensors, and a hash of their bytes, which is one pass over the
    weights. `deeplab_fast.optimize` freezes a model and saves that. `fast_reasons(x)` says why a
    call does not take the fast path; hooks on inner modules, autocast to float16, compilation,
    scripting, tracing, export, deterministic mode and `use_backend("reference")` are such reasons.

    On a CUDA device, for float16, bfloat16 and float32, under autocast or not, the batch norms are
    folded on the device inside every call, from what the tensors hold when the GPU comes to it, so
    that no hash is needed; modules and where tensors lie are compared behind the launches. All maps
    are channels_last, and each convolution runs as the form of cuDNN, cuBLASLt and this package's
    kernels that suits its class (`deeplab_fast.ops.folded_conv`); with
    `torch.backends.cudnn.benchmark = True` forms are timed at the first call of a shape. A call
    that is captured comes back with copies of the graph's results; a shape that repeats is needed,
    and memory that stays taken (`prepared_bytes`). Graphs that somebody else captures, and replicas
    of `torch.nn.DataParallel`, get the plain modules.

    Where gradients are needed, calls take the fused training forms
    (`deeplab_fast.program.training`): the same gradients and running statistics within rounding,
    about half of the saved activations. Second derivatives (create_graph=True) come from PyTorch's
    operations. Hooks on a module, and whatever else makes it compute something of its own, make
    that module run as it is; scripting, tracing, export and torch.func transforms make all of them.
    So does a GPU on which no kernel of batch norm has earned its place (`deeplab_fast.tune`).

    Input: float [N, 3, H, W], any layout, H and W of at least 1, normalised as by `preprocess`.
    Output: OrderedDict "out" [N, num_classes, H, W] and "aux" where there is an auxiliary head.
    """

    __constants__: ClassVar = ["aux_classifier"]
    __jit_unused_properties__: ClassVar = [
        "activation_bytes",
        "atrous_rates",
        "num_classes",
        "output_stride",
        "precision",
        "prepared_bytes",
    ]

    def __init__(
        self,
        backbone: nn.Module,
        classifier: nn.Module,
        aux_classifier: nn.Module | None = None,
        *,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.aux_classifier = aux_classifier
        self.align_corners = align_corners
        self.preprocess = Preprocess()
        self.classes: tuple[str, ...] | None = None
        self.palette: tuple[tuple[int, int, int], ...] | None = None
        self.config: tuple[str, dict[str, Any]] | None = None
        self.fast = True
        self.fused = True
        self.max_extra_bytes: int | None = None
        self.cuda_graphs: bool | None = None
        self._fast_path = FastPath()
        self._leading = Leading()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Full-resolution logits, as torchvision's DeepLabV3 returns them."""
        size = x.shape[-2:]
        logits = self.all_logits(x)
        if not torch.jit.is_scripting():
            if not torch.compiler.is_compiling():
                return self._fast_path.upsampled(logits, size, self.align_corners)
        result = OrderedDict()
        for name, y in logits.items():
            result[name] = F.interpolate(
                y, size=size, mode="bilinear", align_corners=self.align_corners
            )
        return result

    def forward_logits(self, x: Tensor) -> Tensor:
        """The main logits before upsampling: [N, 3, H, W] -> [N, num_classes, h, w]."""
        return self.all_logits(x, aux=False)["out"]

    def all_logits(self, x: Tensor, aux: bool = True) -> dict[str, Tensor]:
        """The logits of all heads before upsampling, "out" and, where there is one, "aux"."""
        if not torch.jit.is_scripting():
            logits = self._fast_logits(x, aux)
            if logits is None:
                logits = training.logits(self, x, aux, self._leading)
            if logits is not None:
                return logits
        features = self.backbone(x)
        result = OrderedDict()
        result["out"] = self.classifier(features["out"])
        if aux and self.aux_classifier is not None:
            result["aux"] = self.aux_classifier(features["aux"])
        return result

    def fast_reasons(self, x: Tensor) -> list[str]:
        """Why a call on x runs the plain modules; empty where it takes the fast path.

        Prepares the weights where nothing else speaks against it.
        """
        return self._fast_path.reasons(self, x)

    @property
    def prepared_bytes(self) -> int:
        """Bytes of prepared weights that are held now, beside the model's own."""
        return self._fast_path.held_bytes + self._leading.held_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes of memory for maps that is kept between calls on the CPU.

        One block for each thread that calls at a time, of at most 1 GiB each. `train()` gives them
        back, with the prepared weights.
        """
        return self._fast_path.activation_bytes + self._leading.activation_bytes

    def drop_prepared(self) -> None:
        """Free what the fast path holds: prepared weights, memory for maps, CUDA graphs.

        The next call makes them again.
        """
        self._fast_path.drop()
        self._leading.drop()

    def train(self, mode: bool = True) -> DeepLabV3:
        """As nn.Module.train; frees what the fast path holds when training begins.

        Waits for photos that `predict` has under way in other threads.
        """
        with gate_of(self).changing():
            if mode:
                self.drop_prepared()
            else:
                self._leading.drop()
            return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeepLabV3:
        # What was prepared for another dtype or device is of no more use.
        self._fast_path.drop()
        self._leading.drop()
        return super()._apply(fn, recurse)

    def _fast_logits(self, x: Tensor, aux: bool) -> dict[str, Tensor] | None:
        if torch.compiler.is_compiling():
            return None
        return self._fast_path.logits(self, x, aux)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Models that earlier versions pickled whole have none.
        super().__setstate__({"_leading": Leading(), **state})

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Names and shapes do not tell all that `from_checkpoint` needs.
        about = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if about is not None and not torch.compiler.is_compiling():
            about["deeplab_fast"] = model_metadata(self)

    def predict(self, images: Tensor | ImageLike | Sequence[ImageLike], **options: Any) -> Any:
        """Label maps of photos or tensors; see `deeplab_fast.engine.predict.predict`."""
        from ..engine.predict import predict

        return predict(self, images, **options)

    def calibrate(
        self,
        images: Tensor | ImageLike | Sequence[ImageLike],
        *,
        method: str | None = None,
        batch_size: int | None = None,
        limit: int | None = None,
    ) -> CalibrationReport:
        """Measure on photos what int8 needs; see `deeplab_fast.program.calibrate.calibrate`."""
        from ..program.calibrate import calibrate

        return calibrate(self, images, method=method, batch_size=batch_size, limit=limit)

    @property
    def num_classes(self) -> int:
        """Number of classes of the main head."""
        convs = [m for m in self.classifier.modules() if isinstance(m, nn.Conv2d)]
        if convs:
            return convs[-1].out_channels
        # A scripted or traced classifier has no nn.Conv2d, but its filters.
        filters = [p for p in self.classifier.parameters() if p.dim() == 4]
        if not filters:
            raise AttributeError(
                f"the classifier {type(self.classifier).__name__} has no convolution that would "
                "tell its number of classes"
            )
        return filters[-1].shape[0]

    @property
    def output_stride(self) -> int:
        """Ratio of the input's size to that of the map the head works on."""
        return cast(Backbone, self.backbone).output_stride

    @property
    def atrous_rates(self) -> tuple[int, ...]:
        """Dilations of the head's atrous branches, in order."""
        return tuple(match.pair(conv.dilation)[0] for conv in _atrous_convs(self.classifier))

    def set_output_stride(self, output_stride: int) -> DeepLabV3:
        """Change the output stride of a model, trained or not, in place; weights stay as they are.

        Strides of the backbone are exchanged for dilation or back, and the head's atrous rates are
        doubled or halved, so that each filter sees the same pixels of the image; dilations of the
        backbone that were set by hand or by a checkpoint are scaled alike. The paper trains at 16
        and evaluates at 8.

        Args:
            output_stride: 8 or 16.

        Returns:
            The model itself.

        Raises:
            ValueError: another number, a backbone that cannot, a rate or dilation that cannot be
                halved, or a stride set by hand; nothing is changed then.

        Source: arXiv 1706.05587, section 3.3 ("the rates are doubled when output_stride = 8").
        """
        with gate_of(self).changing():
            return self._at_output_stride(output_stride)

    def _at_output_stride(self, output_stride: int) -> DeepLabV3:
        check_output_stride(output_stride)
        if not hasattr(self.backbone, "set_output_stride"):
            raise ValueError(
                f"the backbone {type(self.backbone).__name__} has a fixed output stride; build the "
                "model with a builder of deeplab_fast to change it"
            )
        backbone = cast(Backbone, self.backbone)
        before = backbone.output_stride
        convs = _atrous_convs(self.classifier)
        rates = [rate * before for rate in self.atrous_rates]
        if any(rate % output_stride for rate in rates):
            raise ValueError(
                f"atrous rates {self.atrous_rates} at output stride {before} have no whole number "
                f"at output stride {output_stride}; build the model with other atrous_rates"
            )
        _change_backbone(backbone, output_stride)
        for conv, rate in zip(convs, rates, strict=True):
            set_dilation(conv, rate // output_stride)
        if self.config is not None:
            name, options = self.config
            # Which stages are dilated is said by one option.
            options = {k: v for k, v in options.items() if k != "replace_stride_with_dilation"}
            rates_now = {"atrous_rates": self.atrous_rates} if convs else {}
            self.config = (name, {**options, "output_stride": output_stride, **rates_now})
        return self


@runtime_checkable
class _Dilated(Protocol):
    """A backbone that is told which of its stages give up their stride."""

    dilated: Sequence[bool]

    def set_dilated(self, dilated: Sequence[bool]) -> None: ...


def _change_backbone(backbone: Backbone, output_stride: int) -> None:
    """Change its output stride, and move with it what is not as the backbone itself plans it."""
    convs = {name: m for name, m in backbone.named_modules() if isinstance(m, nn.Conv2d)}
    actual = {name: Geometry.of(conv) for name, conv in convs.items()}
    kept: dict[str, object] = {
        name: vars(backbone)[name]
        for name in ("dilated", "output_stride")
        if name in vars(backbone)
    }
    if isinstance(backbone, _Dilated):
        backbone.set_dilated(backbone.dilated)
    else:
        backbone.set_output_stride(backbone.output_stride)
    before = {name: Geometry.of(conv) for name, conv in convs.items()}
    backbone.set_output_stride(output_stride)
    name = ""
    try:
        moved = {}
        for name in convs:
            if actual[name] != before[name]:
                moved[name] = actual[name].moved(before[name], Geometry.of(convs[name]))
    except ValueError as error:
        for name_, geometry in actual.items():
            geometry.put_on(convs[name_])
        vars(backbone).update(kept)
        raise ValueError(
            f"the output stride cannot become {output_stride}: backbone.{name} was given {error}; "
            f"set it for output stride {output_stride} by hand"
        ) from error
    for name_, geometry in moved.items():
        geometry.put_on(convs[name_])


def check_output_stride(output_stride: int) -> None:
    """8 or 16."""
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"DeepLabv3 supports output stride 8 or 16, got {output_stride!s:.80}")


def _atrous_convs(classifier: nn.Module) -> list[nn.Conv2d]:
    convs: list[Any] = []
    for module in classifier.modules():
        if isinstance(module, ASPPConv):
            convs.append(module[0])
        elif isinstance(module, DeepLabV2Head):
            convs.extend(module.convs)
    return convs
