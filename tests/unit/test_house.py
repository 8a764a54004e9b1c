"""The map of the house in CONTRIBUTING.md holds: who may import whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Where the code of a top-level folder is imported from.
PACKAGES = {"deeplab_fast": "deeplab_fast", "kernels": "deeplab_fast.kernels", "bench": "bench"}


@dataclass(frozen=True)
class Import:
    """One import statement's name: `source` takes `name` of `target`, a module of ours.

    Attributes:
        source, target: modules.
        name: what is taken, "" for the module itself.
        line: of the statement.
    """

    source: str
    target: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target} {self.name}".rstrip()


@cache
def modules() -> dict[str, Path]:
    """All modules of the package and of bench/."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


def tree_of(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text("utf-8"))


@cache
def imports() -> tuple[Import, ...]:
    """Every import of a module of ours, also inside functions and by importlib."""
    return tuple(found for module in modules() for found in imports_of(module, tree_of(module)))


def imports_of(module: str, tree: ast.Module) -> Iterator[Import]:
    package = module.split(".")
    if modules()[module].name != "__init__.py":
        package.pop()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            for alias in node.names:
                if f"{base}.{alias.name}" in modules():
                    yield Import(module, f"{base}.{alias.name}", "", node.lineno)
                elif base in modules():
                    yield Import(module, base, alias.name, node.lineno)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in modules():
                    yield Import(module, alias.name, "", node.lineno)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            # A name that is put together counts by its constant beginning.
            text = "".join(
                n.value
                for n in ast.walk(node)
                if isinstance(n, ast.Constant) and isinstance(n.value, str)
            ).rstrip(".")
            if text in modules():
                yield Import(module, text, "", node.lineno)


@cache
def layers() -> dict[str, int]:
    """Rooms of the map in CONTRIBUTING.md -> how high they stand."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    picture = re.search(r"^```text map\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert picture, "CONTRIBUTING.md has no map"
    rows = [row for row in picture[1].splitlines() if row.strip()]
    found = {}
    for height, row in enumerate(reversed(rows)):
        for name in re.split(r"\s{2,}", row.strip())[0].split(", "):
            assert name not in found, f"{name} stands twice in the map"
            found[name] = height
    return found


@cache
def room(module: str) -> str:
    """The part of the map that a module belongs to: its file where that is named, or its folder."""
    path = modules()[module].relative_to(ROOT).as_posix().removeprefix("deeplab_fast/")
    return path if path in layers() else f"{path.split('/')[0]}/" if "/" in path else path


def test_map_names_every_room() -> None:
    assert {room(module) for module in modules()} == set(layers())


def test_imports_point_down() -> None:
    height = layers()
    wrong = [
        str(found)
        for found in imports()
        if room(found.source) != room(found.target)
        and height[room(found.target)] >= height[room(found.source)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle() -> None:
    arrows = {(found.source, found.target) for found in imports() if found.source != found.target}
    # An arrow from a module that nobody imports, or to one that imports nobody, is in no circle.
    while loose := {
        (source, target)
        for source, target in arrows
        if source not in {t for _, t in arrows} or target not in {s for s, _ in arrows}
    }:
        arrows -= loose
    assert not arrows, "\n".join(f"{source} -> {target}" for source, target in sorted(arrows))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_private_name_across_modules() -> None:
    wrong = [str(found) for found in imports() if is_private(found.name)]
    for module in modules():
        tree = tree_of(module)
        ours = {name for name, _ in own_modules(module, tree)}
        wrong += [
            f"{module}:{node.lineno} reads {node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in ours
            and is_private(node.attr)
        ]
    assert not wrong, "\n".join(wrong)


def own_modules(module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name in a file, module of ours that it stands for)."""
    targets = {found.target for found in imports_of(module, tree) if not found.name}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                for target in targets:
                    if target.endswith(f".{alias.name}"):
                        yield alias.asname or alias.name, target


def test_private_modules_are_used_in_their_package_only() -> None:
    """Those of the package itself (`_ext`) in bench/ too."""
    wrong = []
    for found in imports():
        package, _, name = found.target.rpartition(".")
        inside = f"{found.source}.".startswith(f"{package}.") or package == "deeplab_fast"
        if is_private(name) and not inside:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


# Importing a submodule runs the package's __init__, which imports everything: here it is empty.
_ALONE = """
import importlib, sys, types
package = types.ModuleType("deeplab_fast")
package.__path__ = [{package!r}, {root!r}]
sys.modules["deeplab_fast"] = package

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith({blocked!r}):
            raise ImportError(f"{{name}} must not be needed")

sys.meta_path.insert(0, Blocked())
for name in {names!r}:
    importlib.import_module(name)
{code}
"""


def run_alone(names: list[str], allowed: list[str], code: str = "") -> None:
    """Import modules in a process in which the package has some of its rooms only."""
    rooms = {f"deeplab_fast.{m.split('.')[1]}" for m in modules() if m.startswith("deeplab_fast.")}
    blocked = tuple(sorted(rooms - {f"deeplab_fast.{name}" for name in allowed}))
    program = textwrap.dedent(_ALONE).format(
        package=str(ROOT / "deeplab_fast"), root=str(ROOT), blocked=blocked, names=names, code=code
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def members(package: str) -> list[str]:
    return [m for m in modules() if f"{m}.".startswith(f"{package}.")]


BELOW_OPS = ["_documents", "_ext", "_version", "dispatch", "plan", "reference", "testing"]


def test_kernels_are_importable_alone() -> None:
    pytest.importorskip("triton")
    run_alone(members("deeplab_fast.kernels"), [*BELOW_OPS, "kernels"])


def test_ops_need_no_kernels() -> None:
    run_alone(members("deeplab_fast.ops"), [*BELOW_OPS, "ops"])


def test_plan_needs_nothing() -> None:
    run_alone(members("deeplab_fast.plan"), ["plan"])


def test_compiled_ops_need_no_python() -> None:
    run_alone(
        ["torch", "deeplab_fast._ext"],
        ["_ext", "_version"],
        "import torch\n"
        "if sys.modules['deeplab_fast._ext'].CPU.loaded:\n"
        "    labels = torch.ops.deeplab_fast._cpu_instruction_set('')\n",
    )
