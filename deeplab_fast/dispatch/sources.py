"""Fingerprints of the kernels' sources: a record holds for as long as its kernel is the same.

A fingerprint does not change with comments, docstrings, blank lines or, in C++, layout. Triton's
kernels are read where they lie. What was compiled is known by what build.json says of it, which
setup.py writes; so this module needs the standard library alone.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import tokenize
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path

_LENGTH = 12
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
# Strings are matched so that what looks like a comment in one stays.
_CPP_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
_INCLUDED = ("csrc/include", "csrc/cuda")

# The launchers and plans beside the device code: a wrong stride there is a wrong result as well.
# What chooses among configurations is not: each choice is one that tests compile.
_PLAN = "deeplab_fast/plan"
_PRODUCT = ("kernels/launch.py", f"{_PLAN}/packing.py")
_TILES = (f"{_PLAN}/taps.py", f"{_PLAN}/schedule.py", f"{_PLAN}/tables.py")
TRITON = {
    "upsample": (
        "kernels/upsample_kernels.py", "kernels/upsample.py", "kernels/launch.py",
        f"{_PLAN}/bilinear.py", f"{_PLAN}/tables.py",
    ),
    "batch_norm": ("kernels/batch_norm_kernels.py", "kernels/batch_norm.py", *_PRODUCT),
    "fold": (
        "kernels/fold_kernels.py", "kernels/fold.py", "kernels/launch.py", f"{_PLAN}/fold.py",
        f"{_PLAN}/tables.py",
    ),
    "pointwise": ("kernels/conv_kernels.py", "kernels/conv.py", *_PRODUCT),
    "branches": ("kernels/aspp_kernels.py", "kernels/aspp.py", *_PRODUCT, *_TILES),
    "project": ("kernels/conv_kernels.py", "kernels/conv.py", "kernels/aspp.py", *_PRODUCT),
    "training": (
        "kernels/aspp_training_kernels.py", "kernels/aspp_kernels.py", "kernels/aspp_training.py",
        "kernels/aspp.py", f"{_PLAN}/gradients.py", *_PRODUCT, *_TILES,
    ),
}  # fmt: skip
# Compiled sources by the names that build.json has them under.
COMPILED = {
    "upsample": "csrc/cuda/upsample.cu",
    "aspp": "csrc/cuda/aspp.cu",
    "aspp_sm90": "csrc/cuda/aspp_sm90.cu",
}
_CUDA_HOST = {
    "upsample": ("deeplab_fast/ops/_upsample.py",),
    "aspp": ("deeplab_fast/ops/aspp_cuda.py", f"{_PLAN}/packing.py", *_TILES),
    "aspp_sm90": ("deeplab_fast/ops/aspp_cuda.py", f"{_PLAN}/packing.py", *_TILES),
}
_CUDA_FAMILY = {"branches": "aspp", "project": "aspp"}


def family(name: str, backend: str) -> str:
    """What an op whose sources are a family of `TRITON` runs on "triton" or "cuda"; "" for none."""
    if backend == "triton":
        return name
    name = _CUDA_FAMILY.get(name, name)
    return name if backend == "cuda" and name in COMPILED else ""


@cache
def of_triton(name: str) -> str:
    """Fingerprint of a Triton family; "" where its sources cannot be read."""
    return _of_package(TRITON[name])


def of_cuda(name: str, compiled: str) -> str:
    """Fingerprint of a CUDA family from that of what was compiled; "" where either is unknown."""
    host = _of_package(_CUDA_HOST[name])
    return _short(f"{compiled} {host}") if compiled and host else ""


def compiled(root: Path) -> dict[str, str]:
    """Fingerprints of the CUDA sources below the root of the repository, by name."""
    return {name: of_files(_with_includes(root, root / path)) for name, path in COMPILED.items()}


def of_files(files: Iterable[Path]) -> str:
    """Fingerprint of source files, in order; "" where one cannot be read."""
    try:
        return _short("\n".join(_code(path) for path in files))
    except (OSError, SyntaxError, tokenize.TokenError, UnicodeDecodeError):
        return ""


@cache
def _of_package(files: tuple[str, ...]) -> str:
    package = Path(__file__).resolve().parent.parent
    found = []
    for name in files:
        folder, _, rest = name.partition("/")
        # kernels/ lies in the package once that is installed, beside it in a checkout.
        inside = package / rest if folder == package.name else package / name
        found.append(inside if inside.is_file() else package.parent / name)
    return of_files(found)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def _code(path: Path) -> str:
    text = path.read_text("utf-8")
    return _python_code(text) if path.suffix == ".py" else _cpp_code(text)


# Units of a GPU's run share most of their files.
@lru_cache(maxsize=512)
def _python_code(text: str) -> str:
    """The text without comments, docstrings and blank lines; the same for every Python."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            doc = node.body[0]
            if doc.lineno == getattr(node, "lineno", 0):
                continue
            last = doc.end_lineno or doc.lineno
            lines[doc.lineno - 1 : last] = [""] * (last - doc.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _cpp_code(text: str) -> str:
    """The text without comments, and with one blank for any number of them."""
    bare = _CPP_COMMENT.sub(lambda match: match[0] if match[0][0] == '"' else " ", text)
    return " ".join(bare.split())


def _with_includes(root: Path, path: Path) -> list[Path]:
    """A file and what it includes by "", each once."""
    found: list[Path] = []

    def add(file: Path) -> None:
        if file in found:
            return
        found.append(file)
        for name in _INCLUDE.findall(file.read_text("utf-8")):
            places = [file.parent / name, *(root / folder / name for folder in _INCLUDED)]
            if existing := next((p for p in places if p.is_file()), None):
                add(existing.resolve())

    try:
        add(path.resolve())
    except OSError:
        return [path]
    return found
