"""What a cut will cost, predicted, against the cost of the model that was cut."""

import random

import pytest
from channel_zoo import ZOO, build

from gracile.analyze.cost import totals
from gracile.analyze.widths import CostModel, Timeline
from gracile.graph.capture import capture
from gracile.graph.dependency import channel_groups
from gracile.graph.surgery import apply, remove_edits
from gracile.prune.structure import candidates


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_prediction_is_the_cost_of_the_cut_model(name, seed):
    net, example = build(name)
    net.eval()
    graph = capture(net, example)
    groups = candidates(channel_groups(net, graph))
    model = CostModel.of(net, graph, groups)
    before = totals(net, graph)
    assert (model.total("params", {}), model.total("macs", {})) == (before.params, before.macs)
    rng = random.Random(seed)
    gone = {g.id: g.removable(rng.sample(range(len(g.units)), len(g.units) // 2)) for g in groups}
    blocks = [[g.units[u] for u in gone[g.id]] for g in groups]
    kept = Timeline(blocks, {a: n for g in groups for a, n in g.sizes.items()}).kept(len(blocks))
    cut = apply(net, remove_edits(groups, gone, "test"), example=example)
    after = totals(cut, capture(cut, example))
    assert (model.total("params", kept), model.total("macs", kept)) == (after.params, after.macs)
    assert after.params < before.params
