"""What the CUDA kernels of the ASPP compute and how they synchronise, on the host without a GPU.

`cuda_on_host/` compiles the same kernels and launches with the C++ compiler. The threads of a
cluster run as fibres in a drawn order, and copies, the copy engine's boxes and wgmma are done at a
drawn time between their issue and the wait for them; cuda_ptx_on_host.h says what that finds.
Products are exact and sums are in float32, as on the hardware, so that an element may be off by the
rounding of the result and of the sums' additions and no more.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from aot_harness import OnHost
from torch import Tensor

from deeplab_fast import _ext, ops, reference
from deeplab_fast.backends import OpDesc
from deeplab_fast.dispatch import limits
from deeplab_fast.ops import aspp_cuda
from deeplab_fast.plan import taps
from deeplab_fast.plan.device import A100, H100, Device
from deeplab_fast.plan.gemm import GemmConfig
from deeplab_fast.plan.packing import PackedBranches
from deeplab_fast.plan.schedule import PartField, schedule
from deeplab_fast.plan.taps import Branch, axis_intervals

pytestmark = pytest.mark.aot

# Unit roundoff.
U = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
# Half the distance of the smallest numbers.
TINY = {torch.float16: 2.0**-25, torch.bfloat16: 0.0}
RANDOM, LATE, EARLY = range(3)

# Rows of the table of tiles: (pixels, filters) of a tile, architecture.
TILES = {
    "sm80-128x256": 0,
    "sm80-128x128": 1,
    "sm80-64x128": 2,
    "sm90-pair-256x256": 3,
    "sm90-128x256": 4,
    "sm90-128x128": 5,
    "sm90-64x256": 6,
}
every_tile = pytest.mark.parametrize("row", TILES.values(), ids=TILES)
# One of each kind: mma, wgmma with a cluster and without, consumers side by side.
each_kind = pytest.mark.parametrize("row", [2, 3, 5, 6], ids=["sm80", "pair", "sm90", "side"])


class Emulated(OnHost):
    """The kernels on the host."""

    def __init__(self, folder: Path) -> None:
        # longjmp moves between stacks, which its checked form takes for an error.
        super().__init__("aspp", folder, "-U_FORTIFY_SOURCE")
        tile = torch.zeros(32, 8, dtype=torch.int64)
        self.tile = tile[: self.run("tiles", tile)]
        self.timing, self.seed = RANDOM, 1

    def aspp(
        self, x, weight, scale, shift, classes, parts, starts, sums, partial, y, row, vectors
    ) -> None:
        """In the place of the private ops `_aspp_cuda` and `_aspp_sm90`."""
        self.call(
            "aspp", x.dtype == torch.float16, row, x, pitch(x), x.shape[1],
            weight, weight.shape[0], weight.stride(0), scale, shift,
            shift.stride(0) if shift.dim() == 2 else 0, y, pitch(y), vectors and whole_vectors(y),
            partial, classes, parts, starts, starts.numel() - 1, sums, sums.shape[0],
            torch.tensor([extent(x), extent(weight)]), self.timing, self.seed,
        )  # fmt: skip

    def image_shift(self, pooled, weight, scale, shift) -> Tensor:
        """In the place of the private op `_image_shift_cuda`."""
        out = torch.full((pooled.shape[0], weight.shape[0]), float("nan"))
        strides = torch.tensor([*pooled.stride(), *weight.stride()])
        self.call(
            "image_shift", pooled.dtype == torch.float16, pooled, weight, strides, scale, shift,
            out, *out.shape, weight.shape[1],
        )  # fmt: skip
        return out


def pitch(x: Tensor) -> Tensor:
    return torch.tensor([x.stride(dim) if x.shape[dim] > 1 else 0 for dim in (0, 2, 3)])


def extent(x: Tensor) -> int:
    """Bytes from the first element to behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def whole_vectors(y: Tensor) -> bool:
    return y.data_ptr() % 16 == 0 and not (pitch(y) % 8).any()


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(tmp_path_factory.mktemp("aspp_on_host"))


class Problem:
    """A call of aspp_branches, what it must give and how far off an element may be."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        branches: tuple[Branch, ...],
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        n, c, height, width = shape
        self.branches = branches
        self.x = torch.randn(n, c, height, width).to(dtype)
        self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.weights = [torch.randn(b.channels, c, b.kernel, b.kernel) for b in branches]
        self.weights = [(w / w[0].numel() ** 0.5).to(dtype) for w in self.weights]
        self.scales = [torch.rand(b.channels) + 0.5 for b in branches]
        self.shifts = [torch.randn(b.channels) for b in branches]
        self.dilations = [b.dilation for b in branches]

    @property
    def args(self) -> tuple:
        return self.x, self.weights, self.scales, self.shifts, self.dilations

    def run(
        self,
        emulated: Emulated,
        row: int,
        programs: int = 3,
        split: bool = False,
        height: int | None = None,
    ) -> Tensor:
        """With a row of the table of tiles, and a list for maps of `height` rows."""
        block_m, block_n = emulated.tile[row, 1:3].tolist()
        n, c, rows, width = self.x.shape
        height = height or rows
        problem = taps.Problem(n, height, width, c, self.branches)
        config = GemmConfig(block_m, block_n, 64, 4, 3, 1, split)
        work = schedule(problem, config, programs)
        assert not split or work.slots > 0
        tables = (work.classes, work.parts, work.starts, work.sums)
        packed = PackedBranches.pack(self.weights, self.scales, self.shifts, self.dilations)
        y = torch.full((n, packed.scale.numel(), height, width), float("nan"), dtype=self.x.dtype)
        y = y.contiguous(memory_format=torch.channels_last)
        partial = torch.full((work.slots, block_m, block_n), float("nan"))
        emulated.aspp(
            self.x, packed.weight, packed.scale, packed.shift,
            *(torch.from_numpy(t.copy()) for t in tables), partial, y, row,
            all(b.channels % 8 == 0 for b in self.branches),
        )  # fmt: skip
        return y

    def check(self, y: Tensor) -> None:
        def lists(f: Callable[[Tensor], Tensor]) -> tuple:
            tensors = (self.weights, self.scales, self.shifts)
            return f(self.x), *([f(t) for t in group] for group in tensors), self.dilations

        exact = reference.aspp_branches(*lists(Tensor.double))
        # Sums of absolute terms; the additions of a float32 sum, in any order, are off by this
        # times their number and the unit roundoff.
        terms = reference.aspp_branches(*lists(lambda t: t.double().abs()))
        depth = max(w[0].numel() for w in self.weights) + 4
        allowed = U[y.dtype] * exact + depth * U[torch.float32] * terms + TINY[y.dtype]
        error = (y.double() - exact).abs()
        assert (error <= allowed).all(), f"off by {(error / allowed).nan_to_num(1e9).max():.3g}"


# The edge, map, branches.
CASES = {
    "odd sizes, 1x1 and 3x3, a partial chunk": (
        (2, 72, 5, 7),
        (Branch(16, 1, 1), Branch(40, 3, 3)),
    ),
    "one pixel": ((1, 8, 1, 1), (Branch(8, 3, 1),)),
    "a line": ((1, 16, 1, 21), (Branch(8, 3, 5),)),
    "dilation beyond the map: one tap": ((1, 64, 4, 6), (Branch(24, 3, 50), Branch(8, 3, 2))),
    "filters of two tiles, none a vector": ((1, 64, 3, 5), (Branch(259, 1, 1), Branch(3, 1, 1))),
    "a class of several tiles, batch": ((7, 16, 9, 11), (Branch(8, 1, 1),)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@every_tile
def test_branches(emulated: Emulated, row: int, case) -> None:
    problem = Problem(*case)
    problem.check(problem.run(emulated, row))


@pytest.mark.parametrize("timing", [RANDOM, LATE, EARLY], ids=["random", "late", "early"])
@each_kind
def test_every_order_of_events(emulated: Emulated, row: int, timing: int, monkeypatch) -> None:
    """More iterations than stages, tiles one behind the other, a tile that a cluster half fills."""
    monkeypatch.setattr(emulated, "timing", timing)
    problem = Problem((1, 136, 2, 2), (Branch(8, 3, 1), Branch(8, 1, 1)), torch.float16)
    for seed in (1, 2):
        monkeypatch.setattr(emulated, "seed", seed)
        problem.check(problem.run(emulated, row, programs=2))


@each_kind
def test_cut_tiles_are_summed_in_order(emulated: Emulated, row: int, monkeypatch) -> None:
    problem = Problem((2, 264, 3, 2), (Branch(24, 3, 1), Branch(16, 1, 1)))
    results = []
    for seed in (1, 2):
        monkeypatch.setattr(emulated, "seed", seed)
        results.append(problem.run(emulated, row, programs=7, split=True))
    problem.check(results[0])
    assert torch.equal(*results)


def test_cut_tiles_of_filters_that_are_no_vector(emulated: Emulated) -> None:
    problem = Problem((1, 264, 3, 4), (Branch(11, 3, 1),))
    problem.check(problem.run(emulated, 2, programs=5, split=True))


@each_kind
def test_not_a_number_stays_where_it_belongs(emulated: Emulated, row: int) -> None:
    problem = Problem((1, 64, 4, 5), (Branch(8, 3, 2), Branch(8, 1, 1)))
    problem.x[0, 3, 0, 1] = float("nan")
    expected = reference.aspp_branches(*problem.args).isnan()
    assert 0 < expected.sum() < expected.numel()
    assert torch.equal(problem.run(emulated, row).isnan(), expected)


@each_kind
def test_reads_outside_the_map_are_seen(emulated: Emulated, row: int) -> None:
    """The emulation itself: the list is of one row more than the map has."""
    problem = Problem((1, 64, 3, 3), (Branch(8, 3, 1),))
    problem.x = problem.x[:, :, :2]
    with pytest.raises(RuntimeError, match="outside the operands"):
        problem.run(emulated, row, height=3)


def test_lists_cover_every_product_once(emulated: Emulated) -> None:
    """Pixels, taps and filter rows that the device code derives, against a loop over all taps."""
    rng = random.Random(0)
    for _ in range(40):
        n, height, width = rng.randint(1, 3), rng.randint(1, 9), rng.randint(1, 9)
        channels = rng.choice([8, 64, 72, 136])
        branches = tuple(
            Branch(rng.choice([1, 8, 130]), rng.choice([1, 3]), rng.randint(1, 11))
            for _ in range(rng.randint(1, 3))
        )
        strides = [height * width * 200 + 8, width * 200, 200]
        block_m, block_n = rng.choice(emulated.tile[:, 1:3].tolist())
        programs, split = rng.randint(1, 9), rng.random() < 0.5
        problem = taps.Problem(n, height, width, channels, branches)
        config = GemmConfig(block_m, block_n, 64, 4, 3, 1, split)
        work = schedule(problem, config, programs)
        assert work.starts[0] == 0 and work.starts[-1] == len(work.parts)
        found: dict[tuple, int] = {}
        for part in work.parts:
            rows = torch.zeros(block_m, dtype=torch.int64)
            count = int(part[PartField.END] - part[PartField.BEGIN])
            reads = torch.zeros(count, 3, dtype=torch.int64)
            classes, one = torch.from_numpy(work.classes.copy()), torch.from_numpy(part.copy())
            emulated.run("walk", classes, one, torch.tensor(strides), block_m, rows, reads)
            branch = int(work.classes[part[PartField.CLASS], -1])
            pixels = int(work.classes[part[PartField.CLASS], 4]) - int(part[PartField.FIRST])
            for pixel in rows[: min(block_m, pixels)].tolist():
                for offset, row, chunk in reads.tolist():
                    key = (branch, int(part[PartField.FILTER]), pixel, offset - chunk, row, chunk)
                    found[key] = found.get(key, 0) + 1
        assert found == dict.fromkeys(
            products(n, height, width, channels, branches, strides, block_n), 1
        )


def products(n, height, width, channels, branches, strides, block_n):
    """(branch, first filter, offset of the pixel, of the tap, row of the filters, chunk)."""
    first_row = 0
    for index, b in enumerate(branches):
        for tap_row, tap_col in itertools.product(range(b.kernel), repeat=2):
            dy, dx = ((t - b.kernel // 2) * b.dilation for t in (tap_row, tap_col))
            row = first_row + (tap_row * b.kernel + tap_col) * b.channels
            for image, y, x in itertools.product(range(n), range(height), range(width)):
                if not (0 <= y + dy < height and 0 <= x + dx < width):
                    continue
                pixel = image * strides[0] + y * strides[1] + x * strides[2]
                tap = dy * strides[1] + dx * strides[2]
                for first in range(0, b.channels, block_n):
                    for chunk in range(0, channels, 64):
                        yield index, first, pixel, tap, row, chunk
        first_row += b.taps * b.channels


def test_offsets_are_64_bits_wide(emulated: Emulated) -> None:
    """A pixel and a tap that lie more than 2^32 elements away."""
    work = schedule(
        taps.Problem(2, 3, 3, 64, (Branch(8, 3, 1),)), GemmConfig(64, 128, 64, 4, 3, 1), 1
    )
    last = next(p for p in work.parts if work.classes[p[0], 0] == 2 and work.classes[p[0], 2] == 2)
    strides = torch.tensor([2**36, 2**34, 2**33])
    rows, reads = torch.zeros(2, dtype=torch.int64), torch.zeros(last[4], 3, dtype=torch.int64)
    tensors = (torch.from_numpy(work.classes.copy()), torch.from_numpy(last.copy()))
    emulated.run("walk", *tensors, strides, 2, rows, reads)
    assert rows.tolist() == [2 * 2**34 + 2 * 2**33, 2**36 + 2 * 2**34 + 2 * 2**33]
    assert reads[0, 0] == -(2**34) - 2**33


# The host side: what Python makes of a call before it reaches the kernels.


@pytest.fixture
def on_host(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """The CUDA implementation with the emulated kernels in the place of the private ops."""
    names = ("architecture", "block_m", "block_n", "block_c", "threads", "stages", "cluster",
             "occupancy", "shared_bytes")  # fmt: skip
    table = []
    for architecture, m, n, threads, stages, cluster, occupancy, shared in emulated.tile.tolist():
        row = (architecture, m, n, 64, threads, stages, cluster, occupancy, shared)
        table.append(aspp_cuda.Tile(**dict(zip(names, row, strict=True))))
    monkeypatch.setattr(aspp_cuda, "tiles", lambda: tuple(table))
    monkeypatch.setattr(aspp_cuda, "architecture", lambda capability: 80)
    monkeypatch.setattr(aspp_cuda, "_run_sm80", emulated.aspp)
    monkeypatch.setattr(aspp_cuda, "_run_sm90", emulated.aspp)
    monkeypatch.setattr(aspp_cuda, "image_shift", emulated.image_shift)
    aspp_cuda.choose.cache_clear()
    yield emulated
    aspp_cuda.choose.cache_clear()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "NCHW": lambda x: x.contiguous(),
    "channels of a larger map": lambda x: torch.cat([x, x, x], 1).contiguous(
        memory_format=torch.channels_last
    )[:, x.shape[1] : 2 * x.shape[1]],
    "rows with gaps": lambda x: x.repeat_interleave(2, 2).contiguous(
        memory_format=torch.channels_last
    )[:, :, ::2],
    "address that is no multiple of 16": lambda x: torch.cat(
        [x.permute(0, 2, 3, 1).flatten()[:4], x.permute(0, 2, 3, 1).flatten()]
    )[4:].view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(on_host: Emulated, layout, nan_poison: None) -> None:
    problem = Problem((2, 40, 3, 4), (Branch(8, 3, 1), Branch(16, 1, 1)))
    problem.x = layout(problem.x)
    y = aspp_cuda.aspp_branches(*problem.args)
    assert y.is_contiguous(memory_format=torch.channels_last)
    problem.check(y)


def test_packed_weights_are_not_copied(on_host: Emulated, monkeypatch) -> None:
    problem = Problem((1, 64, 3, 3), (Branch(8, 3, 1), Branch(16, 1, 1)))
    packed = PackedBranches.pack(*problem.args[1:])
    seen = []
    run = aspp_cuda._run_sm80
    monkeypatch.setattr(aspp_cuda, "_run_sm80", lambda *args: (seen.append(args[1]), run(*args)))
    views = (packed.weights, packed.scales, packed.shifts, packed.dilations)
    problem.check(aspp_cuda.aspp_branches(problem.x, *views))
    assert seen[0].data_ptr() == packed.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n", "channels", "pooled", "filters"),
    [
        pytest.param(3, 64, 40, 24, id="tiles that several images share"),
        pytest.param(2, 72, 13, 9, id="rows of the weight at odd addresses, filters no vector"),
        pytest.param(1, 8, 1, 130, id="one pooled channel, filters of two tiles"),
    ],
)
def test_project(on_host: Emulated, n, channels, pooled, filters, dtype, nan_poison) -> None:
    branches = torch.randn(n, channels, 3, 4).to(dtype)
    vector = torch.randn(n, pooled).relu().to(dtype)
    weight = (torch.randn(filters, channels + pooled, 1, 1) / (channels + pooled) ** 0.5).to(dtype)
    scale, shift = torch.rand(filters) + 0.5, torch.randn(filters)
    args = (branches, vector, weight, scale, shift)
    y = aspp_cuda.aspp_project(*args)
    exact = reference.aspp_project(*(a.double() for a in args))
    terms = reference.aspp_project(*(a.double().abs() for a in args))
    depth = channels + pooled + 6
    allowed = U[dtype] * exact + depth * U[torch.float32] * terms + TINY[dtype]
    assert ((y.double() - exact).abs() <= allowed).all()


def test_maps_without_images(on_host: Emulated) -> None:
    problem = Problem((0, 64, 3, 3), (Branch(8, 3, 1),))
    assert aspp_cuda.aspp_branches(*problem.args).shape == (0, 8, 3, 3)


def shape_of(device, n: int, size: int, filters: int = 256, **forced) -> aspp_cuda.Choice:
    rates = (12, 24, 36) if size > 40 else (6, 12, 18)
    branches = (Branch(filters, 1, 1), *(Branch(filters, 3, d) for d in rates))
    return aspp_cuda.choose(taps.Problem(n, size, size, 2048, branches), device, **forced)


def one_tap(height: int, width: int, filters: int = 256) -> aspp_cuda.Choice:
    return aspp_cuda.choose(taps.Problem(1, height, width, 64, (Branch(filters, 1, 1),)), H100)


@pytest.fixture
def on_hopper(on_host: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aspp_cuda, "architecture", lambda capability: 90)


@pytest.mark.parametrize(
    ("n", "size", "filters", "block", "split"),
    [
        pytest.param(16, 65, 256, (256, 256, 2), False, id="large: pairs, whole tiles"),
        pytest.param(1, 65, 256, (256, 256, 2), True, id="one image: few tiles, cut"),
        pytest.param(1, 33, 256, (128, 128, 1), True, id="few pixels: small tiles, cut"),
        pytest.param(4, 65, 129, (256, 256, 2), False, id="more filters than a narrow tile"),
        pytest.param(4, 65, 128, (128, 128, 1), False, id="few filters: narrow tiles"),
    ],
)
def test_tiles_chosen_for_hopper(on_hopper: None, n, size, filters, block, split) -> None:
    choice = shape_of(H100, n, size, filters)
    assert (choice.tile.block_m, choice.tile.block_n, choice.tile.cluster) == block
    assert choice.config.split == split
    assert choice.programs * choice.tile.cluster == 132
    assert choice.tile == aspp_cuda.tiles()[choice.row]


@pytest.mark.parametrize(
    ("height", "width", "filters", "block"),
    [
        pytest.param(66, 256, 256, (256, 256), id="66 tiles: every other multiprocessor"),
        pytest.param(65, 256, 256, (128, 256), id="65 tiles: no pairs"),
        pytest.param(65, 128, 256, (128, 128), id="65 tiles of half the pixels: fewer filters"),
        pytest.param(1, 1, 256, (64, 256), id="never enough: the last"),
        pytest.param(1, 1, 128, (128, 128), id="never enough, few filters: the last of those"),
    ],
)
def test_tiles_of_one_tap_are_never_cut(on_hopper: None, height, width, filters, block) -> None:
    choice = one_tap(height, width, filters)
    assert (choice.tile.block_m, choice.tile.block_n) == block and not choice.config.split


def test_forced_rows_and_cuts(on_host: Emulated) -> None:
    for row, tile in enumerate(aspp_cuda.tiles()):
        for split in (True, False):
            if tile.architecture == 80:
                choice = shape_of(A100, 1, 33, row=row, split=split)
                assert (choice.row, choice.tile, choice.config.split) == (row, tile, split)
                continue
            with pytest.raises(ValueError, match=rf"capability \(8, 0\) .* is row {row}"):
                shape_of(A100, 1, 33, row=row, split=split)


def test_a_forced_row_may_be_wider_than_the_filters(on_hopper: None) -> None:
    (pair,) = (i for i, t in enumerate(aspp_cuda.tiles()) if t.cluster == 2)
    assert shape_of(H100, 16, 65, 48).tile.block_n == 128
    assert shape_of(H100, 16, 65, 48, row=pair).tile.block_n == 256
    # Without a row of its own architecture a device has none.
    with pytest.raises(ValueError, match="is row 0"):
        shape_of(H100, 16, 65, row=0)


def test_tiles_fit_the_device(on_host: Emulated) -> None:
    """sm_86 and sm_89 have 100 KB where sm_80 has 164."""
    small = Device(**{**vars(A100), "name": "sm_89", "shared": 100 * 1024})
    for device in (A100, small):
        for n, size in ((1, 33), (16, 65)):
            choice = shape_of(device, n, size)
            used = choice.config.occupancy * (choice.tile.shared_bytes + 1024)
            assert used <= device.shared
            assert choice.tile.architecture == 80
    tiny = Device(**{**vars(A100), "shared": 32 * 1024})
    with pytest.raises(ValueError, match=r"no tile for compute capability .* 32 KB"):
        shape_of(tiny, 1, 33)
    with pytest.raises(ValueError, match=r"100 KB of shared memory is row 0"):
        shape_of(small, 1, 33, row=0)


def test_reasons_name_what_is_wrong(on_host: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "extension", lambda extension, op: [])
    monkeypatch.setattr(_ext, "CPU", type("Built", (), {"loaded": True, "module": Path()}))
    monkeypatch.setattr(Path, "aspp_tiles", None, raising=False)

    def reasons(dtype=torch.bfloat16, channels=2048, device="cuda", capability=(9, 0), n=16):
        params = {"weights": ((256, channels, 3, 3),), "dilations": (12,)}
        shape = (n, channels, 65, 65)
        desc = OpDesc("aspp_branches", device, dtype, shape, params, capability)
        return aspp_cuda.reasons(desc)

    assert reasons() == []
    assert "the input is on cpu" in reasons(device="cpu", capability=None)[0]
    assert "needs compute capability 8.0, the device has 7.5" in reasons(capability=(7, 5))[0]
    assert "the input is float32" in reasons(torch.float32)[0]
    assert "groups of 8, the input has 2044" in reasons(channels=2044)[0]
    assert "counts at most 2147483647 pixels" in reasons(n=600_000)[0]


def test_ops_have_the_backend_and_meta_functions() -> None:
    x = torch.empty(2, 64, 9, 9, dtype=torch.bfloat16, device="meta")
    weights = [torch.empty(16, 64, 3, 3, dtype=torch.bfloat16, device="meta")]
    vectors = [torch.empty(16, device="meta")]
    assert ops.aspp_branches(x, weights, vectors, vectors, [2]).shape == (2, 16, 9, 9)
    desc = ops.describe("aspp_branches", x, weights, vectors, vectors, [2])
    assert any("needs CUDA tensors" in r for r in aspp_cuda.reasons(desc))


def test_extension_hands_out_the_same_table(emulated: Emulated) -> None:
    if not hasattr(_ext.CPU.module, "aspp_tiles"):
        pytest.skip(f"{_ext.CPU.name} is not built, or of older sources: {_ext.CPU.reason}")
    names = ("architecture", "block_m", "block_n", "threads", "stages", "cluster", "occupancy",
             "shared_bytes")  # fmt: skip
    aspp_cuda.tiles.cache_clear()
    found = [[getattr(tile, name) for name in names] for tile in aspp_cuda.tiles()]
    assert found == emulated.tile.tolist()
    assert all(tile.block_c == 64 for tile in aspp_cuda.tiles())


def test_intervals_are_what_the_lists_rest_on() -> None:
    """A tap of a class is inside the map for all its pixels: no row of a tile is masked."""
    for size, dilation in itertools.product(range(1, 12), range(1, 14)):
        for interval in axis_intervals(size, 3, dilation):
            for tap in range(interval.tap, interval.tap + interval.taps):
                shift = (tap - 1) * dilation
                assert interval.first + shift >= 0
                assert interval.first + interval.size - 1 + shift < size
