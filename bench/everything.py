"""The registry with all cases and providers in it: what looks any up takes it from here."""

from . import model_cases, op_cases, other_models, providers, registry, rivals

__all__ = ["model_cases", "op_cases", "other_models", "providers", "registry", "rivals"]
