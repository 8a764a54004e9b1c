"""The ASPP of `Bf16Conv`s: its branches into slices of one buffer, and its projection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .prepared import Plan, check_fp32_cpu, check_weight, fold
from .prepared_bf16 import DTYPE, Bf16Conv, empty


class Bf16Aspp:
    """As `PreparedAspp`, of bf16 maps.

    Args:
        weights, scales, shifts, dilations: of the branches, 1x1 or 3x3, fp32 on the CPU.
        max_extra_bytes: as for `PreparedConv`, of all branches together.

    Raises:
        ValueError: tensors or options that do not fit.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        scales: Sequence[Tensor | None],
        shifts: Sequence[Tensor | None],
        dilations: Sequence[int],
        max_extra_bytes: int | None = None,
    ) -> None:
        self.branches = tuple(
            Bf16Conv(w, a, b, padding=d * (w.shape[-1] // 2), dilation=d)
            for w, a, b, d in zip(weights, scales, shifts, dilations, strict=True)
        )
        self.out_channels = sum(b.out_channels for b in self.branches)
        self.max_extra_bytes = max_extra_bytes

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [N, C, H, W], any strides -> bf16 [N, sum K_b, H, W] in channels_last, which may be
        given as `out`."""
        shape = self.branches[0].check_input(x)
        y = empty((shape[0], self.out_channels, *shape[2:])) if out is None else out
        x = x.contiguous(memory_format=torch.channels_last)
        offset = 0
        for branch in self.branches:
            self._share_bound(branch)
            branch(x, out=y, channel_offset=offset)
            offset += branch.out_channels
        return y

    def _share_bound(self, branch: Bf16Conv) -> None:
        # What the other branches do not hold is left to this one.
        if self.max_extra_bytes is not None:
            others = self.extra_bytes - branch.extra_bytes
            branch.max_extra_bytes = max(0, self.max_extra_bytes - others)

    def plan(self, shape: Sequence[int], threads: int | None = None) -> tuple[Plan, ...]:
        """What each branch runs; arguments as for `PreparedConv.plan`."""
        for branch in self.branches:
            self._share_bound(branch)
        return tuple(branch.plan(shape, threads) for branch in self.branches)

    @property
    def extra_bytes(self) -> int:
        """Bytes of prepared weights now held beyond the original ones."""
        return sum(branch.extra_bytes for branch in self.branches)


class Bf16Project:
    """As `PreparedProject`: the branches are bf16, the pooled vector and what it adds are fp32.

    Args:
        weight: [K, B + P, 1, 1], fp32 on the CPU, input channels of the branches, then of pooled.
        scale, shift, branch_channels, act, max_extra_bytes: as for `PreparedProject`.
        out_dtype: of the result.

    Raises:
        ValueError: tensors or options that do not fit.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        *,
        branch_channels: int,
        act: str | None = "relu",
        max_extra_bytes: int | None = None,
        out_dtype: torch.dtype = DTYPE,
    ) -> None:
        check_weight("Bf16Project", weight)
        if tuple(weight.shape[2:]) != (1, 1) or not 0 < branch_channels <= weight.shape[1]:
            raise ValueError(
                f"Bf16Project: weight has shape {list(weight.shape)}, expected "
                f"[K, B + P, 1, 1] with B = branch_channels={branch_channels}"
            )
        folded, shift = fold("Bf16Project", weight, scale, shift)
        self.out_channels = weight.shape[0]
        self._pooled_channels = weight.shape[1] - branch_channels
        self._to_pooled = folded[:, branch_channels:, 0, 0].t().contiguous()
        self.conv = Bf16Conv(
            folded[:, :branch_channels],
            None,
            shift,
            act=act,
            max_extra_bytes=max_extra_bytes,
            out_dtype=out_dtype,
        )

    def __call__(self, branches: Tensor, pooled: Tensor, out: Tensor | None = None) -> Tensor:
        """branches [N, B, H, W], pooled [N, P] in fp32 -> [N, K, H, W] in channels_last, which may
        be given as `out`."""
        shape = self.conv.check_input(branches)
        check_fp32_cpu("Bf16Project", "pooled", pooled)
        if tuple(pooled.shape) != (shape[0], self._pooled_channels):
            raise ValueError(
                f"Bf16Project: pooled has shape {list(pooled.shape)}, expected "
                f"[{shape[0]}, {self._pooled_channels}]"
            )
        with torch.no_grad():
            shifts = torch.addmm(self.conv.shift, pooled, self._to_pooled)
        return self.conv.shifted(branches, shifts, out)

    def folded(self) -> tuple[Tensor, Tensor]:
        """(scale * weight [K, B + P, 1, 1] in bf16, shift [K] in fp32)."""
        weight, shift = self.conv.folded()
        to_pooled = self._to_pooled.t()[:, :, None, None].to(weight.dtype)
        return torch.cat([weight, to_pooled], 1), shift

    @property
    def act(self) -> str | None:
        """The activation."""
        return self.conv.act

    def plan(self, shape: Sequence[int], threads: int | None = None) -> Plan:
        """What a call runs for branches of this shape; arguments as for `PreparedConv.plan`."""
        return self.conv.plan(shape, threads)

    @property
    def extra_bytes(self) -> int:
        """Bytes of prepared weights now held beyond the original ones."""
        return self.conv.extra_bytes
