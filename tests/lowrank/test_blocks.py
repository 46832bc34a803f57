"""Blocks alone: shapes for every geometry, costs by hand, weights near to the layer's."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lowrank_case import made, seen
from torch import nn

from gracile import registry
from gracile.analyze.cost import cost
from gracile.errors import UserError
from gracile.graph.capture import capture
from gracile.lowrank.imitation import count_and_judge, imitate
from gracile.nn.blocks import (
    Block,
    all_args,
    block_of,
    build_block,
    linear_layers,
    same_size,
    standing_for,
)
from gracile.nn.chain import Chain, Layer, layer_of
from gracile.nn.schemes import product

VARIANTS = [
    ("separable", {}),
    ("separable", {"norm": True, "activation": "relu"}),
    ("grouped", {"groups": 2}),
    ("grouped", {"groups": 2, "pointwise": True, "activation": "silu"}),
    ("bottleneck", {"width": 2}),
    ("bottleneck", {"width": 2, "expand": False, "norm": True}),
    ("inverted_residual", {"expand": 2}),
    ("inverted_residual", {"expand": 3, "norm": False, "activation": "none"}),
]


def begun(name, module, **args):
    """The block with the weights that it begins with."""
    layer = layer_of(module)
    block = block_of(name, layer, args)
    factors = registry.get("block", name).meta["start"](module.weight, layer, block)
    return block, build_block(block, factors, module.bias, dtype=module.weight.dtype)


def off(name, module, **args):
    """Relative error of a linear block's product."""
    block, net = begun(name, module, **args)
    factors = [m.weight.detach() for m in net if hasattr(m, "weight")]
    found = product(block.chain, factors, layer_of(module))
    wanted = module.weight.detach()
    return float((found - wanted).norm() / wanted.norm())


# --- costs


def counted(module, x):
    return sum(row.macs for row in cost(module, capture(module, x)))


def test_a_bottleneck_before_5x5_by_the_book():
    layer = Layer(480, 48, (5, 5), padding=(2, 2))
    block = block_of("bottleneck", layer, {"width": 16, "expand": False})
    assert layer.macs((14, 14)) == 112_896_000
    assert block.macs((14, 14)) == 14 * 14 * (480 * 16 + 25 * 16 * 48) == 5_268_480
    x = torch.zeros(2, 480, 14, 14)
    assert counted(nn.Sequential(nn.Conv2d(480, 48, 5, padding=2)).eval(), x) == 112_896_000
    assert counted(build_block(block).eval(), x) == 5_268_480


def test_pooling_in_the_place_of_a_head_costs_nothing():
    layer = Layer(7 * 7 * 1024, 1024)
    block = block_of("global_pool", layer, {"image": [1024, 7, 7], "linear": False})
    assert layer.macs(()) == 51_380_224
    assert (block.macs(()), block.params) == (0, 0)
    assert counted(build_block(block).eval(), torch.zeros(2, 7 * 7 * 1024)) == 0


def test_separable_3x3_of_32_outputs_is_seven_times_less():
    layer = Layer(32, 32, (3, 3), padding=(1, 1))
    block = block_of("separable", layer, {})
    assert layer.macs((8, 8)) / block.macs((8, 8)) == pytest.approx(9 * 32 / (9 + 32))
    assert round(layer.macs((8, 8)) / block.macs((8, 8))) == 7


@pytest.mark.parametrize(("name", "args"), VARIANTS, ids=str)
def test_what_is_said_to_cost_is_counted(name, args):
    block = block_of(name, Layer(8, 8, (3, 3), stride=(2, 1), padding=(1, 1)), args)
    net = build_block(block).eval()
    assert counted(net, torch.zeros(2, 8, 9, 9)) == block.macs((9, 9))
    assert sum(p.numel() for p in net.parameters()) == block.params


def test_grouped_and_inverted_residual_by_hand():
    layer = Layer(16, 16, (3, 3), padding=(1, 1))
    assert block_of("grouped", layer, {}).macs((1, 1)) == 16 * 16 * 9 // 4
    both = block_of("grouped", layer, {"pointwise": True})
    assert both.macs((1, 1)) == 16 * 16 * 9 // 4 + 16 * 16 // 4
    assert block_of("inverted_residual", layer, {}).macs((1, 1)) == 6 * 16 * (16 + 9 + 16)


# --- shapes


@pytest.mark.parametrize(("name", "args"), VARIANTS, ids=str)
@given(
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    outputs=st.sampled_from([2, 4, 6]),
    bias=st.booleans(),
)
def test_a_block_gives_the_shape_its_layer_gave(
    name, args, size, kernel, stride, padding, dilation, outputs, bias
):
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(all(n + 2 * p >= w for n, p, w in zip(size, padding, spans, strict=True)))
    assume(max(kernel) > 1)
    module = nn.Conv2d(4, outputs, kernel, stride, padding, dilation, bias=bias)
    _, net = begun(name, module, **args)
    x = torch.randn(2, 4, *size)
    assert net.eval()(x).shape == net.train()(x).shape == module(x).shape
    last = [m for m in net if isinstance(m, nn.Conv2d)][-1]
    assert (last.bias is not None) == bias


@pytest.mark.parametrize("kind", ["conv", "strided", "uneven", "dilated", "reflected", "conv1d"])
@pytest.mark.parametrize(("name", "args"), VARIANTS, ids=str)
def test_every_geometry_and_one_axis(name, args, kind):
    module = made(kind)
    _, net = begun(name, module, **args)
    x = seen(module)
    assert net(x).shape == module(x).shape
    assert net(x).dtype == x.dtype


def test_of_a_grouped_layer_separable_mixes_within_the_groups():
    module = made("grouped")
    _, net = begun("separable", module)
    assert [m.groups for m in net] == [8, 2]
    assert net(seen(module)).shape == module(seen(module)).shape


# --- where they begin


def test_separable_weights_are_kept_as_they_are():
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, padding=1).double()
    with torch.no_grad():
        spatial = torch.randn(1, 4, 3, 3, dtype=torch.float64)
        module.weight.copy_(torch.randn(6, 4, 1, 1, dtype=torch.float64) * spatial)
    _, net = begun("separable", module)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(net(x), module(x))


def test_a_bottleneck_of_full_width_computes_the_same():
    module = made("strided")
    x = seen(module)
    for expand in (True, False):
        square = nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False).double()
        _, net = begun("bottleneck", square, width=4, expand=expand)
        torch.testing.assert_close(net(x), square(x))


def test_an_expansion_by_all_filters_computes_the_same_also_around_a_shortcut():
    torch.manual_seed(0)
    module = nn.Conv2d(4, 4, (3, 1), padding=(1, 0)).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for residual in (True, False):
        args = {"expand": 3, "norm": False, "activation": "none", "residual": residual}
        block, net = begun("inverted_residual", module, **args)
        assert block.residual == residual
        torch.testing.assert_close(net(x), module(x))


def test_filters_beyond_the_layers_are_not_mixed_in():
    module = nn.Conv2d(2, 2, (2, 1)).double()  # of rank 2 at most
    _, net = begun("inverted_residual", module, expand=4, norm=False, activation="none")
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(net(x), module(x))
    assert net[1].weight.abs().flatten(1).sum(1).min() > 0


def test_grouped_weights_are_where_the_shuffle_puts_them():
    torch.manual_seed(0)
    module = nn.Conv2d(6, 6, 3, padding=1).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        for o in range(6):  # behind the shuffle output o is of group o % 3, which reads 2 inputs
            for i in range(6):
                module.weight[o, i] *= i // 2 == o % 3
    for pointwise in (False, True):
        _, net = begun("grouped", module, groups=3, pointwise=pointwise)
        torch.testing.assert_close(net(x), module(x))


def test_a_pointwise_behind_the_groups_is_nearer():
    torch.manual_seed(0)
    module = nn.Conv2d(8, 8, 3).double()
    assert off("grouped", module, pointwise=True) < off("grouped", module) < 1


def test_pooled_weights_are_sums_over_positions():
    torch.manual_seed(0)
    module = nn.Linear(3 * 4, 5).double()
    _, net = begun("global_pool", module, image=(3, 2, 2))
    flat = torch.randn(2, 3, 1, 1, dtype=torch.float64).expand(-1, -1, 2, 2).flatten(1)
    torch.testing.assert_close(net(flat), module(flat))
    expected = module.weight.reshape(5, 3, 4).sum(2)
    torch.testing.assert_close(net[-1].weight, expected)


def test_a_short_distillation_lowers_the_error_and_never_raises_it():
    torch.manual_seed(0)
    module = nn.Conv2d(4, 4, 3, padding=1)
    xs = [torch.randn(8, 4, 6, 6) for _ in range(3)]
    with torch.no_grad():
        data = [(x, module(x)) for x in xs]
    _, net = begun("inverted_residual", module, expand=2)
    start, end = imitate(net, data, steps=60)
    assert end < 0.8 * start
    assert count_and_judge(net, data) == pytest.approx(end, rel=1e-4)
    same = imitate(net, data, steps=1, lr=1e3)
    assert same[1] <= same[0] * (1 + 1e-6)


# --- what is refused


@pytest.mark.parametrize(
    ("name", "layer", "args", "text"),
    [
        ("separable", Layer(4, 8, (1, 1)), {}, "one place"),
        ("separable", Layer(4, 8, (3, 3), groups=4), {}, "depthwise already"),
        ("separable", Layer(4, 8), {}, "no convolution"),
        ("separable", Layer(4, 8, (3, 3)), {"activation": "rleu"}, "no activation 'rleu'.*relu"),
        ("grouped", Layer(4, 6, (3, 3)), {"groups": 4}, "divide 4 inputs and 6 outputs, got 4"),
        ("grouped", Layer(4, 8, (3, 3), groups=2), {}, "2 groups already"),
        ("bottleneck", Layer(8, 8, (3, 3)), {"ratio": 1.5}, r"ratio must be in \(0, 1\], got 1.5"),
        ("bottleneck", Layer(8, 8, (3, 3)), {"width": 9}, r"width must be in 1\.\.8"),
        ("bottleneck", Layer(8, 8, (1, 1)), {}, "one place"),
        ("inverted_residual", Layer(8, 8, (3, 3)), {"expand": 0}, "expand must be >= 1"),
        ("global_pool", Layer(8, 8), {"image": (8, 1, 1)}, "one pixel only"),
        ("global_pool", Layer(8, 8), {}, "no flattened image of 8"),
        ("global_pool", Layer(8, 3), {"image": (2, 2, 2), "linear": False}, "must be 3 channels"),
        ("global_pool", Layer(8, 8, (3, 3)), {}, "it is a convolution"),
        ("separable", Layer(8, 8, (3, 3)), {"norms": True}, "no option 'norms'.*norm"),
        ("seperable", Layer(8, 8, (3, 3)), {}, "unknown block 'seperable'.*separable"),
    ],
)
def test_what_a_block_is_not_for_is_refused(name, layer, args, text):
    with pytest.raises(UserError, match=text):
        block_of(name, layer, args)


def test_a_residual_needs_the_same_shape():
    assert same_size(Layer(4, 4, (3, 3), padding=(1, 1)))
    assert not same_size(Layer(4, 4, (3, 3), padding=(1, 1), stride=(2, 2)))
    assert not same_size(Layer(4, 4, (3, 3)))
    assert not same_size(Layer(4, 8, (3, 3), padding=(1, 1)))


def test_a_head_is_described_by_its_ends():
    head = nn.Sequential(nn.Dropout(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))
    assert standing_for(head) == Layer(12, 3, bias=False)
    assert linear_layers(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))) == []
    with pytest.raises(UserError, match="one head"):
        standing_for(nn.Sequential(nn.ReLU()))


def test_options_are_complete_in_a_plan():
    assert all_args("separable", {"norm": True}) == {"norm": True, "activation": "none"}
    assert not Block(Chain(()), norm=True).linear
