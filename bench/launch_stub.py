"""Launches of the Triton kernels without a GPU, in a process where Triton does not interpret.

    with pretend(GPUS["H100"]) as launches:
        deeplab_fast.ops.upsample_argmax(logits, (513, 513))
    launches.made

Triton's driver is a stub for a compute capability. A launch goes all the way that it goes on a GPU:
the op's validation and choice of backend, the launcher, Triton's specialisation of the arguments,
the compiler, its checks against the device, and the call of the launcher that Triton would have
compiled. Only that call does nothing: results are whatever was in memory.

What neither the interpreter nor ahead-of-time compilation passes through, and a GPU does:
`JITFunction.run` (globals compared at every launch), specialisation by real shapes and strides, the
second launch of everything, shared memory and registers of the device beside those of the kernel.
What is compiled lies in Triton's cache, as it would for the GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from deeplab_fast import backends
from deeplab_fast.dispatch import trust
from deeplab_fast.ops.folded_conv import Settings
from deeplab_fast.plan.device import device_like
from deeplab_fast.program import inference
from deeplab_fast.program.gpu_layers import Folded, GpuForms, execute
from deeplab_fast.testing import cubin_resources

# From compute capability 8.0 on: of a multiprocessor; of a thread, which takes them 8 at a time.
REGISTERS = 65536
MAX_REGISTERS = 255
REGISTER_UNIT = 8
MAX_THREADS = 1024
WARP = 32
KIBIBYTE = 1024


@dataclass(frozen=True)
class Gpu:
    """A GPU of a compute capability, as `torch.cuda.get_device_properties` describes it.

    Attributes:
        name: of a card.
        capability: compute capability.
        multiprocessors: streaming multiprocessors.
        block_shared, shared: KiB of shared memory that a block may ask for, and of all blocks of a
            multiprocessor (CUDA C++ Programming Guide, table "Technical specifications").
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    block_shared: int
    shared: int

    @property
    def index(self) -> int:
        """Device index: Triton keeps what it compiled by device."""
        major, minor = self.capability
        return 10 * major + minor

    @property
    def properties(self) -> SimpleNamespace:
        return SimpleNamespace(
            name=self.name,
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=self.multiprocessors,
            shared_memory_per_multiprocessor=self.shared * KIBIBYTE,
        )


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", (8, 0), 108, 163, 164),
        Gpu("RTX 3090", (8, 6), 82, 99, 100),
        Gpu("RTX 4090", (8, 9), 128, 99, 100),
        Gpu("H100", (9, 0), 132, 227, 228),
        Gpu("B200", (10, 0), 148, 227, 228),
        Gpu("RTX 5090", (12, 0), 170, 99, 100),
    )
}


@dataclass
class Launches:
    """What reached a GPU.

    Attributes:
        gpu: the GPU.
        made: kernel and hash of what it was compiled to, for each launch in order.
    """

    gpu: Gpu
    made: list[tuple[str, str]] = field(default_factory=list)

    def of(self, name: str, run: Callable[[], Any]) -> list[tuple[str, str]]:
        """The launches of one call; what goes wrong names the call and the GPU."""
        before = len(self.made)
        try:
            run()
        except Exception as error:
            error.add_note(f"in the call {name!r} on {self.gpu.name}")
            raise
        return self.made[before:]


class Loaded(NamedTuple):
    """A kernel's name, and what a thread of it takes: registers, bytes of memory for others."""

    name: str
    registers: int
    spilled: int


class Driver:
    """Triton's driver for a GPU that is not there.

    One for the process: what Triton has compiled keeps the launcher that it got then.

    Attributes:
        launches: where launches go.
    """

    launches: Launches

    @property
    def utils(self) -> Driver:
        return self

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.launches.gpu.index, 32)

    def get_current_device(self) -> int:
        return self.launches.gpu.index

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.launches.gpu.block_shared * KIBIBYTE}

    def load_binary(
        self, name: str, cubin: bytes, shared: int, device: int
    ) -> tuple[object, Loaded, int, int, int]:
        """(module, function, registers, bytes spilled, most threads of a block) of a kernel."""
        used = cubin_resources(cubin)
        loaded = Loaded(name, used["REG"], used["STACK"] + used["LOCAL"])
        unit = -(-loaded.registers // REGISTER_UNIT) * REGISTER_UNIT
        threads = min(REGISTERS // unit // WARP * WARP, MAX_THREADS)
        return object(), loaded, loaded.registers, loaded.spilled, threads

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        types = list(source.signature.values())
        limit = metadata.maxnreg or MAX_REGISTERS

        def launch(
            grid_x: int, grid_y: int, grid_z: int, stream: int, function: Loaded,
            packed_metadata: object, launch_metadata: object, enter_hook: object, exit_hook: object,
            *args: object,
        ) -> None:  # fmt: skip
            assert 0 < grid_x < 2**31 and grid_y == grid_z == 1
            # Below its limit the compiler spills a value outside loops for another resident block.
            assert function.registers < limit or not function.spilled, (
                f"{function.name} takes all {limit} registers and spills {function.spilled} bytes"
            )
            for kind, value in zip(types, args, strict=True):
                check_argument(kind, value)
            self.launches.made.append((function.name, metadata.hash))

        return launch


DRIVER = Driver()


def check_argument(kind: str, value: object) -> None:
    """What the compiled launcher refuses: an integer that its type does not hold, no pointer."""
    if kind.startswith("*"):
        assert isinstance(value, torch.Tensor), f"{value!r} for a {kind}"
    elif match := re.fullmatch(r"([iu])(\d+)", kind):
        bits = int(match[2])
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if match[1] == "i" else (0, 2**bits)
        assert low <= int(value) < high, f"{value} for an {kind}"
    elif kind.startswith(("fp", "bf")):
        assert isinstance(value, float), f"{value!r} for a {kind}"
    else:
        assert kind == "constexpr", kind


@contextmanager
def pretend(gpu: Gpu) -> Iterator[Launches]:
    """Ops run on Triton as if their tensors, of the CPU or without memory, were on the GPU.

    Yields:
        The launches, as they come.
    """
    from deeplab_fast.kernels import launch
    from triton.runtime import driver

    describe = backends.OpDesc.on

    def on_gpu(*facts: Any, **params: object) -> backends.OpDesc:
        return replace(describe(*facts, **params), device="cuda", capability=gpu.capability)

    device = device_like(gpu.properties)
    # Not driver.active, which looks for a GPU where none was asked for yet.
    before = driver._active
    with ExitStack() as stack:
        stack.enter_context(patch.object(backends.OpDesc, "on", on_gpu))
        stack.enter_context(patch.object(launch, "device_of", lambda x: device))
        stack.callback(setattr, driver, "_active", before)
        driver.set_active(DRIVER)
        DRIVER.launches = Launches(gpu)
        stack.enter_context(backends.use_backend("triton"))
        # What was chosen for CPU tensors meanwhile is not what they get.
        stack.callback(trust.forget)
        yield DRIVER.launches


def network(model: Any, dtype: torch.dtype, shape: Sequence[int]) -> dict[str, torch.Tensor]:
    """Logits without data, by what a model runs on a GPU.

    A launch takes shapes, strides and types of its maps and filters, and nothing is computed
    between launches, so that 16 images of 1024x2048 cost no more than one of 520x520.

    Args:
        model: on the meta device.
        dtype: of the maps.
        shape: of the images.
    """
    meta = torch.device("meta")
    weights = next(p.dtype for p in model.parameters() if p.dim() == 4)
    forms = GpuForms(meta, weights)
    program, reason = inference.fold(model, forms)
    assert program is not None, reason
    settings = Settings.now()
    x = torch.empty(tuple(shape), dtype=dtype, device=meta)
    with torch.no_grad():
        filters = forms.sources.fold(dtype, settings).filters()
        folded = Folded(filters, dtype, settings, None, meta, False)
        return program.maps(
            x.contiguous(memory_format=torch.channels_last), partial(execute, folded)
        )
