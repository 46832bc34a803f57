"""`prune: legr`: what is learned, by which ranking it cuts, to which target."""

import math

import pytest
import torch
from judged_case import Net, Three, begin, images, session_of, widths
from mask_case import check_resume
from torch import nn
from torch.nn.functional import mse_loss

from gracile.analyze.cost import totals
from gracile.errors import BindError, PlanConflict, RecipeError, UserError, VerificationError
from gracile.prune.methods import legr
from gracile.prune.methods.legr import ranked, started
from gracile.recipe.load import loads
from gracile.train.session import Session


def session(options, more="", method="legr", **given):
    return session_of(method, options, more, **given)


def three(options, method="legr", **given):
    """Whoever cuts a[0] makes no mistake; b[0] is smaller."""
    x = torch.ones(2, 1)
    y = torch.full((2, 1), 10.0)  # with b[0] alone gone it gives 10.05, with a[0] gone 10
    given = {"calibration": [(x, y)], "loss_of": mse_loss, **given}
    return session(options, model=Three(), example=x, method=method, **given)


# ------------------------------------------------------------------ the ranking


def test_scores_by_hand():
    scores = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([0.5, 2.0])}
    found = ranked(scores, {"a": (2.0, -1.0), "b": (0.5, 3.0)})
    assert {id: v.tolist() for id, v in found.items()} == {"a": [1.0, 7.0], "b": [3.25, 4.0]}


def test_the_start_divides_by_the_mean_where_there_is_one():
    scores = {"a": torch.tensor([1.0, 4.0]), "zero": torch.zeros(2)}
    assert started(scores, "mean") == {"a": 0.4, "zero": 1.0}
    assert started(scores, "none") == {"a": 1.0, "zero": 1.0}


@pytest.mark.parametrize("start", ["mean", "none"])
def test_it_learns_that_the_smaller_channel_is_the_more_important(start):
    # squares: a = (1, 4), b = (0.9025, 4.0025, 9); either first channel is a quarter of 11
    options = "ratio: 0.25, target: params, criterion: l2, when: {at: 0ep}"
    plain = three(f"{options}, norm: {start}", method="structure")
    learned = three(f"{options}, generations: 20, start: {start}")
    for s, gone in ((plain, "b.weight"), (learned, "a.weight")):
        begin(s, 1)
        (edit,) = s.plan.edits
        assert (edit.group[0].at, edit.group[0].keep[0], edit.by) == (gone, 1, "m")
    assert learned.history["loss/m"] == [(0.0, 0.0)]
    (a, b), (c, d) = (learned.methods[0].coefficients[id] for id in ("a.weight", "b.weight"))
    assert a * 1 + b < c * 0.9025 + d


@pytest.mark.parametrize(("shift", "gone"), [(0.05, "b.weight"), (0.2, "a.weight")])
def test_given_coefficients_rank_without_a_search_or_data(shift, gone):
    # 0.9025 + shift against 1
    given = f"coefficients: {{a.weight: [1, 0], b.weight: [1, {shift}]}}, statistics: kept"
    s = three(
        f"ratio: 0.25, target: params, {given}, when: {{at: 0ep}}", calibration=None, loss_of=None
    )
    begin(s, 1)
    assert [e.group[0].at for e in s.plan.edits] == [gone]
    assert "loss/m" not in s.history


def test_what_was_learned_can_be_given():
    options = "ratio: 0.5, target: macs"
    first = session(f"{options}, generations: 30")
    plan = first.finish().plan
    learned = {id: [*pair] for id, pair in first.methods[0].coefficients.items()}
    again = session(f"{options}, coefficients: {learned}")
    assert loads(again.recipe.to_yaml()) == again.recipe
    assert again.finish().plan == plan


def test_the_ledger_tells_the_coefficients():
    s = session("ratio: 0.4, generations: 3")
    rows = {r.name: r for r in s.finish().ledger if r.kind == "tensor" and "is ranked by" in r.why}
    a, b = s.methods[0].coefficients["inner.weight"]
    assert set(rows) == {"stem.weight", "inner.weight", "last.weight"}
    assert f"a * l2 + b, [a, b] = [{a:.6g}, {b:.6g}]" in rows["inner.weight"].why


def test_more_generations_find_a_lower_loss():
    losses = []
    for n in (1, 60):
        s = session(f"ratio: 0.5, target: macs, generations: {n}")
        s.finish()
        losses.append(s.history["loss/m"][0][1])
    assert losses[1] < losses[0]


def test_one_generation_is_structure_pruning():
    plans = []
    for options in ("legr, statistics: kept, generations: 1", "structure, criterion: l2"):
        method, _, more = options.partition(", ")
        plans.append(session(f"ratio: 0.5, {more}, when: {{at: end}}", method=method).finish().plan)
    assert plans[0] == plans[1]


def test_the_seed_decides_and_no_candidate_comes_twice(monkeypatch):
    tried = []

    def spied(loss_of, *args, **options):
        def watched(x):
            tried[-1].append(tuple(x.flatten().tolist()))
            return loss_of(x)

        tried.append([])
        return evolve(watched, *args, **options)

    evolve = legr.evolve
    monkeypatch.setattr(legr, "evolve", spied)
    for _ in range(2):
        session("ratio: 0.4, generations: 20").finish()
    assert tried[0] == tried[1]
    assert len(set(tried[0])) == 20


# ------------------------------------------------------------------ the target


@pytest.mark.parametrize("target", ["params", "macs"])
def test_a_cost_target_is_met_within_one_channel(target):
    s = session(f"ratio: 0.5, target: {target}, generations: 5, when: {{at: 0ep}}")
    before = getattr(totals(s.model, s.graph), target)
    largest = {"params": (3 + 12 + 12 + 1) * 9 + 5 + 10, "macs": 64 * (3 + 12 + 12) * 9 + 640}
    begin(s, 1)
    after = getattr(totals(s.model, s.graph), target)
    assert before / 2 - largest[target] < after <= before / 2
    assert s.history[f"{target}/m"] == [(0.0, after)]


def test_several_firings_learn_once_and_follow_the_ramp():
    s = session("ratio: {ramp: linear, final: 0.5}, generations: 5, when: {start: 0ep, stop: 4ep}")
    s.on_epoch_begin(0)
    learned = dict(s.methods[0].coefficients)
    for epoch in (1, 2, 3):
        s.on_epoch_begin(epoch)
    assert [v for _, v in s.history["channels/m"]] == [30, 25, 20, 15]  # floor(share * 30) gone
    assert s.methods[0].coefficients == learned
    assert len(s.history["loss/m"]) == 1


def test_candidates_are_judged_at_the_level_asked_for(monkeypatch):
    sizes = []
    tried = Session.losses_after

    def watched(s, m, cuts, **options):
        sizes.extend(sum(e.group[0].of - len(e.group[0].keep) for e in c) for c in cuts.values())
        return tried(s, m, cuts, **options)

    monkeypatch.setattr(Session, "losses_after", watched)
    s = session("ratio: 0.2, learn_at: 0.5, generations: 4")
    s.finish()
    assert set(sizes) == {15}
    assert sum(widths(s)) == 30 - 6


@pytest.mark.parametrize("level", ["ratio: 0.9", "ratio: 0.05, learn_at: 0.9"])
def test_a_level_out_of_reach_is_refused_before_training(level):
    with pytest.raises(UserError, match=r"^r.yaml:4: 'm': the target of .* macs cannot be reached"):
        session(f"{level}, target: macs, max_ratio: 0.1")


# ------------------------------------------------------------------ what a candidate is


def test_trying_leaves_the_network_as_it_was():
    s = session("ratio: 0.5, generations: 4, ft_batches: 2")
    before = {k: v.clone() for k, v in s.model.state_dict().items()}
    s.methods[0]._learn(s)
    assert all(torch.equal(v, before[k]) for k, v in s.model.state_dict().items())


def test_training_of_candidates_lowers_their_loss():
    losses = []
    for n in (0, 4):
        s = session(f"ratio: 0.5, generations: 1, ft_batches: {n}, ft_lr: 0.05")
        s.finish()
        losses.append(s.history["loss/m"][0][1])
    assert losses[1] < losses[0] - 0.02


def test_statistics_are_counted_anew_or_kept():
    kept = session("ratio: 0.4, generations: 2, statistics: kept")
    kept.model.bn.running_mean.copy_(torch.arange(8.0))
    assert set(kept.finish().model.bn.running_mean.tolist()) <= set(range(8))
    model = session("ratio: 0.4, generations: 2").finish().model
    with torch.no_grad():
        means = [model.stem(x).mean((0, 2, 3)) for x, _ in images()]
    torch.testing.assert_close(model.bn.running_mean, torch.stack(means).mean(0))


@pytest.mark.parametrize("criterion", ["taylor", "mean_activation", "norm_scale"])
def test_other_criteria_can_be_scaled(criterion):
    ignore = ", ignore: [inner.weight, last.weight]" if criterion == "norm_scale" else ""
    ratio = 0.5 if ignore else 0.4
    model = session(
        f"ratio: {ratio}, criterion: {criterion}, generations: 3{ignore}", model=Plain()
    )
    model.finish()
    assert model.plan.edits


class Plain(Net):
    """Net without the branch, so that each group has one writer."""

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Heads(nn.Module):
    """A block of a transformer, four heads and six units: 5 x 8 -> 4."""

    def __init__(self):
        super().__init__()
        self.embed, self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(5))
        self.norm = nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        (b, n, _), x = x.shape, self.embed(x)
        q, k, v = (f(x).view(b, n, 4, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = self.norm(x + self.o(a.transpose(1, 2).reshape(b, n, -1)))
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


def test_heads_units_and_a_stream_with_layer_norm_are_ranked_together():
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 5, 8, generator=g), torch.randint(4, (8,), generator=g))]
    options = "ratio: 0.4, target: params, generations: 8, min_keep: 2"
    s = session(options, model=Heads(), example=data[0][0], calibration=data)
    before = totals(s.model, s.graph).params
    result = s.finish()
    assert sum(p.numel() for p in result.model.parameters()) <= 0.6 * before
    assert set(s.methods[0].coefficients) == {"embed.weight", "q.weight:outer", "up.weight"}
    told = [r.why for r in result.ledger if r.kind == "tensor" and "is ranked by" in r.why]
    assert any(":outer' is ranked by" in why for why in told)


# ------------------------------------------------------------------ refusals


def refusing(monkeypatch, *bad):
    """Every cut that touches one of these groups fails its proof."""
    cut = Session.cut

    def fails(s, gone, *, by, reproduce):
        if set(gone) & set(bad):
            raise VerificationError("the first differing operator is 'x' (odd)")
        cut(s, gone, by=by, reproduce=reproduce)

    monkeypatch.setattr(Session, "cut", fails)


def test_others_take_over_what_a_group_that_fails_its_proof_keeps(monkeypatch):
    refusing(monkeypatch, "inner.weight")
    s = session("ratio: 0.4, target: macs, generations: 3, when: {at: 0ep}")
    before = totals(s.model, s.graph).macs
    begin(s)
    assert widths(s)[1] == 12
    assert [c for c, _ in s.warnings] == ["cut-refused"]
    assert totals(s.model, s.graph).macs <= 0.6 * before


def test_a_run_in_which_no_cut_passes_fails(monkeypatch):
    refusing(monkeypatch, "stem.weight", "inner.weight", "last.weight")
    s = session("ratio: 0.5, generations: 1, when: {at: 0ep}")
    with pytest.raises(VerificationError, match="'m': no group of channels passes its proof"):
        s.on_epoch_begin(0)


def test_labels_and_a_loss_are_asked_for():
    with pytest.raises(BindError, match=r"^r.yaml:4: 'm' compares losses .* loss_of="):
        session("ratio: 0.5", loss_of=None)
    with pytest.raises(BindError, match=r"^r.yaml:4: 'm' .* needs calibration data"):
        session("ratio: 0.5", calibration=None)
    with pytest.raises(BindError, match="'m' needs calibration batches with labels"):
        session("ratio: 0.5", calibration=images(labels=False)).finish()


def test_a_loss_that_is_no_number_is_refused():
    s = session("ratio: 0.5, generations: 3", loss_of=lambda out, y: out.sum() * math.nan)
    with pytest.raises(UserError, match="'m': the loss on the calibration data is no finite"):
        s.finish()


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ("{stem.weight: [1, 0]}", r"no \[a, b\] for 'inner.weight' and 1 others\. Add it"),
        (
            "{stem.weight: [1, 0], inner.weight: [1, 0], last.weight: [1, 0], iner.weight: [1, 0]}",
            r"names 'iner.weight', which is no group .* Nearest: 'inner.weight'",
        ),
    ],
)
def test_coefficients_must_be_those_of_the_groups(coefficients, message):
    with pytest.raises(BindError, match=rf"^r.yaml:4: 'm': .*{message}"):
        session(f"ratio: 0.4, coefficients: {coefficients}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("samples: 20, population: 10", "drawn from the population of 10, .* got 20"),
        ("start: means", "start must be"),
        ("coefficients: {stem.weight: [1]}", "coefficients"),
    ],
)
def test_wrong_options_are_refused_with_their_place(options, message):
    with pytest.raises(RecipeError, match=rf"^r.yaml:4: .*{message}"):
        session(f"ratio: 0.4, {options}")


def test_it_conflicts_with_another_that_cuts_the_same_channels():
    other = "  n: {prune: structure, ratio: 0.2, when: {at: 1ep}}\n"
    with pytest.raises(PlanConflict, match=r"'m' \(line 4\) and 'n' \(line 5\) both set structure"):
        session("ratio: 0.5", other)


# ------------------------------------------------------------------ stop and go on


@pytest.mark.parametrize("criterion", ["l2", "taylor", "random"])
def test_a_resumed_run_cuts_the_same(tmp_path, criterion):
    options = f"legr, ratio: {{ramp: linear, final: 0.4}}, target: macs, criterion: {criterion}"
    when = "when: {at: [1ep, 2ep]}"
    whole = check_resume(f"{options}, generations: 6, ft_batches: 1, {when}", tmp_path)
    assert whole.plan.edits


def test_coefficients_are_in_the_state():
    options = "ratio: 0.4, generations: 4, when: {at: [0ep, 1ep]}"
    first, second = session(options), session(options)
    begin(first, 1)
    second.load_state_dict(first.state_dict())
    assert second.methods[0].coefficients == first.methods[0].coefficients != {}
