"""Learning rates: the poly schedule with warm-up, and a model's parameters in named groups."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["parameter_groups", "poly_factor", "poly_lr"]

# In the order of the groups.
_PARTS = ("backbone", "classifier", "aux_classifier")
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def poly_factor(
    step: int,
    total_steps: int,
    power: float = 0.9,
    warmup_steps: int = 0,
    warmup_factor: float = 1e-3,
    end_factor: float = 0.0,
) -> float:
    """Factor of the learning rate at `step`: linear warm-up, then the poly schedule.

        warm-up, step < warmup_steps:  warmup_factor + (1 - warmup_factor) step / warmup_steps
        poly, then:                    end_factor + (1 - end_factor) (1 - t)^power
                                       t = (step - warmup_steps) / (total_steps - warmup_steps)

    Without warm-up and end_factor this is (1 - step / total_steps)^power.

    Args:
        step: optimizer steps done, from 0; from total_steps on the factor is end_factor.
        total_steps: optimizer steps of the whole run, with the warm-up.
        power: exponent, above 0.
        warmup_steps: steps of the warm-up, fewer than total_steps.
        warmup_factor: factor of the first step of a warm-up, in [0, 1].
        end_factor: factor at the end, in [0, 1].

    Raises:
        ValueError: a number out of its range.

    Source: arXiv 1606.00915, section 4.1, and arXiv 1706.05587, section 4.1 ("poly" with power
    0.9); warm-up before it as in torchvision's reference training (LinearLR, then PolynomialLR).
    """
    _check_schedule(total_steps, power, warmup_steps, warmup_factor, end_factor)
    if step < 0:
        raise ValueError(f"step must be 0 or more, got {step}")
    if step < warmup_steps:
        return warmup_factor + (1.0 - warmup_factor) * step / warmup_steps
    left = max(0, total_steps - step) / (total_steps - warmup_steps)
    return end_factor + (1.0 - end_factor) * left**power


def poly_lr(
    optimizer: Optimizer,
    total_steps: int,
    power: float = 0.9,
    warmup_steps: int = 0,
    warmup_factor: float = 1e-3,
    end_factor: float = 0.0,
    *,
    last_epoch: int = -1,
) -> LambdaLR:
    """A scheduler that multiplies each group's learning rate by `poly_factor`.

    Call its ``step()`` once for each optimizer step (Lightning: interval "step"). It can be
    pickled. Its state_dict holds the step and the base learning rates, not the arguments here: a
    run that is resumed with another total_steps goes on, at its step, on the new curve.

    Args:
        optimizer: its groups' present learning rates are the base.
        total_steps, power, warmup_steps, warmup_factor, end_factor: as in `poly_factor`.
        last_epoch: the last step done, as in torch.optim.lr_scheduler; -1 to start.

    Raises:
        ValueError: a number out of its range.
    """
    _check_schedule(total_steps, power, warmup_steps, warmup_factor, end_factor)
    # A partial can be pickled, a closure cannot.
    factor = functools.partial(
        poly_factor,
        total_steps=total_steps,
        power=power,
        warmup_steps=warmup_steps,
        warmup_factor=warmup_factor,
        end_factor=end_factor,
    )
    return LambdaLR(optimizer, factor, last_epoch=last_epoch)


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float,
    backbone_lr_factor: float = 1.0,
    aux_lr_factor: float = 1.0,
    decay_norm_and_bias: bool = True,
    no_decay: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The trainable parameters of a DeepLabv3 model as groups for an optimizer.

    Groups are named after the part they belong to: "backbone" (learning rate
    lr * backbone_lr_factor), "classifier" (lr) and "aux_classifier" (lr * aux_lr_factor), each
    followed by "<part>/no_decay" (weight_decay 0) where some of its parameters have no decay.
    Trainable parameters outside the three parts are in "other" (lr). Each trainable parameter is
    in exactly one group, a shared one in that of its first name; groups without any are left out.

    Args:
        model: with attributes `backbone`, `classifier` and, maybe, `aux_classifier` (None counts
            as absent).
        lr: base learning rate, 0 or more.
        weight_decay: of the groups that have one, 0 or more.
        backbone_lr_factor, aux_lr_factor: factors of lr, 0 or more.
        decay_norm_and_bias: False takes parameters of normalisation layers and all biases out of
            weight decay.
        no_decay: shell patterns of parameter names that get none ("backbone.conv1.*").

    Returns:
        Dicts with "name", "params", "lr" and "weight_decay".

    Raises:
        TypeError: a model without `backbone` or `classifier`, such as one wrapped by DDP.
        ValueError: a negative number, a pattern that fits no parameter, or nothing to train.

    Source: torchvision's reference training (auxiliary head at ten times the rate).
    """
    missing = [part for part in _PARTS[:2] if not isinstance(getattr(model, part, None), nn.Module)]
    if missing:
        raise TypeError(
            f"parameter_groups takes a DeepLabV3, got {type(model).__name__} without "
            f"{' and '.join(missing)}; give the model inside a wrapper"
        )
    numbers = {
        "lr": lr,
        "weight_decay": weight_decay,
        "backbone_lr_factor": backbone_lr_factor,
        "aux_lr_factor": aux_lr_factor,
    }
    for name, value in numbers.items():
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} must be 0 or more and finite, got {value}")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    unused = [p for p in no_decay if not any(fnmatchcase(name, p) for name in names)]
    if unused:
        raise ValueError(
            f"no_decay patterns {unused} fit no parameter of {type(model).__name__}; names are "
            f"like {names[:3]}"
        )
    factors = {"backbone": backbone_lr_factor, "aux_classifier": aux_lr_factor}
    groups: dict[str, dict[str, Any]] = {}
    for part in (*_PARTS, "other"):
        for suffix, decay in (("", weight_decay), ("/no_decay", 0.0)):
            groups[part + suffix] = {
                "name": part + suffix,
                "params": [],
                "lr": lr * factors.get(part, 1.0),
                "weight_decay": decay,
            }
    for name, parameter, of_norm in _named_parameters(model):
        if not parameter.requires_grad:
            continue
        part = name.split(".", 1)[0]
        if part not in _PARTS:
            part = "other"
        exempt = not decay_norm_and_bias and (of_norm or name.rsplit(".", 1)[-1] == "bias")
        if exempt or any(fnmatchcase(name, pattern) for pattern in no_decay):
            part += "/no_decay"
        groups[part]["params"].append(parameter)
    filled = [group for group in groups.values() if group["params"]]
    if not filled:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad")
    return filled


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """(name, parameter, whether it belongs to a normalisation layer), each parameter once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter, isinstance(module, _NORMS)


def _check_schedule(
    total_steps: int, power: float, warmup_steps: int, warmup_factor: float, end_factor: float
) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps must be 1 or more, got {total_steps}")
    if not 0.0 < power < math.inf:
        raise ValueError(f"power must be above 0 and finite, got {power}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must be 0 or more and below total_steps={total_steps}, got "
            f"{warmup_steps}"
        )
    for name, value in (("warmup_factor", warmup_factor), ("end_factor", end_factor)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
