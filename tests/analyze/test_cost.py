"""Costs against numbers that others published or a pencil gives."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.analyze.cost import cost, totals
from gracile.graph.capture import capture
from gracile.nn.shortcut import ChannelPad


class Block(nn.Module):
    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        pad = (cout - cin) // 2
        self.shortcut = nn.Identity() if stride == 1 else ChannelPad(cin, pad, pad, stride)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet(depth):
    """CIFAR ResNet with parameter-free shortcuts, He et al. 2015, section 4.2."""
    n, widths = (depth - 2) // 6, (16, 16, 32, 64)
    layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for cin, cout in pairwise(widths):
        for k in range(n):
            first = k == 0
            layers.append(Block(cin if first else cout, cout, 2 if first and cin != cout else 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def rows(model, *shape):
    graph = capture(model, torch.randn(shape))
    return cost(model, graph), totals(model, graph)


@pytest.mark.parametrize(
    ("depth", "macs", "params"), [(20, 40_551_040, 269_722), (56, 125_485_696, 853_018)]
)
def test_cifar_resnets(depth, macs, params):
    _, total = rows(resnet(depth), 1, 3, 32, 32)
    assert (total.macs, total.params) == (macs, params)


def test_five_by_five_convolution():
    # 14 * 14 * 48 * 480 * 25 multiply-adds, the example of the depthwise-separable literature
    (row,), _ = rows(nn.Sequential(nn.Conv2d(480, 48, 5, padding=2, bias=False)), 1, 480, 14, 14)
    assert row.macs == 14 * 14 * 48 * 480 * 25 == 112_896_000
    assert (row.id, row.op, row.weight, row.params) == ("0", "conv", "0.weight", 48 * 480 * 25)


def test_depthwise_separable_costs_one_over_n_plus_one_over_k2():
    # Howard et al. 2017, arXiv:1704.04861, eq. 5
    plain, _ = rows(nn.Conv2d(32, 64, 3, padding=1), 1, 32, 10, 10)
    split = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 64, 1))
    _, total = rows(split, 1, 32, 10, 10)
    assert total.macs / plain[0].macs == pytest.approx(1 / 64 + 1 / 9)


def test_transposed_convolution_costs_input_pixels_times_kernel():
    (row,), _ = rows(nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), 1, 8, 5, 5)
    assert row.macs == 5 * 5 * 8 * 3 * 9


@pytest.mark.parametrize("batch", [1, 3])
def test_macs_are_for_one_sample(batch):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 8)

        def forward(self, x):
            y = self.fc(x)
            return torch.matmul(y, y.transpose(1, 2))

    got, total = rows(Tokens(), batch, 4, 6)
    assert [r.macs for r in got if r.op == "linear"] == [4 * 6 * 8]
    assert [r.macs for r in got if r.op == "matmul"] == [4 * 4 * 8]
    assert total.macs == 4 * 6 * 8 + 4 * 4 * 8


def test_a_layer_called_twice_costs_twice_and_weighs_once():
    layer = nn.Linear(4, 4)
    got, total = rows(nn.Sequential(layer, nn.ReLU(), layer), 1, 4)
    assert [(r.macs, r.params) for r in got] == [(16, 20), (0, 0), (16, 0)]
    assert (total.macs, total.params, total.bytes) == (32, 20, 80)


def test_bytes_count_buffers_and_follow_the_dtype():
    model = nn.Sequential(nn.BatchNorm1d(4).half())
    graph = capture(model, torch.randn(2, 4).half())
    assert totals(model, graph).bytes == 4 * 4 * 2 + 8


def test_bare_parameters_are_counted_where_they_are_read():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5))

        def forward(self, x):
            return x * self.scale

    (row,), total = rows(Scaled(), 1, 5)
    assert (row.op, row.params, row.macs, total.params) == ("mul", 5, 0, 5)


def test_a_forward_that_cannot_be_followed_is_still_counted():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3)

        def forward(self, x):
            return self.up(self.conv(x if x.sum() > 0 else -x))

    got, _ = rows(Branches(), 2, 3, 6, 6)
    assert [r.macs for r in got] == [4 * 4 * 4 * 27, 4 * 4 * 4 * 2 * 9]


def test_a_cut_makes_it_cheaper_by_what_was_cut():
    from gracile.graph.dependency import channel_groups
    from gracile.graph.surgery import remove_edits, verified_apply

    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(2, 4)
    groups = channel_groups(model, capture(model, x))
    verified_apply(model, remove_edits(groups, {"0.weight": [0, 5]}, "t"), examples=[x])
    assert totals(model, capture(model, x)).macs == 4 * 4 + 4 * 2
