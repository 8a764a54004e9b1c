"""Ops called by several threads at a time: the bits of one thread, whoever prepares the weights."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deeplab_fast import ops
from deeplab_fast.dispatch.examples import flat
from deeplab_fast.ops import quantized
from deeplab_fast.ops.prepared import PreparedConv
from deeplab_fast.ops.prepared_aspp import PreparedAspp
from deeplab_fast.ops.prepared_bf16 import Bf16Conv
from deeplab_fast.ops.prepared_inverted_residual import Folded, PreparedInvertedResidual
from deeplab_fast.ops.quantized import Affine, Quantised, QuantizedConv

THREADS, ROUNDS, CALLS = 4, 3, 3


def _conv(kind: type = PreparedConv, c: int = 32, k: int = 32, taps: int = 3, **options: Any):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(k, c // options.get("groups", 1), taps, taps, generator=draw)
    return lambda: kind(weight, None, torch.ones(k), **options)


def _block() -> Callable[[], PreparedInvertedResidual]:
    draw = torch.Generator().manual_seed(0)

    def folded(*shape: int) -> Folded:
        return Folded(torch.randn(shape, generator=draw), None, torch.ones(shape[0]), "relu6")

    parts = folded(48, 32, 1, 1), folded(48, 1, 3, 3), folded(24, 48, 1, 1)
    return lambda: PreparedInvertedResidual(*parts, padding=(1, 1))


def _aspp() -> Callable[[], PreparedAspp]:
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(16, 32, k, k, generator=draw) for k in (1, 3, 3)]
    shifts = [torch.ones(16)] * 3
    return lambda: PreparedAspp(weights, [torch.ones(16)] * 3, shifts, [1, 2, 6])


def _bytes() -> Callable[[], Callable[[Tensor], object]]:
    source = Affine(0.05, 128)
    made = _conv(QuantizedConv, source=source, padding=1)

    def make() -> Callable[[Tensor], object]:
        conv = made()

        def run(x: Tensor) -> object:
            q = quantized.quantised(x, source)
            assert isinstance(q, Quantised)
            return conv(q)

        return run

    return make


def _labels(x: Tensor) -> object:
    return ops.upsample_argmax(x, (40, 44), return_prob=True)


def _loss(x: Tensor) -> object:
    logits = x.clone().requires_grad_()
    target = torch.arange(2 * 30 * 30).view(2, 30, 30) % 32
    loss = ops.upsample_cross_entropy(logits, target)
    loss.backward()
    return loss.detach(), logits.grad


def _norm(x: Tensor) -> object:
    return torch.ops.deeplab_fast.batch_stats(x, 1e-5, None, None, None, None)


# What is made anew in each round, so that threads meet while its weights are prepared.
MAKERS: dict[str, Callable[[], Callable[[Tensor], object]]] = {
    "tiles or oneDNN": _conv(padding=2, dilation=2),
    "patches": _conv(taps=3, stride=2, padding=1, max_extra_bytes=0),
    "pixels": _conv(taps=1),
    "depthwise": _conv(groups=32, padding=1),
    "groups": _conv(groups=2, padding=1),
    "bf16": lambda: (lambda conv: lambda x: conv(x.bfloat16()))(_conv(Bf16Conv, padding=1)()),
    "8 bits": _bytes(),
    "branches": _aspp(),
    "inverted residual": _block(),
    "labels": lambda: _labels,
    "loss": lambda: _loss,
    "batch norm": lambda: _norm,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_bits_of_many_threads_are_those_of_one(make: Callable[[], Callable]) -> None:
    inputs = [
        torch.randn(2, 32, 13, 15, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    ]
    one = make()
    wanted = [flat(one(x)) for x in inputs]
    for _ in range(ROUNDS):
        run, barrier = make(), threading.Barrier(THREADS)
        wrong: list[str] = []

        def call(number: int, run: Any = run, barrier: Any = barrier, wrong: Any = wrong) -> None:
            try:
                barrier.wait(30)
                for i in range(CALLS):
                    which = (number + i) % len(inputs)
                    found = flat(run(inputs[which]))
                    if not all(map(torch.equal, found, wanted[which])):
                        wrong.append(f"thread {number}, call {i}: other bits")
            except Exception as error:
                wrong.append(f"thread {number}: {type(error).__name__}: {error}")

        threads = [threading.Thread(target=call, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
