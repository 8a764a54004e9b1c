"""The tables of fold_filters' GPU kernel: which program reads and writes what."""

from __future__ import annotations

from math import prod

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from deeplab_fast.plan import fold, tables
from deeplab_fast.plan.fold import Filters, FoldTable, LayerField

BASE = 1 << 40


def facts(row: np.ndarray) -> dict[str, int]:
    return {field.name: int(row[field]) for field in LayerField}


def carried_out(table: FoldTable, itemsize: int, size: int) -> tuple[np.ndarray, ...]:
    """(times written, address read, scale read) of every element of the results, as the kernel's
    programs go through the tables; what is zeroed has the address -1."""
    written = np.zeros(size, int)
    address = np.zeros(size, np.int64)
    scale = np.zeros(size, int)
    for program, number in enumerate(table.tiles):
        f = facts(table.layers[number])
        tile = program - f["TILE"]
        assert tile >= 0
        if tile == 0 and f["GAP"]:
            gap = slice(f["END"], f["END"] + f["GAP"])
            written[gap] += 1
            address[gap] = -1
        step = fold.VECTORS if f["WHOLE"] else fold.PAIRS
        unit = np.arange(tile * step, min((tile + 1) * step, f["UNITS"]))
        assert unit.size, "a program without work"
        if f["WHOLE"]:
            assert f["ADDRESS"] % fold.VECTOR_BYTES == 0
            vector = fold.VECTOR_BYTES // itemsize
            at = (unit[:, None] * vector + np.arange(vector)).ravel()
            found = [(at, at, np.repeat(unit // f["CHANNELS"], vector))]
        else:
            k, c = unit // f["CHANNELS"], unit % f["CHANNELS"]
            found = [
                (
                    (k * f["TAPS"] + tap) * f["CHANNELS"] + c,
                    k * f["FILTER"] + c * f["CHANNEL"]
                    + tap // f["COLS"] * f["ROW"] + tap % f["COLS"] * f["COL"],
                    k,
                )
                for tap in range(f["TAPS"])
            ]  # fmt: skip
        for to, source, filters in found:
            np.add.at(written, f["RESULT"] + to, 1)
            address[f["RESULT"] + to] = f["ADDRESS"] + itemsize * source
            scale[f["RESULT"] + to] = f["SCALE"] + filters
    return written, address, scale


def check(layers: list[Filters], itemsize: int) -> FoldTable:
    shapes = [layer.shape for layer in layers]
    size = fold.starts(shapes)[-1]
    table = fold.fold_table(layers, itemsize)
    written, address, scale = carried_out(table, itemsize, size)
    assert (written == 1).all()
    for start, end in fold.gaps(shapes):
        assert (address[start:end] == -1).all()
    first, filters = fold.starts(shapes), 0
    for layer, start in zip(layers, first, strict=False):
        k, c, r, s = np.indices(layer.shape).reshape(4, -1)
        _, channels, rows, cols = layer.shape
        at = start + ((k * rows + r) * cols + s) * channels + c
        source = sum(i * stride for i, stride in zip((k, c, r, s), layer.strides, strict=True))
        assert (address[at] == layer.address + itemsize * source).all()
        assert (scale[at] == filters + k).all()
        filters += layer.shape[0]
    return table


def contiguous(*shape: int, address: int = BASE) -> Filters:
    return Filters(shape, torch.empty(shape, device="meta").stride(), address)


def channels_last(*shape: int, address: int = BASE) -> Filters:
    x = torch.empty(shape, device="meta", memory_format=torch.channels_last)
    return Filters(shape, x.stride(), address)


@pytest.mark.parametrize(
    ("layer", "whole"),
    [
        pytest.param(contiguous(16, 64, 1, 1), True, id="1x1"),
        pytest.param(contiguous(9, 8, 1, 1), True, id="one vector a filter"),
        pytest.param(contiguous(300, 40, 1, 1), True, id="several tiles, the last one in part"),
        pytest.param(contiguous(16, 1, 4, 4), True, id="one channel, whole vectors"),
        pytest.param(channels_last(8, 16, 3, 3), True, id="channels_last"),
        pytest.param(contiguous(16, 1, 3, 3), False, id="one channel, no whole vectors"),
        pytest.param(contiguous(21, 7, 1, 1), False, id="odd channels"),
        pytest.param(contiguous(16, 64, 1, 1, address=BASE + 4), False, id="not at 16 bytes"),
        pytest.param(contiguous(8, 16, 3, 3), False, id="contiguous 3x3"),
        pytest.param(contiguous(33, 20, 3, 3), False, id="several tiles of pairs"),
        pytest.param(contiguous(64, 3, 7, 7), False, id="stem"),
        pytest.param(contiguous(5, 4, 2, 3), False, id="more columns than rows"),
        pytest.param(contiguous(5, 4, 3, 1), False, id="one column"),
        pytest.param(channels_last(5, 3, 3, 3), False, id="channels_last, odd channels"),
        pytest.param(Filters((4, 8, 3, 3), (0, 1, 0, 5), BASE), False, id="any strides"),
        pytest.param(contiguous(1, 1, 1, 1), False, id="one value"),
    ],
)  # fmt: skip
def test_every_value_is_read_and_written_once(layer: Filters, whole: bool) -> None:
    """Filters of 16 bits: 8 values a vector."""
    table = check([layer], 2)
    assert facts(table.layers[0])["WHOLE"] == whole


def test_layers_without_filters_have_no_program() -> None:
    table = check([contiguous(0, 3, 3, 3), contiguous(5, 3, 3, 3), contiguous(0, 8, 1, 1)], 2)
    assert table.tiles.tolist() == [1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 17), st.integers(1, 3), st.integers(1, 3)),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([2, 4]),
    st.integers(0, 2**31),
)
def test_any_layers(shapes: list[tuple[int, int, int, int]], itemsize: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    layers = []
    for i, shape in enumerate(shapes):
        make = (contiguous, channels_last)[random.integers(2)]
        layers.append(make(*shape, address=BASE + (i << 20) + itemsize * random.integers(9)))
    check(layers, itemsize)


def test_a_tile_is_about_as_much_work_either_way() -> None:
    """Values of a tile of 16 bits: whole vectors, and pairs of 3x3 filters."""
    assert 0.5 < fold.VECTORS * 8 / (fold.PAIRS * 9) < 2


def test_results_start_where_vectors_do() -> None:
    shapes = [(1, 1, 1, 1), (21, 7, 3, 3), (3, 1, 1, 1), (8, 8, 1, 1)]
    assert fold.starts(shapes) == [0, 8, 8 + 1328, 8 + 1328 + 8, 8 + 1328 + 8 + 64]
    assert fold.gaps(shapes) == [(1, 8), (8 + 1323, 8 + 1328), (8 + 1328 + 3, 8 + 1328 + 8)]
    assert prod((21, 7, 3, 3)) == 1323


class TestDeviceTables:
    @pytest.fixture(autouse=True)
    def _own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fold, "_latest", type(fold._latest)())
        monkeypatch.setattr(fold, "_captured", {})

    @staticmethod
    def weights() -> list[torch.Tensor]:
        return [torch.randn(4, 3, 3, 3), torch.randn(2, 8, 1, 1)]

    def test_made_once_for_filters_that_stay_where_they_are(self) -> None:
        weights = self.weights()
        first = fold.device_tables(weights)
        weights[0].mul_(2)
        assert fold.device_tables(list(weights)) is first
        assert first.layers.dtype == torch.int64 and first.tiles.tolist() == [0, 1]
        assert first.layers[:, LayerField.ADDRESS].tolist() == [w.data_ptr() for w in weights]

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda w: w.clone(), id="another address"),
            pytest.param(lambda w: w.view(4, 3, 9, 1), id="another shape"),
            pytest.param(lambda w: w.transpose(2, 3), id="other strides"),
            pytest.param(lambda w: w.view(torch.float16)[..., ::2][..., :1], id="another width"),
        ],
    )
    def test_made_anew_for_others(self, change) -> None:
        weights = self.weights()[:1]
        first = fold.device_tables(weights)
        assert fold.device_tables([change(w) for w in weights]) is not first

    def test_the_oldest_goes(self) -> None:
        kept, lost = self.weights(), self.weights()
        first, second = fold.device_tables(kept), fold.device_tables(lost)
        alive = []
        for _ in range(fold.MOST_TABLES - 1):
            alive.append(self.weights())
            fold.device_tables(alive[-1])
            assert fold.device_tables(kept) is first
        assert len(fold._latest) == fold.MOST_TABLES
        assert fold.device_tables(lost) is not second

    def test_what_a_graph_reads_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        captured = self.weights()
        first = fold.device_tables(captured)
        monkeypatch.setattr(fold, "capturing", lambda x: True)
        assert fold.device_tables(captured) is first
        monkeypatch.setattr(fold, "capturing", lambda x: False)
        alive = [self.weights() for _ in range(fold.MOST_TABLES + 1)]
        for weights in alive:
            fold.device_tables(weights)
        assert fold.device_tables(captured) is first

    def test_a_new_table_while_a_graph_is_captured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (fold, tables):
            monkeypatch.setattr(module, "capturing", lambda x: True)
        with pytest.raises(RuntimeError, match=r"table of these 2 layers.*run the op once"):
            fold.device_tables(self.weights())
        assert not fold._captured
