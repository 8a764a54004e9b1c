"""Units of a GPU's run about whole models, on a stand-in: they pass here, and see what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# `pytest` alone, unlike `python -m pytest`, does not look for bench/ in the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import gpu_checks, gpu_ours
from bench.gpu_cases import CASES
from deeplab_fast.dispatch.errors import Wrong
from deeplab_fast.program import gpu_layers, graphs
from deeplab_fast.testing import tf32
from deeplab_fast.tuning.machine import Machine

MACHINE = Machine("cpu", "stand-in", (0, 0), 1, 0, "", "", "")


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """A unit sets PyTorch for its own process."""
    threads = torch.get_num_threads()
    flags = {"enabled": True, "benchmark": False, "allow_tf32": True}
    with tf32(torch.backends.cuda.matmul.allow_tf32), torch.backends.cudnn.flags(**flags):
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("check", gpu_checks.CHECKS)
def test_checks_pass_here(check: str) -> None:
    rows = gpu_checks.CHECKS[check](MACHINE)["rows"]
    assert rows and all(row["out"][0] < 1e-5 for row in rows)


def test_numbers_of_a_family_in_all_its_ways() -> None:
    rows = gpu_checks.numbers(MACHINE, "mobilenetv3", "auto")["rows"]
    ways = [row["what"].rpartition("bfloat16 ")[2] for row in rows]
    assert ways == ["graphs=False", "graphs=True", "optimize", "autocast"]


@pytest.fixture
def stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters are folded once for all."""
    fold, found = gpu_layers.Sources.fold, {}

    def once(self: gpu_layers.Sources, dtype: torch.dtype, settings: object) -> object:
        if dtype not in found:
            found[dtype] = fold(self, dtype, settings)
        return found[dtype]

    monkeypatch.setattr(gpu_layers.Sources, "fold", once)


@pytest.mark.parametrize("check", ["never stale", "foreign capture"])
def test_what_is_stale_is_wrong(check: str, stale: None) -> None:
    with pytest.raises(Wrong, match="is off by"):
        gpu_checks.CHECKS[check](MACHINE)


@pytest.mark.parametrize("check", ["two streams", "threads"])
def test_what_another_call_overwrites_is_wrong(check, monkeypatch: pytest.MonkeyPatch) -> None:
    run = graphs.Graphs.run

    def given_away(self: graphs.Graphs, step, finish, *rest) -> object:
        return run(self, step, lambda maps, copy: maps, *rest)

    monkeypatch.setattr(graphs.Graphs, "run", given_away)
    with pytest.raises(Wrong, match="is off by"):
        gpu_checks.CHECKS[check](MACHINE)


def test_an_epilogue_that_loses_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(bias, matrix, weight):
        return torch.addmm(bias, matrix, weight).nan_to_num_(0.0).clamp_(min=0)

    monkeypatch.setattr(torch, "_addmm_activation", product)
    # A CPU's is not tried beforehand.
    with pytest.raises(Wrong, match=r"1x1 act=relu residual=False .* became numbers"):
        gpu_checks.not_finite(MACHINE)


def test_memory_that_sufficed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs.Graphs, "give_up", lambda self: True)
    with pytest.raises(Wrong, match="graphs were kept"):
        gpu_checks.out_of_memory(MACHINE)


def _once(calls, device, *, seconds=0.5):
    """In place of times: each is called once."""
    return {name: {"ms": 1.0} for name, call in calls.items() if call() is not None}


def test_a_model_in_all_its_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_ours, "times", _once)
    monkeypatch.setattr(gpu_ours, "kernels", lambda call, device: {"kernels": 1})
    rows = gpu_ours.model(MACHINE, None, CASES[0])["rows"]
    names = [row["what"].partition(": ")[2] for row in rows]
    assert len(names) == len(set(names)) == 10
    assert sum(name.startswith("PyTorch") for name in names) == 3
    assert not [row for row in rows if "problem" in row]
    held = {name: row.get("held_mb") for name, row in zip(names, rows, strict=True)}
    # The graph's copy of the input; the filters of a frozen program.
    assert 0 < held["deeplab_fast, graphs"] < 1 < held["deeplab_fast optimize, no graphs"]
    assert held["deeplab_fast, no graphs"] == 0


def test_a_model_whose_labels_are_others_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_ours, "times", _once)
    monkeypatch.setattr(gpu_ours, "kernels", lambda call, device: {})
    monkeypatch.setattr(gpu_ours, "_apart", lambda kind, ours, plain: 0.5)
    with pytest.raises(Wrong, match="labels of deeplab_fast are"):
        gpu_ours.model(MACHINE, None, CASES[0])


def test_every_form_of_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_ours, "times", _once)
    rows = gpu_ours.forms(MACHINE, CASES[0], own=True)["rows"]
    by_class: dict[str, list[str]] = {}
    for row in rows:
        name, _, form = row["what"].rpartition(": ")
        by_class.setdefault(name, []).append(form)
        assert row["rule"] == by_class[name][0]
    # MobileNetV3's blocks share few shapes; all that is not a 1x1 convolution has one form here.
    assert len(by_class) > 30
    assert (
        sum(next(r["count"] for r in rows if r["what"].startswith(name)) for name in by_class) > 50
    )
    assert {form for forms in by_class.values() for form in forms} == {"matrix product", "aten"}
