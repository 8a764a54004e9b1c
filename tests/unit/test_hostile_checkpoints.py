"""Checkpoints that were made to harm, or damaged: clear errors, nothing run, opened or taken."""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import fuzz
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deeplab_fast as dlf
from deeplab_fast.weights import (
    CheckpointError,
    from_checkpoint,
    inspect_weights,
    load_module,
    load_weights,
    model_metadata,
    pickled,
    read_content,
    read_state_dict,
    save_weights,
)
from deeplab_fast.weights.files import Checkpoint
from deeplab_fast.weights.inspect import inspect_open
from deeplab_fast.weights.layouts import layout_named, rename_tensors
from deeplab_fast.weights.libraries import Origin
from deeplab_fast.weights.settings import check_settings
from deeplab_fast.weights.told import checked_options

# Every file here is small; reading one may take this at most.
MEMORY = 512 << 20


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return dlf.get_model("deeplabv3_mobilenet_v2_tf", num_classes=3, width=0.25, aspp_channels=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def archive(path: Path, code: bytes, data: dict[str, bytes] | None = None) -> Path:
    """A zip archive as torch.save writes it, with this pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", code)
        file.writestr("archive/version", "3\n")
        for name, content in (data or {}).items():
            file.writestr(f"archive/data/{name}", content)
    return path


def _global(name: str) -> bytes:
    module, _, leaf = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + leaf.encode() + b"\n"


class _Called:
    """Pickled as a call of what the name says."""

    def __init__(self, code: bytes) -> None:
        self.code = code


def code_of(value: object) -> bytes:
    """A pickle of protocol 2, in which `_Called` stands for its own code."""
    if isinstance(value, _Called):
        return value.code
    if isinstance(value, dict):
        pairs = b"".join(code_of(k) + code_of(v) for k, v in value.items())
        return b"}(" + pairs + b"u"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(code_of, value)) + b"t"
    return pickle.dumps(value, 2)[2:-1]


def called(name: str, *arguments: object) -> _Called:
    return _Called(_global(name) + code_of(arguments) + b"R")


def named(name: str) -> _Called:
    return _Called(_global(name))


def built(made: _Called, state: object) -> _Called:
    return _Called(made.code + code_of(state) + b"b")


def program(value: object) -> bytes:
    return b"\x80\x02" + code_of(value) + b"."


def storage(elements: int, key: str = "0", kind: str = "torch.FloatStorage") -> _Called:
    return _Called(code_of(("storage", named(kind), key, "cpu", elements)) + b"Q")


def tensor(size: tuple, stride: tuple, elements: int, offset: int = 0) -> _Called:
    hooks = called("collections.OrderedDict")
    arguments = (storage(elements), offset, size, stride, False, hooks)
    return called("torch._utils._rebuild_tensor_v2", *arguments)


RECONSTRUCT = called(
    "numpy._core.multiarray._reconstruct", named("numpy.ndarray"), (0,), _Called(code_of("b"))
)


def array(dtype: str, shape: tuple, data: object) -> _Called:
    made = built(called("numpy.dtype", dtype, False, True), (3, "<", None, None, None, -1, -1, 0))
    return built(RECONSTRUCT, (1, shape, made, False, data))


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"}X\x01\x00\x00\x00a" * depth + b"}" + b"s" * depth + b"."


RAW = called("_codecs.encode", "\x01" * 16, "latin1")
ONE = {"0": bytes(4)}
PICKLES = {
    # An object array from raw bytes was a segfault.
    "object-array": (program({"a": array("O8", (2,), RAW)}), {}, "numpy.dtype 'O8'"),
    "array-beyond-its-bytes": (program({"a": array("f4", (1 << 40,), RAW)}), {}, "16 values|has 4"),
    "record-dtype": (
        program({"a": called("numpy.dtype", ("x", "f4"))}),
        {},
        "numpy.dtype of records",
    ),
    "size-beyond": (program({"w": tensor((1 << 31,), (1,), 1)}), ONE, "ends at element"),
    "offset-beyond": (program({"w": tensor((1,), (1,), 1, 1 << 40)}), ONE, "ends at element"),
    "expanded": (program({"w": tensor((1 << 30,), (0,), 1)}), ONE, "of which 1 elements"),
    "no-elements-many": (program({"w": tensor((0, 1 << 50), (1, 1), 1)}), ONE, "is claimed"),
    "negative-stride": (program({"w": tensor((1,), (-1,), 1)}), ONE, "is no size"),
    "storage-beyond": (program({"w": tensor((1,), (1,), 1 << 40)}), ONE, "has 4 bytes"),
    "no-entry": (program({"w": tensor((1,), (1,), 1)}), {}, "no entry"),
    "made-storage": (program(called("torch.UntypedStorage", 1 << 40)), {}, "no function"),
    "made-tensor": (program(called("torch.Tensor", 1 << 40)), {}, "no function"),
    "bytearray-of-a-size": (program(called("builtins.bytearray", 1 << 40)), {}, "made of a int"),
    "encoding": (program(called("_codecs.encode", "a", "hex")), {}, "_codecs.encode to 'hex'"),
    "a-class": (program(called("os.system", "touch hostile-ran")), {}, "object of os.system"),
    "getattr": (program({"a": called("builtins.getattr", "a", "b")}), {}, "holds no tensors"),
    "meta": (
        program({"w": called("torch._utils._rebuild_meta_tensor_no_storage", 1, (1 << 40,))}),
        {},
        "without plain values",
    ),
    "deep": (nested(10_000), {}, "deep in one another"),
    "holds-itself": (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", {}, "hold themselves"),
    "many-ways": (
        # Thirty containers, each twice in the next.
        b"\x80\x02}X\x01\x00\x00\x00wK\x01s"
        + b"".join(
            b"q%c}(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cu" % (i, i, i) for i in range(30)
        )
        + b".",
        {},
        "in more than",
    ),
    "text-of-no-characters": (
        program({"a": array("U4", (1,), called("_codecs.encode", "\xff" * 16, "latin1"))}),
        {},
        "characters that there are not",
    ),
    "text-of-a-claimed-length": (
        program({"a": array("U1000", (1,), RAW)}),
        {},
        "16 bytes are no values",
    ),
    "steps": (b"\x80\x02" + b"N0" * 10 + b".", {}, "operation 48"),
    "long-name": (program({"w" * 5000: tensor((1,), (1,), 1)}), ONE, "name of 5000 characters"),
    "name-with-breaks": (program({"a\nb\x00": tensor((1,), (1,), 1)}), ONE, r"a\\nb\\x00"),
    "memory-of-a-memo": (b"\x80\x02Nr\xff\xff\xff\xff.", {}, "holds a NoneType"),
    "no-pickle": (b"", {}, "damaged"),
}


@pytest.mark.parametrize(("code", "data", "says"), PICKLES.values(), ids=PICKLES.keys())
def test_pickles(
    code: bytes, data: dict[str, bytes], says: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    path = archive(folder / "w.pth", code, data)
    message = fuzz.refused("pth", lambda: inspect_weights(path), CheckpointError)
    assert re.search(says, message), message
    assert not Path("hostile-ran").exists()
    with pytest.raises(CheckpointError):
        load_module(nn.Linear(1, 1), path)


def test_calls_that_multiply_what_they_get(folder: Path) -> None:
    # A text of a MiB, encoded ten thousand times and kept.
    text = code_of("a" * (1 << 20)) + b"q\x00"
    call = _global("_codecs.encode") + b"(h\x00X\x06\x00\x00\x00latin1tR"
    path = archive(folder / "w.pth", b"\x80\x02(" + text + call * 10_000 + b"t.")
    assert "many times" in fuzz.refused("pth", lambda: read_state_dict(path), CheckpointError)


def test_keys_whose_hashes_collide(folder: Path) -> None:
    modulus = (1 << 61) - 1
    pairs = b"".join(
        b"\x8a\x0b" + (i * modulus).to_bytes(11, "little") + b"N" for i in range(1, 50_000)
    )
    path = archive(folder / "w.pth", b"\x80\x02}(" + pairs + b"u.")
    found = fuzz.refused("pth", lambda: read_state_dict(path), CheckpointError)
    assert "keys" in found


def test_keys_of_one_hash(folder: Path) -> None:
    """Tuples of whole numbers below 2^60, the second chosen for a hash that the first ones have."""
    # hash((a, b)) of CPython: xxHash's rounds of 64 bits, which can be undone.
    whole, first, second, third = (
        (1 << 64) - 1,
        11400714785074694791,
        14029467366897019727,
        2870177450012600261,
    )

    def turned(n: int, bits: int) -> int:
        return (n << bits | n >> (64 - bits)) & whole

    def rounds(lane: int) -> int:
        return turned(third + lane * second & whole, 31) * first & whole

    wanted = 1 << 63 | 12345
    back = turned(wanted * pow(first, -1, 1 << 64) & whole, 33)
    pairs = [(a, (back - rounds(a)) * pow(second, -1, 1 << 64) & whole) for a in range(20_000)]
    pairs = [pair for pair in pairs if pair[1] < 1 << 60][:1_002]
    assert len(pairs) == 1_002 and len({hash(pair) for pair in pairs}) == 1
    for most, says in ((1_002, "have one hash"), (999, None)):
        path = folder / "w.pth"
        torch.save({"w": torch.ones(1), "m": dict.fromkeys(pairs[:most])}, path)
        if says is None:
            assert read_state_dict(path)["w"] == 1
            continue
        found = fuzz.refused("pth", lambda path=path: read_state_dict(path), CheckpointError)
        assert says in found and "save its state dict alone" in found and "damaged" not in found


def test_many_keys_of_parts(folder: Path) -> None:
    path = folder / "w.pth"
    honest = {(i, i): i for i in range(20_000)} | {i / 7: i for i in range(1, 20_000)}
    # The same ones in several mappings count once.
    torch.save({"w": torch.ones(1), "m": [dict(honest) for _ in range(3)]}, path)
    content = read_content(path)
    assert content["m"] == [honest] * 3
    torch.save({"w": torch.ones(1), "m": {i / 7: i for i in range(1, 130_000)}}, path)
    found = fuzz.refused("pth", lambda: read_state_dict(path), CheckpointError)
    assert "more than 100000 keys" in found and "claims" not in found


KEYS = {
    "numpy-whole": (np.int64(3), 3),
    "numpy-large": (np.uint64(1 << 63), 1 << 63),
    "numpy-number": (np.float32(0.5), 0.5),
    "numpy-flag": (np.bool_(True), True),
    "numpy-text": (np.str_("cat"), "cat"),
    "numpy-bytes": (np.bytes_(b"cat"), b"cat"),
    "numpy-in-a-tuple": ((np.int64(1), np.str_("a")), (1, "a")),
    "complex": (1 + 2j, 1 + 2j),
    "size": (torch.Size([1, 2]), (1, 2)),
    "path": (Path("a/b"), PurePosixPath("a/b")),
    "tensor": (torch.ones(()), None),
    "date": (np.datetime64("2020-01-01"), None),
}


@pytest.mark.parametrize(("key", "expected"), KEYS.values(), ids=KEYS.keys())
def test_keys(key: object, expected: object, folder: Path) -> None:
    path = folder / "w.pth"
    torch.save({"w": torch.ones(1), "m": {key: 1}}, path)
    if expected is None:
        found = fuzz.refused("pth", lambda: read_state_dict(path), CheckpointError)
        assert "is a key of it" in found and "save its state dict alone" in found
        return
    (kept,) = read_content(path)["m"]
    assert kept == expected and type(kept) is type(expected)


TEXTS = {
    "text": (np.str_("h\u00e9 \U0001f600"), "h\u00e9 \U0001f600"),
    "no-text": (np.str_(""), ""),
    "bytes": (np.bytes_(b"ab"), b"ab"),
    "texts": (np.array([["a", "bc"]]), np.array([["a", "bc"]])),
    "texts-by-column": (
        np.asfortranarray([["a", "b"], ["c", "d"]]),
        np.array([["a", "b"], ["c", "d"]]),
    ),
    "texts-of-the-other-order": (np.array(["ab"], ">U2"), np.array(["ab"])),
    "no-texts": (np.array([], "U5"), np.array([], "U1")),
    "no-bytes": (b"", b""),
    "no-bytearray": (bytearray(), bytearray()),
    "no-numbers": (np.empty((0, 3), "f4"), np.empty((0, 3), "f4")),
    "texts-of-bytes": (np.array([b"a", b"bc"]), np.array([b"a", b"bc"])),
}


@pytest.mark.parametrize(("value", "expected"), TEXTS.values(), ids=TEXTS.keys())
def test_texts_and_bytes(value: object, expected: object, folder: Path) -> None:
    path = folder / "w.pth"
    torch.save({"w": torch.ones(1), "x": value}, path)
    found = read_content(path)["x"]
    if isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected, strict=True)
    else:
        assert found == expected and type(found) is type(expected)
    numbers = isinstance(value, np.ndarray) and value.dtype.kind == "f"
    assert read_state_dict(path).keys() == ({"w", "x"} if numbers else {"w"})


class Kept:
    """Of a user: what it is given when it is read would show."""

    made: list[object] = []  # noqa: RUF012

    def __setstate__(self, state: object) -> None:
        self.made.append(state)


class KeptList(list):
    pass


def test_classes_that_the_process_registered(folder: Path) -> None:
    path = folder / "w.pth"
    kept, several = Kept(), KeptList([1, 2])
    kept.x = 1  # type: ignore[attr-defined]
    content = {"w": torch.ones(1), "cfg": kept, "again": kept, "many": several, "kind": Kept}
    torch.save({**content, "counts": defaultdict(list, a=[1])}, path)
    says = fuzz.refused("pth", lambda: read_state_dict(path), CheckpointError)
    assert "Kept" in says and "add_safe_globals" in says and "convert it" in says
    names = [Kept, (KeptList, f"{__name__}.KeptList"), defaultdict]
    with torch.serialization.safe_globals([*names, list]):
        found = read_content(path)
        assert read_state_dict(path).keys() == {"w"}
    assert not Kept.made
    for key in ("cfg", "again", "many", "counts"):
        assert isinstance(found[key], pickled.Inert), key
    assert found["cfg"] is found["again"]


def legacy(
    tensors: int,
    claimed: int,
    keys: object = ("0",),
    facts: dict[int, bytes] | None = None,
) -> bytes:
    """What torch.save before 1.6 wrote, of a storage that has one element and claims more.

    Args:
        tensors: elements of the tensor.
        claimed: elements of the storage where it lies.
        keys: the list of storages.
        facts: pickles in place of the usual five, by their places.
    """
    view = ("storage", named("torch.FloatStorage"), "0", "cpu", tensors, None)
    made = called(
        "torch._utils._rebuild_tensor_v2",
        _Called(code_of(view) + b"Q"),
        0,
        (tensors,),
        (1,),
        False,
        called("collections.OrderedDict"),
    )
    system = {"little_endian": True}
    pickles = [
        pickle.dumps(pickled._LEGACY_MAGIC, 2),
        pickle.dumps(pickled._LEGACY_PROTOCOL, 2),
        pickle.dumps(system, 2),
        program({"w": made}),
        pickle.dumps(list(keys) if isinstance(keys, tuple) else keys, 2),
    ]
    for place, code in (facts or {}).items():
        pickles[place] = code
    return b"".join(pickles) + struct.pack("<q", claimed) + struct.pack("<f", 1.5)


def test_the_format_before_archives(folder: Path) -> None:
    path = folder / "w.pth"
    path.write_bytes(legacy(1, 1))
    assert torch.equal(read_state_dict(path)["w"], torch.tensor([1.5]))
    for content, says in (
        (legacy(1 << 30, 1 << 30), "the file has"),
        (legacy(1 << 30, 1), "1 elements, 1073741824 were expected"),
        (legacy(1, 1)[:-5], "ends too early"),
    ):
        path.write_bytes(content)
        assert says in fuzz.refused("legacy", lambda: read_state_dict(path), CheckpointError)


@pytest.mark.parametrize("key", [[1], {}, 1.0, True, 1 << 61, "1"], ids=repr)
def test_storages_that_a_legacy_file_lists(key: object, folder: Path) -> None:
    """Unhashable ones, ones equal to another type's, one whose hash is chosen, an unknown one."""
    path = folder / "w.pth"
    for keys in ([key], ["0", key]):
        path.write_bytes(legacy(1, 1, keys=keys))
        fuzz.refused("legacy", lambda: read_state_dict(path), CheckpointError)


LEGACY_FACTS = {
    "a-true-number": (0, True),
    "an-array-number": (0, np.arange(3)),
    "a-float-protocol": (1, 1001.0),
    "an-array-protocol": (1, np.arange(3)),
    "a-long-protocol": (1, 10**600),
    "an-array-order": (2, {"little_endian": np.arange(3)}),
    "a-number-order": (2, {"little_endian": 1}),
    "no-mapping": (2, [True]),
    "a-tuple-of-keys": (4, ("0",)),
    "an-array-of-keys": (4, np.arange(3)),
    "the-same-twice": (4, ["0", "0"]),
}


@pytest.mark.parametrize(("place", "value"), LEGACY_FACTS.values(), ids=LEGACY_FACTS.keys())
def test_facts_of_a_legacy_file(place: int, value: object, folder: Path) -> None:
    path = folder / "w.pth"
    path.write_bytes(legacy(1, 1, facts={place: pickle.dumps(value, 2)}) + legacy(1, 1)[-12:])
    found = fuzz.refused("legacy", lambda: read_state_dict(path), CheckpointError)
    assert re.search("number|protocol|byte order|list", found), found
    path.write_bytes(legacy(1, 1, facts={2: pickle.dumps({"little_endian": False}, 2)}))
    assert read_state_dict(path)["w"].view(torch.int32).tolist() == [0xC03F]


def test_legacy_files_may_be_cut_while_their_tensors_are_used(tmp_path: Path) -> None:
    """A child process: a mapped file would end it (SIGBUS)."""
    script = (
        "import sys, torch; from deeplab_fast.weights import read_state_dict\n"
        "w = torch.arange(1 << 20); content = {'w': w, 'part': w[7::3], 'half': w[:9].half()}\n"
        "torch.save(content, 'w.pth', _use_new_zipfile_serialization=False)\n"
        "state = read_state_dict('w.pth'); open('w.pth', 'wb').close()\n"
        "assert all(torch.equal(state[k], v) for k, v in content.items())\n"
        "assert state['w'].data_ptr() + 7 * 8 == state['part'].data_ptr(), 'a storage is shared'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "legacy"])
def test_views_that_are_conjugate_or_negative(zipped: bool, tmp_path: Path) -> None:
    # Of one storage torch.save writes views of one dtype only.
    whole, other = torch.randn(2, 3, 4, dtype=torch.complex64).unbind()
    other = other.clone()
    content = {
        "conj": whole.conj(),
        "neg": other.conj().imag,
        "both": torch._neg_view(whole).conj(),
        "transposed": whole.t().conj(),
        "part": whole.conj()[1:, ::2],
        "plain": whole,
        "real": other.real,
        "none": whole[:0].conj(),
    }
    assert content["neg"].is_neg() and content["both"].is_neg() and content["both"].is_conj()
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    found = read_state_dict(tmp_path / "w.pth")
    expected = torch.load(tmp_path / "w.pth", weights_only=True)
    assert found.keys() == expected.keys() == content.keys()
    for key, value in expected.items():
        # torch.equal does not tell -0.0 from 0.0, and both give the same numbers.
        assert torch.equal(found[key], value.resolve_conj().resolve_neg()), key
        assert found[key].dtype == value.dtype and not found[key].is_conj()
        assert not found[key].is_neg()


BITS: dict[str, tuple[object, str, str | None]] = {
    "none": ({}, "torch.ComplexFloatStorage", None),
    "not-set": ({"conj": False, "neg": False}, "torch.ComplexFloatStorage", None),
    "conj-of-real": ({"conj": True}, "torch.FloatStorage", "is conjugate"),
    "neg-of-flags": ({"neg": True}, "torch.BoolStorage", "bool"),
    "a-number": ({"conj": 1}, "torch.ComplexFloatStorage", "other facts"),
    "another": ({"conj": True, "x": True}, "torch.ComplexFloatStorage", "other facts"),
    "no-mapping": ((True,), "torch.ComplexFloatStorage", "other facts"),
}


@pytest.mark.parametrize(("bits", "kind", "says"), BITS.values(), ids=BITS.keys())
def test_bits_of_a_tensor(bits: object, kind: str, says: str | None, folder: Path) -> None:
    hooks = called("collections.OrderedDict")
    arguments = (storage(1, kind=kind), 0, (1,), (1,), False, hooks, bits)
    code = program({"w": called("torch._utils._rebuild_tensor_v2", *arguments)})
    path = archive(folder / "w.pth", code, {"0": struct.pack("<ff", 1, 2)})
    if says is None:
        assert torch.equal(read_state_dict(path)["w"], torch.tensor([1 + 2j]))
        return
    found = fuzz.refused("pth", lambda: read_state_dict(path), CheckpointError)
    assert says in found


def test_files_of_the_other_byte_order(folder: Path) -> None:
    path = archive(folder / "w.pth", program({"w": tensor((2,), (1,), 2)}), {"0": bytes(8)})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/byteorder", "big")
    content = path.read_bytes().replace(bytes(8), struct.pack(">ff", 1.5, -2.0), 1)
    path.write_bytes(content)
    assert torch.equal(read_state_dict(path)["w"], torch.tensor([1.5, -2.0]))


def test_tensors_are_apart_from_the_file(model: nn.Module, tmp_path: Path) -> None:
    """As those of torch.load: each storage is one of its own, and writing stays in memory."""
    path = save_weights(model, tmp_path / "w.pth")
    before = path.read_bytes()
    state = read_state_dict(path)
    expected = torch.load(path, weights_only=True)
    for key, value in state.items():
        assert torch.equal(value, expected[key]) and value.dtype == expected[key].dtype
        assert value.stride() == expected[key].stride()
        assert len(value.untyped_storage()) == len(expected[key].untyped_storage())
        value.zero_()
    assert path.read_bytes() == before


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pth")
    for path in (tmp_path / "w.pth", Path("/dev/zero")):
        found = fuzz.refused("pipes", lambda path=path: inspect_weights(path), CheckpointError)
        assert "a pipe, a device" in found


def test_archives(model: nn.Module, folder: Path) -> None:
    """Entries of one name, packed ones, and ones that claim what lies elsewhere."""
    path = folder / "w.pth"
    code = program({"w": tensor((1,), (1,), 1)})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as file:
        for content in (code, code):
            file.writestr("archive/data.pkl", content)
    assert "two entries" in fuzz.refused("pth", lambda: read_state_dict(path), CheckpointError)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", code)
        file.writestr("archive/data/0", bytes(1 << 26))
    says = fuzz.refused("pth", lambda: read_state_dict(path), CheckpointError)
    assert "claim 67" in says


NPY = np.lib.format


def npy(shape: tuple, dtype: str = "<f4", data: bytes = b"") -> bytes:
    file = io.BytesIO()
    about = {"descr": dtype, "fortran_order": False, "shape": shape}
    NPY.write_array_header_1_0(file, about)
    return file.getvalue() + data


NPZ = {
    "four-tebibytes": (npy((1 << 40,)), False, "claims the shape"),
    "four-tebibytes-packed": (npy((1 << 40,)), True, "claims the shape"),
    "too-few-bytes": (npy((3,), data=bytes(8)), False, "and 8 bytes follow"),
    "negative": (npy((-1,)), False, "claims the shape|readable"),
    "bomb": (npy((65 << 20,), data=bytes(260 << 20)), True, "unpacks to more than"),
    "objects": (npy((1,), "|O", bytes(8)), False, "array of object"),
    "records": (npy((1,), [("a", "<f4")], bytes(4)), False, "array of"),
    "no-array": (b"text", False, "readable"),
}


@pytest.mark.parametrize(("content", "packed", "says"), NPZ.values(), ids=NPZ.keys())
def test_arrays(content: bytes, packed: bool, says: str, folder: Path) -> None:
    path = folder / "w.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else 0) as file:
        file.writestr("w.npy", content, compresslevel=1)
    message = fuzz.refused("npz", lambda: read_state_dict(path), CheckpointError)
    assert re.search(says, message), message


def own_file(path: Path, source: nn.Module, /, **changed: Any) -> Path:
    """A file of the model whose facts are changed."""
    facts = json.dumps({**model_metadata(source), **changed})
    state = {k: v.contiguous() for k, v in source.state_dict().items()}
    save_file(state, path, metadata={"format": "pt", "deeplab_fast": facts})
    return path


def options(**changed: object) -> dict[str, object]:
    given = {"output_stride": 16, "width": 0.25, "norm": "batch", "aspp_channels": 8}
    return {"options": {**given, **changed}}


def made(kind: str, name: str = "classifier.1", **values: object) -> dict[str, object]:
    return {"settings": {name: {"class": kind, "new": True, "values": values}}}


def given_values(name: str = "", **values: object) -> dict[str, object]:
    entry = {"class": "BatchNorm2d", "new": False, "values": values}
    return {"settings": {name or "backbone.Conv.bn": entry}}


FACTS = {
    # An absolute path as option was opened, and its first bytes printed.
    "path-as-option": options(weights_backbone="/etc/passwd"),
    "weights-as-option": options(weights="/etc/passwd"),
    "classes-many": {"num_classes": 10**9},
    "classes-more-than-it-has": {"num_classes": 90_000},
    "classes-a-float": {"num_classes": 3.0},
    "channels-many": options(aspp_channels=10**9),
    "channels-more-than-it-has": options(aspp_channels=60_000),
    "rates-many": options(atrous_rates=[1] * 10_000),
    "rates-of-text": options(atrous_rates="12"),
    "rates-negative": options(atrous_rates=[-1]),
    "stride": options(output_stride=[8]),
    "width-many": options(width=1e30),
    "width-nan": options(width=float("nan")),
    "flag-of-text": options(align_corners="no"),
    "unknown-option": options(new_one=1),
    "option-of-another": options(stem="deep"),
    "no-mapping": {"options": [1]},
    "model-a-number": {"model": 3},
    "classes-a-text": {"classes": "abc"},
    "palette-flat": {"palette": [1, 2, 3]},
    "palette-beyond": {"palette": [[0, 0, 256]]},
    "mean-nan": {"preprocess": {"mean": [float("nan")] * 3}},
    "mean-two": {"preprocess": {"mean": [0.5, 0.5]}},
    "std-zero": {"preprocess": {"std": [0, 0, 0]}},
    "size-many": {"preprocess": {"size": 10**9}},
    "preprocess-more": {"preprocess": {"forward": 1}},
    "preprocess-a-list": {"preprocess": []},
    "kind-a-list": {"preprocess_kind": []},
    "lost-a-number": {"lost": 1},
    "calibration": {"calibration": {"ranges": {"a": [2, 1]}}},
    "settings-a-list": {"settings": [1]},
    "conv-many": made("Conv2d", in_channels=1 << 19, out_channels=1 << 19, kernel_size=[3, 3]),
    "conv-device": made("Conv2d", in_channels=8, out_channels=3, kernel_size=1, padding=1 << 40),
    "named-training": made("ReLU", "classifier.training"),
    "named-parameters": made("ReLU", "classifier._parameters"),
    "named-forward": made("ReLU", "forward"),
    "nowhere": {"settings": {"classifier.forward": None}},
    "deep-name": {"settings": {"a." * 100 + "b": None}},
    "deep-value": given_values(eps=[[[[[[[[[1]]]]]]]]]),
}


@pytest.mark.parametrize("changed", FACTS.values(), ids=FACTS.keys())
def test_facts_beside_the_tensors(changed: dict[str, Any], model: nn.Module, folder: Path) -> None:
    path = own_file(folder / "w.safetensors", model, **changed)
    message = fuzz.refused("facts", lambda: from_checkpoint(path), CheckpointError)
    assert "root:" not in message


@pytest.mark.parametrize(
    "changed",
    [
        given_values(training="x"),
        given_values("", forward=1),
        {"settings": {"": {"class": "DeepLabV3", "new": False, "values": {"preprocess": 1}}}},
    ],
    ids=["training", "method", "preprocess"],
)
def test_attributes_that_no_file_gives(
    changed: dict[str, Any], model: nn.Module, folder: Path
) -> None:
    entry = next(iter(changed["settings"].items()))
    if entry[0] == "":
        entry[1]["class"] = f"{type(model).__module__}.{type(model).__qualname__}"
    again = from_checkpoint(own_file(folder / "w.safetensors", model, **changed))
    assert again.training is True and again.preprocess == model.preprocess
    assert again.backbone.Conv.bn.training is True


def test_texts_that_are_no_facts(model: nn.Module, folder: Path) -> None:
    path = folder / "w.safetensors"
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    for text in ("{", "[" * 100_000, '{"num_classes": 1' + "0" * 9000 + "}", '{"a": {' * 500):
        save_file(state, path, metadata={"deeplab_fast": text})
        fuzz.refused("facts", lambda: inspect_weights(path), CheckpointError)
    save_file(state, path, metadata={"deeplab_fast": "3"})
    assert inspect_weights(path).model == "deeplabv3_mobilenet_v2_tf"


def test_names_in_very_many_places(tmp_path: Path) -> None:
    one = torch.ones(1)
    shared = {f"x{i}.conv.weight": one for i in range(2_000)}
    torch.save({f"k{i}": shared for i in range(200)}, tmp_path / "w.pth")
    path = tmp_path / "w.pth"
    assert "ways" in fuzz.refused("pth", lambda: inspect_weights(path), CheckpointError)
    torch.save({f"x{i}.weight": one for i in range(5_000)}, path)
    module = nn.Linear(1, 1)
    found = fuzz.refused("module", lambda: load_module(module, path), CheckpointError)
    assert "behind 5000 prefixes" in found


def test_state_dicts_that_hold_themselves() -> None:
    state: dict[str, Any] = {"w": torch.ones(1)}
    state["model"] = state
    with pytest.raises(CheckpointError, match="hold themselves"):
        inspect_weights(state)


# What is written: equal bytes, and a checksum.
def test_equal_models_give_equal_bytes(model: nn.Module, tmp_path: Path) -> None:
    for suffix in (".safetensors", ".pth"):
        files = [save_weights(model, tmp_path / f"{i}{suffix}") for i in range(2)]
        assert files[0].read_bytes() == files[1].read_bytes(), suffix
        assert files[0].stat().st_mode & 0o777 == 0o666 & ~_umask()
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert list(file.keys()) == sorted(model.state_dict())
    length = struct.unpack("<Q", (tmp_path / "0.safetensors").read_bytes()[:8])[0]
    header = (tmp_path / "0.safetensors").read_bytes()[8 : 8 + length]
    keys = list(json.loads(header)["__metadata__"])
    assert keys == sorted(keys) and length % 8 == 0
    state = load_file(tmp_path / "0.safetensors")
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert list(torch.load(tmp_path / "0.pth", weights_only=True)) == list(model.state_dict())


def _umask() -> int:
    script = "import os; mask = os.umask(0); os.umask(mask); print(mask)"
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True).stdout)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, torch.bool, torch.uint16, torch.complex64, torch.int8],
    ids=str,
)
def test_every_dtype_is_written_as_the_library_does(dtype: torch.dtype, tmp_path: Path) -> None:
    from deeplab_fast.weights.safetensors_file import write_safetensors

    values = {
        "b": torch.arange(6).view(2, 3).to(dtype),
        "a\n": torch.ones((), dtype=dtype),
        "é": torch.ones(0, 2, dtype=dtype),
        "t": torch.arange(6).view(2, 3).to(dtype).t(),
    }
    with (tmp_path / "w.safetensors").open("wb") as file:
        write_safetensors(values, {"x": "1"}, file)
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == values.keys()
    for key, value in values.items():
        assert found[key].dtype == dtype and torch.equal(found[key], value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("where", [0.2, 0.5, 0.8])
def test_a_flipped_bit_is_told(suffix: str, where: float, model: nn.Module, tmp_path: Path) -> None:
    path = save_weights(model, tmp_path / f"w{suffix}")
    content = bytearray(path.read_bytes())
    # In the longest tensor, a part of its length behind its beginning.
    state = model.state_dict()
    longest = max(state.values(), key=torch.numel)
    raw = longest.contiguous().view(torch.uint8).numpy().tobytes()
    content[content.index(raw) + int(where * len(raw))] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not those that its checksum is of.*damaged"):
        from_checkpoint(path)


def test_files_that_others_wrote_again_are_read(model: nn.Module, tmp_path: Path) -> None:
    path = save_weights(model, tmp_path / "w.safetensors")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    state = load_file(path)
    key = next(k for k, v in state.items() if v.ndim == 4)
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(half, path, metadata=header)
    assert torch.equal(read_state_dict(path)[key], half[key])
    save_file({**state, key: state[key] + 1}, path, metadata=header)
    with pytest.raises(CheckpointError, match="kept the header: if you trust it"):
        read_state_dict(path)
    # As the message says.
    load_weights(model, load_file(path))
    save_file(state, path, metadata={"format": "pt"})
    assert read_state_dict(path).keys() == state.keys()
    pth = save_weights(model, tmp_path / "w.pth")
    state = torch.load(pth, weights_only=True)
    state[key] += 1
    torch.save(state, pth)
    assert torch.equal(read_state_dict(pth)[key], state[key])


# Mutated files of every kind.
def _seeds(model: nn.Module) -> dict[str, bytes]:
    state = model.state_dict()
    first = dict(list(state.items())[:6])
    content = {
        "state_dict": OrderedDict((f"model.{k}", v) for k, v in state.items()),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, path=Path("x")),
        "best": np.float64(0.5),
        "curve": np.arange(4.0),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
    }
    found: dict[str, bytes] = {}
    for name, write in {
        "state.pth": lambda f: torch.save(state, f),
        "few.pth": lambda f: torch.save(first, f),
        "container.ckpt": lambda f: torch.save(content, f),
        "legacy.pth": lambda f: torch.save(first, f, _use_new_zipfile_serialization=False),
        "w.npz": lambda f: np.savez(f, **{k: v.numpy() for k, v in first.items()}),
        "packed.npz": lambda f: np.savez_compressed(f, **{k: v.numpy() for k, v in first.items()}),
    }.items():
        file = io.BytesIO()
        write(file)
        found[name] = file.getvalue()
    return found


@pytest.fixture(scope="module")
def seeds(model: nn.Module, folder: Path) -> dict[str, bytes]:
    found = _seeds(model)
    found["w.safetensors"] = save_weights(model, folder / "seed.safetensors").read_bytes()
    found["own.pth"] = save_weights(model, folder / "seed.pth").read_bytes()
    return found


NAMES = [
    "state.pth",
    "few.pth",
    "container.ckpt",
    "legacy.pth",
    "w.npz",
    "packed.npz",
    "w.safetensors",
    "own.pth",
]


@st.composite
def changes(draw: st.DrawFn) -> list[tuple[str, float, bytes]]:
    # Hypothesis's own numbers gather at both ends.
    chance = random.Random(draw(st.integers(0, 1 << 40)))
    words = (b"\xff" * 4, b"\x00" * 4, b"\xff" * 8, b"\x7f", b"[" * 64, b"9" * 12)
    found = []
    for _ in range(chance.choice((1, 1, 1, 2, 4, 8))):
        kind = chance.choice(("set",) * 6 + ("insert", "delete", "cut", "head", "repeat"))
        # Headers and directories, near both ends, are changed as often as all others.
        place = chance.random() * chance.choice((1.0, 1.0, 0.01, 0.0005))
        place = 1 - place * 0.03 if chance.random() < 0.2 else place
        value = chance.choice(
            (chance.randbytes(1), chance.randbytes(1), chance.randbytes(8), *words)
        )
        found.append((kind, place, value))
    return found


def changed(content: bytes, steps: list[tuple[str, float, bytes]]) -> bytes:
    found = bytearray(content)
    for kind, place, value in steps:
        at = int(place * len(found))
        if kind == "set":
            found[at : at + len(value)] = value
        elif kind == "insert":
            found[at:at] = value
        elif kind == "delete":
            del found[at : at + len(value)]
        elif kind == "cut":
            del found[at:]
        elif kind == "head":
            found[: len(value)] = value
        else:
            found[at:at] = found[at : at + 64 * len(value)]
    return bytes(found)


@fuzz.examples(60)
@given(name=st.sampled_from(NAMES), steps=changes())
def test_mutated_files(name: str, steps: list, seeds: dict[str, bytes], folder: Path) -> None:
    path = folder / f"mutated-{name}"
    path.write_bytes(changed(seeds[name], steps))
    try:
        fuzz.answer(
            f"mutated {path.suffix[1:]}", lambda: _read(path), CheckpointError, memory=MEMORY
        )
    finally:
        path.unlink()


def _read(path: Path) -> object:
    state = read_state_dict(path)
    # Every value is there.
    return sum(float(v.double().abs().sum()) if v.numel() else 0.0 for v in _real(state))


def _real(state: dict[str, Tensor]) -> list[Tensor]:
    return [v for v in state.values() if not v.is_complex()]


# Pickles of the machine's operations with values at its edges.
WORDS = [code_of(word) for word in ("model", "state_dict", "backbone.conv1.weight", "", "a\x00")]
NUMBERS = [
    code_of(number) for number in (0, 1, -1, 7, 1 << 20, 1 << 40, (1 << 61) - 1, -(1 << 70), 0.5)
]
PIECES = [
    *WORDS,
    *NUMBERS,
    *(_global(name) for name in pickled._NAMES),
    *(bytes([step]) for step in pickled._STEPS if step not in b"cXUT"),
    b"q\x00",
    b"q\x01",
    b"h\x00",
    b"h\x01",
    b"(",
    b"t",
    b"R",
    b"b",
    b"\x81",
    storage(1).code,
    storage(1 << 40).code,
    storage(1, "9").code,
    tensor((1,), (1,), 1).code,
    tensor((1 << 30,), (0,), 1).code,
    array("f4", (4,), RAW).code,
    array("i8", (2,), RAW).code,
    array("U4", (1,), RAW).code,
    array("S4", (4,), RAW).code,
]


# Calls of every name with whatever arguments, and the state that some of them get.
CALLED = [
    _Called(_global(name))
    for name, known in pickled._NAMES.items()
    if isinstance(known, pickled._Function)
]
VALUES = [_Called(piece) for piece in NUMBERS + WORDS]
VALUES += [RAW, RECONSTRUCT, storage(1), tensor((1,), (1,), 1), array("f4", (4,), RAW)]
VALUES += [_Called(code_of(v)) for v in (None, True, (), (1,), (1 << 40,), (-1,), {}, [1], b"a")]
VALUES += [_Called(_global(name)) for name in list(pickled._NAMES)[:40]]


@st.composite
def objects(draw: st.DrawFn, depth: int = 3) -> _Called:
    kind = draw(st.integers(0, 4)) if depth else 0
    if kind == 0:
        return draw(st.sampled_from(VALUES))
    inner = draw(st.lists(objects(depth - 1), max_size=6))
    if kind == 1:
        return _Called(code_of(tuple(inner)))
    if kind == 2:
        return _Called(code_of({f"k{i}": value for i, value in enumerate(inner)}))
    if kind == 3:
        return built(draw(objects(depth - 1)), draw(objects(depth - 1)))
    function = draw(st.sampled_from(CALLED)).code
    return _Called(function + code_of(tuple(inner)) + draw(st.sampled_from([b"R", b"\x81"])))


@fuzz.examples(60)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=40),
    value=objects(),
    kind=st.sampled_from(["bare", "beside", "wrapped", "in-state"]),
)
def test_programs(pieces: list[bytes], value: _Called, kind: str, folder: Path) -> None:
    good = tensor((1,), (1,), 1)
    code = {
        "bare": b"\x80\x02" + b"".join(pieces) + b".",
        "beside": program({"model": {"backbone.w": good}, "other": value}),
        "wrapped": program({"model": value}),
        "in-state": program({"backbone.w": good, "backbone.v": value}),
    }[kind]
    path = archive(folder / "program.pth", code, ONE)
    fuzz.answer(f"programs {kind}", lambda: _read(path), CheckpointError, memory=MEMORY)


@fuzz.examples(60)
@given(place=st.sampled_from([0, 1, 2, 3, 4]), value=objects(), wrapped=st.integers(0, 2))
def test_programs_in_a_legacy_file(place: int, value: _Called, wrapped: int, folder: Path) -> None:
    """In the place of each of the five pickles; plain, as the byte order, as a storage's name."""
    inside = [value, {"little_endian": value}, _Called(b"](" + value.code + b"e")][wrapped]
    path = folder / "program-legacy.pth"
    path.write_bytes(legacy(1, 1, facts={place: program(inside)}))
    fuzz.answer("programs legacy", lambda: _read(path), CheckpointError, memory=MEMORY)


# Facts with any value of JSON at any place.
plain_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 70), 1 << 70),
        st.floats(),
        st.sampled_from(["", "/etc/passwd", "Conv2d", "ReLU", "forward", "a\x00\n", "batch"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["class", "new", "values", "eps", "size", ""]), inner),
    ),
    max_leaves=6,
)


@st.composite
def changed_facts(draw: st.DrawFn, facts: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(facts)
    for _ in range(draw(st.integers(1, 3))):
        at: Any = found
        while True:
            key = draw(st.sampled_from(sorted(at))) if at else "x"
            inner = at.get(key)
            if not isinstance(inner, dict) or draw(st.integers(0, 3)) == 0:
                break
            at = inner
        at[key] = draw(plain_values)
    return found


@pytest.fixture(scope="module")
def some_facts(model: nn.Module) -> dict[str, Any]:
    other = copy.deepcopy(model)
    other.backbone.Conv.bn.eps = 0.5
    other.classes, other.palette = ("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2))
    other.classifier[1] = nn.Conv2d(8, 3, 1)
    return model_metadata(other)


@fuzz.examples(15)
@given(data=st.data())
def test_changed_facts(
    data: st.DataObject, model: nn.Module, some_facts: dict[str, Any], folder: Path
) -> None:
    facts = data.draw(changed_facts(some_facts))
    path = own_file(folder / "facts.safetensors", model, **facts)
    fuzz.answer("facts", lambda: from_checkpoint(path), CheckpointError, memory=MEMORY)


MMSEG = {
    "backbone": {
        "strides": [1, 2, 1, 1],
        "dilations": [1, 1, 2, 4],
        "norm_cfg": {"eps": 1e-5},
        "multi_grid": [1, 2, 4],
        "style": "caffe",
        "act_cfg": {"type": "ReLU"},
    },
    "decode_head": {
        "dilations": [1, 12, 24, 36],
        "align_corners": False,
        "dropout_ratio": 0.1,
        "in_index": 3,
        "out_channels": 19,
    },
    "auxiliary_head": {"norm_cfg": {"eps": 1e-3}},
    "data_preprocessor": {"mean": [123.675, 116.28, 103.53]},
}


@pytest.fixture(scope="module")
def smp_names() -> dict[str, Tensor]:
    """A ResNet-50's names and shapes as smp has them."""
    with torch.device("meta"):
        state = dlf.get_model("deeplabv3_resnet50", num_classes=3).state_dict()
    names = (("backbone", "encoder"), ("classifier.4", "segmentation_head.0"))
    names = (*names, ("classifier", "decoder"))
    found = {}
    for key, value in state.items():
        ours, theirs = next(pair for pair in names if key.startswith(f"{pair[0]}."))
        found[theirs + key.removeprefix(ours)] = value
    return found


CONFIG = {
    "encoder_name": "resnet50",
    "encoder_output_stride": 8,
    "decoder_atrous_rates": [12, 24, 36],
    "decoder_aspp_dropout": 0.5,
    "upsampling": 8,
    "activation": None,
}


@fuzz.examples(20)
@given(data=st.data())
def test_config_beside_the_weights(data: st.DataObject, smp_names: dict[str, Tensor]) -> None:
    config = json.loads(json.dumps(data.draw(changed_facts(CONFIG))))
    checkpoint = Checkpoint("w", smp_names, {}, Origin(config=config))
    layout = layout_named("smp")

    def read() -> object:
        state = rename_tensors(smp_names, layout, "w").state
        info = inspect_open(checkpoint, layout, state)
        assert info.model == "deeplabv3_resnet50"
        return info, layout.differs(smp_names, checkpoint.origin)

    fuzz.answer("config.json", read, CheckpointError, memory=MEMORY)


@fuzz.examples(20)
@given(data=st.data())
def test_config_in_the_weights(data: st.DataObject, smp_names: dict[str, Tensor]) -> None:
    """mmsegmentation's, a text of Python."""
    about = data.draw(changed_facts(MMSEG))
    text = "model = " + repr(about).replace("'dict'", "dict(type=1)")
    cut = data.draw(st.integers(0, len(text))) if data.draw(st.integers(0, 4)) == 0 else None
    meta = {"cfg": data.draw(st.sampled_from([text[:cut], "model = " + "(" * 500, "-" * 9000]))}
    layout = layout_named("mmseg")

    def read() -> object:
        origin = Origin(meta=meta)
        found = checked_options(layout.options(smp_names, origin), "w")
        check_settings(layout.settings(smp_names, origin), "w")
        return found, layout.differs(smp_names, origin)

    fuzz.answer("mmseg config", read, CheckpointError, memory=MEMORY)


@pytest.mark.parametrize("outside", ["../secret.bin", "link.bin", "absolute"])
def test_exported_files_read_nothing_outside_their_folder(outside: str, tmp_path: Path) -> None:
    """The runtimes' own check of "external data", which every version that is taken has."""
    onnx = pytest.importorskip("onnx")
    inside = tmp_path / "model"
    inside.mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(64))
    (inside / "link.bin").symlink_to(secret)
    weight = onnx.TensorProto(name="w", data_type=1, dims=[16], data_location=1)
    place = str(secret) if outside == "absolute" else outside
    for key, value in (("location", place), ("offset", "0"), ("length", "64")):
        weight.external_data.add(key=key, value=value)
    ends = [onnx.helper.make_tensor_value_info(name, 1, [16]) for name in "xy"]
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    (inside / "m.onnx").write_bytes(model.SerializeToString())
    for runtime in ("onnxruntime", "openvino"):
        pytest.importorskip(runtime)
        with pytest.raises(ValueError, match=r"no \.onnx file that"):
            dlf.load_exported(inside / "m.onnx", runtime=runtime)
