"""The rates of the CPU kernels: which processor is which, and what the cost model makes of them."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.cpu_units import RESNET50
from deeplab_fast import _ext, info
from deeplab_fast.ops import _cpu_forms, _cpu_probe, cpu_rates
from deeplab_fast.ops.cpu_processors import ZEN3, ZEN4, Cpu, Processor, Rates

OPS = torch.ops.deeplab_fast
UNKNOWN = Cpu("GenuineIntel", "of a maker's", 6, 143)
WIDE = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"})
needs_kernels = pytest.mark.skipif(not _ext.CPU.loaded, reason=_ext.CPU.reason)


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
        assert {dtype for _, dtype in keys} == {"float32", "bfloat16"}
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

    def test_the_price_of_weights(self, monkeypatch, zen3) -> None:
        """In all 3x3 convolutions of a ResNet-50 it costs less than 3 % for 15 % of the bytes."""

        def totals() -> tuple[float, float]:
            size = seconds = 0.0
            for layer in RESNET50:
                call = (1, layer.channels, layer.outputs, layer.size, layer.size, layer.dilation)
                form = _cpu_forms.tile_forms(*call, 2, True, layer.coarse)[0]
                size += layer.count * form.weight_bytes
                seconds += layer.count * form.seconds
            return size, seconds

        size, seconds = totals()
        _cpu_forms._tile_forms.cache_clear()
        monkeypatch.setattr(_cpu_forms, "WEIGHT_PRICE", 0.0)
        all_bytes, least = totals()
        _cpu_forms._tile_forms.cache_clear()
        assert size < 0.86 * all_bytes
        assert least < seconds < 1.03 * least

    def test_weights_for_one_call_have_no_price(self, zen3) -> None:
        call = (1, 2048, 256, 65, 65, 24, 2)
        kept = _cpu_forms.tile_forms(*call, reuse=True, coarse=False)
        once = _cpu_forms.tile_forms(*call, reuse=False, coarse=False)
        assert all(form.price > 0 for form in kept)
        assert all(form.price == 0 for form in once)

    def test_small_weights_have_no_price(self, zen3) -> None:
        """A small map takes its fastest form, which no kilobytes are worth."""
        forms = _cpu_forms.tile_forms(2, 64, 32, 13, 17, 1, 2, reuse=True, coarse=False)
        assert forms[0].seconds == min(form.seconds for form in forms)


def times(gain: float, argmax_gain: float) -> dict[tuple[str, str], float]:
    """Seconds of the probe's calls, with AVX-512 faster than AVX2 by so much."""
    found = {("", "1x1 float32"): 5e-4, ("", "3x3 float32"): 1e-3}
    for name, faster in (("avx2", 1.0), ("avx512", gain)):
        own = {"few": 2e-4, "many": 2e-3, "pixels": 4e-4}
        found |= {(name, call): seconds / faster for call, seconds in own.items()}
        found[name, "argmax"] = 1e-3 / (argmax_gain if name == "avx512" else 1)
    return found


class TestProbe:
    @pytest.mark.parametrize(
        ("gain", "argmax_gain", "convolutions", "upsampling"),
        [
            (1.9, 1.27, "avx512", "avx512"),
            (0.95, 1.27, "avx2", "avx512"),
            (1.05, 1.0, "avx2", "avx2"),
            (1.9, 0.8, "avx512", "avx2"),
        ],
        ids=["two wide ports", "neutral products", "gains within the noise", "slow gathers"],
    )
    def test_sets_of_a_processor(self, gain, argmax_gain, convolutions, upsampling) -> None:
        found = _cpu_probe.found_by(("avx2", "avx512"), times(gain, argmax_gain))
        assert (found.convolutions, found.upsampling) == (convolutions, upsampling)
        assert found.batch_norm == "avx2"
        narrow, wide = (r for r in found.rates if r.dtype == "float32")
        # Steps of 5 %.
        assert wide.multiply / narrow.multiply == pytest.approx(gain, rel=0.05)
        assert narrow.onednn_1x1 == pytest.approx(256**3 / 5e-4, rel=0.03)
        assert all(r.onednn_1x1 == r.onednn_3x3 == 0 for r in found.rates if r.dtype != "float32")

    def test_one_set_is_not_compared(self) -> None:
        found = _cpu_probe.found_by(
            ("baseline",), {("baseline", k): v for (s, k), v in times(1, 1).items() if s == "avx2"}
        )
        assert {found.convolutions, found.upsampling, found.batch_norm} == {"baseline"}

    def test_near_times_give_the_same_rates(self) -> None:
        """Rounding leaves two probes that differ by noise at most one step of 5 % apart."""
        calm = _cpu_probe.found_by(("avx2", "avx512"), times(1, 1))
        noisy = {key: seconds * 1.01 for key, seconds in times(1, 1).items()}
        for a, b in zip(
            calm.rates, _cpu_probe.found_by(("avx2", "avx512"), noisy).rates, strict=True
        ):
            assert a.multiply / b.multiply in (1, pytest.approx(1.05, rel=0.01))

    @needs_kernels
    def test_it_measures(self) -> None:
        """Threads and sets are as before, also for a call in a mode of PyTorch."""
        count = torch.get_num_threads()
        families = [OPS._cpu_suggest_set(family, "") for family in cpu_rates.FAMILIES]
        with torch.inference_mode(), torch.autocast("cpu"):
            found, _ = _cpu_probe.measure(Cpu.here())
        assert torch.get_num_threads() == count
        assert [OPS._cpu_suggest_set(family, "") for family in cpu_rates.FAMILIES] == families
        assert all(1e8 < row.multiply < 1e12 and 1e8 < row.pixels < 1e12 for row in found.rates)
        assert found.convolutions in Cpu.here().sets


@needs_kernels
class TestFile:
    @pytest.fixture
    def probes(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """One entry for each probe that was made."""
        made: list[int] = []

        def measure(cpu: Cpu) -> tuple[Processor, bool]:
            made.append(1)
            return _cpu_probe.found_by(("avx2", "avx512"), times(1.9, 1.3)), True

        monkeypatch.setattr(_cpu_probe, "measure", measure)
        return made

    def test_a_probe_serves_the_next_process(self, probes, tmp_path: Path) -> None:
        file = tmp_path / "new" / "rates.json"
        first = _cpu_probe.kept(file, UNKNOWN)
        assert first is not None and str(file) in first.origin
        assert _cpu_probe.kept(file, UNKNOWN) == first
        assert len(probes) == 1
        assert [path.name for path in file.parent.iterdir()] == ["rates.json"]

    def test_another_processor_or_build_is_probed(self, probes, tmp_path, monkeypatch) -> None:
        file = tmp_path / "rates.json"
        other = dataclasses.replace(UNKNOWN, model=85)
        for cpu in (UNKNOWN, other, UNKNOWN, other):
            _cpu_probe.kept(file, cpu)
        assert len(probes) == 2
        built = tmp_path / "_C.so"
        built.write_bytes(b"another build")
        module = SimpleNamespace(__file__=str(built))
        monkeypatch.setattr(_ext, "CPU", dataclasses.replace(_ext.CPU, module=module))
        _cpu_probe.kept(file, UNKNOWN)
        assert len(probes) == 3
        assert len(json.loads(file.read_text())["processors"]) == 3

    @pytest.mark.parametrize(
        "change",
        [
            lambda text: text[: len(text) // 2],
            lambda text: "[]",
            lambda text: text.replace('"version": 1', '"version": 0'),
            lambda text: text.replace('"multiply"', '"multiplies"'),
            lambda text: text.replace('"convolutions": "avx512"', '"convolutions": "neon"'),
            lambda text: '{"version": 1, "processors": {}}',
            lambda text: "[" * 10**5,
            lambda text: text.replace('"pixels": ', '"pixels": -'),
        ],
        ids=[
            *("cut off", "foreign", "of another version", "an unknown field", "an unknown set"),
            *("empty", "nested without end", "a negative rate"),
        ],
    )
    def test_a_broken_file_is_made_anew(self, probes, tmp_path: Path, change) -> None:
        file = tmp_path / "rates.json"
        first = _cpu_probe.kept(file, UNKNOWN)
        good = file.read_text()
        file.write_text(change(good))
        assert file.read_text() != good
        assert _cpu_probe.kept(file, UNKNOWN) == first
        assert len(probes) == 2
        assert file.read_text() == good

    def test_a_folder_that_cannot_be_written(self, probes, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        found = _cpu_probe.kept(tmp_path / "file" / "rates.json", UNKNOWN)
        assert found is not None and found.convolutions == "avx512"

    def test_a_busy_machine_is_asked_again(self, probes, tmp_path, monkeypatch) -> None:
        measure = _cpu_probe.measure
        monkeypatch.setattr(_cpu_probe, "measure", lambda cpu: (measure(cpu)[0], False))
        file = tmp_path / "rates.json"
        found = _cpu_probe.kept(file, UNKNOWN)
        assert found is not None and "beside other work" in found.origin
        assert not file.exists()

    def test_a_probe_that_fails_leaves_the_nearest(self, tmp_path, monkeypatch, caplog) -> None:
        def measure(cpu: Cpu) -> tuple[Processor, bool]:
            raise RuntimeError("no such op")

        monkeypatch.setattr(_cpu_probe, "measure", measure)
        monkeypatch.setattr(Cpu, "here", classmethod(lambda cls: UNKNOWN))
        monkeypatch.setenv(cpu_rates.ENVIRONMENT_VARIABLE, str(tmp_path / "rates.json"))
        with caplog.at_level(logging.WARNING, "deeplab_fast"):
            known = cpu_rates.processor()
        assert "could not be measured: no such op" in caplog.text
        assert known.rates == ZEN3.rates


class TestSwitch:
    def test_nothing_is_probed_where_it_is_off(self, monkeypatch) -> None:
        """As in all tests: conftest.py sets the variable."""
        monkeypatch.setattr(_cpu_probe, "kept", None)
        for flags, known in ((frozenset(), ZEN3), (WIDE, ZEN4)):
            cpu = dataclasses.replace(UNKNOWN, flags=flags)
            monkeypatch.setattr(Cpu, "here", classmethod(lambda cls, cpu=cpu: cpu))
            assert cpu_rates.processor().rates == known.rates
            assert known.origin in cpu_rates.processor().origin

    def test_where_the_file_stands(self, monkeypatch, tmp_path: Path) -> None:
        monkeypatch.delenv(cpu_rates.ENVIRONMENT_VARIABLE)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cpu_rates.path() == tmp_path / "deeplab_fast" / "cpu_rates.json"
        monkeypatch.setenv(cpu_rates.ENVIRONMENT_VARIABLE, "~/rates.json")
        assert cpu_rates.path() == Path.home() / "rates.json"

    def test_an_import_probes_nothing(self, tmp_path: Path) -> None:
        code = (
            "import deeplab_fast, sys\n"
            "from deeplab_fast.ops import cpu_rates\n"
            "sys.exit(cpu_rates._probed.cache_info().currsize or cpu_rates._chosen is not None)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@needs_kernels
class TestSets:
    @pytest.fixture(autouse=True)
    def restored(self) -> Iterator[None]:
        before = {family: OPS._cpu_suggest_set(family, "") for family in cpu_rates.FAMILIES}
        yield
        for family, name in before.items():
            OPS._cpu_suggest_set(family, name)

    def test_families_are_apart(self) -> None:
        OPS._cpu_instruction_set("auto")
        before = [OPS._cpu_suggest_set(family, "") for family in ("convolutions", "upsampling")]
        try:
            assert OPS._cpu_suggest_set("upsampling", "baseline") == "baseline"
            assert OPS._cpu_suggest_set("convolutions", "") == before[0]
        finally:
            OPS._cpu_suggest_set("upsampling", before[1])

    def test_a_named_set_is_that_of_all(self) -> None:
        before = [OPS._cpu_suggest_set(family, "") for family in cpu_rates.FAMILIES]
        OPS._cpu_instruction_set("baseline")
        try:
            assert OPS._cpu_suggest_set("upsampling", before[1]) == "baseline"
            assert OPS._cpu_instruction_set("") == "baseline"
        finally:
            OPS._cpu_instruction_set("auto")
        assert [OPS._cpu_suggest_set(family, "") for family in cpu_rates.FAMILIES] == before

    def test_bad_names(self) -> None:
        with pytest.raises(ValueError, match="allowed: convolutions, upsampling, batch_norm"):
            OPS._cpu_suggest_set("pooling", "")
        with pytest.raises(ValueError, match="allowed: baseline, avx2, avx512"):
            OPS._cpu_suggest_set("upsampling", "sse")

    @pytest.mark.parametrize(
        ("flags", "suggested"),
        [
            (WIDE, {"convolutions": "avx2", "upsampling": "avx512", "batch_norm": "avx2"}),
            (frozenset({"avx2", "fma"}), {"convolutions": "avx2", "batch_norm": "avx2"}),
            (frozenset(), {}),
        ],
        ids=["Zen 4", "a guest without AVX-512", "flags are not known"],
    )
    def test_what_is_suggested(self, monkeypatch, flags, suggested) -> None:
        found: dict[str, str] = {}
        ops = SimpleNamespace(_cpu_suggest_set=found.__setitem__)
        cpu = Cpu("AuthenticAMD", "", 25, 0x11, flags)
        monkeypatch.setattr(Cpu, "here", classmethod(lambda cls: cpu))
        fake = SimpleNamespace(ops=SimpleNamespace(deeplab_fast=ops), compiler=torch.compiler)
        monkeypatch.setattr(cpu_rates, "torch", fake)
        monkeypatch.setattr(cpu_rates, "_chosen", None)
        assert cpu_rates.choose_sets() is ZEN4
        assert found == suggested


def test_info_shows_them() -> None:
    text = info.report()
    assert "Rates of one thread of the CPU" in text
    assert cpu_rates.processor().origin in text


def test_readme_has_the_variables_that_info_shows() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    names = [name for name, _ in info._ENVIRONMENT]
    assert cpu_rates.ENVIRONMENT_VARIABLE in names
    assert [name for name in names if f"\n| `{name}` |" not in readme] == []
