"""DeepLabv3 (arXiv 1706.05587) as a drop-in, faster and smaller-in-memory package.

import deeplab_fast as dlf

model = dlf.deeplabv3_resnet50(weights="checkpoint.pth").eval()
labels = model.predict("photo.jpg")

The names stand in `_public.py`, and are imported with PyTorch at the first use of one of them:
`deeplab-fast --help` needs neither. What needs the operators without any name of this package, as
`torch.ops.deeplab_fast`, imports `deeplab_fast.ops`.
"""

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
