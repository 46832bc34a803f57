"""A cut whose proof fails: the rest is cut, and OUT/refused says how to see the fault again."""

import json

import numpy as np
import pytest
import torch
from cli_case import HEAD, compress

import gracile
from gracile.core.plan import Plan
from gracile.errors import VerificationError
from gracile.graph.ops.shape import Flatten
from gracile.models.spec import resolve


@pytest.fixture
def wrong_rule(monkeypatch):
    """Flattening that hands each channel its neighbour's label."""
    right = Flatten.flow

    def wrong(self, node, values, flow):
        value = right(self, node, values, flow)
        return value.with_dim(1, np.roll(value.dims[1], 1))

    monkeypatch.setattr(Flatten, "flow", wrong)


def test_a_run_writes_a_reproduction_and_goes_on(place, as_json, wrong_rule):
    recipe = HEAD + "  cut: {prune: structure, ratio: 0.5, scope: layer, when: {at: 1ep}}\n"
    (place / "cut.yaml").write_text(recipe)
    said = as_json(*compress("cut.yaml", "cut"))
    assert any("'inner.weight' is left as it was" in w["text"] for w in said["warnings"])
    plan = Plan.load(place / "cut" / "plan.json")
    assert [edit.group[0].at for edit in plan] == ["stem.weight"]
    assert [f.name for f in (place / "cut" / "refused").iterdir()] == ["inner.weight.json"]
    found = json.loads((place / "cut" / "refused" / "inner.weight.json").read_text())
    assert found["operator"]["op"] == "flatten"
    failing = Plan.model_validate(found["plan"])
    assert [edit.group[0].at for edit in failing] == ["stem.weight", "inner.weight"]
    lost = [len(m.keep) for m in failing.edits[1].group if m.at == "inner.weight"]
    assert lost == [7]  # one channel is enough to show it
    net = resolve("net.py:Net?num_classes=10").model
    with pytest.raises(VerificationError, match="'flatten'"):
        gracile.apply_plan(net, failing, torch.randn(2, 3, 32, 32), prove=True)
