"""DeepLabv3 (arXiv 1706.05587) as a drop-in, faster and smaller-in-memory package.

import deeplab_fast as dlf

model = dlf.deeplabv3_resnet50(weights="checkpoint.pth").eval()
labels = model.predict("photo.jpg")

The names stand in `_public.py`, and are imported with this package. The command `deeplab-fast`
imports them at the first use of one: its `--help` needs no PyTorch.
"""

import sys as _sys
from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

from ._version import __version__ as __version__

_folder = _Path(__file__).resolve().parent
# In a checkout that is not installed the Triton kernels lie beside this folder, not in it.
# A wheel has them inside, so the condition is false there.
if not (_folder / "kernels").is_dir() and (_folder.parent / "kernels" / "__init__.py").is_file():
    __path__.append(str(_folder.parent))

if _TYPE_CHECKING:
    from ._public import *  # noqa: F403
    from ._public import __all__ as __all__

    # mypy does not follow `__all__ += models.__all__`.
    from .models import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        # What is asked for by protocol (inspect, copy, doctest) must not import PyTorch.
        if name == "__all__" or not name.startswith("__"):
            if _is_module(name):
                return _import_module(f"{__name__}.{name}")
            public = _import_module(f"{__name__}._public")
            if name == "__all__":
                return public.__all__
            # The import put modules, such as `_ext`, here.
            if name in globals():
                return globals()[name]
            if name in public.__all__:
                return globals().setdefault(name, getattr(public, name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_import_module(f"{__name__}._public").__all__})


def _is_module(name: str) -> bool:
    inside = (_folder / f"{name}.py").is_file() or (_folder / name / "__init__.py").is_file()
    return inside or name == "kernels"


def _is_command() -> bool:
    program = _Path(_sys.argv[0]).name if getattr(_sys, "argv", None) else ""
    # While `python -m` looks for a module it has "-m" for the program's name.
    module = program == "-m" and __name__ in _sys.orig_argv
    return module or program.removesuffix(".exe") in ("deeplab-fast", "deeplab-fast-script.py")


# Not at first use: two threads that import modules of a package at once, one by the package and
# one by a module in it, hold the locks of imports crosswise, and get half made modules. What
# imports this package has them all before it can start a thread that uses one.
if not _TYPE_CHECKING and not _is_command():
    _import_module(f"{__name__}._public")
