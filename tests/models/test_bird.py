"""A real trained model: TensorFlow's MobileNetV2 DeepLabv3 on a photo of a bird."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import deeplab_fast as dlf


@pytest.fixture
def bird(shared_data: Path):
    folder = shared_data / "deeplabv3_257"
    weights = folder / "deeplabv3_257_mv_gpu_folded.safetensors"
    reference = np.load(folder / "deeplabv3_257_mv_gpu_bird_reference.npz")
    return dlf.deeplabv3_mobilenet_v2_tf(weights=weights).eval(), reference


def test_logits_and_labels_of_the_bird(bird) -> None:
    model, reference = bird
    x = model.preprocess(reference["input_uint8"])
    with torch.inference_mode():
        logits = model.forward_logits(x)
    expected = torch.from_numpy(reference["logits33"]).permute(2, 0, 1)[None]
    # The bound; TensorFlow Lite's own fp32 sums differ by 4.1e-5 from PyTorch's.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
    labels = model.predict(reference["input_uint8"])
    assert np.mean(labels == reference["argmax257"]) >= 0.999


def test_the_bird_is_found(bird) -> None:
    model, reference = bird
    labels = model.predict(reference["input_uint8"])
    found, counts = np.unique(labels, return_counts=True)
    names = [model.classes[i] for i in found[np.argsort(-counts)]]
    assert names[:2] == ["background", "bird"]


def test_options_come_with_the_weights(bird) -> None:
    model, _ = bird
    assert (model.output_stride, model.align_corners, model.num_classes) == (8, True, 21)
