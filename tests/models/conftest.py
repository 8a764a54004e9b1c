"""Fixtures of tests of inference programs."""

from __future__ import annotations

import pytest
from torch import nn

from deeplab_fast.program import inference


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The model of every preparation."""
    made: list[nn.Module] = []
    original = inference.fold

    def counted(model: nn.Module, *forms: object, **options: object) -> object:
        made.append(model)
        return original(model, *forms, **options)

    monkeypatch.setattr(inference, "fold", counted)
    return made
