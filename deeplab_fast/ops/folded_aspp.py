"""The ASPP of `folded_conv`: its branches side by side, and its projection without the concat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch.declare import Implementation
from ..dispatch.describe import OpDesc
from ..plan.packing import PackedBranches
from ..plan.tables import capturing
from .folded_conv import Filters, FoldedConv, Memo, Settings, gpu_plan, of_vectors, ours
from .prepared import Plan, activate_


class FoldedAspp:
    """y = concat over branches b of relu(conv(x, weight_b, dilation_b) + shift_b).

    One kernel of this package where records say that it is faster, else each branch by its own form
    and a concat.

    Args:
        kernels: 1 or 3 for each branch.
        dilations: for each branch.
        frozen: the filters of every call are the same, and are packed once.
    """

    def __init__(self, kernels: Sequence[int], dilations: Sequence[int], frozen: bool) -> None:
        self.dilations = list(dilations)
        self.convs = [
            FoldedConv((1, 1), [d * (k // 2)] * 2, [d if k > 1 else 1] * 2, 1, "relu")
            for k, d in zip(kernels, dilations, strict=True)
        ]
        self._frozen = frozen
        self._packed: PackedBranches | None = None
        self._choices: Memo[Implementation | None] = Memo()

    def __call__(self, x: Tensor, filters: Sequence[Filters], settings: Settings) -> Tensor:
        """Of x [N, C, H, W], channels_last, and the filters of each branch, of its dtype."""
        kernel = self._kernel(x.shape, x.dtype, x.device, filters, settings)
        if kernel is None:
            parts = zip(self.convs, filters, strict=True)
            return torch.cat([conv(x, f, settings) for conv, f in parts], 1)
        packed = self._packed
        if packed is None:
            packed = PackedBranches.pack(
                [f.weight for f in filters],
                [f.one for f in filters],
                [f.shift for f in filters],
                self.dilations,
            )
            if self._frozen and not capturing(x):
                _wait(x)
                self._packed = packed
        return kernel.run(x, packed.weights, packed.scales, packed.shifts, self.dilations)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the packed filters."""
        return 0 if self._packed is None else self._packed.weight.nbytes

    def plan(
        self,
        shape: Sequence[int],
        filters: Sequence[Filters],
        settings: Settings,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Plan, ...]:
        """What runs a call; of the filters only shapes are looked at."""
        plans = [
            conv.plan(conv.call(shape, f.weight.shape, False, dtype, device), settings)
            for conv, f in zip(self.convs, filters, strict=True)
        ]
        kernel = self._kernel(shape, dtype, device, filters, settings)
        if kernel is None:
            return tuple(plans)
        # x is read once.
        n, c, h, w = shape
        moved = sum(p.bytes for p in plans) - (len(plans) - 1) * n * c * h * w * dtype.itemsize
        macs, elements = sum(p.macs for p in plans), moved // dtype.itemsize
        return (gpu_plan(kernel.backend, shape, macs, elements, dtype, device, settings.tf32),)

    def _kernel(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        filters: Sequence[Filters],
        settings: Settings,
    ) -> Implementation | None:
        def choose() -> Implementation | None:
            weights = tuple(tuple(f.weight.shape) for f in filters)
            options = {"weights": weights, "dilations": tuple(self.dilations)}
            return ours(OpDesc.on("aspp_branches", shape, dtype, device, **options))

        return self._choices.get((tuple(shape), dtype, device, settings), choose)


class FoldedProject:
    """y = act(W_branches . branches[n, :, p] + W_pooled . pooled[n] + shift), without the concat.

    The pooled vector's part is a shift for each image.

    Args:
        act: "relu" or None.
        frozen: as for `FoldedAspp`.
    """

    def __init__(self, act: str | None, frozen: bool) -> None:
        self.act = act
        geometry = ((1, 1), (0, 0), (1, 1), 1)
        self._one_image, self._product = FoldedConv(*geometry, act), FoldedConv(*geometry, None)
        self._frozen = frozen
        self._joined: Tensor | None = None
        self._choices: Memo[Implementation | None] = Memo()

    def __call__(
        self,
        branches: Tensor,
        pooled: Tensor,
        to_branches: Filters,
        to_pooled: Filters,
        settings: Settings,
    ) -> Tensor:
        """
        Args:
            branches: [N, B, H, W], channels_last.
            pooled: [N, P].
            to_branches: [K, B, 1, 1], with the shift.
            to_pooled: [K, P, 1, 1].
            settings: those of now.
        """
        shape, pixels = branches.shape, pooled.shape[1]
        kernel = self._kernel(shape, pixels, branches.dtype, branches.device, to_branches, settings)
        if kernel is not None:
            weight = self._joined
            if weight is None:
                weight = torch.cat([to_branches.weight, to_pooled.weight], 1)
                if self._frozen and not capturing(branches):
                    _wait(branches)
                    self._joined = weight
            return kernel.run(branches, pooled, weight, to_branches.one, to_branches.shift)
        shifts = of_vectors(pooled, to_pooled.weight, to_branches.bias, None, settings)
        if shape[0] == 1:
            own = to_branches._replace(shift=shifts[0].float(), bias=shifts[0])
            return self._one_image(branches, own, settings)
        # The bias of the other filters is zero.
        bare = to_branches._replace(shift=to_pooled.shift, bias=to_pooled.bias)
        y = self._product(branches, bare, settings)
        return activate_(y.add_(shifts[:, :, None, None]), self.act)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the filters that are kept joined."""
        return 0 if self._joined is None else self._joined.nbytes

    def plan(
        self,
        shape: Sequence[int],
        pooled: int,
        to_branches: Filters,
        settings: Settings,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Plan:
        """What runs a call; of the filters only shapes are looked at."""
        conv = self._one_image if shape[0] == 1 else self._product
        call = conv.call(shape, to_branches.weight.shape, False, dtype, device)
        plan = conv.plan(call, settings)
        kernel = self._kernel(shape, pooled, dtype, device, to_branches, settings)
        if kernel is None:
            return plan
        elements = plan.bytes // dtype.itemsize
        return gpu_plan(kernel.backend, shape, plan.macs, elements, dtype, device, settings.tf32)

    def _kernel(
        self,
        shape: Sequence[int],
        pooled: int,
        dtype: torch.dtype,
        device: torch.device,
        to_branches: Filters,
        settings: Settings,
    ) -> Implementation | None:
        if self.act != "relu":
            return None

        def choose() -> Implementation | None:
            outputs = to_branches.weight.shape[0]
            options = {"pooled": pooled, "outputs": outputs}
            return ours(OpDesc.on("aspp_project", shape, dtype, device, **options))

        return self._choices.get((tuple(shape), dtype, device, settings), choose)


def _wait(x: Tensor) -> None:
    """Let what was made for good be there: later calls may come on another stream."""
    if x.is_cuda:
        torch.cuda.current_stream(x.device).synchronize()
