"""The rates of the CPU kernels: which processor is which, and what the cost model makes of them."""

from __future__ import annotations

import dataclasses

import pytest

from deeplab_fast.ops import _cpu_forms, cpu_rates
from deeplab_fast.ops.cpu_rates import ZEN3, ZEN4, Cpu, Processor, Rates


@pytest.fixture
def zen3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_rates, "processor", lambda: ZEN3)
    monkeypatch.setattr(cpu_rates, "instruction_set", lambda: "avx2")


class TestTable:
    @pytest.mark.parametrize(
        ("vendor", "family", "model", "expected"),
        [
            ("AuthenticAMD", 25, 0x01, ZEN3),
            ("AuthenticAMD", 25, 0x21, ZEN3),
            ("AuthenticAMD", 25, 0x50, ZEN3),
            ("AuthenticAMD", 25, 0x11, ZEN4),
            ("AuthenticAMD", 25, 0x61, ZEN4),
            ("AuthenticAMD", 25, 0x74, ZEN4),
            ("AuthenticAMD", 25, 0xA0, ZEN4),
            ("AuthenticAMD", 26, 0x02, None),
            ("GenuineIntel", 6, 0x8F, None),
            ("arm64", -1, -1, None),
        ],
        ids=[
            *("Milan", "Vermeer", "Cezanne", "Genoa", "Raphael", "Phoenix", "Bergamo"),
            *("Zen 5", "another maker", "not known"),
        ],
    )
    def test_which_processors_are_built_in(self, vendor, family, model, expected) -> None:
        assert Cpu(vendor, "", family, model).built_in is expected

    @pytest.mark.parametrize("known", [ZEN3, ZEN4], ids=["Zen 3", "Zen 4"])
    def test_rows(self, known: Processor) -> None:
        """Each set has a row for each dtype, once, and bfloat16 is no slower than float32."""
        keys = [(row.instruction_set, row.dtype) for row in known.rates]
        assert len(keys) == len(set(keys))
        assert {dtype for _, dtype in keys} == set(cpu_rates.DTYPES)
        rows = dict(zip(keys, known.rates, strict=True))
        for (name, dtype), row in rows.items():
            assert row.multiply > 0 and row.pixels > 0 and row.line_seconds > 0
            if row.onednn_1x1:
                assert row.onednn_1x1 >= rows[name, "float32"].onednn_1x1
            else:
                assert dtype == "bfloat16" and row.onednn_3x3 == 0

    def test_a_set_that_was_not_measured_takes_the_next_smaller_one(self, monkeypatch) -> None:
        monkeypatch.setattr(cpu_rates, "processor", lambda: ZEN3)
        monkeypatch.setattr(cpu_rates, "instruction_set", lambda: "avx512")
        assert cpu_rates.rates().instruction_set == "avx2"

    def test_other_dtypes_are_refused(self) -> None:
        with pytest.raises(ValueError, match="dtype is 'float16'; allowed: float32, bfloat16"):
            cpu_rates.rates("float16")


class TestCosts:
    def test_onednn(self, zen3) -> None:
        macs = 74 * 10**9
        call = _cpu_forms.ONEDNN_CALL_SECONDS
        assert _cpu_forms.onednn_seconds(macs, 2) == pytest.approx(1 + call)
        assert _cpu_forms.onednn_seconds(macs, 2, dtype="bfloat16") == float("inf")

    def test_1x1_has_a_rate_of_its_own(self, monkeypatch) -> None:
        row = Rates("avx2", "float32", 1e9, 2e9, 4e9, 8e9, 1e-9)
        monkeypatch.setattr(cpu_rates, "processor", lambda: Processor((row,), ""))
        seconds = _cpu_forms.onednn_seconds(8 * 10**9, 1, pointwise=True)
        assert seconds == pytest.approx(2 + _cpu_forms.ONEDNN_CALL_SECONDS)
        assert _cpu_forms.pixels_seconds(8 * 10**9, 2) == pytest.approx(2 + _cpu_forms.CALL_SECONDS)

    def test_tiles(self, monkeypatch, zen3) -> None:
        """A product at half the rate costs its multiply-adds once more, a slower transform time."""

        def best() -> _cpu_forms.TileForm:
            call = (1, 64, 64, 130, 130, 1, 2)
            return _cpu_forms.tile_forms(*call, reuse=True, coarse=False)[0]

        def with_rates(**rates: float) -> _cpu_forms.TileForm:
            rows = tuple(dataclasses.replace(row, **rates) for row in ZEN3.rates)
            monkeypatch.setattr(cpu_rates, "processor", lambda: Processor(rows, ""))
            return best()

        before = best()
        slow = with_rates(multiply=39e9 / 2)
        assert str(slow) == str(before)
        assert slow.seconds - before.seconds == pytest.approx(before.macs / 39e9 / 2)
        assert with_rates(line_seconds=1e-8).seconds > 1.2 * before.seconds
