"""Models that several threads share: nothing is set on them while they predict."""

import copy
import functools
import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import deeplab_fast as dlf
from deeplab_fast import testing
from deeplab_fast.engine import eval_form as module
from deeplab_fast.engine.eval_form import ModeGate, eval_form, eval_logits, eval_view
from deeplab_fast.engine.predict import predict
from deeplab_fast.engine.runner import at_output_stride
from deeplab_fast.nn.batch_norm import freeze_batch_norm


@pytest.fixture
def model(tiny, one_thread):
    torch.manual_seed(0)
    model = tiny.tiny_deeplabv3()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.2, 0.2)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


def photo(seed=0, size=(48, 64)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def in_threads(count, rounds, work, beside):
    """Runs ``work(i)`` in ``count`` threads, ``rounds`` times each, and ``beside()`` meanwhile."""
    errors, done = [], threading.Event()

    def guarded(function, *args):
        try:
            function(*args)
        except BaseException as error:
            errors.append(error)
            done.set()

    def again():
        while not done.is_set():
            beside()

    def often(i):
        for _ in range(rounds):
            if not done.is_set():
                work(i)

    threads = [threading.Thread(target=guarded, args=(often, i)) for i in range(count)]
    writer = threading.Thread(target=guarded, args=(again,))
    for thread in (*threads, writer):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    writer.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("fast", [True, False], ids=["programs", "plain modules"])
def test_others_predict_while_one_trains(model, fast):
    model.fast = fast
    model.train()
    alone = copy.deepcopy(model)
    batches = torch.randn(8, 2, 3, 32, 32)

    def step(model, x):
        torch.manual_seed(1)  # Of dropout, for all threads alike: predict draws nothing.
        model.zero_grad()
        model(x)["out"].square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad

    for x in batches:
        step(alone, x)
    todo = list(batches)

    def train():
        if todo:
            assert all(modes(model).values())
            step(model, todo.pop(0))

    in_threads(3, 6, lambda i: model.predict(photo(i)), train)
    while todo:
        train()
    assert_equal_states(state(alone), state(model))
    assert all(modes(model).values())
    assert np.array_equal(model.predict(photo()), alone.eval().predict(photo()))


@pytest.mark.parametrize("fast", [True, False], ids=["programs", "plain modules"])
def test_one_switches_modes_while_others_predict(model, fast):
    model.fast = fast
    before = state(model)
    model.eval()
    wanted = [model.predict(photo(i)) for i in range(4)]

    def look(i):
        assert np.array_equal(model.predict(photo(i)), wanted[i])

    def switch():
        model.train()
        model.eval()

    in_threads(4, 6, look, switch)
    assert_equal_states(before, state(model))
    assert not any(modes(model).values())


def test_a_model_without_a_view_has_its_modes_back_after_the_last_thread(one_thread):
    inside = threading.Barrier(2, timeout=30)

    class Own(nn.Module):
        """Two calls at a time; the first goes before the second is through."""

        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.calls = 0

        def train(self, mode=True):
            return super().train(mode)

        def forward(self, x):
            self.calls += 1
            second = inside.wait()
            assert not self.norm.training
            if second:
                time.sleep(0.2)
                assert not self.norm.training
            return self.norm(x)

    model = Own().train()
    assert eval_view(model) is None
    before = state(model)
    in_threads(2, 1, lambda i: predict(model, torch.randn(1, 3, 8, 8)), lambda: None)
    assert model.calls == 2
    assert all(modes(model).values())
    assert_equal_states(before, state(model))


class Parts(nn.Module):
    """References to its modules, and itself, of every kind that a view can follow."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.again = self.norm
        self.listed = [self.norm, (self.norm, {"deep": self.norm})]
        object.__setattr__(self, "hidden", self.norm)
        self.method = self.norm.forward
        self.part = functools.partial(Parts.own, self)

    def own(self, x):
        return self.norm(x)

    def forward(self, x):
        listed = self.listed[1][1]["deep"](x)
        return x + self.again(x) + listed + self.hidden(x) + self.method(x) + self.part(x)


def test_a_view_has_its_own_modules_wherever_they_are_named(one_thread):
    model = Parts().train()
    x = torch.randn(2, 3, 4, 4)
    before = state(model)
    view = eval_view(model)
    assert view is not None and not any(modes(view).values())
    assert torch.equal(view(x), copy.deepcopy(model).eval()(x))
    assert all(modes(model).values())
    assert_equal_states(before, state(model))


def _closure(model):
    inner = model.forward
    model.forward = lambda x: inner(x)


def _held_by_another(model):
    class Holder:
        inner = None

    model.holder = Holder()
    model.holder.inner = {"far": [model.norm]}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_closure, id="a forward that calls the original's"),
        pytest.param(_held_by_another, id="an object that holds a module"),
        pytest.param(lambda m: m.add_module("lazy", nn.LazyConv2d(3, 1)), id="lazy"),
        pytest.param(
            lambda m: m.add_module("scripted", torch.jit.script(nn.ReLU())), id="scripted"
        ),
        pytest.param(lambda m: m.add_module("compiled", torch.compile(nn.ReLU())), id="compiled"),
    ],
)
def test_models_without_a_view(change):
    model = Parts().train()
    change(model)
    assert eval_view(model) is None
    with eval_form(model) as form:
        assert form is model and not model.norm.training
    assert model.norm.training


@pytest.mark.parametrize(
    "change, same",
    [
        pytest.param(lambda m: m.norm.running_mean.add_(1), True, id="a buffer's values"),
        pytest.param(
            lambda m: setattr(m.norm, "weight", nn.Parameter(torch.full((3,), 2.0))),
            True,
            id="another parameter",
        ),
        pytest.param(
            lambda m: m.norm.register_forward_hook(lambda module, x, y: y + 1), False, id="a hook"
        ),
        pytest.param(lambda m: m.eval() and m.train(), True, id="modes"),
        pytest.param(lambda m: setattr(m.norm, "eps", 0.5), False, id="an attribute"),
        pytest.param(lambda m: m.listed.append(m.norm), False, id="a list of modules"),
        pytest.param(
            lambda m: setattr(m, "again", nn.BatchNorm2d(3).train()), False, id="another module"
        ),
        pytest.param(freeze_batch_norm, False, id="a class, frozen"),
    ],
)
def test_a_view_follows_its_model(change, same, one_thread):
    model = Parts().train()
    x = torch.randn(2, 3, 4, 4)
    # What names the model itself has a new view at every call.
    model.part = functools.partial(model.norm)
    first = eval_view(model)
    assert eval_view(model) is first
    change(model)
    view = eval_view(model)
    assert (view is first) == same
    assert torch.equal(view(x), copy.deepcopy(model).eval()(x))


def test_an_accelerated_model_runs_by_its_view(one_thread):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    model = dlf.accelerate(nn.Sequential(block, nn.Conv2d(8, 4, 1)).eval())
    x = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        wanted = model(x)
        before = state(model)
        view = eval_view(model.train())
        assert torch.equal(view(x), wanted)
        # It is accelerated itself, and compares nothing anew.
        assert view.forward.region.path.held_bytes > 0
        assert view.forward.region.verdicts is model.forward.region.verdicts
    assert all(modes(model).values())
    assert_equal_states(before, state(model))


def test_another_output_stride_is_not_set_on_the_model(model):
    model.train()
    x = torch.randn(1, 3, 64, 64)
    with at_output_stride(model, 8) as strided, torch.inference_mode():
        assert (model.output_stride, strided.output_stride) == (16, 8)
        assert eval_logits(strided, x).shape[-2:] == (8, 8)
        assert eval_logits(model, x).shape[-2:] == (4, 4)
    assert all(modes(model).values())
    copied = copy.deepcopy(model).set_output_stride(8).eval()
    with torch.inference_mode():
        assert torch.equal(eval_logits(strided, x), copied.forward_logits(x))


def test_views_go_with_their_model(tiny, one_thread):
    model = tiny.tiny_deeplabv3().train()
    model.predict(photo())
    assert model.prepared_bytes > 0
    assert model.train().prepared_bytes == 0
    model.predict(photo())
    both = [weakref.ref(model), weakref.ref(eval_view(model))]
    del model
    gc.collect()
    assert [each() for each in both] == [None, None]


class Hooked(nn.Module):
    """Takes features by a hook, as many do."""

    def __init__(self):
        super().__init__()
        self.norm, self.features = nn.BatchNorm2d(3), None

    def keep(self, module, x, y):
        self.features = y

    def forward(self, x):
        self.norm(x)
        return self.features.relu()


global_one = None


def _keep_globally(module, x, y):
    global_one.features = y


def _by_global_name(model):
    global global_one
    global_one = model
    model.norm.register_forward_hook(_keep_globally)


@pytest.mark.parametrize(
    "register",
    [
        pytest.param(lambda m: m.norm.register_forward_hook(m.keep), id="a method of the model"),
        pytest.param(
            lambda m: m.norm.register_forward_hook(lambda _, x, y: m.keep(_, x, y)), id="a closure"
        ),
        pytest.param(_by_global_name, id="a global name"),
    ],
)
@pytest.mark.parametrize("later", [False, True], ids=["at once", "behind a view"])
def test_a_model_whose_hooks_reach_it_is_called_itself(register, later, one_thread):
    model = Hooked().train()
    if later:
        assert eval_view(model) is not None
    register(model)
    x = torch.randn(2, 3, 8, 8)
    # Leaves features behind, which are not those of another input.
    model(torch.randn(2, 3, 8, 8))
    before = state(model)
    with torch.no_grad(), eval_form(model) as form:
        assert torch.equal(form(x), copy.deepcopy(model.norm).eval()(x).relu())
    assert all(modes(model).values())
    assert_equal_states(before, state(model))


def test_a_switch_that_waits_for_a_call_which_asks_for_modes(model, monkeypatch):
    model.train()
    model.classifier.register_forward_hook(lambda module, x, y: model.training)
    asks, go = threading.Event(), threading.Event()
    usual = module._is_in_eval_mode

    def slow(model):
        if threading.current_thread().name == "asks":
            asks.set()
            go.wait(30)
        return usual(model)

    monkeypatch.setattr(module, "_is_in_eval_mode", slow)
    threads = [
        threading.Thread(target=model.predict, args=(photo(),), name=name, daemon=True)
        for name in ("asks", "switches")
    ]
    threads[0].start()
    assert asks.wait(30)
    threads[1].start()
    # Until its eval() waits.
    deadline = time.monotonic() + 30
    while module.gate_of(model)._changing is None and time.monotonic() < deadline:
        time.sleep(0.01)
    go.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert all(modes(model).values())


def test_several_threads_switch_a_model_of_this_package(model):
    model.train()
    seen = []
    model.classifier.register_forward_hook(lambda module, x, y: seen.append(model.training))
    assert eval_view(model) is None
    before = state(model)
    wanted = [copy.deepcopy(model).eval().predict(photo(i)) for i in range(4)]

    def look(i):
        assert np.array_equal(model.predict(photo(i)), wanted[i])

    in_threads(4, 6, look, lambda: None)
    assert seen and not any(seen[-24:])
    assert all(modes(model).values())
    assert_equal_states(before, state(model))


def test_a_model_whose_eval_fails_is_as_it_was(one_thread):
    class Failing(nn.Sequential):
        def eval(self):
            raise RuntimeError("no eval today")

    model = Failing(nn.BatchNorm2d(3)).train()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no eval today"), eval_form(model):
            pass
    assert all(modes(model).values())


def test_an_accelerated_model_goes_too(one_thread):
    block = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    model = dlf.accelerate(nn.Sequential(block, nn.Conv2d(8, 4, 1))).train()
    with torch.inference_mode():
        view = eval_view(model)
        view(torch.randn(1, 3, 16, 16))
        assert eval_view(model) is view
    gone = weakref.ref(model)
    del model, view, block
    gc.collect()
    assert gone() is None


def test_a_model_that_names_itself_goes_too(one_thread):
    model = Parts().train()
    assert eval_view(model)(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_modules_in_nested_lists_are_followed(one_thread):
    model = Parts().train()
    x = torch.randn(2, 3, 4, 4)
    eval_view(model)
    other = nn.BatchNorm2d(3).train()
    nn.init.constant_(other.bias, 5)
    model.listed[1][1]["deep"] = other
    model.add_module("other", other)
    first = eval_view(model)
    assert torch.equal(first(x), copy.deepcopy(model).eval()(x))
    model.listed[1][1]["deep"] = model.norm
    assert torch.equal(eval_view(model)(x), copy.deepcopy(model).eval()(x))


def test_a_model_of_another_library_that_is_switched_between_two_windows(one_thread):
    """Modes are looked at before every call, not once a photo."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    images = torch.rand(1, 3, 40, 40)
    wanted = predict(model, images, tile=16)
    before = state(model)

    def switch(done, windows):
        model.train()

    assert torch.equal(predict(model, images, tile=16, progress=switch), wanted)
    assert_equal_states(before, state(model))


def test_libraries_whose_train_sets_flags_have_views():
    testing.import_torchvision()
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.DeepLabV3("resnet18", encoder_weights=None, classes=3).train()
    assert eval_view(model) is not None


class TestGate:
    def test_an_interrupt_while_it_waits(self):
        """Ctrl+C in model.train() beside a call: later calls go on."""

        class Interrupted(ModeGate):
            def __init__(self):
                super().__init__()
                wait = self._free.wait

                def interrupted():
                    self._free.wait = wait
                    raise KeyboardInterrupt

                self._free.wait = interrupted

        gate, inside, go = Interrupted(), threading.Event(), threading.Event()

        def call():
            with gate.calling():
                inside.set()
                go.wait(30)

        caller = threading.Thread(target=call)
        caller.start()
        assert inside.wait(30)
        with pytest.raises(KeyboardInterrupt), gate.changing():
            pass
        later = threading.Thread(target=call, daemon=True)
        go.set()
        later.start()
        for thread in (caller, later):
            thread.join(10)
            assert not thread.is_alive()

    def test_a_change_waits_for_calls(self):
        gate, order = ModeGate(), []
        inside, go = threading.Event(), threading.Event()

        def call():
            with gate.calling():
                inside.set()
                go.wait(30)
                order.append("called")

        def change():
            with gate.changing():
                order.append("changed")

        threads = [threading.Thread(target=call), threading.Thread(target=change)]
        threads[0].start()
        assert inside.wait(30)
        threads[1].start()
        time.sleep(0.05)
        go.set()
        for thread in threads:
            thread.join(30)
        assert order == ["called", "changed"]

    def test_a_thread_does_not_wait_for_itself(self):
        gate = ModeGate()
        with gate.calling(), gate.calling(), gate.changing(), gate.changing(), gate.calling():
            pass
        with gate.changing():
            assert not gate._calling

    def test_two_callers_that_both_change(self):
        """Each within a call of its own: one goes first, and neither waits for ever."""
        gate, both = ModeGate(), threading.Barrier(2, timeout=30)

        def call():
            with gate.calling():
                both.wait()
                with gate.changing():
                    pass

        threads = [threading.Thread(target=call, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads)
