"""A data check that passed is remembered for files that have not changed, and for no others."""

import json
import os
import time

import numpy as np
import pytest
from PIL import Image

from deeplab_fast import cli
from deeplab_fast.data import check
from deeplab_fast.data.check import check_dataset
from deeplab_fast.data.datasets import SegmentationDataset, open_dataset
from deeplab_fast.engine import checked
from deeplab_fast.engine.checked import check_remembered

SIZE = (4, 6)


def save(path, values):
    """A picture, an hour old."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    settle(path)


def settle(path, seconds=3600.0):
    then = time.time_ns() - int(seconds * 1e9)
    os.utime(path, ns=(then, then))


def add(root, stem, *values):
    save(root / "images" / f"{stem}.png", np.zeros((*SIZE, 3)))
    save(root / "masks" / f"{stem}.png", np.resize(values, SIZE))


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(checked, "checks_folder", lambda: tmp_path / "cache")
    for stem, values in (("a", (0, 1)), ("b", (1, 2, 255)), ("c", (2,))):
        add(tmp_path / "data", stem, *values)
    return tmp_path / "data"


@pytest.fixture
def read(monkeypatch):
    """The names of the samples that are read."""
    names = []

    def reading(dataset, index):
        names.append(dataset.samples[index].name)
        return original(dataset, index)

    original = check.read_sample
    monkeypatch.setattr(check, "read_sample", reading)
    return names


def opened(root, **options):
    return open_dataset("folder", root, **{"classes": 3, **options})


def test_unchanged_files_are_not_read_again(root, read):
    said = []
    first = check_remembered(opened(root), tell=said.append)
    assert read == ["a", "b", "c"] and said == ["checking data(3 samples, 3 classes)"]
    second = check_remembered(opened(root), tell=said.append)
    assert len(read) == 3
    assert said[1].startswith(
        "data(3 samples, 3 classes): unchanged since the check that it passed"
    )
    assert "--recheck" in said[1]
    # With all that class weights and bootstrapping need.
    assert second == first == check_dataset(opened(root))
    assert second.pixels == (12, 20, 32) and second.images_of == ((0,), (0, 1), (1, 2))
    assert second.ignored_values == {255: 8}
    read.clear()
    assert check_remembered(opened(root), recheck=True) == first and read == ["a", "b", "c"]


def test_only_what_is_new_is_read(root, read):
    check_remembered(opened(root))
    add(root, "d", 0)
    read.clear()
    said = []
    report = check_remembered(opened(root), tell=said.append)
    assert read == ["d"] and report == check_dataset(opened(root))
    assert "3 samples are unchanged since they passed, the other 1 are read" in said[0]
    read.clear()
    # Both halves of a split are remembered together.
    for split in ("train", "val"):
        check_remembered(opened(root, split=split))
    assert read == []


def resized(root):
    path = root / "masks" / "b.png"
    state = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def overwritten(root):
    """Other content of the same size, with the time kept as by cp -p, in the same file."""
    path = root / "masks" / "b.png"
    state = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda root: settle(root / "masks" / "b.png", 1800), id="time of a mask"),
        pytest.param(lambda root: settle(root / "images" / "b.png", 1800), id="time of a photo"),
        pytest.param(resized, id="size alone"),
        pytest.param(overwritten, id="content alone"),
    ],
)
def test_a_changed_file_is_read_again(root, read, change):
    check_remembered(opened(root))
    read.clear()
    change(root)
    check_remembered(opened(root))
    assert read == ["b"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"classes": 4}, id="classes"),
        pytest.param({"ignore_index": 2}, id="ignore_index"),
        pytest.param({"label_map": {0: 0, 1: 1, 2: 0}, "unmapped": "keep"}, id="label_map"),
        pytest.param({"label_map": {0: 0, 1: 1, 2: 2}, "unmapped": "error"}, id="unmapped"),
        pytest.param(
            {
                "classes": "x,y,z",
                "mask_colours": {"x": (0, 0, 0), "y": (1, 1, 1), "z": (2, 2, 2)},
                "unknown_colours": "ignore",
            },
            id="colours",
        ),
    ],
)
def test_other_options_are_another_check(root, read, options):
    check_remembered(opened(root))
    read.clear()
    assert check_remembered(opened(root, **options)) == check_dataset(opened(root, **options))
    assert read[:3] == ["a", "b", "c"]


def test_problems_are_not_remembered(root, read):
    add(root, "b", 7)
    first = check_remembered(opened(root))
    read.clear()
    assert check_remembered(opened(root)) == first and read == ["b"]
    assert [problem.kind for problem in first.problems] == ["labels"]
    (root / "masks" / "b.png").unlink()
    assert [p.kind for p in check_remembered(opened(root)).problems] == ["mask"]


def test_files_that_may_still_change_are_not_remembered(root, read):
    settle(root / "masks" / "c.png", 0.5)
    check_remembered(opened(root))
    read.clear()
    check_remembered(opened(root))
    assert read == ["c"]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("{", id="no JSON"),
        pytest.param("[]", id="another form"),
        pytest.param('{"version": 1, "samples": [1]}', id="no samples"),
        pytest.param('{"version": -1, "samples": {}}', id="another version"),
    ],
)
def test_a_broken_memory_is_made_anew(root, read, content):
    check_remembered(opened(root))
    (path,) = (root.parent / "cache").iterdir()
    good = path.read_text()
    path.write_text(content)
    read.clear()
    report = check_remembered(opened(root))
    assert read == ["a", "b", "c"] and report == check_dataset(opened(root))
    assert path.read_text() == good


def test_a_broken_entry_is_read_again(root, read):
    check_remembered(opened(root))
    (path,) = (root.parent / "cache").iterdir()
    content = json.loads(path.read_text())
    first, second, _ = sorted(content["samples"])
    content["samples"][first]["pixels"] = {"99": 1}
    content["samples"][second] = {"files": content["samples"][second]["files"]}
    path.write_text(json.dumps(content))
    read.clear()
    assert check_remembered(opened(root)).pixels == (12, 20, 32) and read == ["a", "b"]


def test_a_memory_of_another_user_is_read(root, read, monkeypatch):
    check_remembered(opened(root))
    read.clear()

    def refused(*_, **__):
        raise PermissionError

    # As of a cache that is shared for reading.
    monkeypatch.setattr(checked.os, "utime", refused)
    monkeypatch.setattr(checked, "write_json", refused)
    assert check_remembered(opened(root)).pixels == (12, 20, 32) and read == []
    assert check_remembered(opened(root), recheck=True).pixels == (12, 20, 32)


def test_a_cache_that_cannot_be_written(root, read):
    (root.parent / "cache").write_text("a file")
    for _ in range(2):
        check_remembered(opened(root))
    assert read == ["a", "b", "c"] * 2


def test_data_sets_of_other_classes_are_always_read(root, read):
    class Own(SegmentationDataset):
        def raw_label(self, index):
            return np.zeros(SIZE, np.uint8)

    dataset = opened(root)
    own = Own(dataset.samples, dataset.classes)
    for _ in range(2):
        check_remembered(own)
    assert read == ["a", "b", "c"] * 2 and not (root.parent / "cache").exists()


def test_the_command(root, read, capsys):
    flags = ["check-data", "--data", "folder", "--root", str(root), "--classes", "x,y,z"]
    assert cli.main(flags) == 0
    table = capsys.readouterr().out
    assert cli.main(flags) == 0
    captured = capsys.readouterr()
    assert captured.out == table and "unchanged since the check" in captured.err
    assert read == ["a", "b", "c"]
    assert cli.main([*flags, "--recheck"]) == 0 and len(read) == 6


def test_the_command_groups_what_is_alike(root, capsys):
    for stem in "abcd":
        add(root, stem, 0, 1, 9)
    flags = ["check-data", "--data", "folder", "--root", str(root), "--classes", "2"]
    assert cli.main(flags) == 1
    captured = capsys.readouterr()
    assert "4 masks: label 9 (32 pixels), outside the classes 0..1" in captured.err
    assert "d.png" not in captured.err and "hint: most masks hold 9" in captured.err
    assert captured.out.rstrip().endswith("4 problems in 4 of 4 samples")
    assert cli.main([*flags, "--verbose"]) == 1
    errors = capsys.readouterr().err
    assert all(f"masks/{stem}.png: label 9 (8 pixels)" in errors for stem in "abcd")
