"""Launch configurations that were measured to be faster than the rule's choice.

They are part of the records of a kernel (`dispatch.records`), by what the rule would rest on
(`TUNABLE` has the dataclasses of both). One is taken where the record counts on this
compute capability and the configuration is among the kernel's candidates, which the tests compile.
Nothing is tuned at run time: a choice depends on the sizes of the call and on files that do not
change, so that results are the same from run to run.

Importing this module does not import Triton.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..dispatch import records, trust
from ..plan import gemm, upsample
from ..plan.device import Device
from ..plan.gemm import BranchesKey, GemmConfig, PointwiseKey
from ..plan.taps import Branch
from ..plan.tunable import Tunable
from ..plan.upsample import UpsampleConfig, UpsampleKey

logger = logging.getLogger("deeplab_fast")


TUNABLE: dict[str, Tunable] = {**upsample.TUNABLE, **gemm.TUNABLE}

# What `forced` asks for, by kernel: the configuration, None for the rule's, and who asked.
_forced: dict[str, tuple[Any, list[tuple[Any, Any]]]] = {}


def find(kernel: str, tunable: Tunable, key: Any, device: Device) -> Any | None:
    """The measured configuration of a call; None where there is none.

    Args:
        kernel: name in `TUNABLE`.
        tunable: that entry.
        key: the call, an instance of `tunable.key`.
        device: the GPU.
    """
    if kernel in _forced:
        config, asked = _forced[kernel]
        if (key, device) not in asked:
            asked.append((key, device))
        return config
    found = trust.configs(kernel, "triton", device.capability)
    return _entries(kernel, tunable, device, found).get(key) if found else None


@contextmanager
def forced(kernel: str, config: Any | None) -> Iterator[list[tuple[Any, Any]]]:
    """Make the launcher of a kernel take a configuration, whatever the call and the records.

    Args:
        kernel: name in `TUNABLE`.
        config: None for the rule's choice.

    Yields:
        The (key, device) that launchers ask for, each once.
    """
    before = _forced.get(kernel)
    asked: list[tuple[Any, Any]] = []
    _forced[kernel] = config, asked
    try:
        yield asked
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before


def entry(key: Any, config: Any, kernel: str, gain: float) -> records.Config:
    """The part of a record that says that a call is fastest with a configuration."""
    # As JSON has them: tuples are lists there.
    fields = [json.loads(json.dumps(dataclasses.asdict(part))) for part in (key, config)]
    return records.Config(kernel, fields[0], fields[1], gain)


def read(found: records.Config, tunable: Tunable, device: Device) -> tuple[Any, Any]:
    """The key and the configuration of an entry.

    Raises:
        ValueError: fields are unknown, missing or of another type, or the configuration cannot run
            on the device.
    """
    key = records.made(tunable.key, found.key)
    config = records.made(tunable.config, found.config)
    reason = tunable.problem(key, config, device)
    if not reason and config not in tunable.candidates(key, device):
        reason = f"{config} is no candidate for this kernel, device and key"
    if reason:
        raise ValueError(reason)
    return key, config


# What records gave for a kernel on a device, and what was made of it.
_made: dict[tuple[str, Device], tuple[tuple[records.Config, ...], dict[Any, Any]]] = {}


def _entries(
    kernel: str, tunable: Tunable, device: Device, found: tuple[records.Config, ...]
) -> dict[Any, Any]:
    given, made = _made.get((kernel, device), ((), {}))
    # The same tuple for as long as the records are the same.
    if given is found:
        return made
    made = {}
    for number, one in enumerate(found):
        try:
            key, config = read(one, tunable, device)
        except ValueError as error:
            logger.warning(
                "configuration %d of %s is left out, the rule chooses: %s (`deeplab-fast tune "
                "--configurations` measures anew)",
                number,
                kernel,
                error,
            )
            continue
        # Records of one's own come first.
        made.setdefault(key, config)
    _made[kernel, device] = found, made
    return made


def tuned_config(kernel: str, key: Any, device: Device) -> Any | None:
    """The measured configuration of a call on a device; None where the one by rule is to run.

    Args:
        kernel: a name of `TUNABLE`.
        key: the call, of that entry's `key`.
        device: the GPU.
    """
    return find(kernel, TUNABLE[kernel], key, device)


def upsample_config(
    kernel: str,
    shape: Sequence[int],
    out_size: tuple[int, int],
    align_corners: bool,
    dtype: str,
    device: Device,
) -> UpsampleConfig:
    """The measured configuration, else `forward_config`, or `gradient_config` for the kernel that
    also sums gradients.

    Args:
        kernel: a name of `TUNABLE`.
        shape: of the logits, [N, C, h, w].
        out_size: (H, W).
        align_corners: as in torch.nn.functional.interpolate.
        dtype: of the logits, as "bfloat16".
        device: the GPU.
    """
    n, classes, *in_size = shape
    sizes = ((in_size[0], in_size[1]), out_size, bool(align_corners))
    config = tuned_config(kernel, UpsampleKey(n, classes, *sizes, dtype), device)
    if config is not None:
        return config
    return (
        upsample.gradient_config
        if TUNABLE[kernel] is upsample.GRADIENT
        else upsample.forward_config
    )(*sizes)


def aspp_branches_config(
    batch: int,
    height: int,
    width: int,
    channels: int,
    branches: tuple[Branch, ...],
    math: str,
    device: Device,
    aligned: bool = True,
) -> GemmConfig:
    """The measured configuration, else the first candidate, cut where programs have few tiles.

    Args:
        batch, height, width, channels: the input map.
        branches: the branches.
        math: MMA_16BIT, MMA_TF32 or FMA_FP32.
        device: the GPU.
        aligned: operands and result allow accesses of 16 bytes.
    """
    shape = (batch, height, width, channels, branches, math)
    config = tuned_config("aspp_branches", BranchesKey(*shape, aligned), device)
    return config or gemm.branches_rule(*shape, device, aligned)


def pointwise_config(
    groups: int,
    pixels: int,
    channels: int,
    filters: int,
    math: str,
    device: Device,
    aligned: bool = True,
    classes: bool = False,
    residual: bool = False,
) -> GemmConfig:
    """The measured configuration, else the first candidate with a tile for every other
    multiprocessor, or the last.

    Args:
        groups, pixels: rows of the product, `pixels` in each of `groups` that share no tile.
        channels, filters: depth and columns of the product.
        math: MMA_16BIT, MMA_TF32 or FMA_FP32.
        device: the GPU.
        aligned: operands and result allow accesses of 16 bytes.
        classes: a second product follows, for which a tile must hold all filters.
        residual: one is added; measured configurations depend on it.

    Raises:
        ValueError: no tile holds them.
    """
    shape = (groups, pixels, channels, filters, math)
    key = PointwiseKey(*shape, aligned, classes, residual)
    config = tuned_config("pointwise", key, device)
    return config or gemm.pointwise_rule(*shape, device, aligned, classes)
