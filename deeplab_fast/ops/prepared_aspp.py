"""The ASPP of `PreparedConv`s: its branches into slices of one buffer, and its projection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .prepared import Plan, PreparedConv, check_fp32_cpu, check_weight, empty, fold


class PreparedAspp:
    """All ASPP branches, each 1x1 or 3x3 with its dilation, written into slices of one buffer.

    y = concat over branches b of relu(scale_b * conv(x, weight_b, dilation_b) + shift_b).

    Args:
        weights, scales, shifts, dilations: as for `ops.aspp_branches`, fp32 on the CPU.
        max_extra_bytes: as for `PreparedConv`, of all branches together.
        reuse: as for `PreparedConv`.

    Raises:
        ValueError: tensors or options that do not fit.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        scales: Sequence[Tensor],
        shifts: Sequence[Tensor],
        dilations: Sequence[int],
        max_extra_bytes: int | None = None,
        *,
        reuse: bool = True,
    ) -> None:
        counts = [len(weights), len(scales), len(shifts), len(dilations)]
        if min(counts) < 1 or len(set(counts)) > 1:
            raise ValueError(
                "PreparedAspp: weights, scales, shifts and dilations must have one entry for each "
                f"of at least one branch, got {counts}"
            )
        for b, weight in enumerate(weights):
            check_weight(f"PreparedAspp: weights[{b}]", weight)
            if weight.shape[1] != weights[0].shape[1] or tuple(weight.shape[2:]) not in (
                (1, 1),
                (3, 3),
            ):
                raise ValueError(
                    f"PreparedAspp: weights[{b}] has shape {list(weight.shape)}, expected "
                    f"[K, {weights[0].shape[1]}, 1, 1] or [K, {weights[0].shape[1]}, 3, 3]"
                )
        self.branches = tuple(
            PreparedConv(
                w,
                a,
                b,
                padding=d * (w.shape[-1] // 2),
                dilation=d,
                act="relu",
                reuse=reuse,
                coarse=True,
            )
            for w, a, b, d in zip(weights, scales, shifts, dilations, strict=True)
        )
        self.in_channels = self.branches[0].in_channels
        self.out_channels = sum(b.out_channels for b in self.branches)
        self.max_extra_bytes = max_extra_bytes

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [N, C, H, W], fp32, any strides -> [N, sum K_b, H, W] in channels_last, which may be
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

    def _share_bound(self, branch: PreparedConv) -> None:
        # What the other branches do not hold is left to this one.
        if self.max_extra_bytes is not None:
            others = self.extra_bytes - branch.extra_bytes
            branch.max_extra_bytes = max(0, self.max_extra_bytes - others)

    def plan(self, shape: Sequence[int], threads: int | None = None) -> tuple[Plan, ...]:
        """What each branch runs; arguments as for `PreparedConv.plan`."""
        for branch in self.branches:
            self._share_bound(branch)
        return tuple(branch.plan(shape, threads) for branch in self.branches)

    def prepare(self, shape: Sequence[int]) -> None:
        """Prepare the weights that a call on an input of this shape needs."""
        for branch in self.branches:
            self._share_bound(branch)
            branch.prepare(shape)

    @property
    def extra_bytes(self) -> int:
        """Bytes of prepared weights now held beyond the original ones."""
        return sum(branch.extra_bytes for branch in self.branches)


class PreparedProject:
    """y = act(scale * (W . concat(branches, upsample(pooled))) + shift), without the concat.

    Args:
        weight: [K, B + P, 1, 1], fp32 on the CPU, input channels of the branches, then of pooled.
        scale, shift: [K], or None for one and zero.
        branch_channels: B.
        act: as for `PreparedConv`.
        max_extra_bytes, reuse: as for `PreparedConv`.

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
        reuse: bool = True,
    ) -> None:
        check_weight("PreparedProject", weight)
        if tuple(weight.shape[2:]) != (1, 1) or not 0 < branch_channels <= weight.shape[1]:
            raise ValueError(
                f"PreparedProject: weight has shape {list(weight.shape)}, expected "
                f"[K, B + P, 1, 1] with B = branch_channels={branch_channels}"
            )
        folded, shift = fold("PreparedProject", weight, scale, shift)
        self.branch_channels = branch_channels
        self.pooled_channels = weight.shape[1] - branch_channels
        self.out_channels = weight.shape[0]
        self._to_pooled = folded[:, branch_channels:, 0, 0].t().contiguous()
        self._conv = PreparedConv(
            folded[:, :branch_channels],
            None,
            shift,
            act=act,
            max_extra_bytes=max_extra_bytes,
            reuse=reuse,
        )

    def __call__(self, branches: Tensor, pooled: Tensor, out: Tensor | None = None) -> Tensor:
        """branches [N, B, H, W], pooled [N, P], fp32 -> [N, K, H, W] in channels_last, which may be
        given as `out`."""
        shape = self._conv.check_input(branches)
        if tuple(pooled.shape) != (shape[0], self.pooled_channels):
            raise ValueError(
                f"PreparedProject: pooled has shape {list(pooled.shape)}, expected "
                f"[{shape[0]}, {self.pooled_channels}]"
            )
        check_fp32_cpu("PreparedProject", "pooled", pooled)
        with torch.no_grad():
            shifts = torch.addmm(self._conv.shift, pooled, self._to_pooled)
        return self._conv.shifted(branches, shifts, out)

    def folded(self) -> tuple[Tensor, Tensor]:
        """(scale * weight [K, B + P, 1, 1], shift [K])."""
        weight, shift = self._conv.folded()
        return torch.cat([weight, self._to_pooled.t()[:, :, None, None]], 1), shift

    @property
    def act(self) -> str | None:
        """The activation."""
        return self._conv.act

    def plan(self, shape: Sequence[int], threads: int | None = None) -> Plan:
        """What a call runs for branches of this shape; arguments as for `PreparedConv.plan`."""
        return self._conv.plan(shape, threads)

    def prepare(self, shape: Sequence[int]) -> None:
        """Prepare the weights that a call on branches of this shape needs."""
        self._conv.prepare(shape)

    @property
    def extra_bytes(self) -> int:
        """Bytes of prepared weights now held beyond the original ones."""
        return self._conv.extra_bytes
