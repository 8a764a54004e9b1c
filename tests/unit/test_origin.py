"""What a flow was found in."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from deeplab_fast.program.origin import Contents


@pytest.mark.parametrize(
    ("generator", "draw"),
    [
        (random.Random(0), lambda g: g.random()),
        # Half of a pair is kept beside the state.
        (random.Random(0), lambda g: g.gauss(0, 1)),
        (np.random.RandomState(0), lambda g: g.rand()),
        (np.random.RandomState(0), lambda g: g.randn()),
        (np.random.Generator(np.random.PCG64(0)), lambda g: g.random()),
        # A dict with arrays in a dict.
        (np.random.Generator(np.random.MT19937(0)), lambda g: g.random()),
        (np.random.Generator(np.random.Philox(0)), lambda g: g.random()),
        (np.random.Generator(np.random.SFC64(0)), lambda g: g.random()),
        (torch.Generator().manual_seed(0), lambda g: float(torch.rand(1, generator=g))),
    ],
)
def test_random_numbers_that_were_drawn_are_put_back(
    generator: Any, draw: Callable[[Any], float]
) -> None:
    contents = Contents([generator])
    assert not contents.put_back()
    drawn = draw(generator)
    assert contents.put_back()
    assert not contents.put_back()
    assert draw(generator) == drawn
