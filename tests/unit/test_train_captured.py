"""Training by captured steps: the numbers of a training without, and what is refused.

Captures are those of a stand-in, whose replays run what was captured again.
"""

import gc
import os
import re
import shutil
import signal
import types

import pytest
import torch
from stand_in_capture import StandInCapture
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from deeplab_fast import reference, testing

testing.import_torchvision()

import lightning  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402

from deeplab_fast.engine.captured import (  # noqa: E402
    WARM_UP,
    CapturedStep,
    CaptureFailed,
    reasons_against,
)
from deeplab_fast.engine.config import train_config  # noqa: E402
from deeplab_fast.engine.losses import SegmentationLoss  # noqa: E402
from deeplab_fast.engine.module import SegmentationModule  # noqa: E402
from deeplab_fast.engine.train import build_model, fit  # noqa: E402
from deeplab_fast.models import get_model, list_models  # noqa: E402
from deeplab_fast.nn.batch_norm import freeze_batch_norm  # noqa: E402
from deeplab_fast.program import capture  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture
def stand_in():
    made = StandInCapture(once=True)
    with capture.using(made):
        yield made


@pytest.fixture
def steps(tiny, tmp_path_factory):
    """12 steps in 3 epochs; every state that a step depends on is in use."""
    root = tiny.write_scenes(tmp_path_factory.mktemp("scenes"), 16)
    return train_config(
        **tiny.recipe(root),
        model_options={"dropout": 0.5},
        colour_jitter=0.3,
        epochs=3,
        lr=0.1,
        log_every=1,
    )


def run(config, folder, **options):
    """What a run has come to: its checkpoint, weights and lines of metrics, and what it told."""
    lines = []
    result = fit(config.replace(output=str(folder)), tell=lines.append, **options)
    content = torch.load(result.last_checkpoint, weights_only=True)
    kept = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step")
    found = {name: content[name] for name in kept if name in content}
    found["metrics"] = (result.folder / "metrics.jsonl").read_text()
    return found, lines


def assert_same(a, b, path=""):
    """Nested values agree, tensors by every bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b or (a != a and b != b), (path, a, b)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="SGD, dropout, running statistics"),
        pytest.param({"accumulate": 2, "ema": 0.8, "clip_norm": 0.5}, id="gradients of two parts"),
        pytest.param(
            {"optimizer": "adamw", "lr": 0.01, "warmup_steps": 5, "aux_weight": 0.4},
            id="AdamW, two losses",
        ),
        pytest.param({"loss": "hard_pixels", "fused": False}, id="plain modules"),
        pytest.param({"freeze_batch_norm": True}, id="nothing written in the forward pass"),
        pytest.param({"trainer": {"precision": "bf16-mixed"}}, id="autocast"),
        pytest.param({"eval_output_stride": 8}, id="another stride in validation"),
    ],
)
def test_a_captured_training_is_the_same_to_the_bit(steps, tmp_path, stand_in, changes):
    config = steps.replace(**changes)
    expected, _ = run(config, tmp_path / "eager")
    found, lines = run(config.replace(cuda_graph=True), tmp_path / "captured")
    assert_same(expected, found)
    batches = 12 * config.accumulate
    # Forward and backward pass, of all batches but those before.
    assert (stand_in.captures, stand_in.replays) == (2, 2 * (batches - WARM_UP))
    assert stand_in.pools == 1
    assert [line for line in lines if "captured" in line] == [
        f"the step of images {[4 // config.accumulate, 3, 32, 32]} is captured as CUDA graphs"
    ]


class Kept(Callback):
    """How many graphs there are in validation, and behind the training."""

    def __init__(self, stand_in):
        self.stand_in = stand_in
        self.seen = []

    def on_validation_start(self, trainer, pl_module):
        self.seen.append(len(self.stand_in.owners))

    def on_fit_end(self, trainer, pl_module):
        # A replay of the stand-in refers to what it runs.
        gc.collect()
        self.seen.append(len(self.stand_in.owners))


def test_graphs_are_kept_until_the_end_of_the_training(steps, tmp_path, stand_in):
    kept = Kept(stand_in)
    run(steps.replace(cuda_graph=True, epochs=2), tmp_path / "run", callbacks=[kept])
    assert kept.seen == [2, 2, 0]


class SignalAt(Callback):
    def __init__(self, epoch, batch):
        self.at = epoch, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_resumed_run_captures_anew(steps, tmp_path, stand_in):
    steps = steps.replace(accumulate=2, ema=0.8)
    expected, _ = run(steps, tmp_path / "whole")
    config = steps.replace(cuda_graph=True)
    run(config, tmp_path / "run", callbacks=[SignalAt(1, 2)])
    assert stand_in.captures == 2
    # What was interrupted with graphs may go on without.
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    for folder, captures in (("run", 4), ("other", 4)):
        changed = config.replace(cuda_graph=folder == "run")
        found, lines = run(changed, tmp_path / folder, resume=True)
        assert stand_in.captures == captures
        assert_same(expected, found)
        assert not any("other options" in line for line in lines)


class Unfreeze(Callback):
    """Lets the backbone be trained from the second epoch on."""

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.model.backbone.requires_grad_(trainer.current_epoch > 0)


def test_a_changed_model_is_captured_anew(steps, tmp_path, stand_in):
    # Adam and momentum would move what has no gradient.
    config = steps.replace(momentum=0.0, weight_decay=0.0)
    expected, _ = run(config, tmp_path / "eager", callbacks=[Unfreeze()])
    found, lines = run(
        config.replace(cuda_graph=True), tmp_path / "captured", callbacks=[Unfreeze()]
    )
    assert_same(expected, found)
    assert stand_in.captures == 4
    assert sum("has changed" in line for line in lines) == 1


def batches(*sizes):
    made = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=made),
            torch.randint(0, 4, (n, 32, 32), dtype=torch.uint8, generator=made),
            torch.arange(n),
        )
        for n in sizes
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_of_another_size_runs_without_graphs(config, tmp_path, stand_in, accumulate):
    """An odd batch comes at the end of an epoch, and as the first and second part of a step."""
    sizes = (4, 4, 4, 4, 2, 4, 4, 2)

    def trained(graph):
        lines = []
        plan = config.replace(cuda_graph=graph)
        module = SegmentationModule(build_model(plan, 4), plan, tell=lines.append)
        trainer = lightning.Trainer(
            max_epochs=2,
            default_root_dir=tmp_path,
            accumulate_grad_batches=accumulate,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            accelerator="cpu",
        )
        loader = torch.utils.data.DataLoader(batches(*sizes), batch_size=None)
        trainer.fit(module, loader)
        return module.model.state_dict(), trainer.optimizers[0].state_dict(), lines

    *expected, _ = trained(False)
    *found, lines = trained(True)
    assert_same(expected, found)
    assert stand_in.captures == 2
    assert stand_in.replays == 2 * (2 * sizes.count(4) - WARM_UP)
    assert [line for line in lines if "another shape" in line] == [
        "images [2, 3, 32, 32] are of another shape: they run without graphs"
    ]


def step_of(config, **options):
    plan = config.replace(cuda_graph=True)
    model = build_model(plan, 4)
    module = SegmentationModule(model, plan).train()
    return model, module, CapturedStep(model, module.losses, CPU, **options)


def gradients(step, module, batch, factor=1.0):
    images, labels, _ = batch
    step.backward(step.losses(module.inputs(images), labels)["loss"] * factor)
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def test_gradients_follow_the_scale_of_the_loss(config, stand_in):
    """As the scale of fp16 does, which changes between steps."""
    _, module, step = step_of(config.replace(model_options={"dropout": 0.0}))
    (batch,) = batches(4)
    for factor in (*[1.0] * WARM_UP, 1.0, 1024.0, 0.5):
        module.zero_grad()
        found = gradients(step, module, batch, factor)
        if factor == 1.0:
            expected = found
        for name, grad in found.items():
            # Powers of two round nothing.
            assert torch.equal(grad, expected[name] * factor), name
    assert stand_in.replays == 2 * 3


def test_gradients_that_somebody_else_made_are_added_to(config, stand_in):
    _, module, step = step_of(config.replace(model_options={"dropout": 0.0}))
    (batch,) = batches(4)
    for _ in range(WARM_UP + 1):
        module.zero_grad()
        once = gradients(step, module, batch)
    kept = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    for name, grad in gradients(step, module, batch).items():
        assert torch.equal(grad, 1 + once[name]), name
    # Where they are does not change: the next replay writes there.
    assert all(p.grad is kept[name] for name, p in module.named_parameters())


class Idle(StandInCapture):
    """Replays do nothing, as a replay on a GPU does nothing that PyTorch notices."""

    def record(self, run, device, pool):
        results, _, owner = super().record(run, device, pool)
        return results, lambda: None, owner


def test_a_replay_counts_as_a_change_of_running_statistics(config):
    with capture.using(Idle()):
        model, module, step = step_of(config)
        (batch,) = batches(4)

        def changed():
            before = {name: b._version for name, b in model.named_buffers()}
            gradients(step, module, batch)
            return {name for name, b in model.named_buffers() if b._version > before[name]}

        # PyTorch's own batch norm counts its batches only.
        without, *_ = [changed() for _ in range(WARM_UP + 1)]
        assert "classifier.0.project.1.running_mean" in without
        assert changed() == without


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        pytest.param(
            RuntimeError("operation not permitted when stream is capturing"),
            CaptureFailed,
            "cannot be captured .*not permitted.*cuda_graph=false",
            id="waits for the device",
        ),
        pytest.param(
            torch.OutOfMemoryError("CUDA out of memory"), MemoryError, "batch_size", id="memory"
        ),
    ],
)
def test_a_capture_that_fails_says_so(config, stand_in, error, kind, message):
    stand_in.error = error
    with pytest.raises(kind, match=message):
        fit(config.replace(cuda_graph=True))


class Hooked(Callback):
    def setup(self, trainer, pl_module, stage):
        pl_module.model.classifier.register_forward_hook(lambda *given: None)


@pytest.fixture
def _one_process():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        pytest.param(
            {"trainer": {"strategy": "ddp", "devices": 1}},
            {},
            "DDPStrategy, expected one process",
            id="processes",
        ),
        pytest.param({"trainer": {"detect_anomaly": True}}, {}, "anomaly detection", id="anomaly"),
        pytest.param({}, {"callbacks": [Hooked()]}, r"classifier \(.*\) has hooks", id="hooks"),
    ],
)
def test_a_training_that_cannot_be_captured_is_refused(config, stand_in, changes, options, message):
    with pytest.raises(ValueError, match=f"cuda_graph: .*{message}.*cuda_graph=false"):
        fit(config.replace(cuda_graph=True, **changes), **options)
    assert stand_in.captures == 0


def test_there_are_no_graphs_on_a_cpu(config):
    config = config.replace(cuda_graph=True, trainer={"accelerator": "cpu"})
    with pytest.raises(ValueError, match="cuda_graph: cpu has no CUDA graphs; train with"):
        fit(config)


class Own(nn.Module):
    def forward(self, x):
        return x


def patched():
    module = nn.ReLU()
    module.forward = types.MethodType(lambda self, x: x, module)
    return module


def hooked_weight():
    module = nn.Conv2d(1, 1, 1)
    module.weight.register_post_accumulate_grad_hook(lambda p: None)
    return module


class Noise(nn.Dropout):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(Own, r"0 \(Own\) is not PyTorch's", id="a class of somebody else's"),
        pytest.param(Noise, r"0 \(Noise\) is not PyTorch's", id="another forward pass"),
        pytest.param(patched, r"0 \(ReLU\) .*was changed", id="a patched instance"),
        pytest.param(lambda: nn.SyncBatchNorm(4), "other processes", id="SyncBatchNorm"),
        pytest.param(lambda: nn.BatchNorm2d(4, momentum=None), "momentum None", id="counts"),
        pytest.param(hooked_weight, r"0\.weight has hooks", id="hooks of a parameter"),
    ],
)
def test_modules_that_are_not_captured(stand_in, make, message):
    (reason,) = reasons_against(nn.Sequential(make()), CPU)
    assert re.search(message, reason)


def test_a_class_can_vouch_for_itself(stand_in):
    vouching = type("Vouching", (Own,), {"capturable": True})
    assert not list(reasons_against(nn.Sequential(vouching()), CPU))


def test_settings_that_are_not_captured(stand_in, monkeypatch):
    monkeypatch.setenv("DEEPLAB_FAST_STRICT_LABELS", "1")
    assert "STRICT_LABELS" in next(reasons_against(nn.ReLU(), CPU))
    monkeypatch.delenv("DEEPLAB_FAST_STRICT_LABELS")
    handle = nn.modules.module.register_module_forward_hook(lambda *given: None)
    try:
        assert "global hooks" in next(reasons_against(nn.ReLU(), CPU))
    finally:
        handle.remove()


@pytest.mark.parametrize("name", list_models())
def test_every_model_can_be_captured(stand_in, name):
    with torch.device("meta"):
        model = get_model(name, num_classes=3)
    assert not list(reasons_against(model, CPU))
    freeze_batch_norm(model)
    assert not list(reasons_against(model, CPU))


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("labels", ["full", "downsampled"])
@pytest.mark.parametrize(
    "kind", ["cross_entropy", "hard_pixels", "focal", "dice", "cross_entropy+dice"]
)
def test_no_loss_waits_for_the_device(monkeypatch, kind, labels, classes):
    """Fake tensors have no values: what asks for one, or has a size by them, raises."""
    # Of labels on a CPU.
    monkeypatch.setattr(reference, "check_labels", lambda *given: None)
    weights = None if kind == "dice" else [1.0, 2.0, 3.0][: max(2, classes)]
    loss = SegmentationLoss(kind=kind, class_weights=weights, labels=labels, min_kept=5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.randn(2, classes, 5, 7, requires_grad=True)
        target = torch.zeros(2, 33, 45, dtype=torch.uint8)
        loss(logits, target).backward()
        with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
            loss(logits, target).item()
    assert logits.grad is not None
