"""Batch norms as the training forms run them: statistics of a batch, over processes, running."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import reference


class Norm:
    """A batch norm at the input of the next segment: the statistics of x, and its running update.

    Attributes:
        mean, rstd: [C], of this batch or the running ones.
        weight, bias: [C], ones and zeros without affine parameters.
        batch: whether mean and rstd are this batch's, so that gradients flow through them.
        count: values for each channel, over all processes of `group`.
        group: of processes that share their statistics, or None.
    """

    def __init__(self, module: _BatchNorm, act: str | None, x: Tensor) -> None:
        self.act = act
        self.weight, self.bias = affine(module, x)
        self.batch = uses_batch(module)
        self.group = group_of(module)
        self.count = x.numel() // x.shape[1]
        if self.batch:
            check_count(module, x)
            mean, variance = torch.ops.deeplab_fast.batch_stats(x.detach())
            mean, variance, self.count = over_processes(mean, variance, self.count, self.group)
            update_running(module, mean, variance, self.count)
        else:
            mean, variance = running(module, x)
        self.mean, self.rstd = mean, torch.rsqrt(variance + module.eps)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mean, self.rstd, self.weight, self.bias

    @property
    def options(self) -> NormOptions:
        return NormOptions(self.act, self.batch, self.count, self.group)


@dataclass(frozen=True)
class NormOptions:
    """Attributes of a `Norm`, beside its tensors."""

    act: str | None
    batch: bool
    count: int
    group: dist.ProcessGroup | None


def affine(module: _BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """weight and bias of a batch norm, in place of missing ones 1 and 0."""
    dtype = reference.compute_dtype(x.dtype)
    weight, bias = module.weight, module.bias
    if weight is None:
        weight = torch.ones(x.shape[1], dtype=dtype, device=x.device)
    if bias is None:
        bias = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
    return weight, bias


def uses_batch(module: _BatchNorm) -> bool:
    """Whether a batch norm normalises by the statistics of the batch."""
    return module.training or (module.running_mean is None and module.running_var is None)


def running(module: _BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Running mean and variance, in the dtype that x is computed in."""
    dtype = reference.compute_dtype(x.dtype)
    assert module.running_mean is not None and module.running_var is not None
    return module.running_mean.to(dtype), module.running_var.to(dtype)


def check_count(module: _BatchNorm, x: Tensor) -> None:
    """torch's error where one value is all that a channel has."""
    if x.numel() == x.shape[1] and group_of(module) is None:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}"
        )


@torch.no_grad()
def update_running(module: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    """Running statistics as nn.BatchNorm2d keeps them: the variance unbiased, momentum None for a
    cumulative average."""
    if not module.training or not module.track_running_stats or module.running_mean is None:
        return
    momentum = module.momentum
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(module.num_batches_tracked)
    if momentum is None:
        momentum = 0.0
    assert module.running_var is not None
    unbiased = variance * (count / max(count - 1, 1))
    for kept, now in ((module.running_mean, mean), (module.running_var, unbiased)):
        kept.mul_(1 - momentum).add_(now.to(kept.dtype), alpha=momentum)


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


class JointNorm(Norm):
    """The batch norms of all branches on their one buffer, with ReLU."""

    def __init__(
        self, norms: Sequence[_BatchNorm], x: Tensor, mean: Tensor | None, variance: Tensor | None
    ) -> None:
        self.act = "relu"
        self.batch = uses_batch(norms[0])
        self.group = group_of(norms[0])
        self.count = x.numel() // x.shape[1]
        sizes = [norm.num_features for norm in norms]
        pairs = [affine(norm, part) for norm, part in zip(norms, x.split(sizes, 1), strict=True)]
        self.weight, self.bias = (torch.cat(list(v)) for v in zip(*pairs, strict=True))
        if self.batch:
            assert mean is not None and variance is not None
            check_count(norms[0], x)
            mean, variance, self.count = over_processes(mean, variance, self.count, self.group)
            for norm, m, v in zip(norms, mean.split(sizes), variance.split(sizes), strict=True):
                update_running(norm, m, v, self.count)
        else:
            mean, variance = (
                torch.cat(list(v)) for v in zip(*(running(n, x) for n in norms), strict=True)
            )
        eps = [
            torch.full_like(part, n.eps)
            for n, part in zip(norms, variance.split(sizes), strict=True)
        ]
        self.mean, self.rstd = mean, torch.rsqrt(variance + torch.cat(eps))
