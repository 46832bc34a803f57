"""The networks Distiller's schedules are written for: its names, its sizes, its MACs."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from zoo_shapes import NAMES, example, macs, parameters, shaped, weights

from gracile.errors import UserError
from gracile.graph.capture import capture
from gracile.graph.dependency import channel_groups
from gracile.models.alexnet import AlexNet, AlexNetBN
from gracile.models.mobilenet import MobileNet
from gracile.models.preact_resnet import PreactBlock
from gracile.models.preact_resnet_cifar import PreactCifarBlock, PreactCifarResNet
from gracile.models.resnext import ResNeXt
from gracile.models.spec import resolve
from gracile.models.vgg import DEPTHS, VGG

IMAGES = {"num_classes": 10, "in_channels": 3}
# One of each family as it is, the widest with narrow linear layers or fewer blocks.
CAPTURED = {
    name: lambda name=name: resolve(name, num_classes=10).model
    for name in (
        "simplenet_cifar",
        "simplenet_mnist",
        "simplenet_v2_mnist",
        "plain20_cifar",
        "plain20_cifar_nobn",
        "vgg11_cifar",
        "vgg11_bn_cifar",
        "preact_resnet20_cifar",
        "preact_resnet20_cifar_conv_ds",
        "preact_resnet18",
        "preact_resnet50",
        "mobilenet_025",
    )
} | {
    "alexnet": lambda: AlexNet(dropout=0.5, hidden=64, **IMAGES),
    "alexnet_bn": lambda: AlexNetBN(hidden=64, **IMAGES),
    "vgg16": lambda: VGG(DEPTHS[16], norm=False, dropout=0.5, hidden=64, **IMAGES),
    "resnext101_32x4d": lambda: ResNeXt(depths=(1, 2, 1, 1), **IMAGES),
    "word_lstm": lambda: resolve("word_lstm?num_classes=10&embedding=8&hidden=8").model,
}


@pytest.fixture
def lm():
    torch.manual_seed(0)
    spec = "word_lstm?num_classes=20&embedding=6&hidden=6"
    return resolve(spec).model.eval()


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("resnet20_cifar", 270_896),  # as in the tables of Distiller's schedules
        ("plain20_cifar", 268_336),
        ("preact_resnet20_cifar", 268_336),
        ("vgg16_cifar", 14_715_584),
        ("simplenet_v2_mnist", 26_000),
        ("alexnet", 61_090_496),
        ("mobilenet", 4_209_088),
        ("resnet50", 25_502_912),
        ("resnext101_32x4d", 44_038_848),
        ("word_lstm", 85_917_000),  # large
        ("word_lstm?embedding=650&hidden=650", 28_390_700),  # medium
        # small: 33,278 x 200 + 4 x 800 x 200; the published 7,135,600 is one 800 x 200 short
        ("word_lstm?embedding=200&hidden=200", 7_295_600),
    ],
)
def test_weights_are_as_many_as_distiller_counts(spec, count):
    assert weights(shaped(spec)) == count


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("simplenet_cifar", 456 + 2_416 + 48_120 + 10_164 + 850),  # (in * area + 1) * out
        ("simplenet_mnist", 520 + 25_050 + 400_500 + 5_010),
        ("plain20_cifar", 269_722),  # resnet20_cifar_a: its shortcuts have none
        ("plain20_cifar_nobn", 268_336 + 10),
        ("preact_resnet20_cifar", 269_722),
        ("preact_resnet20_cifar_conv_ds", 269_722 + 16 * 32 + 32 * 64),
        ("preact_resnet110_cifar", 1_730_714 - 2_560 - 192),  # no projections, nor their BatchNorm
        ("vgg16_cifar", 14_715_584 + 4_224 + 10),
        ("vgg16_bn_cifar", 14_715_584 + 3 * 4_224 + 10),
        ("vgg11", 132_863_336),  # as torchvision documents
        ("vgg13_bn", 133_053_736),
        ("vgg16", 138_357_544),
        ("vgg19", 143_667_240),
        ("vgg19_bn", 143_678_248),
        ("alexnet", 61_100_840),
        # filters, then BatchNorm, then the linear layers
        ("alexnet_bn", 2_339_424 + 2 * 1_280 + 9_216 * 4_096 + 4_096**2 + 16_384 + 4_097_000),
        # as ResNets, but no BatchNorm on the shortcuts: 2 * (128 + 256 + 512), times 4 and 256
        ("preact_resnet18", 11_689_512 - 1_792),
        ("preact_resnet34", 21_797_672 - 1_792),
        ("preact_resnet50", 25_557_032 - 7_680),
        ("preact_resnet101", 44_549_160 - 7_680),
        ("preact_resnet152", 60_192_808 - 7_680),
        ("mobilenet", 4_231_976),
        ("resnext101_32x4d", 44_177_704),
    ],
)
def test_parameter_counts(name, count):
    assert parameters(shaped(name)) == count


def test_macs_are_those_of_distillers_tests():
    assert macs(shaped("simplenet_cifar"), 3, 32, 32) == [352_800, 240_000, 48_000, 10_080, 840]
    pairs = [(3.612672, 25.690112), (1.806336, 25.690112), (3.612672, 51.380224)]
    pairs += [(0.903168, 25.690112), (1.806336, 51.380224), (0.451584, 25.690112)]
    pairs += [(0.903168, 51.380224)] * 5 + [(0.225792, 25.690112), (0.451584, 51.380224)]
    mega = [10.838016, *(x for pair in pairs for x in pair), 1.024]
    assert macs(shaped("mobilenet"), 3, 224, 224) == [round(x * 1e6) for x in mega]


@pytest.mark.parametrize(
    ("name", "size", "mega"),
    [
        ("resnet20_cifar", 32, 40.813184),
        ("vgg16_cifar", 32, 313.201664),  # "313M MACs"; 313,196,544 in the convolutions
        ("vgg16", 224, 15_470.264320),  # as torchvision documents: 15.47 G
        ("alexnet", 224, 714.188480),  # 0.714 G
    ],
)
def test_macs_are_the_published_ones(name, size, mega):
    assert sum(macs(shaped(name), 3, size, size)) == round(mega * 1e6)


def test_names_and_shapes_of_the_alexnet_schedules():
    shapes = {n: tuple(p.shape) for n, p in shaped("alexnet").named_parameters() if p.dim() > 1}
    assert shapes == {
        "features.0.weight": (64, 3, 11, 11),
        "features.3.weight": (192, 64, 5, 5),
        "features.6.weight": (384, 192, 3, 3),
        "features.8.weight": (256, 384, 3, 3),
        "features.10.weight": (256, 256, 3, 3),
        "classifier.1.weight": (4096, 9216),
        "classifier.4.weight": (4096, 4096),
        "classifier.6.weight": (1000, 4096),
    }


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("vgg16_cifar", [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]),
        ("vgg19", [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34]),
        ("vgg11_bn_cifar", [0, 4, 8, 11, 15, 18, 22, 25]),
    ],
)
def test_places_of_the_vgg_convolutions(name, places):
    model = shaped(name)
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert found == [f"features.{k}" for k in places]
    head = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert head == (["classifier"] if "cifar" in name else [f"classifier.{k}" for k in (0, 3, 6)])


def test_names_of_the_mobilenet_schedules():
    found = [n for n, p in shaped("mobilenet").named_parameters() if p.dim() > 1]
    blocks = [f"model.{k}.{place}.weight" for k in range(1, 14) for place in (0, 3)]
    assert found == ["model.0.0.weight", *blocks, "fc.weight"]


def test_names_of_the_resnext_schedule():
    found = {n for n, p in shaped("resnext101_32x4d").named_parameters() if p.dim() > 1}
    expected = {"features.0.weight", "last_linear.weight"}
    for stage, depth in zip((4, 5, 6, 7), (3, 4, 23, 3), strict=True):
        for block in range(depth):
            places = ("0.0.0", "0.0.3", "0.1", *(("1.0",) if block == 0 else ()))
            expected |= {f"features.{stage}.{block}.0.{place}.weight" for place in places}
    assert found == expected
    assert len(found) == 105


def test_names_of_the_plain_and_residual_networks_of_cifar():
    plain, residual = (
        {n for n, _ in shaped(f"{name}20_cifar").named_parameters()} for name in ("plain", "resnet")
    )
    assert plain == {n for n in residual if "downsample" not in n}
    assert {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "fc.weight"} <= plain
    assert {"layer1.0.relu1", "layer3.2.relu2"} <= {
        n for n, _ in shaped("plain20_cifar").named_modules()
    }
    nobn = shaped("plain20_cifar_nobn")
    assert {n for n, _ in nobn.named_parameters()} == {n for n in plain if ".bn" not in f".{n}"}


@pytest.mark.parametrize(
    ("name", "modules"),
    [  # those the quantizers' overrides name
        ("alexnet_bn", {"features.0": nn.Conv2d, "features.1": nn.ReLU, "classifier.5": nn.ReLU,
                        "classifier.6": nn.Linear}),
        ("preact_resnet18", {"conv1": nn.Conv2d, "relu1": nn.ReLU, "final_relu": nn.ReLU,
                             "fc": nn.Linear, "layer1.1.pre_relu": nn.ReLU}),
        ("preact_resnet20_cifar", {"conv1": nn.Conv2d, "layer1.0.pre_relu": nn.ReLU,
                                   "final_relu": nn.ReLU, "fc": nn.Linear}),
        ("resnet18", {"conv1": nn.Conv2d, "relu": nn.ReLU, "layer1.0.relu1": nn.ReLU}),
        ("simplenet_cifar", {"relu_conv1": nn.ReLU, "relu_fc2": nn.ReLU, "pool2": nn.MaxPool2d}),
        ("simplenet_mnist", {"relu3": nn.ReLU, "fc2": nn.Linear}),
    ],
)  # fmt: skip
def test_modules_distiller_names(name, modules):
    assert {n: type(m) for n, m in shaped(name).named_modules() if n in modules} == modules


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("preact_resnet20_cifar_conv_ds", [f"layer{k}.0.downsample.weight" for k in (2, 3)]),
        ("preact_resnet20_cifar", []),
        ("preact_resnet18", [f"layer{k}.0.downsample.0.weight" for k in (2, 3, 4)]),
        ("preact_resnet50", [f"layer{k}.0.downsample.0.weight" for k in (1, 2, 3, 4)]),
    ],
)  # fmt: skip
def test_names_of_the_preactivation_shortcuts(name, expected):
    model = shaped(name)
    assert [n for n, _ in model.named_parameters() if "downsample" in n] == expected


def test_names_inside_the_preactivation_blocks():
    block = [n for n, _ in shaped("preact_resnet50").layer2[0].named_children()]
    assert block == ["pre_bn", "pre_relu", "conv1", "bn1_2", "relu1_2", "conv2", "bn2_3", "relu2_3",
                     "conv3", "downsample"]  # fmt: skip
    first = {n for n, _ in shaped("preact_resnet18").layer1[0].named_parameters()}
    assert not any(n.startswith("pre_bn") for n in first)  # the stem has normalized already
    small = {n for n, _ in shaped("preact_resnet20_cifar").layer1[0].named_parameters()}
    assert small == {"pre_bn.weight", "pre_bn.bias", "conv1.weight", "bn.weight", "bn.bias",
                     "conv2.weight"}  # fmt: skip


@pytest.mark.parametrize("name", CAPTURED)
def test_can_be_captured_and_cut(name):
    torch.manual_seed(0)
    model = CAPTURED[name]()
    graph = capture(model, example(name))
    assert graph.how == "fx"
    groups = channel_groups(model, graph)
    free = [g for g in groups if g.protected is None]
    assert len(free) == len(groups) - 1  # all but the classes, or words
    first = "encoder.weight" if name == "word_lstm" else next(iter(dict(model.named_parameters())))
    assert any(g.id.startswith(first) for g in free)


def test_every_family_is_captured():
    families = {re.sub(r"\d.*|_.*", "", n) for n in NAMES}
    assert families - {re.sub(r"\d.*|_.*", "", n) for n in CAPTURED} == {"resnet"}  # in graph tests


def test_alexnet_bn_averages_nothing_at_224():
    model = shaped("alexnet_bn")
    assert model.features(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 256, 6, 6)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-4, 0.9)}


@pytest.mark.parametrize("conv_downsample", [False, True])
def test_a_preactivation_block_without_its_convolutions_is_its_shortcut(conv_downsample):
    torch.manual_seed(0)
    block = PreactCifarBlock(4, 8, 2, conv_downsample).eval()
    nn.init.zeros_(block.conv2.weight)
    nn.init.constant_(block.pre_bn.bias, 0.5)
    x = torch.randn(2, 4, 6, 6)
    if conv_downsample:
        active = F.relu(x / (1 + block.pre_bn.eps) ** 0.5 + 0.5)
        expected = F.conv2d(active, block.downsample.weight, stride=2)
    else:
        expected = F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 2, 2))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_an_identity_shortcut_is_not_activated(bottleneck):
    width = 2 if bottleneck else 8
    block = PreactBlock(8, width, 1, bottleneck=bottleneck, shortcut=False, preactivate=True)
    nn.init.zeros_((block.conv3 if bottleneck else block.conv2).weight)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x), x)


def test_a_resnext_block_is_the_rectified_sum_of_its_branches():
    torch.manual_seed(0)
    block = ResNeXt(depths=(1, 1, 1, 1), **IMAGES).eval().features[5][0]
    x = torch.randn(1, 256, 8, 8)
    residual, shortcut = block[0]
    with torch.no_grad():
        assert torch.equal(block(x), F.relu(residual(x) + shortcut(x)))
        assert block(x).shape == (1, 512, 4, 4)
    assert residual[0][3].groups == 32


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("mobilenet_075", [24, 48, 96, 192, 384, 768]),
        ("mobilenet_050", [16, 32, 64, 128, 256, 512]),
        ("mobilenet_025", [8, 16, 32, 64, 128, 256]),
    ],
)
def test_mobilenet_widths(name, widths):
    model = shaped(name)
    assert sorted({m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)}) == widths


def test_mobilenet_keeps_eight_channels_and_refuses_no_width():
    with torch.device("meta"):
        narrow = MobileNet(width_mult=0.1, **IMAGES)
    assert narrow.model[0][0].out_channels == 8
    assert narrow.fc.in_features == 102
    with pytest.raises(ValueError, match="width_mult must be > 0, got 0"):
        MobileNet(width_mult=0, **IMAGES)


def test_depth_that_is_not_6n_plus_2_is_refused():
    with pytest.raises(ValueError, match="6n \\+ 2 with n >= 1, got 21"):
        PreactCifarResNet(21, conv_downsample=False, **IMAGES)


def test_names_of_the_language_model_schedules():
    untied = shaped("word_lstm?num_classes=9&embedding=4&hidden=6&tied=false")
    assert [n for n, _ in untied.named_parameters()] == [
        "encoder.weight",
        *(f"rnn.{kind}_l{k}" for k in (0, 1)
          for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        "decoder.weight",
        "decoder.bias",
    ]  # fmt: skip


def test_tied_weights_are_one_parameter_with_two_names(lm):
    assert lm.decoder.weight is lm.encoder.weight
    assert "decoder.weight" not in dict(lm.named_parameters())
    assert {"encoder.weight", "decoder.weight"} <= set(lm.state_dict())
    with pytest.raises(UserError, match="tied needs embedding = hidden, got 4 and 6"):
        resolve("word_lstm?embedding=4&hidden=6&num_classes=9")


@given(st.integers(1, 6), st.lists(st.integers(0, 19), min_size=6, max_size=6))
def test_a_word_changes_no_logits_before_it(step, later):
    torch.manual_seed(0)
    model = resolve("word_lstm?num_classes=20&embedding=6&hidden=6").model.eval()
    text = torch.arange(6).repeat(2, 1)
    other = text.clone()
    other[1, step:] = torch.tensor(later[step:], dtype=torch.int64)
    with torch.no_grad():
        out, changed = model(text), model(other)
    assert out.shape == (2, 6, 20)
    torch.testing.assert_close(out[1, :step], changed[1, :step])
    torch.testing.assert_close(out[0], changed[0])


def test_the_language_model_is_its_layers_in_a_row(lm):
    text = torch.tensor([[3, 1, 4, 1, 5]])
    x = lm.encoder.weight[text[0]]
    for k in (0, 1):  # gates i, f, g, o of torch.nn.LSTM's documentation
        w_ih, w_hh, b_ih, b_hh = lm.rnn.all_weights[k]
        h, c, steps = torch.zeros(6), torch.zeros(6), []
        for row in x:
            i, f, g, o = (w_ih @ row + b_ih + w_hh @ h + b_hh).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            steps.append(h)
        x = torch.stack(steps)
    torch.testing.assert_close(lm(text)[0], x @ lm.encoder.weight.T + lm.decoder.bias)


def test_one_lstm_layer_is_built_without_a_warning():
    assert resolve("word_lstm?layers=1&num_classes=9&embedding=4&hidden=4").model.rnn.dropout == 0
