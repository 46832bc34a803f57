"""The option `latency`: which table is asked, and what follows from its times."""

import re

import pytest
import torch
from torch import nn

from gracile.core.plan import Factorize
from gracile.errors import UserError
from gracile.latency.difference import Point
from gracile.latency.replacement import program
from gracile.latency.table import Table
from gracile.latency.unit import Setting
from gracile.lowrank.faster import Faster, LatencyRef, read_latency
from gracile.lowrank.scheme import factorize
from gracile.nn.chain import build, layer_of
from gracile.nn.schemes import chain_of
from gracile.recipe.messages import FieldError

X = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())


def change(rank=4):
    model = net()
    layer = layer_of(model[0])
    factors = factorize("svd", model[0].weight, layer, (rank,))
    return [Factorize(at="0", scheme="svd", ranks=(rank,))], {"0": factors}


def table(path, price):
    """A file with a price for each unit of the network with and without."""
    edits, factors = change()
    model = net()
    chain = chain_of("svd", layer_of(model[0]), edits[0].ranks)
    other = nn.Sequential(build(chain, factors["0"], model[0].bias), nn.ReLU())
    here, units = program(model, X, Setting("onnxruntime", "", ""))
    units |= program(other, X, here)[1]
    made = Table()
    made.at(here).points |= {u: Point(price(u), 0.0, 14, 1.0) for u in units}
    made.save(path)


def test_faster_is_replaced_slower_is_kept_with_both_times(tmp_path):
    table(tmp_path / "t.jsonl", lambda unit: unit.weights / 1000)
    faster = Faster(LatencyRef("t.jsonl"), str(tmp_path / "r.yaml"))
    assert faster.refusal(net(), *change(), X) is None
    table(tmp_path / "t.jsonl", lambda unit: 1.0)
    slower = Faster(LatencyRef("t.jsonl"), str(tmp_path / "r.yaml"))
    why = slower.refusal(net(), *change(), X)
    assert re.fullmatch(
        r"onnxruntime would take [23]\.0000 ms for it \(measured\), 1\.0000 ms as it is .*", why
    )


def test_without_the_file_or_its_runtime_it_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such table"):
        Faster(LatencyRef("t.jsonl"), "<python>")
    table(tmp_path / "t.jsonl", lambda unit: 1.0)
    with pytest.raises(UserError, match="has none of the settings"):
        Faster(LatencyRef("t.jsonl", runtime="openvino"), str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    "value", ["t.jsonl", {"table": "t.jsonl", "threads": 2, "runtime": "openvino", "measure": True}]
)
def test_the_option_is_read_and_written(value):
    assert read_latency(value).plain() == value
    assert read_latency(read_latency(value)) == read_latency(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "must be a latency table's file"),
        ({"runtime": "openvino"}, "needs 'table'"),
        ({"table": "t", "threads": "2"}, "must be a int"),
        ({"table": "t", "runtme": "x"}, "no key 'runtme'.*runtime"),
    ],
)
def test_other_forms_are_refused(value, text):
    with pytest.raises(FieldError, match=text):
        read_latency(value)
