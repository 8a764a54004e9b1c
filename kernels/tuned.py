"""Launch configurations that were measured to be faster than the rule's choice.

They are part of the records of a kernel (`dispatch.records`), by what the rule would rest on
(`configs.TUNABLE` has the dataclasses of both). One is taken where the record counts on this
compute capability and the configuration is among the kernel's candidates, which the tests compile.
Nothing is tuned at run time: a choice depends on the sizes of the call and on files that do not
change, so that results are the same from run to run.

Importing this module does not import Triton.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..dispatch import records, trust

if TYPE_CHECKING:
    from .configs import Device

logger = logging.getLogger("deeplab_fast")


@dataclass(frozen=True)
class Tunable:
    """What the configurations of a kernel are.

    Attributes:
        key: frozen dataclass of the facts of a call.
        config: frozen dataclass of a configuration.
        candidates: (key, device) -> configurations that may be chosen.
        problem: (key, config, device) -> why a configuration cannot run on a device, or "".
    """

    key: type
    config: type
    candidates: Callable[[Any, Device], list[Any]]
    problem: Callable[[Any, Any, Device], str] = lambda key, config, device: ""


# What `forced` asks for, by kernel: the configuration, None for the rule's, and who asked.
_forced: dict[str, tuple[Any, list[tuple[Any, Any]]]] = {}


def find(kernel: str, tunable: Tunable, key: Any, device: Device) -> Any | None:
    """The measured configuration of a call; None where there is none.

    Args:
        kernel: name in `configs.TUNABLE`.
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
        kernel: name in `configs.TUNABLE`.
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
