"""Measured launch configurations: which files are read, what makes one ignored, what runs then.

Only host code runs here: launchers hand their launches to a recorder.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deeplab_fast.kernels import _compat, aspp, configs, conv, tuned, upsample
from deeplab_fast.kernels.configs import (
    FMA_FP32,
    H100,
    MMA_16BIT,
    BranchesKey,
    GemmConfig,
    PointwiseKey,
    UpsampleConfig,
    UpsampleKey,
)

from deeplab_fast.ops.aspp_tiles import Branch

ROOT = Path(__file__).resolve().parents[2]
GPU = replace(H100, name="NVIDIA H100 80GB HBM3")
TRITON = "3.7.1"
BRANCHES = (Branch(64, 1, 1), Branch(128, 3, 12))
LOGITS = UpsampleKey(2, 21, (9, 9), (33, 33), False, "float32")
FOUR_WARPS = UpsampleConfig(2, 128, 0, 4)
BLOCKS = UpsampleConfig(4, 32, 8, 1)
TILE = GemmConfig(64, 64, 64, 4, 4, 3)


@dataclass(frozen=True)
class Case:
    """A call, a legal configuration that the analytic model does not choose for it, and how its
    launcher asks."""

    kernel: str
    key: Any
    config: Any
    choose: Callable[..., Any]


def _upsample(kernel: str, config: UpsampleConfig) -> Case:
    def choose(key=LOGITS, device=GPU) -> UpsampleConfig:
        shape = (key.n, key.classes, *key.in_size)
        options = (key.out_size, key.align_corners, key.dtype, device)
        return configs.upsample_config(kernel, shape, *options)

    return Case(kernel, LOGITS, config, choose)


def _branches() -> Case:
    key = BranchesKey(2, 33, 33, 256, BRANCHES, MMA_16BIT, True)

    def choose(key=key, device=GPU) -> GemmConfig:
        *shape, aligned = (getattr(key, f.name) for f in dataclasses.fields(key))
        return configs.aspp_branches_config(*shape, device, aligned)

    return Case("aspp_branches", key, replace(TILE, split=True), choose)


def _pointwise() -> Case:
    key = PointwiseKey(1, 4225, 256, 512, MMA_16BIT, True, False, True)

    def choose(key=key, device=GPU) -> GemmConfig:
        *shape, aligned, classes, residual = (getattr(key, f.name) for f in dataclasses.fields(key))
        return configs.pointwise_config(*shape, device, aligned, classes, residual)

    return Case("pointwise", key, TILE, choose)


CASES = [
    _upsample("upsample_argmax", FOUR_WARPS),
    _upsample("upsample_confusion", FOUR_WARPS),
    _upsample("upsample_softmax_add", FOUR_WARPS),
    _upsample("upsample_cross_entropy", BLOCKS),
    _upsample("upsample_cross_entropy_forward", FOUR_WARPS),
    _branches(),
    _pointwise(),
]
every_kernel = pytest.mark.parametrize("case", CASES, ids=lambda c: c.kernel)
ARGMAX, POINTWISE = CASES[0], CASES[-1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty folder of files, none of them read before."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "installed_triton", lambda: TRITON)
    monkeypatch.delenv(tuned.ENVIRONMENT_VARIABLE, raising=False)
    tuned._entries.cache_clear()
    yield tmp_path
    tuned._entries.cache_clear()


def content(case: Case, **changes: Any) -> dict[str, Any]:
    entry = {"key": dataclasses.asdict(case.key), "config": dataclasses.asdict(case.config)}
    head = {"version": tuned.VERSION, "kernel": case.kernel, "gpu": GPU.name, "triton": TRITON}
    return {**head, "entries": [entry | {"ms": 1.0}], **changes}


def write(folder: Path, case: Case, text: Any = None) -> Path:
    path = tuned.path_of(folder, GPU.name, case.kernel)
    path.parent.mkdir(exist_ok=True)
    given = content(case) if text is None else text
    path.write_text(given if isinstance(given, str) else json.dumps(given), "utf-8")
    return path


def analytic(case: Case) -> Any:
    """What is chosen where no file can be meant."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(tuned.ENVIRONMENT_VARIABLE, "0")
        return case.choose()


def test_there_is_a_case_for_every_kernel() -> None:
    assert {case.kernel for case in CASES} == set(configs.TUNABLE)


@every_kernel
def test_without_files_the_choice_is_the_analytic_one(case: Case, caplog) -> None:
    expected = {
        "UpsampleKey": lambda key: (
            configs.gradient_config
            if case.kernel == "upsample_cross_entropy"
            else configs.forward_config
        )(key.in_size, key.out_size, key.align_corners),
        "BranchesKey": lambda key: configs._analytic_branches_config(
            key.batch, key.height, key.width, key.channels, key.branches, key.math, GPU, True
        ),
        "PointwiseKey": lambda key: configs._analytic_pointwise_config(
            key.groups, key.pixels, key.channels, key.filters, key.math, GPU, True, False
        ),
    }
    assert case.choose() == expected[type(case.key).__name__](case.key) != case.config
    assert not caplog.records


@every_kernel
def test_a_written_file_is_chosen(case: Case, folder: Path, monkeypatch) -> None:
    write(folder, case)
    assert case.choose() == case.config
    # For this call and this device alone.
    first = dataclasses.fields(case.key)[0].name
    other = replace(case.key, **{first: getattr(case.key, first) + 1})
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, "0")
    elsewhere = case.choose(other), case.choose(device=H100)
    monkeypatch.delenv(tuned.ENVIRONMENT_VARIABLE)
    assert (case.choose(other), case.choose(device=H100)) == elsewhere
    assert elsewhere[1] != case.config


@every_kernel
def test_the_variable_switches_files_off(case: Case, folder: Path, monkeypatch, caplog) -> None:
    write(folder, case, "not even JSON")
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, "0")
    assert case.choose() == analytic(case) != case.config
    # It was not read: there is nothing to say of it.
    assert not caplog.records


def _entries(**changes: Any) -> dict[str, Any]:
    """The pointwise file with another key or config."""
    (entry,) = content(POINTWISE)["entries"]
    return content(POINTWISE, entries=[entry | changes])


KEY = dataclasses.asdict(POINTWISE.key)
CONFIG = dataclasses.asdict(TILE)
LARGE = dataclasses.asdict(GemmConfig(128, 256, 64, 8, 4, 2))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param('{"version": 1, ', "cannot be read", id="cut off"),
        pytest.param([content(POINTWISE)], "no object with a list", id="a list"),
        pytest.param({"version": 1}, "no object with a list", id="no entries"),
        pytest.param(content(POINTWISE, version=0), "of version 0, here it is 1", id="version"),
        pytest.param(
            content(POINTWISE, triton="3.6.0"), "of triton '3.6', here it is '3.7'", id="triton"
        ),
        pytest.param(content(POINTWISE, gpu="A100"), "of gpu 'A100'", id="another GPU"),
        pytest.param(content(ARGMAX), "of kernel 'upsample_argmax'", id="another kernel"),
        pytest.param(
            content(POINTWISE, entries=[7]), 'entry 0: it is no object with "key"', id="7"
        ),
        pytest.param(
            _entries(config=CONFIG | {"num_ctas": 2}),
            "entry 0: GemmConfig: unknown field num_ctas",
            id="unknown field",
        ),
        pytest.param(
            _entries(config={k: v for k, v in CONFIG.items() if k != "split"}),
            "entry 0: GemmConfig: missing field split",
            id="missing field",
        ),
        pytest.param(
            _entries(key=KEY | {"stride": 2}), "PointwiseKey: unknown field stride", id="key"
        ),
        pytest.param(
            _entries(config=CONFIG | {"num_warps": True}), "num_warps is True", id="bool for int"
        ),
        pytest.param(
            _entries(key=KEY | {"math": None}), "math is None, expected str", id="null for string"
        ),
        pytest.param(_entries(config=None), "GemmConfig is None, expected an object", id="null"),
        pytest.param(
            _entries(config=LARGE), "bytes of shared memory are more than the", id="shared memory"
        ),
        pytest.param(
            _entries(config=CONFIG | {"block_n": 32}), "is no candidate for this", id="no candidate"
        ),
        pytest.param(
            # A tile of 64 filters leaves none for the classes of 512.
            _entries(key=KEY | {"classes": True}),
            "is no candidate for this",
            id="no candidate for the key",
        ),
        pytest.param(
            content(POINTWISE, entries=content(POINTWISE)["entries"] * 2),
            "entry 1: its key is that of an entry before",
            id="twice",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_ignored_with_one_line(text, reason, folder, caplog) -> None:
    path = write(folder, POINTWISE, text)
    with caplog.at_level(logging.INFO, "deeplab_fast"):
        chosen = [POINTWISE.choose() for _ in range(3)]
    assert chosen == [analytic(POINTWISE)] * 3
    (record,) = caplog.records
    message = record.getMessage()
    assert record.levelno == logging.WARNING
    assert reason in message and str(path) in message and "python -m bench.tune" in message


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        pytest.param({"branches": [[64, 1, 1]]}, "Branch is [64, 1, 1]", id="no object"),
        pytest.param({"branches": {}}, "branches is {}, expected a list", id="no list"),
        pytest.param({"branches": [{"channels": 64, "kernel": 3}]}, "missing field", id="dilation"),
    ],
)
def test_nested_values_are_checked(key: dict[str, Any], reason: str, folder: Path) -> None:
    case = _branches()
    made = content(case)
    made["entries"][0]["key"] |= key
    with pytest.raises(ValueError, match="entry 0") as error:
        tuned.read(write(folder, case, made), case.kernel, configs.TUNABLE[case.kernel], GPU)
    assert reason in str(error.value)


def test_sizes_have_two_values(folder: Path) -> None:
    made = content(ARGMAX)
    made["entries"][0]["key"]["in_size"] = [9, 9, 9]
    with pytest.raises(ValueError, match=r"in_size is \[9, 9, 9\], expected 2 values"):
        tuned.read(
            write(folder, ARGMAX, made), ARGMAX.kernel, configs.TUNABLE["upsample_argmax"], GPU
        )


def test_another_patch_release_of_triton_is_the_same(folder: Path) -> None:
    write(folder, POINTWISE, content(POINTWISE, triton="3.7.0"))
    assert POINTWISE.choose() == TILE


def test_what_does_not_fit_a_smaller_device_is_ignored_there(folder: Path, caplog) -> None:
    """Two devices of one name: a multiprocessor of the second has less shared memory."""
    large = GemmConfig(128, 256, 64, 8, 4, 1)
    write(folder, POINTWISE, _entries(config=dataclasses.asdict(large)))
    assert POINTWISE.choose() == large and not caplog.records
    small = replace(GPU, shared=190 * 1024)
    assert POINTWISE.choose(device=small) != large
    assert "194560 bytes of a multiprocessor" in caplog.text


def test_a_file_is_read_once(folder: Path) -> None:
    path = write(folder, POINTWISE)
    assert POINTWISE.choose() == TILE
    path.unlink()
    assert POINTWISE.choose() == TILE


def test_names_of_devices_make_folders() -> None:
    path = tuned.path_of(Path("f"), "NVIDIA A100-SXM4 (40/80 GB)", "pointwise")
    assert path == Path("f", "NVIDIA_A100-SXM4_40_80_GB_", "pointwise.json")


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

    monkeypatch.setattr(_compat, "device_module", lambda name: Kernels())
    monkeypatch.setattr(_compat, "on_device", lambda x: nullcontext())
    for module in (conv, aspp, upsample):
        monkeypatch.setattr(module, "device_of", lambda x: GPU)
    return made


def test_launchers_of_upsampling_kernels_take_it(folder: Path, launches) -> None:
    logits = torch.empty(2, 21, 9, 9)
    target = torch.zeros(2, 33, 33, dtype=torch.int64)
    for case in CASES[:5]:
        write(folder, case)
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
    # Other logits: the analytic choice.
    upsample.upsample_argmax(logits[:1], (33, 33), False, False)
    assert launches[-1].ROWS == configs.forward_config((9, 9), (33, 33), False).rows != 2


def test_launchers_of_products_take_it(folder: Path, launches) -> None:
    half = {"dtype": torch.float16}
    branches, pointwise = CASES[-2:]
    write(folder, branches)
    x = torch.empty(2, 256, 33, 33, **half)
    weights = [torch.empty(b.channels, 256, b.kernel, b.kernel, **half) for b in BRANCHES]
    vectors = [torch.empty(b.channels) for b in BRANCHES]
    aspp.aspp_branches(x, weights, vectors, vectors, [b.dilation for b in BRANCHES])
    assert launches[0].SPLIT == branches.config.split
    write(folder, pointwise)
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


def test_a_projection_asks_for_its_product(folder: Path, launches) -> None:
    key = PointwiseKey(2, 35, 64, 32, FMA_FP32, True, False, False)
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "allow_tf32", lambda: False)
        patch.setattr(configs, "tuned_config", lambda *facts: asked.append(facts))
        aspp.aspp_project(
            torch.empty(2, 64, 5, 7),
            torch.empty(2, 16),
            torch.empty(32, 80, 1, 1),
            *torch.empty(2, 32),
        )
    assert asked == [("pointwise", key, GPU)]


def test_keys_and_configurations_are_frozen() -> None:
    for case in CASES:
        for made in (case.key, case.config, configs.TUNABLE[case.kernel]):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(made, dataclasses.fields(made)[0].name, 0)


def test_triton_is_not_imported() -> None:
    code = (
        "import sys\n"
        "from deeplab_fast.kernels import configs, tuned\n"
        "tuned.installed_triton()\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_files_that_ship_fit(monkeypatch) -> None:
    """Each is in the folder of its device, of a kernel that there is, and of today's version."""
    for path in sorted((ROOT / "kernels" / "configs").rglob("*.json")):
        given = json.loads(path.read_text("utf-8"))
        device = replace(H100 if "H" in given["gpu"] else configs.A100, name=given["gpu"])
        assert path == tuned.path_of(ROOT / "kernels" / "configs", device.name, path.stem)
        monkeypatch.setattr(tuned, "installed_triton", lambda found=given["triton"]: found)
        assert tuned.read(path, path.stem, configs.TUNABLE[path.stem], device)
