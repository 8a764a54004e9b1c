"""Parameters of the ASPP's branches as GPU kernels read them, and maps.

The branches' kernels read filters from one matrix. `PackedBranches` makes it once; its `weights`,
`scales` and `shifts` are views of it in the shapes that the ops take, and an op called with them
finds the matrix again without a copy. Other weights are packed at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .taps import Branch


@dataclass(frozen=True)
class PackedBranches:
    """Filters, scales and shifts of all branches as the kernel reads them.

    Attributes:
        weight: [sum taps K, C], contiguous; rows in the order branch, tap, filter.
        scale, shift: [sum K] fp32, contiguous.
        branches: geometry of the branches.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    branches: tuple[Branch, ...]

    @classmethod
    @torch.no_grad()
    def pack(
        cls,
        weights: Sequence[Tensor],
        scales: Sequence[Tensor],
        shifts: Sequence[Tensor],
        dilations: Sequence[int],
    ) -> PackedBranches:
        """Pack the arguments of `ops.aspp_branches`; views of an earlier pack are not copied.

        Args:
            weights: for each branch [K_b, C, 1, 1] or [K_b, C, 3, 3], one dtype and device.
            scales, shifts: for each branch [K_b].
            dilations: for each branch an int.
        """
        branches = branches_of(weights, dilations)
        return cls(pack_weights(weights), _vector(scales), _vector(shifts), branches)

    @property
    def weights(self) -> list[Tensor]:
        """For each branch its filters [K, C, kernel, kernel], a view."""
        return unpack_weights(self.weight, self.branches)

    @property
    def scales(self) -> list[Tensor]:
        """For each branch its scale [K], a view."""
        return list(self.scale.split([b.channels for b in self.branches]))

    @property
    def shifts(self) -> list[Tensor]:
        """For each branch its shift [K], a view."""
        return list(self.shift.split([b.channels for b in self.branches]))

    @property
    def dilations(self) -> list[int]:
        """For each branch its dilation."""
        return [b.dilation for b in self.branches]


def branches_of(weights: Sequence[Tensor], dilations: Sequence[int]) -> tuple[Branch, ...]:
    """The geometry of branches with these weights [K_b, C, kernel, kernel]."""
    return tuple(
        Branch(w.shape[0], w.shape[-1], int(d)) for w, d in zip(weights, dilations, strict=True)
    )


def pack_weights(weights: Sequence[Tensor]) -> Tensor:
    """Filters of all branches as one matrix; views of an earlier one are not copied.

    Args:
        weights: for each branch [K_b, C, kernel, kernel], one dtype and device.

    Returns:
        [sum taps K, C], contiguous; rows in the order branch, tap, filter.
    """
    # Tap by tap a matrix [K, C] in which channels are contiguous.
    matrices = [w.permute(2, 3, 0, 1) for w in weights]
    weight = _joined(matrices)
    if weight is None:
        weight = weights[0].new_empty(sum(m.numel() for m in matrices))
        # Each is read and written once; a concatenation would copy them to make them dense.
        for part, m in zip(weight.split([m.numel() for m in matrices]), matrices, strict=True):
            part.view(m.shape).copy_(m)
    return weight.view(-1, weights[0].shape[1])


def unpack_weights(matrix: Tensor, branches: Sequence[Branch]) -> list[Tensor]:
    """For each branch its filters [K, C, kernel, kernel], a view of `pack_weights`'s matrix."""
    return [
        part.view(b.kernel, b.kernel, b.channels, -1).permute(2, 3, 0, 1)
        for part, b in zip(
            matrix.split([b.taps * b.channels for b in branches]), branches, strict=True
        )
    ]


def _vector(parts: Sequence[Tensor]) -> Tensor:
    """The parts one behind the other, in fp32."""
    joined = _joined(parts) if parts[0].dtype == torch.float32 else None
    return torch.cat([fp32(p) for p in parts]) if joined is None else joined


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensors as one [elements] view, where they lie in one storage without gaps, in order."""
    first = parts[0]
    storage = first.untyped_storage().data_ptr()
    end = first.storage_offset()
    for part in parts:
        apart = part.storage_offset() != end or part.untyped_storage().data_ptr() != storage
        if apart or part.dtype != first.dtype or not part.is_contiguous():
            return None
        end += part.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))


def fp32(x: Tensor) -> Tensor:
    """A contiguous fp32 tensor of the same values."""
    return x.to(torch.float32).contiguous()


def channels_inside(x: Tensor) -> Tensor:
    """x, copied to channels_last where its channels are not next to each other."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def empty_map(x: Tensor, channels: int) -> Tensor:
    """A map [N, channels, H, W] for a result of x [N, C, H, W], channels_last."""
    n, _, height, width = x.shape
    return torch.empty(
        (n, channels, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
