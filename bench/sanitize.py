"""`python -m bench.sanitize`: every op once, at small odd shapes, on every GPU backend.

Meant to be run under compute-sanitizer, where one call takes seconds. Results are held against the
exact ones as well; exit status 1 where one is wrong. An op that a backend does not have is said.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deeplab_fast import backends, ops

from . import gate, op_cases, registry
from .costs import Cost, UpsampleSize
from .providers import expected
from .registry import FORWARD, FORWARD_BACKWARD, Arguments, Call, Case

# Odd sizes, channels that are no multiple of a block, a ratio that is no integer, taps that all
# fall outside (rate 12 on 9 rows).
_SIZES = UpsampleSize(2, 5, 5, 7, 33, 41)
_SMALLER = UpsampleSize(1, 3, 9, 8, 5, 4)
_MAP = {"n": 2, "h": 9, "w": 11}


class _NormPass(nn.Module):
    """A pass of batch norm in training over maps, with its vectors.

    Attributes:
        exact: through the reference, in any dtype.
    """

    def __init__(self, op: str, channels: int, act: str | None) -> None:
        super().__init__()
        self.op, self.act, self.exact = op, act, True
        for name in ("mean", "rstd", "weight", "bias", "mean_grad", "mean_grad_xhat"):
            self.register_buffer(name, torch.rand(channels) + 0.25)

    def call(self, *maps: Tensor) -> Call:
        """The call of the op."""
        vectors: list[Any] = list(self.buffers())
        options: dict[str, Any] = {"act": self.act}
        last = maps[-1]
        if self.op == "batch_stats":
            return self.op, maps, {}
        if self.op == "bn_act":
            options["residual"] = last if len(maps) > 1 else None
            return self.op, (maps[0], *vectors[:4]), options
        options["out"] = last if len(maps) > 2 else None
        if self.op == "bn_act_reduce":
            return self.op, (*maps[:2], *vectors[:4]), options
        options["to_residual"] = True
        return self.op, (*maps[:2], *vectors), options

    def forward(self, *maps: Tensor) -> Any:
        op, args, options = self.call(*maps)
        if not self.exact:
            return getattr(ops, op)(*args, **options)
        with backends.use_backend("reference"):
            return getattr(ops, op)(*args, **options)


@dataclass(frozen=True, kw_only=True)
class _NormCase(Case):
    """A pass of batch norm in training over `maps` maps [n, c, h, w]."""

    kind: ClassVar[str] = "op"

    n: int
    h: int
    w: int
    maps: int
    c: int = 40
    act: str | None = "relu"

    def make_module(self) -> nn.Module:
        return _NormPass(self.op, self.c, self.act)

    def make_inputs(self) -> tuple[Tensor, ...]:
        return tuple(torch.randn(self.n, self.c, self.h, self.w) for _ in range(self.maps))

    def fused(self, args: Arguments, dtype: torch.dtype) -> nn.Module:
        module = copy.deepcopy(args.module).to(torch.promote_types(dtype, torch.float32))
        module.exact = False
        return module

    def calls(self, args: Arguments) -> list[Call]:
        return [self.fused(args, args.inputs[0][0].dtype).call(*args.inputs[0])]

    def cost(self, mode: str, itemsize: int) -> Cost:
        return Cost(0, 0, self.maps * self.n * self.c * self.h * self.w * itemsize)


def _norm_cases() -> list[Case]:
    """Every op in each of its forms, with channels that are a multiple of an access and that are
    of none."""
    found: list[Case] = []
    for c in (40, 7):
        given = {"suites": (), "c": c, **_MAP}
        found.append(_NormCase(op="batch_stats", shape=f"c{c}", maps=1, **given))
        for op, maps in (("bn_act", 1), ("bn_act_reduce", 2), ("bn_act_backward", 2)):
            found += [
                _NormCase(op=op, shape=f"c{c}-hardswish", maps=maps, act="hardswish", **given),
                _NormCase(op=op, shape=f"c{c}-residual", maps=maps + 1, **given),
            ]
    return found


class _Convs(nn.Module):
    """The ASPP's convolutions in training: the result, its statistics, and both gradients.

    Attributes:
        exact: through the reference, in any dtype.
    """

    def __init__(self, channels: int, filters: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.dilations, self.exact = [1, *rates], True
        for index in range(len(self.dilations)):
            size = 3 if index else 1
            weight = torch.randn(filters, channels, size, size) / (channels * size**2) ** 0.5
            self.register_buffer(f"weight{index}", weight)

    def call(self, x: Tensor) -> Call:
        """The call of the op."""
        return "aspp_convs", (x, list(self.buffers()), self.dilations), {"stats": True}

    def forward(self, x: Tensor, grad: Tensor) -> list[Tensor]:
        op, args, options = self.call(x)
        with backends.use_backend("reference" if self.exact else backends.current_backend()):
            results = getattr(ops, op)(*args, **options)
            dx, dw = torch.ops.deeplab_fast.aspp_convs_backward(grad, *args, True, True)
        return [*results, dx, *dw]


@dataclass(frozen=True, kw_only=True)
class _ConvsCase(Case):
    """Forward and backward pass over a map [n, c, h, w], `filters` for each branch."""

    kind: ClassVar[str] = "op"

    n: int
    h: int
    w: int
    c: int
    filters: int
    rates: tuple[int, ...]

    def make_module(self) -> nn.Module:
        return _Convs(self.c, self.filters, self.rates)

    def make_inputs(self) -> tuple[Tensor, ...]:
        filters = self.filters * (1 + len(self.rates))
        return tuple(torch.randn(self.n, c, self.h, self.w) for c in (self.c, filters))

    def fused(self, args: Arguments, dtype: torch.dtype) -> nn.Module:
        module = copy.deepcopy(args.module).to(dtype)
        module.exact = False
        return module

    def calls(self, args: Arguments) -> list[Call]:
        return [self.fused(args, args.inputs[0][0].dtype).call(args.inputs[0][0])]

    def cost(self, mode: str, itemsize: int) -> Cost:
        return Cost(0, 0, 0, convolutions=1)

    def tolerance(self, kind: str) -> float:
        return registry.CONVOLUTION


def _convs_cases() -> list[Case]:
    """With accesses of 16 bytes and of one element; a rate beyond the map has taps without one."""
    return [
        _ConvsCase(
            op="aspp_convs", shape=f"c{c}", c=c, filters=k, rates=(2, 4, 12), suites=(), **_MAP
        )
        for c, k in ((40, 24), (7, 5))
    ]


def small_cases() -> list[Case]:
    """The cases, none of which belongs to a suite."""
    given = {"suites": ()}
    found: list[Case] = []
    for shape, sizes in (("up", _SIZES), ("down", _SMALLER)):
        upsampled = {**given, "shape": shape, "sizes": sizes}
        found += [
            op_cases.UpsampleArgmax(op="upsample_argmax", **upsampled),
            op_cases.UpsampleCrossEntropy(
                op="upsample_cross_entropy", modes=(FORWARD, FORWARD_BACKWARD), **upsampled
            ),
            op_cases.UpsampleConfusion(op="upsample_confusion", **upsampled),
            op_cases.UpsampleSoftmaxAdd(op="upsample_softmax_add", **upsampled),
        ]
    found += [
        op_cases.AsppBranches(
            op="aspp_branches",
            shape="odd",
            rates=(2, 4, 12),
            channels=40,
            out_channels=24,
            **_MAP,
            **given,
        ),
        op_cases.AsppProject(
            op="aspp_project",
            shape="odd",
            channels=40,
            pooled=24,
            out_channels=24,
            **_MAP,
            **given,
        ),
        *(
            op_cases.ConvBnActCase(
                op="conv_bn_act",
                shape=f"{size}x{size}d{dilation}",
                c=40,
                k=24,
                size=size,
                dilation=dilation,
                residual=size == 1,
                **_MAP,
                **given,
            )
            for size, dilation in ((1, 1), (3, 1), (3, 2))
        ),
        *_norm_cases(),
        *_convs_cases(),
    ]
    return found


def model_cases() -> list[Case]:
    """Batch norm passes and the ASPP's convolutions as training steps of ResNet-50 have them, for
    what is prepared for a GPU; none belongs to a suite."""
    found: list[Case] = []
    for c, size in ((256, 65), (2048, 33)):
        given = {"suites": (), "c": c, "n": 16, "h": size, "w": size}
        name = registry.shape_name((size, size, c), "b16")
        found.append(_NormCase(op="batch_stats", shape=name, maps=1, **given))
        for op, maps in (("bn_act", 1), ("bn_act_reduce", 2), ("bn_act_backward", 2)):
            found += [
                _NormCase(op=op, shape=name, maps=maps, **given),
                _NormCase(op=op, shape=f"{name}-none", maps=maps, act=None, **given),
                _NormCase(op=op, shape=f"{name}-residual", maps=maps + 1, **given),
            ]
    for n, size, rates in (
        (16, 33, op_cases.OS16_RATES),
        (16, 65, op_cases.OS8_RATES),
        (2, 65, op_cases.OS8_RATES),
    ):
        found.append(
            _ConvsCase(
                op="aspp_convs",
                shape=registry.shape_name((size, size), f"b{n}"),
                c=2048,
                filters=256,
                rates=rates,
                suites=(),
                n=n,
                h=size,
                w=size,
            )
        )
    return found


def check(names: Sequence[str], device: str, dtype: torch.dtype) -> int:
    """Run every op on the named backends; returns how many results were wrong."""
    wrong = 0
    for case in small_cases():
        for mode in case.modes:
            # Data and exact results come from the CPU, so that hardly any kernel but those under
            # test runs on the GPU.
            args = case.setup("cpu", dtype)
            exact = expected(case, mode, args)
            args = _moved(args, device)
            layers = max(1, case.cost(mode, dtype.itemsize).convolutions)
            for name in names:
                p = registry.provider(name)
                what = f"{case.id} {mode} {str(dtype).removeprefix('torch.')} {name}"
                reason = p.missing_reason(case, mode, device, dtype)
                if reason:
                    print(f"{what}: not run: {reason}", flush=True)
                    continue
                run = p.build(case, mode, device, dtype, args)
                result = [t.cpu() for t in gate.outputs(run.probe())]
                found = gate.errors(case, mode, result, exact)
                precision = p.precision(case, mode, device, dtype)
                bounds = {
                    kind: gate.limit(case, mode, kind, precision, layers, None) for kind in found
                }
                bad = [k for k, error in found.items() if not error <= bounds[k]]
                wrong += bool(bad)
                shown = ", ".join(f"{k} error {e:.1e}" for k, e in found.items())
                print(f"{what}: {'WRONG' if bad else 'ok'} ({shown})", flush=True)
    return wrong


def _moved(args: Arguments, device: str) -> Arguments:
    return Arguments(
        args.module.to(device),
        [tuple(t.to(device) for t in given) for given in args.inputs],
        [None if t is None else t.to(device) for t in args.cotangents],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 0, 1 where a result is wrong, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda"], metavar="NAME")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.sanitize: needs a CUDA device, and none is visible", file=sys.stderr)
        return 2
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16):
        wrong += check(options.backends, "cuda", dtype)
    torch.cuda.synchronize()
    print(f"{wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
