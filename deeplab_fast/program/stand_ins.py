"""Layers of PyTorch's that stand for layers of other classes and share their state."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

L = TypeVar("L", bound=nn.Module)


def stand_in(cls: type[L], layer: nn.Module, **attributes: Any) -> L:
    """A layer of a class of PyTorch's with the parameters, buffers and settings of another layer.

    Args:
        cls: the class.
        layer: has the parameters and buffers that the class has, by the same names; they are
            shared, also those that are exchanged later.
        attributes: settings in place of the layer's.
    """
    stand = object.__new__(cls)
    stand.__dict__.update({k: v for k, v in vars(layer).items() if k != "forward"})
    stand.__dict__.update(attributes)
    stand.__dict__["_modules"] = {}
    # In a tuple: it is no child.
    stand.__dict__["_stands_for"] = (layer,)
    return stand


def original(module: nn.Module) -> nn.Module:
    """The layer that a stand-in stands for; another module itself."""
    return vars(module).get("_stands_for", (module,))[0]


class UncountedNorm(nn.BatchNorm2d):
    """A batch norm that does not count its batches."""

    @property
    def num_batches_tracked(self) -> None:  # type: ignore[override]
        """None, whatever the layer it stands for has."""
        return None


def norm_of(layer: nn.Module, training: bool, momentum: float, eps: float) -> nn.BatchNorm2d:
    """F.batch_norm with a layer's own weight, bias and running statistics."""
    return stand_in(
        UncountedNorm,
        layer,
        training=training,
        momentum=momentum,
        eps=eps,
        affine=True,
        track_running_stats=True,
        num_features=_present(layer._buffers["running_mean"]).numel(),
    )


def conv_of(layer: nn.Module, stride: Any, padding: Any, dilation: Any, groups: int) -> nn.Conv2d:
    """F.conv2d with a layer's own weight and bias."""
    weight = _present(layer._parameters["weight"])
    stride, padding, dilation = (
        (value, value) if isinstance(value, int) else tuple(value)
        for value in (stride, padding, dilation)
    )
    rows, columns = padding
    return stand_in(
        nn.Conv2d,
        layer,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode="zeros",
        kernel_size=tuple(weight.shape[2:]),
        in_channels=weight.shape[1] * groups,
        out_channels=weight.shape[0],
        transposed=False,
        output_padding=(0, 0),
        _reversed_padding_repeated_twice=[columns, columns, rows, rows],
    )


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
