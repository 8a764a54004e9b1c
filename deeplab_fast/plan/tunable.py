"""What a kernel's configurations are chosen by, and which may be measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from .device import Device


class Facts(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


Key = TypeVar("Key", bound=Facts)
Config = TypeVar("Config", bound=Facts)


@dataclass(frozen=True)
class Tunable(Generic[Key, Config]):
    """What the configurations of a kernel are.

    Attributes:
        kernel: its name in records.
        key: frozen dataclass of the facts of a call.
        config: frozen dataclass of a configuration.
        candidates: (key, device) -> configurations that may be chosen.
        rule: (key, device) -> the configuration where none was measured.
        problem: (key, config, device) -> why a configuration cannot run on a device, or "".
    """

    kernel: str
    key: type[Key]
    config: type[Config]
    candidates: Callable[[Key, Device], list[Config]]
    rule: Callable[[Key, Device], Config]
    problem: Callable[[Key, Config, Device], str] = lambda key, config, device: ""
