"""Builds the compiled parts of deeplab_fast; pyproject.toml has everything else.

    deeplab_fast._C        csrc/*.cpp, csrc/cpu/*.cpp       pybind11 and torch's C++ interface
    deeplab_fast._C_cuda   csrc/cuda/*.cu except *_sm90.cu  libtorch's stable ABI
    deeplab_fast._C_sm90   csrc/cuda/*_sm90.cu              libtorch's stable ABI, sm_90a code only

An extension without source files is left out. CUDA is compiled when torch has CUDA and nvcc is
found; no GPU needs to be visible. build.json, written into the package, records for each
interpreter (its cache_tag) what was built, with which flags, and why the rest was not;
deeplab_fast/_ext.py reads it.

Environment variables:

    DEEPLAB_FAST_BUILD_EXT   auto (default): an extension that fails to compile is left out, and
                             the build ends with its first error; 0: pure Python; 1: whatever
                             prevents the C++ extension, or fails to compile, is an error
    FORCE_CUDA               1: compile the CUDA extensions also for a torch without CUDA; a
                             missing toolkit, or one that fails, is an error
    TORCH_CUDA_ARCH_LIST     compute capabilities from 8.0 up (default "8.0;9.0+PTX")
    MAX_JOBS                 compiler processes at a time
    NVCC_THREADS             threads in each nvcc
    DEEPLAB_FAST_SM90_VARIANTS
                             for tests on a GPU: of nofence and acquire_cluster (aspp_sm90.cuh says
                             what they are) which to compile as well, as deeplab_fast._C_sm90_NAME,
                             which loads where DEEPLAB_FAST_SM90_VARIANT=NAME
    DEBUG                    1: no optimisation, debug information
    SANITIZE                 1: the C++ extension under AddressSanitizer and
                             UndefinedBehaviorSanitizer, whose first error ends the process. It
                             loads where LD_PRELOAD names the compiler's libasan.so
"""

import importlib.util
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "deeplab_fast"
EXTENSIONS = ("_C", "_C_cuda", "_C_sm90")
SM90_VARIANTS = ("nofence", "acquire_cluster")
KINDS = {"_C": "C++", "_C_cuda": "CUDA", "_C_sm90": "sm_90a CUDA"}
KINDS |= {f"_C_sm90_{name}": f"sm_90a CUDA ({name})" for name in SM90_VARIANTS}
# The oldest torch whose stable ABI the CUDA extensions use: 2.11.
TORCH_TARGET_VERSION = "0x020b000000000000"
DEFAULT_ARCHS = "8.0;9.0+PTX"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# csrc needs it, and without one torch passes its own standard: C++17 up to torch 2.11.
CXX_STANDARD = "-std=c++20"
HOW_TO_BUILD = "pip install --no-build-isolation --no-deps ."


def say(text: str) -> None:
    print(f"deeplab_fast: {text}", flush=True)


def fail(text: str) -> None:
    raise SystemExit(f"deeplab_fast: error: {text}")


@dataclass(frozen=True)
class Settings:
    """The environment variables, checked."""

    build_ext: str
    force_cuda: bool
    archs: str
    max_jobs: int | None
    nvcc_threads: int | None
    debug: bool
    sanitize: bool = False
    sm90_variants: tuple[str, ...] = ()

    @classmethod
    def from_environment(cls) -> "Settings":
        def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
            value = os.environ.get(name) or default
            if value not in allowed:
                fail(f"{name}={value} is not allowed: use {' or '.join(allowed)}")
            return value

        def count(name: str) -> int | None:
            value = os.environ.get(name)
            if value and not (value.isdecimal() and int(value) > 0):
                fail(f"{name}={value} is not allowed: use a positive number")
            return int(value) if value else None

        settings = cls(
            build_ext=choice("DEEPLAB_FAST_BUILD_EXT", "auto", ("auto", "0", "1")),
            force_cuda=choice("FORCE_CUDA", "0", ("0", "1")) == "1",
            archs=os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS,
            max_jobs=count("MAX_JOBS"),
            nvcc_threads=count("NVCC_THREADS"),
            debug=choice("DEBUG", "0", ("0", "1")) == "1",
            sanitize=choice("SANITIZE", "0", ("0", "1")) == "1",
            sm90_variants=tuple(
                dict.fromkeys(
                    re.findall(r"[^,;\s]+", os.environ.get("DEEPLAB_FAST_SM90_VARIANTS", ""))
                )
            ),
        )
        for name in settings.sm90_variants:
            if name not in SM90_VARIANTS:
                fail(f"DEEPLAB_FAST_SM90_VARIANTS names {name}: use {' or '.join(SM90_VARIANTS)}")
        if settings.force_cuda and settings.build_ext == "0":
            fail("FORCE_CUDA=1 and DEEPLAB_FAST_BUILD_EXT=0 contradict each other: unset one")
        return settings

    def __str__(self) -> str:
        return (
            f"DEEPLAB_FAST_BUILD_EXT={self.build_ext} FORCE_CUDA={self.force_cuda:d} "
            f"TORCH_CUDA_ARCH_LIST={self.archs} MAX_JOBS={self.max_jobs or 'unset'} "
            f"NVCC_THREADS={self.nvcc_threads or 'unset'} DEBUG={self.debug:d} "
            f"SANITIZE={self.sanitize:d}"
        )


@dataclass
class Plan:
    """What will be built, what will not and why, and the facts for build.json."""

    settings: Settings
    extensions: list[Extension] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    nvcc: str | None = None
    announced: bool = False

    def skip_all(self, reason: str) -> "Plan":
        self.skipped = dict.fromkeys(self.names, reason)
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The extensions that this build decides about."""
        return (*EXTENSIONS, *(f"_C_sm90_{name}" for name in self.settings.sm90_variants))

    def announce(self) -> None:
        if self.announced:
            return
        self.announced = True
        say(str(self.settings))
        reasons = set(self.skipped.values())
        if not self.extensions and len(reasons) == 1:
            say(f"pure Python install: {reasons.pop()}")
            return
        for name in self.names:
            reason = self.skipped.get(name)
            say(f"{PACKAGE}.{name}: " + (f"not built: {reason}" if reason else "building"))

    def failures(self, required: str = "") -> str:
        """What failed to compile, the first errors, and the tools; `required` made it fatal."""
        names = list(self.errors)
        several = len(names) > 1
        what = " and ".join(f"the {KINDS[name]} extension {PACKAGE}.{name}" for name in names)
        if required:
            lines = [f"error: {what} failed to compile"]
            advice = (
                f"{required} makes this an error; without it what fails is left out, and "
                "DEEPLAB_FAST_BUILD_EXT=0 asks for pure Python"
            )
        else:
            left_out = "are left out; everything they" if several else "is left out; everything it"
            lines = [f"WARNING: {what} failed to compile and {left_out} would run is slower"]
            advice = (
                "DEEPLAB_FAST_BUILD_EXT=1 makes this an error, =0 asks for pure Python; "
                f"`python -m {PACKAGE}.info` shows this again"
            )
        for error in dict.fromkeys(self.errors.values()):
            of = " and ".join(name for name in names if self.errors[name] == error)
            lines.append(f"first error{f' of {of}' * several}: {error}")
        tools = [str(self.facts["compiler"])] * ("_C" in names)
        tools += [f"nvcc {self.facts['cuda']}"] * (names != ["_C"])
        lines.append(f"{', '.join(tools)}, torch {self.facts['torch']}: {advice}")
        return "\n".join(f"{PACKAGE}: {line}" for line in lines)


class CudaExtension(Extension):
    """A shared object made from .cu files by nvcc alone, for libtorch's stable ABI.

    torch's CUDAExtension refuses to work with a torch without CUDA; the stable ABI needs nothing
    of it. The files are kept apart from `sources`, which torch's BuildExtension looks through.
    """

    def __init__(
        self, name: str, cuda_sources: list[str], flags: list[str], optional: bool
    ) -> None:
        super().__init__(name, sources=[], depends=cuda_sources, optional=optional)
        self.cuda_sources = cuda_sources
        self.flags = flags


def first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def find_nvcc() -> tuple[str | None, str]:
    """(path, "") or (None, why): CUDA_HOME or CUDA_PATH decide where they are set."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            nvcc = Path(home, "bin", "nvcc")
            if nvcc.is_file():
                return str(nvcc), ""
            return None, f"{variable}={home} has no bin/nvcc"
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    return nvcc, "" if nvcc else "no CUDA toolkit: nvcc is not on PATH and CUDA_HOME is not set"


def nvcc_release(nvcc: str) -> str:
    """Such as "13.0"; empty where nvcc does not tell: compiling then shows what is wrong."""
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    except OSError:
        return ""
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found.group(1) if found else ""


def parse_archs(text: str) -> list[str]:
    """Compute capabilities of TORCH_CUDA_ARCH_LIST from 8.0 up: "7.5;9.0+PTX" -> ["9.0+PTX"]."""
    archs = [arch for arch in re.split(r"[;,\s]+", text) if arch]
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            fail(
                f"TORCH_CUDA_ARCH_LIST={text}: {arch} is not a compute capability such as 8.0, "
                "9.0a or 9.0+PTX"
            )
    return [arch for arch in archs if float(arch.split("+")[0].rstrip("af")) >= 8.0]


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cxx_flags(settings: Settings, compiler: str) -> list[str]:
    flags = [CXX_STANDARD, *(["-O0", "-g"] if settings.debug else ["-O3", "-g0"])]
    if settings.sanitize:
        # Optimised, it takes twice as long to compile.
        flags = [CXX_STANDARD, "-O0", "-g1", "-DDEEPLAB_FAST_SANITIZE", "-Wno-psabi", *SANITIZERS]
    # torch is compiled with the last two as well. No -march: the kernels choose at run time.
    flags += ["-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    # For compiling only. The GOMP_* symbols stay undefined and bind to the libgomp that libtorch
    # brings: linking another one would put two thread pools into the process. clang's OpenMP
    # needs a runtime that libtorch does not bring.
    if sys.platform == "linux" and "clang" not in compiler:
        flags.append("-fopenmp")
    return flags


def link_flags(settings: Settings) -> list[str]:
    # Some linkers drop a library that no symbol is taken from directly; libtorch_cpu must stay,
    # because it is what leads to libgomp.
    flags = ["-Wl,--no-as-needed", "-ltorch_cpu"] if sys.platform == "linux" else []
    return flags + SANITIZERS * settings.sanitize


def nvcc_flags(settings: Settings) -> list[str]:
    flags = ["-O0", "-g"] if settings.debug else ["-O3", "-lineinfo"]
    flags += [CXX_STANDARD, "--expt-relaxed-constexpr", "-DUSE_CUDA"]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
    if settings.nvcc_threads:
        flags.append(f"--threads={settings.nvcc_threads}")
    return flags


def plan_cuda(plan: Plan, torch) -> None:
    """Adds the CUDA extensions, or the reasons against them."""
    settings, names = plan.settings, plan.names[1:]

    def skip(reason: str) -> None:
        plan.skipped |= dict.fromkeys(names, reason)

    if not (torch.version.cuda or settings.force_cuda):
        skip(f"torch {torch.__version__} has no CUDA (FORCE_CUDA=1 compiles it all the same)")
        return
    nvcc, reason = find_nvcc()
    release = nvcc_release(nvcc) if nvcc else ""
    if release and int(release.partition(".")[0]) < 12:
        nvcc, reason = None, f"{nvcc} is of CUDA {release}; 12.0 or newer is needed"
    if nvcc is None:
        if settings.force_cuda:
            fail(f"FORCE_CUDA=1, but {reason}. Install a CUDA toolkit, or unset FORCE_CUDA")
        skip(reason)
        return

    archs = parse_archs(settings.archs)
    sm90_archs = ["9.0a"] if any(arch.startswith("9.0") for arch in archs) else []
    files = sorted(glob("csrc/cuda/*.cu"))
    sm90_files = [file for file in files if file.endswith("_sm90.cu")]
    for name, sources, targets, defined in (
        ("_C_cuda", [file for file in files if file not in sm90_files], archs, []),
        ("_C_sm90", sm90_files, sm90_archs, []),
        *(
            (
                f"_C_sm90_{variant}",
                sm90_files,
                sm90_archs,
                [f"-DDEEPLAB_FAST_SM90_{variant.upper()}"],
            )
            for variant in settings.sm90_variants
        ),
    ):
        if not sources:
            plan.skipped[name] = "it has no source files"
        elif not targets:
            plan.skipped[name] = f"TORCH_CUDA_ARCH_LIST={settings.archs} names no target of it"
        else:
            flags = [*gencode(targets), *nvcc_flags(settings), *defined]
            optional = settings.build_ext != "1" and not settings.force_cuda
            plan.extensions.append(CudaExtension(f"{PACKAGE}.{name}", sources, flags, optional))
            plan.nvcc = nvcc
            plan.facts["cuda"] = release or "of an unknown release"
            plan.facts["archs"] += [arch for arch in targets if arch not in plan.facts["archs"]]
            plan.facts["flags"][name] = flags


def make_plan() -> Plan:
    settings = Settings.from_environment()
    plan = Plan(settings)
    plan.facts = {"torch": None, "cuda": None, "archs": [], "compiler": None, "flags": {}}
    plan.facts |= {"debug": settings.debug}

    def cannot(reason: str) -> Plan:
        if settings.build_ext == "1" or settings.force_cuda:
            fail(f"the extensions were asked for, but {reason}")
        return plan.skip_all(reason)

    if settings.build_ext == "0":
        return plan.skip_all("DEEPLAB_FAST_BUILD_EXT=0")
    try:
        import torch
        from torch.utils.cpp_extension import CppExtension
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        state = "is not in the build environment" if missing else f"cannot be imported ({error})"
        return cannot(f"torch {state}; to get the extension, install torch and run {HOW_TO_BUILD}")
    plan.facts["torch"] = torch.__version__
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if sys.platform == "win32":
        return cannot("the build knows gcc and clang only")
    if shutil.which(compiler[0]) is None:
        return cannot(f"there is no C++ compiler ({compiler[0]} is not on PATH; CXX names another)")

    sources = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
    version = first_line([*compiler, "--version"]) or compiler[0]
    flags = cxx_flags(settings, version)
    plan.facts |= {"compiler": version, "flags": {"_C": flags}}
    if sources:
        plan.extensions.append(
            CppExtension(
                f"{PACKAGE}._C",
                sources,
                include_dirs=[str(ROOT / "csrc" / "include")],
                extra_compile_args={"cxx": list(flags)},
                extra_link_args=link_flags(settings),
                depends=sorted(glob("csrc/**/*.h*", recursive=True)),
                optional=settings.build_ext != "1",
            )
        )
    else:
        plan.skipped["_C"] = "it has no source files"
    plan_cuda(plan, torch)
    return plan


os.chdir(ROOT)
# Commands that only ask for metadata or make an sdist decide nothing and need no torch.
BUILDING = any(re.match(r"(build|install|develop|bdist|editable)", arg) for arg in sys.argv[1:])
PLAN = make_plan() if BUILDING else Plan(Settings.from_environment())
if shutil.which("ninja") is None:
    # In a virtual environment that is not activated ninja is installed but not on PATH.
    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")

if PLAN.extensions:
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
else:
    BuildExtension = build_ext


@contextmanager
def copied_output() -> Iterator[list[bytearray]]:
    """Gives what is written to file descriptors 1 and 2, which also goes where it went before.

    A replaced sys.stdout would not see the compilers: they are processes of their own.
    """

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):
                stream.flush()

    def copy() -> None:
        # `stop` ends this, not the end of the pipes: a compiler's server may keep them open.
        while ready := [fd for fd in select.select([*routes, stop], [], [])[0] if fd != stop]:
            for fd in ready:
                data = os.read(fd, 1 << 16)
                target, copied = routes[fd] if data else routes.pop(fd)
                copied += data
                # A reader that went away must not leave the compilers with a full pipe.
                with suppress(OSError):
                    while data:
                        data = data[os.write(target, data) :]

    flush()
    copies = [bytearray(), bytearray()]
    originals = [os.dup(1), os.dup(2)]
    pipes = [os.pipe(), os.pipe()]
    stop, stopper = os.pipe()
    reads = [read for read, _ in pipes]
    routes = dict(zip(reads, zip(originals, copies, strict=True), strict=True))
    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        for number, (_, write) in enumerate(pipes, 1):
            os.dup2(write, number)
            os.close(write)
        yield copies
    finally:
        flush()
        for number, original in enumerate(originals, 1):
            os.dup2(original, number)
        os.close(stopper)
        thread.join()
        for fd in (*originals, *reads, stop):
            os.close(fd)


SEVERITY = re.compile(r"\b(error|fatal|warning|note|remark)\s*(#\S+)?\s*:", re.IGNORECASE)
# What linkers and shells say without naming a severity.
UNNAMED_ERROR = re.compile(
    r"undefined reference to |multiple definition of |^Killed\b|^Segmentation fault\b"
    r"|^\S*\b(ld(\.\w+)?|sh):(?!.*: in function |.* skipping incompatible )"
)


def is_error(line: str) -> bool:
    if line[:1].isspace():  # compilers indent the lines of the source that they show
        return False
    severity = SEVERITY.search(line)
    if severity:
        return severity[1].lower() in ("error", "fatal")
    return UNNAMED_ERROR.search(line) is not None


def first_error(output: str) -> str:
    """The first line of a failed build that is an error, of whichever tool; "" if none is known."""
    lines = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", output).splitlines()
    error = next((line for line in lines if is_error(line)), "")
    failed = next((n for n, line in enumerate(lines) if line.startswith("FAILED: ")), None)
    if not error and failed is not None:
        # ninja goes on with the command, and with what that printed in whatever form.
        error = "".join(lines[failed + 2 : failed + 3])
        if not error or re.match(r"ninja: |\[\d+/\d+\] ", error):
            error = f"{lines[failed].strip()} (its command printed nothing)"
    error = error.strip().replace(f"{ROOT}{os.sep}", "")
    return error if len(error) <= 300 else f"{error[:297]}..."


class BuildExt(BuildExtension):
    """Builds each extension by itself, so that one that fails can be left out."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # One folder that outlives the build: ninja then compiles only what changed, in editable
        # installs as well, whose own folder is temporary.
        kind = f"{sys.implementation.cache_tag}-torch{PLAN.facts.get('torch')}"
        kind += "-debug" * PLAN.settings.debug + "-sanitize" * PLAN.settings.sanitize
        self.build_temp = str(ROOT / "build" / f"ext-{kind}")
        # One extension at a time, so that an error in the output is known to be its; ninja
        # compiles files in parallel.
        self.parallel = None

    def run(self) -> None:
        PLAN.announce()
        inplace = self.inplace
        try:
            super().run()
        except Exception as error:
            # torch's check of the compiler, before the first extension.
            for ext in self.extensions:
                self.leave_out(ext, "", error)
            self.extensions = []
        if inplace and not self.editable_mode:
            write_facts(ROOT / PACKAGE)

    def build_extensions(self) -> None:
        super().build_extensions()
        self.extensions = [ext for ext in self.extensions if name_of(ext) not in PLAN.skipped]

    def build_extension(self, ext: Extension) -> None:
        output: list[bytearray] = []
        try:
            with copied_output() as output:
                if isinstance(ext, CudaExtension):
                    self.build_cuda(ext)
                else:
                    super().build_extension(ext)
        except Exception as error:
            self.leave_out(ext, b"\n".join(output).decode("utf-8", "replace"), error)

    def leave_out(self, ext: Extension, output: str, exception: Exception) -> None:
        error = first_error(output) or str(exception).partition("\n")[0]
        PLAN.errors[name_of(ext)] = error or type(exception).__name__
        PLAN.skipped[name_of(ext)] = f"failed to compile: {PLAN.errors[name_of(ext)]}"
        if not ext.optional:
            demanded = PLAN.settings.build_ext == "1"
            sys.stdout.flush()
            raise SystemExit(
                PLAN.failures("DEEPLAB_FAST_BUILD_EXT=1" if demanded else "FORCE_CUDA=1")
            )

    def build_cuda(self, ext: CudaExtension) -> None:
        """Compiles and links through ninja, as torch does for C++."""
        folder = Path(self.build_temp, name_of(ext))
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{ROOT / 'csrc' / 'include'}"]
        includes += [f"-isystem={path}" for path in include_paths()]
        libraries = library_paths()[0]
        # libtorch_cuda has the stream functions; without it (FORCE_CUDA) they stay undefined.
        names = ["c10", "torch", "torch_cpu"]
        names += ["torch_cuda"] * Path(libraries, "libtorch_cuda.so").is_file()
        link = [f"-L{libraries}", "-Xlinker=--no-as-needed", *(f"-l{name}" for name in names)]

        def escape(arguments: list[str]) -> str:
            return shlex.join(arguments).replace("$", "$$")

        objects = {f"{Path(source).stem}.o": ROOT / source for source in ext.cuda_sources}
        lines = [
            "rule compile",
            f"  command = {escape([PLAN.nvcc])} -MD -MF $out.d -c $in -o $out "
            + escape([*ext.flags, *includes]),
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {escape([PLAN.nvcc])} -shared -o $out $in {escape(link)}",
            *(f"build {obj}: compile {escape_path(src)}" for obj, src in objects.items()),
            f"build {escape_path(target)}: link {' '.join(objects)}",
            "",
        ]
        (folder / "build.ninja").write_text("\n".join(lines), "utf-8")
        jobs = PLAN.settings.max_jobs or os.cpu_count() or 1
        if subprocess.run(["ninja", "-C", str(folder), f"-j{jobs}"]).returncode:
            raise RuntimeError("nvcc failed")


def name_of(ext: Extension) -> str:
    return ext.name.rpartition(".")[2]


def escape_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def write_facts(folder: Path) -> None:
    """Writes build.json into `folder` and removes extensions of earlier builds beside it.

    In the checkout, where several interpreters build, the facts of the others are kept.
    """
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name in KINDS:
        if name not in PLAN.names or name in PLAN.skipped:
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
    tag = sys.implementation.cache_tag
    facts = read_facts(folder) if folder == ROOT / PACKAGE else {}
    facts[tag] = PLAN.facts | {
        "extensions": {
            name: {
                "built": name not in PLAN.skipped,
                "reason": PLAN.skipped.get(name, ""),
                "error": PLAN.errors.get(name, ""),
            }
            for name in PLAN.names
        },
        "sources": source_fingerprints(),
    }
    temporary = folder / f"build.json.{tag}.tmp"
    temporary.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    os.replace(temporary, folder / "build.json")


def source_fingerprints() -> dict[str, str]:
    """Fingerprints of the CUDA sources, by which records of their kernels are found."""
    path = ROOT / PACKAGE / "dispatch" / "sources.py"
    if not path.is_file():
        return {}
    spec = importlib.util.spec_from_file_location("sources", path)
    sources = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sources)
    return sources.compiled(ROOT)


def read_facts(folder: Path) -> dict[str, object]:
    """build.json by interpreter; without what an older setup.py wrote, which had one for all."""
    try:
        facts = json.loads((folder / "build.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    entries = facts.items() if isinstance(facts, dict) else ()
    return {tag: own for tag, own in entries if isinstance(own, dict) and "extensions" in own}


class BuildFacts(Command):
    """The step of `build` after build_ext: announces the decisions and writes build.json."""

    description = "write build.json"
    user_options = []  # noqa: RUF012

    def initialize_options(self) -> None:
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        PLAN.announce()
        folder = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib, PACKAGE)
        folder.mkdir(parents=True, exist_ok=True)
        write_facts(folder)

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, PACKAGE, "build.json"))]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.editable_mode:
            return {}
        return {self.get_outputs()[0]: str(Path(PACKAGE, "build.json"))}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_facts", None)]  # noqa: RUF012


def warn(text: str) -> None:
    """Prints text, also on the terminal: pip hides what a build prints that succeeds."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)
    if sys.stdout.isatty():
        return
    # In the background of a terminal that stops its writers, a blocked SIGTTOU lets them write.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    with suppress(OSError):
        terminal = os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
        with suppress(OSError):
            # pip's line about its progress is open.
            os.write(terminal, f"\n{text}\n".encode())
        os.close(terminal)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


setup(
    ext_modules=PLAN.extensions,
    cmdclass={"build": Build, "build_ext": BuildExt, "build_facts": BuildFacts},
)
if PLAN.errors:
    warn(PLAN.failures())
