"""Other libraries' inference of whole models on a CPU: OpenVINO, ONNX Runtime, NNCF.

Each gets the plain model with the argmax of its full-size logits as one ONNX graph of fixed shape.
Exported and quantized files lie in the run's folder (`files.scratch`), one for each case and state
of its weights, so that the process that measures memory finds them ready.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .model_cases import ModelLabels
from .registry import Arguments, Case, Inputs, Provider, Runnable, Text, register_provider

if TYPE_CHECKING:
    import numpy as np

INPUT = "images"
OPSET = 17

Infer = Callable[["np.ndarray"], "np.ndarray"]


class _Session(Runnable):
    """A graph in another library's runtime: images [N, 3, H, W] to labels [N, H, W]."""

    def __init__(self, module: nn.Module, inputs: Inputs, infer: Infer) -> None:
        super().__init__(module, inputs)
        self.infer = infer

    def __call__(self, i: int) -> Tensor:
        return torch.from_numpy(self.infer(self.set(i)[0].numpy()))


def exported(case: ModelLabels, args: Arguments) -> Path:
    """The ONNX file of a case's plain model, labels included; made once."""
    path = case.file(args, "fp32.onnx")
    if path.exists():
        return path
    with warnings.catch_warnings():
        # It says that it is deprecated, and which conditions of the model it takes as constant.
        warnings.simplefilter("ignore")
        # The newer exporter needs onnxscript, and other versions of it for other PyTorchs.
        torch.onnx.export(
            args.module,
            args.inputs[0],
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=["labels"],
        )
    return path


def _openvino(model: Any, **options: str) -> Infer:
    import openvino

    options["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
    compiled = openvino.Core().compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    return lambda images: request.infer({0: images}, share_inputs=True, share_outputs=True)[0]


def _onnxruntime(path: Path) -> Infer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images})[0]


def quantized_openvino(case: ModelLabels, args: Arguments) -> Path:
    """The graph after NNCF's post-training quantization, as OpenVINO's IR; made once."""
    path = case.file(args, "int8.xml")
    if path.exists():
        return path
    # Before it is imported: a benchmark reports to nobody.
    os.environ.setdefault("NNCF_CI", "1")
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    images = [x.numpy() for x in case.calibration()]
    model = nncf.quantize(
        openvino.Core().read_model(exported(case, args)),
        nncf.Dataset(images),
        # Activations other than ReLU have values of both signs.
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(images),
    )
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


def quantized_onnx(case: ModelLabels, args: Arguments) -> Path:
    """The graph after ONNX Runtime's static quantization (QDQ); made once."""
    path = case.file(args, "int8.onnx")
    if path.exists():
        return path
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self, images: Iterator[Tensor]) -> None:
            self.images = images

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {INPUT: image.numpy()}

    prepared = path.with_suffix(".prepared")
    quant_pre_process(exported(case, args), prepared)
    cpu = torch.cpu.get_capabilities()
    quantize_static(
        prepared,
        path,
        Images(iter(case.calibration())),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        # Sums of two products of 8 bits overflow 16 bits in the instructions before VNNI.
        reduce_range=not (cpu.get("avx512_vnni") or cpu.get("avx_vnni")),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()
    return path


def _reason(case: Case, mode: str, device: str, dtype: torch.dtype) -> str:
    return "" if device == "cpu" else "measured on a CPU alone"


def _own_precision_reason(case: Case, mode: str, device: str, dtype: torch.dtype) -> str:
    if reason := _reason(case, mode, device, dtype):
        return reason
    import openvino

    found = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    return "" if found == "bf16" else f"OpenVINO's own precision on this CPU is {found}, not bf16"


def _rival(
    name: str,
    description: str,
    packages: tuple[str, ...],
    precision: str,
    infer: Callable[[ModelLabels, Arguments], Infer],
    missing_reason: Text = _reason,
) -> Provider:
    def build(
        case: ModelLabels, mode: str, device: str, dtype: torch.dtype, args: Arguments
    ) -> Runnable:
        inputs = args.converted(torch.float32, torch.contiguous_format)
        return _Session(args.module, inputs, infer(case, args))

    return Provider(
        name,
        description,
        build=build,
        applies=lambda case, mode: isinstance(case, ModelLabels),
        missing_reason=missing_reason,
        precision=lambda case, mode, device, dtype: precision,
        packages=packages,
        slow=precision == "int8",
    )


for _provider in (
    _rival(
        "openvino",
        "OpenVINO in fp32",
        ("onnx", "openvino"),
        "fp32",
        lambda case, args: _openvino(exported(case, args), INFERENCE_PRECISION_HINT="f32"),
    ),
    _rival(
        "openvino_default",
        "OpenVINO in the precision that it chooses itself, where that is bf16",
        ("onnx", "openvino"),
        "bf16",
        lambda case, args: _openvino(exported(case, args)),
        _own_precision_reason,
    ),
    _rival(
        "openvino_int8",
        "OpenVINO after NNCF's post-training quantization",
        ("onnx", "openvino", "nncf"),
        "int8",
        lambda case, args: _openvino(quantized_openvino(case, args)),
    ),
    _rival(
        "onnxruntime",
        "ONNX Runtime in fp32",
        ("onnx", "onnxruntime"),
        "fp32",
        lambda case, args: _onnxruntime(exported(case, args)),
    ),
    _rival(
        "onnxruntime_int8",
        "ONNX Runtime after its static quantization, weights by channel",
        ("onnx", "onnxruntime"),
        "int8",
        lambda case, args: _onnxruntime(quantized_onnx(case, args)),
    ),
):
    register_provider(_provider)
