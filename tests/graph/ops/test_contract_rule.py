"""einsum, bilinear forms and sums with a product."""

import pytest
import torch
from cut_case import Calls, CallsTwo, around, cut, free_of, groups_of, indices, weight
from torch import nn

from gracile.graph.capture import capture
from gracile.graph.oprule import rule_of_op
from gracile.graph.ops.contract import parse

X = torch.randn(2, 5, 6)


@pytest.mark.parametrize(
    ("text", "ranks", "inputs", "output"),
    [
        ("bi,oi->bo", (2, 2), ("bi", "oi"), "bo"),
        (" b i , o i -> b o ", (2, 2), ("bi", "oi"), "bo"),
        ("ji,ik", (2, 2), ("ji", "ik"), "jk"),
        ("ba", (2,), ("ba",), "ab"),
        ("ii->i", (2,), ("ii",), "i"),
        ("ij->", (2,), ("ij",), ""),
    ],
)
def test_equations_by_hand(text, ranks, inputs, output):
    equation = parse(text, ranks)
    assert equation.inputs == tuple(tuple(term) for term in inputs)
    assert equation.output == tuple(output)


def test_an_ellipsis_is_counted_from_the_right():
    equation = parse("...i,...ij->...j", [3, 3])
    assert equation.inputs == (("...1", "...0", "i"), ("...0", "i", "j"))
    assert equation.output == ("...1", "...0", "j")
    assert parse("a...,b...", [2, 2]).output == ("...0", "a", "b")


@pytest.mark.parametrize(("text", "ranks"), [("ab,bc", [2]), ("ab->a", [3]), ("a...b->a", [1])])
def test_equations_that_do_not_fit(text, ranks):
    with pytest.raises(ValueError, match=r"operands|does not name"):
        parse(text, ranks)


@pytest.mark.parametrize(
    "call",
    [
        lambda s, x: torch.einsum("btc,cd->btd", x, s.w),
        lambda s, x: torch.einsum("...c,cd->...d", x, s.w),
        lambda s, x: torch.einsum("btc, dc -> btd", x, s.w.t()),
        lambda s, x: x @ s.w,
        lambda s, x: torch.matmul(x, s.w.transpose(0, 1).T),
        lambda s, x: torch.addmm(s.c, x.flatten(0, 1), s.w).unflatten(0, (2, 5)),
        lambda s, x: torch.baddbmm(s.c, x, s.w.expand(2, 4, 7)),
    ],
)
def test_a_bare_weight_writes_and_reads_channels(call):
    model = Calls(
        lambda s, x: s.b(torch.relu(call(s, s.a(x)))), a=nn.Linear(6, 4), w=weight(4, 7),
        c=weight(7), b=nn.Linear(7, 3),
    )  # fmt: skip
    groups = groups_of(model, X)
    assert indices(groups["a.weight"], 3)["w", 0] == (3,)
    made = next(g for g in groups.values() if ("w", 1) in indices(g, 0))
    assert indices(made, 5)["b.weight", 1] == (5,)
    cut(model, X)


def test_producers_of_a_bare_weight():
    model = Calls(
        lambda s, x: s.b(torch.einsum("btc,cd->btd", x, s.w)), w=weight(6, 7), b=nn.Linear(7, 3)
    )
    group = groups_of(model, X)["w"]
    assert (group.producers, group.consumers, group.writes) == (("w",), ("b.weight",), {"w": 1})


def test_a_diagonal_stays():
    model = Calls(lambda s, x: torch.einsum("bii->bi", s.a(x)), a=nn.Linear(6, 5))
    assert "diagonal" in groups_of(model, X)["a.weight"].protected


def test_letters_of_two_activations_are_tied():
    model = Calls(
        lambda s, x: torch.einsum("bqc,bkc->bqk", s.q(x), s.k(x)), q=nn.Linear(6, 4),
        k=nn.Linear(6, 4),
    )  # fmt: skip
    assert indices(groups_of(model, X)["q.weight"], 1)["k.weight", 0] == (1,)
    cut(model, X)


def test_bilinear():
    model = CallsTwo(
        lambda s, x, y: s.b(torch.relu(s.w(s.a(x), s.c(y)))), a=nn.Linear(6, 4), c=nn.Linear(2, 3),
        w=nn.Bilinear(4, 3, 5), b=nn.Linear(5, 3),
    )  # fmt: skip
    inputs = X[0], torch.randn(5, 2)
    assert free_of(model, *inputs) == {"a.weight": 4, "c.weight": 3, "w.weight": 5}
    model = cut(model, *inputs)
    assert (model.w.in1_features, model.w.in2_features, model.w.out_features) == (2, 2, 3)


def test_a_bilinear_form_of_one_tensor_with_itself():
    model = around(lambda s, x: s.w(x, x), w=nn.Bilinear(4, 4, 4))
    unit = indices(groups_of(model, X)["a.weight"], 2)
    assert unit["w.weight", 1] == unit["w.weight", 2] == (2,)
    cut(model, X)


def test_vectors():
    model = Calls(
        lambda s, x: s.b(torch.outer(s.v, torch.mv(s.w, s.a(x)))), a=nn.Linear(6, 4),
        w=weight(5, 4), v=weight(3), b=nn.Linear(5, 3),
    )  # fmt: skip
    x = torch.randn(6)
    free = free_of(model, x)
    assert (free["a.weight"], free["w"]) == (4, 5)
    cut(model, x)
    both = Calls(lambda s, x: torch.dot(s.a(x), s.k(x)), a=nn.Linear(6, 4), k=nn.Linear(6, 4))
    assert indices(groups_of(both, x)["a.weight"], 1)["k.weight", 0] == (1,)
    cut(both, x)


@pytest.mark.parametrize(
    ("call", "macs"),
    [
        (lambda s, x: torch.einsum("btc,cd->btd", x, s.w), 2 * 5 * 4 * 7),
        (lambda s, x: torch.baddbmm(x.sum(), x, x.transpose(1, 2)), 2 * 5 * 5 * 4),
        (lambda s, x: s.f(x, x), 2 * 5 * 3 * 4 * 4),
    ],
)
def test_macs_by_hand(call, macs):
    model = around(lambda s, x: call(s, x).sum() + x, w=weight(4, 7), f=nn.Bilinear(4, 4, 3))
    graph = capture(model, X)
    node = graph.of_op("einsum", "addmm", "bilinear")[0]
    shapes = [graph[i].shape for i in node.inputs]
    assert rule_of_op(node.op).macs(node, shapes, {"weight": (3, 4, 4)}) == macs
