"""Ways to run a case: PyTorch's, those of other libraries, and the backends of deeplab_fast."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from deeplab_fast import backends
from deeplab_fast.dispatch import limits
from deeplab_fast.dispatch.examples import LABELS
from deeplab_fast.testing import import_torchvision

from .gate import outputs
from .model_cases import ModelCase, ModelLabels, ModelLogits
from .op_cases import OS8_RATES, OS16_RATES
from .registry import (
    BACKWARD,
    FORWARD,
    FORWARD_BACKWARD,
    STEP,
    Arguments,
    Build,
    Case,
    Context,
    Inputs,
    Provider,
    Result,
    Runnable,
    case_precision,
    register_provider,
    spread_batch_norm,
)

NCHW = torch.contiguous_format
NHWC = torch.channels_last


class _Forward(Runnable):
    def __call__(self, i: int) -> Result:
        with torch.inference_mode(), self.context():
            return self.module(*self.set(i))


class _CompiledForward(Runnable):
    """Compiled with its weights as constants; that needs gradients off, but no inference mode."""

    def __init__(self, module: nn.Module, inputs: Inputs, device: str) -> None:
        import torch._inductor.config as inductor

        mode = "max-autotune" if device == "cuda" else "default"
        super().__init__(torch.compile(module, mode=mode), inputs)
        with inductor.patch(freezing=True), torch.no_grad():
            # A case may change its inputs, which the comparison must find as they were.
            self.module(*(t.clone() for t in self.set(0)))

    def __call__(self, i: int) -> Result:
        with torch.no_grad():
            return self.module(*self.set(i))


class _Graphed(Runnable):
    """A CUDA graph of an eager forward pass; inputs are copied to where it reads them."""

    def __init__(self, module: nn.Module, inputs: Inputs, context: Context = nullcontext) -> None:
        super().__init__(module, inputs, context)
        self.static = tuple(t.clone() for t in self.set(0))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        self.graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), context():
            with torch.cuda.stream(stream):
                for _ in range(3):
                    module(*self.static)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph):
                self.result = module(*self.static)

    def __call__(self, i: int) -> Result:
        with torch.inference_mode():
            for to, given in zip(self.static, self.set(i), strict=True):
                to.copy_(given)
            self.graph.replay()
        return self.result


class _ForwardBackward(Runnable):
    """Output and gradients to the first input and to all parameters."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Inputs,
        cotangents: Sequence[Tensor | None],
        context: Context,
    ) -> None:
        grown = [(first.detach().requires_grad_(), *rest) for first, *rest in inputs]
        super().__init__(module, grown, context)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.cotangents = list(cotangents)

    def leaves(self, i: int) -> list[Tensor]:
        """What gets a gradient."""
        return [self.set(i)[0], *self.parameters]

    def forward(self, i: int) -> Tensor:
        """The output, with its graph."""
        with self.context():
            return self.module(*self.set(i))

    def gradient(self, i: int, out: Tensor, keep: bool = False) -> tuple[Tensor, ...]:
        """Gradients of an output of set i."""
        k = i % len(self.cotangents)
        given = self.cotangents[k]
        if given is not None and (given.dtype != out.dtype or given.stride() != out.stride()):
            given = self.cotangents[k] = torch.empty_like(out).copy_(given).detach()
        return torch.autograd.grad(out, self.leaves(i), given, retain_graph=keep)

    def __call__(self, i: int) -> Result:
        out = self.forward(i)
        return out, *self.gradient(i, out)


class _Backward(_ForwardBackward):
    """Only the backward pass, over one kept graph."""

    def __init__(self, *given: object) -> None:
        import torch._functorch.config as functorch

        super().__init__(*given)
        # A compiled backward pass otherwise frees what the next one reads.
        with functorch.patch(donated_buffer=False):
            self.out = self.forward(0)

    def __call__(self, i: int) -> Result:
        return self.gradient(0, self.out, keep=True)


class Step(Runnable):
    """A training step with SGD; the rate is so small that hundreds of steps change little."""

    def __init__(self, module: nn.Module, inputs: Inputs, context: Context) -> None:
        super().__init__(module, inputs, context)
        self.optimizer = torch.optim.SGD(module.parameters(), lr=1e-5, momentum=0.9)

    def __call__(self, i: int) -> Result:
        self.optimizer.zero_grad(set_to_none=True)
        with self.context():
            loss = self.module(*self.set(i))
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def probe(self) -> Result:
        loss = self(0)
        gradients = (p.grad for p in self.module.parameters() if p.grad is not None)
        return loss, *(g.clone() for g in gradients)


def trains(case: Case, mode: str) -> bool:
    """Whether a mode runs as in training, with fp32 weights and autocast for lower precision."""
    return mode == STEP or getattr(case, "training", False)


def runnable(
    case: Case,
    mode: str,
    args: Arguments,
    module: nn.Module,
    dtype: torch.dtype,
    layout: torch.memory_format,
    context: Context = nullcontext,
    graphed: bool = False,
) -> Runnable:
    """A module at a case.

    Args:
        module: changed in place: moved to the dtype and layout.
        dtype, layout: of weights and inputs.
        context: in which the forward pass runs.
        graphed: replay the forward pass from a CUDA graph.
    """
    module = module.to(dtype=dtype).to(memory_format=layout)
    return _running(case, mode, args, module, dtype, layout, context, graphed)


def _running(
    case: Case,
    mode: str,
    args: Arguments,
    module: nn.Module,
    dtype: torch.dtype,
    layout: torch.memory_format,
    context: Context,
    graphed: bool = False,
) -> Runnable:
    """As `runnable`, with the module as it is."""
    mutated = case.mutated
    inputs = [
        tuple(t.clone() if i in mutated else t for i, t in enumerate(given))
        for given in args.converted(dtype, layout, case.wide)
    ]
    if mode == FORWARD:
        return (_Graphed if graphed else _Forward)(module, inputs, context)
    if mode == STEP:
        return Step(module, inputs, context)
    kind = {FORWARD_BACKWARD: _ForwardBackward, BACKWARD: _Backward}[mode]
    return kind(module, inputs, args.cotangents, context)


def expected(case: Case, mode: str, args: Arguments) -> list[Tensor]:
    """The exact result of the first set of inputs: PyTorch's modules in the oracle's dtype."""
    first = Arguments(args.module, args.inputs[:1], args.cotangents[:1])
    module = case.oracle(copy.deepcopy(args.module))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        run = runnable(case, mode, first, module, case.oracle_dtype, NCHW)
        return outputs(run.probe())


def _eager(layout: torch.memory_format, as_shipped: bool = False, graphed: bool = False) -> Build:
    def build(case: Case, mode: str, device: str, dtype: torch.dtype, args: Arguments) -> Runnable:
        if as_shipped or trains(case, mode):
            dtype = torch.float32
        module = copy.deepcopy(args.module)
        return runnable(case, mode, args, module, dtype, layout, graphed=graphed)

    return build


def _autocast(device: str, dtype: torch.dtype) -> Context:
    if dtype == torch.float32:
        return nullcontext
    return lambda: torch.autocast(device, dtype)


def _build_autocast(
    case: Case, mode: str, device: str, dtype: torch.dtype, args: Arguments
) -> Runnable:
    low = torch.bfloat16 if dtype == torch.float32 else dtype
    module = copy.deepcopy(args.module)
    return runnable(case, mode, args, module, torch.float32, NHWC, _autocast(device, low))


def _build_compiled(
    case: Case, mode: str, device: str, dtype: torch.dtype, args: Arguments
) -> Runnable:
    module = copy.deepcopy(args.module)
    if mode == FORWARD:
        eager = runnable(case, mode, args, module, dtype, NHWC)
        return _CompiledForward(eager.module, eager.inputs, device)
    context: Context = nullcontext
    if trains(case, mode):
        dtype, context = torch.float32, _autocast(device, dtype)
    eager = runnable(case, mode, args, module, dtype, NHWC, context)
    eager.module = torch.compile(eager.module)
    if isinstance(eager, _Backward):
        eager = _Backward(eager.module, eager.inputs, eager.cotangents, context)
    return eager


def _build_own(attribute: str, **options: str) -> Build:
    def build(case: Case, mode: str, device: str, dtype: torch.dtype, args: Arguments) -> Runnable:
        module = getattr(case, attribute)(args, **options)
        context: Context = nullcontext
        if trains(case, mode):
            dtype, context = torch.float32, _autocast(device, dtype)
        return runnable(case, mode, args, module, dtype, case.own_layout, context)

    return build


def _backend(name: str, description: str) -> Provider:
    def build(case: Case, mode: str, device: str, dtype: torch.dtype, args: Arguments) -> Runnable:
        context = partial(backends.use_backend, name)
        return _running(case, mode, args, case.fused(args, dtype), dtype, NHWC, context)

    def missing(case: Case, mode: str, device: str, dtype: torch.dtype) -> str:
        found = []
        for desc in _descriptions(case, device, dtype):
            reasons = dict(backends.explain(desc).rows)[name]
            found += [r for r in reasons if r not in found]
        return "; ".join(found)

    return Provider(
        name,
        description,
        baseline=False,
        applies=lambda case, mode: bool(case.steps(torch.float32)),
        missing_reason=missing,
        build=build,
    )


def _descriptions(case: Case, device: str, dtype: torch.dtype) -> list[backends.OpDesc]:
    """What a choice of backend rests on, for each op that a case calls."""
    capability = None
    if device == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
    return [replace(step.desc, device=device, capability=capability) for step in case.steps(dtype)]


def chosen(case: Case, mode: str, device: str, dtype: torch.dtype) -> str:
    """Name of the provider that is what a user of deeplab_fast gets without choosing."""
    if isinstance(case, ModelLabels):
        return "ours-predict"
    if case.kind == "model" or type(case).own is not Case.own:
        return "ours"
    names = {backends.explain(desc).chosen for desc in _descriptions(case, device, dtype)}
    return names.pop() or "" if len(names) == 1 else ""


def _shipped_precision(case: Case, mode: str, device: str, dtype: torch.dtype) -> str:
    return case_precision(case, mode, device, torch.float32)


def _fp32_in_training(case: Case, mode: str, device: str, dtype: torch.dtype) -> str:
    return case_precision(case, mode, device, torch.float32 if trains(case, mode) else dtype)


def _no_bf16(case: Case, mode: str, device: str, dtype: torch.dtype) -> str:
    return "" if device == "cuda" else limits.cpu_bf16()


def _cpu_precision(name: str, limit: Callable[[], str]) -> Provider:
    """deeplab_fast's `predict` in a precision below fp32 that only a CPU has."""

    def missing(case: Case, mode: str, device: str, dtype: torch.dtype) -> str:
        return limit() if device == "cpu" else "a precision of models on a CPU"

    return Provider(
        f"ours-predict-{name}",
        f'deeplab_fast\'s model through predict, precision = "{name}"',
        baseline=False,
        applies=lambda case, mode: isinstance(case, ModelLabels),
        missing_reason=missing,
        build=_build_own("predict", precision=name),
        precision=lambda case, mode, device, dtype: name,
        slow=name == "int8",
    )


def _no_compiler(case: Case, mode: str, device: str, dtype: torch.dtype) -> str:
    if device == "cuda":
        missing = importlib.util.find_spec("triton") is None
        return "torch.compile needs Triton for a GPU, which is not installed" if missing else ""
    name = os.environ.get("CXX", "g++")
    return "" if shutil.which(name) else f"torch.compile needs a C++ compiler; {name} is missing"


def _no_cuda(case: Case, mode: str, device: str, dtype: torch.dtype) -> str:
    return "" if device == "cuda" else "CUDA graphs need a CUDA device"


def _smp_missing(case: Case, mode: str, device: str, dtype: torch.dtype) -> str:
    if importlib.util.find_spec("segmentation_models_pytorch") is None:
        return "segmentation-models-pytorch is not installed"
    try:
        import_torchvision()
        import segmentation_models_pytorch  # noqa: F401
    except Exception as error:
        return f"segmentation-models-pytorch does not import: {error}"
    if case.height % case.output_stride or case.width % case.output_stride:
        return f"smp refuses {case.height}x{case.width}: not divisible by {case.output_stride}"
    return ""


class _SmpLabels(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).argmax(1)


def _build_smp(
    case: ModelCase, mode: str, device: str, dtype: torch.dtype, args: Arguments
) -> Runnable:
    import segmentation_models_pytorch as smp

    with torch.device(device):
        model = smp.DeepLabV3(
            {"r50": "resnet50", "r101": "resnet101"}[case.backbone],
            encoder_weights=None,
            encoder_output_stride=case.output_stride,
            decoder_atrous_rates=OS8_RATES if case.output_stride == 8 else OS16_RATES,
            classes=case.classes,
        ).eval()
    spread_batch_norm(model)
    module = _SmpLabels(model) if LABELS in case.kinds(mode) else model
    return runnable(case, mode, args, module, dtype, NHWC)


def _smp_expected(case: ModelCase, args: Arguments, run: Runnable) -> list[Tensor]:
    """smp's weights in deeplab_fast's model, plain: other conventions, checked by its tests."""
    from deeplab_fast import from_checkpoint

    model = run.module.model if isinstance(run.module, _SmpLabels) else run.module
    state = {key: value.float().cpu() for key, value in model.state_dict().items()}
    x = args.inputs[0][0]
    ours = from_checkpoint(state, output_stride=case.output_stride).eval().to(x.device)
    with backends.use_backend("reference"), torch.inference_mode():
        return [ours(x)["out"]]


for _provider in (
    Provider(
        "eager",
        "PyTorch as torchvision ships it: eager, NCHW, fp32",
        build=_eager(NCHW, as_shipped=True),
        precision=_shipped_precision,
    ),
    Provider(
        "channels_last",
        "PyTorch eager, channels_last, in the suite's dtype (fp32 in training)",
        build=_eager(NHWC),
        precision=_fp32_in_training,
    ),
    Provider(
        "autocast",
        "PyTorch eager, channels_last, fp32 weights under bf16 autocast",
        missing_reason=_no_bf16,
        build=_build_autocast,
        precision=lambda case, mode, device, dtype: "fp16" if dtype == torch.float16 else "bf16",
    ),
    Provider(
        "cudagraph",
        "channels_last, replayed from a CUDA graph",
        applies=lambda case, mode: mode == FORWARD,
        missing_reason=_no_cuda,
        build=_eager(NHWC, graphed=True),
        graphs=True,
    ),
    Provider(
        "compile",
        "torch.compile of channels_last: weights frozen; on a GPU max-autotune and CUDA graphs",
        missing_reason=_no_compiler,
        build=_build_compiled,
        graphs=True,
        slow=True,
    ),
    Provider(
        "smp",
        "segmentation-models-pytorch's DeepLabV3, channels_last, in the suite's dtype",
        applies=lambda case, mode: (
            isinstance(case, (ModelLogits, ModelLabels)) and case.backbone != "mbv3"
        ),
        missing_reason=_smp_missing,
        build=_build_smp,
        own_expected=_smp_expected,
    ),
    _backend("reference", "deeplab_fast's ops on the reference backend (plain PyTorch)"),
    _backend("cpu", "deeplab_fast's ops in C++ for the CPU"),
    _backend("triton", "deeplab_fast's ops in Triton"),
    _backend("cuda", "deeplab_fast's ops in CUDA C++ and cuDNN"),
    Provider(
        "ours",
        "deeplab_fast's module or model as built",
        baseline=False,
        applies=lambda case, mode: type(case).own is not Case.own,
        build=_build_own("own"),
    ),
    Provider(
        "ours-built",
        "deeplab_fast's own model in place of another library's",
        baseline=False,
        applies=lambda case, mode: getattr(case, "has_builder", False),
        build=_build_own("built"),
    ),
    Provider(
        "ours-predict",
        "deeplab_fast's model through predict",
        baseline=False,
        applies=lambda case, mode: isinstance(case, ModelLabels),
        build=_build_own("predict"),
    ),
    _cpu_precision("bf16", limits.cpu_bf16),
    _cpu_precision("int8", limits.cpu_int8),
):
    register_provider(_provider)
