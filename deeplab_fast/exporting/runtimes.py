"""Running an exported file: ONNX Runtime, OpenVINO, the loaded program or package of PyTorch."""

from __future__ import annotations

import importlib
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from deeplab_fast.exporting.formats import TORCH_TEXT, check_packages
from deeplab_fast.exporting.graph import exporter

if TYPE_CHECKING:
    import numpy as np

# Runtimes of a format, the usual one first.
RUNTIMES = {
    ".onnx": ("onnxruntime", "openvino"),
    ".xml": ("openvino",),
    ".pt2": ("torch",),
    ".pt2-package": ("torch",),
}


class Runtime(Protocol):
    """A file in a library that runs it.

    Attributes:
        name: of the library, with its version.
        strings: the file's metadata.
    """

    name: str
    strings: dict[str, str]

    def __call__(self, images: Tensor) -> Tensor:
        """The file's result for its input, on the CPU."""


def start(path: Path, runtime: str | None = None) -> Runtime:
    """A file, loaded.

    Raises:
        ValueError: a runtime that does not run files of this kind, or no such file inside.
        ImportError: it is not installed.
        OSError: the file cannot be read.
    """
    allowed = RUNTIMES[path.suffix]
    chosen = allowed[0] if runtime is None else runtime
    if chosen not in allowed:
        raise ValueError(
            f"runtime is {runtime!r} for {path.name}; {path.suffix} files are run by "
            f"{' or '.join(allowed)}"
        )
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected an exported file: name one in it")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; expected one that export wrote")
    if chosen != "torch":
        check_packages(path.suffix, (chosen,))
    kinds: dict[str, Callable[[Path], Runtime]] = {
        "onnxruntime": _OnnxRuntime,
        "openvino": _OpenVino,
        "torch": _TorchProgram if path.suffix == ".pt2" else _TorchPackage,
    }
    try:
        with exporter():
            return kinds[chosen](path)
    except OSError:
        raise
    # Each library has errors of its own for a file that is damaged.
    except Exception as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} is no {path.suffix} file that {chosen} reads: {what}; export the model again"
        ) from error


class _OnnxRuntime:
    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Errors only: it warns of what it optimises.
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        self.name = f"ONNX Runtime {onnxruntime.__version__}"
        self.strings = dict(self._session.get_modelmeta().custom_metadata_map)
        self._input = self._session.get_inputs()[0].name

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run(None, {self._input: _array(images)})[0])


class _OpenVino:
    def __init__(self, path: Path) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(path)
        # Else it takes bf16 where the CPU has it.
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        }
        self._compiled = core.compile_model(model, "CPU", options)
        self.name = f"OpenVINO {openvino.__version__.split('-')[0]}"
        self.strings = _runtime_info(model, path)
        # A request has one call at a time.
        self._own = threading.local()

    def __call__(self, images: Tensor) -> Tensor:
        request = getattr(self._own, "request", None)
        if request is None:
            request = self._own.request = self._compiled.create_infer_request()
        return torch.from_numpy(request.infer({0: _array(images)})[0].copy())


def _runtime_info(model: Any, path: Path) -> dict[str, str]:
    if path.suffix == ".xml":
        found = {key: value for key, value in model.get_rt_info().items()}
        return {key: str(getattr(value, "value", value)) for key, value in found.items()}
    # What an ONNX file says of itself stands under a name of its own.
    if not model.has_rt_info(["framework"]):
        return {}
    framework = model.get_rt_info(["framework"])
    found = getattr(framework, "value", framework)
    return {key: str(value) for key, value in dict(found).items()}


class _TorchProgram:
    def __init__(self, path: Path) -> None:
        # A program in int8 has its ops.
        importlib.import_module("torch.ao.quantization.fx._decomposed")
        texts = {TORCH_TEXT: ""}
        program = torch.export.load(path, extra_files=texts)
        self._module = program.module()
        self.name = f"torch.export {torch.__version__}"
        text = texts[TORCH_TEXT]
        self.strings = {"deeplab_fast": text if isinstance(text, str) else bytes(text).decode()}
        if not text:
            self.strings = {}

    def __call__(self, images: Tensor) -> Tensor:
        # Its operations are PyTorch's, which the caller's autocast would take over.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return self._module(images.clone())


class _TorchPackage:
    def __init__(self, path: Path) -> None:
        from torch._inductor import aoti_load_package

        # Under a path it warns of the suffix.
        self._run = aoti_load_package(io.BytesIO(path.read_bytes()))
        self.name = f"AOTInductor {torch.__version__}"
        self.strings = dict(self._run.get_metadata())

    def __call__(self, images: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self._run(images.clone(memory_format=torch.contiguous_format))


def _array(images: Tensor) -> np.ndarray:
    return images.detach().contiguous().numpy()
