"""A graph run under several changes at once: as if each had been run by itself."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.graph.capture import capture
from gracile.graph.fork import Trial, branch_points, forked, swept


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


def sweep(module, x, names, rows):
    """Each named parameter times 0, 1 and 2."""
    trials = {
        n: Trial((n,), lambda n=n: ({n: k * module.get_parameter(n).detach()} for k in range(3)))
        for n in names
    }
    return {(name, k): out for name, k, out in swept(module, (x,), trials, rows=rows)}


@pytest.mark.parametrize("rows", [1, 8, 100], ids=["one by one", "two at once", "all at once"])
def test_swept_is_each_value_by_itself(rows):
    model, x, graph = setting()
    names = ["body.weight", "stem.weight", "scale", "head.weight", "excite.bias"]
    found = sweep(graph.module, x, names, rows)
    for name in names:
        parameter = model.get_parameter(name)
        before = parameter.detach().clone()
        for k in range(3):
            parameter.data = k * before
            torch.testing.assert_close(found[name, k], model(x))
            parameter.data = before
    torch.testing.assert_close(found[None, 0], model(x))
    assert len(found) == 3 * len(names) + 1


def test_swept_runs_what_lies_before_once_and_what_follows_as_one_batch():
    _, x, graph = setting()
    sizes = {"stem": [], "body": [], "excite": []}
    for name, seen in sizes.items():
        graph.module.get_submodule(name).register_forward_hook(
            lambda _m, args, _out, seen=seen: seen.append(len(args[0]))
        )
    sweep(graph.module, x, ["body.weight"], rows=100)
    assert sizes == {"stem": [4], "body": [4, 4, 4, 4], "excite": [12, 4]}


class Sized(nn.Module):
    """A size that is alive where the branch leaves: values cannot be one batch there."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x):
        n = x.size(0)
        return self.two(self.one(x)).reshape(n, 2, 3).sum(1)


def test_swept_goes_value_by_value_where_a_size_is_alive():
    torch.manual_seed(0)
    model, x = Sized().eval(), torch.randn(5, 4)
    module = capture(model, x).module
    found = sweep(module, x, ["one.weight"], rows=100)
    torch.testing.assert_close(found["one.weight", 1], model(x))
    torch.testing.assert_close(found[None, 0], model(x))
    assert not torch.equal(found["one.weight", 0], found["one.weight", 2])


def test_swept_leaves_the_parameters_as_they_were():
    model, x, graph = setting()
    before = {a: p.detach().clone() for a, p in model.named_parameters()}
    sweep(graph.module, x, ["stem.weight", "head.weight"], rows=100)
    for a, p in model.named_parameters():
        assert torch.equal(p, before[a])
