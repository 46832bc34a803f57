"""Channel groups: which indices of which tensors go together, worked out by hand."""

import pytest
import torch
from channel_zoo import build
from torch import nn
from torch.nn import functional as F

from gracile.graph.capture import capture
from gracile.graph.dependency import Slice, channel_groups


def groups_of(model, *inputs):
    return {g.id: g for g in channel_groups(model, capture(model, inputs))}


def zoo(name):
    model, inputs = build(name)
    return groups_of(model, *inputs)


def slices(group, unit, at):
    return [s for s in group.units[unit] if s.at == at]


def test_a_unit_is_filter_bias_norm_statistics_and_the_columns_that_read_it():
    group = zoo("residual")["conv1.weight"]
    assert set(group.units[2]) == {
        Slice("conv1.weight", 0, (2,)),
        Slice("bn1.weight", 0, (2,)),
        Slice("bn1.bias", 0, (2,)),
        Slice("bn1.running_mean", 0, (2,)),
        Slice("bn1.running_var", 0, (2,)),
        Slice("conv2.weight", 1, (2,)),
    }
    assert (group.producers, group.consumers) == (("conv1.weight",), ("conv2.weight",))
    assert group.protected is None
    assert group.sizes["conv2.weight", 1] == 5


def test_a_residual_stream_is_one_group_of_all_its_writers_and_readers():
    group = zoo("residual")["stem.weight"]
    assert group.producers == ("stem.weight", "conv2.weight")
    assert group.consumers == ("conv1.weight", "fc.weight")
    assert group.written(3) == (Slice("stem.weight", 0, (3,)), Slice("conv2.weight", 0, (3,)))


def test_a_concatenation_shifts_the_second_producer():
    groups = zoo("concat")
    assert slices(groups["a.weight"], 1, "mix.weight") == [Slice("mix.weight", 1, (1,))]
    assert slices(groups["b.weight"], 1, "mix.weight") == [Slice("mix.weight", 1, (5,))]


def test_flatten_gives_each_channel_its_pixels_and_cat_twice_doubles_them():
    group = zoo("cat_twice")["conv.weight"]
    pixels = (*range(9, 18), *range(45, 54))  # 3 x 3 pixels, the copy 36 further on
    assert slices(group, 1, "fc.weight") == [Slice("fc.weight", 1, pixels)]


def test_depthwise_filters_follow_their_channel():
    group = zoo("depthwise")["point1.weight"]
    assert slices(group, 2, "depth.weight") == [Slice("depth.weight", 0, (4, 5))]
    assert slices(group, 2, "depth2.weight") == [Slice("depth2.weight", 0, (4, 5))]
    assert slices(group, 2, "point2.weight") == [Slice("point2.weight", 1, (4, 5))]
    assert group.producers == ("point1.weight", "depth.weight", "depth2.weight")


def test_whole_groups_or_the_same_channels_of_every_group_can_go():
    groups = zoo("grouped")
    whole, within = groups["stem.weight:outer"], groups["stem.weight:inner"]
    assert (len(whole.units), len(within.units)) == (2, 4)
    assert slices(whole, 1, "stem.weight")[0].index == (4, 5, 6, 7)
    assert slices(whole, 1, "grouped.groups") == [Slice("grouped.groups", 0, (1,))]
    assert slices(within, 1, "stem.weight")[0].index == (1, 5)
    assert slices(within, 1, "grouped.weight") == [Slice("grouped.weight", 1, (1,))]
    assert slices(groups["grouped.weight:inner"], 1, "head.weight")[0].index == (1, 7)
    assert whole.overlaps == ("stem.weight:inner", "grouped.weight:inner")


def test_a_tied_weight_has_one_address_and_both_biases():
    group = zoo("shared")["up.weight"]
    assert {s.at for s in group.units[0]} == {
        "up.weight", "up.bias", "up2.bias", "down.weight",
    }  # fmt: skip


def test_a_module_called_twice_ties_its_inputs_to_its_outputs_through_the_scale():
    group = zoo("shared")["stem.weight"]
    assert len(group.units) == 6
    assert slices(group, 4, "scale") == [Slice("scale", 1, (4,))]
    assert set(slices(group, 4, "conv.weight")) == {
        Slice("conv.weight", 0, (4,)),
        Slice("conv.weight", 1, (4,)),
    }


def test_option_a_ties_the_copied_channels_and_leaves_the_zero_ones_free():
    group = zoo("option_a")["stem.weight"]
    by_filter = {s.index[0]: u for u in range(8) for s in group.written(u) if s.at == "conv.weight"}
    middle = group.units[by_filter[3]]
    assert Slice("stem.weight", 0, (1,)) in middle
    assert Slice("pad.source", 0, (3,)) in middle
    assert Slice("pad.source", 1, (1,)) in middle
    front = group.units[by_filter[0]]
    assert not any(s.at == "stem.weight" for s in front)
    assert Slice("pad.source", 0, (0,)) in front


def test_removable_leaves_a_narrow_layer_its_last_channel():
    group = zoo("option_a")["stem.weight"]
    narrow = [u for u in range(8) if any(s.at == "stem.weight" for s in group.units[u])]
    assert group.removable(narrow) == narrow[:3]
    assert len(group.removable(range(8))) == 7


def test_a_transposed_convolution_writes_along_dim_1():
    group = zoo("transposed")["up.weight:inner"]
    assert group.writes == {"up.weight": 1}
    assert group.written(0) == (Slice("up.weight", 1, (0, 3)),)  # its reader has two groups


def test_group_norm_can_lose_whole_groups_or_the_same_channels_of_each():
    groups = zoo("transposed")
    first = {id: slices(g, 0, "group_norm.weight") for id, g in groups.items()}
    assert {id: s[0].index for id, s in first.items() if s} == {
        "up.weight:outer": (0, 1, 2, 3, 4, 5, 6, 7),  # both norm groups of a convolution's group
        "grouped.weight:outer": (0, 1, 2, 3, 8, 9, 10, 11),  # the first norm group of each
        "grouped.weight:inner": (0, 1, 4, 5, 8, 9, 12, 13),
        "depth.weight": (0, 2, 4, 6, 8, 10, 12, 14),
    }
    assert slices(groups["grouped.weight:outer"], 0, "group_norm.num_groups")[0].index == (0, 2)


def test_inputs_and_outputs_are_protected():
    groups = zoo("two_outputs")
    assert groups["c.weight"].protected == "it is an output of the model"
    assert groups["a.weight"].protected is None
    assert groups["a.weight"].producers == ("a.weight", "b.weight")
    assert not any(s.at == "a.weight" and s.dim == 1 for g in groups.values() for s in g.units[0])


def crossed(x):
    return x + x.transpose(1, 2)


class Tail(nn.Module):
    """A convolution with 4 channels, then whatever is to be tried."""

    def __init__(self, tail, features=4):
        super().__init__()
        self.conv, self.fc, self.tail = nn.Conv2d(3, 4, 3), nn.Linear(features, 2), tail

    def forward(self, x):
        return self.fc(self.tail(self.conv(x)))


@pytest.mark.parametrize(
    ("tail", "features", "reason"),
    [
        (lambda x: torch.cumsum(x, 1).mean((2, 3)), 4, "works along the channels"),
        (lambda x: torch.special.i0(x).mean((2, 3)), 4, "operator 'special_i0' is not known"),
        (lambda x: x[:, x.detach().sum((0, 1, 2))[:1].long() * 0].mean((2, 3)), 1, "by a tensor"),
        (lambda x: x[:, 0].mean((1, 2), keepdim=True)[:, 0].expand(-1, 4), 4, "by number"),
        (lambda x: x.amax(1).flatten(1), 36, "reduces the channels"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1), "circular").mean((2, 3)), 6, "pads the channels"),
        (lambda x: x.mean((2, 3)).softmax(1), 4, "normalizes over the channels"),
        (lambda x: x.mean((2, 3)) + torch.ones(4), 4, "is a constant of the forward"),
        (lambda x: (x / x.relu()).mean((2, 3)), 4, "divides by channels"),
        (lambda x: x.pow(-1).mean((2, 3)), 4, "no positive number"),
        (lambda x: crossed(x[:, :, 2:, 2:]).mean((2, 3)), 4, "it lies in space"),
        (lambda x: x.mean((2, 3)).squeeze(), 4, "depends on the sizes"),
        (lambda x: F.conv2d(x, torch.ones(4, 1, 1, 1), groups=4).mean((2, 3)), 4, "a constant of"),
    ],
)
def test_what_cannot_be_followed_is_protected_with_the_reason(tail, features, reason):
    group = groups_of(Tail(tail, features), torch.randn(2, 3, 8, 8))["conv.weight"]
    assert group.protected is not None
    assert reason in group.protected


@pytest.mark.parametrize(
    ("tail", "features"),
    [
        (lambda x: F.max_pool2d(x, 2)[:, :, 0, 1:].mean(-1), 4),
        (lambda x: x[..., 0].amax(-1), 4),
        (lambda x: x[:, None].squeeze(1).sum((2, 3)), 4),
        (lambda x: F.interpolate(x, scale_factor=2).flatten(2).permute(0, 2, 1).mean(1), 4),
        (lambda x: F.pad(x, (1, 1, 1, 1)).flatten(2).softmax(2).mean(2), 4),
        (lambda x: (1 - x.clamp(0, 1) ** 2 / 3).mean((2, 3)), 4),
        (lambda x: x.view(x.shape[0], x.shape[1], -1).transpose(1, 2).mean(1), 4),
        (lambda x: x.permute(0, 2, 3, 1).reshape(x.size(0), -1), 144),
        (lambda x: torch.cat([x, x * 2], 2).mean((2, 3)), 4),
        (lambda x: torch.maximum(x, -x).contiguous().mean((2, 3)), 4),
        (lambda x: F.layer_norm(x, (6, 6)).mean((2, 3)), 4),
        (lambda x: F.layer_norm(x, (4, 6, 6)).mean((2, 3)), 4),
        (lambda x: x.reshape(-1, 4, 36).mean(2), 4),
        (lambda x: x.view(-1, 144), 144),
        (lambda x: x[:, 1:].mean((2, 3)), 3),
        (lambda x: x[:, ::2].mean((2, 3)), 2),
        (lambda x: x[:, [1, 0, 2, -1]].mean((2, 3)), 4),
        (lambda x: x.mean(1).flatten(1), 36),
        (lambda x: torch.split(x, [1, 3], 1)[1].mean((2, 3)), 3),
        (lambda x: torch.matmul(x, x).mean((2, 3)), 4),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)).mean((2, 3)), 6),
    ],
)
def test_what_keeps_channels_apart_is_followed(tail, features):
    group = groups_of(Tail(tail, features), torch.randn(2, 3, 8, 8))["conv.weight"]
    assert group.protected is None
    assert len(group.units) == 4


def test_channels_last_flatten_interleaves():
    tail = Tail(lambda x: x.permute(0, 2, 3, 1).flatten(1), 144)
    group = groups_of(tail, torch.randn(2, 3, 8, 8))["conv.weight"]
    assert slices(group, 1, "fc.weight")[0].index == tuple(range(1, 144, 4))


def test_a_weight_that_is_also_read_by_itself_is_protected():
    class Penalty(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(self.a(x)), self.a.weight.amax((0, 1))

    group = groups_of(Penalty(), torch.randn(2, 3))["a.weight"]
    assert "'amax' reduces the channels" in group.protected


def test_a_head_tied_to_an_embedding_ties_what_it_reads_to_what_that_writes():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.hidden = nn.Embedding(9, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.hidden(self.embed(x)))

    group = groups_of(Tied(), torch.tensor([[1, 2]]))["embed.weight"]
    assert group.protected is None
    assert set(group.units[2]) == {
        Slice("embed.weight", 1, (2,)),
        Slice("hidden.weight", 0, (2,)),
        Slice("hidden.weight", 1, (2,)),
        Slice("hidden.bias", 0, (2,)),
    }


def test_a_single_channel_has_nothing_to_choose():
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 1))
    assert "nothing to choose" in groups_of(model, torch.randn(1, 3, 4, 4))["0.weight"].protected


def test_without_a_graph_everything_is_protected_and_says_why():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(self.a(x if x.sum() > 0 else -x))

    groups = groups_of(Branches(), torch.ones(2, 3))
    assert set(groups) == {"a.weight", "b.weight"}
    assert all(
        "the forward cannot be followed (fx: TraceError" in g.protected for g in groups.values()
    )


def test_an_exported_graph_gives_the_same_groups():
    class Stubborn(type(build("residual")[0])):
        def forward(self, x):
            assert int(x.shape[1]) == 3
            return super().forward(x)

    model, inputs = build("residual")
    expected = groups_of(model, *inputs)
    model.__class__ = Stubborn
    graph = capture(model, inputs)
    assert graph.how == "export"
    got = {g.id: g for g in channel_groups(model, graph)}
    for id in ("stem.weight", "conv1.weight"):
        assert {frozenset(u) for u in got[id].units} == {frozenset(u) for u in expected[id].units}
        assert got[id].protected is None
