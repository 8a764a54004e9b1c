"""Maps in one block of memory: the same bits, results of their own, safe from several threads."""

from __future__ import annotations

import copy
import os
import pickle
import resource
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fast_models import FAMILIES, quick, trained
from torch import Tensor, nn

import deeplab_fast as dlf
from deeplab_fast.program import activations
from deeplab_fast.program.activations import Activations, plan
from deeplab_fast.program.inference import fold
from deeplab_fast.program.layers import Layer, Program

SHAPE = (1, 3, 72, 104)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def folded(model: nn.Module) -> Program:
    program, reason = fold(model)
    assert program is not None, reason
    return program


@pytest.fixture(scope="module")
def program() -> Program:
    return folded(trained(quick(FAMILIES["resnet18"])))


def bits(maps: dict[str, Tensor]) -> dict[str, list[Any]]:
    return {name: [y.stride(), *y.flatten().view(torch.int32).tolist()] for name, y in maps.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_in_a_poisoned_block_give_the_same_bits(family: str) -> None:
    model = trained(quick(FAMILIES[family]))
    program = folded(model)
    runner = Activations(program)
    for shape in (SHAPE, (2, 3, 65, 65)):
        x = torch.randn(shape)
        expected = program.logits(x)
        for _ in range(2):
            for block in runner._blocks:
                block._bytes.fill_(0xFF)
            assert bits(runner.logits(x, True)) == bits(expected)


@pytest.mark.parametrize("family", ["resnet18", "mobilenetv3", "efficientnet-lite"])
def test_maps_that_live_at_a_time_lie_apart(family: str) -> None:
    program = folded(trained(quick(FAMILIES[family])))
    runner = Activations(program)
    places = plan(program, SHAPE)
    x = torch.randn(SHAPE)
    runner.logits(x, True)
    (block,) = runner._blocks
    sums: dict[int, float] = {}

    def checked(layer: Layer, *tensors: Tensor | None, out: Tensor | None = None) -> Tensor:
        # What was written is still there when it is read.
        for t in tensors:
            if t is not None and id(t) in sums:
                assert t.double().sum().item() == sums[id(t)]
        y = layer(*tensors) if out is None else layer(*tensors, out=out)
        sums[id(y)] = y.double().sum().item()
        kept.append(y)
        return y

    kept: list[Tensor] = []
    run = activations._Run(places, block.views(places), x)
    run.execute = checked
    program.maps(x, run)
    assert any(place.offset is not None for _, place in places.calls)


@pytest.mark.parametrize("family", ["resnet18", "mobilenetv3", "efficientnet-lite"])
def test_the_block_is_as_large_as_the_maps_that_live_at_a_time(family: str) -> None:
    program = folded(trained(quick(FAMILIES[family])))
    recorder = activations._Recorder(SHAPE)
    program.maps(recorder.source, recorder)
    slots, calls = recorder.slots, range(len(recorder.calls))
    alive = [sum(s.size for s in slots if s.first <= call <= s.last) for call in calls]
    # A tenth for what is left between maps of different sizes.
    assert plan(program, SHAPE).size <= 1.1 * max(alive)
    assert max(alive) < sum(s.size for s in slots)


def test_results_lie_in_memory_of_their_own(program: Program) -> None:
    runner = Activations(program)
    first = runner.logits(torch.randn(SHAPE), True)
    before = bits(first)
    runner.logits(torch.randn(SHAPE), True)
    assert bits(first) == before


def test_shapes_share_a_block_and_a_small_one_does_not_keep_a_large(program: Program) -> None:
    runner = Activations(program)
    runner.logits(torch.randn(SHAPE), True)
    (block,) = runner._blocks
    runner.logits(torch.randn(1, 3, 72, 96), True)
    assert runner._blocks == [block]
    assert runner.held_bytes == block.size
    # Two sizes in turn share it, many small ones do not keep it.
    small = torch.randn(1, 3, 16, 16)
    for x in (small, torch.randn(SHAPE)) * 20:
        runner.logits(x, True)
    assert runner._blocks == [block]
    for _ in range(20):
        runner.logits(small, True)
    assert runner.held_bytes < block.size
    runner.free()
    assert runner.held_bytes == 0


def test_a_block_above_the_bound_is_given_back(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "KEPT_BYTES", 1 << 10)
    runner = Activations(program)
    runner.logits(torch.randn(SHAPE), True)
    assert runner.held_bytes == 0


@pytest.mark.parametrize("family", ["resnet18", "mobilenetv3", "efficientnet-lite"])
def test_a_call_that_is_repeated_faults_in_no_map(family: str) -> None:
    runner = Activations(folded(trained(quick(FAMILIES[family]))))
    x = torch.randn(1, 3, 384, 512)
    for _ in range(3):
        runner.logits(x, False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    runner.logits(x, False)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    # Less than one map of 16 channels at half the size, 3 MiB, has.
    assert faults < 400


def test_threads_have_blocks_of_their_own(program: Program) -> None:
    runner = Activations(program)
    inputs = [torch.randn(SHAPE) for _ in range(3)]
    expected = [bits(program.logits(x)) for x in inputs]
    found: list[Any] = [None] * len(inputs)

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(4):
                found[i] = bits(runner.logits(inputs[i], True))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert 1 <= len(runner._blocks) <= 4


def test_a_forked_process_has_maps_of_its_own(program: Program) -> None:
    runner = Activations(program)
    runner.logits(torch.randn(SHAPE), True)
    (block,) = runner._blocks
    memory = block._bytes.numpy()
    memory[:] = 1
    child = os.fork()
    if child == 0:
        # Nothing of PyTorch, whose threads a fork does not have.
        memory[:] = 2
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert memory.max() == 1


def test_a_call_that_fails_gives_its_block_back(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Activations(program)
    runner.logits(torch.randn(SHAPE), True)
    (block,) = runner._blocks
    failing = program.layers[3]

    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(type(failing), "__call__", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        runner.logits(torch.randn(SHAPE), True)
    assert runner._blocks == [block]


def test_copies_and_pickles_hold_no_block(program: Program) -> None:
    runner = Activations(program)
    x = torch.randn(SHAPE)
    expected = bits(runner.logits(x, True))
    for other in (copy.deepcopy(runner), pickle.loads(pickle.dumps(runner))):
        assert other.held_bytes == 0
        assert bits(other.logits(x, True)) == expected


def test_a_model_tells_what_it_keeps_and_gives_it_back() -> None:
    model = trained(quick(FAMILIES["mobilenetv3"]))
    frozen = dlf.optimize(model, keep_aux=True)
    assert model.activation_bytes == frozen.activation_bytes == 0
    x = torch.randn(SHAPE)
    with torch.inference_mode():
        model(x)
        frozen(x)
    assert model.activation_bytes == frozen.activation_bytes > 0
    # A block made in inference mode serves calls outside it.
    assert torch.equal(model(x)["out"], frozen(x)["out"])
    model.train()
    assert model.activation_bytes == 0


def test_modules_that_run_as_they_are_get_maps_that_they_may_keep() -> None:
    class Keeps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return x * 2

    model = trained(quick(FAMILIES["resnet18"]))
    keeps = Keeps()
    model.backbone.relu = nn.Sequential(nn.ReLU(), keeps)
    x = torch.randn(SHAPE)
    model(x)
    seen, before = keeps.seen, keeps.seen.clone()
    model(torch.randn(SHAPE))
    assert torch.equal(seen, before)
