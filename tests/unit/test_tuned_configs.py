"""Measured launch configurations: which records count, what makes one left out, what runs then.

Only host code runs here: launchers hand their launches to a recorder.
"""

from __future__ import annotations

import dataclasses
import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deeplab_fast.kernels import aspp, conv, launch, tuned, upsample
from deeplab_fast.kernels.tuned import TUNABLE

from deeplab_fast.dispatch import records, trust
from deeplab_fast.dispatch.records import Record
from deeplab_fast.plan.device import H100, Device
from deeplab_fast.plan.gemm import (
    FMA_FP32,
    MMA_16BIT,
    GemmConfig,
)
from deeplab_fast.plan.rules import POINTWISE as POINTWISE_PRODUCT
from deeplab_fast.plan.rules import BranchesKey, PointwiseKey, branches_rule, pointwise_rule
from deeplab_fast.plan.taps import Branch
from deeplab_fast.plan.upsample import UpsampleConfig, UpsampleKey, forward_config, gradient_config

ROOT = Path(__file__).resolve().parents[2]
GPU = replace(H100, name="NVIDIA H100 80GB HBM3")
BRANCHES = (Branch(64, 1, 1), Branch(128, 3, 12))
LOGITS = UpsampleKey(2, 21, (9, 9), (33, 33), False, "float32")
FOUR_WARPS = UpsampleConfig(2, 128, 0, 4)
BLOCKS = UpsampleConfig(4, 32, 8, 1)
TILE = GemmConfig(64, 64, 64, 4, 4, 3)


@dataclass(frozen=True)
class Case:
    """A call, and a legal configuration that the rule does not choose for it."""

    kernel: str
    key: Any
    config: Any

    def choose(self, key: Any = None, device: Device = GPU) -> Any:
        return tuned.choose(TUNABLE[self.kernel], key or self.key, device)


CASES = [
    Case("upsample_argmax", LOGITS, FOUR_WARPS),
    Case("upsample_confusion", LOGITS, FOUR_WARPS),
    Case("upsample_softmax_add", LOGITS, FOUR_WARPS),
    Case("upsample_cross_entropy", LOGITS, BLOCKS),
    Case("upsample_cross_entropy_forward", LOGITS, FOUR_WARPS),
    Case(
        "aspp_branches",
        BranchesKey(2, 33, 33, 256, BRANCHES, MMA_16BIT),
        replace(TILE, split=True),
    ),
    Case("pointwise", PointwiseKey(1, 4225, 256, 512, MMA_16BIT, residual=True), TILE),
]
every_kernel = pytest.mark.parametrize("case", CASES, ids=lambda c: c.kernel)
ARGMAX, POINTWISE = CASES[0], CASES[-1]
# Whose record a kernel's configurations are in, where it is not the op of that name.
OPS = {"upsample_cross_entropy_forward": "upsample_cross_entropy", "pointwise": "conv_bn_act"}


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file of one's own records, which is not there yet; none are shipped."""
    path = tmp_path / "records.json"
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, str(path))
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "shipped.json")
    trust.forget()
    yield path
    trust.forget()


def record(case: Case, configs: Any = None, **changes: Any) -> Record:
    """A record of the op that runs the kernel, with the case's configuration."""
    op = OPS.get(case.kernel, case.kernel)
    versions = records.Versions.here()
    found = Record(
        op, "triton", "bfloat16", "plain", GPU.capability,
        trust.source(op, "triton", GPU.capability), records.PASSED, "", GPU.name,
        versions.driver, versions.torch, versions.triton, "2026-11-27",
        configs=(entry(case),) if configs is None else configs,
    )  # fmt: skip
    return replace(found, **changes)


def entry(case: Case, key: Any = None, config: Any = None) -> records.Config:
    made = tuned.entry(case.key, case.config, case.kernel, 1.2)
    return replace(made, key=made.key | (key or {}), config=made.config | (config or {}))


def write(path: Path, *found: Record) -> None:
    records.write(path, found)
    trust.forget()


def by_rule(case: Case) -> Any:
    """What is chosen where no record can be meant."""
    with tuned.forced(case.kernel, None):
        return case.choose()


def test_there_is_a_case_for_every_kernel() -> None:
    assert {case.kernel for case in CASES} == set(TUNABLE)


@every_kernel
def test_without_records_the_rule_chooses(case: Case, caplog) -> None:
    expected = {
        "UpsampleKey": lambda key: (
            gradient_config if case.kernel == "upsample_cross_entropy" else forward_config
        )(key.in_size, key.out_size, key.align_corners),
        "BranchesKey": lambda key: branches_rule(key, GPU),
        "PointwiseKey": lambda key: pointwise_rule(key, GPU),
    }
    assert case.choose() == expected[type(case.key).__name__](case.key) != case.config
    assert not caplog.records


@every_kernel
def test_a_recorded_configuration_is_chosen(case: Case, file: Path) -> None:
    write(file, record(case))
    assert case.choose() == case.config
    # For this call and this compute capability alone.
    first = dataclasses.fields(case.key)[0].name
    other = replace(case.key, **{first: getattr(case.key, first) + 1})
    ampere = replace(GPU, capability=(8, 0))
    with tuned.forced(case.kernel, None):
        elsewhere = case.choose(other), case.choose(device=ampere)
    assert (case.choose(other), case.choose(device=ampere)) == elsewhere
    assert elsewhere[1] != case.config


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"verdict": records.FAILED, "reason": "wrong"}, id="a kernel that failed"),
        pytest.param({"source": "0" * 12}, id="other sources"),
        pytest.param({"torch": "1.0"}, id="another PyTorch"),
        pytest.param({"driver": "1.0"}, id="another driver"),
        pytest.param({"capability": (8, 0)}, id="another compute capability"),
        pytest.param({"configs": ()}, id="none"),
    ],
)
def test_of_a_record_that_does_not_count_none_is_chosen(changes, file: Path, caplog) -> None:
    write(file, record(POINTWISE, **changes))
    assert POINTWISE.choose() == by_rule(POINTWISE) != POINTWISE.config
    assert not caplog.records


def test_the_variable_switches_records_off(file: Path, monkeypatch) -> None:
    write(file, record(POINTWISE))
    monkeypatch.setenv(records.ENVIRONMENT_VARIABLE, "0")
    trust.forget()
    assert POINTWISE.choose() == by_rule(POINTWISE)


LARGE = dataclasses.asdict(GemmConfig(128, 256, 64, 8, 4, 2))


@pytest.mark.parametrize(
    ("key", "config", "reason"),
    [
        pytest.param({}, {"num_ctas": 2}, "GemmConfig: unknown field num_ctas", id="unknown field"),
        pytest.param({"stride": 2}, {}, "PointwiseKey: unknown field stride", id="key"),
        pytest.param({}, {"num_warps": True}, "num_warps is True", id="bool for int"),
        pytest.param({"math": None}, {}, "math is None, expected str", id="null for string"),
        pytest.param({}, LARGE, "bytes of shared memory are more than the", id="shared memory"),
        pytest.param({}, {"block_n": 32}, "is no candidate for this", id="no candidate"),
        # A tile of 64 filters leaves none for the classes of 512.
        pytest.param({"classes": True}, {}, "is no candidate for this", id="not for the key"),
    ],
)
def test_what_does_not_fit_is_left_out_with_one_line(key, config, reason, file, caplog) -> None:
    other = replace(entry(POINTWISE), key=entry(POINTWISE).key | {"groups": 3})
    write(file, record(POINTWISE, (entry(POINTWISE, key, config), other)))
    with caplog.at_level(logging.INFO, "deeplab_fast"):
        chosen = [POINTWISE.choose() for _ in range(3)]
    assert chosen == [by_rule(POINTWISE)] * 3
    (line,) = caplog.records
    assert line.levelno == logging.WARNING
    assert reason in line.getMessage() and "deeplab-fast tune" in line.getMessage()
    # The others of the record count.
    assert POINTWISE.choose(replace(POINTWISE.key, groups=3)) == TILE


def test_a_missing_field_is_named() -> None:
    made = entry(POINTWISE)
    config = {k: v for k, v in made.config.items() if k != "split"}
    with pytest.raises(ValueError, match="GemmConfig: missing field split"):
        tuned.read(replace(made, config=config), TUNABLE["pointwise"], GPU)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        pytest.param({"branches": [[64, 1, 1]]}, "Branch is [64, 1, 1]", id="no object"),
        pytest.param({"branches": {}}, "branches is {}, expected a list", id="no list"),
        pytest.param({"branches": [{"channels": 64, "kernel": 3}]}, "missing field", id="dilation"),
    ],
)
def test_nested_values_are_checked(key: dict[str, Any], reason: str) -> None:
    case = CASES[-2]
    with pytest.raises(ValueError) as error:
        tuned.read(entry(case, key), TUNABLE[case.kernel], GPU)
    assert reason in str(error.value)


def test_sizes_have_two_values() -> None:
    with pytest.raises(ValueError, match=r"in_size is \[9, 9, 9\], expected 2 values"):
        tuned.read(entry(ARGMAX, {"in_size": [9, 9, 9]}), TUNABLE["upsample_argmax"], GPU)


def test_what_does_not_fit_a_smaller_device_is_left_out_there(file: Path, caplog) -> None:
    """Of one compute capability; a multiprocessor of the second has less shared memory."""
    large = GemmConfig(128, 256, 64, 8, 4, 1)
    write(file, record(POINTWISE, (entry(POINTWISE, config=dataclasses.asdict(large)),)))
    assert POINTWISE.choose() == large and not caplog.records
    small = replace(GPU, shared=190 * 1024)
    assert POINTWISE.choose(device=small) != large
    assert "194560 bytes of a multiprocessor" in caplog.text


def test_the_file_is_read_once(file: Path) -> None:
    write(file, record(POINTWISE))
    assert POINTWISE.choose() == TILE
    file.unlink()
    assert POINTWISE.choose() == TILE


def test_one_s_own_go_before_shipped_ones(file: Path) -> None:
    other = replace(TILE, num_stages=3)
    candidates = TUNABLE["pointwise"].candidates(POINTWISE.key, GPU)
    other = next(c for c in candidates if c not in (TILE, by_rule(POINTWISE)))
    shipped = entry(POINTWISE, config=dataclasses.asdict(other))
    write(records.SHIPPED, record(POINTWISE, (shipped,)))
    assert POINTWISE.choose() == other
    write(file, record(POINTWISE))
    assert POINTWISE.choose() == TILE


def test_forced_ones_nest_and_say_who_asked(file: Path) -> None:
    write(file, record(POINTWISE))
    small = replace(TILE, block_n=128)
    with tuned.forced("pointwise", small) as asked:
        assert POINTWISE.choose() == small
        with tuned.forced("pointwise", None):
            assert POINTWISE.choose() != TILE
        assert POINTWISE.choose() == small
    assert asked == [(POINTWISE.key, GPU)]
    assert POINTWISE.choose() == TILE


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What the launchers launch, as on `GPU`."""
    made: list[SimpleNamespace] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: made.append(
                SimpleNamespace(kernel=self.name, **options)
            )

    class Kernels:
        def __getattr__(self, name: str) -> Kernel:
            return Kernel(name)

    monkeypatch.setattr(launch, "device_module", lambda name: Kernels())
    monkeypatch.setattr(launch, "on_device", lambda x: nullcontext())
    monkeypatch.setattr(launch, "device_of", lambda x: GPU)
    return made


def test_launchers_of_upsampling_kernels_take_it(file: Path, launches) -> None:
    logits = torch.empty(2, 21, 9, 9)
    target = torch.zeros(2, 33, 33, dtype=torch.int64)
    write(
        file, *(record(case) for case in CASES[:3]), record(CASES[3], tuple(map(entry, CASES[3:5])))
    )
    upsample.upsample_argmax(logits, (33, 33), False, False)
    upsample.upsample_confusion(logits, target, 255, False)
    upsample.upsample_softmax_add(torch.empty(2, 21, 33, 33), logits, False, False)
    loss = (logits, target, None, 255, 0.0, "mean", False)
    upsample.upsample_cross_entropy(*loss)
    upsample.upsample_cross_entropy_with_grad(*loss)
    found = [
        UpsampleConfig(k.ROWS, k.COLS, BLOCKS.block_cols * getattr(k, "WITH_GRAD", 0), k.num_warps)
        for k in launches
        if hasattr(k, "ROWS")
    ]
    assert found == [case.config for case in (*CASES[:3], CASES[4], CASES[3])]
    # Other logits: the rule's choice.
    upsample.upsample_argmax(logits[:1], (33, 33), False, False)
    assert launches[-1].ROWS == forward_config((9, 9), (33, 33), False).rows != 2


def test_launchers_of_products_take_it(file: Path, launches) -> None:
    half = {"dtype": torch.float16}
    branches, pointwise = CASES[-2:]
    write(file, record(branches), record(pointwise))
    x = torch.empty(2, 256, 33, 33, **half)
    weights = [torch.empty(b.channels, 256, b.kernel, b.kernel, **half) for b in BRANCHES]
    vectors = [torch.empty(b.channels) for b in BRANCHES]
    aspp.aspp_branches(x, weights, vectors, vectors, [b.dilation for b in BRANCHES])
    assert launches[0].SPLIT == branches.config.split
    x = torch.empty(1, 256, 65, 65, **half)
    residual = torch.empty(1, 512, 65, 65, **half)
    vector = torch.empty(512)
    for given in (residual, None):
        args = (x, torch.empty(512, 256, 1, 1, **half), vector, vector)
        conv.conv_bn_act(*args, residual=given)
    # One element beyond a multiple of 16 bytes: accesses are shorter.
    odd = torch.empty(x.numel() + 1, **half)[1:].view(1, 65, 65, 256).permute(0, 3, 1, 2)
    conv.conv_bn_act(odd, *args[1:], residual=residual)
    tiles = [
        (launch.BLOCK_M, launch.BLOCK_N, launch.BLOCK_C)
        for launch in launches
        if launch.kernel.endswith(("branches_kernel", "pointwise_kernel"))
    ]
    block = (TILE.block_m, TILE.block_n, TILE.block_c)
    assert [tile == block for tile in tiles] == [True, True, False, False]


def test_a_projection_asks_for_its_product(file: Path, launches) -> None:
    key = PointwiseKey(2, 35, 64, 32, FMA_FP32, True, False, False)
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "allow_tf32", lambda: False)
        patch.setattr(tuned, "measured", lambda *facts: asked.append(facts))
        aspp.aspp_project(
            torch.empty(2, 64, 5, 7),
            torch.empty(2, 16),
            torch.empty(32, 80, 1, 1),
            *torch.empty(2, 32),
        )
    assert asked == [(POINTWISE_PRODUCT, key, GPU)]


def test_keys_and_configurations_are_frozen() -> None:
    for case in CASES:
        for made in (case.key, case.config, TUNABLE[case.kernel]):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(made, dataclasses.fields(made)[0].name, 0)


def test_configurations_that_ship_fit() -> None:
    shipped = Path(records.__file__).with_name("shipped.json")
    for found in records.read(shipped):
        device = replace(GPU, capability=found.capability)
        for config in found.configs:
            assert tuned.read(config, TUNABLE[config.kernel], device)
