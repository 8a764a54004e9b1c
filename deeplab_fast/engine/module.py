"""DeepLabv3 as a LightningModule: loss, optimizer, schedule, validation by confusion matrix."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import lightning
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from deeplab_fast.data.classes import ClassSet, generic_classes
from deeplab_fast.engine.captured import CapturedStep
from deeplab_fast.engine.config import TrainConfig
from deeplab_fast.engine.evaluate import ImageCounter, IndexedItem, equal_sizes, image_scores
from deeplab_fast.engine.losses import LabelSize, LossKind, SegmentationLoss
from deeplab_fast.engine.metrics import ImageScore, Metrics
from deeplab_fast.engine.runner import (
    PredictOptions,
    Runner,
    at_output_stride,
    is_out_of_memory,
    preprocess_of,
)
from deeplab_fast.engine.schedule import parameter_groups, poly_lr
from deeplab_fast.nn.batch_norm import freeze_batch_norm
from deeplab_fast.weights import model_metadata

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

    from deeplab_fast.data.datasets import LabelledData
    from deeplab_fast.engine.datamodule import Batch
    from deeplab_fast.models import DeepLabV3

__all__ = ["NonFiniteLoss", "SegmentationModule"]

# What a checkpoint's state of the optimizer and the schedule holds, the length of the run too.
_OF_THE_OPTIMIZER = (
    *("lr", "weight_decay", "momentum", "nesterov", "backbone_lr_factor", "aux_lr_factor"),
    *("power", "warmup_steps", "warmup_epochs", "warmup_factor", "steps", "epochs"),
)
# One random stream a (seed, epoch, batch, process); not that of the augmentation.
_STREAM = 0x73746570


class NonFiniteLoss(RuntimeError):
    """A loss or gradient that is nan or infinite; the weights are those of before the step."""


class SegmentationModule(lightning.LightningModule):
    """A model in training, for ``lightning.Trainer``.

    Batches are (images, labels, indices) as ``SegmentationData`` gives; uint8 images are normalised
    on the device by ``model.preprocess``. Before every batch the global generators are seeded by
    (config.seed, epoch, batch, process), so that a resumed run draws the same dropout as one that
    was not interrupted.

    Logs "train/loss" (and "train/main", "train/aux" with an auxiliary head), "lr", and after
    validation "val/miou", "val/pixel_accuracy", "val/mean_accuracy",
    "val/frequency_weighted_iou", "val/iou/NAME" of each class (all in 0..1, nan where there is
    none) and "val/not_finite_pixels", exact over processes, and "val/loss": the mean over the
    photos of the loss of the classifier alone ("train/main" with an auxiliary head), each at its
    own size, those without a labelled pixel left out; upsampled logits are held for Dice only. What
    is scored is what is saved: without ``config.undo_class_weights``' part of the class weights
    (which "val/loss", of the trained weights, keeps). Where logits were NaN or infinite the scores
    are logged as nan, so that no checkpoint is the best by them. Checkpoints hold the model as
    ``load_weights`` reads it.

    With ``config.cuda_graph`` the forward and backward passes are CUDA graphs (``CapturedStep``),
    on one GPU, with hooks and callbacks in the same order as without, but that
    ``on_before_backward`` sees a loss without the network behind it. At the start of an epoch the
    step is captured anew if the model was changed, such as by a callback that unfreezes.

    Args:
        model: as the builders return; its batch norms are changed as the config says.
        config: options under "Model", "Loss" and "Optimiser and schedule".
        classes: names of the classes, for the metrics; a model of one class is scored on two.
        ignore_index: of the labels.
        class_weights: numbers, in place of ``config.class_weights`` where that is a name.
        total_steps: length of the schedule; default: ``config.steps``, or what the trainer
            estimates.
        name: gives a training sample's path for its index, for messages.
        tell: takes a line about what is captured.

    Attributes:
        metrics: the last validation's ``Metrics``, ``confusion`` its counts, ``images`` the scores
            of each photo, ``not_finite`` its pixels without finite logits by image,
            ``validated_step`` the number of optimizer steps before it.
        last_step: losses and learning rate of the last step of the optimizer.

    Raises:
        ValueError: an option that does not fit the model.
    """

    def __init__(
        self,
        model: DeepLabV3,
        config: TrainConfig,
        *,
        classes: ClassSet | None = None,
        ignore_index: int | None = None,
        class_weights: Sequence[float] | None = None,
        total_steps: int | None = None,
        name: Callable[[int], str] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        if config.output_stride is not None and config.output_stride != model.output_stride:
            model.set_output_stride(config.output_stride)
        if config.batch_norm_momentum is not None:
            for layer in model.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.momentum = config.batch_norm_momentum
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.fused = config.fused
        self.model = model
        self.classes = (classes or generic_classes(model.num_classes)).of_labels()
        if ignore_index is None:
            ignore_index = 255 if config.ignore_index is None else config.ignore_index
        self.ignore_index = ignore_index
        if class_weights is None and isinstance(config.class_weights, (list, tuple)):
            class_weights = config.class_weights
        if class_weights is not None and len(class_weights) != len(self.classes):
            raise ValueError(
                f"class_weights has {len(class_weights)} weights for {len(self.classes)} classes "
                f"({', '.join(self.classes.classes[:5])}, ...); give one weight a class"
            )
        self.loss = self._loss(ignore_index, class_weights)
        self.total_steps = total_steps if total_steps is not None else config.steps
        self._freeze()
        self.metrics: Metrics | None = None
        self.validated_step: int | None = None
        self.confusion: Tensor | None = None
        self.not_finite: dict[str, int] = {}
        self.images: tuple[ImageScore, ...] = ()
        # A function: deepcopy would follow a bound method to its object, the data.
        self._name = None if name is None else lambda index: name(index)
        self._tell = None if tell is None else lambda text: tell(text)
        self._counter: ImageCounter | None = None
        self._confusion: Tensor | None = None
        # Of each image of a validation: index and name, and its scores and loss.
        self._scored: list[tuple[int, str]] = []
        self._scores: list[Tensor] = []
        # A function: the average pairs its tensors with this module's.
        self._val_loss: Callable[[Tensor, Tensor], Tensor] | None = None
        # Losses and samples since the last step of the optimizer: the last is what went wrong.
        self.last_step: dict[str, Tensor | float] = {}
        self._window: list[tuple[dict[str, Tensor], Tensor]] = []
        self._restore = ExitStack()
        self._captured: CapturedStep | None = None
        self._rates_restored = False
        # Not where running out of memory is what is looked for.
        self.explains_memory = True

    def _loss(self, ignore_index: int, class_weights: Sequence[float] | None) -> SegmentationLoss:
        config = self.config
        return SegmentationLoss(
            kind=cast(LossKind, config.loss),
            ignore_index=ignore_index,
            class_weights=class_weights,
            label_smoothing=config.label_smoothing,
            top_k=config.top_k,
            min_kept=config.min_kept,
            focal_gamma=config.focal_gamma,
            dice_weight=config.dice_weight,
            labels=cast(LabelSize, config.loss_labels),
            align_corners=bool(self.model.align_corners),
        )

    def taken_back(self) -> Tensor | None:
        """What the saved model has of its classes' logits more than the trained one, [C].

            -T log w_c,  T = config.undo_class_weights, w the class weights

        0 for a class of weight 0, which was never trained; of one class, whose logit is the
        difference of two, the difference. None without class weights or where T is 0.
        """
        weights = self.loss.class_weights
        if not self.config.undo_class_weights or weights is None:
            return None
        logs = weights.where(weights > 0, 1.0).log()
        logs = logs if self.model.num_classes > 1 else logs[1:] - logs[:1]
        return -self.config.undo_class_weights * logs

    def _freeze(self) -> None:
        """What the config wants to stay as it is; an auxiliary head without a loss too."""
        config = self.config
        if config.freeze_batch_norm:
            freeze_batch_norm(self.model)
        elif config.freeze_backbone_statistics:
            freeze_batch_norm(self.model.backbone, parameters=False)
        for part in config.freeze:
            _freeze_part(self.model, part)
        aux_head = getattr(self.model, "aux_classifier", None)
        if aux_head is not None and not config.aux_weight:
            # DDP waits for the gradient of every parameter that may have one.
            aux_head.requires_grad_(False)

    # Optimisation.

    def on_fit_start(self) -> None:
        # The trainer's SyncBatchNorm layers are new ones.
        self._freeze()

    def _groups(self) -> list[dict[str, Any]]:
        config = self.config
        return parameter_groups(
            self.model,
            config.lr,
            weight_decay=config.weight_decay,
            backbone_lr_factor=config.backbone_lr_factor,
            aux_lr_factor=config.aux_lr_factor,
            decay_norm_and_bias=config.decay_norm_and_bias,
        )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        config = self.config
        groups = self._groups()
        optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov
            )
        else:
            optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999))
        steps = self.total_steps or int(self.trainer.estimated_stepping_batches)
        warmup = config.warmup_steps
        if config.warmup_epochs:
            epochs = config.epochs or self.trainer.max_epochs or 1
            warmup = round(config.warmup_epochs * steps / epochs)
        schedule = poly_lr(
            optimizer,
            steps,
            config.power,
            warmup_steps=min(warmup, steps - 1),
            warmup_factor=config.warmup_factor,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    @property
    def learning_rate(self) -> float:
        """The present rate of the classifier."""
        groups = self.trainer.optimizers[0].param_groups
        named = {str(group.get("name", "")).split("/")[0]: group["lr"] for group in groups}
        return float(named.get("classifier", groups[0]["lr"]))

    def inputs(self, images: Tensor) -> Tensor:
        """Images of a batch as the model takes them."""
        if images.dtype == torch.uint8:
            preprocess = preprocess_of(self.model)
            # The size of the crop is the network's: model.preprocess.size is for photos.
            size = (images.shape[-2], images.shape[-1])
            images = preprocess.batch(images, size=size, device=self.device)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images

    def losses(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """ "loss" of normalised images, and its parts "main" and "aux" with an auxiliary head.

        Images whose pixels are all ignored, a whole batch of them, have the loss 0.
        """
        # A mean over no pixels is nan; a crop of a large unlabelled area is no reason to stop.
        labelled = (labels != self.ignore_index).any()
        aux_head = getattr(self.model, "aux_classifier", None)
        if aux_head is None or not self.config.aux_weight:
            return {"loss": self._mean(self.model.forward_logits(x), labels, labelled)}
        logits = self.model.all_logits(x)
        main = self._mean(logits["out"], labels, labelled)
        aux = self._mean(logits["aux"], labels, labelled)
        return {"loss": main + self.config.aux_weight * aux, "main": main, "aux": aux}

    def _mean(self, logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
        loss = self.loss(logits, labels)
        return torch.where(labelled, loss, torch.zeros_like(loss))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        before = checkpoint.get("train_config")
        # The state of the optimizer and the schedule has the rates of the run that wrote it.
        self._rates_restored = isinstance(before, Mapping) and any(
            before.get(name, getattr(TrainConfig(), name)) != getattr(self.config, name)
            for name in _OF_THE_OPTIMIZER
        )

    def _apply_rates(self) -> None:
        """The config's rates, decay and momentum in place of those that a checkpoint has."""
        [optimizer], [schedule] = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        fresh = {group["name"]: group for group in self._groups()}
        bases = []
        for group in optimizer.param_groups:
            own = fresh[group["name"]]
            group["initial_lr"], group["weight_decay"] = own["lr"], own["weight_decay"]
            if "momentum" in group:
                group["momentum"], group["nesterov"] = self.config.momentum, self.config.nesterov
            else:
                group["betas"] = (self.config.momentum, group["betas"][1])
            bases.append(own["lr"])
        poly = cast(LambdaLR, schedule.scheduler)
        poly.base_lrs = bases
        for group, base, factor in zip(optimizer.param_groups, bases, poly.lr_lambdas, strict=True):
            group["lr"] = base * factor(poly.last_epoch)

    def on_train_start(self) -> None:
        if self._rates_restored:
            self._apply_rates()
        self._window.clear()
        self._captured = None
        if self.config.cuda_graph:
            strategy = self.trainer.strategy
            if not isinstance(strategy, SingleDeviceStrategy):
                raise ValueError(
                    f"cuda_graph: the training is by {type(strategy).__name__}, expected one "
                    "process and one GPU; train with cuda_graph=false, or with "
                    "--trainer.devices 1"
                )
            self._captured = CapturedStep(self.model, self.losses, self.device, self._tell)

    def on_train_epoch_start(self) -> None:
        if self._captured is not None:
            self._captured.renew()

    def on_train_end(self) -> None:
        self.drop_graphs()

    def drop_graphs(self) -> None:
        """Frees what a captured step holds, also where training was cut off."""
        self._captured = None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        words = [self.config.seed & 0xFFFFFFFFFFFFFFFF, self.current_epoch, batch_idx]
        words += [self.global_rank, _STREAM]
        state = np.random.SeedSequence(words).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels, indices = batch
        with self._memory_explained(batch[2]):
            run = self.losses if self._captured is None else self._captured.losses
            losses = run(self.inputs(images), labels)
        self._window.append(({k: v.detach() for k, v in losses.items()}, indices))
        count = images.shape[0]
        for name, value in losses.items():
            self.log(f"train/{name}", value.detach(), batch_size=count, prog_bar=name == "loss")
        self.log("lr", self.learning_rate, batch_size=count)
        return losses["loss"]

    def backward(self, loss: Tensor, *args: object, **kwargs: object) -> None:
        with self._memory_explained(self._window[-1][1]):
            if self._captured is None:
                super().backward(loss, *args, **kwargs)
            else:
                self._captured.backward(loss)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        window, self._window = self._window, []
        self.last_step = {
            f"train/{name}": torch.stack([losses[name] for losses, _ in window]).mean()
            for name in window[0][0]
        }
        self.last_step["lr"] = self.learning_rate
        totals = torch.stack([losses["loss"] for losses, _ in window])
        # Here the host waits for the device: the backward pass is queued by now.
        finite = torch.isfinite(totals)
        checks = [finite.all()]
        # The gradient scaler of fp16 meets infinite gradients on its own.
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            grads = [p.grad for p in parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            checks.append(torch.isfinite(norm))
        if bool(torch.stack([check.to(totals.device) for check in checks]).all()):
            return
        raise NonFiniteLoss(self._non_finite(window, finite.tolist()))

    # Validation.

    def on_validation_epoch_start(self) -> None:
        self._confusion = torch.zeros(
            (len(self.classes),) * 2, dtype=torch.int64, device=self.device
        )
        self._scored, self._scores = [], []
        self.end_validation()
        loader = self.trainer.val_dataloaders
        assert loader is not None
        self._restore = ExitStack()
        self._counter = self._restore.enter_context(self.scoring(loader.dataset.dataset))
        weights = self.loss.class_weights
        loss = self._loss(
            self._counter.dataset.ignore_index, None if weights is None else weights.tolist()
        ).to(self.device)
        self._val_loss = lambda logits, labels: loss(logits, labels)

    @contextmanager
    def scoring(self, dataset: LabelledData) -> Iterator[ImageCounter]:
        """Counts and labels of a data set's photos as the validation has them.

        They are the model's at ``config.eval_output_stride``, as in eval mode.
        """
        stride = self.config.eval_output_stride
        # Photos of many sizes: each would be tuned for anew.
        with at_output_stride(self.model, stride) as model, _no_cudnn_benchmark():
            preprocess = getattr(model, "preprocess", None)
            options = PredictOptions.checked()
            runner = Runner.prepare(model, None, preprocess, options, self.device, None)
            yield ImageCounter(runner, dataset, self.classes, self.taken_back())

    def validation_step(self, batch: list[IndexedItem], batch_idx: int) -> None:
        assert self._counter is not None and self._confusion is not None
        for group in equal_sizes(batch):
            losses: list[Tensor] = []
            matrices, spoiled = self._counter.matrices(group, partial(self._add_losses, losses))
            self._confusion += matrices.sum(0)
            self._scored += [(index, self._counter.name(index)) for index, _ in group]
            # Counts below 2^53 are exact in fp64.
            parts = [image_scores(matrices), spoiled[:, None].double()]
            parts.append(torch.stack(losses)[:, None].double())
            self._scores.append(torch.cat(parts, dim=1))

    def _add_losses(self, losses: list[Tensor], logits: Tensor, labels: Tensor) -> None:
        """That of each image; nan where no pixel is labelled."""
        assert self._val_loss is not None
        for i in range(len(labels)):
            losses.append(self._val_loss(logits[i : i + 1], labels[i : i + 1]))

    def on_validation_epoch_end(self) -> None:
        assert self._confusion is not None
        total = self._confusion
        # One copy from the device for all images.
        values = torch.cat(self._scores).tolist() if self._scores else []
        shares: list[Any] = [[(*s, *v) for s, v in zip(self._scored, values, strict=True)]]
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
            mine, shares = shares[0], [None] * dist.get_world_size()
            dist.all_gather_object(shares, mine)
        self.end_validation()
        self.confusion, self._confusion, self._counter = total.cpu(), None, None
        self._scored, self._scores, self._val_loss = [], [], None
        rows = sorted(row for share in shares for row in share)
        self.images = tuple(
            ImageScore(index, name, miou, accuracy, int(pixels), int(spoiled))
            for index, name, miou, accuracy, pixels, spoiled, _ in rows
        )
        found = Counter[str]()
        for image in self.images:
            if image.not_finite:
                found[image.name] += image.not_finite
        self.not_finite = dict(found)
        self.metrics = Metrics.from_confusion(
            self.confusion, self.classes.classes, not_finite=sum(found.values())
        )
        self.validated_step = self.trainer.global_step
        losses = [row[-1] for row in rows if row[4]]
        scores = {"loss": math.fsum(losses) / len(losses) if losses else math.nan}
        for name in ("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou"):
            scores[name] = math.nan if found else float(getattr(self.metrics, name))
        for name, value in zip(_unique(self.classes.classes), self.metrics.iou, strict=True):
            scores[f"iou/{name}"] = math.nan if found else value
        for name, value in scores.items():
            # Equal on all processes: the counts are summed, the losses gathered.
            self.log(f"val/{name}", value, prog_bar=name == "miou", rank_zero_only=False)
        self.log("val/not_finite_pixels", float(self.metrics.not_finite), rank_zero_only=False)

    def end_validation(self) -> None:
        """Gives the model back its output stride, also where validation was cut off."""
        self._restore.close()

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["deeplab_fast"] = model_metadata(self.model)
        checkpoint["train_config"] = self.config.as_dict()

    # Messages.

    @contextmanager
    def _memory_explained(self, indices: Tensor) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or not self.explains_memory:
                raise
            config = self.config
            height, width = config.crop_size
            where = f"epoch {self.current_epoch}, step {self.global_step}"
            raise MemoryError(
                f"not enough memory at {where} for {len(indices)} images a pass (crop "
                f"{width}x{height}, output stride {self.model.output_stride}): "
                f"{self._names(indices)}. Raise accumulate (now {config.accumulate}; the result "
                f"stays the same but for batch norm), or lower batch_size (now "
                f"{config.batch_size}) or crop, train at output stride 16, or use "
                "--trainer.precision bf16-mixed"
            ) from error

    def _non_finite(
        self, window: Sequence[tuple[dict[str, Tensor], Tensor]], finite: Sequence[bool]
    ) -> str:
        bad = [i for i, good in enumerate(finite) if not good]
        kind = "loss" if bad else "gradient"
        shown = [window[i] for i in bad] or list(window)
        parts = "; ".join(
            ", ".join(f"{name} {float(value):.6g}" for name, value in losses.items())
            + f" of {self._names(indices)}"
            for losses, indices in shown
        )
        rates = ", ".join(
            f"{group.get('name', i)} {group['lr']:.3g}"
            for i, group in enumerate(self.trainer.optimizers[0].param_groups)
        )
        return (
            f"the {kind} is not finite at epoch {self.current_epoch}, step {self.global_step}: "
            f"{parts}; learning rates: {rates}. The weights were not changed by it and the last "
            "checkpoint is from before. Look at these images (deeplab-fast check-data), lower lr, "
            "set clip_norm, or add warmup_steps"
        )

    def sources(self, indices: Tensor) -> list[str]:
        """Where the training samples of these indices come from."""
        name = self._name or (lambda index: f"sample {index}")
        return [name(index) for index in indices.tolist()]

    def _names(self, indices: Tensor) -> str:
        return ", ".join(self.sources(indices))


def _unique(names: Sequence[str]) -> list[str]:
    """The names, with the number of the class after one that stood before."""
    return [f"{name} {i}" if name in names[:i] else name for i, name in enumerate(names)]


def _freeze_part(model: nn.Module, part: str) -> None:
    """Keeps a part of a model as it is: no gradients, batch norm statistics unchanged."""
    try:
        module = model.get_submodule(part)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if 0 < name.count(".") + 1 <= 2]
        raise ValueError(
            f"freeze: the model has no part {part!r}; there are, for example: {', '.join(names)}"
        ) from None
    module.requires_grad_(False)
    freeze_batch_norm(module)


@contextmanager
def _no_cudnn_benchmark() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
