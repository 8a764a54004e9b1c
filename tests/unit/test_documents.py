"""YAML and JSON of anybody's: plain values, bounded, or an error in one line."""

import os

import pytest

from deeplab_fast._documents import (
    DocumentError,
    parse_json,
    parse_yaml,
    read_document,
    read_text,
    shown,
)


def bomb(levels, row):
    """Lists whose elements are aliases of the list before: row ** levels values."""
    lines = [f"a0: &a0 [{', '.join(['x'] * row)}]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * row)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(bomb(9, 10), "more than 200,000 values", id="alias bomb"),
        pytest.param(
            bomb(9, 10).replace("[*", "{<<: [*").replace("]", "]}").replace("x]}", "x]"),
            "more than 200,000 values",
            id="bomb of merged keys",
        ),
        pytest.param("&a [*a]", r"\*a within itself", id="cycle"),
        pytest.param("[" * 100_000, "more than 64 lists", id="deep, flow"),
        pytest.param("- " * 100_000, "more than 64 lists", id="deep, block"),
        pytest.param("a: 1\nb: 2\na: 3", "the key 'a' is there twice in line 3", id="key twice"),
        pytest.param("1: a\n0x1: b", "the key 1 is there twice", id="key twice by value"),
        pytest.param("? [a]\n: b", "unhashable key", id="a list as a key"),
        pytest.param("!!python/name:os.system", "the tag .*os.system in line 1", id="code"),
        pytest.param("a: !!binary aGk=", "the tag .*binary", id="tag of another kind"),
        pytest.param("9" * 5000, r"number of 5000 digits \(9{12}\.\.\.\)", id="digits"),
        pytest.param("0x" + "f" * 5000, "number of 5002 digits", id="digits, hexadecimal"),
        pytest.param("a: \x07", "control characters|not allowed", id="control character"),
        pytest.param("a: b\n c: [", r"line \d, column", id="no YAML"),
        pytest.param("a\n--- b", "another document", id="two documents"),
        pytest.param("a: \udc80", "cannot make", id="no character"),
    ],
)
def test_what_yaml_may_not_be(text, message):
    with pytest.raises(DocumentError, match=message):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[" * 100_000, "more than 64 lists", id="deep"),
        pytest.param("[" * 65 + "]" * 65, "more than 64 lists", id="one level too deep"),
        pytest.param('{"a": 1, "b": 2, "a": 3}', "the key 'a' twice", id="key twice"),
        pytest.param("9" * 5000, "number of 5000 digits", id="digits"),
        pytest.param("1." + "9" * 5000, "number of 5002 digits", id="digits of a fraction"),
        pytest.param('{"a": 1', "line 1, column 8", id="cut off"),
        pytest.param("", "line 1, column 1", id="empty"),
    ],
)
def test_what_json_may_not_be(text, message):
    with pytest.raises(DocumentError, match=message):
        parse_json(text)


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_as_deep_as_allowed(parse):
    value = parse("[" * 64 + "]" * 64)
    for _ in range(63):
        (value,) = value
    assert value == []


def test_aliases_merged_keys_and_dates_of_an_honest_file():
    text = "x: &x {a: 1, b: [1.5, yes]}\ny: {<<: *x, a: 2}\nday: 2026-01-02\nz: [*x, *x]\n"
    x = {"a": 1, "b": [1.5, True]}
    y = {"a": 2, "b": [1.5, True]}
    assert parse_yaml(text) == {"x": x, "y": y, "day": "2026-01-02", "z": [x, x]}


@pytest.mark.parametrize(
    ("text", "plain", "exponents"),
    [
        pytest.param("1e-3", "1e-3", 1e-3, id="no point"),
        pytest.param("0016E5", "0016E5", 1600000.0, id="a name in YAML 1.1"),
        pytest.param("1.5e+3", 1500.0, 1500.0, id="YAML 1.1's"),
        pytest.param("12", 12, 12, id="an integer"),
        pytest.param("1.2.3", "1.2.3", "1.2.3", id="a version"),
        pytest.param("-.5", "-.5", -0.5, id="no digit before the point"),
    ],
)
def test_numbers_with_exponents(text, plain, exponents):
    for value, expected in (
        (parse_yaml(text), plain),
        (parse_yaml(text, exponents=True), exponents),
    ):
        assert value == expected and type(value) is type(expected)


def test_files_that_are_no_text(tmp_path):
    file = tmp_path / "a.yaml"
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", tmp_path, "/dev/zero"):
        with pytest.raises(DocumentError, match="is no file, expected one; name a file"):
            read_document(path)
    file.write_bytes(b"a: \xff")
    with pytest.raises(DocumentError, match=r"a\.yaml is not UTF-8: byte 3 is 0xff"):
        read_document(file)
    file.write_bytes(b"ab\0")
    with pytest.raises(DocumentError, match="a zero byte at 2"):
        read_document(file)
    file.write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_document(file) == {"a": 1}
    assert read_text(file, limit=7) == "a: 1"
    with pytest.raises(DocumentError, match="has 7 bytes, expected 6 at most"):
        read_text(file, limit=6)
    with pytest.raises(DocumentError, match="zero byte"):
        read_text("a\0b")
    with pytest.raises(FileNotFoundError):
        read_document(tmp_path / "none.yaml")


def test_the_suffix_says_the_kind(tmp_path):
    for name in ("a.json", "a.JSON"):
        (tmp_path / name).write_text("a: 1")
        with pytest.raises(DocumentError, match="is no JSON"):
            read_document(tmp_path / name)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param("a\nb\x1b[31m", "a b\\x1b[31m", id="control characters"),
        pytest.param("x" * 100, "x" * 80 + "...", id="long"),
        pytest.param(1 << 20000, "a int too long to show", id="more digits than Python shows"),
        pytest.param({"a": [1]}, "{'a': [1]}", id="a value"),
    ],
)
def test_shown(value, text):
    assert shown(value) == text
