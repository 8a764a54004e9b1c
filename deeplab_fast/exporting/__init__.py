"""Models as files for other runtimes: ONNX, OpenVINO, torch.export, AOTInductor; and such files as
models that `predict` takes.

`graph` has what the file computes, `description` what it says about itself, `formats` writes it,
`runtimes` runs it, `check` compares both; `api.export` is all of that, `load` the way back.
"""

from ..data.preprocess import InputSizeError
from .api import ExportError, ExportReport, export
from .description import Description, DescriptionError
from .formats import FORMATS, PACKAGES
from .load import ExportedModel, is_exported, load_exported

__all__ = [
    "FORMATS",
    "PACKAGES",
    "Description",
    "DescriptionError",
    "ExportError",
    "ExportReport",
    "ExportedModel",
    "InputSizeError",
    "export",
    "is_exported",
    "load_exported",
]
