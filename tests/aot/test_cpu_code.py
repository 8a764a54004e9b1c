"""The machine code of the C++ kernels for AVX-512, which few machines can run."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from deeplab_fast import _ext

pytestmark = [
    pytest.mark.skipif(not _ext.CPU.loaded, reason=_ext.CPU.reason),
    pytest.mark.skipif(
        not (shutil.which("nm") and shutil.which("objdump")), reason="binutils are not installed"
    ),
]

_SYMBOL = r"^([0-9a-f]+) ([0-9a-f]+) \w .*"
_FUNCTION = re.compile(_SYMBOL + r"avx512_set::multiply_rows<6, 4, .*\)(\d)>\(")
_PAIRS = re.compile(_SYMBOL + r"avx512_bf16_set::multiply_pairs<6, (4)>\(")
_JUMP = re.compile(r"j\w+\s+([0-9a-f]+)\b")


def functions(name: re.Pattern[str]) -> dict[int, list[tuple[int, str]]]:
    """Of products by tiles of 6 rows of 4 vectors: the name's number -> (address, instruction)."""
    assert _ext.CPU.module is not None
    built = str(_ext.CPU.module.__file__)
    found = {}
    symbols = subprocess.run(["nm", "-CS", built], capture_output=True, text=True, check=True)
    for line in symbols.stdout.splitlines():
        if not (match := name.match(line)):
            continue
        begin, size = int(match[1], 16), int(match[2], 16)
        part = [f"--start-address={begin}", f"--stop-address={begin + size}"]
        code = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", *part, built],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        lines = re.findall(r"^\s+([0-9a-f]+):\s+(\S.*?)\s*$", code, re.MULTILINE)
        found[int(match[3])] = [(int(address, 16), text) for address, text in lines]
    return found


def innermost_loops(code: list[tuple[int, str]], product: str) -> list[list[str]]:
    """The loops that multiply, and contain no other one that does."""
    place = {address: i for i, (address, _) in enumerate(code)}
    loops = []
    for i, (_, text) in enumerate(code):
        jump = _JUMP.match(text)
        if jump and place.get(int(jump[1], 16), i) < i:
            loops.append(range(place[int(jump[1], 16)], i + 1))
    loops = [loop for loop in loops if any(product in code[i][1] for i in loop)]
    return [
        [code[i][1] for i in loop]
        for loop in loops
        if not any(other != loop and set(other) <= set(loop) for other in loops)
    ]


def test_sums_of_avx512_products_stay_in_registers() -> None:
    """A step is 24 products of 4 vectors and 6 values, and touches no stack."""
    found = functions(_FUNCTION)
    if not found:
        pytest.skip("this build has no AVX-512, or no names of its functions")
    assert sorted(found) == list(range(8))
    # The last ending is that of the outputs that fill no tile.
    for ending, code in sorted(found.items())[:-1]:
        loops = innermost_loops(code, "vfmadd")
        assert loops, ending
        for loop in loops:
            products = [text for text in loop if text.startswith("vfmadd") and "%zmm" in text]
            assert len(products) % 24 == 0 and products, ending
            assert len({text.rpartition(",")[2] for text in products}) == 24, ending
            assert not [text for text in loop if re.search(r"%r[sb]p\b", text)], ending
            steps = len(products) // 24
            assert len(loop) <= 40 * steps, (ending, loop)


def test_sums_of_bf16_products_stay_in_registers() -> None:
    """The same, by the instruction for pairs of bf16; addresses may lie on the stack."""
    found = functions(_PAIRS)
    if not found:
        pytest.skip("this build has no avx512_bf16, or no names of its functions")
    loops = innermost_loops(found[4], "vdpbf16ps")
    assert loops
    # The last one is that of an odd channel, once a tile, in a loop over runs of additions.
    steps = [loop for loop in loops if len(loop) <= 48]
    assert steps
    for loop in steps:
        products = [text for text in loop if text.startswith("vdpbf16ps")]
        assert len({text.rpartition(",")[2] for text in products}) == len(products) == 24
        assert not [text for text in loop if re.search(r"%r[sb]p\b.*%zmm|%zmm.*%r[sb]p\b", text)]
