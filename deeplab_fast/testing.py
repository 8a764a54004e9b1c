"""Helpers for tests, benchmarks and the demo; nothing here is needed to run a model."""

from __future__ import annotations

from types import ModuleType

import torch

# Kept alive: a Library unregisters its ops when it is collected.
_libraries: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, also beside a PyTorch that its binary was not built for.

    Beside a CPU-only PyTorch torchvision's extension does not load, and its import fails on two ops
    whose schemas are missing. They are defined here first; no model of torchvision calls them.

    Raises:
        ImportError: torchvision is not installed, or does not import for another reason.
    """
    try:
        import torchvision
    except RuntimeError:
        if not _libraries:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(library)
        import torchvision
    return torchvision
