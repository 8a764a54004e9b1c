"""Units of work of the tiled convolutions, and the simulation of many threads."""

from __future__ import annotations

import pytest
import torch

from bench.cpu_units import RESNET50, Layer, busy, table
from deeplab_fast import _ext
from deeplab_fast.ops import cpu_rates
from deeplab_fast.ops._cpu_forms import FORMS, tile_forms
from deeplab_fast.ops.cpu_rates import ZEN3
from deeplab_fast.ops.cpu_units import Unit, tile_units
from deeplab_fast.testing import threads

OPS = torch.ops.deeplab_fast
CACHE = 32 << 20
pytestmark = pytest.mark.skipif(not _ext.CPU.loaded, reason=_ext.CPU.reason)


@pytest.fixture(autouse=True)
def zen3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_rates, "processor", lambda: ZEN3)


class TestSimulation:
    @pytest.mark.parametrize(
        ("stages", "count", "ends"),
        [
            ([[1, 1, 1]], 2, 2),
            ([[3, 1, 1, 1]], 2, 3),
            ([[1, 1, 3]], 2, 4),
            ([[1, 1, 1], [1]], 2, 3),
            ([[2], [2]], 4, 4),
            ([[5]], 1, 5),
        ],
        ids=[
            *("one left over", "the longest first", "the longest last", "a stage waits"),
            *("more threads than units", "one thread"),
        ],
    )
    def test_time(self, stages, count, ends) -> None:
        units = [Unit(i, seconds) for i, stage in enumerate(stages) for seconds in stage]
        worked = sum(unit.seconds for unit in units)
        assert busy(units, count) == (ends, worked / (count * ends))

    def test_table(self) -> None:
        lines = table([2, 64], CACHE).splitlines()
        assert len(lines) == 3 + len(RESNET50)
        assert [line.count("|") for line in lines] == [4] * len(lines)


class TestUnits:
    @pytest.mark.parametrize("count", [1, 2, 16, 64])
    @pytest.mark.parametrize("layer", RESNET50, ids=lambda layer: layer.name)
    def test_they_are_the_whole_work(self, layer: Layer, count: int) -> None:
        """Their multiply-adds are those of the form, whatever number of threads they are for."""
        call = (1, layer.channels, layer.outputs, layer.size, layer.size, layer.dilation)
        form = tile_forms(*call, count, True, layer.coarse)[0]
        by = cpu_rates.rates()
        units = tile_units(
            (1, layer.channels, layer.size, layer.size),
            layer.outputs,
            layer.dilation,
            count,
            coarse=layer.coarse,
            cache_bytes=CACHE,
        )
        lines = sum(
            rows * columns * products
            for rows, columns, products in (
                (
                    row_tiles * column_tiles,
                    layer.channels // 16,
                    row.inputs * column.inputs + row.products * column.products,
                )
                for row, row_tiles in form.rows.tiles
                for column, column_tiles in form.columns.tiles
            )
        )
        lines += sum(
            row_tiles
            * column_tiles
            * layer.outputs
            // 16
            * (row.outputs * column.outputs + row.products * column.products)
            for row, row_tiles in form.rows.tiles
            for column, column_tiles in form.columns.tiles
        )
        expected = form.macs / by.multiply + lines * by.line_seconds
        assert sum(unit.seconds for unit in units) == pytest.approx(expected)
        stages = [unit.stage for unit in units]
        assert stages == sorted(stages)

    @pytest.mark.parametrize(("count", "least"), [(2, 0.99), (4, 0.9), (16, 0.85), (64, 0.8)])
    def test_threads_are_busy(self, count: int, least: float) -> None:
        for layer in RESNET50:
            shape = (1, layer.channels, layer.size, layer.size)
            units = tile_units(
                shape,
                layer.outputs,
                layer.dilation,
                count,
                coarse=layer.coarse,
                cache_bytes=CACHE,
            )
            assert busy(units, count)[1] >= least, layer.name

    def test_blocks_follow_the_cache(self) -> None:
        """2048 channels at rate 12: a block of fewer tiles where the cache is small."""
        stages = {
            size: tile_units((1, 2048, 65, 65), 256, 12, 2, coarse=True, cache_bytes=size << 20)[
                -1
            ].stage
            for size in (8, 32, 1024)
        }
        assert stages[8] > stages[32] >= stages[1024]

    def test_the_cache_of_this_processor_is_known_or_taken_as_32_mib(self) -> None:
        form = [FORMS["tile4"].number] * 2
        here = OPS._conv_tile_units([1, 512, 65, 65], 512, 4, form, form, 2)
        # A phase of 17 samples, three of 16: 17 tiles.
        assert here[:, 1].sum() == 36 * 17**2 * 512 * 512


def test_rows_of_products_are_cut() -> None:
    """16 products of two panels are 3 rounds of 7 threads, 2.3 where their rows are cut."""
    form = [FORMS["tile2"].number] * 2
    found = OPS._conv_tile_units([1, 256, 24, 24], 32, 1, form, form, 7)
    products = found[found[:, 1] > 0]
    assert len(products) > 16


@pytest.mark.parametrize(
    ("channels", "outputs", "size", "dilation", "form"),
    [
        (300, 40, 30, 1, "tile4"),
        (256, 32, 24, 1, "tile2"),
        (200, 80, 9, 3, "line3"),
    ],
    ids=["two chunks and a tail", "rows of products are cut", "whole lines"],
)
def test_same_bits_for_any_number_of_threads(channels, outputs, size, dilation, form) -> None:
    x = torch.randn(1, channels, size, size).contiguous(memory_format=torch.channels_last)
    number = [FORMS[form].number] * 2
    weight = [OPS._conv_prepare_tiles_cpu(torch.randn(outputs, channels, 3, 3), *number)]
    results = {}
    for count in (1, 2, 7, 16):
        y = torch.full((1, outputs, size, size), float("nan"))
        y = y.contiguous(memory_format=torch.channels_last)
        with threads(count):
            OPS._conv_tiles_cpu(
                x, weight, torch.zeros(outputs), None, y, 0, dilation, number, number, "none"
            )
        results[count] = y
    assert results[1].isfinite().all()
    assert all(torch.equal(y, results[1]) for y in results.values())
