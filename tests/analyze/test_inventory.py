"""Lists of what a network consists of, by hand."""

import pytest
import torch
from torch import nn

from gracile.analyze.inventory import attributes, connectivity, modules, percentiles
from gracile.graph.capture import capture

NET = nn.Sequential(
    nn.Conv2d(3, 6, (3, 1), stride=2, groups=3, bias=False), nn.ReLU(), nn.Flatten()
)


def test_modules_and_their_settings():
    assert modules(NET).rows == (("0", "Conv2d"), ("1", "ReLU"), ("2", "Flatten"))
    (conv,) = attributes(NET).to_dicts()
    assert conv["kernel_size"] == "3x1"
    assert (conv["in_channels"], conv["groups"], conv["stride"]) == ("3", "3", "2x2")
    assert conv["bias"] == conv["in_features"] == ""
    assert attributes(nn.Linear(2, 3)).to_dicts()[0]["bias"] == "yes"


def test_connections():
    rows = connectivity(capture(NET, torch.zeros(2, 3, 8, 8))).to_dicts()
    found = {r["operator"]: (r["reads"], r["read_by"]) for r in rows}
    assert found["1"] == ("0", "2")


def test_percentiles_are_those_of_numpy():
    layer = nn.Linear(5, 21)
    (row,) = percentiles(layer).to_dicts()
    values = layer.weight.detach().abs().flatten().double()
    for q in (1, 25, 50, 99):
        assert row[f"p{q}"] == pytest.approx(float(values.quantile(q / 100)), rel=1e-12)


def test_csv_has_a_header():
    assert modules(NET).to_csv().splitlines()[:2] == ["module,type", "0,Conv2d"]
