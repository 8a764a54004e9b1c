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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import backends, reference
from ..ops.aspp_convs import aspp_convs
from ..ops.common import autocast, differentiable
from . import match
from .formats import in_plain_format, is_channels_last
from .intact import functional_is_intact, has_global_hooks, has_transforms
from .network import Network
from .norms import (
    JointNorm,
    Norm,
    NormOptions,
    affine,
    check_count,
    group_of,
    over_processes,
    running,
    update_running,
    uses_batch,
)

_NORM_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
# (kernel, stride, padding, dilation, ceil_mode) of torch.ops.aten.max_pool2d_with_indices.
Pool = tuple[list[int], list[int], list[int], list[int], bool]


N = TypeVar("N", bound=Network)


def fuse(model: N, fused: bool = True) -> N:
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


def run(module: nn.Module, x: Tensor) -> Any:
    """module(x), by segments where they are known."""
    return sequence([module], x)


def sequence(
    modules: Iterable[nn.Module],
    x: Tensor,
    residual: Tensor | None = None,
    act: str | None = None,
) -> Tensor:
    """act(modules(x) + residual), the sum in the epilogue of the last batch norm.

    Without a residual act must be None: the sequence has its activations.
    """
    return _run(_parts(match.segments(modules)), x, residual, act)


def _parts(segments: Iterable[match.Part]) -> list[match.Part]:
    """Segments, of units those that run as one: a convolution alone, or a batch norm with what
    stands behind it and, without a bias, before it."""
    parts: list[match.Part] = []
    for segment in segments:
        if not isinstance(segment, match.Unit):
            parts.append(segment)
            continue
        conv, norm, act, pool = segment.conv, segment.norm, segment.act, segment.pool
        known = norm is not None and type(norm.module).forward in _NORM_FORWARDS
        if conv is not None and (not known or conv.same or conv.module.bias is not None):
            parts.append(conv if conv.same else match.Unit(conv, None))
            conv = None
        if known:
            parts.append(match.Unit(conv, norm, act, pool))
        else:
            parts += [part for part in (norm, act, pool) if part is not None]
    return parts


def _run(
    parts: Sequence[match.Part],
    x: Tensor,
    residual: Tensor | None = None,
    act: str | None = None,
) -> Tensor:
    # x is the raw result of a convolution where a norm is pending.
    pending: Norm | None = None
    for i, part in enumerate(parts):
        if not isinstance(part, match.Unit):
            x = _other(part, x)
            continue
        conv = None if part.conv is None else part.conv.module
        if part.norm is None:
            assert conv is not None
            x, pending = _convolve(x, pending, conv.weight, match.geometry(conv)), None
            if conv.bias is not None:
                x = x + conv.bias.to(x.dtype)[:, None, None]
            continue
        norm = part.norm.module
        own_act = None if part.act is None else part.act.name
        following = parts[i + 1] if i + 1 < len(parts) else None
        if part.pool is None and isinstance(following, match.Unit) and following.conv is not None:
            if conv is not None:
                x = _convolve(x, pending, conv.weight, match.geometry(conv))
            pending = Norm(norm, own_act, x)
            continue
        pool = None if part.pool is None else _pool(part.pool.module)
        last = following is None and residual is not None and own_act is None and pool is None
        x = _finish(
            x, pending, conv, norm, act if last else own_act, residual if last else None, pool
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


def _other(segment: match.Segment, x: Tensor) -> Any:
    """segment.module(x), by parts where they are known."""
    if isinstance(segment, match.Block):
        return _block(segment, x)
    if isinstance(segment, match.Aspp):
        return _aspp(segment, x)
    if isinstance(segment, match.Features):
        return _features(segment, x)
    return segment.module(x)


def _pool(module: nn.MaxPool2d) -> Pool:
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    kernel, stride, padding, dilation = (match.pair(value) for value in sizes)
    return kernel, stride, padding, dilation, module.ceil_mode


def _convolve(x: Tensor, pending: Norm | None, weight: Tensor, geometry: match.Geometry) -> Tensor:
    """conv(act(norm(x))), or conv(x) where no norm is pending."""
    x, weight = autocast(x, weight)
    tensors = (None,) * 4 if pending is None else pending.tensors
    plan = _Plan(before=None if pending is None else pending.options, conv=geometry)
    return _Segment.apply(plan, x, *tensors, weight, *(None,) * 5)[0]


def _finish(
    x: Tensor,
    pending: Norm | None,
    conv: nn.Conv2d | None,
    norm: _BatchNorm,
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
        conv=None if conv is None else match.geometry(conv),
        after=NormOptions(act, batch, 0, group_of(norm)),
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

    before: NormOptions | None = None
    conv: match.Geometry | None = None
    after: NormOptions | None = None
    eps: float = 0.0
    again: bool = False
    pool: Pool | None = None
    check: _BatchNorm | None = None


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
    ) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        ops = torch.ops.deeplab_fast
        z = x
        if plan.before is not None:
            z = ops.bn_act(x, mean, rstd, weight, bias, None, plan.before.act)
        if plan.conv is not None:
            z = ops.conv2d(z, filters, *plan.conv)
        ctx.plan = plan
        if plan.after is None:
            ctx.save_for_backward(x, mean, rstd, weight, bias, filters)
            return z, None, None, 0
        count = z.numel() // z.shape[1]
        if plan.after.batch:
            assert plan.check is not None
            check_count(plan.check, z)
            mean_after, variance_after = ops.batch_stats(z)
            mean_after, variance_after, count = over_processes(
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
    def backward(ctx: Any, grad: Any, *unused: object) -> tuple[Tensor | None, ...]:
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

    def run(plan: _Plan, x: Tensor, *given: Tensor | None) -> Tensor:
        y = x
        if plan.before is not None:
            mean, rstd, weight, bias = _present(given[:4])
            mean, rstd = _stats_again(y, mean, rstd, plan.before)
            y = reference.bn_act(y, mean, rstd, weight, bias, None, plan.before.act)
        if plan.conv is not None:
            (kernels,) = _present(given[4:5])
            y = reference.conv2d(y, kernels, *plan.conv)
        if plan.after is None:
            return y
        weight, bias, mean, rstd = _present(given[5:9])
        residual = given[9]
        mean, rstd = _stats_again(y, mean, rstd, plan.after)
        act = None if residual is not None else plan.after.act
        y = reference.bn_act(y, mean, rstd, weight, bias, residual, act)
        if out is not None:
            y = torch.where(_passes(out.detach(), plan.after.act), y, 0.0)
        if plan.pool is not None:
            y = F.max_pool2d(y, *plan.pool[:4], ceil_mode=plan.pool[4])
        return y

    after = (weight_after, bias_after, mean_after, rstd_after)
    return run, (plan, x, mean, rstd, weight, bias, filters, *after, residual)


def _present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _shape_before_pool(plan: _Plan, x: Tensor, filters: Tensor | None) -> torch.Size:
    if plan.conv is None:
        return x.shape
    meta = x.new_empty(x.shape, device="meta")
    assert filters is not None
    return reference.conv2d(meta, filters.to("meta"), *plan.conv).shape


def _stats_again(
    x: Tensor, mean: Tensor, rstd: Tensor, options: NormOptions
) -> tuple[Tensor, Tensor]:
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
    options: NormOptions,
    count: int,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
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


def _block(block: match.Block, x: Tensor) -> Tensor:
    if not block.adds:
        return sequence(block.modules, x)
    shortcut = x if block.shortcut is None else run(block.shortcut, x)
    if block.act is None:
        return sequence(block.modules, x, shortcut)
    if match.is_relu(block.act):
        return sequence(block.modules, x, shortcut, "relu")
    return block.act(sequence(block.modules, x, shortcut))


def logits(model: Network, x: Tensor, aux: bool) -> dict[str, Tensor] | None:
    """Low-resolution logits "out" and, if asked for, "aux"; None for the plain modules."""
    # torch.fx traces with a Proxy, and other ranks have PyTorch's own messages.
    if not model.fused or not isinstance(x, Tensor) or x.dim() != 4 or x.numel() == 0:
        return None
    if not needs_gradients(model, x) or transformed() or not has_kernels(x):
        return None
    features = run(model.backbone, x.contiguous(memory_format=torch.channels_last))
    results = OrderedDict(out=run(model.classifier, features["out"]))
    if aux and model.aux_classifier is not None:
        results["aux"] = run(model.aux_classifier, features["aux"])
    first = next(iter(model.backbone.parameters()), None)
    return in_plain_format(results, x, first is not None and is_channels_last(first))


def transformed() -> bool:
    """Whether something records or changes operations in a way that needs the plain modules."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    return has_transforms() or has_global_hooks() or not functional_is_intact()


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


def _aspp(aspp: match.Aspp, x: Tensor) -> Tensor:
    found = _fused_form(aspp)
    if found is None:
        return run(aspp.project, torch.cat([run(branch, x) for branch in aspp.branches], dim=1))
    branches, pooling, project, rest = found
    convs, norms = [conv for conv, _ in branches], [norm for _, norm in branches]
    rates = [match.pair(conv.dilation)[0] for conv in convs]
    batch = uses_batch(norms[0])
    y, mean, variance = aspp_convs(x, [conv.weight for conv in convs], rates, stats=batch)
    joint = JointNorm(norms, y, mean, variance)
    # The map of the pooled vector is constant: its part of the projection is one bias an image.
    pooled = sequence((pooling.pool, *pooling.modules), x)
    to_branches, to_pooled = project.weight.tensor_split([y.shape[1]], dim=1)
    z = _convolve(y, joint, to_branches, match.geometry(project))
    z = z + F.conv2d(pooled, to_pooled).to(z.dtype)
    return _run(rest, z)


def _fused_form(
    aspp: match.Aspp,
) -> tuple[list[tuple[nn.Conv2d, _BatchNorm]], match.Pooling, nn.Conv2d, list[match.Part]] | None:
    """Branches, pooling, projection and what stands behind it, where they are those that the fused
    form computes."""
    found = match.joint(aspp)
    if found is None:
        return None
    units, pooling, projected = found
    first, *rest = _parts(projected)
    branches = [pair for pair in (_conv_and_norm(_parts([unit])[0]) for unit in units) if pair]
    project = _conv_and_norm(first)
    if len(branches) < len(units) or project is None or project[0].weight.shape[2] != 1:
        return None
    modes = {(n.training, uses_batch(n), group_of(n), n.weight is None) for _, n in branches}
    if len(modes) > 1:
        return None
    assert isinstance(first, match.Unit)
    return branches, pooling, project[0], [replace(first, conv=None), *rest]


def _conv_and_norm(part: match.Part) -> tuple[nn.Conv2d, _BatchNorm] | None:
    """Of a unit that runs as one."""
    if not isinstance(part, match.Unit) or part.conv is None or part.norm is None:
        return None
    return part.conv.module, part.norm.module


def _features(features: match.Features, x: Tensor) -> dict[str, Tensor]:
    results = OrderedDict()
    for modules, name in features.stages:
        x = sequence(modules, x)
        if name is not None:
            results[name] = x
    return results
