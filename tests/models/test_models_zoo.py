"""The zoo: published sizes, published names, published accuracy."""

import pytest
import torch
from torch import fx, nn
from zoo_shapes import NAMES, example, macs, parameters, shaped

from gracile import registry
from gracile.data.loader import Loader
from gracile.data.sets import open_data
from gracile.errors import UserError
from gracile.models.mobilenet_v2 import InvertedResidual, round_channels
from gracile.models.resnet_cifar import CifarResNet
from gracile.models.spec import list_models, load_weights, resolve

SIZE = {name: parameters(shaped(name)) for name in NAMES}
DRAWN = [name for name in NAMES if SIZE[name] < 26e6]  # the others: test_distiller_zoo.py
SMALL = [name for name in NAMES if SIZE[name] < 1e6]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet20_cifar_a", 269_722),  # table 6 of the paper: 0.27 M
        ("resnet32_cifar_a", 464_154),  # 0.46 M
        ("resnet44_cifar_a", 658_586),  # 0.66 M
        ("resnet56_cifar_a", 853_018),  # 0.85 M
        ("resnet20_cifar", 272_474),  # + 2 projections: 16*32 + 32*64 weights, 4 BN vectors
        ("resnet110_cifar", 1_730_714),
        ("resnet18", 11_689_512),  # as torchvision documents
        ("resnet50", 25_557_032),
        ("mobilenet_v2", 3_504_872),
    ],
)
def test_parameter_counts_are_the_published_ones(name, count):
    assert SIZE[name] == count


@pytest.mark.parametrize(
    ("name", "giga"), [("resnet18", 1.814), ("resnet50", 4.089), ("mobilenet_v2", 0.301)]
)
def test_macs_at_224_are_the_published_ones(name, giga):
    assert sum(macs(shaped(name), 3, 224, 224)) / 1e9 == pytest.approx(giga, abs=0.001)


@pytest.mark.parametrize(
    ("name", "mega"), [("resnet20_cifar_a", 40.55), ("resnet56_cifar_a", 125.49)]
)
def test_macs_of_the_cifar_networks(name, mega):
    assert sum(macs(shaped(name), 3, 32, 32)) / 1e6 == pytest.approx(mega, abs=0.01)


@pytest.mark.parametrize("name", DRAWN)
def test_can_be_traced_by_fx_and_computes_the_same(name):
    torch.manual_seed(0)
    model = resolve(name, num_classes=3).model.eval()
    x = example(name)
    with torch.no_grad():
        assert torch.equal(fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "word_lstm"])  # an LSTM's are inside
def test_every_activation_is_called_once(name):
    model = shaped(name)
    calls = [n.target for n in fx.symbolic_trace(model).graph.nodes if n.op == "call_module"]
    active = [n for n, m in model.named_modules() if isinstance(m, nn.ReLU | nn.ReLU6)]
    assert active
    assert all(calls.count(n) == 1 for n in active)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "word_lstm"])
def test_takes_classes_and_channels(name):
    model = shaped(f"{name}?num_classes=7&in_channels=2")
    assert model(example(name, channels=2).to("meta")).shape == (2, 7)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_options_are_refused(name):
    with pytest.raises(UserError, match=f"model '{name}' has no argument 'num_clases'"):
        resolve(f"{name}?num_clases=7")


@pytest.mark.parametrize("name", SMALL)
def test_same_seed_same_weights(name):
    def build():
        torch.manual_seed(3)
        return resolve(name).model.state_dict().values()

    assert all(torch.equal(a, b) for a, b in zip(build(), build(), strict=True))


def test_padded_shortcut_has_no_parameters_and_centres_the_channels():
    model = resolve("resnet20_cifar_a").model
    pad = model.layer2[0].downsample
    assert not list(pad.parameters())
    out = pad(torch.ones(1, 16, 4, 4))
    assert out.shape == (1, 32, 2, 2)
    assert out[0, :, 0, 0].tolist() == [0.0] * 8 + [1.0] * 16 + [0.0] * 8


def test_projection_shortcuts_have_distillers_names():
    names = {n for n, _ in resolve("resnet20_cifar").model.named_parameters()}
    assert {"layer2.0.downsample.0.weight", "layer3.0.downsample.1.bias", "fc.weight"} <= names
    assert not any(n.startswith("layer1.0.downsample") for n in names)
    modules = dict(resolve("resnet20_cifar").model.named_modules())
    assert {"layer1.0.relu1", "layer1.0.relu2", "avgpool"} <= set(modules)


def test_depth_that_is_not_6n_plus_2_is_refused():
    with pytest.raises(ValueError, match="6n \\+ 2"):
        CifarResNet(21, num_classes=10, in_channels=3, padded=True)


def test_small_images_keep_a_4x4_map_and_the_weights_of_mobilenet():
    small, large = resolve("mobilenet_v2?small_images=true").model, resolve("mobilenet_v2").model
    x = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        assert small.eval().features(x).shape[2:] == (4, 4)
        assert large.eval().features(x).shape[2:] == (1, 1)
    small.load_state_dict(large.state_dict())


def test_small_images_drop_the_pooling_of_resnet():
    model = resolve("resnet18?small_images=true").model.eval()
    with torch.no_grad():
        stem = model.maxpool(model.conv1(torch.zeros(1, 3, 32, 32)))
    assert stem.shape == (1, 64, 32, 32)


def test_width_mult_rounds_to_eight():
    model = resolve("mobilenet_v2?width_mult=0.5").model
    widths = [m.conv[-1].num_features for m in model.features if isinstance(m, InvertedResidual)]
    assert widths == [8, 16, 16, 16, 16, 16] + [32] * 4 + [48] * 3 + [80] * 3 + [160]
    assert model.classifier[1].in_features == 1280


def test_rounding_never_loses_more_than_a_tenth():
    for channels in range(8, 400):
        rounded = round_channels(channels)
        assert rounded % 8 == 0
        assert rounded >= 0.9 * channels


def test_every_model_says_where_it_is_from():
    assert all(e.source and e.summary for e in list_models())
    assert registry.get("model", "resnet20_cifar_a").source != (
        registry.get("model", "resnet20_cifar").source
    )


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_published_weights_load_strictly(models_dir, depth):
    model = resolve(f"resnet{depth}_cifar_a").model
    load_weights(model, models_dir / f"resnet{depth}-cifar10.safetensors")


def test_resnet20_gets_91_5_percent_of_the_exact_test_images_right(data_dir, models_dir):
    bundle = open_data(f"parquet:{data_dir / 'cifar10-exact-subset'}")
    model = resolve("resnet20_cifar_a", num_classes=bundle.classes).model.eval()
    load_weights(model, models_dir / "resnet20-cifar10.safetensors")
    batches = Loader(bundle.test, 250, mean=bundle.mean, std=bundle.std)
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    assert (right, len(bundle.test)) == (915, 1000)


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet20_cifar_a"])
def test_a_wider_cifar_resnet_has_so_many_times_the_channels(name):
    wide = resolve(f"{name}?width_mult=2").model
    assert wide.conv1.weight.shape == (32, 3, 3, 3)
    assert wide.layer3[0].conv1.weight.shape == (128, 64, 3, 3)
    assert wide.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(ValueError, match="width_mult must be > 0"):
        resolve(f"{name}?width_mult=0")
