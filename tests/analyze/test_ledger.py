"""The ledger: what it says about hand-made models, and that it always adds up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gracile.analyze.ledger import Inventory, Ledger, Note, Operator, build, inventory
from gracile.core.plan import (
    Architecture,
    Bits,
    Exit,
    Factorize,
    Mask,
    Member,
    Plan,
    Remove,
    Replace,
    Share,
    Skip,
)
from gracile.errors import UserError


def plan(*edits):
    return Plan(architecture=Architecture(name="net")).extended(edits)


def bits(at, role="weight", n=8, by="int8"):
    return Bits(at=at, role=role, bits=n, signed=True, symmetric=True, key=f"{at}.{role}", by=by)


def cut(at, of, keep, by="filters"):
    return Remove(group=(Member(at=at, dim=0, of=of, keep=tuple(range(keep))),), by=by)


def rows(ledger, name):
    return {r.structure: r for r in ledger if r.name == name}


def test_forty_of_a_hundred_cut_is_forty_removed_and_sixty_kept():
    before = Inventory({"a.weight": (100, 0)}, {"a": Operator("conv", 1000, "a.weight")})
    after = Inventory({"a.weight": (60, 0)}, {"a": Operator("conv", 600, "a.weight")})
    ledger = build(before, after, plan(cut("a.weight", 10, 6)))
    assert ledger.counts() == {
        "parameters": {
            "structure": {"kept": 60, "removed": 40},
            "precision": {"float": 60, "removed": 40},
            "sparsity": {"nonzero": 60, "removed": 40},
        },
        "macs": {
            "structure": {"kept": 600, "removed": 400},
            "precision": {"float": 600, "removed": 400},
            "sparsity": {"nonzero": 600, "removed": 400},
        },
    }
    assert ledger.shares()["parameters"]["structure"] == {"kept": 0.6, "removed": 0.4}
    removed = rows(ledger, "a.weight")["removed"]
    assert (removed.by, removed.precision, removed.sparsity) == ("filters", None, None)


def test_masked_weights_are_zero_not_removed():
    before, after = Inventory({"w": (8, 0)}), Inventory({"w": (8, 6)})
    ledger = build(before, after, plan(Mask(at="w", key="w.mask", sparsity=0.75, by="fine")))
    assert ledger.counts()["parameters"]["sparsity"] == {"nonzero": 2, "zero": 6}
    (row,) = ledger
    assert (row.structure, row.sparsity, row.reason, row.by) == ("kept", 0.75, None, "fine")


def test_factors_replace_their_layer_and_the_saving_is_removed():
    before = Inventory({"fc.weight": (100, 0), "fc.bias": (10, 0)})
    after = Inventory({"fc.0.weight": (20, 0), "fc.1.weight": (20, 0), "fc.1.bias": (10, 0)})
    svd = Factorize(at="fc", scheme="svd", ranks=(2,), by="lowrank")
    ledger = build(before, after, plan(svd, bits("fc.0.weight")))
    assert ledger.counts()["parameters"]["structure"] == {"factorized": 50, "removed": 60}
    assert ledger.counts()["parameters"]["precision"] == {"int8": 20, "float": 30, "removed": 60}
    assert rows(ledger, "fc.0.weight")["factorized"].why == "svd, rank 2"


def test_a_layer_whose_factors_are_larger_still_has_its_row():
    svd = Factorize(at="fc", scheme="svd", ranks=(9,), by="lowrank")
    ledger = build(Inventory({"fc.weight": (5, 0)}), Inventory({"fc.0.weight": (8, 0)}), plan(svd))
    assert [(r.name, r.structure, r.numel) for r in ledger] == [
        ("fc.weight", "removed", 0), ("fc.0.weight", "factorized", 5), ("fc.0.weight", "added", 3),
    ]  # fmt: skip


def test_a_skipped_block_takes_its_operators_along():
    before = Inventory(
        {"b.c.weight": (9, 0), "d.weight": (1, 0)},
        {
            "b.c": Operator("conv", 90, "b.c.weight"),
            "b.add": Operator("add", 0),
            "d": Operator("linear", 10, "d.weight"),
        },
    )
    after = Inventory({"d.weight": (1, 0)}, {"d": Operator("linear", 10, "d.weight")})
    ledger = build(before, after, plan(Skip(block="b", by="amc")))
    assert ledger.shares()["macs"]["structure"] == {"skipped": 0.9, "kept": 0.1}
    assert rows(ledger, "b.add")["skipped"].by == "amc"


def test_a_replaced_layer_may_keep_its_tensor_names():
    one = Inventory({"c.weight": (9, 0)})
    swap = Replace(at="c", **{"with": "binary_conv"}, by="bnn")
    ledger = build(one, one, plan(swap), [("c.weight", "precision", "binary", None, "", "bnn")])
    (row,) = ledger
    assert (row.structure, row.precision, row.why, row.by) == (
        "replaced", "binary", "by binary_conv", "bnn",
    )  # fmt: skip


def test_an_exit_head_is_added_to_the_hundred_per_cent():
    before = Inventory({"w": (90, 0)})
    after = Inventory({"w": (90, 0), "exit0.weight": (10, 0)})
    ledger = build(before, after, plan(Exit(after="layer1", head="exit0", by="exits")))
    assert ledger.shares()["parameters"]["structure"] == {"kept": 0.9, "added": 0.1}
    assert rows(ledger, "exit0.weight")["added"].by == "exits"


def test_integers_need_a_weight_and_an_input_on_a_grid():
    graph = {
        "x": Operator("input", 0),
        "first": Operator("conv", 10, "first.weight", ("x",)),
        "relu": Operator("relu", 0, None, ("first",)),
        "relu.quantize": Operator("quantize", 0, None, ("relu",)),
        "pool": Operator("max_pool", 0, None, ("relu.quantize",)),
        "second": Operator("conv", 30, "second.weight", ("pool",)),
    }
    model = Inventory({"first.weight": (3, 0), "second.weight": (5, 0)}, graph)
    edits = [bits("first.weight"), bits("second.weight"), bits("relu", "output")]
    ledger = build(model, model, plan(*edits))
    assert ledger.counts()["macs"]["precision"] == {"float": 10, "int8": 30}
    assert ledger.counts()["parameters"]["precision"] == {"int8": 8}
    assert rows(ledger, "first")["kept"].why == "weight on a grid, but its input is float"
    assert rows(ledger, "relu")["kept"].precision == "int8"
    assert "x" not in {r.name for r in ledger}


def test_without_known_inputs_the_weight_decides():
    model = Inventory({"w": (3, 0)}, {"fc": Operator("linear", 10, "w")})
    assert build(model, model, plan(bits("w", n=1))).counts()["macs"]["precision"] == {"binary": 10}


def test_shared_weights_are_neither_float_nor_integer():
    model = Inventory({"w": (3, 0)}, {"fc": Operator("linear", 10, "w", ())})
    ledger = build(model, model, plan(Share(at="w", key="w.codes", levels=16, by="codebook")))
    assert ledger.counts()["parameters"]["precision"] == {"shared": 3}
    assert {r.by for r in ledger} == {"codebook"}


def test_untouched_without_a_note_was_not_asked():
    model = Inventory({"w": (3, 0)}, {"fc": Operator("linear", 10, "w")})
    assert {r.reason for r in build(model, model, plan())} == {"not_asked"}


def test_a_note_explains_the_tensor_and_the_operator_that_reads_it():
    model = Inventory({"fc.weight": (3, 0)}, {"fc": Operator("linear", 10, "fc.weight")})
    note = Note("fc.weight", "structure", "kept", "protected", "it makes the classes", "filters")
    for row in build(model, model, plan(), [note]):
        assert (row.reason, row.why, row.by) == ("protected", "it makes the classes", "filters")


def test_a_note_that_the_plan_contradicts_is_ignored():
    model = Inventory({"w": (3, 0)})
    (row,) = build(
        model,
        model,
        plan(bits("w", by="qat")),
        [("w", "precision", "float", "sensitive", "", "ptq")],
    )
    assert (row.precision, row.reason, row.by) == ("int8", None, "qat")


@pytest.mark.parametrize(
    ("note", "message"),
    [
        (("w", "size", None, None), "unknown axis 'size'"),
        (("w", "structure", None, "protect"), "unknown reason 'protect'.*'protected'"),
    ],
)
def test_a_note_outside_the_vocabulary_is_refused(note, message):
    with pytest.raises(ValueError, match=message):
        build(Inventory({}), Inventory({}), plan(), [note])


def test_survives_its_own_file(tmp_path):
    before, after = Inventory({"w": (8, 0), "v": (3, 3)}), Inventory({"w": (5, 2)})
    ledger = build(before, after, plan())
    ledger.save(tmp_path / "ledger.json")
    assert Ledger.load(tmp_path / "ledger.json") == ledger


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ('{"format": 2, "rows": []}', "'format' must be 1"),
        ('{"format": 1, "rows": [{"name": "w", "colour": 1}]}', "not a ledger row"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, text, message):
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Ledger.load(tmp_path / "ledger.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"ledger\.json: cannot read"):
        Ledger.load(tmp_path / "ledger.json")


def test_takes_stock_of_a_captured_model():
    import torch

    from gracile.graph.graph import Graph, Node

    graph = Graph({"fc": Node("fc", "linear", ("x",), "fc", {"weight": "fc.weight"})}, how="fx")
    got = inventory([("fc.weight", torch.tensor([1.0, 0.0, -2.0]))], graph, {"fc": 3})
    assert got == Inventory(
        {"fc.weight": (3, 1)}, {"fc": Operator("linear", 3, "fc.weight", ("x",))}
    )


NAMES = ("a.weight", "a.b.weight", "a.c.weight", "d.weight", "d.0.weight", "d.1.weight", "e.bias")


@st.composite
def models(draw):
    sizes = draw(st.dictionaries(st.sampled_from(NAMES), st.integers(0, 1000)))
    tensors = {n: (size, draw(st.integers(0, size))) for n, size in sizes.items()}
    operators = draw(
        st.dictionaries(
            st.sampled_from(("a", "a.b", "a.c", "d", "d.0", "d.1", "a.add", "e")),
            st.builds(
                Operator,
                st.sampled_from(("conv", "add", "max_pool")),
                st.integers(0, 10**12),
                st.none() | st.sampled_from(NAMES),
                st.none() | st.lists(st.sampled_from(("a", "d", "e")), max_size=2).map(tuple),
            ),
        )
    )
    return Inventory(tensors, operators)


EDITS = st.lists(
    st.sampled_from(
        [
            Skip(block="a", by="s"),
            Skip(block="a.b", by="s"),
            Factorize(at="d", scheme="svd", ranks=(3,), by="f"),
            Replace(at="a", **{"with": "slim"}, by="r"),
            Share(at="a.weight", key="k", levels=4, by="h"),
            bits("d.weight"),
            bits("a", "output", 4),
            cut("d.weight", 10, 4),
        ]
    ),
    unique_by=id,
).map(lambda edits: plan(*edits))


def _no_cycles(inventory):
    return Inventory(
        inventory.tensors,
        {
            id: Operator(o.op, o.macs, o.weight, o.inputs and tuple(i for i in o.inputs if i < id))
            for id, o in inventory.operators.items()
        },
    )


@given(models().map(_no_cycles), models().map(_no_cycles), EDITS)
def test_every_axis_always_adds_up(before, after, edits):
    ledger = build(before, after, edits)
    kept = [r for r in ledger if r.structure not in ("removed", "skipped")]
    original = [r for r in ledger if r.structure != "added"]
    assert sum(r.numel for r in kept) == sum(n for n, _ in after.tensors.values())
    assert sum(r.numel for r in original) == sum(n for n, _ in before.tensors.values())
    assert sum(r.macs for r in kept) == sum(o.macs for o in after.operators.values())
    assert sum(r.macs for r in original) == sum(o.macs for o in before.operators.values())
    assert {r.name for r in ledger} == {
        *before.tensors, *after.tensors, *before.operators, *after.operators,
    }  # fmt: skip
    for measure, axes in ledger.counts().items():
        for axis, values in axes.items():
            assert sum(values.values()) == ledger.totals()[measure], axis
            shares = ledger.shares()[measure][axis]
            assert not values or sum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert Ledger.from_dict(ledger.to_dict()) == ledger
