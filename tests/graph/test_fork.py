"""A graph run under several changes at once: as if each had been run by itself."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.graph.capture import capture
from gracile.graph.fork import branch_points, forked


class InPlace(nn.Module):
    """Everything that may be done in place: ReLU, a residual, a gate; a tied weight at the end."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.squeeze, self.excite = nn.Linear(6, 2), nn.Linear(2, 6)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.head, self.again = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again.weight = self.head.weight

    def forward(self, x):
        x = self.relu(self.stem(x))
        y = self.body(x)
        y += x
        y = self.relu(y)
        y *= torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))[:, :, None, None]
        y = y * self.scale
        return self.again(self.head(y.mean((2, 3))))


def setting():
    torch.manual_seed(0)
    model, x = InPlace().eval(), torch.randn(4, 3, 5, 5)
    return model, x, capture(model, x)


def zeroing(model, log=None):
    """A change sets the parameter of its name to zero."""

    @contextmanager
    def changed(name):
        parameter = None if name is None else model.get_parameter(name)
        held = None if parameter is None else parameter.detach().clone()
        if parameter is not None:
            parameter.data.zero_()
        yield
        if parameter is not None:
            parameter.data.copy_(held)

    return changed


@contextmanager
def unchanged(_name):
    yield


def test_every_branch_gives_what_a_run_of_its_own_gives():
    model, x, graph = setting()
    names = [n for n, _ in model.named_parameters()]
    points = branch_points(graph, {n: [model.get_parameter(n)] for n in names})
    given = x.clone()
    got = forked(graph, (x,), points, zeroing(model))
    assert torch.equal(x, given)
    assert got.keys() == {*names, None}
    for name, out in got.items():
        with zeroing(model)(name), torch.no_grad():
            assert torch.equal(out, model(x)), name


def test_what_lies_before_a_change_runs_once():
    model, x, graph = setting()
    runs = []
    model.stem.register_forward_hook(lambda *_: runs.append("stem"))
    model.head.register_forward_hook(lambda *_: runs.append("head"))
    points = branch_points(graph, {"scale": [model.scale], "body": [model.body.weight]})
    forked(graph, (x,), points, unchanged)
    assert runs == ["stem", "head", "head", "head"]


def test_the_first_reader_of_a_tied_weight_counts():
    model, _, graph = setting()
    nodes = [n.meta["id"] for n in graph.module.graph.nodes]
    assert branch_points(graph, {"t": [model.again.weight]}) == {"t": nodes.index("head")}


def test_a_change_of_nothing_is_the_trunk():
    _, x, graph = setting()
    points = branch_points(graph, {"none": []})
    got = forked(graph, (x,), points, unchanged)
    assert torch.equal(got["none"], got[None])


def test_nothing_is_kept_that_has_a_gradient():
    model, x, graph = setting()
    got = forked(graph, (x,), branch_points(graph, {"s": [model.scale]}), unchanged)
    assert not any(out.requires_grad for out in got.values())
    with pytest.raises(RuntimeError, match="does not require grad"):
        got["s"].sum().backward()
