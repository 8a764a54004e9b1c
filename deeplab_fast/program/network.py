"""What the fast path and the training forms take."""

from __future__ import annotations

from typing import Any

from torch import nn


class Network(nn.Module):
    """A segmentation model of the form that `DeepLabV3` has, and says the meaning of."""

    backbone: nn.Module
    classifier: nn.Module
    aux_classifier: nn.Module | None
    align_corners: bool
    classes: tuple[str, ...] | None
    palette: tuple[tuple[int, int, int], ...] | None
    config: tuple[str, dict[str, Any]] | None
    fast: bool
    fused: bool
    max_extra_bytes: int | None
    precision: str = "fp32"
    # Ranges of the maps for int8, or None.
    calibration: Any = None
    cuda_graphs: bool | None = None

    def parts(self, aux: bool = True) -> list[tuple[str, nn.Module]]:
        """Backbone and heads by name, the auxiliary head only if asked for."""
        parts = [("backbone", self.backbone), ("classifier", self.classifier)]
        if aux and self.aux_classifier is not None:
            parts.append(("aux_classifier", self.aux_classifier))
        return parts
