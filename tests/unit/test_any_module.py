"""Checkpoints of the user's own modules: names decide, whatever lies around them."""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deeplab_fast.weights import CheckpointError, load_module


class Own(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
        self.last = nn.Conv2d(6, classes, 1)


class Wrapper(nn.Module):
    """As many users have: the network is an attribute, before all of whose names it stands."""

    def __init__(self, inner):
        super().__init__()
        self.model = inner


def random_state(module):
    return {
        name: torch.randn(value.shape) if value.is_floating_point() else torch.tensor(7)
        for name, value in module.state_dict().items()
    }


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def assert_loaded(module, state):
    for name, value in module.state_dict().items():
        wanted = state[name]
        torch.testing.assert_close(value, wanted.to(value.dtype), rtol=0, atol=0, msg=name)


CONTAINERS = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "model_state": lambda s: {"model_state": s, "cur_itrs": 30000},
    "unheard-of": lambda s: {"run": {"best": s}},
    "data-parallel": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "compiled-in-ddp-in-a-container": lambda s: {"model": prefixed(s, "module._orig_mod.")},
    "lightning": lambda s: {"state_dict": prefixed(s, "model."), "loops": {"fit": {}}},
    "lightning-of-a-wrapper": lambda s: {"state_dict": prefixed(s, "net.model.")},
    "lightning-with-its-loss": lambda s: {
        "state_dict": {**prefixed(s, "net."), "criterion.weight": torch.ones(4)}
    },
    "averaged": lambda s: {**prefixed(s, "module."), "n_averaged": torch.tensor(5)},
    "weight-averaging-of-lightning": lambda s: {
        "state_dict": prefixed(s, "model."),
        "current_model_state": prefixed({k: v + 1 for k, v in s.items()}, "model."),
    },
}


@pytest.mark.parametrize("wrap", CONTAINERS.values(), ids=CONTAINERS)
def test_what_lies_around_the_names(wrap, tmp_path):
    state = random_state(Own())
    content = wrap(state)
    paths = [tmp_path / "own.pth"]
    torch.save(content, paths[0])
    # A .safetensors file has no containers.
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        paths.append(tmp_path / "own.safetensors")
        save_file(content, paths[1])
    for path in paths:
        # Wrapped in turn, the module still finds its names.
        for module in (Own(), Wrapper(Own()), nn.DataParallel(Own())):
            load_module(module, path)
            inner = {Wrapper: "model", nn.DataParallel: "module"}.get(type(module))
            assert_loaded(getattr(module, inner) if inner else module, state)


def test_the_modules_own_prefix_may_be_that_of_a_wrapper(tmp_path):
    # Taking "model." off the file's names would leave none that fit.
    module = Wrapper(Own())
    state = random_state(module)
    for content in (state, {"state_dict": prefixed(state, "model.")}):
        torch.save(content, tmp_path / "w.pth")
        load_module(module, tmp_path / "w.pth")
        assert_loaded(module, state)


def test_compiled_parts(tmp_path):
    plain, module = Own(), Own()
    module.stem = torch.compile(module.stem)
    state = random_state(plain)
    torch.save(state, tmp_path / "w.pth")
    load_module(module, tmp_path / "w.pth")
    assert "stem._orig_mod.0.weight" in module.state_dict()
    torch.testing.assert_close(module.stem.get_parameter("0.weight").data, state["stem.0.weight"])
    saved = random_state(module)
    torch.save(saved, tmp_path / "w.pth")
    load_module(plain, tmp_path / "w.pth")
    torch.testing.assert_close(plain.stem[0].weight.detach(), saved["stem._orig_mod.0.weight"])


def test_counters_may_be_absent(tmp_path):
    module = Own()
    state = random_state(module)
    del state["stem.1.num_batches_tracked"]
    torch.save(state, tmp_path / "w.pth")
    load_module(module, tmp_path / "w.pth")
    assert_loaded(module, {**state, "stem.1.num_batches_tracked": torch.tensor(0)})


@pytest.mark.parametrize(
    ("parts", "chosen"),
    [
        pytest.param({"model": 0, "model_ema": 1}, {"model": 0, "model_ema": 1}, id="containers"),
        pytest.param(
            {"state_dict": {"student.": 0, "teacher.": 1}},
            {"student": 0, "teacher": 1, "state_dict/teacher": 1},
            id="prefixes",
        ),
        pytest.param({"": 0, "ema.": 1}, {".": 0, "ema": 1}, id="with-and-without-a-prefix"),
    ],
)
def test_a_file_with_several_networks(parts, chosen, tmp_path):
    states = [random_state(Own()), random_state(Own())]

    def content(entries):
        if any(isinstance(value, dict) for value in entries.values()):
            return {key: content(value) for key, value in entries.items()}
        if all(key.endswith(".") or not key for key in entries):
            return {
                name: value
                for key, index in entries.items()
                for name, value in prefixed(states[index], key).items()
            }
        return {key: states[index] for key, index in entries.items()}

    path = tmp_path / "w.pth"
    torch.save(content(parts), path)
    module = Own()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"more than one network that fits: .*part="):
        load_module(module, path)
    assert_loaded(module, before)
    for part, index in chosen.items():
        load_module(module, path, part=part)
        assert_loaded(module, states[index])
    with pytest.raises(CheckpointError, match="holds no part 'best', expected"):
        load_module(module, path, part="best")


def test_a_network_beside_other_tensors(tmp_path):
    module = Own()
    state = random_state(module)
    torch.save({**prefixed(state, "seg."), "depth.weight": torch.ones(3)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"under seg\. beside others \(depth\.weight\); pass"):
        load_module(module, tmp_path / "w.pth")
    load_module(module, tmp_path / "w.pth", part="seg")
    assert_loaded(module, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda s: {k: v for k, v in s.items() if k != "last.bias"},
            r"does not fit the module: 1 missing: last\.bias\. Expected",
            id="missing",
        ),
        pytest.param(
            lambda s: {**s, "last.scale": torch.ones(1)},
            r"1 unexpected: last\.scale",
            id="unexpected",
        ),
        pytest.param(
            lambda s: {"model": {**s, "last.scale": torch.ones(1)}},
            r"1 unexpected: last\.scale",
            id="unexpected-in-a-container",
        ),
        pytest.param(
            lambda s: {**s, "last.weight": torch.ones(9, 6, 1, 1)},
            r"does not fit Own: 1 tensors of another shape: last\.weight \[9, 6, 1, 1\], the "
            r"module's \[4, 6, 1, 1\]\. Build",
            id="another-number-of-classes",
        ),
        pytest.param(lambda s: {"epoch": 3}, "holds no tensors, expected a state", id="no-tensors"),
        pytest.param(
            lambda s: {"backbone.weight": torch.ones(3)}, "8 missing: stem", id="another-network"
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(change, message, tmp_path):
    module = Own()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    path = tmp_path / "w.pth"
    torch.save(change(random_state(module)), path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_module(module, path)
    assert str(path) in str(caught.value)
    assert_loaded(module, before)


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "no.pth"))):
        load_module(Own(), tmp_path / "no.pth")
    (tmp_path / "w.pth").write_text("hello")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_module(Own(), tmp_path / "w.pth")

    torch.save(Own(), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match="would run code to load"):
        load_module(Own(), tmp_path / "whole.pth")
