"""Which implementation of an op runs, and why: `use_backend`, `why`, and what they rest on."""

from .dispatch.choice import (
    ENVIRONMENT_VARIABLE,
    BackendUnavailable,
    Why,
    current_backend,
    explain,
    run,
    select,
    use_backend,
    why,
)
from .dispatch.declare import BACKENDS, Implementation, implementations, register, registered_ops
from .dispatch.describe import OpDesc

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "BackendUnavailable",
    "Implementation",
    "OpDesc",
    "Why",
    "current_backend",
    "explain",
    "implementations",
    "register",
    "registered_ops",
    "run",
    "select",
    "use_backend",
    "why",
]
