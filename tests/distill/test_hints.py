"""Losses that compare number by number, FitNets' regressor, and which dim its channels are in."""

import pytest
import torch
from torch.nn import functional as F

from gracile.distill.features.fitnets import fitnets
from gracile.distill.features.mse import mse
from gracile.distill.regressor import Regressor, channel_dim


def test_half_of_the_squared_norm_by_hand():
    s, t = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 4.0], [2.0, 0.0]])
    assert fitnets(s, t, mean=False).item() == (4 + 4) / 2 / 2
    assert fitnets(s, t).item() == (4 + 4) / 2 / 4
    assert mse(s, t).item() == (4 + 4) / 4


@pytest.mark.parametrize("loss", [mse, fitnets])
def test_other_shapes_are_refused(loss):
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2\).*\(1, 3\)"):
        loss(torch.zeros(1, 2), torch.zeros(1, 3))


def test_the_regressor_is_a_convolution_and_a_linear_layer():
    r = Regressor((2, 3, 4, 4), (2, 5, 4, 4), 1, seed=0)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(r(x), F.conv2d(x, r.weight[:, :, None, None], r.bias))
    assert r(x.flatten(2)).shape == (2, 5, 16)
    last = Regressor((2, 7, 3), (2, 7, 5), 2, seed=0)
    x = torch.randn(2, 7, 3)
    torch.testing.assert_close(last(x), F.linear(x, last.weight, last.bias))


def test_a_cut_regressor_computes_what_it_did_with_zeros():
    r = Regressor((2, 4), (2, 3), 1, seed=0)
    optimizer = torch.optim.Adam(r.parameters(), lr=0.1)
    r(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    moments = optimizer.state[r.weight]["exp_avg"].clone()
    x, keep = torch.randn(2, 4), torch.tensor([0, 3])
    zeroed = x.clone()
    zeroed[:, [1, 2]] = 0
    before = r(zeroed)
    r.cut(keep, optimizer)
    torch.testing.assert_close(r(x[:, keep]), before)
    assert torch.equal(optimizer.state[r.weight]["exp_avg"], moments[:, keep])


def test_where_the_channels_are():
    assert channel_dim((2, 8, 4, 4), (2, 16, 4, 4)) == 1
    assert channel_dim((2, 9, 8), (2, 9, 16)) == 2  # tokens
    assert channel_dim((2, 8, 9), (2, 16, 9)) == 1
    assert channel_dim((2, 8, 9), (2, 8, 9), labelled=[1]) == 1
    assert channel_dim((2, 8, 4, 4), (2, 16, 2, 2)) is None
    assert channel_dim((2, 8), (2, 8, 1, 1)) is None
