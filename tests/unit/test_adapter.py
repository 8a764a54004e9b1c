"""Models of other libraries in predict and evaluate: small ones whose results plain PyTorch has."""

import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deeplab_fast as dlf
from deeplab_fast.data import ClassSet, Preprocess, PreprocessBGR
from deeplab_fast.engine.adapter import AdaptedModel, AssumedPreprocess, as_segmenter
from deeplab_fast.engine.evaluate import evaluate
from deeplab_fast.engine.predict import predict
from deeplab_fast.testing import import_torchvision

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3)


def photo(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


class Net(nn.Module):
    """One convolution of stride `stride`, a batch norm and dropout; `result` makes its output."""

    def __init__(self, classes=5, stride=4, result=lambda y, x: y, tail=None):
        super().__init__()
        kernel = 1 if stride == 1 else 2 * stride - 1
        self.conv = nn.Conv2d(3, classes, kernel, stride, padding=kernel // 2)
        # Logits of some units, so that means of probabilities are not those of logits.
        nn.init.normal_(self.conv.weight, std=3 / kernel)
        self.norm = nn.BatchNorm2d(classes)
        self.drop = nn.Dropout2d(0.9)
        self.segmentation_head = nn.Identity() if tail is None else tail
        self.result = result
        self.sizes = []

    def logits(self, x):
        return self.norm(self.conv(x))

    def forward(self, x):
        self.sizes.append(tuple(x.shape))
        return self.result(self.segmentation_head(self.drop(self.logits(x))), x)


def calm(net):
    """Logits up to about 4, from which probabilities are still some way from 0 and 1."""
    with torch.no_grad():
        net.norm.weight.fill_(0.2)
    return net


def full_size(y, x):
    return F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=False)


def expected_probabilities(net, x, size=None, align_corners=False):
    with torch.no_grad():
        y = net.eval().logits(x)
        y = F.interpolate(y, size or x.shape[-2:], mode="bilinear", align_corners=align_corners)
        return y.softmax(1) if y.shape[1] > 1 else y.sigmoid()


def assert_labels(labels, scores):
    """The argmax, where float32 can tell the two best classes apart."""
    best, second = scores.topk(2, dim=1).values.unbind(1)
    clear = best - second > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(torch.as_tensor(labels).long()[clear], scores.argmax(1)[clear])


class Output(types.SimpleNamespace):
    pass


RESULTS = {
    "tensor": lambda y, x: y,
    "full-size": full_size,
    "torchvision": lambda y, x: {"out": full_size(y, x), "aux": -y},
    "logits-in-a-mapping": lambda y, x: {"loss": None, "logits": y},
    "transformers": lambda y, x: Output(logits=y, hidden_states=None),
    "smp-with-labels": lambda y, x: (full_size(y, x), torch.zeros(len(x), 7)),
    "list": lambda y, x: [y, -y],
    "channels-last": lambda y, x: y.contiguous(memory_format=torch.channels_last),
    "half": lambda y, x: y.half().float(),
}


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_logits_are_found_in_every_result(result):
    net = Net(result=result).train()
    x = torch.randn(2, 3, 32, 44)
    labels, prob = predict(net, x, return_prob=True)
    expected = expected_probabilities(net, x)
    rounding = 2**-11 * 20 if result is RESULTS["half"] else 1e-5
    torch.testing.assert_close(prob, expected.amax(1), rtol=0, atol=rounding)
    if rounding == 1e-5:
        assert_labels(labels, expected)


@pytest.mark.parametrize(
    ("result", "came"),
    [
        pytest.param(lambda y, x: None, "None for 2 image", id="none"),
        pytest.param(lambda y, x: y.argmax(1), r"a tensor \[2, 8, 11\] of int64", id="labels"),
        pytest.param(lambda y, x: y.argmax(1, True), "of int64", id="labels-in-four-axes"),
        pytest.param(lambda y, x: y.mean((2, 3)), r"a tensor \[2, 5\] of float32", id="classifier"),
        pytest.param(
            lambda y, x: y[:1], r"a tensor \[1, 5, 8, 11\]", id="another-number-of-images"
        ),
        pytest.param(lambda y, x: {"seg": y}, "a dict with {'seg': a tensor", id="unknown-key"),
        pytest.param(lambda y, x: ({"out": y}, y), r"a tuple of \(a dict with", id="nested"),
        pytest.param(lambda y, x: (), r"a tuple of \(\)", id="empty-tuple"),
        pytest.param(lambda y, x: Output(masks=y), "a Output", id="object-without-logits"),
    ],
)
def test_anything_else_is_refused(result, came):
    net = Net(result=result).train()
    x = torch.randn(2, 3, 32, 44)
    with pytest.raises(ValueError, match=f"Net returned .*{came}") as caught:
        predict(net, x)
    assert "expected float logits [N,C,h,w]" in str(caught.value)
    assert "Wrap the model in a module" in str(caught.value)
    assert net.training and net.norm.training
    # Not taken for a refusal of the size 44, which is no multiple of 32.
    assert net.sizes == [(2, 3, 32, 44)]


def test_models_of_this_package_are_taken_as_they_are():
    model = dlf.deeplabv3_mobilenet_v2_tf(num_classes=3, width=0.25, aspp_channels=8)
    assert as_segmenter(model) is model
    adapted = as_segmenter(Net())
    assert isinstance(adapted, AdaptedModel) and as_segmenter(adapted) is adapted
    for each in (model, adapted):
        with pytest.raises(
            ValueError, match=r"align_corners, divisor: .* taken as it is; expected"
        ):
            as_segmenter(each, align_corners=True, divisor=8)


def test_wrappers_of_parallel_training_are_taken_off():
    net = Net().eval()
    x = torch.randn(1, 3, 16, 20)
    assert as_segmenter(nn.DataParallel(net)).model is net
    assert torch.equal(predict(nn.DataParallel(net), x), predict(net, x))
    ours = dlf.deeplabv3_mobilenet_v2_tf(num_classes=3, width=0.25, aspp_channels=8)
    assert as_segmenter(nn.DataParallel(ours)) is ours
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        replica = nn.parallel.DistributedDataParallel(net)
        assert as_segmenter(replica).model is net
        assert torch.equal(predict(replica, x), predict(net, x))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_segmenter("deeplab.pth"), "the model is a str, expected a torch.nn.Module"),
        (lambda: as_segmenter(lambda x: x), "the model is a function, .* wrap a function"),
        (lambda: as_segmenter(Net(), preprocess=(0.5, 0.5)), "preprocess is a tuple, expected a"),
        (lambda: as_segmenter(Net(), divisor=0), "divisor is 0, expected an integer above 0"),
        (lambda: as_segmenter(Net(), divisor=True), "divisor is True"),
        (lambda: as_segmenter(Net(), activation="relu"), "'relu', expected one of identity, sigm"),
        (lambda: predict(Net(), photo(8, 8), preprocess="imagenet"), "preprocess is a str"),
    ],
    ids=["path", "function", "preprocess", "divisor-0", "divisor-bool", "activation", "predict"],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Modes, devices, what a call leaves behind.


def test_every_submodule_gets_its_mode_back():
    net = Net().train()
    net.norm.eval()
    before = {name: module.training for name, module in net.named_modules()}
    x = torch.randn(1, 3, 16, 20)
    assert torch.equal(predict(net, x), predict(net, x)), "dropout is on"
    assert {name: module.training for name, module in net.named_modules()} == before
    adapted = as_segmenter(net)
    assert adapted.training
    adapted.eval()
    assert not any(module.training for module in net.modules())
    adapted.train()
    assert all(module.training for module in net.modules())


def test_a_model_that_keeps_parts_frozen_decides_itself():
    class Frozen(Net):
        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    adapted = as_segmenter(Frozen().train())
    adapted.train()
    assert adapted.model.conv.training and not adapted.model.norm.training


def test_dtypes_and_devices_are_the_models():
    net = Net()
    adapted = as_segmenter(net).double()
    assert net.conv.weight.dtype == torch.float64
    x = torch.randn(1, 3, 16, 20, dtype=torch.float64)
    _, prob = predict(adapted, x, return_prob=True)
    assert prob.dtype == torch.float64
    torch.testing.assert_close(prob, expected_probabilities(net, x).amax(1), rtol=0, atol=1e-12)
    assert as_segmenter(Net()).to("meta").model.conv.weight.device.type == "meta"


def test_what_a_call_keeps_can_be_trained_with():
    class Lazy(Net):
        table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.linspace(0, 1, x.shape[-1])
            return super().forward(x * self.table)

    net = Lazy()
    predict(net, torch.randn(1, 3, 16, 20))
    net(torch.randn(2, 3, 16, 20)).sum().backward()
    assert net.conv.weight.grad is not None


def test_a_model_may_change_its_input():
    class InPlace(Net):
        def forward(self, x):
            return super().forward(x.mul_(2).add_(1))

    net = InPlace(stride=1)
    x = torch.randn(1, 3, 16, 20)
    kept = x.clone()
    _, prob = predict(net, x, flip=True, return_prob=True)
    assert torch.equal(x, kept)
    # A convolution of one pixel: the flipped pass gives the same.
    expected = expected_probabilities(net, 2 * kept + 1).amax(1)
    torch.testing.assert_close(prob, expected, rtol=0, atol=1e-5)


def test_passes_and_windows():
    net = Net(stride=1, result=RESULTS["torchvision"]).eval()
    x = torch.randn(1, 3, 24, 40)
    expected = expected_probabilities(net, x)
    for options in ({"flip": True}, {"tile": (16, 16)}, {"tile": 8, "batch_size": 3}):
        labels, prob = predict(net, x, return_prob=True, **options)
        torch.testing.assert_close(prob, expected.amax(1), rtol=0, atol=1e-5)
        assert_labels(labels, expected)


@pytest.mark.parametrize("align_corners", [False, True])
def test_low_resolution_is_interpolated_as_was_said(align_corners):
    net = Net().eval()
    image = photo(30, 45)
    adapted = as_segmenter(net, align_corners=align_corners, preprocess=Preprocess(size=20))
    _, prob = predict(adapted, image, return_prob=True)
    x = adapted.preprocess(image)
    assert x.shape[-2:] == (20, 30)
    for aligned in (False, True):
        expected = expected_probabilities(net, x, (30, 45), aligned).amax(1)[0]
        same = torch.allclose(torch.as_tensor(prob), expected, rtol=0, atol=1e-5)
        assert same == (aligned == align_corners)
    net.align_corners = align_corners
    assert as_segmenter(net).align_corners == align_corners


def test_compiled_scripted_and_exported_models():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(x)

    net = Plain().eval()
    x = torch.randn(1, 3, 16, 20)
    expected = predict(net, x)
    forms = {
        "compiled": torch.compile(net, backend="eager"),
        "traced": torch.jit.trace(net, x),
        "fx": torch.fx.symbolic_trace(net),
        # Its mode is built in, and eval() raises.
        "exported": torch.export.export(net, (x,)).module(),
    }
    for name, form in forms.items():
        assert torch.equal(predict(form, x), expected), name
    assert as_segmenter(forms["compiled"]).library_class == "Plain"


# Activations.


class Activation(nn.Module):
    """As smp's: what its name says is inside."""

    def __init__(self, activation):
        super().__init__()
        self.activation = activation

    def forward(self, x):
        return self.activation(x)


def head(activation, upsampling=4):
    """As smp's SegmentationHead, its convolution left out."""
    return nn.Sequential(
        nn.Identity(), nn.UpsamplingBilinear2d(scale_factor=upsampling), Activation(activation)
    )


ACTIVATIONS = {
    "none": (nn.Identity(), 5, None),
    "sigmoid": (nn.Sigmoid(), 5, "sigmoid"),
    "softmax": (nn.Softmax(dim=1), 5, "softmax"),
    "softmax2d": (nn.Softmax2d(), 5, "softmax"),
    "softmax-of-the-channels-from-behind": (nn.Softmax(dim=-3), 5, "softmax"),
    "logsoftmax": (nn.LogSoftmax(dim=1), 5, "logsoftmax"),
    "tanh": (nn.Tanh(), 5, "tanh"),
    "one-class": (nn.Identity(), 1, None),
    "one-class-sigmoid": (nn.Sigmoid(), 1, "sigmoid"),
    "one-class-tanh": (nn.Tanh(), 1, "tanh"),
}


@pytest.mark.parametrize("options", [{}, {"flip": True}], ids=["one-pass", "flip"])
@pytest.mark.parametrize(("module", "classes", "name"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_leave_labels_and_probabilities(module, classes, name, options):
    net = Net(classes, tail=head(module)).eval()
    calm(net)
    plain = Net(classes, tail=head(nn.Identity())).eval()
    plain.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 32, 44)
    assert as_segmenter(net).activation == name
    one = {"threshold": 0.3} if classes == 1 else {}
    labels, prob = predict(net, x, return_prob=True, **options, **one)
    wanted, wanted_prob = predict(plain, x, return_prob=True, **options, **one)
    # A logit z comes back with the error of p, some 2^-23, over dp/dz: of a sigmoid exp(-z), 2e-2
    # at 4, of tanh 4 exp(-2 z), 1e-3 at 4. The probability moves by at most half as much. Of a
    # softmax, and of one class behind a sigmoid, the probability that comes back is p.
    atol = 2e-4 if name == "tanh" else 1e-5 if name == "sigmoid" and classes > 1 else 2e-6
    torch.testing.assert_close(prob, wanted_prob, rtol=0, atol=atol)
    assert (labels == wanted).float().mean() > 0.999
    assert labels.unique().numel() == max(2, classes)


@pytest.mark.parametrize("threshold", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_threshold_of_probabilities(threshold):
    net = Net(1, stride=1, tail=nn.Sequential(nn.Sigmoid())).eval()
    x = torch.randn(1, 3, 60, 80)
    with torch.no_grad():
        p = net(x)[:, 0].double()
    labels, prob = predict(net, x, threshold=threshold, return_prob=True)
    clear = (p - threshold).abs() > 1e-6
    assert torch.equal((labels == 1)[clear], (p > threshold)[clear])
    assert 0 < labels.float().mean() < 1
    torch.testing.assert_close(prob.double(), p, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["sigmoid", "softmax", "tanh"])
def test_values_at_the_ends_stay_finite_and_in_order(name, dtype):
    values = torch.tensor([0.0, 1e-30, 1e-4, 0.5, 0.996, 1.0]).to(dtype)
    y = torch.stack([values, 1 - values]).view(1, 2, 1, -1)

    class Given(nn.Module):
        def forward(self, x):
            return y

    adapted = as_segmenter(Given(), activation=name)
    z = adapted.forward_logits(torch.zeros(1, 3, 8, 8))[0, 0, 0]
    assert torch.isfinite(z).all()
    assert (z.diff() >= 0).all()
    # Values that differ stay different.
    assert ((z.diff() > 0) == (values.diff() > 0))[2:].all()
    back = {"sigmoid": torch.sigmoid, "softmax": torch.exp, "tanh": torch.tanh}[name](z.double())
    torch.testing.assert_close(back, values.double(), rtol=0, atol=torch.finfo(dtype).eps)


def test_not_a_number_stays_one():
    class Given(nn.Module):
        def forward(self, x):
            return torch.full((1, 1, 8, 8), torch.nan)

    for name in ("sigmoid", "tanh", "identity"):
        adapted = as_segmenter(Given(), activation=name)
        assert adapted.forward_logits(torch.zeros(1, 3, 8, 8)).isnan().all()


@pytest.mark.parametrize(
    "activation",
    [
        pytest.param(nn.Softmax(dim=-1), id="softmax-over-columns"),
        pytest.param(nn.ReLU(), id="relu"),
        pytest.param(nn.Hardsigmoid(), id="hard-sigmoid"),
    ],
)
def test_activations_that_leave_no_logits_are_refused(activation):
    net = Net(tail=head(activation))
    with pytest.raises(ValueError, match=r"Net ends in .*; expected no activation.*Build it"):
        predict(net, torch.randn(1, 3, 16, 20))
    as_segmenter(net, activation="identity")


def test_a_softmax_over_one_class_is_refused():
    net = Net(1, tail=head(nn.Softmax(dim=1)))
    with pytest.raises(ValueError, match="softmax over its one class, which is 1 at every pixel"):
        predict(net, torch.randn(1, 3, 16, 20))
    assert net.sizes == [(1, 3, 16, 20)]


def test_an_activation_that_was_given_and_is_none():
    adapted = as_segmenter(Net(), activation="sigmoid")
    with pytest.raises(ValueError, match=r"activation='sigmoid' .* values from -.*, expected 0 to"):
        predict(adapted, torch.randn(1, 3, 16, 20))


@pytest.mark.parametrize(
    ("result", "classes", "name"),
    [
        pytest.param(lambda y, x: y.sigmoid(), 1, "sigmoid", id="sigmoid"),
        pytest.param(lambda y, x: y.softmax(1), 5, "softmax", id="softmax"),
        pytest.param(lambda y, x: y, 1, None, id="logits"),
        # Independent classes: they do not sum to 1, and nothing says that they are probabilities.
        pytest.param(lambda y, x: y.sigmoid(), 5, None, id="several-sigmoids"),
    ],
)
def test_values_that_look_like_probabilities_are_told(result, classes, name):
    net = calm(Net(classes, result=result)).eval()
    x = torch.randn(1, 3, 64, 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = as_segmenter(net)
        predict(adapted, x)
        predict(adapted, x)
    assert len(caught) == (name is not None)
    if name is not None:
        assert f"as behind a {name}" in str(caught[0].message)
        assert f"activation={name!r}" in str(caught[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            said = as_segmenter(net, activation=name)
            _, prob = predict(said, x, return_prob=True)
        best = expected_probabilities(net, x).amax(1)
        # The activation is undone before the interpolation. Roundings as above.
        torch.testing.assert_close(prob, best, rtol=0, atol=1e-5)


# Sizes.


class Picky(Net):
    """Raises for sizes that are no multiples of 16, as smp's models or skips that do not meet."""

    error = RuntimeError

    def forward(self, x):
        if x.shape[-2] % 16 or x.shape[-1] % 16:
            raise self.error(f"Wrong input shape {tuple(x.shape)}")
        return super().forward(x)


class LikeSmp(Picky):
    requires_divisible_input_shape = True

    def __init__(self, **options):
        super().__init__(**options)
        self.encoder = nn.Identity()
        self.encoder.output_stride = 16


@pytest.mark.parametrize("result", [RESULTS["tensor"], full_size], ids=["stride-4", "full-size"])
@pytest.mark.parametrize(
    "size",
    [
        pytest.param((33, 46), id="both-sides"),
        pytest.param((32, 46), id="width"),
        pytest.param((1, 1), id="one-pixel"),
        pytest.param((32, 48), id="none"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "divisor"), [(LikeSmp, 16), (Picky, 32)], ids=["told", "found-out"]
)
def test_sizes_that_a_model_refuses_are_padded(kind, divisor, size, result):
    net = kind(result=result).eval()
    x = torch.randn(2, 3, *size)
    adapted = as_segmenter(net)
    labels, prob = predict(adapted, x, return_prob=True)
    fits = not (size[0] % 16 or size[1] % 16)
    step = 1 if fits and kind is Picky else divisor
    height, width = (-(-n // step) * step for n in size)
    padded = torch.zeros(2, 3, height, width)
    padded[..., : size[0], : size[1]] = x
    expected = expected_probabilities(net, padded)[..., : size[0], : size[1]]
    torch.testing.assert_close(prob, expected.amax(1), rtol=0, atol=1e-5)
    assert_labels(labels, expected)
    assert labels.shape == (2, *size)
    # The second call pads at once.
    net.sizes.clear()
    predict(adapted, x)
    assert net.sizes == [(2, 3, height, width)]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, AssertionError])
def test_a_refusal_of_another_kind(error):
    class Other(Picky):
        pass

    Other.error = error
    labels = predict(Other(), torch.randn(1, 3, 17, 40))
    assert labels.shape == (1, 17, 40)


def test_a_given_divisor():
    net = Net().eval()
    predict(as_segmenter(net, divisor=24), torch.randn(1, 3, 25, 24))
    assert net.sizes == [(1, 3, 48, 24)]


def test_the_flipped_image_is_padded_at_its_own_right():
    net = LikeSmp(stride=1).eval()
    x = torch.randn(1, 3, 30, 45)
    _, prob = predict(net, x, flip=True, return_prob=True)
    # A convolution of one pixel does not see the padding.
    torch.testing.assert_close(prob, expected_probabilities(net, x).amax(1), rtol=0, atol=1e-5)


def test_errors_that_are_no_refusals():
    class Broken(Net):
        def forward(self, x):
            self.sizes.append(tuple(x.shape))
            raise RuntimeError(f"call {len(self.sizes)}")

    net = Broken()
    # The first error, not that of the second try.
    with pytest.raises(RuntimeError, match="call 1"):
        predict(net, torch.randn(1, 3, 33, 46))
    assert net.sizes == [(1, 3, 33, 46), (1, 3, 64, 64)]

    class Large(Net):
        def forward(self, x):
            self.sizes.append(tuple(x.shape))
            raise torch.OutOfMemoryError("CUDA out of memory")

    net = Large()
    with pytest.raises(torch.OutOfMemoryError):
        predict(net, torch.randn(1, 3, 33, 46))
    assert len(net.sizes) == 1


# Preprocessing.


def with_config(**config):
    net = Net()
    net.config = types.SimpleNamespace(**config)
    return net


def with_data_preprocessor(conversion):
    net = Net()
    net.data_preprocessor = nn.Module()
    mean, std = torch.tensor([127.5, 51.0, 255.0]), torch.tensor([51.0, 25.5, 255.0])
    net.data_preprocessor.register_buffer("mean", mean.view(-1, 1, 1), persistent=False)
    net.data_preprocessor.register_buffer("std", std.view(-1, 1, 1), persistent=False)
    net.data_preprocessor.channel_conversion = conversion
    return net


def with_timm(**cfg):
    net = Net()
    net.drop.pretrained_cfg = cfg
    return net


def with_own():
    net = with_timm(mean=(0.1,) * 3, std=(0.2,) * 3)
    net.preprocess = HALF
    return net


BY_255 = {"mean": (0.5, 0.2, 1.0), "std": (0.2, 0.1, 1.0)}


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        pytest.param(with_own(), HALF, id="its-own"),
        pytest.param(with_data_preprocessor(True), Preprocess(**BY_255), id="mmseg-rgb"),
        pytest.param(with_data_preprocessor(False), PreprocessBGR(**BY_255), id="mmseg-bgr"),
        pytest.param(with_config(model_type="mobilenet_v2"), HALF, id="transformers-mobilenet"),
        pytest.param(
            with_config(model_type="mobilevit"),
            PreprocessBGR(mean=(0,) * 3, std=(1,) * 3),
            id="transformers-mobilevit",
        ),
        pytest.param(with_timm(mean=(0.5,) * 3, std=(0.5,) * 3), HALF, id="timm"),
    ],
)
def test_preprocessing_that_a_model_tells(net, expected):
    image = photo(16, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(as_segmenter(net).preprocess) is type(expected)
        labels = predict(net, image)
    assert_labels(labels[None], expected_probabilities(net, expected(image)))


def test_preprocessing_that_is_assumed_is_told_once():
    for net in (Net(), with_config(model_type="segformer"), with_timm(mean=None, std=None)):
        adapted = as_segmenter(net)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # Floats are normalised already.
            predict(adapted, torch.randn(1, 3, 16, 20))
            assert not caught
            labels = predict(adapted, [photo(16, 20), photo(16, 20, 1)])
            predict(adapted, torch.zeros(1, 3, 16, 20, dtype=torch.uint8))
        (warning,) = caught
        assert "how photos for Net are normalised; assumed are" in str(warning.message)
        assert "pass preprocess=" in str(warning.message) and "--mean" in str(warning.message)
        expected = expected_probabilities(net, Preprocess()(photo(16, 20)))
        assert_labels(labels[0][None], expected)


def test_preprocess_of_a_call_stands_above_the_models():
    image = photo(16, 20)
    ours = dlf.deeplabv3_mobilenet_v2_tf(num_classes=3, width=0.25, aspp_channels=8).eval()
    ours.preprocess = Preprocess()
    for model in (Net().eval(), with_own().eval(), ours):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, prob = predict(model, image, return_prob=True, preprocess=HALF)
            _, expected = predict(model, HALF(image), return_prob=True)
        torch.testing.assert_close(torch.as_tensor(prob), expected[0], rtol=0, atol=1e-6)
    assert ours.preprocess == Preprocess()


# Classes.


def test_the_number_of_classes_is_that_of_the_logits():
    net = Net(classes=3).train()
    adapted = as_segmenter(net)
    assert adapted.num_classes == 3
    assert net.sizes == [(1, 3, 64, 64)]
    assert net.training and net.norm.training and adapted.training
    assert net.norm.num_batches_tracked == 0, "the run counted in training mode"
    predict(adapted, torch.randn(1, 3, 8, 8))
    assert adapted.num_classes == 3 and len(net.sizes) == 2
    # Known after a run: no picture of zeros.
    seen = Net(classes=3)
    adapted = as_segmenter(seen)
    predict(adapted, torch.randn(1, 3, 8, 8))
    assert adapted.num_classes == 3 and seen.sizes == [(1, 3, 8, 8)]


def test_the_number_of_classes_of_a_network_of_one_size():
    class Fixed(Net):
        def forward(self, x):
            assert x.shape[-1] == 224, "224 pixels"
            return super().forward(x)

    assert as_segmenter(Fixed(classes=3)).num_classes == 3
    assert predict(Fixed(), torch.randn(1, 3, 200, 200)).shape == (1, 200, 200)


def test_a_model_that_cannot_run_says_why():
    class Broken(Net):
        def forward(self, x):
            raise AttributeError("no attribute 'backbnoe'")

    adapted = as_segmenter(Broken())
    with pytest.raises(ValueError, match=r"Broken raised AttributeError .*'backbnoe'.*Expected"):
        _ = adapted.num_classes
    bad = as_segmenter(Net(result=lambda y, x: None))
    with pytest.raises(ValueError, match="Net returned None"):
        _ = bad.num_classes
    assert len(bad.model.sizes) == 1


def test_a_threshold_is_for_one_class():
    net = Net(classes=3)
    with pytest.raises(ValueError, match=r"threshold is 0\.5 and the model has 3 classes"):
        predict(net, torch.randn(1, 3, 16, 20), threshold=0.5)
    one = Net(classes=1)
    x = torch.randn(1, 3, 16, 20)
    labels, prob = predict(one, x, threshold=0.8, return_prob=True)
    torch.testing.assert_close(prob, expected_probabilities(one, x)[:, 0], rtol=0, atol=1e-6)
    assert torch.equal(labels == 1, prob > 0.8)
    assert 0 < labels.sum() < labels.numel()


def test_no_images():
    labels, prob = predict(Net(classes=3), torch.zeros(0, 3, 8, 9), return_prob=True)
    assert labels.shape == prob.shape == (0, 8, 9) and labels.dtype == torch.uint8
    assert predict(Net(classes=300), torch.zeros(0, 3, 8, 9)).dtype == torch.int64


def meta_net(**attributes):
    net = Net(classes=2)
    for name, value in attributes.items():
        setattr(net, name, value)
    return net


NAMES = ("wall", "floor")
COLOURS = ((1, 2, 3), (4, 5, 6))


@pytest.mark.parametrize(
    ("net", "classes", "palette"),
    [
        pytest.param(Net(), None, None, id="unknown"),
        pytest.param(with_config(id2label={0: "wall", 1: "floor"}), NAMES, None, id="id2label"),
        pytest.param(with_config(id2label={0: "LABEL_0", 1: "LABEL_1"}), None, None, id="unnamed"),
        pytest.param(with_config(id2label={0: "wall", 7: "sky"}), None, None, id="gaps"),
        pytest.param(
            meta_net(dataset_meta={"classes": NAMES, "palette": [list(c) for c in COLOURS]}),
            NAMES,
            COLOURS,
            id="mmseg",
        ),
        pytest.param(meta_net(classes=NAMES, palette=COLOURS), NAMES, COLOURS, id="its-own"),
        pytest.param(meta_net(classes=NAMES, palette=COLOURS[:1]), NAMES, None, id="few-colours"),
        pytest.param(meta_net(classes=21), None, None, id="a-number"),
    ],
)
def test_class_names(net, classes, palette):
    adapted = as_segmenter(net)
    assert adapted.classes == classes and adapted.palette == palette


# Precisions.


def test_precisions():
    net = Net()
    x = torch.randn(1, 3, 16, 20)
    expected = predict(net, x)
    assert torch.equal(predict(net, x, precision="fp32"), expected)
    for precision in ("bf16", "int8"):
        with pytest.raises(
            ValueError, match=rf"precision {precision} was asked for and the model \(Net\) computes"
        ):
            predict(net, x, precision=precision)
    seen = []

    class Seen(Net):
        def forward(self, x):
            y = super().forward(x)
            seen.append((torch.is_autocast_enabled("cpu"), self.conv(x).dtype))
            return y

    predict(Seen(), x, dtype="bf16")
    assert seen == [(True, torch.bfloat16)]
    half = Net().bfloat16()
    assert predict(half, x).shape == (1, 16, 20)
    assert torch.equal(predict(half, x, precision="fp32"), predict(half, x))


# Evaluation.


class Scenes(torch.utils.data.Dataset):
    classes = ClassSet("scenes", ("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)))
    num_classes, ignore_index = 3, 255

    def __init__(self, floats=False):
        self.floats = floats

    def __len__(self):
        return 3

    def __getitem__(self, index):
        label = torch.from_numpy(photo(17, 26, 9 + index)[..., 0] % 4).long()
        label[label == 3] = 255
        image = photo(17, 26, index)
        if self.floats:
            return HALF(image)[0], label
        return torch.from_numpy(image).permute(2, 0, 1), label


@pytest.mark.parametrize(
    "result",
    [RESULTS["tensor"], RESULTS["torchvision"]],
    ids=["low-resolution", "full-resolution"],
)
def test_evaluate(result):
    net = Net(classes=3, result=result).train()
    data = Scenes()
    expected = np.zeros((3, 3), int)
    for image, label in map(data.__getitem__, range(len(data))):
        labels = predict(net, HALF(image.permute(1, 2, 0).contiguous().numpy()))[0]
        valid = label != 255
        np.add.at(expected, (label[valid].numpy(), labels[valid].numpy()), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"flip": False, "tile": (17, 26)}):
            scores = evaluate(net, data, preprocess=HALF, panels=1, **options)
            np.testing.assert_array_equal(scores.confusion, expected)
        # Normalised already: nothing is assumed.
        np.testing.assert_array_equal(evaluate(net, Scenes(floats=True)).confusion, expected)
    assert scores.settings["model"] == "Net" and scores.settings["output_stride"] is None
    assert net.training
    with pytest.warns(UserWarning, match="how photos for Net are normalised") as caught:
        evaluate(net, data)
    assert len(caught) == 1
    with pytest.raises(ValueError, match="output_stride=8: Net cannot change its output stride"):
        evaluate(net, data, output_stride=8)
    with pytest.raises(ValueError, match="the model has 4 classes and the data set 3"):
        evaluate(Net(classes=4), data)


def test_assumed_preprocessing_that_is_replaced_stays_assumed():
    from dataclasses import replace

    resized = replace(AssumedPreprocess(model="Net"), size=8)
    with pytest.warns(UserWarning, match="for Net are normalised"):
        assert resized(photo(16, 20)).shape == (1, 3, 8, 10)


# The libraries themselves.


@pytest.fixture
def torchvision():
    try:
        return import_torchvision()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture
def smp(torchvision):
    return pytest.importorskip("segmentation_models_pytorch")


@pytest.mark.parametrize("activation", [None, "sigmoid", "softmax2d", "logsoftmax", "tanh"])
def test_smp(smp, activation):
    options = {"encoder_name": "resnet18", "encoder_weights": None, "decoder_channels": 16}
    aux = {"aux_params": {"classes": 3}}
    net = smp.DeepLabV3Plus(**options, **aux, classes=4, activation=activation)
    plain = smp.DeepLabV3Plus(**options, classes=4).eval()
    plain.load_state_dict(net.state_dict(), strict=False)
    image = photo(70, 93)
    adapted = as_segmenter(net, preprocess=HALF)
    assert adapted.divisor == 16
    labels, prob = predict(adapted, image, return_prob=True)
    x = F.pad(HALF(image), (0, 3, 0, 10))
    with torch.inference_mode():
        expected = plain(x)[..., :70, :93].softmax(1)
    assert_labels(labels[None], expected)
    # Logits near 0, where tanh is as exact as the others.
    torch.testing.assert_close(torch.as_tensor(prob)[None], expected.amax(1), rtol=0, atol=2e-5)


def test_smp_of_one_class(smp):
    options = {"encoder_name": "resnet18", "encoder_weights": None, "decoder_channels": 16}
    net = smp.DeepLabV3(**options, classes=1, activation="sigmoid").eval()
    image = photo(33, 46)
    with torch.inference_mode():
        p = net(F.pad(HALF(image), (0, 2, 0, 7)))[0, 0, :33, :46]
    threshold = float(p.median())
    labels, prob = predict(net, image, threshold=threshold, return_prob=True, preprocess=HALF)
    torch.testing.assert_close(torch.as_tensor(prob), p, rtol=0, atol=1e-6)
    clear = (p - threshold).abs() > 1e-6
    assert clear.float().mean() > 0.9
    assert torch.equal(torch.as_tensor(labels == 1)[clear], (p > threshold)[clear])


def test_smp_encoders_of_timm_tell_their_preprocessing(smp):
    net = smp.Unet("tu-inception_v3", encoder_weights=None, decoder_channels=(8, 8, 8, 8, 8))
    assert as_segmenter(net).preprocess == HALF
    # No activation, and sizes of any kind.
    assert as_segmenter(net).activation == "identity"
    assert predict(net, photo(75, 90)).shape == (75, 90)


def test_smp_heads_that_leave_no_logits(smp):
    net = smp.DeepLabV3("resnet18", encoder_weights=None, activation="argmax2d")
    with pytest.raises(ValueError, match=r"DeepLabV3 ends in ArgMax.*expected no activation"):
        as_segmenter(net)


def test_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(
        depth_multiplier=0.35, output_stride=16, id2label={0: "sky", 1: "road", 2: "tree"}
    )
    net = transformers.MobileNetV2ForSemanticSegmentation(config).eval()
    with torch.no_grad():
        # Those of random weights are all but equal.
        logits = net(HALF(photo(50, 70))).logits
        final = [m for m in net.modules() if isinstance(m, nn.Conv2d)][-1]
        final.weight *= 3 / logits.std((0, 2, 3)).view(-1, 1, 1, 1)
    net.train()
    adapted = as_segmenter(net)
    assert adapted.preprocess == HALF and adapted.classes == ("sky", "road", "tree")
    assert adapted.num_classes == 3
    image = photo(50, 70)
    labels, prob = predict(net, image, return_prob=True)
    assert net.training
    with torch.inference_mode():
        logits = net.eval()(pixel_values=HALF(image)).logits
        full = F.interpolate(logits, (50, 70), mode="bilinear", align_corners=False)
    assert logits.shape[-2:] != (50, 70)
    assert_labels(labels[None], full.softmax(1))
    torch.testing.assert_close(
        torch.as_tensor(prob)[None], full.softmax(1).amax(1), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["MobileNetV2", "MobileViT", "MobileViTV2"])
def test_transformers_image_processors(torchvision, name):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")
    with torch.device("meta"):
        net = getattr(transformers, f"{name}ForSemanticSegmentation")(config())
    processors = {"MobileNetV2": "MobileNetV2ImageProcessor"}
    processor = getattr(transformers, processors.get(name, "MobileViTImageProcessor"))
    image = photo(30, 40)
    as_is = processor(do_resize=False, do_center_crop=False)
    wanted = as_is(image, return_tensors="pt")["pixel_values"]
    # One rounding of a division by 255 or a product with its inverse, of values up to 1.
    torch.testing.assert_close(as_segmenter(net).preprocess(image), wanted, rtol=0, atol=3e-7)


def test_torchvision(torchvision):
    models = torchvision.models.segmentation
    net = models.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    image = photo(50, 70)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = predict(net, image)
    with torch.inference_mode():
        expected = net.eval()(Preprocess()(image))["out"]
    assert_labels(labels[None], expected.softmax(1))
