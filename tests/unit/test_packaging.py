"""The package in every way of installing and running it, and the decisions of setup.py.

Everything is built from a copy of the checkout, so that nothing here touches the checkout or the
environment that runs the tests. Installs go into throwaway environments that see the packages of
this one through a .pth file; .pth files inside those are not run, so an editable install of this
checkout cannot stand in for the one under test.
"""

import contextlib
import fcntl
import importlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import termios
import tomllib
import warnings
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
THIS = sys.implementation.cache_tag
MINOR = int(torch.__version__.split(".")[1])
SHIPPED = ("deeplab_fast", "kernels", "csrc", "tests", "bench", "requirements")
RECORDS = "deeplab_fast/dispatch/shipped.json"
GENERATED = ("*.so", "build.json", "__pycache__", "*.egg-info", ".benchmarks", ".hypothesis")

# Imports torch once, then the package in a fork for each case: argv[1] is a list of {cwd, triton}.
PROBE = """
import json, os, sys
import torch

def broken(name, path=None, target=None):
    if name.split(".")[0] == "triton":
        raise RuntimeError("a broken triton")

for case in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.chdir(case["cwd"])
        if case.get("triton") in ("absent", "broken"):
            assert "triton" not in sys.modules
            if case["triton"] == "absent":
                sys.modules["triton"] = None
            else:
                sys.meta_path.insert(0, type("Broken", (), {"find_spec": staticmethod(broken)}))
        import deeplab_fast, deeplab_fast.kernels
        from deeplab_fast import _ext
        print(json.dumps({
            "package": deeplab_fast.__file__,
            "kernels": deeplab_fast.kernels.__file__,
            "version": deeplab_fast.__version__,
            "doubled": "kernels" in sys.modules,
            "loaded": _ext.CPU.loaded,
            "reason": _ext.CPU.reason,
            "cuda": torch.cuda.is_initialized(),
        }))
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, case
"""


def version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def environment(**changes: object) -> dict[str, str]:
    """This environment without the variables that steer the build, the imports or pip."""
    steering = (
        "CUDA_HOME", "CUDA_PATH", "CXX", "DEBUG", "FORCE_CUDA", "MAX_JOBS", "NVCC_THREADS",
        "SANITIZE",
    )  # fmt: skip
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in (*steering, "TORCH_CUDA_ARCH_LIST", "TRITON_INTERPRET")
        and not name.startswith(("DEEPLAB_FAST_", "PYTHON"))
    }
    return kept | {name: str(value) for name, value in changes.items()}


def run(*command: object, check: bool = True, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        # Without a terminal, to which a build writes what failed.
        start_new_session=True,
        **options,
    )
    if check:
        assert done.returncode == 0, done.stdout
    return done


def copy_checkout(target: Path) -> Path:
    target.mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name in SHIPPED:
            shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns(*GENERATED))
        elif path.is_file():
            shutil.copy2(path, target / path.name)
    return target


def throwaway_environment(folder: Path) -> Path:
    """The interpreter of a new virtual environment that sees the packages of this one."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    tags = {"base": folder, "platbase": folder}
    purelib = Path(sysconfig.get_path("purelib", "venv", tags))
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    (purelib / "outer.pth").write_text("\n".join(outer) + "\n")
    return folder / "bin" / "python"


def probe(python: Path, *cases: dict, **env: object) -> list[dict]:
    cases = [case | {"cwd": str(case["cwd"])} for case in cases]
    done = run(python, "-c", PROBE, json.dumps(cases), env=environment(**env))
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(cases), done.stdout
    for result in results:
        assert result["version"] == version()
        assert not result["doubled"]
        assert not result["cuda"]
    return results


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory) -> Path:
    return throwaway_environment(tmp_path_factory.mktemp("clean") / "venv")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = copy_checkout(tmp_path_factory.mktemp("wheel") / "source")
    # Leftovers of an in-place build must not travel.
    (source / "deeplab_fast" / f"_C{SUFFIX}").write_bytes(b"old")
    (source / "deeplab_fast" / "build.json").write_text('{"cpython-37": {"extensions": {}}}')
    out = source.parent / "out"
    pip = (sys.executable, "-m", "pip", "wheel", "--no-index", "--no-build-isolation", "--no-deps")
    run(*pip, "-w", out, source, env=environment(DEEPLAB_FAST_BUILD_EXT=0))
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_one_package(wheel):
    assert wheel.name == f"deeplab_fast-{version()}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        builds = json.loads(archive.read("deeplab_fast/build.json"))
    top = {name.split("/")[0] for name in names}
    assert top == {"deeplab_fast", f"deeplab_fast-{version()}.dist-info"}
    assert {"deeplab_fast/kernels/__init__.py", RECORDS} <= set(names)
    assert not [name for name in names if name.endswith((".so", ".cpp", ".cu"))]
    assert list(builds) == [THIS]
    entry = {"built": False, "reason": "DEEPLAB_FAST_BUILD_EXT=0", "error": ""}
    assert builds[THIS]["extensions"]["_C"] == entry


def test_wheel_runs_elsewhere_and_in_a_checkout(wheel, clean_python, tmp_path):
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", target)
    run(*pip, wheel, env=environment())
    checkout = copy_checkout(tmp_path / "checkout")
    elsewhere, local = probe(
        clean_python, {"cwd": tmp_path}, {"cwd": checkout}, PYTHONPATH=str(target)
    )
    assert Path(elsewhere["package"]).parent == target / "deeplab_fast"
    assert Path(elsewhere["kernels"]).parent == target / "deeplab_fast" / "kernels"
    assert "DEEPLAB_FAST_BUILD_EXT=0" in elsewhere["reason"]
    # In a checkout the local package comes first, and brings its own kernels.
    assert Path(local["package"]).parent == checkout / "deeplab_fast"
    assert Path(local["kernels"]).parent == checkout / "kernels"
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('kernels') is not None)"
    run(clean_python, "-c", code, cwd=tmp_path, env=environment(PYTHONPATH=str(target)))


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("default", id="default: a finder maps both folders"),
        pytest.param("strict", id="strict: a tree of links, shadowed in the checkout"),
        pytest.param("compat", id="compat: a .pth line, which knows no package-dir"),
    ],
)
def test_editable_install(mode, tmp_path):
    python = throwaway_environment(tmp_path / "venv")
    source = copy_checkout(tmp_path / "source")
    setting = [] if mode == "default" else [f"--config-settings=editable_mode={mode}"]
    pip = (python, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps")
    env = environment(DEEPLAB_FAST_BUILD_EXT=0)
    run(*pip, "--ignore-installed", *setting, "-e", source, env=env)
    elsewhere, local = probe(python, {"cwd": tmp_path}, {"cwd": source})
    for result in (elsewhere, local):
        assert Path(result["package"]).is_relative_to(source)
        assert Path(result["kernels"]).is_relative_to(source)
        assert "DEEPLAB_FAST_BUILD_EXT=0" in result["reason"]
    assert Path(local["kernels"]).parent == source / "kernels"
    assert (source / "deeplab_fast" / "build.json").is_file()


def test_runs_from_pythonpath_without_triton_and_with_a_broken_extension(clean_python, tmp_path):
    source = copy_checkout(tmp_path / "source")
    plain, absent, broken = probe(
        clean_python,
        {"cwd": tmp_path},
        {"cwd": tmp_path, "triton": "absent"},
        {"cwd": tmp_path, "triton": "broken"},
        PYTHONPATH=str(source),
    )
    for result in (plain, absent, broken):
        assert Path(result["package"]).parent == source / "deeplab_fast"
        assert Path(result["kernels"]).parent == source / "kernels"
        assert not result["loaded"]
        assert "never installed" in result["reason"]
    (source / "deeplab_fast" / f"_C{SUFFIX}").write_bytes(b"no shared object")
    (unloadable,) = probe(clean_python, {"cwd": source})
    assert not unloadable["loaded"]
    assert "cannot be loaded" in unloadable["reason"]


def test_sdist_can_build_everything(tmp_path):
    source = copy_checkout(tmp_path / "source")
    command = (sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path)
    run(*command, cwd=source, env=environment())
    with tarfile.open(tmp_path / f"deeplab_fast-{version()}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "SECURITY.md", "Makefile"}
    # Tests read them.
    expected |= {"CONTRIBUTING.md", "DEPLOYMENT.md"}
    for folder in SHIPPED:
        files = (path for path in (source / folder).rglob("*") if path.is_file())
        expected |= {path.relative_to(source).as_posix() for path in files}
    assert expected <= names, sorted(expected - names)


def test_every_package_folder_is_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    found = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in (ROOT / "deeplab_fast").rglob("__init__.py")
    }
    kernels = (path.parent for path in (ROOT / "kernels").rglob("__init__.py"))
    found |= {
        "deeplab_fast." + path.relative_to(ROOT).as_posix().replace("/", ".") for path in kernels
    }
    assert set(settings["packages"]) == found


def test_tools_have_one_version():
    pins = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        lines = (line.split("==") for line in path.read_text("utf-8").splitlines() if "==" in line)
        pins |= {name: f"{name}=={pin}" for name, pin in lines}
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    for tool in ("ruff", "clang-format"):
        assert hooks.count(f"[{tool}==") == hooks.count(f"[{pins[tool]}]") > 0


def build(source: Path, *, check: bool = True, cuda: bool = False, **env: object):
    """Runs setup.py's whole build and returns (finished process, its facts or None).

    With `cuda` for a torch that says it has CUDA.
    """
    out = source.parent / "lib"
    command: tuple[object, ...] = ("setup.py",)
    if cuda:
        code = "import runpy, torch; torch.version.cuda = '13.0'; runpy.run_path('setup.py')"
        command = ("-c", code)
    command = (sys.executable, *command, "build", "--build-lib", out)
    done = run(*command, cwd=source, env=environment(**env), check=check)
    path = out / "deeplab_fast" / "build.json"
    return done, json.loads(path.read_text("utf-8"))[THIS] if path.is_file() else None


@pytest.fixture
def script(monkeypatch):
    """setup.py as a module, without the build."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.chdir(ROOT)
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)
    spec = importlib.util.spec_from_file_location("deeplab_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("debug", ["0", "1"], ids=["release", "debug"])
def test_every_compiler_gets_the_standard_of_csrc(debug, script, monkeypatch):
    monkeypatch.setenv("DEBUG", debug)
    settings = script.Settings.from_environment()
    for flags in (script.cxx_flags(settings, "c++ (GCC) 12"), script.nvcc_flags(settings)):
        assert [flag for flag in flags if "std=" in flag] == ["-std=c++20"]


@pytest.mark.parametrize("sanitize", ["0", "1"])
def test_sanitizers_are_compiled_and_linked_in_where_asked_for(sanitize, script, monkeypatch):
    monkeypatch.setenv("SANITIZE", sanitize)
    settings = script.Settings.from_environment()
    for flags in (script.cxx_flags(settings, "c++ (GCC) 12"), script.link_flags(settings)):
        assert ("-fsanitize=address,undefined" in flags) == (sanitize == "1")
        assert ("-fno-sanitize-recover=all" in flags) == (sanitize == "1")
    assert not [flag for flag in script.nvcc_flags(settings) if "sanitize" in flag]


@pytest.fixture
def source(tmp_path) -> Path:
    return copy_checkout(tmp_path / "source")


@pytest.fixture
def without_torch(tmp_path) -> Path:
    """A folder for PYTHONPATH in which `import torch` fails as if it were not installed."""
    folder = tmp_path / "without_torch"
    folder.mkdir()
    error = "ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    (folder / "torch.py").write_text(f"raise {error}\n")
    return folder


def test_missing_torch_is_one_line(source, without_torch):
    done, facts = build(source, PYTHONPATH=without_torch)
    lines = [line for line in done.stdout.splitlines() if "torch is not" in line]
    assert len(lines) == 1
    assert lines[0].startswith("deeplab_fast: pure Python install: ")
    assert "--no-build-isolation" in lines[0]
    assert "torch is not in the build environment" in facts["extensions"]["_C"]["reason"]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        pytest.param({"DEEPLAB_FAST_BUILD_EXT": "1"}, "torch is not", id="required, no torch"),
        pytest.param({"FORCE_CUDA": "1"}, "torch is not", id="CUDA required, no torch"),
        pytest.param({"DEEPLAB_FAST_BUILD_EXT": "yes"}, "use auto or 0 or 1", id="unknown choice"),
        pytest.param({"MAX_JOBS": "0"}, "positive number", id="no jobs"),
        pytest.param(
            {"DEEPLAB_FAST_SM90_VARIANTS": "nofence,fast"}, "names fast: use", id="unknown variant"
        ),
        pytest.param(
            {"FORCE_CUDA": "1", "DEEPLAB_FAST_BUILD_EXT": "0"}, "contradict", id="contradiction"
        ),
    ],
)
def test_settings_that_cannot_be_followed(env, message, source, without_torch):
    done, facts = build(source, check=False, PYTHONPATH=without_torch, **env)
    assert done.returncode != 0
    assert facts is None
    (line,) = (line for line in done.stdout.splitlines() if "deeplab_fast: error: " in line)
    assert message in line


def test_force_cuda_without_a_toolkit_is_an_error(source, tmp_path):
    done, _ = build(source, check=False, FORCE_CUDA=1, CUDA_HOME=tmp_path / "nothing")
    assert done.returncode != 0
    (line,) = (line for line in done.stdout.splitlines() if "deeplab_fast: error: " in line)
    assert "FORCE_CUDA=1, but CUDA_HOME=" in line
    assert "has no bin/nvcc" in line


@pytest.fixture
def sources(source) -> Path:
    """csrc of the copy, without a source file."""
    shutil.rmtree(source / "csrc")
    (source / "csrc" / "cuda").mkdir(parents=True)
    return source / "csrc"


# Compiles as C++20 only and, without torch's headers, at once.
CONCEPT = "template <class T> concept any = true;\n"


def failing_nvcc(folder: Path, release: str) -> Path:
    """A toolkit whose nvcc fails; it says a release if there is one."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    version = f'[ "$1" = --version ] && echo "release {release}, V1" && exit 0\n' * bool(release)
    failure = 'echo "warning: old" >&2; echo "nvcc fatal   : broken on purpose" >&2; exit 1\n'
    nvcc.write_text(f"#!/bin/sh\n{version}{failure}")
    nvcc.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("code", "env", "error"),
    [
        pytest.param(
            "#error broken on purpose\n",
            {},
            "csrc/bad.cpp:1:2: error: #error broken on purpose",
            id="one error, of the preprocessor",
        ),
        pytest.param(
            f'{CONCEPT}#warning "error: none"\nint f() {{ return one; }}\nint g = two;\n',
            {},
            "csrc/bad.cpp:3:18: error: ",
            id="two errors after a warning",
        ),
        pytest.param(
            CONCEPT, {"LDFLAGS": "-lno_such_library"}, "cannot find -lno_such_library", id="linker"
        ),
    ],
)
def test_extension_that_fails_is_left_out_loudly(code, env, error, sources, load):
    (sources / "bad.cpp").write_text(code)
    done, facts = build(sources.parent, CUDA_HOME="/none", **env)
    what, first, tools = done.stdout.splitlines()[-3:]
    assert what.startswith("deeplab_fast: WARNING: the C++ extension deeplab_fast._C failed to ")
    assert first.startswith("deeplab_fast: first error: ")
    assert error in first
    assert tools.startswith(f"deeplab_fast: {facts['compiler']}, torch {torch.__version__}: ")
    assert "DEEPLAB_FAST_BUILD_EXT=1" in tools
    assert done.stdout.count("WARNING: the") == 1
    commands = [line for line in done.stdout.splitlines() if " -c " in line]
    assert {tuple(re.findall(r"-std=\S+", line)) for line in commands} == {("-std=c++20",)}

    entry = facts["extensions"]["_C"]
    assert entry["error"] == first.removeprefix("deeplab_fast: first error: ")
    assert entry == {
        "built": False,
        "reason": f"failed to compile: {entry['error']}",
        "error": entry["error"],
    }
    with pytest.warns(RuntimeWarning) as caught:
        ext = load({}, {THIS: facts})
    assert len(caught) == 1
    for text in (ext.CPU.reason, str(caught[0].message)):
        assert f"failed to compile: {entry['error']} ({facts['compiler']}, torch " in text
        assert "rebuild with `pip install" in text
    assert "_C_cuda" not in str(caught[0].message)


@pytest.mark.parametrize(
    ("release", "env"),
    [
        pytest.param("13.0", {}, id="nvcc that compiles nothing"),
        pytest.param("", {}, id="nvcc that does not even tell its release"),
        pytest.param("13.0", {"FORCE_CUDA": "1"}, id="required by FORCE_CUDA"),
        pytest.param("13.0", {"DEEPLAB_FAST_BUILD_EXT": "1"}, id="required by BUILD_EXT"),
    ],
)
def test_cuda_extension_that_fails(release, env, sources, tmp_path, load):
    (sources / "good.cpp").write_text(CONCEPT)
    for name in ("one.cu", "two_sm90.cu"):
        (sources / "cuda" / name).write_text("")
    toolkit = failing_nvcc(tmp_path / "toolkit", release)
    done, facts = build(sources.parent, check=False, cuda=True, CUDA_HOME=toolkit, **env)
    assert "Traceback" not in done.stdout
    assert (done.returncode != 0) == bool(env), done.stdout
    what, first, tools = done.stdout.splitlines()[-3:]
    one = "the CUDA extension deeplab_fast._C_cuda"
    if env:
        # The first failure of a required extension ends the build.
        assert what == f"deeplab_fast: error: {one} failed to compile"
        assert first == "deeplab_fast: first error: nvcc fatal   : broken on purpose"
        assert f"{next(iter(env))}=1 makes this an error" in tools
        assert facts is None
        return
    both = f"{one} and the sm_90a CUDA extension deeplab_fast._C_sm90"
    assert what.startswith(f"deeplab_fast: WARNING: {both} failed to compile and are left out")
    error = "nvcc fatal   : broken on purpose"
    assert first == f"deeplab_fast: first error of _C_cuda and _C_sm90: {error}"
    assert tools.startswith(f"deeplab_fast: nvcc {release or 'of an unknown release'}, torch ")
    assert [entry["built"] for entry in facts["extensions"].values()] == [True, False, False]
    assert [entry["error"] for entry in facts["extensions"].values()] == ["", error, error]
    with pytest.warns(RuntimeWarning) as caught:
        load({}, {THIS: facts})
    assert str(caught[0].message).startswith("packaging_probe_")
    assert "._C failed" not in str(caught[0].message)


def test_required_extension_that_fails_ends_the_build(sources):
    (sources / "bad.cpp").write_text("#error broken on purpose\n")
    done, facts = build(sources.parent, check=False, DEEPLAB_FAST_BUILD_EXT=1, CUDA_HOME="/none")
    assert done.returncode != 0
    assert facts is None
    assert "Traceback" not in done.stdout
    what, first, tools = done.stdout.splitlines()[-3:]
    assert what == "deeplab_fast: error: the C++ extension deeplab_fast._C failed to compile"
    assert first == "deeplab_fast: first error: csrc/bad.cpp:1:2: error: #error broken on purpose"
    assert f"torch {torch.__version__}: DEEPLAB_FAST_BUILD_EXT=1 makes this an error" in tools


@pytest.mark.parametrize(
    ("output", "error"),
    [
        pytest.param("a.cpp:1:2: error: g\nb.cpp:1:2: error: h", "a.cpp:1:2: error: g", id="two"),
        pytest.param(
            "a.cpp:1:9: fatal error: no.h: None",
            "a.cpp:1:9: fatal error: no.h: None",
            id="a header",
        ),
        pytest.param(
            "a.cpp:1:2: warning: error: g\nb.cpp:3:4: error: warning: h",
            "b.cpp:3:4: error: warning: h",
            id="errors and warnings that speak of each other",
        ),
        pytest.param(
            '    1 | f("error: ");\n  f("error: ");\na.cpp:1: error: f',
            "a.cpp:1: error: f",
            id="lines of the source",
        ),
        pytest.param(
            "\x1b[01m\x1b[Ka.cpp:1:2:\x1b[m\x1b[K \x1b[01;31m\x1b[Kerror: \x1b[m\x1b[Kg",
            "a.cpp:1:2: error: g",
            id="colours",
        ),
        pytest.param(
            "a.cu(3): warning #177-D: x\na.cu(4): error #20: y",
            "a.cu(4): error #20: y",
            id="nvcc, with numbers",
        ),
        pytest.param(
            "nvcc fatal   : Unsupported gpu architecture 'sm_35'",
            "nvcc fatal   : Unsupported gpu architecture 'sm_35'",
            id="nvcc itself",
        ),
        pytest.param(
            "ptxas info    : 0 bytes\nptxas a.ptx, line 21; error   : Not a name",
            "ptxas a.ptx, line 21; error   : Not a name",
            id="ptxas",
        ),
        pytest.param(
            "nvlink error   : Undefined reference to 'q'",
            "nvlink error   : Undefined reference to 'q'",
            id="nvlink",
        ),
        pytest.param(
            "a.s: Assembler messages:\na.s:4: Error: no such instruction: `b'",
            "a.s:4: Error: no such instruction: `b'",
            id="assembler",
        ),
        pytest.param(
            "c++: error: unrecognized command-line option '-std=c++20'",
            "c++: error: unrecognized command-line option '-std=c++20'",
            id="an old compiler",
        ),
        pytest.param(
            "/bin/ld: e.o: in function `main':\ne.cpp:(.text+0x5): undefined reference to "
            "`f()'\ncollect2: error: ld returned 1",
            "e.cpp:(.text+0x5): undefined reference to `f()'",
            id="a symbol",
        ),
        pytest.param(
            "/bin/ld: skipping incompatible libx.so when searching for -lx\n"
            "/bin/ld: cannot find -lx: No such file or directory\ncollect2: error: ld returned 1",
            "/bin/ld: cannot find -lx: No such file or directory",
            id="a library",
        ),
        pytest.param(
            "ninja: error: 'z', needed by 'y', missing and no known rule to make it",
            "ninja: error: 'z', needed by 'y', missing and no known rule to make it",
            id="ninja",
        ),
        pytest.param(
            "FAILED: a.o\nc++ a.cpp\nKilled\nninja: build stopped: subcommand failed.",
            "Killed",
            id="out of memory",
        ),
        pytest.param(
            "FAILED: a.o\nc++ a.cpp\n/bin/sh: 1: c++: not found",
            "/bin/sh: 1: c++: not found",
            id="no such command",
        ),
        pytest.param(
            "FAILED: a.o\nc++ a.cpp\nlicense expired\nninja: build stopped: subcommand failed.",
            "license expired",
            id="a form nobody knows",
        ),
        pytest.param(
            "FAILED: a.o \nc++ a.cpp\nninja: build stopped: subcommand failed.",
            "FAILED: a.o (its command printed nothing)",
            id="a silent command",
        ),
        pytest.param(
            f"{ROOT}/csrc/a.cpp:1:2: error: {'x' * 400}",
            f"csrc/a.cpp:1:2: error: {'x' * 274}...",
            id="a long line, with the path of the checkout",
        ),
        pytest.param("[1/1] c++ -Werror=all -c a.cpp\na.cpp:1: warning: w", "", id="no error"),
    ],
)
def test_first_error_of_an_output(output, error, script):
    assert script.first_error(output) == error


# Runs setup.py without the build, and offers what it defines.
OF_SCRIPT = """
import json, os, runpy, setuptools, signal, subprocess, sys
sys.argv = ["setup.py"]
setuptools.setup = lambda **options: None
script = runpy.run_path("setup.py")
"""
COPYING = f"""{OF_SCRIPT}
def state():
    files = [os.fstat(number) for number in (1, 2)]
    return [(file.st_dev, file.st_ino) for file in files], sorted(os.listdir("/proc/self/fd"))

before = state()
print("before")
try:
    with script["copied_output"]() as copies:
        print("first", flush=True)
        command = "sleep 100 & echo $!; echo second >&2; yes | head -c 200000"
        subprocess.run(["sh", "-c", command])
        print("last")
        raise KeyError
except KeyError:
    print("after")
assert state() == before
first, server, more = bytes(copies[0]).decode().split("\\n", 2)
os.kill(int(server), signal.SIGKILL)
assert (first, copies[1]) == ("first", b"second\\n"), copies
assert more == "y\\n" * 100000 + "last\\n", copies
"""


@pytest.mark.parametrize("kind", ["pipe", "file", "terminal"])
def test_output_of_compilers_is_copied(kind, tmp_path):
    """The old descriptors are back after an exception, while a process keeps the new ones open."""
    near, far = os.openpty() if kind == "terminal" else os.pipe()
    if kind == "file":
        os.close(far)
        far = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    child = subprocess.Popen(
        [sys.executable, "-c", COPYING],
        stdout=far,
        stderr=far,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
    )
    os.close(far)
    output = b""
    # A terminal without a writer is an error to Linux.
    with contextlib.suppress(OSError):
        while data := os.read(near, 1 << 16):
            output += data
    os.close(near)
    assert child.wait(timeout=600) == 0, output[-2000:]
    if kind == "file":
        output = (tmp_path / "out").read_bytes()
    lines = output.decode().split()
    assert lines.count("y") == 100000
    assert {"before", "first", "second"} < set(lines)
    assert lines[-2:] == ["last", "after"]


@pytest.mark.parametrize(
    ("terminal", "captured"),
    [
        pytest.param(True, True, id="pip captures the output"),
        pytest.param(True, False, id="the output is the terminal"),
        pytest.param(False, True, id="no terminal"),
    ],
)
def test_warning_reaches_the_terminal_once(terminal, captured):
    near, far = os.openpty()
    code = f"{OF_SCRIPT}script['warn']('one\\ntwo \\u2018')"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE if captured else far,
        cwd=ROOT,
        env=environment(PYTHONIOENCODING="ascii"),
        start_new_session=True,
        preexec_fn=(lambda: fcntl.ioctl(far, termios.TIOCSCTTY, 0)) if terminal else None,
    )
    printed = child.communicate(timeout=600)[0]
    assert child.returncode == 0
    os.close(far)
    shown = b""
    with contextlib.suppress(OSError):
        shown = os.read(near, 1000)
    os.close(near)
    assert (printed or b"").count(b"one\ntwo ?\n") == captured
    assert shown.count(b"one\r\ntwo ") == terminal


@pytest.fixture
def recorded(tmp_path) -> tuple[Path, Path]:
    """(toolkit, file): an nvcc that only writes down its arguments, a line of the file a call."""
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        "if '--version' in sys.argv:\n"
        "    print('Cuda compilation tools, release 13.0, V13.0.88')\n"
        "else:\n"
        "    output = pathlib.Path(sys.argv[sys.argv.index('-o') + 1])\n"
        "    output.write_text('')\n"
        "    if '-MF' in sys.argv:\n"
        "        pathlib.Path(sys.argv[sys.argv.index('-MF') + 1]).write_text(f'{output}:')\n"
        f"    with open({str(tmp_path / 'calls')!r}, 'a') as calls:\n"
        "        print(*sys.argv[1:], file=calls)\n"
    )
    nvcc.chmod(0o755)
    return toolkit, tmp_path / "calls"


def test_cuda_sources_are_compiled_for_their_targets(sources, recorded):
    """On whatever torch there is."""
    source, (toolkit, calls) = sources.parent, recorded
    for name in ("one.cu", "two_sm90.cu"):
        (sources / "cuda" / name).write_text("")
    done, facts = build(
        source, FORCE_CUDA=1, CUDA_HOME=toolkit, TORCH_CUDA_ARCH_LIST="7.5 8.0;9.0+PTX"
    )
    assert facts["cuda"] == "13.0"
    assert facts["archs"] == ["8.0", "9.0+PTX", "9.0a"]
    assert [entry["built"] for entry in facts["extensions"].values()] == [False, True, True]
    for name in ("_C_cuda", "_C_sm90"):
        assert (source.parent / "lib" / "deeplab_fast" / f"{name}{SUFFIX}").is_file(), done.stdout
    targets = {}
    for call in calls.read_text().splitlines():
        arguments = call.split()
        if "-c" in arguments:
            compiled = Path(arguments[arguments.index("-c") + 1]).name
            targets[compiled] = [flag for flag in arguments if flag.startswith("-gencode")]
            assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in arguments
            assert "-DUSE_CUDA" in arguments
            assert [flag for flag in arguments if "std=" in flag] == ["-std=c++20"]
            assert not [flag for flag in arguments if flag.startswith("-DDEEPLAB_FAST_SM90")]
    assert targets == {
        "one.cu": [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90,code=sm_90",
            "-gencode=arch=compute_90,code=compute_90",
        ],
        "two_sm90.cu": ["-gencode=arch=compute_90a,code=sm_90a"],
    }


def test_variants_are_compiled_when_asked_for(sources, recorded):
    source, (toolkit, calls) = sources.parent, recorded
    (sources / "cuda" / "two_sm90.cu").write_text("")
    settings = {"FORCE_CUDA": 1, "CUDA_HOME": toolkit, "TORCH_CUDA_ARCH_LIST": "9.0"}
    variants = ("nofence", "acquire_cluster")
    _, facts = build(source, DEEPLAB_FAST_SM90_VARIANTS=",".join(variants), **settings)
    built = [name for name, entry in facts["extensions"].items() if entry["built"]]
    assert built == ["_C_sm90", *(f"_C_sm90_{name}" for name in variants)]
    package = source.parent / "lib" / "deeplab_fast"
    assert all((package / f"{name}{SUFFIX}").is_file() for name in built)
    found = [
        flag.removeprefix("-DDEEPLAB_FAST_SM90_").lower()
        for call in calls.read_text().splitlines()
        for flag in call.split()
        if flag.startswith("-DDEEPLAB_FAST_SM90_")
    ]
    assert found == list(variants)
    header = (ROOT / "csrc" / "include" / "deeplab_fast" / "aspp_sm90.cuh").read_text("utf-8")
    for name in variants:
        assert f"#ifdef DEEPLAB_FAST_SM90_{name.upper()}\n" in header
    # Variants of earlier sources must not stay.
    _, facts = build(source, **settings)
    assert set(facts["extensions"]) == {"_C", "_C_cuda", "_C_sm90"}
    assert [path.name for path in package.glob("_C_sm90*")] == [f"_C_sm90{SUFFIX}"]


OTHER = {"extensions": {"_C": {"built": True, "reason": ""}}}


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        pytest.param("", {}, id="no file yet"),
        pytest.param(json.dumps({"cpython-37": OTHER}), {"cpython-37": OTHER}, id="another Python"),
        pytest.param(json.dumps({THIS: OTHER}), {}, id="an earlier build for this Python"),
        pytest.param(
            json.dumps({"python": THIS, "flags": {"_C": []}} | OTHER), {}, id="an older format"
        ),
        pytest.param('{"cpython-37": ', {}, id="half a file"),
        pytest.param("[]", {}, id="no facts at all"),
    ],
)
def test_builds_in_place_keep_the_facts_of_other_pythons(
    before, kept, script, tmp_path, monkeypatch
):
    package = tmp_path / "deeplab_fast"
    package.mkdir()
    if before:
        (package / "build.json").write_text(before)
    others = package / "_C.cpython-37m-x86_64-linux-gnu.so"
    for path in (others, package / f"_C{SUFFIX}"):
        path.write_bytes(b"")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "PLAN", script.Plan(script.PLAN.settings).skip_all("for a test"))
    script.write_facts(package)
    builds = json.loads((package / "build.json").read_text("utf-8"))
    own = builds.pop(THIS)
    assert builds == kept
    assert own["extensions"]["_C"]["reason"] == "for a test"
    assert sorted(package.iterdir()) == sorted([others, package / "build.json"])


_names = (f"packaging_probe_{number}" for number in itertools.count())


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(files, build): imports a copy of _ext.py from a package with these files."""

    def load(files: dict[str, bytes], build: dict | None = None):
        package = tmp_path / next(_names)
        package.mkdir()
        (package / "__init__.py").write_text("")
        shutil.copy2(ROOT / "deeplab_fast" / "_ext.py", package)
        for name, content in files.items():
            (package / name).write_bytes(content)
        if build is not None:
            (package / "build.json").write_text(json.dumps(build))
        importlib.invalidate_caches()
        return importlib.import_module(f"{package.name}._ext")

    for name in ("DEEPLAB_FAST_DISABLE_EXT", "DEEPLAB_FAST_SM90_VARIANT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return load


@pytest.mark.parametrize(
    ("files", "build", "reason"),
    [
        pytest.param({}, None, "never installed", id="no build at all"),
        pytest.param(
            {},
            {THIS: {"extensions": {"_C": {"built": False, "reason": "no compiler"}}}},
            "not built: no compiler",
            id="the build's own reason",
        ),
        pytest.param({}, {THIS: OTHER}, "file is missing", id="file deleted"),
        pytest.param(
            {"_C.cpython-37m-x86_64-linux-gnu.so": b""},
            None,
            f"built for another Python only (_C.cpython-37m-x86_64-linux-gnu.so), not for {THIS}",
            id="a file of Python 3.7",
        ),
        pytest.param(
            {"_C.cpython-37m-x86_64-linux-gnu.so": b""},
            {"cpython-37": OTHER},
            f"built for another Python only (cpython-37), not for {THIS}; rebuild",
            id="the facts of Python 3.7",
        ),
        pytest.param(
            {"_C.cpython-37m-x86_64-linux-gnu.so": b""},
            {
                "cpython-37": OTHER,
                THIS: {"extensions": {"_C": {"built": False, "reason": "no compiler"}}},
            },
            "not built: no compiler",
            id="the own reason beside a build of Python 3.7",
        ),
        pytest.param(
            {}, {"python": THIS, "flags": {}} | OTHER, "never installed", id="an older format"
        ),
        pytest.param(
            {f"_C{SUFFIX}": b""},
            {THIS: {"torch": f"2.{MINOR - 1}.0", "extensions": {}}},
            f"built for torch 2.{MINOR - 1}.0, not for {torch.__version__}",
            id="the previous torch",
        ),
        pytest.param(
            {f"_C{SUFFIX}": b"text"},
            {THIS: {"torch": f"2.{MINOR}.99+other", "extensions": {}}},
            "cannot be loaded",
            id="a patch release is no mismatch, a damaged file is one",
        ),
    ],
)
def test_extension_says_why_it_is_missing(files, build, reason, load):
    ext = load(files, build)
    assert not ext.CPU.loaded
    assert ext.CPU.module is None
    assert reason in ext.CPU.reason
    assert ext.CPU.build == (build or {}).get(THIS, {})


BROKEN = {"built": False, "reason": "failed to compile: x.cpp:1: error: y", "error": "error: y"}


@pytest.mark.parametrize(
    ("entry", "disable", "warns"),
    [
        pytest.param(BROKEN, "0", True, id="a compiler failed"),
        pytest.param(BROKEN, "1", False, id="switched off when running"),
        pytest.param({"built": True, "reason": "", "error": ""}, "0", False, id="built"),
        pytest.param(
            {"built": False, "reason": "DEEPLAB_FAST_BUILD_EXT=0", "error": ""},
            "0",
            False,
            id="pure Python",
        ),
        pytest.param(
            {"built": False, "reason": "there is no C++ compiler", "error": ""},
            "0",
            False,
            id="no compiler",
        ),
    ],
)
def test_import_warns_of_a_compiler_that_failed(entry, disable, warns, load, monkeypatch):
    monkeypatch.setenv("DEEPLAB_FAST_DISABLE_EXT", disable)
    facts = {"torch": "2.0", "compiler": "c++ 1", "extensions": {"_C": entry}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load({}, {THIS: facts, "cpython-37": {"extensions": {"_C": BROKEN}}})
    assert len(caught) == warns
    for warning in caught:
        assert warning.category is RuntimeWarning
        assert "x.cpp:1: error: y (c++ 1, torch 2.0)" in str(warning.message)
        # Not at an import of the package's own.
        assert Path(warning.filename).name == "test_packaging.py"


@pytest.mark.parametrize(
    ("entry", "disable", "cure"),
    [
        pytest.param(
            {"built": False, "reason": "there is no C++ compiler", "error": ""},
            "0",
            "not built: there is no C++ compiler; put that right and rebuild with `pip install",
            id="no compiler",
        ),
        pytest.param(None, "0", "never installed; rebuild with `pip install", id="a checkout"),
        pytest.param(
            {"built": False, "reason": "DEEPLAB_FAST_BUILD_EXT=0", "error": ""},
            "0",
            "",
            id="pure Python as it was asked for",
        ),
        pytest.param(None, "1", "", id="switched off when running"),
        pytest.param(BROKEN, "0", "", id="told at the import"),
    ],
)
def test_the_first_slow_call_tells_the_cure_once(entry, disable, cure, load, monkeypatch):
    monkeypatch.setenv("DEEPLAB_FAST_DISABLE_EXT", disable)
    facts = {"torch": "2.0", "compiler": "c++ 1", "extensions": {"_C": entry}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ext = load({}, {THIS: facts} if entry else None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ext.warn_of_missing_cpu()
        ext.warn_of_missing_cpu()
    assert len(caught) == bool(cure)
    for warning in caught:
        assert warning.category is RuntimeWarning and cure in str(warning.message)
        assert "DEEPLAB_FAST_DISABLE_EXT=1" in str(warning.message)


def test_extension_of_another_torch_is_recognised_by_its_symbols(load, tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler makes the extension of this test")
    code = tmp_path / "old.c"
    code.write_text(
        "void _ZN3c104goneEv(void);\nvoid* PyInit__C(void) { _ZN3c104goneEv(); return 0; }\n"
    )
    run(compiler, "-shared", "-fPIC", code, "-o", tmp_path / "old.so")
    ext = load({f"_C{SUFFIX}": (tmp_path / "old.so").read_bytes()})
    assert "built for another torch: no symbol _ZN3c104goneEv" in ext.CPU.reason


def test_extension_can_be_switched_off(load, monkeypatch):
    monkeypatch.setenv("DEEPLAB_FAST_DISABLE_EXT", "1")
    ext = load({f"_C{SUFFIX}": b""})
    for extension in (ext.CPU, ext.CUDA, ext.SM90):
        assert not extension.loaded
        assert "DEEPLAB_FAST_DISABLE_EXT=1" in extension.reason


def test_cuda_extension_is_not_loaded_into_a_torch_without_cuda(load, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    ext = load({f"_C_cuda{SUFFIX}": b""})
    assert not ext.CUDA.loaded
    assert "has no CUDA" in ext.CUDA.reason


@pytest.mark.parametrize(
    ("variant", "name", "reason"),
    [
        pytest.param("", "_C_sm90", "_C_sm90.", id="none asked for"),
        pytest.param("nofence", "_C_sm90_nofence", "_C_sm90_nofence.", id="there"),
        pytest.param(
            "acquire_cluster",
            "_C_sm90_acquire_cluster",
            "only DEEPLAB_FAST_SM90_VARIANTS=acquire_cluster at build time makes this variant",
            id="not built",
        ),
        pytest.param(
            "fast",
            "_C_sm90",
            "DEEPLAB_FAST_SM90_VARIANT=fast is not allowed: use nofence or acquire_cluster",
            id="unknown",
        ),
    ],
)
def test_a_variant_takes_the_place_of_the_sm90_extension(variant, name, reason, load, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("DEEPLAB_FAST_SM90_VARIANT", variant)
    # What cannot be loaded is named with its path.
    files = {f"_C_sm90{SUFFIX}": b"text", f"_C_sm90_nofence{SUFFIX}": b"text"}
    ext = load(files, {THIS: {"extensions": {"_C_sm90": {"built": True, "reason": ""}}}})
    assert ext.SM90.name.endswith(f".{name}")
    assert not ext.SM90.loaded
    assert reason in ext.SM90.reason


def test_built_extension_loads_and_shares_torchs_openmp():
    """One OpenMP runtime: torch's thread count reaches the extension, one library is mapped."""
    facts = ROOT / "deeplab_fast" / "build.json"
    if not facts.is_file():
        pytest.skip("the extension is not built in this checkout")
    build = json.loads(facts.read_text("utf-8")).get(THIS)
    if build is None:
        pytest.skip(f"the extension is not built for {THIS}")
    if not build["extensions"]["_C"]["built"]:
        pytest.skip(f"the extension is not built: {build['extensions']['_C']['reason']}")
    code = """
import json, torch
from deeplab_fast import _ext
assert _ext.CPU.loaded, _ext.CPU.reason
threads = []
for count in (1, 3):
    torch.set_num_threads(count)
    threads.append(_ext.CPU.module.build_info()["openmp_threads"])
with open("/proc/self/maps") as maps:
    paths = {line.split()[-1] for line in maps if "/" in line}
runtimes = [path for path in paths if "omp" in path.rpartition("/")[2]]
print(json.dumps([threads, runtimes, _ext.CPU.module.build_info()]))
"""
    done = run(sys.executable, "-c", code, cwd=ROOT, env=environment())
    threads, runtimes, info = json.loads(done.stdout.splitlines()[-1])
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    if "-fopenmp" in build["flags"]["_C"]:
        assert info["openmp"] > 0
        assert threads == [1, 3]
        assert len(runtimes) == 1, runtimes
        # Linked by name it could be the system's, where torch's has another name.
        assert b"libgomp" not in Path(ROOT / "deeplab_fast" / f"_C{SUFFIX}").read_bytes()
