"""What the tests of tests/aot share: kernels compiled without a GPU, and what they were recorded
to take of one.

A table is a JSON file of tests/aot. DEEPLAB_FAST_RECORD_RESOURCES=1 writes into it what a test
otherwise holds against it. Numbers of another compiler than the table's are not compared: each
brings its own.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from deeplab_fast.testing import cubin_resources, nvidia_tool

ROOT = Path(__file__).resolve().parents[2]
AOT = ROOT / "tests" / "aot"
INCLUDE = f"-I{ROOT / 'csrc' / 'include'}"
RECORD = os.environ.get("DEEPLAB_FAST_RECORD_RESOURCES") == "1"
# Of a multiprocessor, for every architecture from sm_80 on.
REGISTERS = 65536


# Tables.


def read_table(name: str) -> dict[str, Any]:
    """A table; empty where there is none."""
    path = AOT / name
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def write_table(name: str, table: dict[str, Any]) -> None:
    temporary = (AOT / name).with_suffix(".tmp")
    temporary.write_text(_text(table) + "\n", "utf-8")
    os.replace(temporary, AOT / name)


def _text(value: Any, indent: str = "") -> str:
    """JSON, an object of a few values on one line, others with sorted keys."""
    if not isinstance(value, dict):
        return json.dumps(value)
    if len(value) <= 4 and not any(isinstance(inner, dict) for inner in value.values()):
        return json.dumps(value)
    inside = indent + "  "
    rows = [f"{inside}{json.dumps(key)}: {_text(value[key], inside)}" for key in sorted(value)]
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}"


# Triton.


@dataclass(frozen=True)
class TritonKernel:
    """A Triton kernel compiled for a capability.

    Attributes:
        ptx: its PTX.
        cubin: its machine code.
        resources: registers of a thread, and bytes of shared memory of a block.
    """

    ptx: str
    cubin: bytes
    resources: dict[str, Any]

    @cached_property
    def loops(self) -> list[list[str]]:
        """Instructions of each loop, in the order of the code: what lies between a backward branch
        and its target."""
        labels: dict[str, int] = {}
        instructions: list[str] = []
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            code = nvidia_tool("nvdisasm", "-c", file.name)
        for line in code.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(instructions)
            elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                instructions.append(instruction[1])
        found = []
        for i, instruction in enumerate(instructions):
            branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
            # The last branch, to itself, only fills the code.
            if branch and labels.get(branch[1], i) < i:
                found.append(instructions[labels[branch[1]] : i + 1])
        return found


def compile_triton(
    kernel: Any,
    capability: int,
    constants: dict[str, object],
    type_of: Callable[[str], str],
    options: dict[str, int],
    aligned: Sequence[str] = (),
) -> TritonKernel:
    """One specialisation of a kernel, as a launch makes it, which must not spill.

    Args:
        constants: constexpr arguments, and runtime arguments that a launch specialises to them.
        type_of: Triton's type of a runtime argument, by its name.
        options: num_warps and others of a launch.
        aligned: integer arguments that are multiples of 16. Tensors from torch's allocators begin
            at multiples of 16 bytes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(constants) | set(aligned) <= set(names)
    signature = {name: "constexpr" if name in constants else type_of(name) for name in names}
    divisible = [
        i
        for i, name in enumerate(names)
        if name not in constants and (name.endswith("_ptr") or name in aligned)
    ]
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            {(names.index(name),): value for name, value in constants.items()},
            {(i,): [["tt.divisibility", 16]] for i in divisible},
        ),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    used = cubin_resources(compiled.asm["cubin"])
    assert used["STACK"] == 0 and used["LOCAL"] == 0, f"it spills: {used}"
    resources = {"registers": used["REG"], "shared": compiled.metadata.shared}
    return TritonKernel(compiled.asm["ptx"], compiled.asm["cubin"], resources)


def assert_recorded(table: str, key: str, got: dict[str, Any]) -> None:
    """What a Triton kernel takes is what the table has for this Triton, or is recorded."""
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    recorded = read_table(table)
    if RECORD:
        recorded.setdefault(version, {})[key] = got
        write_table(table, recorded)
    elif version in recorded:
        expected = recorded[version].get(key)
        assert got == expected, (
            f"{key} with Triton {version}: {got}, recorded {expected}. If that is meant, record it "
            "with DEEPLAB_FAST_RECORD_RESOURCES=1"
        )


def triton_kernels(*modules: ModuleType) -> dict[str, Any]:
    """The kernels of modules, by name."""
    return {
        name: kernel
        for module in modules
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }


class TritonTests:
    """Tests of kernels and their table, for each file that compiles some; it names them in a
    subclass.

    Attributes:
        table: its name.
        kernels: `triton_kernels` of the modules.
        compiled: names of the kernels that are compiled.
        keys: of the table's entries.
    """

    table: str
    kernels: dict[str, Any]
    compiled: tuple[str, ...]
    keys: tuple[str, ...]

    def test_the_table_holds_what_is_compiled(self) -> None:
        assert len(set(self.keys)) == len(self.keys)
        table = read_table(self.table)
        # The versions beside torch 2.11 and the one that the tests run with.
        assert {"3.6", "3.7"} <= set(table)
        for rows in table.values():
            assert set(rows) == set(self.keys)

    def test_every_kernel_is_compiled_here(self) -> None:
        assert set(self.kernels) == set(self.compiled)

    def test_arguments_that_are_not_specialised_exist(self) -> None:
        """A misspelt name would be specialised without a word."""
        for kernel in self.kernels.values():
            excluded = kernel.do_not_specialize
            assert excluded and set(excluded) <= set(kernel.arg_names)

    def test_no_removed_api(self) -> None:
        for kernel in self.kernels.values():
            source = inspect.getsource(inspect.getmodule(kernel.fn))
            # Spelt in parts: a pre-commit hook forbids the name itself.
            assert "make_" + "block_ptr" not in source
            assert "libdevice" not in source


# CUDA C++ by nvcc.


def toolkit() -> tuple[str, str]:
    """nvcc and its release; skips the test where there is none."""
    home = os.environ.get("CUDA_HOME")
    if home and Path(home, "bin", "nvcc").is_file():
        nvcc = str(Path(home, "bin", "nvcc"))
    else:
        nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: CUDA_HOME is not set and nvcc is not on PATH")
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    return nvcc, re.search(r"release (\d+\.\d+)", version.stdout).group(1)


def demangle(names: Sequence[str]) -> list[str]:
    """Kernels as they are called in the sources, with their template arguments."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    found = []
    for line in done.stdout.splitlines():
        name = line.replace("deeplab_fast::cuda::", "").removeprefix("void ")
        found.append(name.partition("(")[0])
    return found


class CudaKernels:
    """One run of nvcc over a file of csrc/cuda, without torch.

    Attributes:
        architecture: such as "sm_90a".
        release: of nvcc.
        said: what nvcc and ptxas printed.
        ptx: of all kernels.
        registers, spilled, static_shared: ptxas' report, by kernel.
    """

    def __init__(self, source: str, architecture: str, folder: Path, *flags: str) -> None:
        nvcc, self.release = toolkit()
        if architecture == "sm_100" and float(self.release) < 12.8:
            pytest.skip(f"nvcc {self.release} does not know sm_100")
        self.source, self.architecture = source, architecture
        self.cubin = folder / "kernels.cubin"
        target = f"arch=compute_{architecture.removeprefix('sm_')},code={architecture}"
        command = [
            nvcc, "-cubin", f"-gencode={target}", "-std=c++20", "-O3", "--expt-relaxed-constexpr",
            "-Xptxas", "-v", "--keep", "--keep-dir", str(folder), "-DDEEPLAB_FAST_WITHOUT_TORCH",
            INCLUDE, *flags, "-o", str(self.cubin), str(ROOT / "csrc" / "cuda" / f"{source}.cu"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.said = done.stderr
        self.ptx = "".join(path.read_text() for path in folder.glob("*.ptx"))
        entry = re.compile(
            r"Compiling entry function '(\w+)'.*?"
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
            r"Used (\d+) registers(?:.*?(\d+) bytes smem)?[^\n]*",
            re.DOTALL,
        )
        found = entry.findall(done.stderr)
        names = demangle([match[0] for match in found])
        self.registers = {n: int(m[4]) for n, m in zip(names, found, strict=True)}
        self.spilled = {n: m[1:4] for n, m in zip(names, found, strict=True)}
        self.static_shared = {n: int(m[5] or 0) for n, m in zip(names, found, strict=True)}

    def assert_nothing_spills(self) -> None:
        assert {n: s for n, s in self.spilled.items() if s != ("0", "0", "0")} == {}
        assert set(self.static_shared.values()) == {0}

    def assert_recorded(self, table: str, *keys: str) -> None:
        """Registers are those of the table's "kernels", where that is of this nvcc."""
        recorded = read_table(table)
        if RECORD:
            recorded["nvcc"] = self.release
            at = recorded.setdefault("kernels", {})
            for key in keys[:-1]:
                at = at.setdefault(key, {})
            at[keys[-1]] = self.registers
            write_table(table, recorded)
        if self.release != recorded["nvcc"]:
            pytest.skip(f"the table is of nvcc {recorded['nvcc']}, this is {self.release}")
        at = recorded["kernels"]
        for key in keys:
            at = at[key]
        assert self.registers == at

    def instructions(self) -> dict[str, Counter[str]]:
        """For each kernel how often each instruction occurs, modifiers included."""
        code = nvidia_tool("cuobjdump", "--dump-sass", str(self.cubin))
        parts = re.split(r"Function : (\w+)", code)[1:]
        line = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]+)")
        counts = [Counter(line.findall(code)) for code in parts[1::2]]
        return dict(zip(demangle(parts[::2]), counts, strict=True))


def registers_of_block(registers: int, threads: int) -> int:
    """What a block takes: registers are handed out to warps in units of 8 for each thread."""
    return -(-registers // 8) * 8 * threads


def assert_shared_recorded(table: str, found: dict[str, int]) -> None:
    """Bytes of shared memory are the table's "shared", which no compiler changes."""
    recorded = read_table(table)
    if RECORD:
        recorded["shared"] = found
        write_table(table, recorded)
    assert found == recorded["shared"]


# CUDA C++ on the host.


class OnHost:
    """Kernels, plans and launches of tests/aot/cuda_on_host, compiled by the C++ compiler: the
    threads of a block run as fibres."""

    def __init__(self, source: str, folder: Path, *flags: str) -> None:
        compiler = shutil.which("c++")
        if compiler is None:
            pytest.skip("no C++ compiler")
        path = folder / f"{source}.so"
        command = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
        command += [*flags, INCLUDE, str(AOT / "cuda_on_host" / f"{source}.cpp"), "-o", str(path)]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(path))
        self.library.last_error.restype = ctypes.c_char_p

    def run(self, name: str, *given: Tensor | float | None) -> int:
        """Tensors go as pointers, None as null."""
        return getattr(self.library, name)(*map(_argument, given))

    def call(self, name: str, *given: Tensor | float | None) -> None:
        """As `run`, of what returns whether it failed.

        Raises:
            RuntimeError: what the program said.
        """
        if self.run(name, *given):
            raise RuntimeError(self.library.last_error().decode())


def _argument(given: Tensor | float | None) -> Any:
    if isinstance(given, Tensor):
        return ctypes.c_void_p(given.data_ptr())
    if given is None:
        return ctypes.c_void_p()
    if isinstance(given, bool):
        return ctypes.c_bool(given)
    return ctypes.c_double(given) if isinstance(given, float) else ctypes.c_int64(given)
