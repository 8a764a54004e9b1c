"""``python -m deeplab_fast.demo``: photos in, label maps out, and the time beside torchvision's."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from deeplab_fast import DeepLabV3
    from deeplab_fast.data import ClassSet

__all__ = ["main", "photos"]

# Photos that come inside the installed packages, no download.
# The embedded model knows the things of a street; of these photos the first has most of them.
_PHOTOS = (
    ("sklearn", "datasets/images/china.jpg"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/motorcycle_left.png"),
    ("sklearn", "datasets/images/flower.jpg"),
)
_QUICK_PHOTOS = 1
_EMBEDDED = "camvid"
_TIMING_SIZE = 520
_QUICK_TIMING_SIZE = 257
# Seconds for the timed runs, so that the demo stays short on a busy machine.
_TIMING_BUDGET = 40.0


@dataclass(frozen=True)
class _Segmented:
    name: str
    image: np.ndarray
    overlay: np.ndarray
    areas: list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns 0, or 2 where the weights given do not exist or fit no model."""
    parser = argparse.ArgumentParser(prog="python -m deeplab_fast.demo", description=__doc__)
    parser.add_argument("--output", default="demo_output", help="folder for the pictures")
    parser.add_argument("--weights", help="a trained DeepLabv3 in place of the embedded one")
    parser.add_argument("--quick", action="store_true", help="fewer photos, smaller timing")
    arguments = parser.parse_args(argv)

    import torch

    from deeplab_fast import __version__

    print(f"deeplab_fast {__version__}, torch {torch.__version__}, {_machine()}")
    try:
        _segment_photos(arguments.weights, Path(arguments.output), arguments.quick)
    except (ValueError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    _time_beside_torchvision(arguments.quick)
    return 0


def photos() -> list[Path]:
    """The photos inside the packages that are installed, the most telling first."""
    found = []
    for package, name in _PHOTOS:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin).parent / name
            if path.is_file():
                found.append(path)
    return found


def _segment_photos(weights: str | None, output: Path, quick: bool) -> None:
    import deeplab_fast as dlf
    from deeplab_fast.data import ClassSet, class_set, generic_classes, read_image
    from deeplab_fast.dispatch.files import write_atomically
    from deeplab_fast.engine.outputs import class_areas, overlay, write_outputs

    if weights is None:
        model = dlf.load(_EMBEDDED)
        print(
            f'\nModel: deeplab_fast.load("{_EMBEDDED}"), road scenes, {model.num_classes} classes: '
            f"{', '.join(model.classes or ())}"
        )
    else:
        model = cast(dlf.DeepLabV3, dlf.from_checkpoint(weights).eval())
        print(f"\nModel: {weights}, {model.num_classes} classes")
    if model.classes is not None and model.palette is not None:
        name = _EMBEDDED if weights is None else "own"
        classes = ClassSet(name, model.classes, model.palette).of_labels()
    elif model.num_classes == 21:
        classes = class_set("voc")
    else:
        names = model.classes
        count = model.num_classes if names is None else len(names)
        classes = generic_classes(count, names).of_labels()
    assert model.config is not None
    found = photos()[: _QUICK_PHOTOS if quick else None]
    if not found:
        print("No photos: neither scikit-image nor scikit-learn is installed with its pictures.")
        return
    print(f"\n{'photo':<18}{'size':>10}{'ms':>7}   class areas")
    done = []
    # The first run compiles and allocates.
    model.predict(read_image(found[0]))
    for path in found:
        image = read_image(path)
        start = time.perf_counter()
        labels = model.predict(image)
        took = time.perf_counter() - start
        write_outputs(
            output,
            path.stem,
            image,
            labels,
            classes,
            source=path.name,
            model=model.config[0],
            backend=_backend_of(model, image.shape[:2]),
        )
        areas = class_areas(labels, classes)
        # What would be printed as 0.0 %.
        areas = [area for area in areas if area["fraction"] >= 0.0005]
        shown = ", ".join(f"{a['name']} {a['fraction']:.1%}" for a in areas)
        size = f"{image.shape[1]}x{image.shape[0]}"
        print(f"{path.stem:<18}{size:>10}{1000 * took:>7.0f}   {shown}")
        done.append(_Segmented(path.stem, image, overlay(image, labels, classes), areas))
    sheet = _contact_sheet(done, classes)
    sheet_path = output / "contact_sheet.png"
    write_atomically([(sheet_path, lambda file: sheet.save(file, format="PNG"))])
    print(f"\nWrote label maps, overlays and class areas of {len(done)} photos to {output}/")
    print(f"All of them side by side: {sheet_path}")
    print(
        "The same for your photos:\n"
        f"  deeplab-fast predict PHOTO... --output DIR --weights {weights or _EMBEDDED}"
    )


def _backend_of(model: DeepLabV3, size: tuple[int, int]) -> str | None:
    import torch

    import deeplab_fast as dlf

    if model.num_classes == 1:
        # A sigmoid has no op of its own.
        return "reference"
    logits = torch.empty(1, model.num_classes, 8, 8)
    return dlf.why("upsample_argmax", logits, size, align_corners=model.align_corners).chosen


_ROW_HEIGHT, _MARGIN, _LEGEND_WIDTH = 260, 12, 230


def _contact_sheet(done: Sequence[_Segmented], classes: ClassSet) -> Image.Image:
    """Rows of photo | overlay | legend, two photos a row."""
    from PIL import Image, ImageDraw, ImageFont

    font, bold = ImageFont.load_default(15), ImageFont.load_default(18)
    widths = [round(s.image.shape[1] * _ROW_HEIGHT / s.image.shape[0]) for s in done]
    cell = 2 * max(widths) + _LEGEND_WIDTH + 3 * _MARGIN
    columns = 2 if len(done) > 3 else 1
    rows = -(-len(done) // columns)
    step = _ROW_HEIGHT + 2 * _MARGIN
    sheet = Image.new("RGB", (columns * cell + _MARGIN, rows * step + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (one, width) in enumerate(zip(done, widths, strict=True)):
        left, top = _MARGIN + i % columns * cell, _MARGIN + i // columns * step
        for picture in (one.image, one.overlay):
            small = Image.fromarray(picture).resize((width, _ROW_HEIGHT), Image.Resampling.LANCZOS)
            sheet.paste(small, (left, top))
            left += width + _MARGIN
        draw.text((left, top), one.name, fill="black", font=bold)
        for j, area in enumerate(one.areas[:8]):
            y = top + 32 + 26 * j
            colour = classes.palette[area["id"]]
            # The background keeps the photo's colours in the overlay.
            is_background = area["id"] == classes.background
            draw.rectangle(
                (left, y, left + 18, y + 18),
                fill="white" if is_background else colour,
                outline="black",
            )
            text = f"{area['name']}  {area['fraction']:.1%}"
            draw.text((left + 26, y), text, fill="black", font=font)
    return sheet


def _time_beside_torchvision(quick: bool) -> None:
    import torch

    import deeplab_fast as dlf
    from deeplab_fast.testing import import_torchvision

    size = _QUICK_TIMING_SIZE if quick else _TIMING_SIZE
    print(f"\nTime of deeplabv3_resnet50, {size}x{size}, batch 1, fp32, labels of one photo, CPU")
    try:
        import_torchvision()
    except ImportError as error:
        print(f"  torchvision cannot be imported ({error}): nothing to compare with.")
        theirs = None
    else:
        from torchvision.models.segmentation import deeplabv3_resnet50

        theirs = deeplabv3_resnet50(weights=None, weights_backbone=None)
    ours = dlf.deeplabv3_resnet50()
    x = _timing_input(size)
    _spread_labels(ours, x)
    runs: dict[str, Callable[[], torch.Tensor]] = {"deeplab_fast": lambda: ours.predict(x)}
    if theirs is not None:
        theirs.load_state_dict(ours.state_dict(), strict=True)
        theirs.eval()
        runs["torchvision"] = lambda: theirs(x)["out"].argmax(1)
    with torch.inference_mode():
        start = time.perf_counter()
        labels = {name: run() for name, run in runs.items()}
        warm_up = time.perf_counter() - start
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        rounds = max(2, min(5, int(_TIMING_BUDGET / warm_up)))
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    calls = {
        "deeplab_fast": "model.predict(x)",
        "torchvision": 'model(x)["out"].argmax(1), as shipped',
    }
    for name, value in median.items():
        print(f"  {name:<14}{1000 * value:>7.0f} ms   {calls[name]}")
    if theirs is not None:
        same = (labels["deeplab_fast"] == labels["torchvision"]).float().mean().item()
        print(
            f"  {median['torchvision'] / median['deeplab_fast']:.2f}x torchvision's speed;"
            f" {same:.3%} of the labels agree ({len(labels['torchvision'].unique())} classes)"
        )
    print(
        f"  Medians of {rounds} interleaved runs after one warm-up each; the same random weights,"
        " loaded strictly."
    )
    _print_backends()


def _timing_input(size: int) -> torch.Tensor:
    import torch

    from deeplab_fast.data import Preprocess, read_image

    step = Preprocess(size=(size, size))
    if found := photos():
        return step(read_image(found[0]))
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def _spread_labels(model: DeepLabV3, x: torch.Tensor) -> None:
    """Makes an untrained model's labels differ over the picture, so that comparing them means much.

    Batch norm statistics come from a small batch, and the last bias makes all classes equal on
    average; without the two every pixel gets the same class.
    """
    import torch

    small = torch.nn.functional.interpolate(x, (129, 129), mode="bilinear", antialias=True)
    with torch.no_grad(), _momentum_one(model):
        model.train()(torch.cat([small, small.flip(-1)]))
        model.eval()
        last = [m for m in model.classifier.modules() if isinstance(m, torch.nn.Conv2d)][-1]
        assert last.bias is not None
        last.bias -= model.forward_logits(small).mean((0, 2, 3))


@contextmanager
def _momentum_one(model: DeepLabV3) -> Iterator[None]:
    import torch

    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 1.0
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


def _print_backends() -> None:
    import torch

    from deeplab_fast import info

    (shape,) = (s for s in info.STANDARD_SHAPES if s.name == "r50-os8-520-b1")
    by_backend: dict[str, list[str]] = {}
    for why in info.what_runs(shape, torch.float32, "cpu"):
        # The ops that predict calls; the model's own layers are PyTorch's.
        if why.desc.op in ("upsample_argmax", "upsample_softmax_add"):
            by_backend.setdefault(str(why.chosen), []).append(why.desc.op)
    for backend, names in by_backend.items():
        print(f"  Backend {backend}: {', '.join(names)}")
    print("  Why: python -m deeplab_fast.info")


def _machine() -> str:
    import torch

    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    sys.exit(main())
