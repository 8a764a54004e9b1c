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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..dispatch import records, trust
from ..plan import rules, upsample
from ..plan.device import Device
from ..plan.tunable import Config, Key, Tunable

logger = logging.getLogger("deeplab_fast")


TUNABLE: dict[str, Tunable[Any, Any]] = {
    tunable.kernel: tunable
    for tunable in (
        upsample.ARGMAX,
        upsample.CONFUSION,
        upsample.SOFTMAX_ADD,
        upsample.LOSS,
        upsample.LOSS_AND_GRADIENT,
        rules.BRANCHES,
        rules.POINTWISE,
    )
}

# What `forced` asks for, by kernel: the configuration, None for the rule's, and who asked.
_forced: dict[str, tuple[Any, list[tuple[Any, Device]]]] = {}


def choose(tunable: Tunable[Key, Config], key: Key, device: Device) -> Config:
    """The configuration of a call: the measured one, else the rule's.

    Args:
        tunable: the kernel.
        key: the call.
        device: the GPU.
    """
    config = measured(tunable, key, device)
    return tunable.rule(key, device) if config is None else config


def measured(tunable: Tunable[Key, Config], key: Key, device: Device) -> Config | None:
    """The measured configuration of a call; None where the rule's is to run."""
    kernel = tunable.kernel
    if kernel in _forced:
        config, asked = _forced[kernel]
        if (key, device) not in asked:
            asked.append((key, device))
        return config
    found = trust.configs(kernel, "triton", device.capability)
    return _entries(tunable, device, found).get(key) if found else None


@contextmanager
def forced(kernel: str, config: object | None) -> Iterator[list[tuple[Any, Device]]]:
    """Make the launcher of a kernel take a configuration, whatever the call and the records.

    Args:
        kernel: name in `TUNABLE`.
        config: None for the rule's choice.

    Yields:
        The (key, device) that launchers ask for, each once.
    """
    before = _forced.get(kernel)
    asked: list[tuple[Any, Device]] = []
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


def read(
    found: records.Config, tunable: Tunable[Key, Config], device: Device
) -> tuple[Key, Config]:
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
    tunable: Tunable[Key, Config], device: Device, found: tuple[records.Config, ...]
) -> dict[Key, Config]:
    kernel = tunable.kernel
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
