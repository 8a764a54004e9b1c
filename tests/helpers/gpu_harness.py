"""What the tests of tests/gpu share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deeplab_fast as dlf
from deeplab_fast.backends import BackendUnavailable

DEVICE = "cuda"
HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = list(HALF_STEP)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
half_dtypes = pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
# (filters, kernel, dilation) of each branch.
OS8 = ((256, 1, 1), (256, 3, 12), (256, 3, 24), (256, 3, 36))
OS16 = ((256, 1, 1), (256, 3, 6), (256, 3, 12), (256, 3, 18))

needs_two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def needs_memory(gib: int) -> None:
    if torch.cuda.get_device_properties(DEVICE).total_memory < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of GPU memory")


@contextmanager
def use_backend(backend: str, optional: Sequence[str] = ("cuda",)) -> Iterator[None]:
    """As `deeplab_fast.use_backend`; skips the test where an optional backend does not run."""
    try:
        with dlf.use_backend(backend):
            yield
    except BackendUnavailable as error:
        if backend not in optional:
            raise
        pytest.skip(str(error))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def conv_bn(x, weight, scale, shift, residual=None, relu=True, **options) -> Tensor:
    """Convolution, batch norm's scale and shift, sum and ReLU as PyTorch has them, one by one."""
    y = F.conv2d(x, weight, **options)
    y = y * scale.to(y.dtype)[:, None, None] + shift.to(y.dtype)[:, None, None]
    if residual is not None:
        y = y + residual
    return torch.relu(y) if relu else y


def branches_by_pytorch(x, weights, scales, shifts, dilations) -> Tensor:
    """`aspp_branches` by `conv_bn`."""
    parts = zip(weights, scales, shifts, dilations, strict=True)
    return torch.cat(
        [conv_bn(x, w, a, b, padding=d * (w.shape[-1] // 2), dilation=d) for w, a, b, d in parts], 1
    )


def assert_error(
    got: Tensor,
    torch_path: Tensor,
    exact: Tensor,
    roundings: int = 1,
    added: Tensor | float = 0.0,
) -> None:
    """The largest error is at most twice that of PyTorch's own operations in the same dtype on the
    same values, plus `roundings` of the largest result, plus what is `added`."""
    assert got.shape == exact.shape and got.dtype == torch_path.dtype
    allowed = 2 * (torch_path.double() - exact).abs().max() + added
    allowed += roundings * exact.abs().max() * HALF_STEP[got.dtype]
    assert (got.double() - exact).abs().max() <= allowed


def assert_as_good(
    got: Tensor,
    torch_path: Tensor,
    exact: Tensor,
    roundings: int = 1,
    added: Tensor | float = 0.0,
) -> None:
    """`assert_error`, with the layout of maps that the ops promise."""
    assert got.dim() != 4 or got.is_contiguous(memory_format=torch.channels_last)
    assert_error(got, torch_path, exact, roundings, added)


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """To the bit."""
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def replayed(run: Callable[[], Sequence[Tensor]], change: Callable[[], object]) -> list[Tensor]:
    """What a CUDA graph of `run` gives when it is replayed after a change of its inputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # What is made at a first call, such as lists of tiles, cannot be made in a capture.
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    change()
    graph.replay()
    return [t.clone() for t in captured]


def assert_capture_says_what_to_do(run: Callable[[], object]) -> None:
    """Of a size that has not run before."""
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="run the op once at this size before"):
        with torch.cuda.graph(graph):
            run()


def on_a_busy_stream(run: Callable[[], Sequence[Tensor]], late: Tensor) -> Sequence[Tensor]:
    """What `run` gives on a side stream that is kept busy, with an input that is zeros until then:
    a launch elsewhere would read the zeros."""
    values = late.clone()
    late.zero_()
    stream = torch.cuda.Stream()
    busy = torch.randn(8192, 8192, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(8):
            busy = (busy @ busy).clamp(-1, 1)
        late.copy_(values)
        got = run()
    stream.synchronize()
    return got


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that the allocator hands out at a time while `run` runs, beside what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before
