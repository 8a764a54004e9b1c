"""How busy many threads are in the tiled convolutions of a ResNet-50: its units, simulated.

    python -m bench.cpu_units --threads 2 4 16 64

The units are those that the C++ code makes for so many threads, their times those of
`ops.cpu_rates`. Threads are taken to be equal and never interrupted, and memory to be as fast for
many as for one: what is left is how the work is cut.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deeplab_fast.ops.cpu_units import Unit, tile_units


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution with stride 1; `count` of them are in the model."""

    name: str
    channels: int
    outputs: int
    size: int
    dilation: int
    count: int = 1
    coarse: bool = False


# At output stride 8, of one image of 520x520.
RESNET50 = (
    Layer("layer1", 64, 64, 130, 1, 3),
    Layer("layer2", 128, 128, 65, 1, 3),
    Layer("layer3.0", 256, 256, 65, 1),
    Layer("layer3", 256, 256, 65, 2, 5),
    Layer("layer4.0", 512, 512, 65, 2),
    Layer("layer4", 512, 512, 65, 4, 2),
    *(Layer(f"aspp {rate}", 2048, 256, 65, rate, coarse=True) for rate in (12, 24, 36)),
)


def busy(units: Iterable[Unit], threads: int) -> tuple[float, float]:
    """(time until all units are done, part of it that the threads work)."""
    free = [0.0] * threads
    stage, begins, ends, worked = 0, 0.0, 0.0, 0.0
    for unit in units:
        if unit.stage != stage:
            stage, begins = unit.stage, ends
        end = max(heapq.heappop(free), begins) + unit.seconds
        heapq.heappush(free, end)
        ends, worked = max(ends, end), worked + unit.seconds
    return ends, worked / (threads * ends)


def table(threads: Sequence[int], cache_bytes: int = 0) -> str:
    """Percent of the time that threads work, a row for each kind of layer, as Markdown."""
    lines = [
        f"| layer | {' | '.join(map(str, threads))} |",
        f"|---|{'--:|' * len(threads)}",
    ]
    total = {count: (0.0, 0.0) for count in threads}
    for layer in RESNET50:
        cells = []
        for count in threads:
            shape = (1, layer.channels, layer.size, layer.size)
            units = tile_units(
                shape,
                layer.outputs,
                layer.dilation,
                count,
                coarse=layer.coarse,
                cache_bytes=cache_bytes,
            )
            seconds, part = busy(units, count)
            cells.append(f"{100 * part:.0f}")
            all_seconds, worked = total[count]
            seconds *= layer.count
            total[count] = all_seconds + seconds, worked + seconds * part
        lines.append(f"| {layer.name} | {' | '.join(cells)} |")
    parts = [f"{100 * worked / seconds:.0f}" for seconds, worked in total.values()]
    lines.append(f"| all | {' | '.join(parts)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 4, 16, 64])
    parser.add_argument("--cache-mib", type=int, default=32, help="third-level cache of a domain")
    options = parser.parse_args(argv)
    print(table(options.threads, options.cache_mib << 20))
    return 0


if __name__ == "__main__":
    sys.exit(main())
