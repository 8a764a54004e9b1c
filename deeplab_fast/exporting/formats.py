"""Writing a graph as a file: ONNX, OpenVINO's IR, a torch.export program, AOTInductor."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeplab_fast.exporting.description import Description
from deeplab_fast.exporting.graph import INPUT, ExportError, exporter, write_elsewhere

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# DEPLOYMENT.md names it; PyTorch 2.11 and 2.13 both write it.
OPSET = 18
PACKAGES = {
    ".onnx": ("onnx", "onnxscript"),
    ".xml": ("onnx", "onnxscript", "openvino"),
    ".pt2": (),
    ".pt2-package": (),
}
_EXTRAS = {".onnx": "onnx", ".xml": "openvino"}
# A file's own text in a torch.export archive.
TORCH_TEXT = "deeplab_fast.json"


def check_suffix(path: Path) -> str:
    """The format of a file by its name.

    Raises:
        ValueError: there is none.
    """
    if path.suffix not in FORMATS:
        raise ValueError(
            f"{path.name!r} has no format that models are exported to; expected a name that ends "
            "with .onnx, .xml (OpenVINO), .pt2 (torch.export) or .pt2-package (AOTInductor)"
        )
    return path.suffix


def check_packages(suffix: str, more: tuple[str, ...] = ()) -> None:
    """Raises ImportError where libraries are missing that a format needs."""
    missing = [
        name for name in dict.fromkeys((*PACKAGES[suffix], *more)) if find_spec(name) is None
    ]
    if missing:
        raise ImportError(
            f"a {suffix} file needs {', '.join(missing)}, which this Python does not have; install "
            f"deeplab_fast[{_EXTRAS.get(suffix, 'onnx')}] or pip install {' '.join(missing)}"
        )


def write(
    program: ExportedProgram, description: Description, folder: Path, name: str
) -> list[Path]:
    """Writes a program into files of an empty folder; the file of this name comes last.

    Raises:
        ExportError: the library that writes the format fails.
    """
    path = folder / name
    try:
        with exporter():
            return FORMATS[path.suffix](program, description, path)
    except OSError:
        raise
    # Each library has errors of its own.
    except Exception as error:
        what = " ".join(str(error).split())[:400]
        raise ExportError(
            f"{description.model} does not become a {path.suffix} file: {type(error).__name__}: "
            f"{what}; expected a graph that the format has operators for: choose another one, or "
            "fix the size"
        ) from error


def onnx_model(program: ExportedProgram, description: Description) -> Any:
    """The ONNX model of a program, which is changed, with the description in its metadata."""
    import torch

    write_elsewhere(program)
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[description.result],
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    rows = 1 if description.photos else 2
    dims = model.graph.input[0].type.tensor_type.shape.dim
    names = {0: "batch", rows: "height", rows + 1: "width"}
    renamed = {dims[i].dim_param: name for i, name in names.items() if dims[i].dim_param}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in renamed:
                dim.dim_param = renamed[dim.dim_param]
    model.doc_string = f"{description.model}: {description.input_text} -> {description.result_text}"
    model.producer_name, model.producer_version = "deeplab_fast", description.version
    del model.metadata_props[:]
    for key, value in description.as_strings().items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    return model


def _onnx(program: ExportedProgram, description: Description, path: Path) -> list[Path]:
    import onnx

    model = onnx_model(program, description)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return [path]


def _openvino(program: ExportedProgram, description: Description, path: Path) -> list[Path]:
    import onnx
    import openvino

    whole = path.with_suffix(".onnx")
    onnx.save(onnx_model(program, description), whole)
    model = openvino.Core().read_model(whole)
    for key, value in description.as_strings().items():
        model.set_rt_info(value, [key])
    # Weights are in the precision that was asked for already.
    openvino.save_model(model, path, compress_to_fp16=False)
    # It may be mapped into memory until here.
    del model
    whole.unlink()
    return [path.with_suffix(".bin"), path]


def _torch_program(program: ExportedProgram, description: Description, path: Path) -> list[Path]:
    import torch

    text = description.as_strings()["deeplab_fast"]
    torch.export.save(program, path, extra_files={TORCH_TEXT: text})
    return [path]


def _torch_package(program: ExportedProgram, description: Description, path: Path) -> list[Path]:
    from torch._inductor import aoti_compile_and_package

    # It takes no other suffix.
    whole = path.with_suffix(".pt2")
    options = {"aot_inductor.metadata": description.as_strings()}
    aoti_compile_and_package(program, package_path=str(whole), inductor_configs=options)
    os.replace(whole, path)
    return [path]


FORMATS: dict[str, Callable[[ExportedProgram, Description, Path], list[Path]]] = {
    ".onnx": _onnx,
    ".xml": _openvino,
    ".pt2": _torch_program,
    ".pt2-package": _torch_package,
}
