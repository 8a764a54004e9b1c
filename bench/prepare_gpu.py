"""What a borrowed GPU machine needs and can be built without a GPU, as one folder.

    bench/prepare_gpu.sh                             makes .gpu/ here, of the steps below
    python -m bench.prepare_gpu unpack .gpu          there, in the root of the repository

    python -m bench.prepare_gpu fill CACHE           Triton's cache for sm_90
    python -m bench.prepare_gpu pack FOLDER CACHE    extensions of this checkout, and the cache
    python -m bench.prepare_gpu check                whether all extensions load

`unpack` puts the extensions into deeplab_fast/ and prints the folder for TRITON_CACHE_DIR, nothing
where the cache is of another Triton. Its exit status is 3 where the extensions are damaged, of
other sources, another Python or another PyTorch: build them instead. Reasons go to the standard
error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

from .files import ROOT, write_text

EXTENSIONS = ("_C", "_C_cuda", "_C_sm90", "_C_sm90_nofence", "_C_sm90_acquire_cluster")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# xz would halve it, and some Pythons are built without.
CACHE = "triton-cache.tar.gz"
MANIFEST = "manifest.json"
MIB = 2**20
LIMIT = 40 * MIB
# Exit statuses beside success and an error.
OTHER_EXTENSIONS = 3
# Of Triton's cache only these are read again.
KEPT = (".cubin", ".json", ".so")
GROUP = "__grp__"


class Unfit(Exception):
    """What was prepared does not belong to this machine or checkout."""


# What is prepared, in this environment and checkout.


def torch_version() -> str:
    """torch.__version__, without the seconds that an import takes."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return "none"
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))["__version__"]


def sources_hash() -> str:
    """Of everything that extensions are built from."""
    files = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*")]
    found = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        found.update(f"{path.relative_to(ROOT)}\0".encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def extension_facts() -> dict[str, str]:
    """What extensions depend on."""
    return {
        "python": sys.implementation.cache_tag,
        "torch": torch_version(),
        "sources": sources_hash(),
    }


def triton_facts() -> dict[str, str]:
    """What the keys of Triton's cache depend on beside the kernels: its files, and its ptxas."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key

    return {
        "triton": triton.__version__,
        "triton_key": hashlib.sha256(triton_key().encode()).hexdigest(),
        "ptxas": get_ptxas_version(90).splitlines()[-1],
    }


def differences(prepared: dict[str, Any], here: dict[str, str]) -> str:
    """What is not the same here, as text; empty where all is."""
    return ", ".join(
        f"{name} {prepared.get(name)} prepared and {value} here"
        for name, value in here.items()
        if prepared.get(name) != value
    )


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Triton's cache.


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """What the cache is filled with: calls of ops by name, for CPU or meta tensors.

    Those of the checks and times of bench.gpu, at sizes of every op and of the models, at more of a
    training step's, of the networks that are checked, and the ops of suite gpu.
    """
    from deeplab_fast.dispatch import declare
    from deeplab_fast.dispatch.examples import Shapes, Size
    from deeplab_fast.tuning import tune
    from deeplab_fast.tuning.workloads import Work

    from . import gpu_checks, gpu_loan
    from .everything import registry
    from .op_cases import OS8_RATES, OS16_RATES

    works = []
    for n, side, channels, rates in (
        (16, 33, 2048, OS16_RATES), (16, 65, 256, OS8_RATES), (2, 65, 256, OS8_RATES),
    ):  # fmt: skip
        shapes = Shapes(
            logits=Size(n, 21, side, side, 513, 513),
            norms=(Size(n, channels, side, side),),
            pointwise=(),
            aspp=Size(n, 2048, side, side, filters=256, rates=rates),
        )
        for op in declare.gpu_ops():
            if op.use == declare.TRAINING:
                works += [Work(op.name, *work) for work in op.examples.works(shapes)]
    plan = gpu_loan.plan(gpu_loan.nominal())
    more = replace(plan, works=tuple(works), dtypes=gpu_loan.DTYPES[:1])
    # Both make the calls of the checks.
    yield from (dict(tune.launches(plan)) | dict(tune.launches(more))).items()
    yield from gpu_checks.launches()
    suite = registry.SUITES["gpu"]
    for case in registry.cases():
        steps = case.steps(suite.dtype) if suite.name in case.suites else []
        for number, step in enumerate(steps):
            triton = declare.implementations(step.op).get("triton")
            if triton and not triton.not_supported_reasons(step.on((9, 0))):
                yield f"{case.id} call {number}", partial(step.launch, triton.run)


def fill(cache: Path) -> int:
    """Make every launch of `calls` find its kernel in the cache; returns how many did not."""
    # Triton reads it when it compiles.
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    from triton import knobs

    from .launch_stub import GPUS, pretend

    found: dict[str, tuple[object, dict[str, Any]]] = {}
    compiled = 0

    def listen(*, src: object, metadata: dict[str, Any], cache_hit: bool, **_: object) -> None:
        nonlocal compiled
        compiled += not cache_hit
        found[metadata["hash"]] = src, metadata

    made = 0
    with patch.object(knobs.compilation, "listener", listen), pretend(GPUS["H100"]) as launches:
        for name, call in calls():
            if not launches.of(name, call):
                print(f"prepare_gpu: {name} launches no kernel", file=sys.stderr)
            made += 1
    launchers = fill_launchers(list(found.values()))
    print(
        f"{made} calls, {len(launches.made)} launches of {len(found)} kernels: compiled {compiled} "
        f"of them and {launchers} C launchers, found the others in {cache}"
    )
    return compiled + launchers


def fill_launchers(kernels: Sequence[tuple[object, dict[str, Any]]]) -> int:
    """Compile what Triton compiles by a C compiler for kernels; returns how many were new.

    They need libcuda, which here is there in name only, so that they are not loaded.
    """
    from triton import knobs
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
    from triton.runtime import build, driver

    made = 0
    with tempfile.TemporaryDirectory() as folder:
        compiler = shlex.split(os.environ.get("CC", "cc"))
        stub = Path(folder, "libcuda.so.1")
        named = ["-shared", f"-Wl,-soname,{stub.name}", "-x", "c", os.devnull, "-o", str(stub)]
        subprocess.run([*compiler, *named], check=True)

        def compile_module(
            name: str, src: str, srcdir: str, library_dirs: list[str], include_dirs: list[str],
            libraries: list[str], *_: object,
        ) -> str:  # fmt: skip
            nonlocal made
            made += 1
            to = str(Path(srcdir, f"{name}{SUFFIX}"))
            paths = [*include_dirs, sysconfig.get_paths()["include"]]
            # Otherwise some compilers leave out a library that defines nothing.
            flags = ["-O3", "-shared", "-fPIC", "-Wno-psabi", "-Wl,--no-as-needed"]
            flags += [f"-L{path}" for path in library_dirs] + [f"-I{path}" for path in paths]
            command = [*compiler, src, *flags, *(f"-l:{name}" for name in libraries), "-o", to]
            subprocess.run(command, check=True)
            return to

        with (
            patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder),
            patch.object(knobs.build, "impl", compile_module),
            patch.object(build, "_load_module_from_path", lambda name, path: MagicMock()),
            # Triton 3.7 has one launcher for all kernels, of the driver.
            patch.object(driver, "_active", MagicMock()),
        ):
            CudaUtils()
            for src, metadata in kernels:
                CudaLauncher(src, SimpleNamespace(**metadata))
    return made


def pack_cache(cache: Path, to: Path) -> None:
    """What runs of a cache, as an archive."""
    with tarfile.open(to, "w:gz") as archive:
        for path in sorted(cache.glob("*/*")):
            if path.suffix in KEPT and not path.name.startswith(GROUP):
                archive.add(path, str(path.relative_to(cache)))


def unpack_cache(archive: Path, cache: Path) -> None:
    """Unpack an archive of pack_cache, with the lists of files that Triton finds kernels by.

    These hold absolute paths, and are therefore made here.
    """
    with tarfile.open(archive) as files:
        files.extractall(cache, filter="data")
    for folder in cache.iterdir():
        paths = {path.name: str(path.absolute()) for path in folder.iterdir()}
        for name in [name for name in paths if name.endswith(".json")]:
            (folder / f"{GROUP}{name}").write_text(json.dumps({"child_paths": paths}), "utf-8")


# The folder.


def pack(folder: Path, cache: Path) -> None:
    """Fill a folder from the extensions of this checkout and a cache.

    Raises:
        Unfit: an extension is missing, or the folder is too large.
    """
    package = ROOT / "deeplab_fast"
    folder.mkdir(parents=True, exist_ok=True)
    for name in EXTENSIONS:
        path = package / f"{name}{SUFFIX}"
        if not path.is_file():
            raise Unfit(f"{path.name} was not built")
        shutil.copy2(path, folder)
    shutil.copy2(package / "build.json", folder)
    pack_cache(cache, folder / CACHE)
    build = json.loads((folder / "build.json").read_text("utf-8"))[sys.implementation.cache_tag]
    manifest = {
        **extension_facts(),
        **triton_facts(),
        "nvcc": build["cuda"],
        "archs": build["archs"],
        "commit": os.environ.get("DEEPLAB_FAST_BENCH_COMMIT", ""),
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": digest(path)}
            for path in sorted(folder.iterdir())
            if path.name != MANIFEST
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    sizes["total"] = sum(sizes.values())
    for name, size in sizes.items():
        print(f"{size / MIB:8.2f} MiB  {name}")
    if sizes["total"] > LIMIT:
        raise Unfit(f"more than {LIMIT // MIB} MiB")


def keep_facts(new: Path, to: Path) -> None:
    """Put the facts of a build beside those of other Pythons that built in the same checkout."""
    try:
        facts = json.loads(to.read_text("utf-8"))
    except (OSError, ValueError):
        facts = {}
    write_text(to, json.dumps(facts | json.loads(new.read_text("utf-8")), indent=2) + "\n")


def unpack(folder: Path, package: Path, cache: Path) -> tuple[str, str]:
    """Put what was prepared into a package and a new cache, as far as it fits.

    Returns:
        (why the extensions were left, why the cache was): each empty where it is in place.

    Raises:
        Unfit: a file is not the one that was packed.
    """
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file() or digest(path) != facts["sha256"]:
            raise Unfit(f"{path} is not what {MANIFEST} names")
    other_extensions = differences(manifest, extension_facts())
    if not other_extensions:
        for name in EXTENSIONS:
            to = package / f"{name}{SUFFIX}"
            # Not over a file that a process may have loaded.
            shutil.copy2(folder / to.name, to.with_suffix(".tmp"))
            os.replace(to.with_suffix(".tmp"), to)
        # Last: it says that the extensions are there.
        keep_facts(folder / "build.json", package / "build.json")
    try:
        other_cache = differences(manifest, triton_facts())
        if not other_cache:
            unpack_cache(folder / CACHE, cache)
    except Exception as error:
        other_cache = f"{type(error).__name__}: {error}"
    return other_extensions, other_cache


# Whether extensions load.

CHECK = """
import pathlib, sys
import torch
import deeplab_fast
from deeplab_fast import _ext
assert pathlib.Path(deeplab_fast.__file__).parent == pathlib.Path(sys.argv[1]), deeplab_fast
for extension, ops in ((_ext.CPU, ["_cpu_instruction_set"]), (_ext.CUDA, ["_aspp_cuda"]),
                       (_ext.SM90, ["_aspp_sm90", "_aspp_sm90_residency"])):
    assert extension.loaded, extension.name + ": " + extension.reason
    for op in ops:
        assert hasattr(torch.ops.deeplab_fast, op), (extension.name, op)
print("loaded:", _ext.CPU.name, _ext.CUDA.name, _ext.SM90.name)
"""


def check() -> int:
    """Load the extensions, each variant in a process of its own; how many processes failed."""
    failed = 0
    for variant in ("", "nofence", "acquire_cluster"):
        env = {**os.environ, "DEEPLAB_FAST_SM90_VARIANT": variant, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", CHECK, str(ROOT / "deeplab_fast")]
        failed += subprocess.run(command, env=env, cwd=ROOT).returncode != 0
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run a step; 0, 1 where it failed, 3 where extensions have to be built."""
    parser = argparse.ArgumentParser(prog="python -m bench.prepare_gpu", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("fill", help="fill Triton's cache for sm_90")
    step.add_argument("cache", type=Path)
    step.add_argument("--full", action="store_true", help="fail where something is not there yet")
    step = steps.add_parser("pack", help="put extensions and cache into a folder")
    step.add_argument("folder", type=Path)
    step.add_argument("cache", type=Path)
    step = steps.add_parser("unpack", help="install a folder into this checkout")
    step.add_argument("folder", type=Path)
    step.add_argument("--cache", type=Path, help="a new folder; default: build/triton-cache")
    steps.add_parser("check", help="load the extensions")
    options = parser.parse_args(argv)
    try:
        if options.step == "fill":
            return int(bool(fill(options.cache) and options.full))
        if options.step == "pack":
            pack(options.folder, options.cache)
            return 0
        if options.step == "check":
            return int(check() > 0)
        cache = options.cache or ROOT / "build" / "triton-cache"
        extensions, other = unpack(options.folder, ROOT / "deeplab_fast", cache)
    except (Unfit, OSError, ValueError, KeyError) as error:
        print(f"prepare_gpu: {type(error).__name__}: {error}", file=sys.stderr)
        # What is damaged has to be built.
        return OTHER_EXTENSIONS if options.step == "unpack" else 1
    if extensions:
        print(f"prepare_gpu: build the extensions: {extensions}", file=sys.stderr)
    if other:
        print(f"prepare_gpu: no Triton cache: {other}", file=sys.stderr)
    else:
        print(cache.absolute())
    return OTHER_EXTENSIONS if extensions else 0


if __name__ == "__main__":
    sys.exit(main())
