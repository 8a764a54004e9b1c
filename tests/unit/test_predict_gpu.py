"""What inference on a GPU costs at least: the committed table, and what it is made of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# `pytest` alone, unlike `python -m pytest`, does not look for bench/ in the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import predict_gpu
from bench.gpu_cases import GpuCase
from bench.predict_gpu import Counted, Work
from bench.report import between_markers


def test_the_committed_table_is_what_the_command_prints() -> None:
    text = predict_gpu.PAGE.read_text("utf-8")
    table = predict_gpu.table()
    written = between_markers(text, table, predict_gpu.BEGIN, predict_gpu.END)
    assert written == text, "python -m bench.predict_gpu --write makes the table anew"


def test_launches_and_bytes_are_counted() -> None:
    x = torch.empty(4, 6, dtype=torch.bfloat16, device="meta")
    out = torch.empty(4, 6, dtype=torch.bfloat16, device="meta")
    work = Work()
    with Counted(work):
        # Views and allocations are no launches.
        x.t()[1:].unsqueeze(0).new_empty(3)
    assert (work.launches, work.bytes) == (0, 0)
    with Counted(work):
        x + x
    assert (work.launches, work.bytes) == (1, 3 * x.nbytes)
    with Counted(work):
        x.mul_(2)
    assert (work.launches, work.bytes) == (2, 5 * x.nbytes)
    with Counted(work):
        # Of an expanded operand one row is read; `out` is written.
        torch.mul(x, x[:1].expand(4, 6), out=out)
    assert (work.launches, work.bytes) == (3, 7 * x.nbytes + x.nbytes // 4)
    # At the rate of the memory.
    assert work.seconds == pytest.approx(work.bytes / 3.35e12)


def test_a_network_has_the_macs_of_its_live_taps_and_a_fold_the_bytes_of_its_weights() -> None:
    found = predict_gpu.predict(GpuCase("r50", 8, 1, 520, 520))
    # 140.8 by another way of counting (bench/NOTES.md), which projects the pooled vector at every
    # pixel of 65x65.
    assert found.network.macs / 1e9 == pytest.approx(140.8 - 65**2 * 256**2 / 1e9, abs=0.05)
    filters = [
        m.weight for m in predict_gpu.model("r50", 8).modules() if isinstance(m, torch.nn.Conv2d)
    ]
    # Read in fp32, written in bf16; of each filter some passes over vectors.
    values, vectors = (sum(f.numel() for f in filters), sum(f.shape[0] for f in filters))
    assert 0 < found.fold.bytes - 6 * values < 150 * vectors
    more = predict_gpu.predict(GpuCase("r50", 8, 2, 520, 520))
    assert more.network.macs == 2 * found.network.macs
    assert found.network.bytes < more.network.bytes < 2 * found.network.bytes
