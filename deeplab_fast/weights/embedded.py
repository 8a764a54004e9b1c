"""Trained models that come inside the package, by name."""

from __future__ import annotations

from pathlib import Path

from ..models.deeplabv3 import DeepLabV3
from .load import from_checkpoint

_FOLDER = Path(__file__).resolve().parent.parent / "embedded"


def list_embedded() -> list[str]:
    """Names that `load` knows, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def embedded_path(name: str) -> Path:
    """The weights of an embedded model, a .safetensors file that every `weights=` takes.

    Raises:
        ValueError: no embedded model has that name.
    """
    if name not in list_embedded():
        raise ValueError(
            f"no embedded model is named {name!r}; there are: {', '.join(list_embedded())}. "
            "For a file use deeplab_fast.from_checkpoint(path)"
        )
    return _FOLDER / f"{name}.safetensors"


def model_card(name: str) -> str:
    """What an embedded model was trained on and how, its licence and its scores, as Markdown."""
    return embedded_path(name).with_suffix(".md").read_text(encoding="utf-8")


def load(name: str) -> DeepLabV3:
    """A trained model that comes inside the package, in eval mode, on the CPU, in fp32.

    "camvid": road scenes, the 11 classes of CamVid; `model_card("camvid")` has its data, licence,
    recipe and scores.

    Returns:
        `DeepLabV3` with its `classes`, `palette` and `preprocess`; `model.predict(photo)` gives
        labels at the photo's size.

    Raises:
        ValueError: no embedded model has that name.
    """
    model = from_checkpoint(embedded_path(name)).eval()
    assert isinstance(model, DeepLabV3)
    return model
