"""Measuring launch configurations, with a launcher and a clock that do not need a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deeplab_fast.kernels.tuned import TUNABLE, measured

from deeplab_fast import backends
from deeplab_fast.dispatch.errors import Wrong
from deeplab_fast.dispatch.examples import Size
from deeplab_fast.ops.upsample_cross_entropy import CrossEntropy
from deeplab_fast.plan.device import H100, WARP
from deeplab_fast.plan.gemm import MMA_16BIT
from deeplab_fast.plan.rules import POINTWISE as POINTWISE_PRODUCT
from deeplab_fast.plan.rules import PointwiseKey
from deeplab_fast.plan.upsample import forward_candidates, gradient_candidates
from deeplab_fast.tuning import configurations
from deeplab_fast.tuning.configurations import LEAST_GAIN, RULE, TUNED, candidates, fastest
from deeplab_fast.tuning.workloads import Work

(POINTWISE,) = (t for t in TUNED if (t.kernel, t.op) == ("pointwise", "conv_bn_act"))
WORK = Work("conv_bn_act", "relu", Size(2, 64, 5, 4, filters=256))


class Launcher:
    """Asks for a configuration as a launcher does; the result is the reference's.

    Attributes:
        asks: how often a call asks.
        wrong, failing: configurations with a wrong result, and that do not run.
        seconds: of a call by its configuration, None for the rule's.
    """

    def __init__(self) -> None:
        self.asks = 1
        self.wrong: list[Any] = []
        self.failing: list[Any] = []
        self.seconds: Callable[[Any], float] = lambda config: 1.0
        self.chosen: Any = None

    def __call__(self, *args: Any) -> torch.Tensor:
        for i in range(self.asks):
            key = PointwiseKey(2, 20, 64, 256 >> i, MMA_16BIT, True, False, False)
            self.chosen = measured(POINTWISE_PRODUCT, key, H100)
        if self.chosen is not None and self.chosen in self.failing:
            raise RuntimeError("out of resource: shared memory")
        y = backends.implementations("conv_bn_act")["reference"].run(*args)
        return y * 2 if self.chosen is not None and self.chosen in self.wrong else y

    def interleaved(self, runs: dict[str, Callable[[int], Any]], *_: Any) -> dict[str, list[float]]:
        found = {}
        for name, call in runs.items():
            call(0)
            found[name] = [self.seconds(self.chosen)] * 3
        return found


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    made = Launcher()
    monkeypatch.setattr(configurations, "interleaved", made.interleaved)
    return made


def find(launcher: Launcher) -> Any:
    return fastest(POINTWISE, WORK, "bfloat16", "cpu", launcher)


def choices(launcher: Launcher) -> list[Any]:
    return candidates(POINTWISE, WORK, "bfloat16", "cpu", launcher)[2]


def test_the_fastest_is_what_is_recorded(launcher) -> None:
    best = choices(launcher)[-1]
    launcher.seconds = lambda config: 1.0 if config == best else 2.0
    found, ms = find(launcher)
    assert found.kernel == "pointwise" and found.gain == 2.0
    assert found.key["filters"] == 256 and found.config["block_m"] == best.block_m
    assert list(ms) == [RULE, *map(str, choices(launcher))]
    # Outside of a measurement the rule chooses again.
    launcher(*_args())
    assert launcher.chosen is None


def _args() -> tuple[Any, ...]:
    return configurations._sets(POINTWISE, WORK, "bfloat16", "cpu")[0].args


def test_a_small_gain_is_noise(launcher) -> None:
    launcher.seconds = lambda config: 1.0 if config is None else 1.01 / LEAST_GAIN
    assert find(launcher)[0] is None


def test_one_that_does_not_run_is_left_out(launcher) -> None:
    first, *others = choices(launcher)
    launcher.failing = [first]
    launcher.seconds = lambda config: 1.0 if config == first else 2.0
    found, ms = find(launcher)
    assert found is None and str(first) not in ms and str(others[0]) in ms


def test_one_that_is_wrong_is_an_answer(launcher) -> None:
    launcher.wrong = choices(launcher)[:1]
    with pytest.raises(Wrong, match="from the rule's configuration"):
        find(launcher)


@pytest.mark.parametrize("asks", [0, 2])
def test_a_call_must_choose_one_configuration(asks, launcher) -> None:
    launcher.asks = asks
    with pytest.raises(RuntimeError, match=f"chooses {asks} configurations of pointwise"):
        find(launcher)


def test_every_kernel_that_has_configurations_is_measured() -> None:
    assert {t.kernel for t in TUNED} == set(TUNABLE)
    for tuned in TUNED:
        run = backends.implementations(tuned.op)["triton"].run
        assert bool(tuned.method) == isinstance(run, CrossEntropy)


def test_candidates_of_the_upsampling_kernels_are_legal() -> None:
    for found in (forward_candidates(), gradient_candidates()):
        assert len(set(found)) == len(found) > 1
        for c in found:
            assert c.cols == c.num_warps * WARP
            assert c.block_cols == 0 or c.cols % c.block_cols == 0
