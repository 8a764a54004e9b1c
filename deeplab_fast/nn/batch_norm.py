"""Freezing batch norm in a way that `train()` does not undo."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

__all__ = [
    "FROZEN_STATE",
    "convert_sync_batch_norm",
    "freeze_batch_norm",
    "frozen_batch_norms",
    "remake",
    "thawed_class",
    "unfreeze_batch_norm",
]

_PARAMETERS = ("weight", "bias")
# What an instance of _Frozen holds beyond its own class.
FROZEN_STATE = ("frozen_statistics", "frozen_parameters", "asked_mode")


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    class _Joined(_BatchNorm):
        frozen_statistics: bool
        frozen_parameters: tuple[str, ...]
        asked_mode: bool
else:
    _Joined = object


class _Frozen(_Joined):
    """What a frozen batch norm has on top of its own class; `_frozen_class` joins the two.

    Attributes, without annotations, which would hide the layer's own from torch.jit.script:
        thawed: the class that the layer had.
        frozen_statistics: whether the layer stays in evaluation mode.
        frozen_parameters: names of the parameters that were trainable before.
        asked_mode: the mode last asked for, which unfreezing brings back.
    """

    thawed = nn.Module

    def __setattr__(self, name: str, value: Any) -> None:
        # Not in train(): a trainer that puts modes back after validation assigns them.
        if name == "training":
            self.asked_mode = value
            value = value and not self.__dict__["frozen_statistics"]
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The class is made at run time, where pickle cannot find it by name.
        state = self.__getstate__()  # type: ignore[attr-defined, unused-ignore]
        return remake, (self.thawed,), state


def freeze_batch_norm(
    module: nn.Module, *, statistics: bool = True, parameters: bool = True
) -> int:
    """Freeze every batch norm in `module` (itself included), in place.

    Each layer gets a subclass of its class: isinstance, forward, state_dict and hooks stay as they
    are. The freezing survives `train()`, assignments to `training`, deepcopy and pickling, and ends
    with `unfreeze_batch_norm`. Freezing again adds to what is frozen.

    Covered are all subclasses of torch's batch norm: BatchNorm1d/2d/3d, SyncBatchNorm,
    `deeplab_fast.nn.SingleValueBatchNorm2d` and a user's own. torch's `convert_sync_batchnorm`
    makes new layers, whose statistics are not frozen; `convert_sync_batch_norm` keeps them so. Wrap
    in DDP last: it expects a gradient for each parameter that was trainable when it was made.

    Args:
        statistics: normalise by the running statistics and leave them alone, also in training
            mode, like `eval()`.
        parameters: no gradients to weight and bias (requires_grad False; a gradient left from
            before is dropped, so that an optimizer passes them over).

    Returns:
        Number of batch norms in the module; all are frozen now.

    Raises:
        ValueError: nothing to freeze asked for, or a layer that cannot (no running statistics, or
            a lazy one that has not run yet); nothing is changed then.

    Source: arXiv 1706.05587, section 4.1 (batch norm trained at output stride 16, then frozen for
    output stride 8).
    """
    if not (statistics or parameters):
        raise ValueError("freeze_batch_norm: one of statistics and parameters must be True")
    layers = list(_batch_norms(module))
    for name, layer in layers:
        where = f"{name} ({type(layer).__name__})" if name else type(layer).__name__
        if isinstance(layer, LazyModuleMixin):
            raise ValueError(f"{where} has no parameters yet; run the model once before freezing")
        if statistics and layer.running_mean is None:
            raise ValueError(
                f"{where} has no running statistics to freeze (track_running_stats=False); use "
                "statistics=False"
            )
    for _, layer in layers:
        frozen = layer if isinstance(layer, _Frozen) else _made_frozen(layer)
        if statistics:
            frozen.frozen_statistics = True
            frozen.training = frozen.asked_mode
        if parameters:
            _freeze_parameters(frozen)
    return len(layers)


def unfreeze_batch_norm(module: nn.Module) -> int:
    """Undo `freeze_batch_norm` in place, for every batch norm in `module`.

    Layers get back their class, the mode that `train()` or `eval()` last asked for, and
    requires_grad for the parameters that freezing took it from.

    Returns:
        Number of layers that were frozen.
    """
    layers = [layer for _, layer in _batch_norms(module) if isinstance(layer, _Frozen)]
    for layer in layers:
        _thaw(layer)
    return len(layers)


def frozen_batch_norms(module: nn.Module) -> list[str]:
    """Names of the frozen batch norms in `module`, in the order of named_modules()."""
    return [name for name, layer in _batch_norms(module) if isinstance(layer, _Frozen)]


def thawed_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a module, of a frozen batch norm that which it had before."""
    return layer.thawed if isinstance(layer, _Frozen) else type(layer)


def convert_sync_batch_norm(
    module: nn.Module, process_group: ProcessGroup | None = None
) -> nn.Module:
    """torch.nn.SyncBatchNorm.convert_sync_batchnorm, after which what was frozen still is.

    Args:
        module: changed in place; its batch norms are replaced.
        process_group: whose processes share statistics; None for all.

    Returns:
        The module, or its replacement where it is a batch norm itself.
    """
    kept = {
        name: {key: layer.__dict__[key] for key in FROZEN_STATE}
        for name, layer in _batch_norms(module)
        if isinstance(layer, _Frozen)
    }
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    for name, state in kept.items():
        layer = _made_frozen(module.get_submodule(name))
        layer.__dict__.update(state)
        layer.training = layer.asked_mode
    return module


def _batch_norms(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    for name, child in module.named_modules():
        if isinstance(child, _BatchNorm):
            yield name, child


def _made_frozen(layer: nn.Module) -> _Frozen:
    thawed: Any = type(layer)
    layer.__dict__.update(frozen_statistics=False, frozen_parameters=(), asked_mode=layer.training)
    layer.__class__ = _frozen_class(thawed)
    return cast(_Frozen, layer)


def _freeze_parameters(layer: _Frozen) -> None:
    for name in _PARAMETERS:
        parameter = getattr(layer, name)
        if parameter is not None and parameter.requires_grad:
            parameter.requires_grad_(False)
            parameter.grad = None
            layer.frozen_parameters = (*layer.frozen_parameters, name)


def _thaw(layer: _Frozen) -> None:
    mode = layer.asked_mode
    for name in layer.frozen_parameters:
        getattr(layer, name).requires_grad_(True)
    for key in FROZEN_STATE:
        del layer.__dict__[key]
    plain: nn.Module = layer
    plain.__class__ = layer.thawed
    plain.training = mode


@functools.cache
def _frozen_class(thawed: Any) -> type[_Frozen]:
    return type(f"Frozen{thawed.__name__}", (_Frozen, thawed), {"thawed": thawed})


def remake(thawed: Any) -> _Frozen:
    """An empty frozen layer, for pickle and deepcopy to fill."""
    cls = _frozen_class(thawed)
    return cls.__new__(cls)
