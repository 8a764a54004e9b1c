"""Training forms of convolution + batch norm + activation: fewer passes, half the activations.

`run(module, x)` computes what `module(x)` does, with gradients. It walks the modules, which stay as
they are, and runs sequences of convolutions, batch norms and activations as segments:

    [act(norm(.)) ->] [convolution] [-> act(norm(.) + residual)] [-> max pooling]

A segment keeps its input and its statistics for the backward pass, not what lies between. The norm
and the activation between two convolutions belong to the second one, whose input is then the raw
result of the first: the normalised and the activated copies exist only while they are used, and are
made again from the raw one in the backward pass. A last 1x1 convolution with a residual is computed
again too, from what is made again anyway, so that of a residual block only the raw results of the
other convolutions and the block's output are kept.

Modules that no rule knows run as they are, and so does every module with hooks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import backends, reference
from ..nn.aspp import ASPP, ASPPPooling
from ..ops._common import autocast, differentiable
from ..ops.aspp_convs import aspp_convs
from .fast_path import has_global_hooks, transforms
from .intact import activation, functional_is_intact, is_intact

_NORM_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
# By the forward that a rule stands for: a subclass that keeps it keeps the rule.
_RULES: dict[Callable[..., Any], Callable[[Any, Any], Any]] = {}
# (kernel, stride, padding, dilation, ceil_mode) of torch.ops.aten.max_pool2d_with_indices.
Pool = tuple[list[int], list[int], list[int], list[int], bool]


def fuse(model: Any, fused: bool = True) -> Any:
    """Train a model by the fused forms, or no longer: sets `model.fused`.

    Modules, parameters and state_dict keys stay as they are, also in the middle of a training.

    Args:
        model: a `DeepLabV3` of this package, changed in place.
        fused: False for the plain modules.

    Returns:
        The model itself.

    Raises:
        TypeError: another model.
    """
    if not hasattr(model, "fused"):
        raise TypeError(
            f"fuse takes a model that a builder of deeplab_fast made, got {type(model).__name__}; "
            "make one with deeplab_fast.from_checkpoint(model.state_dict()) or by its builder"
        )
    model.fused = fused
    return model


def rule(
    *types: type[nn.Module],
) -> Callable[[Callable[[Any, Any], Any]], Callable[[Any, Any], Any]]:
    """Register how modules of these types run."""

    def register(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        _RULES.update({t.forward: function for t in types})
        return function

    return register


def run(module: nn.Module, x: Any) -> Any:
    """module(x), by segments where they are known."""
    if not is_plain(module):
        return module(x)
    function = _RULES.get(type(module).forward)
    if function is not None:
        return function(module, x)
    if is_sequence(module) or is_convolution(module) or is_norm(module):
        return sequence([module], x)
    return module(x)


def sequence(
    modules: Sequence[nn.Module],
    x: Tensor,
    residual: Tensor | None = None,
    act: str | None = None,
) -> Tensor:
    """act(modules(x) + residual), the sum in the epilogue of the last batch norm.

    Without a residual act must be None: the sequence has its activations.
    """
    flat = [m for module in modules for m in _flat(module)]
    # x is the raw result of a convolution where a norm is pending.
    pending: _Norm | None = None
    i = 0
    while i < len(flat):
        module = flat[i]
        i += 1
        if not is_convolution(module) and not is_norm(module):
            x = run(module, x)
            continue
        conv: Any = module if is_convolution(module) else None
        norm_module: Any = None if conv is not None else module
        if conv is not None and conv.bias is None and i < len(flat) and is_norm(flat[i]):
            norm_module = flat[i]
            i += 1
        if norm_module is None:
            x = _convolve(x, pending, conv)
            pending = None
            continue
        norm_act = None
        if i < len(flat) and is_plain(flat[i]):
            norm_act = activation(flat[i])
            i += norm_act is not None
        pool = None
        if i < len(flat) and _is_pool(flat[i]):
            pool = _pool(flat[i])
            i += 1
        following = i < len(flat) and is_convolution(flat[i])
        if following and pool is None:
            if conv is not None:
                x = _convolve(x, pending, conv)
            pending = _Norm(norm_module, norm_act, x)
            continue
        last = i == len(flat) and residual is not None and norm_act is None and pool is None
        x = _finish(
            x,
            pending,
            conv,
            norm_module,
            act if last else norm_act,
            residual if last else None,
            pool,
        )
        pending = None
        if last:
            return x
    assert pending is None
    if residual is not None:
        x = x + residual
        if act is not None:
            x = reference.ACTIVATIONS[act](x)
    return x


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs what its class was shipped with, and nothing else."""
    return is_intact(module) and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_sequence(module: nn.Module) -> bool:
    """Whether calling the module runs its members one after another."""
    # A scripted module's class has no forward to look at.
    return is_plain(module) and type(module).forward is nn.Sequential.forward


def is_convolution(module: nn.Module) -> bool:
    """A convolution that segments can run."""
    return (
        is_plain(module)
        and type(module).forward is nn.Conv2d.forward
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and _is_ordinary(module.weight)
    )


def _is_ordinary(weight: Any) -> bool:
    """No tensor of a class that may compute something of its own; PyTorch's fakes do not."""
    cls = type(weight)
    return cls in (Tensor, nn.Parameter) or cls.__module__.startswith("torch._subclasses.")


def pair(value: int | Sequence[int]) -> list[int]:
    """(rows, columns) of an attribute of a convolution, which people set to an int too."""
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def is_norm(module: nn.Module) -> bool:
    """A batch norm, synchronised or not, frozen or not, of those that segments can run."""
    return (
        isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))
        and is_plain(module)
        and type(module).forward in _NORM_FORWARDS
    )


def _is_pool(module: nn.Module) -> bool:
    return (
        type(module) is nn.MaxPool2d
        and is_plain(module)
        and not getattr(module, "return_indices", False)
    )


def _pool(module: Any) -> Pool:
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return (*[pair(value) for value in sizes], module.ceil_mode)


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    if is_sequence(module):
        # Not children(), which leaves out a module that stands there twice.
        for child in cast(nn.Sequential, module):
            yield from _flat(child)
    elif type(module) is not nn.Identity or not is_plain(module):
        yield module


class _Norm:
    """A batch norm at the input of the next segment: the statistics of x, and its running update.

    Attributes:
        mean, rstd: [C], of this batch or the running ones.
        weight, bias: [C], ones and zeros without affine parameters.
        batch: whether mean and rstd are this batch's, so that gradients flow through them.
        count: values for each channel, over all processes of `group`.
        group: of processes that share their statistics, or None.
    """

    def __init__(
        self,
        module: Any,
        act: str | None,
        x: Tensor,
        stats: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.act = act
        self.weight, self.bias = affine(module, x)
        self.batch = uses_batch(module)
        self.group = _group(module)
        self.count: Any = x.numel() // x.shape[1]
        if self.batch:
            check_count(module, x)
            mean, variance = stats or torch.ops.deeplab_fast.batch_stats(x.detach())
            mean, variance, self.count = _joint(mean, variance, self.count, self.group)
            update_running(module, mean, variance, self.count)
        else:
            mean, variance = running(module, x)
        self.mean, self.rstd = mean, torch.rsqrt(variance + module.eps)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mean, self.rstd, self.weight, self.bias

    @property
    def options(self) -> _NormOptions:
        return _NormOptions(self.act, self.batch, self.count, self.group)


@dataclass(frozen=True)
class _NormOptions:
    act: str | None
    batch: bool
    count: Any
    group: Any


def affine(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """weight and bias of a batch norm, in place of missing ones 1 and 0."""
    dtype = reference.compute_dtype(x.dtype)
    weight, bias = module.weight, module.bias
    if weight is None:
        weight = torch.ones(x.shape[1], dtype=dtype, device=x.device)
    if bias is None:
        bias = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
    return weight, bias


def uses_batch(module: Any) -> bool:
    """Whether a batch norm normalises by the statistics of the batch."""
    return module.training or (module.running_mean is None and module.running_var is None)


def running(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Running mean and variance, in the dtype that x is computed in."""
    dtype = reference.compute_dtype(x.dtype)
    return module.running_mean.to(dtype), module.running_var.to(dtype)


def check_count(module: Any, x: Tensor) -> None:
    """torch's error where one value is all that a channel has."""
    if x.numel() == x.shape[1] and _group(module) is None:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}"
        )


@torch.no_grad()
def update_running(module: Any, mean: Tensor, variance: Tensor, count: Any) -> None:
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
    unbiased = variance * (count / max(count - 1, 1))
    for kept, now in ((module.running_mean, mean), (module.running_var, unbiased)):
        kept.mul_(1 - momentum).add_(now.to(kept.dtype), alpha=momentum)


def _group(module: Any) -> Any:
    if not isinstance(module, nn.SyncBatchNorm) or not uses_batch(module):
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = module.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _joint(mean: Tensor, variance: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor, Any]:
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


def _geometry(conv: Any) -> tuple[list[int], list[int], list[int], int]:
    return pair(conv.stride), pair(conv.padding), pair(conv.dilation), conv.groups


def _convolve(x: Tensor, pending: _Norm | None, conv: Any) -> Tensor:
    """conv(act(norm(x))), or conv(x) where no norm is pending."""
    x, weight = autocast(x, conv.weight)
    tensors = (None,) * 4 if pending is None else pending.tensors
    plan = _Plan(before=None if pending is None else pending.options, conv=_geometry(conv))
    y = _Segment.apply(plan, x, *tensors, weight, *(None,) * 5)[0]
    if conv.bias is not None:
        y = y + conv.bias.to(y.dtype)[:, None, None]
    return y


def _finish(
    x: Tensor,
    pending: _Norm | None,
    conv: Any,
    norm: Any,
    act: str | None,
    residual: Tensor | None,
    pool: Pool | None,
) -> Tensor:
    """act(norm(conv(act(pending(x)))) + residual), max-pooled; conv may be None."""
    weight = None
    if conv is not None:
        x, weight = autocast(x, conv.weight)
    if residual is not None:
        residual = residual.to(x.dtype)
    tensors = (None,) * 4 if pending is None else pending.tensors
    # The input of a 1x1 convolution behind a norm is made again in any case.
    again = conv is not None and pending is not None and tuple(conv.kernel_size) == (1, 1)
    batch = uses_batch(norm)
    weight_after, bias_after = affine(norm, x if weight is None else weight.transpose(0, 1))
    constants = (None, None) if batch else running(norm, x)
    plan = _Plan(
        before=None if pending is None else pending.options,
        conv=None if conv is None else _geometry(conv),
        after=_NormOptions(act, batch, None, _group(norm)),
        eps=norm.eps,
        again=again,
        pool=pool,
        check=norm,
    )
    y, mean, variance, count = _Segment.apply(
        plan, x, *tensors, weight, weight_after, bias_after, *constants, residual
    )
    if batch:
        update_running(norm, mean, variance, count)
    return y


@dataclass(frozen=True)
class _Plan:
    """What a segment runs.

    Attributes:
        before: of the norm at the input, or None.
        conv: (stride, padding, dilation, groups), or None.
        after: of the norm behind, or None; its count is known once its input is.
        eps: of that norm.
        again: compute the convolution again in the backward pass.
        pool: of the max pooling at the end, or None.
        check: the norm behind, whose input must have more than one value for each channel.
    """

    before: _NormOptions | None = None
    conv: tuple[list[int], list[int], list[int], int] | None = None
    after: _NormOptions | None = None
    eps: float = 0.0
    again: bool = False
    pool: Pool | None = None
    check: Any = None


class _Segment(torch.autograd.Function):
    """One segment; see the module's docstring for what is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        x: Tensor,
        mean: Tensor | None,
        rstd: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        filters: Tensor | None,
        weight_after: Tensor | None,
        bias_after: Tensor | None,
        mean_after: Tensor | None,
        variance_after: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Any]:
        ops = torch.ops.deeplab_fast
        z = x
        if plan.before is not None:
            z = ops.bn_act(x, mean, rstd, weight, bias, None, plan.before.act)
        if plan.conv is not None:
            z = ops.conv2d(z, filters, *plan.conv)
        ctx.plan = plan
        if plan.after is None:
            ctx.save_for_backward(x, mean, rstd, weight, bias, filters)
            return z, None, None, None
        count: Any = z.numel() // z.shape[1]
        if plan.after.batch:
            check_count(plan.check, z)
            mean_after, variance_after = ops.batch_stats(z)
            mean_after, variance_after, count = _joint(
                mean_after, variance_after, count, plan.after.group
            )
        assert variance_after is not None
        rstd_after = torch.rsqrt(variance_after + plan.eps)
        after = (mean_after, rstd_after, weight_after, bias_after)
        y = ops.bn_act(z, *after, residual, plan.after.act)
        # Only the sum's own sign says whether the activation let it through.
        out = y if residual is not None and plan.after.act is not None else None
        if plan.pool is not None:
            y = F.max_pool2d(y, *plan.pool[:4], ceil_mode=plan.pool[4])
        ctx.count = count
        ctx.has_residual = residual is not None
        kept = None if plan.again or plan.conv is None else z
        ctx.save_for_backward(x, mean, rstd, weight, bias, filters, *after, kept, out)
        return y, mean_after, variance_after, count

    @staticmethod
    @differentiable(lambda ctx: _again(ctx))
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        ops = torch.ops.deeplab_fast
        plan: _Plan = ctx.plan
        x, mean, rstd, weight, bias, filters, *rest = ctx.saved_tensors
        needs = ctx.needs_input_grad
        to_x, to_norm, to_filters = needs[1], needs[4] or needs[5], needs[6]
        grads: list[Tensor | None] = [None] * len(needs)
        below = to_x or to_norm
        a = x
        if plan.before is not None and (to_filters or plan.again):
            a = ops.bn_act(x, mean, rstd, weight, bias, None, plan.before.act)
        if plan.after is not None:
            mean_after, rstd_after, weight_after, bias_after, z, out = rest
            if z is None:
                z = a if plan.conv is None else ops.conv2d(a, filters, *plan.conv)
            after = (mean_after, rstd_after, weight_after, bias_after)
            if plan.pool is not None:
                grad = _pool_backward(grad, ops.bn_act(z, *after, None, plan.after.act), plan.pool)
            to_residual = ctx.has_residual and needs[11]
            to_z = below or to_filters
            grad, grads[7], grads[8], grads[11] = _norm_backward(
                grad, z, after, out, plan.after, ctx.count, (to_z, needs[7], needs[8], to_residual)
            )
            del z, out
        if plan.conv is not None and grad is not None and (below or to_filters):
            if plan.before is None and not to_filters:
                # Of x only the shape is looked at.
                a = x
            grad, to_filters_grad = ops.conv2d_backward(
                grad, a, filters, *plan.conv, below, to_filters
            )
            if to_filters:
                grads[6] = to_filters_grad
        del a
        if plan.before is not None and below:
            grad, grads[4], grads[5], _ = _norm_backward(
                grad,
                x,
                (mean, rstd, weight, bias),
                None,
                plan.before,
                plan.before.count,
                (to_x, needs[4], needs[5], False),
            )
        grads[1] = grad if to_x else None
        return tuple(grads)


def _again(ctx: Any) -> tuple[Callable[..., Tensor], Sequence[Any]]:
    """A segment by PyTorch's operations, for second derivatives; see `differentiable`."""
    plan: _Plan = ctx.plan
    x, mean, rstd, weight, bias, filters, *rest = ctx.saved_tensors
    mean_after = rstd_after = weight_after = bias_after = out = residual = None
    if plan.after is not None:
        mean_after, rstd_after, weight_after, bias_after, _, out = rest
        if ctx.has_residual:
            # Its value matters only for where the activation lets the sum through, which out says.
            shape = _shape_before_pool(plan, x, filters)
            residual = x.new_zeros(shape).requires_grad_()

    def run(
        plan: _Plan,
        x: Tensor,
        mean: Any,
        rstd: Any,
        weight: Any,
        bias: Any,
        filters: Any,
        weight_after: Any,
        bias_after: Any,
        mean_after: Any,
        rstd_after: Any,
        residual: Tensor | None,
    ) -> Tensor:
        y = x
        if plan.before is not None:
            mean, rstd = _stats_again(y, mean, rstd, plan.before)
            y = reference.bn_act(y, mean, rstd, weight, bias, None, plan.before.act)
        if plan.conv is not None:
            y = reference.conv2d(y, filters, *plan.conv)
        if plan.after is None:
            return y
        mean_after, rstd_after = _stats_again(y, mean_after, rstd_after, plan.after)
        act = None if residual is not None else plan.after.act
        y = reference.bn_act(y, mean_after, rstd_after, weight_after, bias_after, residual, act)
        if out is not None:
            y = torch.where(_passes(out.detach(), plan.after.act), y, 0.0)
        if plan.pool is not None:
            y = F.max_pool2d(y, *plan.pool[:4], ceil_mode=plan.pool[4])
        return y

    after = (weight_after, bias_after, mean_after, rstd_after)
    return run, (plan, x, mean, rstd, weight, bias, filters, *after, residual)


def _shape_before_pool(plan: _Plan, x: Tensor, filters: Tensor | None) -> Any:
    if plan.conv is None:
        return x.shape
    meta = x.new_empty(x.shape, device="meta")
    assert filters is not None
    return reference.conv2d(meta, filters.to("meta"), *plan.conv).shape


def _stats_again(x: Tensor, mean: Tensor, rstd: Tensor, options: _NormOptions) -> Any:
    """(mean, rstd) with their history where they are those of x."""
    if not options.batch:
        return mean, rstd
    if options.group is not None:
        raise RuntimeError(
            "batch norm that is synchronised over processes has no second derivative; train with "
            "nn.BatchNorm2d, or without create_graph=True"
        )
    own_mean, variance = reference.batch_stats(x)
    # 1 / sqrt(variance + eps), with eps as it was in the forward pass.
    return own_mean, torch.rsqrt(variance + (rstd.pow(-2) - variance).detach())


def _passes(out: Tensor, act: str | None) -> Tensor:
    """Where act, whose result is out, lets gradients through, of those that are linear there."""
    if act == "relu":
        return ~(out <= 0)
    if act == "relu6":
        return ~((out <= 0) | (out >= 6))
    raise RuntimeError(f"{act} of a sum with a residual has no second derivative here")


def _norm_backward(
    grad: Tensor,
    z: Tensor,
    norm: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor | None,
    options: _NormOptions,
    count: Any,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Any, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to (z, weight, bias, residual) of act(norm(z) + residual), where needed."""
    ops = torch.ops.deeplab_fast
    to_z, to_weight, to_bias, to_residual = needs
    means: tuple[Tensor | None, Tensor | None] = (None, None)
    grad_weight = grad_bias = None
    if to_weight or to_bias or (options.batch and to_z):
        sums = ops.bn_act_reduce(grad, z, *norm, out, options.act)
        grad_bias = sums[0].to(norm[3].dtype) if to_bias else None
        grad_weight = sums[1].to(norm[2].dtype) if to_weight else None
        if options.batch and to_z:
            if options.group is not None:
                joint = torch.cat(sums)
                dist.all_reduce(joint, group=options.group)
                sums = joint.chunk(2)
            means = (sums[0] / count, sums[1] / count)
    if not to_z and not to_residual:
        return None, grad_weight, grad_bias, None
    grad_z, grad_residual = ops.bn_act_backward(
        grad, z, *norm, out, *means, options.act, to_residual
    )
    return grad_z, grad_weight, grad_bias, grad_residual if to_residual else None


def _pool_backward(grad: Tensor, y: Tensor, pool: Pool) -> Tensor:
    _, indices = torch.ops.aten.max_pool2d_with_indices(y, *pool)
    return torch.ops.aten.max_pool2d_with_indices_backward(grad, y, *pool, indices)


def residual_block(
    modules: Sequence[nn.Module], shortcut: nn.Module | None, relu: nn.Module | None, x: Tensor
) -> Tensor:
    """relu(modules(x) + shortcut(x)); relu None for the sum itself."""
    identity = x if shortcut is None else run(shortcut, x)
    if relu is None:
        return sequence(modules, x, identity)
    if type(relu) is nn.ReLU and is_plain(relu):
        return sequence(modules, x, identity, "relu")
    return relu(sequence(modules, x, identity))


def transformed() -> bool:
    """Whether something records or changes operations in a way that needs the plain modules."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    return transforms() or has_global_hooks() or not functional_is_intact()


def needs_gradients(module: nn.Module, x: Tensor) -> bool:
    """Whether autograd records a call of the module on x."""
    return torch.is_grad_enabled() and (
        x.requires_grad or any(p.requires_grad for p in module.parameters())
    )


def has_kernels(x: Tensor) -> bool:
    """Whether the passes of batch norm have kernels of their own for x, which decides whether the
    training forms pay: PyTorch's modules are faster than what the forms run without them.

    On a CPU they have, and where a backend is asked for by name that decides.
    """
    if not x.is_cuda:
        return True
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return _has_cuda_kernels(x.device.index, dtype, tuple(x.shape))


def _has_cuda_kernels(index: int, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    if backends.current_backend() != "auto":
        return True
    # Of the middle of a network, as records are asked by the nearest size.
    n, _, height, width = shape
    on_gpu = torch.empty(0, 256, 1, 1, dtype=dtype, device=torch.device("cuda", index))
    desc = backends.OpDesc.of("bn_act", on_gpu, act="relu", residual=False)
    desc = replace(desc, shape=(n, 256, -(-height // 8), -(-width // 8)))
    return not backends.select(desc).is_pytorch


# As torch.compiler.assume_constant_result does, which imports the compiler. A compiled model keeps
# the answer for as long as it lives.
_has_cuda_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


@rule(ASPP)
def _aspp(module: Any, x: Tensor) -> Tensor:
    *branches, pooling = module.convs
    if not _is_aspp(module):
        y = torch.cat([run(branch, x) for branch in module.convs], dim=1)
        return run(module.project, y)
    convs, norms = [b[0] for b in branches], [b[1] for b in branches]
    batch = uses_batch(norms[0])
    y, mean, variance = aspp_convs(
        x, [c.weight for c in convs], [pair(c.dilation)[0] for c in convs], stats=batch
    )
    joint = _JointNorm(norms, y, mean, variance)
    # The map of the pooled vector is constant: its part of the projection is one bias an image.
    pooled = sequence(list(pooling), x)
    project, norm, relu, *dropout = module.project
    to_branches, to_pooled = project.weight.tensor_split([y.shape[1]], dim=1)
    z = _raw(y, joint, to_branches)
    z = z + F.conv2d(pooled, to_pooled).to(z.dtype)
    return sequence([norm, relu, *dropout], z)


def _is_aspp(module: Any) -> bool:
    """Whether branches, pooling and projection are those that the fused form computes."""
    *branches, pooling = module.convs
    project = module.project
    if type(pooling) is not ASPPPooling or not is_plain(pooling):
        return False
    if type(pooling[0]) is not nn.AdaptiveAvgPool2d:
        return False
    if pooling[0].output_size not in (1, (1, 1), [1, 1]):
        return False
    if not branches or not is_sequence(project) or len(project) < 3:
        return False
    if not is_convolution(project[0]) or not _is_branch(project[0], 1):
        return False
    if not is_norm(project[1]) or type(project[2]) is not nn.ReLU:
        return False
    if not all(is_sequence(branch) for branch in branches):
        return False
    parts = [list(branch) for branch in branches]
    if any(len(p) != 3 for p in parts):
        return False
    modes = set()
    for conv, norm, relu in parts:
        if not (is_convolution(conv) and is_norm(norm) and type(relu) is nn.ReLU):
            return False
        if not is_plain(relu) or not _is_branch(conv):
            return False
        modes.add((norm.training, uses_batch(norm), _group(norm), norm.weight is None))
    return len(modes) == 1


def _is_branch(conv: Any, *sizes: int) -> bool:
    stride, padding, (rate, other), groups = _geometry(conv)
    size = conv.weight.shape[-1]
    return (
        size in (sizes or (1, 3))
        and conv.weight.shape[-2] == size
        and conv.bias is None
        and groups == 1
        and stride == [1, 1]
        and rate == other
        and padding == [rate * (size // 2)] * 2
    )


class _JointNorm(_Norm):
    """The batch norms of all branches on their one buffer, with ReLU."""

    def __init__(
        self, norms: Sequence[Any], x: Tensor, mean: Tensor | None, variance: Tensor | None
    ) -> None:
        self.act = "relu"
        self.batch = uses_batch(norms[0])
        self.group = _group(norms[0])
        self.count: Any = x.numel() // x.shape[1]
        sizes = [norm.num_features for norm in norms]
        pairs = [affine(norm, part) for norm, part in zip(norms, x.split(sizes, 1), strict=True)]
        self.weight, self.bias = (torch.cat(list(v)) for v in zip(*pairs, strict=True))
        if self.batch:
            assert mean is not None and variance is not None
            check_count(norms[0], x)
            mean, variance, self.count = _joint(mean, variance, self.count, self.group)
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


def _raw(x: Tensor, norm: _Norm, filters: Tensor) -> Tensor:
    """The 1x1 convolution of act(norm(x))."""
    x, filters = autocast(x, filters)
    plan = _Plan(before=norm.options, conv=([1, 1], [0, 0], [1, 1], 1))
    return _Segment.apply(plan, x, *norm.tensors, filters, *(None,) * 5)[0]


def features(getter: Any, x: Tensor) -> dict[str, Tensor]:
    """An IntermediateLayerGetter: sequences that end where a result is kept."""
    results = OrderedDict()
    members: list[nn.Module] = []
    for name, module in getter.items():
        members.append(module)
        if name in getter.return_layers:
            x = sequence(members, x)
            results[getter.return_layers[name]] = x
            members = []
    return results
