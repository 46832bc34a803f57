"""Checkpoints: what goes in comes out, what ships computes the same, nothing is run."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import train_case as case
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gracile.core.plan import Architecture, Exit, Plan
from gracile.core.result import Result
from gracile.errors import UserError
from gracile.models.spec import ModelSpec, architecture_sha
from gracile.train.checkpoint import load_model, load_state, save_model, save_state

# ------------------------------------------------------------------ the state of a session

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
shapes = st.lists(st.integers(0, 3), max_size=3)
tensors = st.builds(
    lambda shape, dtype, seed: (
        10 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    ).to(dtype),
    shapes,
    st.sampled_from(DTYPES),
    st.integers(0, 9),
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.text() | st.integers() | st.booleans() | st.tuples(st.integers(), st.text())
values = st.recursive(
    scalars | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        typed = [(type(k), k) for k in a] == [(type(k), k) for k in b]
        return typed and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("state")


@given(value=st.dictionaries(keys, values, max_size=4))
def test_any_nested_state_comes_back_with_its_types(folder, value):
    save_state(folder / "s.safetensors", value)
    assert same(load_state(folder / "s.safetensors"), value)


def test_the_comparison_sees_types():
    assert same({1: (1, [2])}, {1: (1, [2])})
    for other in ({1: (True, [2])}, {1: [1, [2]]}, {True: (1, [2])}, {1: (1, (2,))}):
        assert not same({1: (1, [2])}, other)
    assert not same(torch.zeros(1), torch.zeros(1, dtype=torch.float64))


def test_tensors_that_share_memory_come_back_apart_and_equal(tmp_path):
    base = torch.arange(6.0)
    save_state(tmp_path / "s", {"a": base[:4], "b": base[2:], "c": base.view(2, 3).T})
    found = load_state(tmp_path / "s")
    assert found["a"].tolist() == [0, 1, 2, 3]
    assert found["b"].tolist() == [2, 3, 4, 5]
    assert found["c"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_what_a_file_cannot_hold_is_refused_when_it_is_written(tmp_path):
    with pytest.raises(TypeError, match="cannot store a Net"):
        save_state(tmp_path / "s", {"model": case.Net()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "skeleton",
    [
        None,
        "no json",
        '{"@": "code", "items": []}',
        '{"@": "tensor", "key": "t9"}',
        '{"items": 3}',
        '{"@": "map", "items": [[[1], 2]]}',
        '{"@": "map", "items": 3}',
        '{"@": "map", "items": [[1, 2, 3]]}',
        "[" * 5000 + "]" * 5000,
    ],
)
def test_a_damaged_skeleton_is_one_clear_error(tmp_path, skeleton):
    metadata = None if skeleton is None else {"gracile.skeleton": skeleton}
    save_file({"t0": torch.zeros(1)}, tmp_path / "s", metadata=metadata)
    with pytest.raises(UserError, match="s: not a gracile state file"):
        load_state(tmp_path / "s")


# ------------------------------------------------------------------ the finished model


def spec() -> ModelSpec:
    model = case.net()
    architecture = Architecture(name="Net", sha256=architecture_sha(model))
    return ModelSpec(model, architecture, "net.py:Net", "net.py")


@pytest.fixture(scope="module")
def finished() -> Result:
    """Masked, thinned, distilled and quantized."""
    s = case.session(case.FILTERS, case.THIN, case.ELEMENTS, case.KD, case.PTQ)
    return case.by_callbacks(s)


EXAMPLE = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "methods",
    [
        (),
        (case.ELEMENTS,),
        (case.FILTERS,),
        (case.FILTERS, case.THIN),
        (case.FILTERS, case.THIN, case.ELEMENTS, case.PTQ),
        ("q: {quantize: qat, when: {start: 1ep}}",),
        ("q: {quantize: ptq, activations: false, bits: 4}",),
    ],
    ids=["plain", "masked", "masked filters", "thinned", "all of it", "qat", "weights only"],
)
def test_what_is_loaded_computes_what_was_saved(methods, tmp_path):
    result = case.by_callbacks(case.session(*methods))
    save_model(tmp_path, result)
    loaded = load_model(tmp_path, EXAMPLE, factory=spec)
    with torch.no_grad():
        assert torch.equal(loaded.model(EXAMPLE), result.model(EXAMPLE))
    assert not loaded.model.training
    assert loaded.plan == result.plan
    for key, value in result.tensors.items():
        assert torch.equal(loaded.tensors[key], value), key


def test_saving_what_was_loaded_changes_no_byte(finished, tmp_path):
    save_model(tmp_path / "a", finished)
    loaded = load_model(tmp_path / "a", EXAMPLE, factory=spec)
    save_model(tmp_path / "b", Result(loaded.model, loaded.plan, tensors=loaded.tensors))
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    case.assert_same(one, other)
    for name in ("plan.json", "model.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_registered_network_is_rebuilt_from_its_name_alone(tmp_path):
    from gracile.models.spec import resolve

    found = resolve("resnet20_cifar_a?num_classes=7")
    save_model(tmp_path, Result(found.model.eval(), Plan(architecture=found.architecture)))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path, x).model(x), found.model(x))


# ------------------------------------------------------------------ files from strangers


class Boom:
    """What a malicious pickle would do on loading."""

    def __reduce__(self):
        return (Path.write_text, (Path("exploded"), "code from the file ran"))


@pytest.fixture
def saved(finished, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "run", finished)
    return tmp_path / "run"


def change_plan(folder: Path, change) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    change(plan)
    (folder / "plan.json").write_text(json.dumps(plan))


def first(plan, kind):
    return next(e for e in plan["edits"] if e["kind"] == kind)


def test_a_pickle_in_place_of_the_weights_is_not_run(saved):
    (saved / "model.safetensors").write_bytes(pickle.dumps({"stem.weight": Boom()}))
    with pytest.raises(UserError, match=r"model\.safetensors: not a safetensors file"):
        load_model(saved, EXAMPLE, factory=spec)
    assert not Path("exploded").exists()


def test_a_torch_file_in_place_of_a_session_state_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Boom()}, tmp_path / "s.safetensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_state(tmp_path / "s.safetensors")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", ["evil.py:make", "../evil.py:make?x=1"])
def test_an_architecture_that_names_a_file_is_not_run(saved, name):
    Path("evil.py").write_text("open('exploded', 'w').close()\ndef make(): pass\n")
    change_plan(saved, lambda p: p["architecture"].update(name=name))
    with pytest.raises(UserError, match="code from a file"):
        load_model(saved, EXAMPLE)
    assert not Path("exploded").exists()


def test_an_unregistered_architecture_lists_the_known_ones(saved):
    change_plan(saved, lambda p: p["architecture"].update(name="os.system"))
    with pytest.raises(UserError, match=r"unknown model 'os.system'"):
        load_model(saved, EXAMPLE)


def test_a_plan_for_another_network_is_refused(saved):
    change_plan(saved, lambda p: p["architecture"].update(sha256="0" * 64))
    with pytest.raises(UserError, match="made for another 'Net'"):
        load_model(saved, EXAMPLE, factory=spec)


def wrong_size(plan):
    first(plan, "remove")["group"][0]["of"] = 99


def wrong_address(plan):
    first(plan, "remove")["group"][0]["at"] = "stem.wieght"


def one_more_left(plan):
    """Keep a channel that the weights no longer have, in all coupled tensors."""
    for member in first(plan, "remove")["group"]:
        gone = sorted(set(range(member["of"])) - set(member["keep"]))
        member["keep"] = sorted([*member["keep"], gone[0]])


def no_such_node(plan):
    next(e for e in plan["edits"] if e.get("role") == "output")["at"] = "nowhere"


def no_such_scale(plan):
    next(e for e in plan["edits"] if e.get("role") == "output")["key"] = "nowhere"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (wrong_size, "made for 99"),
        (wrong_address, "Nearest: 'stem.weight'"),
        (one_more_left, "does not fit plan.json"),
        (no_such_node, "no such operator"),
        (no_such_scale, "lacks 'nowhere.scale'"),
        (lambda p: p.update(format=2), "not a valid plan at 'format'"),
        (lambda p: p["edits"].append({"kind": "run", "code": "1"}), "not a valid plan at 'edits"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(saved, change, text):
    change_plan(saved, change)
    with pytest.raises(UserError, match=text):
        load_model(saved, EXAMPLE, factory=spec)


def test_an_exit_whose_head_is_unknown_is_not_left_out_in_silence(saved, finished):
    plan = finished.plan.extended([Exit(after="inner", head="h")])
    plan.save(saved / "plan.json")
    with pytest.raises(UserError, match=r"unknown exit_head 'h'"):
        load_model(saved, EXAMPLE, factory=spec)


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(UserError, match=name):
        load_model(saved, EXAMPLE, factory=spec)


def test_missing_weights_are_named(saved):
    weights = load_file(saved / "model.safetensors")
    del weights["head.bias"]
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 'head.bias' of Net"):
        load_model(saved, EXAMPLE, factory=spec)


def test_a_torn_file_is_refused(saved):
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a safetensors file"):
        load_model(saved, EXAMPLE, factory=spec)
