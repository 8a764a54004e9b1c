"""Averaged weights of a training run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

if TYPE_CHECKING:
    from deeplab_fast.engine.module import SegmentationModule

__all__ = ["ExponentialAverage"]

_PREFIX = "module."


class ExponentialAverage(Callback):
    """Exponential moving average of all parameters and batch norm statistics.

        a <- a + (1 - d) (w - a),  d = min(decay, (1 + n) / (10 + n))

    after step n of the optimizer; the smaller d of the first steps forgets the initial weights, as
    TensorFlow's ExponentialMovingAverage with num_updates does. Running statistics of batch norms
    are averaged like parameters, so that they belong to the averaged weights; counters are copied.
    Validation runs on the average, checkpoints hold it as the model's state, and it is the model's
    after training. Checkpoints are those of Lightning's ``WeightAveraging``, whose swap of weights
    goes through ``.data``: that leaves the version counters as they are, by which a model notices
    that weights prepared for inference are stale.

    Args:
        decay: in (0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self._average: AveragedModel | None = None
        # Steps of the optimizer that the average has seen.
        self._steps = 0

    @property
    def averaged(self) -> SegmentationModule | None:
        """The module with the averaged weights."""
        average = self._average
        return None if average is None else cast("SegmentationModule", average.module)

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = state_dict["latest_update_step"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._steps = 0
            # The module is still on the CPU.
            device = trainer.strategy.root_device
            self._average = AveragedModel(
                pl_module, device=device, multi_avg_fn=self._update, use_buffers=True
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        if self._average is not None and trainer.global_step > self._steps:
            self._average.update_parameters(pl_module)
            self._steps = trainer.global_step

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for average, current in self._pairs(pl_module):
            current.copy_(average)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average is None:
            return
        state = self._average.state_dict()
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            name.removeprefix(_PREFIX): value
            for name, value in state.items()
            if name.startswith(_PREFIX)
        }
        checkpoint["averaging_state"] = {
            name: value for name, value in state.items() if not name.startswith(_PREFIX)
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average is None:
            return
        if "current_model_state" not in checkpoint or "averaging_state" not in checkpoint:
            rank_zero_warn(
                "the checkpoint is of a run without averaged weights: they begin with its weights"
            )
            self._average.module.load_state_dict(checkpoint["state_dict"], strict=False)
            return
        state = {_PREFIX + name: value for name, value in checkpoint["state_dict"].items()}
        self._average.load_state_dict({**state, **checkpoint["averaging_state"]})
        pl_module.load_state_dict(checkpoint["current_model_state"])

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule) -> None:
        for average, current in self._pairs(pl_module):
            before = average.clone()
            average.copy_(current)
            current.copy_(before)

    def _pairs(self, pl_module: LightningModule) -> Iterator[tuple[Tensor, Tensor]]:
        if self._average is None:
            return iter(())
        mine, theirs = (
            itertools.chain(module.parameters(), module.buffers())
            for module in (self._average.module, pl_module)
        )
        return zip(mine, theirs, strict=True)

    @torch.no_grad()
    def _update(
        self,
        averaged: tuple[Tensor, ...] | list[Tensor],
        current: tuple[Tensor, ...] | list[Tensor],
        count: Tensor | int,
    ) -> None:
        if not torch.is_floating_point(averaged[0]):
            torch._foreach_copy_(averaged, current)
            return
        # Of the optimizer's steps, which the host knows: count lies on the device.
        n = self._steps
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(averaged, current, 1 - decay)
