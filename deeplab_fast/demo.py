"""``python -m deeplab_fast.demo``: a street photo in, a picture of its labels out, and times."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from deeplab_fast import DeepLabV3
    from deeplab_fast.data import ClassSet

__all__ = ["STREET", "main"]

STREET = Path(__file__).parent / "embedded" / "street.jpg"
"""The photo of a street that comes with the package; ``street.txt`` has its author and licence."""

_EMBEDDED = "camvid"
_PRECISIONS = ("fp32", "bf16", "int8")
_TIMING_SIZE = 520
_QUICK_TIMING_SIZE = 257
# Seconds for the timed runs, so that the demo stays short on a busy machine: of the precisions,
# and beside torchvision.
_PRECISION_BUDGET, _TIMING_BUDGET = 8.0, 40.0
# 185 kB for the street; 85 took 212 kB and its letters looked the same.
_JPEG_QUALITY = 80


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns 0, or 2 where an argument is not usable: weights that do not exist or
    fit no model, a photo that cannot be read, a picture that cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m deeplab_fast.demo", description=__doc__)
    parser.add_argument("--output", default="demo_output", help="folder for the picture")
    parser.add_argument("--weights", help="a trained DeepLabv3 in place of the embedded one")
    parser.add_argument(
        "--photo", help="a photo in place of the street that comes with the package"
    )
    parser.add_argument("--quick", action="store_true", help="smaller timing beside torchvision")
    parser.add_argument(
        "--picture", metavar="FILE", help="write only the picture, to this .png or .jpg"
    )
    arguments = parser.parse_args(argv)

    import torch

    import deeplab_fast as dlf

    photo = STREET if arguments.photo is None else Path(arguments.photo)
    picture = Path(arguments.output, f"{photo.stem}.png")
    try:
        if arguments.picture is not None:
            _show(arguments.weights, photo, _checked(Path(arguments.picture)))
            return 0
        print(f"deeplab_fast {dlf.__version__}, torch {torch.__version__}, {_machine()}")
        model, image = _show(arguments.weights, photo, picture)
        weights = arguments.weights or _EMBEDDED
        print(
            "Labels, overlays and class areas of your photos, as files:\n"
            f"  deeplab-fast predict PHOTO... --output DIR --weights {weights}"
        )
    except (ValueError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    _time_precisions(model, image)
    _time_beside_torchvision(arguments.quick)
    return 0


def _checked(picture: Path) -> Path:
    if picture.suffix.lower() not in (".png", ".jpg"):
        raise ValueError(
            f"--picture is {picture}, expected a file that ends in .png or .jpg; rename it"
        )
    return picture


def _show(weights: str | None, photo: Path, picture: Path) -> tuple[DeepLabV3, np.ndarray]:
    """Segments the photo and writes the picture."""
    import deeplab_fast as dlf
    from deeplab_fast.data import read_image
    from deeplab_fast.dispatch.files import write_atomically
    from deeplab_fast.engine.outputs import class_areas
    from deeplab_fast.engine.pictures import png_writer, prediction_image

    image = read_image(photo)
    if weights is None:
        model = dlf.load(_EMBEDDED)
        name = f'deeplab_fast.load("{_EMBEDDED}"), for road scenes'
    else:
        model = cast(dlf.DeepLabV3, dlf.from_checkpoint(weights).eval())
        name = weights
    classes = _classes(model, "own" if weights else _EMBEDDED)
    print(f"\nModel: {name}; {len(classes)} classes: {', '.join(classes.classes)}")
    labels, probabilities = model.predict(image, return_prob=True)
    if model.num_classes == 1:
        # Given is that of the one class, chosen or not.
        probabilities = np.maximum(probabilities, 1 - probabilities)
    # Not what would be printed as 0.0 %.
    areas = [a for a in class_areas(labels, classes) if a["fraction"] >= 0.0005]
    print(f"Photo: {photo}, {image.shape[1]}x{image.shape[0]}")
    shown = ", ".join(f"{a['name']} {a['fraction']:.1%}" for a in areas)
    print(f"Areas: {shown}")
    drawn = prediction_image(image, labels, probabilities, classes)
    picture.parent.mkdir(parents=True, exist_ok=True)
    jpeg = picture.suffix.lower() == ".jpg"
    write_atomically([(picture, _jpeg_writer(drawn) if jpeg else png_writer(drawn))])
    print(f"Picture (photo, labels, labels on the photo, uncertainty): {picture}")
    return model, image


def _jpeg_writer(image: Image.Image) -> Callable[[BinaryIO], object]:
    return lambda file: image.save(
        file, format="JPEG", quality=_JPEG_QUALITY, optimize=True, progressive=True
    )


def _classes(model: DeepLabV3, name: str) -> ClassSet:
    from deeplab_fast.data import ClassSet, class_set, generic_classes

    if model.classes is not None and model.palette is not None:
        return ClassSet(name, model.classes, model.palette).of_labels()
    if model.num_classes == 21:
        return class_set("voc")
    count = model.num_classes if model.classes is None else len(model.classes)
    return generic_classes(count, model.classes).of_labels()


def _time_precisions(model: DeepLabV3, image: np.ndarray) -> None:
    """Prints the time of each precision on this CPU and how many labels it shares with fp32, or
    why it does not run."""
    height, width = image.shape[:2]
    print(f"\nTime of model.predict(photo), {width}x{height}, on the CPU, by precision")
    labels: dict[str, np.ndarray] = {}
    reasons: dict[str, str] = {}
    ranges = ""
    for name in _PRECISIONS:
        try:
            if name == "int8":
                ranges = _calibrated(model, image)
            # The first run prepares weights and memory.
            labels[name] = model.predict(image, precision=name)
        except ValueError as error:
            reasons[name] = str(error).removeprefix(f"precision {name}: ")
    seconds: dict[str, list[float]] = {name: [] for name in labels}
    rounds, end = 0, time.perf_counter() + _PRECISION_BUDGET
    while rounds < 3 or (rounds < 9 and time.perf_counter() < end):
        rounds += 1
        for name, values in seconds.items():
            start = time.perf_counter()
            model.predict(image, precision=name)
            values.append(time.perf_counter() - start)
    print(f"  {'precision':<11}{'ms':>6}{'labels as in fp32':>20}")
    for name in _PRECISIONS:
        if name in reasons:
            print(f"  {name:<11}{'-':>6}   does not run here: {reasons[name]}")
            continue
        same = (labels[name] == labels["fp32"]).mean()
        print(f"  {name:<11}{1000 * statistics.median(seconds[name]):>6.0f}{same:>20.2%}")
    print(f"  Medians of {rounds} interleaved runs after one warm-up each.")
    if "int8" in labels:
        print(f"  int8: {ranges}.")


def _calibrated(model: DeepLabV3, image: np.ndarray) -> str:
    """What the model's ranges for int8 are from; without any, they are measured on the photo.

    Raises:
        CalibrationError: it cannot be; a ValueError too.
    """
    from deeplab_fast.program.calibrate import CalibrationWarning

    if model.calibration is not None:
        return f"its ranges came with the weights, measured on {model.calibration.images} images"
    start = time.perf_counter()
    with warnings.catch_warnings():
        # The table has the share of labels.
        warnings.simplefilter("ignore", CalibrationWarning)
        model.calibrate(image[:, ::-1].copy())
    return (
        f"its ranges were measured just now on the photo's mirror image, in "
        f"{time.perf_counter() - start:.1f} s; for yours call model.calibrate(photos)"
    )


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
    from deeplab_fast.data import Preprocess, read_image

    return Preprocess(size=(size, size))(read_image(STREET))


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
