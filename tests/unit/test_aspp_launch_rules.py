"""The rules that choose launch configurations of the Triton ASPP and 1x1 kernels.

Tiles of an H100 are 128x256 where nothing speaks against them, one block a multiprocessor: 132
programs. A branch of one tap on a map that tiles divide has tiles that are counted by hand.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deeplab_fast import _ext
from deeplab_fast.plan.device import H100, device_like
from deeplab_fast.plan.gemm import (
    FMA_FP32,
    MMA_16BIT,
    MMA_TF32,
    aspp_branches_candidates,
    aspp_dgrad_candidates,
    pointwise_candidates,
)
from deeplab_fast.plan.rules import (
    BranchesKey,
    PointwiseKey,
    branches_rule,
    dgrad_rule,
    pointwise_rule,
    wgrad_rule,
)
from deeplab_fast.plan.taps import Branch

# The GPUs of the launch tests.
if "launch_conftest" not in sys.modules:
    _path = Path(__file__).parents[1] / "launch" / "conftest.py"
    _spec = importlib.util.spec_from_file_location("launch_conftest", _path)
    sys.modules["launch_conftest"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["launch_conftest"])
DEVICES = {
    gpu.name: device_like(gpu.properties) for gpu in sys.modules["launch_conftest"].GPUS.values()
}
RULES = {
    "branches": branches_rule,
    "dgrad": dgrad_rule,
    "wgrad": wgrad_rule,
}
on_every_gpu = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)

OS8 = (Branch(256, 1, 1), *(Branch(256, 3, d) for d in (12, 24, 36)))
OS16 = (Branch(256, 1, 1), *(Branch(256, 3, d) for d in (6, 12, 18)))


def one_tap(filters: int) -> tuple[Branch, ...]:
    return (Branch(filters, 1, 1),)


def narrow(filters: int) -> tuple[Branch, ...]:
    return (Branch(filters, 1, 1), *(Branch(filters, 3, d) for d in (6, 12, 18)))


@on_every_gpu
@pytest.mark.parametrize("math", [MMA_16BIT, MMA_TF32, FMA_FP32])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("filters", [21, 48, 64, 128, 192, 256])
def test_choices_are_legal_candidates(device, math, aligned, filters) -> None:
    itemsize = 2 if math == MMA_16BIT else 4
    for batch, channels in ((1, 320), (1, 2048), (16, 64), (16, 960)):
        key = BranchesKey(batch, 33, 33, channels, narrow(filters), math, aligned)
        product = PointwiseKey(batch, 1089, channels, filters, math, aligned)
        chosen = {
            branches_rule(key, device): (aspp_branches_candidates(math, device, filters, aligned)),
            dgrad_rule(key, device): (aspp_dgrad_candidates(math, device, channels, aligned)),
            wgrad_rule(key, device): (aspp_branches_candidates(math, device, channels, aligned)),
            pointwise_rule(product, device): (pointwise_candidates(math, device, filters, aligned)),
        }
        if candidates := pointwise_candidates(math, device, filters, aligned, True):
            chosen[pointwise_rule(replace(product, classes=True), device)] = candidates
        for config, candidates in chosen.items():
            assert config in candidates and config.is_legal(itemsize, device)


@pytest.mark.parametrize(
    ("op", "shape", "branches", "split"),
    [
        pytest.param("branches", (1, 65, 65, 2048), OS8, True, id="forward of one image"),
        pytest.param("branches", (16, 65, 65, 2048), OS8, False, id="forward of a batch"),
        pytest.param("branches", (1, 128, 395, 64), one_tap(256), True, id="395 tiles of 132 x 3"),
        pytest.param("branches", (1, 128, 396, 64), one_tap(256), False, id="396 tiles"),
        pytest.param(
            "branches", (1, 128, 791, 64), one_tap(128), True, id="two blocks a multiprocessor: 791"
        ),
        pytest.param("branches", (1, 128, 792, 64), one_tap(128), False, id="two blocks: 792"),
        pytest.param("dgrad", (1, 33, 33, 2048), OS16, True, id="dgrad of one image"),
        pytest.param("dgrad", (1, 128, 395, 256), one_tap(64), True, id="dgrad, 395 tiles"),
        pytest.param("dgrad", (1, 128, 396, 256), one_tap(64), False, id="dgrad, 396 tiles"),
        pytest.param("wgrad", (8, 33, 33, 2048), OS16, True, id="wgrad of a batch"),
        pytest.param("wgrad", (8, 33, 33, 65536), OS16, True, id="wgrad, however many tiles"),
        pytest.param("wgrad", (1, 33, 33, 2048), OS16, False, id="wgrad of one image: short tiles"),
        pytest.param("wgrad", (1, 64, 23, 256), one_tap(256), False, id="wgrad, 23 iterations"),
        pytest.param("wgrad", (1, 64, 24, 256), one_tap(256), True, id="wgrad, 24 iterations"),
    ],
)
def test_few_or_long_tiles_are_cut(op, shape, branches, split) -> None:
    config = RULES[op](BranchesKey(*shape, branches, MMA_16BIT), H100)
    assert config.split == split


@pytest.mark.parametrize(
    ("op", "filters", "channels", "device", "block"),
    [
        pytest.param("branches", 256, 2048, "H100", (128, 256), id="the model's"),
        pytest.param("branches", 129, 2048, "H100", (128, 256), id="half a tile and one filter"),
        pytest.param("branches", 128, 2048, "H100", (128, 128), id="half a tile"),
        pytest.param("branches", 21, 320, "H100", (64, 64), id="fewer filters than any tile"),
        pytest.param("branches", 256, 2048, "A100", (128, 128), id="A100"),
        pytest.param("branches", 256, 2048, "RTX 3090", (128, 128), id="100 KiB: the same"),
        pytest.param("dgrad", 21, 2048, "H100", (128, 256), id="dgrad: filters are summed"),
        pytest.param("dgrad", 256, 64, "H100", (64, 64), id="dgrad: channels are columns"),
        pytest.param("wgrad", 65, 2048, "H100", (128, 256), id="wgrad: half a tile and one row"),
        pytest.param("wgrad", 64, 2048, "H100", (64, 256), id="wgrad: half a tile of rows"),
        pytest.param("wgrad", 21, 2048, "H100", (64, 256), id="wgrad: fewer rows than any tile"),
        pytest.param("wgrad", 256, 64, "H100", (64, 64), id="wgrad: channels are columns"),
    ],
)
def test_tiles_are_as_wide_as_what_fills_them(op, filters, channels, device, block) -> None:
    key = BranchesKey(4, 65, 65, channels, narrow(filters), MMA_16BIT)
    config = RULES[op](key, DEVICES[device])
    assert (config.block_m, config.block_n) == block


@on_every_gpu
def test_widest_branch_counts(device) -> None:
    """Of branches of unequal filters, for the forward product and for the filters' gradient."""
    for op in ("branches", "wgrad"):
        choose = RULES[op]
        blocks = {
            (c.block_m, c.block_n)
            for branches in (OS16, (*OS16, Branch(21, 3, 2)))
            for c in [choose(BranchesKey(4, 33, 33, 2048, branches, MMA_16BIT), device)]
        }
        assert len(blocks) == 1


@pytest.mark.parametrize(
    ("groups", "pixels", "filters", "options", "block"),
    [
        pytest.param(1, 66 * 128, 256, {}, (128, 256), id="66 tiles: every other multiprocessor"),
        pytest.param(1, 65 * 128, 256, {}, (128, 128), id="65 tiles: the next, with 130"),
        pytest.param(66, 1, 256, {}, (128, 256), id="groups share no tile"),
        pytest.param(1, 1089, 2048, {}, (128, 256), id="tiles of filters count"),
        pytest.param(1, 64, 256, {}, (64, 64), id="never enough: the last"),
        pytest.param(1, 192, 4096, {}, (64, 128), id="enough with the fourth: 96, before it 64"),
        pytest.param(16, 4225, 256, {"classes": True}, (64, 256), id="classes: all filters"),
        pytest.param(1, 64, 256, {"classes": True}, (64, 256), id="classes, never enough"),
        pytest.param(16, 4225, 256, {"aligned": False}, (64, 64), id="unaligned"),
    ],
)
def test_products_fill_every_other_multiprocessor(groups, pixels, filters, options, block) -> None:
    key = PointwiseKey(groups, pixels, 1024, filters, MMA_16BIT, **options)
    config = pointwise_rule(key, H100)
    assert (config.block_m, config.block_n) == block and not config.split


def test_classes_of_more_filters_than_a_tile_holds() -> None:
    with pytest.raises(ValueError, match="no tile holds 300 filters"):
        pointwise_rule(PointwiseKey(16, 4225, 1024, 300, MMA_16BIT, classes=True), H100)


def test_more_multiprocessors_are_cut_for_longer() -> None:
    key = BranchesKey(1, 128, 396, 64, one_tap(256), MMA_16BIT)
    assert not branches_rule(key, H100).split
    assert branches_rule(key, replace(H100, multiprocessors=133)).split


def test_the_cuda_backend_needs_no_triton_kernels() -> None:
    """Its choice, packing and tables, where `deeplab_fast.kernels` cannot be imported."""
    code = (
        "import sys; sys.modules['deeplab_fast.kernels'] = sys.modules['triton'] = None\n"
        "import torch\n"
        "from deeplab_fast.ops import aspp_cuda\n"
        "from deeplab_fast.plan.device import A100\n"
        "weights = [torch.ones(8, 16, 1, 1), torch.ones(8, 16, 3, 3)]\n"
        "vectors = [torch.ones(8)] * 2\n"
        "packed = aspp_cuda.PackedBranches.pack(weights, vectors, vectors, [1, 2])\n"
        "choice = aspp_cuda.choose(aspp_cuda.Problem(1, 9, 9, 16, packed.branches), A100)\n"
        "x = torch.ones(1, 16, 9, 9)\n"
        "work = choice.config, choice.programs, aspp_cuda.schedule\n"
        "tables = aspp_cuda.device_tables(x, packed.branches, *work)\n"
        "assert choice.tile.architecture == 80 and tables.starts.numel() > 1\n"
        "calls = []\n"
        "aspp_cuda._run_sm80 = aspp_cuda._run_sm90 = lambda *args: calls.append(args)\n"
        "given = packed.weights, packed.scales, packed.shifts, packed.dilations\n"
        "y = aspp_cuda.aspp_branches(x, *given)\n"
        "assert y.shape == (1, 16, 9, 9) and calls[0][1] is not None\n"
    )
    if not _ext.CPU.loaded:
        pytest.skip(f"the table of tiles is in deeplab_fast._C: {_ext.CPU.reason}")
    subprocess.run([sys.executable, "-c", code], check=True)
