"""What travels to a borrowed GPU machine: packed, and installed only where it fits."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

# `pytest` alone, unlike `python -m pytest`, does not look for bench/ in the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import prepare_gpu

TAG = sys.implementation.cache_tag
KERNEL = {"k.cubin": b"code", "k.json": b"{}", "__grp__k.json": b"paths", "k.ttir": b"text"}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose extensions are built, in an environment with a Triton."""
    root = tmp_path / "checkout"
    (root / "csrc").mkdir(parents=True)
    (root / "csrc" / "a.cu").write_text("kernel")
    (root / "setup.py").write_text("setup()")
    (root / "deeplab_fast").mkdir()
    for name in prepare_gpu.EXTENSIONS:
        (root / "deeplab_fast" / f"{name}{prepare_gpu.SUFFIX}").write_text(name)
    facts = {TAG: {"cuda": "13.0", "archs": ["9.0", "9.0a"]}}
    (root / "deeplab_fast" / "build.json").write_text(json.dumps(facts))
    monkeypatch.setattr(prepare_gpu, "ROOT", root)
    monkeypatch.setattr(prepare_gpu, "torch_version", lambda: "2.11.0")
    monkeypatch.setattr(prepare_gpu, "triton_facts", lambda: {"triton": "3.6.0"})
    return root


@pytest.fixture
def folder(checkout: Path, tmp_path: Path) -> Path:
    """What was packed of the checkout."""
    cache = tmp_path / "cache"
    for key, files in {"A": KERNEL, "B": {"__triton_launcher.so": b"code"}}.items():
        (cache / key).mkdir(parents=True)
        for name, content in files.items():
            (cache / key / name).write_bytes(content)
    prepare_gpu.pack(tmp_path / "folder", cache)
    return tmp_path / "folder"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Where it is to be installed."""
    path = tmp_path / "there" / "deeplab_fast"
    path.mkdir(parents=True)
    return path


def test_everything_is_installed(folder: Path, package: Path, tmp_path: Path) -> None:
    cache = tmp_path / "elsewhere"
    assert prepare_gpu.unpack(folder, package, cache) == ("", "")
    files = {f"{name}{prepare_gpu.SUFFIX}" for name in prepare_gpu.EXTENSIONS} | {"build.json"}
    assert {path.name for path in package.iterdir()} == files
    kept = {"A/k.cubin", "A/k.json", "A/__grp__k.json", "B/__triton_launcher.so"}
    assert {str(p.relative_to(cache)) for p in cache.glob("*/*")} == kept
    # Triton finds the files of a kernel by absolute paths.
    paths = json.loads((cache / "A" / "__grp__k.json").read_text("utf-8"))["child_paths"]
    assert paths == {name: str(cache / "A" / name) for name in ("k.cubin", "k.json")}


def test_facts_of_another_python_stay(folder: Path, package: Path, tmp_path: Path) -> None:
    (package / "build.json").write_text(json.dumps({"cpython-37": {"torch": "1"}, TAG: {}}))
    prepare_gpu.unpack(folder, package, tmp_path / "elsewhere")
    facts = json.loads((package / "build.json").read_text("utf-8"))
    assert facts == {
        "cpython-37": {"torch": "1"},
        TAG: {"cuda": "13.0", "archs": ["9.0", "9.0a"]},
    }


def test_other_sources_are_left_and_the_cache_is_taken(
    folder: Path, package: Path, checkout: Path, tmp_path: Path
) -> None:
    (checkout / "csrc" / "a.cu").write_text("another kernel")
    extensions, cache = prepare_gpu.unpack(folder, package, tmp_path / "elsewhere")
    assert extensions.startswith("sources ") and not cache
    assert not list(package.iterdir()) and (tmp_path / "elsewhere" / "A").is_dir()


def test_another_triton_is_said(
    folder: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_gpu, "triton_facts", lambda: {"triton": "3.7.0"})
    extensions, cache = prepare_gpu.unpack(folder, package, tmp_path / "elsewhere")
    assert not extensions and cache == "triton 3.6.0 prepared and 3.7.0 here"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("damage", ["another torch", "half a file", "no manifest", "empty"])
def test_the_status_tells_to_build(
    damage: str, folder: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    if damage == "another torch":
        monkeypatch.setattr(prepare_gpu, "torch_version", lambda: "2.13.0")
    elif damage == "half a file":
        (folder / f"_C{prepare_gpu.SUFFIX}").write_text("_")
    elif damage == "no manifest":
        os.remove(folder / prepare_gpu.MANIFEST)
    else:
        (folder / prepare_gpu.MANIFEST).write_text("{}")
    before = {path: path.read_bytes() for path in (checkout / "deeplab_fast").iterdir()}
    assert prepare_gpu.main(["unpack", str(folder)]) == prepare_gpu.OTHER_EXTENSIONS
    assert {path: path.read_bytes() for path in (checkout / "deeplab_fast").iterdir()} == before
    said = capsys.readouterr()
    assert "prepare_gpu: " in said.err
    # The cache does not depend on PyTorch.
    cache = checkout / "build" / "triton-cache"
    assert said.out == (f"{cache}\n" if damage == "another torch" else "")


def test_what_cannot_travel_is_an_error(
    folder: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    arguments = ["pack", str(tmp_path / "again"), str(tmp_path / "cache")]
    monkeypatch.setattr(prepare_gpu, "LIMIT", 100)
    assert prepare_gpu.main(arguments) == 1
    os.remove(checkout / "deeplab_fast" / f"_C_sm90{prepare_gpu.SUFFIX}")
    assert prepare_gpu.main(arguments) == 1
    said = capsys.readouterr().err
    assert "more than " in said and f"_C_sm90{prepare_gpu.SUFFIX} was not built" in said
