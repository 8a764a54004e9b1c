"""Rows of exported files become the table of DEPLOYMENT.md."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bench import exports

ROW = exports.Row(
    model="camvid",
    suffix=".onnx",
    variant="dynamic",
    runtime="ONNX Runtime 1.0",
    megabytes="20.1",
    export_seconds="12",
    error="4.8e-07",
    same="1.00000",
    ms="100",
    own_ms="80",
    ratio="0.8",
    device="a CPU",
    threads="2",
    python="3.11",
    torch="2.13",
    commit="abc",
    dirty="no",
    date="2026-11-28T10:00:00Z",
)


def test_a_row_takes_the_place_of_the_same_file(tmp_path):
    path = tmp_path / "cpu.csv"
    exports.write(path, replace(ROW, variant="labels", error=""))
    exports.write(path, ROW)
    exports.write(path, replace(ROW, model="ResNet-50"))
    exports.write(path, replace(ROW, ms="90"))
    found = exports.read(path)
    assert [(r.model, r.variant, r.ms) for r in found] == [
        ("ResNet-50", "dynamic", "100"),
        ("camvid", "dynamic", "90"),
        ("camvid", "labels", "100"),
    ]
    assert (
        "| camvid | .onnx labels | ONNX Runtime 1.0 | 20.1 |  | 100.000% | 100 | 80 | 0.8x |"
        in (exports.table(found))
    )


def test_check_tells_a_table_that_is_not_of_the_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exports, "DATA", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{exports.BEGIN}\n{exports.END}\nafter\n", "utf-8")
    exports.write(tmp_path / "cpu.csv", ROW)
    arguments = ["--table", str(page)]
    assert exports.main([*arguments, "--check"]) == 1
    assert "make bench-report" in capsys.readouterr().err
    assert exports.main(arguments) == 0 and exports.main([*arguments, "--check"]) == 0
    assert "20.1" in page.read_text("utf-8")
    page.write_text("no markers", "utf-8")
    assert exports.main(arguments) == 2


def test_the_page_has_the_table_of_the_rows():
    root = Path(__file__).resolve().parents[2]
    page = root / "DEPLOYMENT.md"
    assert exports.main(["--table", str(page), "--check"]) == 0
