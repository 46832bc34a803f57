"""`prune: greedy`: which group goes next, to an exact target, with what is learnt on the way."""

import math

import pytest
import torch
from group_case import chain
from judged_case import Three, begin, images, session_of, widths
from mask_case import check_resume
from torch.nn.functional import mse_loss

from gracile.analyze.cost import totals
from gracile.errors import BindError, PlanConflict, UserError, VerificationError
from gracile.prune.methods.greedy import rise_per_cost
from gracile.prune.structure import one_step
from gracile.prune.widths import Limits
from gracile.train.session import Session


def session(options, more="", **given):
    return session_of("greedy", options, more, **given)


def three(options):
    x = torch.ones(2, 1)
    y = torch.full((2, 1), 11.0)  # what it gives: 0.95 + (0.05 + 4) + 6
    return session(
        options, model=Three(), example=x, calibration=[(x, y)], loss_of=mse_loss
    )  # fmt: skip


# ------------------------------------------------------------------ the choice


@pytest.mark.parametrize(
    ("score", "gone"),
    # without a[0] the output is 10, loss 1, saving 1 + 3 = 4 of 11 parameters: 0.25 for each;
    # without b[0] it is 10.05, loss 0.9025, saving 2 + 1 = 3: 0.30 for each
    [("loss", "b.weight"), ("loss_per_cost", "a.weight")],
)
def test_the_group_of_the_best_score_is_cut(score, gone):
    s = three(f"ratio: 0.25, target: params, score: {score}, when: {{at: 0ep}}")
    begin(s, 1)
    (edit,) = s.plan.edits
    assert (edit.group[0].at, edit.group[0].keep[0], edit.by) == (gone, 1, "m")


def test_a_step_is_chosen_anew_after_each_cut():
    # first b[0], as above; of b = [[0.05, 2], [0, 3]] then a[0]: 10.05 -> 10, b[0]: -> 6
    s = three("ratio: 0.5, target: params, score: loss, when: {at: 0ep}")
    begin(s, 1)
    assert [e.group[0].at for e in s.plan.edits] == ["b.weight", "a.weight"]
    assert s.history["params/m"] == [(0.0, 5)]  # 11, 8, 5: a loses 1 + 2


def test_rises_by_hand():
    assert rise_per_cost(3.0, 1.0, 4.0) == 0.5
    assert rise_per_cost(0.5, 1.0, 4.0) < rise_per_cost(0.5, 1.0, 2.0) < 0  # a fall: more of it


def test_a_step_by_hand():
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 8.0, 7.0, 6.0, 10.0])
    group = chain("a", 10)

    def step(share, limit=0, **limits):
        return one_step(
            group, scores, share, left=lambda n, kept: 10 - n, limit=limit, limits=Limits(**limits)
        )

    assert step(0.35) == [1, 3, 4]  # floor(3.5)
    assert step(0.01) == [1]  # at least one
    assert step(0.9, limit=8) == [1, 3]  # as many as are asked for
    assert step(0.5, multiple_of=4) == [1, 3]  # 8 stay; 4 would be too much for half
    assert step(0.1, multiple_of=4) == [1, 3]  # at least one block
    assert step(0.9, min_keep=9) == [1]
    assert step(0.9, min_keep=10) == []


# ------------------------------------------------------------------ the target


@pytest.mark.parametrize("target", ["params", "macs"])
def test_a_cost_target_is_met_within_one_channel(target):
    s = session(f"ratio: 0.5, target: {target}, when: {{at: 0ep}}")
    before = getattr(totals(s.model, s.graph), target)
    largest = {"params": (3 + 12 + 12 + 1) * 9 + 5 + 10, "macs": 64 * (3 + 12 + 12) * 9 + 640}
    begin(s, 1)
    after = getattr(totals(s.model, s.graph), target)
    assert before / 2 - largest[target] < after <= before / 2
    assert s.history[f"{target}/m"] == [(0.0, after)]


def test_a_share_of_channels_is_exact():
    s = session("ratio: 0.4, when: {at: 0ep}")
    begin(s, 1)
    assert sum(widths(s)) == 30 - 12


def test_limits_hold_and_a_missed_target_is_told():
    s = session("ratio: 0.5, min_keep: 7, ignore: last, when: {at: 0ep}")
    begin(s, 1)
    assert widths(s) == (7, 7, 10)
    ((code, text),) = s.warnings
    assert (code, text.startswith("'m' keeps 14 channels, 10 were asked for")) == (
        "target-missed", True,
    )  # fmt: skip


def test_several_firings_follow_the_ramp():
    s = session("ratio: {ramp: linear, final: 0.5}, when: {start: 0ep, stop: 4ep}")
    begin(s)
    assert [v for _, v in s.history["channels/m"]] == [30, 25, 20, 15]  # floor(share * 30) gone


def test_a_target_out_of_reach_is_refused_before_training():
    with pytest.raises(UserError, match=r"^r.yaml:4: 'm': the target of .* macs cannot be reached"):
        session("ratio: 0.9, target: macs, max_ratio: 0.1")


# ------------------------------------------------------------------ what is made good


def test_without_when_it_acts_at_the_end_and_counts_statistics_anew():
    s = session("ratio: 0.4")
    begin(s)
    assert widths(s) == (8, 12, 10)
    model = s.finish().model
    with torch.no_grad():
        maps = [model.stem(x).transpose(0, 1).flatten(1) for x, _ in images()]
    assert sum(p.shape[0] for p in (model.stem.weight, model.inner.weight, model.last.weight)) == 18
    torch.testing.assert_close(
        model.bn.running_mean, torch.stack([m.mean(1) for m in maps]).mean(0)
    )


def test_statistics_may_be_kept():
    s = session("ratio: 0.4, statistics: kept")
    s.model.bn.running_mean.copy_(torch.arange(8.0))
    model = s.finish().model
    assert set(model.bn.running_mean.tolist()) <= set(range(8))


def test_what_the_candidate_has_learnt_is_kept():
    plain, tuned = (
        session(f"ratio: 0.5, target: macs, ft_batches: {n}, ft_lr: 0.05") for n in (0, 4)
    )
    losses = []
    for s in (plain, tuned):
        s.finish()
        losses.append(s.losses_after(s.methods[0], {})[None])
    assert losses[1] < losses[0] - 0.02


def test_the_criterion_may_look_at_gradients():
    s = session("ratio: 0.4, criterion: taylor, when: {at: 0ep}")
    begin(s, 1)
    assert sum(widths(s)) == 18


# ------------------------------------------------------------------ refusals


def refusing(monkeypatch, *bad):
    """Every cut that touches one of these groups fails its proof."""
    cut = Session.cut

    def fails(s, gone, *, by, reproduce):
        if set(gone) & set(bad):
            raise VerificationError("the first differing operator is 'x' (odd)")
        cut(s, gone, by=by, reproduce=reproduce)

    monkeypatch.setattr(Session, "cut", fails)


@pytest.mark.parametrize("batches", [0, 1])
def test_a_group_that_fails_its_proof_stays_as_it_was_and_others_take_over(monkeypatch, batches):
    refusing(monkeypatch, "inner.weight", "stem.weight")
    s = session(f"ratio: 0.2, ft_batches: {batches}, when: {{at: 0ep}}")
    stem = s.parameter("stem.weight").detach().clone()
    begin(s)
    assert widths(s) == (8, 12, 4)
    assert {c for c, _ in s.warnings} == {"cut-refused"}
    if not batches:
        assert torch.equal(s.parameter("stem.weight"), stem)
    rows = [r for r in s.finish().ledger if r.name == "inner.weight" and r.structure == "kept"]
    assert [(r.reason, "'x' (odd)" in r.why) for r in rows] == [("protected", True)]


def test_a_run_in_which_no_cut_passes_fails(monkeypatch):
    refusing(monkeypatch, "stem.weight", "inner.weight", "last.weight")
    s = session("ratio: 0.5, ft_batches: 1, when: {at: 0ep}")
    before = {k: v.clone() for k, v in s.model.state_dict().items()}
    with pytest.raises(VerificationError, match="'m': no group of channels passes its proof"):
        s.on_epoch_begin(0)
    assert all(torch.equal(v, before[k]) for k, v in s.model.state_dict().items())


def test_labels_and_a_loss_are_asked_for():
    with pytest.raises(BindError, match=r"^r.yaml:4: 'm' compares losses .* loss_of="):
        session("ratio: 0.5", loss_of=None)
    with pytest.raises(BindError, match=r"^r.yaml:4: 'm' .* needs calibration data"):
        session("ratio: 0.5", calibration=None)
    with pytest.raises(BindError, match="'m' needs calibration batches with labels"):
        session("ratio: 0.5", calibration=images(labels=False)).finish()


def test_a_loss_that_is_no_number_is_refused():
    s = session("ratio: 0.5", loss_of=lambda out, y: out.sum() * math.nan)
    with pytest.raises(UserError, match="'m': the loss on the calibration data is no finite"):
        s.finish()


def test_it_conflicts_with_another_that_cuts_the_same_channels():
    other = "  n: {prune: structure, ratio: 0.2, when: {at: 1ep}}\n"
    with pytest.raises(PlanConflict, match=r"'m' \(line 4\) and 'n' \(line 5\) both set structure"):
        session("ratio: 0.5", other)


# ------------------------------------------------------------------ stop and go on


@pytest.mark.parametrize("criterion", ["l1", "taylor", "random"])
def test_a_resumed_run_cuts_the_same(tmp_path, criterion):
    options = f"greedy, ratio: 0.4, target: macs, criterion: {criterion}, ft_batches: 1"
    whole = check_resume(options + ", when: {at: [1ep, 2ep]}", tmp_path)
    assert whole.plan.edits
