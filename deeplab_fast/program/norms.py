"""Batch norms as the training forms run them: statistics of a batch, over processes, running."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import reference
from ..ops.batch_norm import check_count


@dataclass(frozen=True)
class Statistics:
    """Of a map, taken with it: mean and rstd [C], of `count` values for each channel."""

    mean: Tensor
    rstd: Tensor
    count: int


class Norm:
    """A batch norm at the input of the next segment: the statistics of x, and its running update.

    Attributes:
        mean, rstd: [C], of this batch or the running ones.
        weight, bias: [C], ones and zeros without affine parameters.
        count: values for each channel, over all processes of `group`; 0 where mean and rstd are not
            this batch's, so that no gradients flow through them.
        group: of processes that share their statistics, or None.
    """

    def __init__(
        self, module: _BatchNorm, act: str | None, x: Tensor, statistics: Statistics | None
    ) -> None:
        self.act = act
        self.weight, self.bias = affine(module, x)
        self.group = group_of(module)
        self.count = 0
        if not uses_batch(module):
            self.mean, self.rstd = constants_of(module, x)
            return
        found = statistics or _statistics(module, x)
        self.mean, self.rstd, self.count = found.mean, found.rstd, found.count

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mean, self.rstd, self.weight, self.bias

    @property
    def options(self) -> NormOptions:
        return NormOptions(self.act, self.count, self.group)


@dataclass(frozen=True)
class NormOptions:
    """Attributes of a `Norm`, beside its tensors."""

    act: str | None = None
    count: int = 0
    group: dist.ProcessGroup | None = None


def _statistics(module: _BatchNorm, x: Tensor) -> Statistics:
    """Of a map that is there already, with the running update."""
    x = x.detach()
    joint = JointStatistics.of(module)
    if joint is None:
        check_count(x)
        mean, _, rstd = torch.ops.deeplab_fast.batch_stats(x, *options_of(module))
        return Statistics(mean, rstd, x.numel() // x.shape[1])
    mean, variance, _ = torch.ops.deeplab_fast.batch_stats(x, module.eps, None, None, None, None)
    mean, variance = joint.join(mean, variance, x.numel() // x.shape[1])
    return Statistics(mean, torch.rsqrt(variance + module.eps), joint.count)


def options_of(
    module: _BatchNorm | None,
) -> tuple[float, Tensor | None, Tensor | None, Tensor | None, float | None]:
    """What `batch_stats` takes beside a map: eps, running mean and variance, the number of batches,
    the momentum; without running statistics where a norm does not update them."""
    if module is None or not _tracks(module):
        return 0.0 if module is None else module.eps, None, None, None, None
    tracked = module.num_batches_tracked
    return module.eps, module.running_mean, module.running_var, tracked, module.momentum


def _tracks(module: _BatchNorm) -> bool:
    return module.training and module.track_running_stats and module.running_mean is not None


def affine(module: _BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """weight and bias of a batch norm, in place of missing ones 1 and 0, on the device of x and in
    the dtype that it is computed in."""
    dtype = reference.compute_dtype(x.dtype)
    weight, bias = module.weight, module.bias
    if weight is None:
        weight = torch.ones(module.num_features, dtype=dtype, device=x.device)
    if bias is None:
        bias = torch.zeros(module.num_features, dtype=dtype, device=x.device)
    return weight, bias


def uses_batch(module: _BatchNorm) -> bool:
    """Whether a batch norm normalises by the statistics of the batch."""
    return module.training or (module.running_mean is None and module.running_var is None)


def constants_of(module: _BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Running mean and 1 / sqrt(running variance + eps), in the dtype that x is computed in."""
    dtype = reference.compute_dtype(x.dtype)
    assert module.running_mean is not None and module.running_var is not None
    return module.running_mean.to(dtype), torch.rsqrt(module.running_var.to(dtype) + module.eps)


def update_running(module: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    """`reference.update_running` of a norm that keeps running statistics."""
    _, running_mean, running_var, tracked, momentum = options_of(module)
    if running_mean is not None and running_var is not None:
        reference.update_running(
            running_mean, running_var, tracked, momentum, mean, variance, count
        )


def group_of(module: _BatchNorm) -> dist.ProcessGroup | None:
    """Of processes that share the statistics of a batch norm, or None."""
    if not isinstance(module, nn.SyncBatchNorm) or not uses_batch(module):
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = module.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def over_processes(
    mean: Tensor, variance: Tensor, count: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, int]:
    """Statistics over all processes, combined in the order of their ranks."""
    if group is None:
        return mean, variance, count
    own = torch.cat([mean.double(), variance.double() * count, mean.new_tensor([count]).double()])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    all_means, all_m2, counts = torch.stack(parts).split([mean.numel(), mean.numel(), 1], 1)
    total = counts.sum()
    joint = (all_means * counts).sum(0) / total
    m2 = (all_m2 + counts * (all_means - joint).square()).sum(0)
    return joint.to(mean.dtype), (m2 / total).to(mean.dtype), int(total)


@dataclass
class JointStatistics:
    """The statistics of a norm over the processes that share them, and its running update.

    Attributes:
        module: the norm.
        group: the processes.
        count: values for each channel over all of them, once they are joined.
    """

    module: _BatchNorm
    group: dist.ProcessGroup
    count: int = 0

    @classmethod
    def of(cls, module: _BatchNorm) -> JointStatistics | None:
        """None for a norm that shares them with no other process."""
        group = group_of(module)
        return None if group is None else cls(module, group)

    def join(self, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Mean and variance over all processes from those of this one's `count` values."""
        mean, variance, self.count = over_processes(mean, variance, count, self.group)
        update_running(self.module, mean, variance, self.count)
        return mean, variance


def sum_over(
    group: dist.ProcessGroup | None,
) -> Callable[[Sequence[Tensor]], Sequence[Tensor]] | None:
    """What adds vectors over processes; None for one process."""
    if group is None:
        return None

    def add(sums: Sequence[Tensor]) -> Sequence[Tensor]:
        joint = torch.cat(list(sums))
        dist.all_reduce(joint, group=group)
        return joint.chunk(len(sums))

    return add


class JointNorm(Norm):
    """The batch norms of all branches on their one buffer, with ReLU."""

    def __init__(
        self, norms: Sequence[_BatchNorm], x: Tensor, mean: Tensor | None, variance: Tensor | None
    ) -> None:
        self.act = "relu"
        self.group = group_of(norms[0])
        self.count = 0
        sizes = [norm.num_features for norm in norms]
        pairs = [affine(norm, x) for norm in norms]
        self.weight, self.bias = (torch.cat(list(v)) for v in zip(*pairs, strict=True))
        if uses_batch(norms[0]):
            assert mean is not None and variance is not None
            if self.group is None:
                check_count(x)
            count = x.numel() // x.shape[1]
            mean, variance, self.count = over_processes(mean, variance, count, self.group)
            for norm, m, v in zip(norms, mean.split(sizes), variance.split(sizes), strict=True):
                update_running(norm, m, v, self.count)
            eps = [
                torch.full_like(part, n.eps)
                for n, part in zip(norms, variance.split(sizes), strict=True)
            ]
            self.mean, self.rstd = mean, torch.rsqrt(variance + torch.cat(eps))
        else:
            constants = [constants_of(n, x) for n in norms]
            self.mean, self.rstd = (torch.cat(list(v)) for v in zip(*constants, strict=True))
