"""Linear layers as CSR: the same numbers, and only where it was measured to be faster."""

import pytest
import torch
from torch import nn

from gracile.benchmark.csr import (
    FASTER_FROM,
    NEVER,
    CsrLinear,
    faster_as_csr,
    with_csr_layers,
)


@pytest.mark.parametrize("bias", [True, False])
def test_a_csr_layer_is_the_linear_layer(bias):
    torch.manual_seed(0)
    layer = nn.Linear(12, 5, bias=bias)
    layer.weight.data[:, ::2] = 0
    sparse = CsrLinear(layer, always=True)
    for shape in ((12,), (3, 12), (2, 4, 12)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(sparse(x), layer(x))


def test_the_table_decides():
    for (width, rows), least in FASTER_FROM.items():
        if least != NEVER:
            assert faster_as_csr(rows, width, width, least)
        assert not faster_as_csr(rows, width, width, min(least, 1.0) - 0.01)
    assert not faster_as_csr(32, 128, 1024, 0.999)  # smaller than what was measured
    assert not faster_as_csr(4, 1024, 1024, 0.9)  # 1 row: no, 8 rows: yes
    assert faster_as_csr(4000, 2048, 1024, 0.95)


def test_only_layers_that_gain_are_replaced():
    net = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024), nn.Linear(16, 16))
    net[0].weight.data[:1000] = 0
    net[2].weight.data.zero_()
    assert with_csr_layers(net) == 1
    assert [type(m) for m in net] == [CsrLinear, nn.Linear, nn.Linear]
