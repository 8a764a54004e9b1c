"""The resizing of photos in exported files, by products of matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deeplab_fast.exporting.graph import resize_matrix


@pytest.mark.parametrize(
    ("size", "target"),
    [(258, 130), (1000, 37), (100, 300), (77, 77), (5, 1), (1, 5), (33, 32)],
    ids=["half", "far-down", "up", "same", "to-one", "from-one", "by-one"],
)
def test_as_pytorchs_antialiased_interpolation(size, target):
    torch.manual_seed(0)
    x = torch.rand(1, 1, size, 9) * 255
    wanted = F.interpolate(x, (target, 9), mode="bilinear", antialias=True, align_corners=False)
    matrix = resize_matrix(size, target)
    assert matrix.shape == (target, size) and matrix.dtype == torch.float32
    # Positions up to 1000 have 2^-14 of a pixel in fp32, of 255 levels between two of them.
    assert float((matrix @ x - wanted).abs().max()) < 255 * 2**-14
    if size == target:
        assert torch.equal(matrix, torch.eye(size))
