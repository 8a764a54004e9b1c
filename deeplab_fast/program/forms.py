"""The layers that programs are made of on the CPU, by precision."""

from __future__ import annotations

from .. import _ext
from ..dispatch.precision import Precision
from .bf16_layers import Bf16Forms
from .calibration import Calibration
from .cpu_layers import CpuForms
from .inference import Forms
from .int8_layers import Int8Forms


def forms_of(precision: Precision, calibration: object, portable: bool = False) -> Forms:
    """The layers of a precision for a model with this calibration.

    Args:
        precision, calibration: as of the model.
        portable: as for `Int8Forms`.

    Raises:
        ValueError: int8 without a calibration.
    """
    if not portable:
        _ext.warn_of_missing_cpu()
    if precision.name == "int8":
        if not isinstance(calibration, Calibration):
            raise ValueError(
                f"precision int8: model.calibration is a {type(calibration).__name__}, expected "
                "what model.calibrate(images) sets"
            )
        return Int8Forms(calibration, portable)
    if precision.name == "bf16":
        return Bf16Forms(precision.logits_dtype)
    return CpuForms()
