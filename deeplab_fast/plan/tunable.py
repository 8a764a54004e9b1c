"""What measured configurations of a kernel are looked up by, and what may be found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .device import Device


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
