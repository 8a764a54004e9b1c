"""Answers that `Choices` remembers: those of `select`, for as long as what they rest on stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch

import deeplab_fast as dlf
from deeplab_fast import _ext, backends
from deeplab_fast.dispatch import choice, declare, trust
from deeplab_fast.dispatch.choice import Choices
from deeplab_fast.testing import deterministic, threads

OP = "bn_act"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The ops that `select` was asked about; what was remembered before counts for nothing."""
    found: list[str] = []
    select = choice.select
    monkeypatch.setattr(choice, "select", lambda desc: found.append(desc.op) or select(desc))
    monkeypatch.setattr(choice, "_remembered", {})
    yield found


def of(x: torch.Tensor, act: str | None = "relu") -> object:
    def describe() -> backends.OpDesc:
        return backends.OpDesc.of(OP, x, act=act, residual=False)

    return Choices().of(OP, x, (act, False), describe)


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        yield


@contextmanager
def without_extension() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ext, "CPU", replace(_ext.CPU, loaded=False, reason="gone"))
        yield


def test_asked_once(asked) -> None:
    x = torch.randn(2, 4, 3, 3)
    first = of(x)
    assert of(x) is first and of(torch.randn(2, 4, 3, 3)) is first
    assert asked == [OP]


@pytest.mark.parametrize(
    ("x", "act"),
    [
        pytest.param(torch.randn(2, 4, 3, 4), "relu", id="shape"),
        pytest.param(torch.randn(2, 4, 3, 3).double(), "relu", id="dtype"),
        pytest.param(torch.randn(2, 4, 3, 3, device="meta"), "relu", id="device"),
        pytest.param(torch.randn(2, 4, 3, 3), "relu6", id="options"),
    ],
)
def test_another_call_is_asked_about(asked, x, act) -> None:
    of(torch.randn(2, 4, 3, 3))
    of(x, act)
    assert asked == [OP] * 2


CHANGES = {
    "use_backend": lambda: dlf.use_backend("reference"),
    "environment": lambda: environment(choice.ENVIRONMENT_VARIABLE, "reference"),
    "interpreter": lambda: environment("TRITON_INTERPRET", "1"),
    "deterministic": deterministic,
    "threads": lambda: threads(torch.get_num_threads() + 1),
    "extension": without_extension,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_choice_rests_on(asked, change) -> None:
    """While it is another the answer is that of `select`, and then the old one again."""
    x = torch.randn(2, 4, 3, 3)
    before = of(x)
    with change():
        assert of(x) is backends.select(backends.OpDesc.of(OP, x, act="relu", residual=False)).run
        assert len(asked) >= 2
    count = len(asked)
    assert of(x) is before
    assert len(asked) == count


def test_a_wrong_environment_is_refused_behind_a_right_one(asked) -> None:
    x = torch.randn(2, 4, 3, 3)
    of(x)
    with (
        environment(choice.ENVIRONMENT_VARIABLE, "gpu"),
        pytest.raises(ValueError, match="no backend is named 'gpu'"),
    ):
        of(x)


def test_another_backend_is_found_and_then_nothing_remembered(asked, monkeypatch) -> None:
    """Its reasons may read anything."""
    table = dict(declare.implementations(OP))
    del table["triton"]
    monkeypatch.setitem(declare._implementations, OP, table)
    x, reasons = torch.randn(2, 4, 3, 3), ["not yet"]
    of(x)
    backends.register(OP, "triton", mine := lambda *args: None, lambda desc: reasons, priority=99)
    assert of(x) is not mine
    reasons.clear()
    assert of(x) is mine


def test_records_that_are_forgotten(asked) -> None:
    x = torch.randn(2, 4, 3, 3)
    of(x)
    trust.forget()
    of(x)
    assert asked == [OP] * 2


@pytest.mark.skipif(not _ext.CPU.loaded, reason=_ext.CPU.reason)
def test_a_check_at_first_use_is_waited_for(asked, monkeypatch) -> None:
    """What it answers while a graph is captured, or it is under way, it may not answer later."""
    judgement = trust.Judgement(True, "", 2.0, at_first_use=True)
    monkeypatch.setattr(trust, "judge", lambda desc, backend: judgement)
    monkeypatch.setattr(trust, "_first_uses", {})
    # The C++ stands for a kernel of a GPU.
    monkeypatch.setattr(
        declare.Implementation, "needs_record", lambda self, desc: self.backend == "cpu"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x = torch.randn(2, 4, 3, 3)
    desc = backends.OpDesc.of(OP, x, act="relu", residual=False)
    assert of(x) is of(x) is declare.implementations(OP)["reference"].run
    assert asked == [OP] * 2
    trust._first_uses[trust._first_use_key(desc, "cpu")] = ""
    assert of(x) is declare.implementations(OP)["cpu"].run
    of(x)
    assert asked == [OP] * 3


def test_what_is_remembered_is_bounded(asked, monkeypatch) -> None:
    monkeypatch.setattr(choice, "_MOST_CALLS", 3)
    monkeypatch.setattr(choice, "_MOST_STATES", 2)
    for size in range(1, 8):
        of(torch.randn(1, 4, 1, size))
    assert sum(len(known) for known in choice._remembered.values()) <= 3
    with ExitStack() as stack:
        for count in range(2, 6):
            stack.enter_context(threads(count))
            of(torch.randn(1, 4, 1, 1))
    assert len(choice._remembered) <= 2
