"""Undo and bisect: what is exact is exact, what is lost is refused, the first harm is found."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from replay_case import RECIPE, TRAINED, UNTRAINED, Made, make

from gracile.core.plan import Plan, Remove
from gracile.core.result import Result
from gracile.errors import UserError
from gracile.train.bisect import bisect, first_exceeding
from gracile.train.checkpoint import load_model, save_model
from gracile.train.finished import Finished, open_run, settled, value_edits
from gracile.train.replay import undo


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Made:
    return make(tmp_path_factory.mktemp("trained"), TRAINED)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Made:
    return make(tmp_path_factory.mktemp("untrained"), UNTRAINED)


@pytest.fixture(scope="module")
def random_start(tmp_path_factory) -> Made:
    return make(tmp_path_factory.mktemp("random"), TRAINED, weights=False)


def loaded(run: Finished):
    return load_model(run.folder, run.example, factory=run.at.fresh).model


def weights_of(model) -> dict:
    return {k: v for k, v in model.state_dict().items() if not k.startswith("_quantizers")}


def step(plan: Plan, kind: str, at: str) -> str:
    """Id of the first edit of a kind on a tensor."""
    return next(
        e.id for e in plan.of_kind(kind) if (e.group[0].at if kind == "remove" else e.at) == at
    )


def copied(made: Made, to) -> Made:
    shutil.copytree(made.folder, to / "run")
    return Made(to / "run", made.weights)


# ------------------------------------------------------------------ undo


def test_without_all_steps_an_untrained_run_is_the_original(untrained):
    run = untrained.open()
    done = undo(run, [e.id for e in run.plan])
    assert len(done.plan) == 0
    assert done.tensors == {}
    assert done.warnings == []
    original = run.original()
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, done.model.state_dict()[name])
    assert torch.equal(done.model(run.example), original(run.example))


def test_without_quantization_the_float_weights_are_those_that_training_ended_with(trained):
    run = trained.open()
    done = undo(run, ["int8"])
    assert {e.kind for e in done.plan} == {"remove", "mask"}
    assert done.proof is None
    for e in run.plan.of_kind("bits"):
        if e.role == "weight":
            value, grid = done.model.get_parameter(e.at), run.stored[f"{e.key}.scale"]
            stored = run.stored[e.at]
            assert not torch.equal(value, stored)
            error = (value - stored).abs().amax(tuple(range(1, value.ndim)))
            assert bool((error <= 0.5001 * grid).all())  # half a step of its channel
    assert done.model.head.weight.eq(0).float().mean() == 0.5  # still masked


def test_without_its_mask_a_weight_is_whole_and_still_on_its_grid(trained):
    run = trained.open()
    done = undo(run, [step(run.plan, "mask", "head.weight")])
    value, stored = done.model.get_parameter("head.weight"), run.stored["head.weight"]
    keep = run.stored["head.weight.mask"]
    assert torch.equal(value[keep], stored[keep])
    assert bool((value[~keep] != 0).any())
    scale = run.stored["head.weight.weight.scale"][:, None]
    assert torch.equal((value / scale).round() * scale, value)


@pytest.mark.parametrize("at", ["stem.weight", "inner.weight"])
def test_without_a_cut_its_channels_have_the_original_values(trained, at):
    run = trained.open()
    done = undo(run, ["int8", "few", step(run.plan, "remove", at)])
    floats = undo(run, ["int8", "few"])
    removed = next(e for e in run.plan.of_kind("remove") if e.group[0].at == at)
    kept = list(removed.group[0].keep)
    back = [i for i in range(8) if i not in kept]
    assert done.proof.max_error < 1e-10
    other = run.plan.to_original()["stem.weight", 0] if at == "inner.weight" else [0, 1, 2]
    new, old = done.model.get_parameter(at), floats.model.get_parameter(at)
    assert torch.equal(new[kept], old)
    assert torch.equal(new[back], run.original().get_parameter(at)[back][:, other])
    assert [c for c, _ in done.warnings] == ["mixed"]


def test_what_comes_back_is_rounded_with_a_scale_of_its_own(trained):
    run = trained.open()
    done = undo(run, ["thin"])
    kept = run.plan.to_original()["stem.weight", 0]
    scale, value = done.tensors["stem.weight.weight.scale"], done.model.get_parameter("stem.weight")
    assert torch.equal(scale[kept], run.stored["stem.weight.weight.scale"])
    assert torch.equal(value[kept], run.stored["stem.weight"])
    original = run.original().get_parameter("stem.weight")
    error = (value - original).abs().amax((1, 2, 3))
    back = [i for i in range(8) if i not in kept]
    assert bool((error[back] <= 0.5001 * scale[back]).all())
    assert done.tensors["head.weight.mask"].shape == (10, 8)
    assert [c for c, _ in done.warnings] == ["mixed", "ranges", "rounded"]


def test_groups_of_inputs_are_replayed_where_they_are_the_same(tmp_path):
    text = RECIPE.replace("ptq}}", "ptq, bits: 4, activations: false, group_size: 9}}")
    text = text.replace("int8", "groups")
    run = make(tmp_path, TRAINED, text=text).open()
    scale = run.stored["stem.weight.weight.scale"]
    assert scale.shape == (4, 3)
    head = undo(run, ["few"])  # its 4 inputs have no groups, its mask lies under the grid
    assert torch.equal(head.model.inner.weight, run.stored["inner.weight"])
    floats = undo(run, ["groups"]).model.get_parameter("stem.weight")
    again = settled(floats, value_edits(run.plan, "stem.weight"), run.stored)
    assert torch.equal(again, run.stored["stem.weight"])
    with pytest.raises(UserError, match=r"'inner.weight' has a scale for each 9.*undo 'groups'"):
        undo(run, ["thin"])


def test_an_undone_run_is_loaded_like_any_model(trained, tmp_path):
    run = trained.open()
    done = undo(run, ["thin"])
    save_model(tmp_path, Result(done.model, done.plan, tensors=done.tensors))
    again = load_model(tmp_path, run.example, factory=run.at.fresh).model
    assert torch.equal(again(run.example), done.model(run.example))
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "model.json", "plan.json"}


def test_a_run_from_random_weights_says_what_its_channels_are_worth(random_start):
    done = undo(random_start.open(), ["thin", "int8", "few"])
    assert [c for c, _ in done.warnings] == ["random"]


def test_corrections_that_stay_are_told_and_exact_otherwise(tmp_path):
    made = make(tmp_path, UNTRAINED, more="  bias: {recover: bias, mode: full}\n")
    run = made.open()
    assert undo(run, []).warnings == []
    done = undo(run, ["int8"])
    assert [c for c, _ in done.warnings] == ["recovered"]
    now, then = done.model.state_dict(), loaded(run).state_dict()
    assert torch.equal(now["head.bias"], then["head.bias"])
    assert not torch.equal(now["inner.weight"], then["inner.weight"])
    kept = loaded(run)
    assert torch.equal(undo(run, []).model(run.example), kept(run.example))


def test_equalized_weights_under_grids_are_refused(tmp_path):
    text = RECIPE.replace("  int8:", "  even: {{recover: equalize}}\n  int8:")
    made = make(tmp_path, UNTRAINED, text=text)
    with pytest.raises(UserError, match="float values"):
        undo(made.open(), ["int8"])


def test_lost_float_values_are_refused(trained, tmp_path):
    made = copied(trained, tmp_path)
    (made.folder / "state" / "session.safetensors").unlink()
    with pytest.raises(UserError, match=r"float values of '\w+\.weight' are lost.*Run the recipe"):
        undo(made.open(), ["int8"])
    assert undo(made.open(), ["thin"]).plan.of_kind("remove") == []  # needs none of them


# ------------------------------------------------------------------ opening


def test_the_weights_file_is_needed_and_checked(trained, random_start, tmp_path):
    with pytest.raises(UserError, match=r"began from a weights file \(sha256 .*--weights FILE"):
        open_run(trained.folder)
    with pytest.raises(UserError, match="began from none; leave it out"):
        open_run(random_start.folder, trained.weights)
    with pytest.raises(UserError, match=r"other\.safetensors: no such file"):
        open_run(trained.folder, tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").write_bytes(trained.weights.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"sha256 .*; name the file it began from"):
        open_run(trained.folder, tmp_path / "other.safetensors")


def test_a_run_whose_inputs_changed_is_refused(trained, tmp_path):
    made = copied(trained, tmp_path)
    path = made.folder / "state" / "run.json"
    begun = json.loads(path.read_text())
    for key, text in [("model_code", "the file of its model"), ("data_sha", "its data")]:
        other = {**begun, "identity": {**begun["identity"], key: "0"}}
        path.write_text(json.dumps(other))
        with pytest.raises(UserError, match=f"{text} changed since the run"):
            made.open()
    (made.folder / "result.json").unlink()
    with pytest.raises(UserError, match="not a finished run"):
        made.open()


# ------------------------------------------------------------------ bisect


@given(drops=st.lists(st.floats(-5, 5), min_size=1, max_size=12), limit=st.floats(-2, 6))
def test_the_first_exceeding_is_found_where_drops_grow(drops, limit):
    drops = sorted(drops)
    got = first_exceeding(drops.__getitem__, range(len(drops)), limit)
    wanted = next((k for k, d in enumerate(drops) if d > limit + 1e-9), None)
    assert got == wanted


def test_the_search_asks_seldom_and_goes_one_by_one_where_drops_fall():
    asked = []

    def ask(drops):
        asked.clear()
        return lambda k: asked.append(k) or drops[k]

    assert first_exceeding(ask([0] * 40 + [9] * 24), range(64), 1) == 40
    assert len(asked) == 7
    # the search alone would say 5; it sees a fall from there to the last
    assert first_exceeding(ask([0, 9, 0, -1, 0, 9, 9, 8]), range(8), 1) == 1
    assert first_exceeding(ask([0, 9, 0]), range(3), 1) is None
    assert first_exceeding(ask([0, 9, 0]), range(3), 1, every=True) == 1


def test_the_ends_are_the_original_and_the_run_exactly(trained):
    run = trained.open()
    found = bisect(run, "loss", 1e9, every=True, say=lambda text: None)
    assert found.step is None
    assert found.points == len(found.rows) == len(run.plan) + 2
    kinds = [r["kind"] for r in found.rows]
    cut = len(run.plan.of_kind("remove"))
    assert kinds[: cut + 2] == ["original", *["remove"] * cut, "trained"]
    assert found.base == found.rows[0]["loss"] == run.score(run.original()).loss
    assert found.rows[-1]["loss"] == run.score(loaded(run)).loss


def test_an_untrained_run_is_one_stretch_that_ends_exactly(untrained):
    run = untrained.open()
    found = bisect(run, "loss", 1e9, every=True, say=lambda text: None)
    assert [r["step"] for r in found.rows] == [None, *range(len(run.plan))]
    assert found.rows[-1]["loss"] == run.score(loaded(run)).loss


def test_the_harmful_edit_is_named(untrained, tmp_path):
    made = copied(untrained, tmp_path)
    plan = Plan.load(made.folder / "plan.json")
    said = []
    every = bisect(made.open(), "loss", 1e9, every=True, say=said.append)
    steps = [r for r in every.rows if r["step"] is not None]
    worst = max(steps, key=lambda r: r["drop"])
    limit = worst["drop"] - 1e-6
    first = next(r for r in steps if r["drop"] > limit)
    found = bisect(made.open(), "loss", limit, every=True, say=said.append)
    assert found.step == first
    assert found.step["id"] == plan.edits[first["step"]].id
    assert len(said) == 2 * (len(plan) + 1)


def test_cuts_of_a_random_network_are_not_judged(random_start):
    run = random_start.open()
    found = bisect(run, "top1", 100, say=lambda text: None)
    assert [c for c, _ in found.warnings] == ["not-judged"]
    assert found.rows[0]["kind"] == "trained"
    assert found.rows[0]["drop"] == 0
    assert not any(isinstance(run.plan.edits[r["step"]], Remove) for r in found.rows[1:])


def test_an_unknown_metric_is_refused(untrained):
    with pytest.raises(UserError, match="one of top1, top5, loss, got 'f1'"):
        bisect(untrained.open(), "f1", 1, say=lambda text: None)


# ------------------------------------------------------------------ factorized layers

RANKS = """\
recipe: 1
train: {{epochs: {epochs}, batch_size: 32, optimizer: {{class: SGD, lr: 0.05}}}}
data: {{train: "train[:96]", val: "train[100:150]", test: "test[:20]", calibration: 64}}
methods:
  thinner: {{prune: structure, ratio: 0.25, when: {{at: {first}}}}}
  rank: {{lowrank: factorize, weights: [inner, head], scheme: svd, round_to: 1,
         rank: {{name: fixed, share: 0.3}}, when: {{at: {then}}}}}
"""
INT8 = "  int8: {quantize: ptq}\n"
ALONE = "\n".join(line for line in RANKS.split("\n") if "thinner" not in line)
INSIDE = "  more: {prune: structure, ratio: 0.3, when: {at: end}}\n"
FEW = {"epochs": 2, "first": "0ep", "then": "1ep"}
NONE = {"epochs": 0, "first": "end", "then": "end"}


@pytest.fixture(scope="module")
def factored(tmp_path_factory) -> Made:
    return make(tmp_path_factory.mktemp("factored"), FEW, text=RANKS, more=INT8)


def test_a_factorization_undone_gives_the_original_layer_back(factored):
    run = factored.open()
    done = undo(run, ["rank", "int8"])
    assert {e.kind for e in done.plan} == {"remove"}
    assert done.proof is not None
    maps, original = done.plan.to_original(), run.original()
    for name in ("inner.weight", "head.weight"):
        value = original.get_parameter(name)
        for dim in (0, 1):
            if (name, dim) in maps:
                value = value.index_select(dim, torch.tensor(maps[name, dim]))
        assert torch.equal(done.model.get_parameter(name), value)
    assert torch.equal(done.model.bn.running_mean, run.stored["bn.running_mean"])
    assert "mixed" in [code for code, _ in done.warnings]


def test_an_untrained_run_without_its_factorizations_is_the_original(tmp_path):
    made = make(tmp_path, NONE, text=RANKS)
    run = made.open()
    done = undo(run, ["thinner", "rank"])
    assert torch.equal(done.model(run.example), run.original()(run.example))
    again = undo(run, ["rank"])
    kept = again.plan.to_original()["inner.weight", 0]
    assert again.model.inner.weight.shape[0] == len(kept) < 8


def test_one_factorization_undone_leaves_the_other_as_it_is(factored):
    run = factored.open()
    ids = [e.id for e in run.plan.of_kind("factorize") if e.at == "head"]
    done = undo(run, [*ids, "int8"])
    assert [e.at for e in done.plan.of_kind("factorize")] == ["inner"]
    floats = run.floats("inner.0.weight")
    assert torch.equal(done.model.get_parameter("inner.0.weight"), floats)


def test_grids_alone_undone_leave_the_factors_with_their_floats(factored):
    done = undo(factored.open(), ["int8"])
    assert {e.kind for e in done.plan} == {"remove", "factorize"}


def test_what_hangs_on_factors_goes_with_them(factored, tmp_path):
    with pytest.raises(UserError, match=r"operators of 'inner' are quantized.* all of 'int8'"):
        undo(factored.open(), ["rank"])
    with pytest.raises(UserError, match=r"took of .*has no values .*factorized by 'rank'"):
        undo(factored.open(), ["thinner", "int8"])
    run = make(tmp_path, NONE, text=ALONE, more=INSIDE).open()
    with pytest.raises(UserError, match=r"the factors of 'inner' were changed by .*'more' as well"):
        undo(run, ["rank"])
    with pytest.raises(UserError, match=r"has no values to come back with.*undo e\d as well"):
        undo(run, ["more"])


def test_factors_that_reorder_channels_keep_their_order(tmp_path):
    text = ALONE.replace("[inner, head], scheme: svd", "inner, scheme: monochromatic").replace(
        "share: 0.3", "ranks: [2]"
    )
    run = make(tmp_path, FEW, text=text, more=INT8).open()
    before = loaded(run)
    done = undo(run, ["int8"])
    orders = [m.source for m in done.model.modules() if hasattr(m, "source")]
    assert orders
    assert orders == [m.source for m in before.modules() if hasattr(m, "source")]


def test_bisect_says_that_factors_cannot_be_made_again(factored):
    with pytest.raises(UserError, match=r"factorized 'inner'.*`gracile undo` leaves"):
        bisect(factored.open(), "top1", 1.0, say=lambda text: None)
