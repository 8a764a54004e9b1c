"""Trained models that come inside the package, by name."""

from __future__ import annotations

from pathlib import Path

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
