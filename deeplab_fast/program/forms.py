"""The layers that programs are made of on the CPU, by precision."""

from __future__ import annotations

from ..dispatch.precision import Precision
from .bf16_layers import Bf16Forms
from .cpu_layers import CpuForms
from .inference import Forms
from .int8_layers import Int8Forms
from .network import Network


def forms_of(precision: Precision, model: Network) -> Forms:
    """The layers of a precision for a model.

    Raises:
        ValueError: the calibration of the model is of other weights.
    """
    if precision.name == "int8" and model.calibration is not None:
        return Int8Forms(model.calibration)
    if precision.name == "bf16":
        return Bf16Forms(precision.logits_dtype)
    return CpuForms()
