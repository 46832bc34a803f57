"""Embeddings: columns are channels, rows stay; tied tables lose them at both ends."""

import pytest
import torch
from cut_case import Calls, CallsTwo, cut, free_of, groups_of, indices, weight
from torch import nn
from torch.nn import functional as F

IDS = torch.randint(9, (2, 5))


def test_columns_by_hand():
    groups = groups_of(
        Calls(lambda s, x: s.b(s.e(x)), e=nn.Embedding(9, 4), b=nn.Linear(4, 3)), IDS
    )
    assert indices(groups["e.weight"], 2) == {("e.weight", 1): (2,), ("b.weight", 1): (2,)}


@pytest.mark.parametrize(
    "table",
    [nn.Embedding(9, 4), nn.Embedding(9, 4, padding_idx=0), nn.EmbeddingBag(9, 4, mode="max")],
)
def test_a_cut_equals_zeros(table):
    model = Calls(lambda s, x: s.b(s.e(x)), e=table, b=nn.Linear(4, 3))
    assert free_of(model, IDS) == {"e.weight": 4}
    model = cut(model, IDS)
    assert (model.e.num_embeddings, model.e.embedding_dim) == (9, 2)


def test_a_table_that_is_also_the_head():
    model = Calls(
        lambda s, x: F.linear(s.e(x) + torch.relu(s.b(s.e(x))), s.e.weight),
        e=nn.Embedding(9, 4), b=nn.Linear(4, 4),
    )  # fmt: skip
    groups = groups_of(model, IDS)
    assert indices(groups["e.weight"], 1)["b.weight", 0] == (1,)
    rows = [g for g in groups.values() if g.protected is not None]
    assert ["looks rows up by number" in g.protected for g in rows] == [True]
    assert cut(model, IDS).e.weight.shape == (9, 2)


def test_functional_calls():
    model = CallsTwo(
        lambda s, x, y: s.b(F.embedding(x, s.w) + F.embedding_bag(y, s.v).unsqueeze(1)),
        w=weight(9, 4), v=weight(9, 4), b=nn.Linear(4, 3),
    )  # fmt: skip
    groups = groups_of(model, IDS, IDS)
    assert indices(groups["w"], 0)["v", 1] == (0,)
    cut(model, IDS, IDS)
