"""What stands for a layer: sizes, costs, and the module, all without weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowrank_case import factorized, made, seen, taken
from torch import nn

from gracile import registry
from gracile.analyze.cost import totals
from gracile.errors import UserError
from gracile.graph.capture import capture
from gracile.lowrank.scheme import along
from gracile.nn.chain import Chain, Layer, Reorder, Shuffle, build, factors_of, layer_of
from gracile.nn.schemes import chain_of, full_ranks

CONV = Layer(64, 128, (3, 5), stride=(2, 1), padding=(1, 2), bias=True)


def test_textbook_5x5_costs_112_9_million_and_5_3_behind_a_bottleneck():
    direct = Layer(480, 48, (5, 5), padding=(2, 2))
    narrow = Chain((direct.like(480, 16), Layer(16, 48, (5, 5), padding=(2, 2))))
    assert direct.macs((14, 14)) == 14 * 14 * 48 * 5 * 5 * 480 == 112_896_000
    assert narrow.macs((14, 14)) == 1_505_280 + 3_763_200  # 5.3 M


def test_textbook_head_has_51_million_weights():
    assert Layer(7 * 7 * 1024, 1024).params == 51_380_224


def test_textbook_depthwise_separable_3x3_is_about_seven_times_cheaper():
    """Scheme 1 with one filter for each channel is a depthwise-separable convolution."""
    layer = Layer(32, 32, (3, 3), padding=(1, 1))
    chain = chain_of("scheme1", layer, [1])
    assert [s.groups for s in chain.layers] == [32, 1]
    ratio = layer.macs((56, 56)) / chain.macs((56, 56))
    assert ratio == pytest.approx(1 / (1 / 32 + 1 / 9)) == pytest.approx(7.02, abs=0.01)


def test_costs_of_the_reference_formulas():
    s, t, k = 64, 128, 3
    layer = Layer(s, t, (k, k), padding=(1, 1))
    assert chain_of("tucker2", layer, [16, 32]).params == s * 16 + 16 * 32 * k * k + t * 32
    assert chain_of("cp", layer, [20]).params == 20 * (s + k + k + t)
    assert chain_of("cp3", layer, [20]).params == 20 * (s + k * k + t)
    assert chain_of("scheme2", layer, [20]).macs((8, 8)) == 20 * (s + t) * k * 64
    assert chain_of("scheme1", layer, [2]).macs((8, 8)) == 2 * s * (k * k + t) * 64
    assert chain_of("scheme1_separable", layer, [2]).params == 2 * s * (2 * k + t)
    assert chain_of("svd", Layer(300, 200), [20]).params == 20 * (300 + 200)
    assert chain_of("monochromatic", Layer(3, 96, (7, 7)), [12]).params == 3 * 12 + 96 * 49
    two = chain_of("bicluster", layer, [4, 2, 8, 16])
    assert two.params == s * 2 * 8 + 8 * 8 * 16 * k * k + t * 4 * 16
    one = chain_of("bicluster_rank1", layer, [4, 2, 8])
    assert one.params == s * 2 * 8 + 8 * 8 * k * k + t * 4 * 8


def test_strides_lie_where_their_axis_is():
    first, last = chain_of("scheme2", CONV, [10]).layers
    assert (first.kernel, first.stride, first.padding, first.bias) == (
        (3, 1),
        (2, 1),
        (1, 0),
        False,
    )
    assert (last.kernel, last.stride, last.padding, last.bias) == ((1, 5), (1, 1), (0, 2), True)
    assert [s.bias for s in chain_of("cp", CONV, [3]).layers] == [False, False, False, True]


def test_a_strided_scheme2_computes_more_rows_first():
    layer = Layer(8, 8, (3, 3), stride=(2, 2), padding=(1, 1))
    assert chain_of("scheme2", layer, [4]).macs((16, 16)) == 4 * 8 * 3 * 8 * 16 + 4 * 8 * 3 * 8 * 8


def half_way(scheme, layer):
    """Ranks within the chain's own limits."""
    return along(scheme, layer, max(1, max(full_ranks(scheme, layer)) // 2))


@pytest.mark.parametrize(("scheme", "kind"), taken(registry.names("factorizer")))
def test_costs_and_shapes_are_those_of_the_network(scheme, kind):
    module = made(kind)
    layer = layer_of(module)
    chain = chain_of(scheme, layer, half_way(scheme, layer))
    net = build(chain, bias=module.bias).float()
    x = seen(module, 1).float()
    counted = totals(net, capture(net, x))
    assert (counted.macs, counted.params) == (chain.macs(x.shape[2:]), chain.params)
    assert net(x).shape == module.float()(x).shape
    if layer.kernel:
        assert chain.output_size(x.shape[2:]) == layer.output_size(x.shape[2:]) == net(x).shape[2:]


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_the_description_of_a_module_is_the_module(
    i, o, kernel, stride, padding, dilation, g, bias
):
    module = nn.Conv2d(i * g, o * g, kernel, stride, padding, dilation, g, bias)
    layer = layer_of(module)
    x = torch.zeros(1, i * g, 9, 10)
    assert layer.weight_shape == module.weight.shape
    assert layer.output_size((9, 10)) == module(x).shape[2:]
    assert layer.params == sum(p.numel() for p in module.parameters())
    again = build(Chain((layer,)))[0]
    assert layer_of(again) == layer
    assert again(x).shape == module(x).shape


def test_same_padding_becomes_numbers_or_is_refused():
    even = layer_of(nn.Conv2d(2, 2, (3, 5), padding="same"))
    assert even.padding == (1, 2)
    assert layer_of(nn.Conv2d(2, 2, 3, padding="valid")).padding == (0, 0)
    with pytest.raises(UserError, match=r"'same' of kernel \(4, 3\) is uneven"):
        layer_of(nn.Conv2d(2, 2, (4, 3), padding="same"))


def test_building_draws_nothing_and_copies():
    weight = torch.ones(2, 3)
    before = torch.get_rng_state()
    net = build(Chain((Layer(3, 2, bias=True),)), [weight], torch.ones(2))
    build(chain_of("scheme2", CONV, [10]))
    assert torch.equal(torch.get_rng_state(), before)
    weight.zero_()
    assert net(torch.ones(1, 3)).tolist() == [[4.0, 4.0]]


def test_a_saved_chain_is_built_again_from_its_ranks():
    net = factorized(made("uneven"), "tucker2", [2, 3])
    again = build(chain_of("tucker2", layer_of(made("uneven")), [2, 3]), dtype=torch.float64)
    again.load_state_dict(net.state_dict())
    x = seen(made("uneven"))
    assert torch.equal(again(x), net(x))


@pytest.mark.parametrize(
    ("scheme", "ranks"), [("bicluster", [2, 3, 1, 2]), ("monochromatic", [3]), ("svd", [2])]
)
def test_a_chain_tells_its_factors_orders_of_channels_included(scheme, ranks):
    module = made("conv")
    net = factorized(module, scheme, ranks)
    chain = chain_of(scheme, layer_of(module), ranks)
    again = build(chain, factors_of(net))
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(seen(module)), net(seen(module)))


def test_a_bias_goes_back_before_the_channels_are_put_in_order():
    chain = Chain((Layer(1, 3, bias=True), Reorder(3)))
    net = build(chain, [torch.zeros(3, 1), torch.tensor([2, 0, 1])], torch.tensor([1.0, 2.0, 3.0]))
    assert net(torch.zeros(1, 1)).tolist() == [[1.0, 2.0, 3.0]]


def test_a_shuffle_has_no_tensor():
    chain = Chain((Layer(2, 4, (1, 1)), Shuffle(4, 2)))
    assert chain.shapes == ((4, 2, 1, 1),)
    net = build(chain, [torch.arange(8.0).reshape(4, 2, 1, 1)])
    assert net(torch.ones(1, 2, 1, 1)).flatten().tolist() == [1.0, 9.0, 5.0, 13.0]


def test_wrong_layers_factors_and_ranks_are_named():
    with pytest.raises(
        UserError, match=r"only Linear, Conv1d, Conv2d and Embedding.*ConvTranspose2d"
    ):
        layer_of(nn.ConvTranspose2d(2, 2, 3))
    with pytest.raises(UserError, match=r"groups must divide.*3 groups"):
        Layer(4, 4, (3, 3), groups=3)
    with pytest.raises(UserError, match=r"stride must be 2 numbers"):
        Layer(4, 4, (3, 3), stride=(1,))
    with pytest.raises(UserError, match=r"one or two axes"):
        Layer(4, 4, (3, 3, 3))
    with pytest.raises(UserError, match=r"does not fit"):
        Layer(4, 4, (3, 3)).macs((2, 2))
    with pytest.raises(UserError, match=r"shapes \(\(2, 3\),\), got \(\(3, 2\),\)"):
        build(Chain((Layer(3, 2),)), [torch.zeros(3, 2)])
    with pytest.raises(UserError, match=r"none as bias"):
        build(Chain((Layer(3, 2),)), [torch.zeros(2, 3)], torch.zeros(2))
    with pytest.raises(UserError, match=r"'rank' must be in 1..128, got 0"):
        chain_of("svd", CONV, [0])
    with pytest.raises(UserError, match=r"2 ranks \(inputs, outputs\), got \(3,\)"):
        chain_of("tucker2", CONV, [3])
    with pytest.raises(UserError, match=r"unknown factorizer 'tucker'.*tucker2"):
        chain_of("tucker", CONV, [3])


def test_layers_a_scheme_is_not_for_are_refused_with_the_way_out():
    linear, grouped = Layer(8, 8), Layer(8, 8, (3, 3), groups=2)
    for scheme in ("scheme1", "scheme2", "tucker2", "cp", "cp3"):
        with pytest.raises(UserError, match=r"use svd"):
            full_ranks(scheme, linear)
    with pytest.raises(UserError, match=r"use scheme1"):
        full_ranks("scheme1_separable", Layer(8, 8, (3,)))
    with pytest.raises(UserError, match=r"2 groups.*use svd or scheme1"):
        full_ranks("monochromatic", grouped)
    with pytest.raises(UserError, match=r"2 groups.*use tucker2"):
        full_ranks("bicluster", grouped)
    with pytest.raises(UserError, match=r"must divide the 8 filters, got 3. Nearest below: 2"):
        chain_of("monochromatic", Layer(3, 8, (3, 3)), [3])
    with pytest.raises(UserError, match=r"3 must divide 8 inputs"):
        chain_of("bicluster", Layer(8, 8, (3, 3)), [3, 2, 1, 1])
    with pytest.raises(UserError, match=r"'outputs' must be in 1..4 for 2 x 2, got 5"):
        chain_of("bicluster", Layer(8, 8, (3, 3)), [2, 2, 4, 5])
