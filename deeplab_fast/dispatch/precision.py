"""The precisions in which a model's program computes on the CPU, and which holds for a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from . import limits

PRECISIONS = ("fp32", "bf16", "int8")

_asked: ContextVar[str | None] = ContextVar("precision", default=None)


@dataclass(frozen=True)
class Precision:
    """What a program computes in.

    Attributes:
        name: one of `PRECISIONS`.
        logits_dtype: of its results.
    """

    name: str = "fp32"
    logits_dtype: torch.dtype = torch.float32


def check_precision(name: object) -> str:
    """A name of `PRECISIONS`.

    Raises:
        ValueError: another one.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision is {name!r}, expected one of {', '.join(PRECISIONS)}")
    return str(name)


def reason_against(name: str, calibration: object) -> str:
    """Why a model with this calibration cannot compute in a precision on this CPU, and what to do;
    "" where it can."""
    if name == "bf16" and (reason := limits.cpu_bf16()):
        return f"precision bf16: {reason}; use fp32 or int8"
    if name == "int8":
        if reason := limits.cpu_int8():
            return f"precision int8: {reason}; use fp32"
        if calibration is None:
            return (
                "precision int8: the ranges of the model's maps are not known; call "
                "model.calibrate(images) with some photos of the kind it will see, or load a "
                "calibrated file"
            )
    return ""


def of_call(own: str) -> Precision:
    """The precision of a call on the CPU: autocast's, asked for by name, or the model's own."""
    if torch.is_autocast_enabled("cpu"):
        return Precision("bf16", torch.bfloat16)
    return Precision(_asked.get() or own)


def asked_for() -> str | None:
    """The precision that was asked for by name, None for none."""
    return _asked.get()


@contextmanager
def asked(name: str | None) -> Iterator[None]:
    """Calls of this thread inside compute in a precision, None for the models' own."""
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)
