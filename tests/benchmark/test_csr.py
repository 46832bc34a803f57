"""Weights by rows: the same numbers, fewer bytes, and only where it was measured to be faster."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gracile.benchmark.csr import (
    FASTER_FROM,
    NEVER,
    CsrLinear,
    faster_as_csr,
    packed_rows,
    unpacked_rows,
    with_csr_layers,
)


def test_a_matrix_by_hand():
    w = torch.tensor([[0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [7.0, 0.0, 0.0, 8.0]])
    packed, shapes = packed_rows({"w": w})
    assert shapes == {"w": [3, 4]}
    assert packed["w.crow"].tolist() == [0, 1, 1, 3]
    assert packed["w.col"].tolist() == [1, 0, 3]
    assert packed["w.values"].tolist() == [5.0, 7.0, 8.0]
    assert packed["w.col"].dtype == torch.int16
    assert torch.equal(unpacked_rows(packed, shapes)["w"], w)


@given(st.floats(0, 1), st.integers(0, 99))
def test_back_and_forth_changes_nothing_and_never_takes_more(sparsity, seed):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(4, 3, 2, 2, generator=g)
    w *= torch.rand(w.shape, generator=g) >= sparsity
    tensors = {"w": w, "count": torch.tensor(3), "b": torch.zeros(4)}
    packed, shapes = packed_rows(tensors)
    assert sum(t.nbytes for t in packed.values()) <= sum(t.nbytes for t in tensors.values())
    again = unpacked_rows(packed, shapes)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize("columns", [0x9000, 0x10000, 0x10001])
def test_columns_of_long_rows(columns):
    w = torch.zeros(2, columns)
    w[0, columns - 1] = w[1, 0x8FFF] = 1.0  # beyond what a signed short holds
    packed, shapes = packed_rows({"w": w})
    assert packed["w.col"].dtype == (torch.int16 if columns <= 0x10000 else torch.int32)
    assert torch.equal(unpacked_rows(packed, shapes)["w"], w)


def test_what_is_missing_or_out_of_range_is_named():
    packed, shapes = packed_rows({"w": torch.eye(8)})
    with pytest.raises(ValueError, match="'w' is stored by rows, and damaged"):
        unpacked_rows({k: v for k, v in packed.items() if k != "w.crow"}, shapes)
    with pytest.raises(ValueError, match="'w' is stored by rows, and damaged"):
        unpacked_rows(packed, {"w": [8, 4]})


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
