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
from ..ops import segment as piece
from ..ops.aspp_convs import aspp_convs
from ..ops.common import autocast, differentiable
from . import match
from .formats import in_plain_format, is_channels_last
from .intact import functional_is_intact, has_global_hooks, has_transforms
from .leading import Leading
from .network import Network
from .norms import (
    JointNorm,
    JointStatistics,
    Norm,
    NormOptions,
    Statistics,
    affine,
    constants_of,
    group_of,
    options_of,
    sum_over,
    uses_batch,
)
from .structure import evaluate

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


def run(module: match.Item, x: Any) -> Any:
    """module(x), by segments where they are known."""
    return sequence([module], x)


def sequence(
    modules: Iterable[match.Item],
    x: Any,
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
        if conv is not None and not match.has_geometry(conv):
            parts.append(conv)
            conv = None
        elif conv is not None and (not known or conv.module.bias is not None):
            parts.append(match.Unit(conv, None))
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
        conv = part.conv
        if part.norm is None:
            assert conv is not None
            x, _ = _convolve(x, pending, match.geometry(conv), conv.module.weight)
            pending = None
            if conv.module.bias is not None:
                x = x + conv.module.bias.to(x.dtype)[:, None, None]
            continue
        norm = part.norm.module
        own_act = None if part.act is None else part.act.name
        following = parts[i + 1] if i + 1 < len(parts) else None
        if part.pool is None and isinstance(following, match.Unit) and following.conv is not None:
            stats = None
            if conv is not None:
                x, stats = _convolve(x, pending, match.geometry(conv), conv.module.weight, norm)
            pending = Norm(norm, own_act, x, stats)
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
    if isinstance(segment, match.Pooling) and match.is_mean(segment.pool):
        y = sequence((segment.pool, *segment.modules), x)
        return y.expand(-1, -1, *x.shape[2:])
    if isinstance(segment, match.Features):
        return _features(segment, x)
    if isinstance(segment, match.Graph):
        return evaluate(segment, x, sequence)
    return segment.module(x)


def _pool(module: nn.MaxPool2d) -> Pool:
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    kernel, stride, padding, dilation = (match.pair(value) for value in sizes)
    return kernel, stride, padding, dilation, module.ceil_mode


def _convolve(
    x: Tensor,
    pending: Norm | None,
    conv: match.Geometry,
    weight: Tensor,
    norm: _BatchNorm | None = None,
) -> tuple[Tensor, Statistics | None]:
    """conv(act(norm(x))), or conv(x) where no norm is pending, and its statistics for the norm that
    follows where that takes those of the batch."""
    x, weight = autocast(x, weight)
    plan = _Plan(
        before=None if pending is None else pending.options,
        conv=conv,
        norm=norm if norm is not None and uses_batch(norm) else None,
    )
    return _apply(plan, x, pending, weight, (None,) * 4, None)


def _finish(
    x: Tensor,
    pending: Norm | None,
    conv: match.Conv | None,
    norm: _BatchNorm,
    act: str | None,
    residual: Tensor | None,
    pool: Pool | None,
) -> Tensor:
    """act(norm(conv(act(pending(x)))) + residual), max-pooled; conv may be None."""
    weight = None
    if conv is not None:
        x, weight = autocast(x, conv.module.weight)
    if residual is not None:
        residual = residual.to(x.dtype)
    # The input of a 1x1 convolution behind a norm is made again in any case.
    again = conv is not None and pending is not None and tuple(conv.module.kernel_size) == (1, 1)
    batch = uses_batch(norm)
    factors = affine(norm, x)
    constants = (None, None) if batch else constants_of(norm, x)
    plan = _Plan(
        before=None if pending is None else pending.options,
        conv=None if conv is None else match.geometry(conv),
        norm=norm if batch else None,
        applies=True,
        act=act,
        again=again,
        pool=pool,
    )
    return _apply(plan, x, pending, weight, (*factors, *constants), residual)[0]


def _apply(
    plan: _Plan,
    x: Tensor,
    pending: Norm | None,
    weight: Tensor | None,
    after: Sequence[Tensor | None],
    residual: Tensor | None,
) -> tuple[Tensor, Statistics | None]:
    tensors = (None,) * 4 if pending is None else pending.tensors
    y, mean, rstd, count = _Segment.apply(plan, x, *tensors, weight, *after, residual)
    return y, Statistics(mean, rstd, count) if count else None


@dataclass(frozen=True)
class _Plan:
    """What a segment runs.

    Attributes:
        before: of the norm at the input, or None.
        conv: (stride, padding, dilation, groups), or None.
        norm: the norm behind, whose statistics are taken, or None.
        applies: a norm behind is applied as well.
        act: the activation behind that.
        again: compute the convolution again in the backward pass.
        pool: of the max pooling at the end, or None.
    """

    before: NormOptions | None = None
    conv: match.Geometry | None = None
    norm: _BatchNorm | None = None
    applies: bool = False
    act: str | None = None
    again: bool = False
    pool: Pool | None = None

    @property
    def geometry(self) -> list[int]:
        """What `ops.segment` takes for `conv`."""
        if self.conv is None:
            return []
        stride, padding, dilation, groups = self.conv
        return [*stride, *padding, *dilation, groups]

    @property
    def window(self) -> list[int]:
        """The same for `pool`."""
        if self.pool is None:
            return []
        *sizes, ceil_mode = self.pool
        return [*(number for pair in sizes for number in pair), int(ceil_mode)]


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
        rstd_after: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        ctx.plan = plan
        takes = plan.norm is not None
        before = _present((mean, rstd, weight, bias))
        after = _present((weight_after, bias_after, mean_after, rstd_after))
        act = None if plan.before is None else plan.before.act
        of_norm = options_of(plan.norm)
        args = (x, before, act, filters, plan.geometry, takes, *of_norm)
        rest = (after, residual, plan.act, plan.window)
        joint = None if plan.norm is None else JointStatistics.of(plan.norm)
        if joint is None:
            found = piece.run(*args, *rest)
        else:
            # Other processes are waited for between two passes.
            found = piece.forward(torch.ops.deeplab_fast, *args, *rest, join=joint.join)
        y, z, *stats = found
        if filters is None or not plan.applies:
            z = x if filters is None else y
        count = 0
        if takes:
            mean_after, rstd_after = stats
            count = z.numel() // z.shape[1] if joint is None else joint.count
        if not plan.applies:
            if takes:
                ctx.mark_non_differentiable(mean_after, rstd_after)
            ctx.save_for_backward(x, mean, rstd, weight, bias, filters)
            return y, mean_after, rstd_after, count
        # Only the sum's own sign says whether the activation let it through.
        out = y if residual is not None and plan.act is not None else None
        ctx.count, ctx.group = count, None if joint is None else joint.group
        ctx.has_residual = residual is not None
        kept = None if plan.again or filters is None else z
        own = (mean_after, rstd_after, weight_after, bias_after)
        ctx.save_for_backward(x, mean, rstd, weight, bias, filters, *own, kept, out)
        return y, None, None, 0

    @staticmethod
    @differentiable(lambda ctx: _again(ctx))
    def backward(ctx: Any, grad: Any, *unused: object) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        x, mean, rstd, weight, bias, filters, *rest = ctx.saved_tensors
        after, z, out, count, group = [], None, None, 0, None
        if plan.applies:
            *after, z, out = rest
            count, group = ctx.count, ctx.group
        before = _present((mean, rstd, weight, bias))
        places = [i for i in _DIFFERENTIABLE if ctx.needs_input_grad[i]]
        needs = [i in places for i in _DIFFERENTIABLE]
        options = plan.before or NormOptions()
        args = (
            grad, x, before, options.act, options.count, filters, plan.geometry,
            z, after, count, out, plan.act, plan.window, needs,
        )  # fmt: skip
        if options.group is None and group is None:
            found = piece.run_gradients(*args)
        else:
            adds = (sum_over(options.group), sum_over(group))
            found = piece.backward(torch.ops.deeplab_fast, *args, *adds)
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i, gradient in zip(places, found, strict=True):
            grads[i] = gradient
        return tuple(grads)


# Places among the arguments of `_Segment`, in the order of `ops.segment.backward`.
_DIFFERENTIABLE = (1, 4, 5, 6, 7, 8, 11)


def _again(ctx: Any) -> tuple[Callable[..., Tensor], Sequence[Any]]:
    """A segment by PyTorch's operations, for second derivatives; see `differentiable`."""
    plan: _Plan = ctx.plan
    x, mean, rstd, weight, bias, filters, *rest = ctx.saved_tensors
    mean_after = rstd_after = weight_after = bias_after = out = residual = None
    if plan.applies:
        mean_after, rstd_after, weight_after, bias_after, _, out = rest
        if ctx.has_residual:
            # Its value matters only for where the activation lets the sum through, which out says.
            shape = _shape_before_pool(plan, x, filters)
            residual = x.new_zeros(shape).requires_grad_()

    def run(plan: _Plan, x: Tensor, *given: Tensor | None) -> Tensor:
        y = x
        if plan.before is not None:
            mean, rstd, weight, bias = _present(given[:4])
            mean, rstd = _stats_again(y, mean, rstd, plan.before.count, plan.before.group)
            y = reference.bn_act(y, mean, rstd, weight, bias, None, plan.before.act)
        if plan.conv is not None:
            (kernels,) = _present(given[4:5])
            y = reference.conv2d(y, kernels, *plan.conv)
        if not plan.applies:
            return y
        weight, bias, mean, rstd = _present(given[5:9])
        residual = given[9]
        mean, rstd = _stats_again(y, mean, rstd, ctx.count, ctx.group)
        act = None if residual is not None else plan.act
        y = reference.bn_act(y, mean, rstd, weight, bias, residual, act)
        if out is not None:
            y = torch.where(_passes(out.detach(), plan.act), y, 0.0)
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
    x: Tensor, mean: Tensor, rstd: Tensor, count: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(mean, rstd) with their history where they are those of x."""
    if not count:
        return mean, rstd
    if group is not None:
        raise RuntimeError(
            "batch norm that is synchronised over processes has no second derivative; train with "
            "nn.BatchNorm2d, or without create_graph=True"
        )
    own_mean, variance, _ = reference.batch_stats(x)
    # 1 / sqrt(variance + eps), with eps as it was in the forward pass.
    return own_mean, torch.rsqrt(variance + (rstd.pow(-2) - variance).detach())


def _passes(out: Tensor, act: str | None) -> Tensor:
    """Where act, whose result is out, lets gradients through, of those that are linear there."""
    if act == "relu":
        return ~(out <= 0)
    if act == "relu6":
        return ~((out <= 0) | (out >= 6))
    raise RuntimeError(f"{act} of a sum with a residual has no second derivative here")


def _block(block: match.Block, x: Tensor) -> Tensor:
    if not block.adds:
        return sequence(block.modules, x)
    shortcut = x if block.shortcut is None else run(block.shortcut, x)
    if block.act is None:
        return sequence(block.modules, x, shortcut)
    if match.is_relu(block.act):
        return sequence(block.modules, x, shortcut, "relu")
    return block.act(sequence(block.modules, x, shortcut))


def logits(
    model: Network, x: Tensor, aux: bool, leading: Leading | None = None
) -> dict[str, Tensor] | None:
    """Low-resolution logits "out" and, if asked for, "aux"; None for the plain modules.

    With `leading` the backbone's frozen first modules run as in inference.
    """
    # torch.fx traces with a Proxy, and other ranks have PyTorch's own messages.
    if not model.fused or not isinstance(x, Tensor) or x.dim() != 4 or x.numel() == 0:
        return None
    if not needs_gradients(model, [x]) or transformed() or not has_kernels(x):
        return None
    given = x.contiguous(memory_format=torch.channels_last)
    backbone = match.segment_of(model.backbone)
    if isinstance(backbone, match.Features) and model.fast:
        features = _features(backbone, given, leading, model.max_extra_bytes)
    else:
        features = run(model.backbone, given)
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


def needs_gradients(module: nn.Module, maps: Sequence[Tensor]) -> bool:
    """Whether autograd records a call of the module on these maps."""
    return torch.is_grad_enabled() and (
        any(x.requires_grad for x in maps) or any(p.requires_grad for p in module.parameters())
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
    to_branches, to_pooled = _split(project.module.weight, aspp, convs, pooled.shape[1])
    z, _ = _convolve(y, joint, match.geometry(project), to_branches)
    z = z + F.conv2d(pooled, to_pooled).to(z.dtype)
    return _run(rest, z)


def _split(
    weight: Tensor, aspp: match.Aspp, convs: Sequence[nn.Conv2d], pooled: int
) -> tuple[Tensor, Tensor]:
    """The filters of a projection for the branches and for the pooled vector."""
    place = range(len(aspp.branches))[aspp.pooled]
    before = sum(conv.out_channels for conv in convs[:place])
    first, to_pooled, last = weight.tensor_split([before, before + pooled], dim=1)
    parts = [part for part in (first, last) if part.shape[1]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), to_pooled


def _fused_form(
    aspp: match.Aspp,
) -> tuple[list[tuple[nn.Conv2d, _BatchNorm]], match.Pooling, match.Conv, list[match.Part]] | None:
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
    assert isinstance(first, match.Unit) and first.conv is not None
    return branches, pooling, first.conv, [replace(first, conv=None), *rest]


def _conv_and_norm(part: match.Part) -> tuple[nn.Conv2d, _BatchNorm] | None:
    """Of a unit that runs as one."""
    if not isinstance(part, match.Unit) or part.conv is None or part.norm is None:
        return None
    return part.conv.module, part.norm.module


def _features(
    features: match.Features,
    x: Tensor,
    leading: Leading | None = None,
    max_extra_bytes: int | None = None,
) -> dict[str, Tensor]:
    results = OrderedDict()
    for i, (modules, name) in enumerate(features.stages):
        if i == 0 and leading is not None:
            modules, x = leading.run(modules, x, max_extra_bytes)
        x = sequence(modules, x)
        if name is not None:
            results[name] = x
    return results
