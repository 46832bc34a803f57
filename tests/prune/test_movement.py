"""Movement: scores by hand, hard and soft masks, whole heads, and what stays of them."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_case import STEPS, Net, Row, check_resume, finished, refused, session, train_epoch
from sklearn.datasets import load_digits
from torch import nn

from gracile.errors import PlanConflict
from gracile.graph.capture import capture
from gracile.graph.dependency import channel_groups
from gracile.prune.learned import LAYER
from gracile.prune.masked_units import whole_units
from gracile.prune.movement import Scores, importance_loss, score_at
from gracile.prune.selection import lowest, mask_without, without_lowest
from gracile.recipe.load import loads
from gracile.train.session import Session

CPU = torch.device("cpu")
W = [[2.0, -1.0], [0.5, 3.0]]
HARD = 'movement, weights: "type:Conv2d", sparsity: 0.5, score_lr: 0.1, when: {start: 1ep}'
SOFT = (
    'movement, weights: "type:Conv2d", threshold: 0, strength: 0.1, score_lr: 0.1, '
    "when: {start: 1ep}"
)


def by_hand(options):
    """A 2x2 linear layer without bias whose scores step with SGD at rate 0.1, weights at 0.5."""
    model = Row(*W)
    options = f"movement, weights: fc, score_optimizer: sgd, score_lr: 0.1, {options}"
    s = session(options, model, steps=1)
    s.optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return s


def step(s, k, x, g):
    """An epoch of one step with the loss sum(g * output): dL/dW' = g x^T for one x and g (1, 2)."""
    s.on_epoch_begin(k)
    s.model.train()
    s.on_minibatch_begin(k, 0, 1)
    loss = (s.model(torch.tensor(x)) * torch.tensor(g)).sum()
    s.before_backward_pass(k, 0, 1, loss).backward()
    s.before_parameter_optimization(k, 0, 1)
    s.optimizer.step()
    s.optimizer.zero_grad()
    s.on_minibatch_end(k, 0, 1)


def scores(s):
    return {a: x.values.detach().clone() for a, x in s.methods[0].scores.items()}


def hide(s, address, share=0.5, where=None):
    """Give the first scores (or those `where`) a low value, the others a high one."""
    x = s.methods[0].scores[address]
    low = torch.arange(len(x.values)) < int(share * len(x.values)) if where is None else where
    with torch.no_grad():
        x.values.copy_(torch.where(low, -9.0, 9.0))
    s.methods[0].moved = True


class Layer(nn.Module):
    """An attention of four heads and a feed-forward of six units: 5 x 8 -> 3."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 4, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + self.o(a.transpose(1, 2).reshape(b, n, -1))
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x.mean(1))


# ------------------------------------------------------------------ scores by hand


def test_scores_of_two_steps_by_hand():
    s = by_hand("sparsity: 0.25, when: {at: 0ep}")
    step(s, 0, [[1.0, 2.0]], [[1.0, -1.0]])
    # dL/dW = g x^T = [[1, 2], [-1, -2]]; S = -0.1 dL/dW * W; W = W - 0.5 dL/dW
    first = torch.tensor([[-0.2, 0.2], [0.05, 0.6]])
    torch.testing.assert_close(scores(s)["fc.weight"].reshape(2, 2), first)
    torch.testing.assert_close(s.model.fc.weight, torch.tensor([[1.5, -2.0], [1.0, 4.0]]))
    # one of four is hidden, the lowest score: W[0, 0] = 1.5
    assert s.overlays.effective("fc.weight").tolist() == [[0.0, -2.0], [1.0, 4.0]]
    step(s, 1, [[1.0, 1.0]], [[-4.0, 1.0]])
    # dL/dW' = [[-4, -4], [1, 1]]: the hidden weight stands still, its score moves as if it were not
    second = first - 0.1 * torch.tensor([[-4 * 1.5, -4 * -2.0], [1.0, 4.0]])
    torch.testing.assert_close(scores(s)["fc.weight"].reshape(2, 2), second)
    torch.testing.assert_close(s.model.fc.weight, torch.tensor([[1.5, 0.0], [0.5, 3.5]]))
    # scores 0.4, -0.6, -0.05, 0.2: it is back, and W[0, 1] goes
    keep = s.methods[0].scores["fc.weight"].mask()
    assert keep.tolist() == [[True, False], [True, True]]


def test_the_score_of_a_group_is_the_sum_of_its_weights():
    s = by_hand("granularity: row, sparsity: 0.5, when: {at: 0ep}")
    step(s, 0, [[1.0, 2.0]], [[1.0, -1.0]])
    torch.testing.assert_close(scores(s)["fc.weight"], torch.tensor([0.0, 0.65]))
    assert s.overlays.effective("fc.weight")[0].tolist() == [0.0, 0.0]


def test_the_loss_moves_scores_by_the_slope_of_the_sigmoid():
    s = by_hand("threshold: 0, strength: 2, when: {at: 0ep}")
    step(s, 0, [[1.0, 2.0]], [[1.0, -1.0]])
    first = torch.tensor([-0.2, 0.2, 0.05, 0.6]) - 0.1 * 2 * 0.25 / 4
    torch.testing.assert_close(scores(s)["fc.weight"], first)
    assert s.terms["m"] == pytest.approx(2 * 0.5)


def test_losses_by_hand():
    s = [torch.tensor([0.0, 2.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)]
    n = [torch.tensor([4, 4]), torch.tensor([6])]
    a, b, c = 0.5, 0.880797, 0.268941
    values = {
        "paper": a + b + c,
        "mean": ((a + b) / 2 + c) / 2,
        "nncf": (2 * (a + b) / 2 + 3 * c) / 2,
    }
    for form, value in values.items():
        assert importance_loss(s, n, form=form).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("form", ["paper", "mean", "nncf"])
def test_the_gradient_of_a_loss_is_its_numerical_one(form):
    s = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (3, 5)]
    n = [torch.ones(3), torch.full((5,), 4)]
    assert torch.autograd.gradcheck(lambda *x: importance_loss(x, n, form=form), s)


def test_only_in_a_mini_batch_do_scores_learn():
    x = Scores(torch.tensor([[0, 1]]), CPU)
    x(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert x.values.grad is None
    x.wake()
    weight = torch.tensor([[2.0, -3.0]], requires_grad=True)
    x.keep = torch.tensor([True, False])
    seen = x(weight)
    assert seen.tolist() == [[2.0, 0.0]]
    (seen * torch.tensor([[5.0, 7.0]])).sum().backward()
    assert weight.grad.tolist() == [[5.0, 0.0]]  # a hidden weight learns nothing
    assert x.values.grad.tolist() == [10.0, -21.0]  # its score does


# ------------------------------------------------------------------ kernels


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
def test_without_lowest_is_what_sorting_finds(values, data):
    v = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(0, len(v)))
    groups = torch.arange(len(v))
    assert torch.equal(without_lowest(v, k), mask_without(groups, lowest(v, k)))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.floats(0, 0.99))
def test_a_threshold_at_a_score_hides_at_least_that_share(values, share):
    v, n = torch.tensor(values, dtype=torch.float32), torch.arange(1, len(values) + 1)
    at = score_at([v[:1], v[1:]], [n[:1], n[1:]], share)
    assert n[v <= at].sum() > share * n.sum() * 0.9999
    assert n[v < at].sum() <= share * n.sum() * 1.0001


# ------------------------------------------------------------------ hard and soft over time


def test_the_share_follows_the_ramp_and_is_exact():
    s = session(
        'movement, weights: "type:Conv2d", sparsity: {ramp: linear, initial: 0.2, final: 0.6}, '
        "when: {start: 0ep}"
    )
    for e, level in enumerate((0.2, 0.4, 0.6)):
        train_epoch(s, e)
        for a, n in (("stem.weight", 288), ("inner.weight", 288)):
            assert (s.overlays.effective(a) == 0).sum() == int(level * n + 1e-6)
    assert [v for _, v in s.history["sparsity/m/target"]] == pytest.approx([0.2, 0.4, 0.6])


def test_scope_global_ranks_all_tensors_together():
    s = session(HARD.replace("0.5", "0.5, scope: global"))
    train_epoch(s, 0)
    s.on_epoch_begin(1)
    hide(s, "stem.weight", 0.75)
    hide(s, "inner.weight", 0.25)
    s.methods[0]._choose()
    kept = {a: x.kept() for a, x in s.methods[0].scores.items()}
    assert kept == {"stem.weight": 72, "inner.weight": 216}


def test_scores_are_learned_before_the_first_firing_and_nothing_is_hidden():
    s, plain = session(HARD), session("oneshot, weights: inner, sparsity: 0.5, when: {at: 2ep}")
    for x in (s, plain):
        train_epoch(x, 0)
    for p, q in zip(s.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert all((v != 0).all() for v in scores(s).values())
    s.on_epoch_begin(1)
    assert (s.overlays.effective("stem.weight") == 0).float().mean() == 0.5


def test_before_the_first_step_scores_are_equal_and_nothing_is_hidden():
    s = session(HARD.replace("1ep", "0ep"))
    s.on_epoch_begin(0)
    assert (s.overlays.effective("stem.weight") != 0).all()


def test_the_threshold_begins_where_it_hides_the_asked_share():
    s = session(
        'movement, weights: "type:Conv2d", threshold: {ramp: linear, final: 5}, '
        "initial_sparsity: 0.25, max_sparsity: 0.9, when: {start: 1ep}"
    )
    train_epoch(s, 0)
    s.on_epoch_begin(1)
    assert s.methods[0]._closed() == pytest.approx(0.25, abs=0.005)
    train_epoch(s, 1)
    train_epoch(s, 2)  # the threshold is at 5, above all scores
    for a in scores(s):
        assert (s.overlays.effective(a) == 0).sum() == int(0.9 * 288)  # max_sparsity


def test_a_threshold_that_falls_is_told():
    s = session(
        'movement, weights: "type:Conv2d", threshold: {ramp: linear, final: -1}, '
        "initial_sparsity: 0.1, when: {start: 1ep}"
    )
    train_epoch(s, 0)
    s.on_epoch_begin(1)
    assert s.warnings[0][0] == "threshold-falls"


def test_parts_have_a_granularity_of_their_own():
    s = session(
        "movement, weights: [stem, inner, head], sparsity: 0.5, parts: "
        "[{weights: stem, granularity: kernel}, {weights: head, granularity: row}], "
        "when: {start: 0ep}"
    )
    sizes = {a: len(v) for a, v in scores(s).items()}
    assert sizes == {"stem.weight": 32, "inner.weight": 288, "head.weight": 3}


def test_digits_learn_and_reach_the_share():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    text = (
        "recipe: 1\ntrain: {epochs: 6}\nmethods:\n  m: {prune: movement, weights: 'type:Linear', "
        "sparsity: {ramp: cubic, final: 0.8}, when: {start: 1ep, stop: 4ep, every: 1it}, "
        "freeze: 5ep}\n"
    )
    n = 1400 // 32
    s = Session(
        model,
        loads(text, name="r"),
        torch.optim.Adam(model.parameters(), lr=3e-3),
        example=x[:2],
        steps_per_epoch=n,
    )
    for e in range(6):
        order = torch.randperm(1400, generator=torch.Generator().manual_seed(e))
        with s.epoch():
            for i in range(n):
                s.model.train()
                rows = order[32 * i : 32 * i + 32]
                s.loss(nn.functional.cross_entropy(s.model(x[rows]), y[rows])).backward()
                s.step()
    result = s.finish()
    for layer in (result.model[0], result.model[2]):
        assert (layer.weight == 0).float().mean() == pytest.approx(0.8, abs=0.002)
    assert (result.model(x[1400:]).argmax(1) == y[1400:]).float().mean() > 0.8


# ------------------------------------------------------------------ the end


@pytest.mark.parametrize("options", [HARD, SOFT])
def test_frozen_masks_stand_still_and_weights_stay_zero(options):
    s = session(options.replace("1ep}", "1ep, stop: 2ep}, freeze: 9mb"))
    train_epoch(s, 0)
    train_epoch(s, 1)
    seen = []
    train_epoch(s, 2, lambda s: seen.append((s.own_mask("m", "stem.weight").clone(), scores(s))))
    assert s.overlays.addresses(LAYER) == []
    (_, before), *after = seen  # frozen in the second mini-batch
    assert all(torch.equal(keep, after[0][0]) for keep, _ in after)
    assert not torch.equal(before["stem.weight"], after[0][1]["stem.weight"])
    assert all(torch.equal(after[0][1][a], v) for a, v in scores(s).items())
    result = s.finish()
    zero = result.model.get_parameter("stem.weight") == 0
    assert 0 < zero.sum() < zero.numel()
    assert torch.equal(zero, ~result.tensors["stem.weight.mask"])


@pytest.mark.parametrize("options", [HARD, SOFT])
def test_what_is_evaluated_at_the_end_is_what_is_finished(options):
    s = session(options)
    for e in range(3):
        train_epoch(s, e)
    x = torch.randn(4, 4, 4, 4)
    before = s.model.eval()(x)
    assert torch.equal(s.finish().model(x), before)


@pytest.mark.parametrize(
    "options",
    [
        HARD,
        SOFT,
        HARD + ", score_optimizer: sgd",
        HARD.replace("1ep}", "0ep, stop: 1ep, every: 1it}") + ", freeze: 1ep",
        HARD.replace("1ep}", "0ep, stop: 1ep, every: 1it}") + ", freeze: 6mb, granularity: filter",
        SOFT.replace("threshold: 0", "threshold: {ramp: cubic, final: 0}, initial_sparsity: 0.1"),
    ],
)
def test_stop_save_resume_equals_one_run(options, tmp_path):
    check_resume(options, tmp_path)


def test_a_run_with_a_cut_resumes_to_the_same_bits(tmp_path):
    before = "  c: {prune: structure, ratio: 0.3, when: {at: 1ep}}\n"
    whole = check_resume(HARD, tmp_path, before=before)
    assert whole.model.stem.out_channels < 8


@pytest.mark.parametrize("granularity", ["element", "filter", "kernel"])
def test_scores_their_state_and_masks_are_cut_with_the_weight(granularity):
    s = session(HARD.replace("1ep", "0ep") + f", granularity: {granularity}")
    train_epoch(s, 0)
    m = s.methods[0]

    def spread(values):
        return {a: x.spread(values(x)).clone() for a, x in m.scores.items()}

    before = spread(lambda x: x.values.detach())
    averages = spread(lambda x: m.optimizer.state[x.values]["exp_avg"])
    group = next(g for g in s.groups if "stem.weight" in g.producers)
    s.cut({group.id: [1, 4, 6]}, by="me")
    keep = torch.tensor([0, 2, 3, 5, 7])
    after = spread(lambda x: x.values.detach())
    new = spread(lambda x: m.optimizer.state[x.values]["exp_avg"])
    for a, dim in (("stem.weight", 0), ("inner.weight", 1)):
        assert torch.equal(after[a], before[a].index_select(dim, keep))
        assert torch.equal(new[a], averages[a].index_select(dim, keep))
        hidden = len(m.scores[a].keep) - int(m.scores[a].keep.sum())
        assert hidden == len(m.scores[a].keep) // 2  # chosen anew among those that are left
    train_epoch(s, 1)
    train_epoch(s, 2)
    assert s.finish().tensors["stem.weight.mask"].shape == (5, 4, 3, 3)


def test_masks_of_other_methods_hold_and_quantization_sees_zeros():
    others = (
        "  o: {prune: oneshot, weights: stem, sparsity: 0.5, when: {at: 0ep}}\n"
        "  q: {quantize: qat, when: {start: 2ep}}\n"
    )
    s = session(HARD, before=others)
    seen = []

    def watch(s):
        hidden = ~(s.own_mask("o", "stem.weight") & s.methods[2].scores["stem.weight"].mask())
        seen.append(bool((s.overlays.effective("stem.weight")[hidden] == 0).all()))

    for e in range(3):
        train_epoch(s, e, watch)
    result = s.finish()
    assert len(seen) == 3 * STEPS
    assert all(seen)
    both = s.own_mask("o", "stem.weight") & s.own_mask("m", "stem.weight")
    assert (result.model.stem.weight[~both] == 0).all()


def test_a_copy_computes_what_the_original_does_and_gradients_elsewhere_do_not_count():
    s = session(HARD.replace("1ep", "0ep"))
    train_epoch(s, 0)
    x = torch.randn(2, 4, 4, 4)
    assert torch.equal(copy.deepcopy(s.model).eval()(x), s.model.eval()(x))
    assert len(list(s.gradients(s.methods[0]))) == 1
    assert all(v.values.grad is None for v in s.methods[0].scores.values())


# ------------------------------------------------------------------ whole heads and units


def heads(hidden):
    """(8, 8) of rows: False in these heads of two rows."""
    keep = torch.ones(8, 8, dtype=torch.bool)
    for h in hidden:
        keep[2 * h : 2 * h + 2] = False
    return keep


def resolved(masks):
    torch.manual_seed(0)
    model = Layer()
    groups = channel_groups(model, capture(model, torch.randn(2, 5, 8)))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    full = {f"{n}.weight": torch.ones(shapes[f"{n}.weight"], dtype=torch.bool) for n in "qkvo"}
    full |= {n: torch.ones(shapes[n], dtype=torch.bool) for n in ("up.weight", "down.weight")}
    return whole_units(groups, full | masks, shapes)


def test_a_head_goes_if_all_its_weights_hide_it_and_the_rest_is_given_back():
    masks = {f"{n}.weight": heads([1, 2]) for n in "qkv"} | {"o.weight": heads([2, 3]).T}
    out = resolved(masks)
    for n in "qkv":
        assert torch.equal(out[f"{n}.weight"], heads([2]))
        assert torch.equal(out[f"{n}.bias"], heads([2])[:, 0])
    assert torch.equal(out["o.weight"], heads([2]).T)
    assert "o.bias" not in out


def test_a_unit_goes_if_its_row_and_its_column_are_hidden():
    up, down = torch.ones(6, 8, dtype=torch.bool), torch.ones(8, 6, dtype=torch.bool)
    up[[0, 3]], up[1, 2] = False, False
    down[:, [3, 5]] = False
    out = resolved({"up.weight": up, "down.weight": down})
    assert (~out["up.weight"]).any(1).nonzero().flatten().tolist() == [3]
    assert (~out["down.weight"]).any(0).nonzero().flatten().tolist() == [3]
    assert (~out["up.bias"]).nonzero().flatten().tolist() == [3]


def test_of_a_layer_that_is_hidden_altogether_one_unit_stays():
    gone = {
        "up.weight": torch.zeros(6, 8, dtype=bool),
        "down.weight": torch.zeros(8, 6, dtype=bool),
    }
    assert resolved(gone)["up.bias"].sum() == 1


def test_without_the_masks_of_all_its_weights_a_group_keeps_holes():
    torch.manual_seed(0)
    model = Layer()
    groups = channel_groups(model, capture(model, torch.randn(2, 5, 8)))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    masks = {"up.weight": torch.rand(6, 8) > 0.5}
    assert whole_units(groups, masks, shapes) == masks


def test_structured_masks_are_cut_and_nothing_changes():
    torch.manual_seed(0)
    model, x = Layer(), torch.randn(4, 5, 8)
    text = (
        "recipe: 1\ntrain: {epochs: 3}\nmethods:\n  m: {prune: movement, weights: [q, k, v, o, up, "
        "down], threshold: 0, parts: [{weights: [q, k, v], granularity: {name: block, filters: 2, "
        "channels: 8}}, {weights: o, granularity: {name: block, filters: 8, channels: 2}}, "
        "{weights: up, granularity: row}, {weights: down, granularity: column}], "
        "when: {at: 0ep}, freeze: 1ep, structured: true}\n  t: {prune: thin, when: {at: 2ep}}\n"
    )
    s = Session(
        model,
        loads(text, name="r"),
        torch.optim.SGD(model.parameters(), lr=0.01),
        example=x,
        steps_per_epoch=2,
    )
    before = s.model.eval()(x)
    for e in range(3):
        with s.epoch():
            if e == 0:
                low = torch.tensor([False, True, False, False])
                for n in "qkvo":
                    hide(s, f"{n}.weight", where=low)
                for n in ("up", "down"):
                    hide(s, f"{n}.weight", 0.5)
            if e == 2:  # cut
                torch.testing.assert_close(s.model.eval()(x), before, atol=1e-6, rtol=1e-5)
            for _ in range(2):
                s.model.train()
                s.loss(s.model(x).square().mean()).backward()
                s.step()
        if e == 1:
            before = s.model.eval()(x)
            assert torch.equal(s.own_mask("m", "q.weight"), heads([1]))
    result = s.finish()
    shapes = {n: tuple(p.shape) for n, p in result.model.named_parameters()}
    assert (shapes["q.weight"], shapes["o.weight"]) == ((6, 8), (8, 6))
    assert (shapes["up.weight"], shapes["down.weight"]) == ((3, 8), (8, 3))
    assert {e.kind for e in result.plan.edits} == {"remove"}
    assert result.warnings == []


# ------------------------------------------------------------------ what is told


def test_a_threshold_below_all_scores_is_a_warning():
    s = session('movement, weights: "type:Conv2d", threshold: -50, when: {at: 0ep}')
    result = finished(s)
    assert [code for code, _ in result.warnings] == ["nothing-masked"]
    assert result.plan.of_kind("mask") == []
    rows = {r.name: r for r in result.ledger if r.kind == "tensor"}
    assert rows["stem.weight"].reason == "sensitive"


def test_a_loop_that_never_steps_is_told():
    s = session(HARD)
    for e in range(3):
        s.on_epoch_begin(e)
        s.on_epoch_end(e)
    result = s.finish()
    assert [code for code, _ in result.warnings] == ["nothing-learned"]


def test_the_zeros_of_the_finished_model_are_the_mask_of_its_plan():
    result = finished(session(HARD))
    edits = {e.at: e for e in result.plan.of_kind("mask")}
    assert edits.keys() == {"stem.weight", "inner.weight"}
    for a, edit in edits.items():
        zero = result.model.get_parameter(a) == 0
        assert torch.equal(zero, ~result.tensors[edit.key])
        assert edit.sparsity == pytest.approx(zero.float().mean().item()) == 0.5
    rows = {r.name: r for r in result.ledger if r.kind == "tensor"}
    assert rows["stem.weight"].why == "movement masked 50.0% of its weights"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("when: {at: 0ep}", "needs sparsity .* or threshold"),
        ("sparsity: 0.5, threshold: 0, when: {at: 0ep}", "one of the two"),
        ("sparsity: 0.5, when: {at: end}", "'at: end' is too late"),
        ("sparsity: 0.5, strength: 1, when: {at: 0ep}", "strength goes with threshold"),
        ("threshold: 0, scope: global, when: {at: 0ep}", "scope goes with sparsity"),
        ("threshold: 0, initial_sparsity: 0.1, when: {at: 0ep}", "where a ramp begins"),
        ("threshold: low, when: {at: 0ep}", "must be a number, got 'low'"),
        ("threshold: 0, structured: true, when: {at: 0ep}", "say freeze"),
        ("threshold: 0, freeze: 3ep, when: {start: 0ep}", "freeze: .* must lie between"),
        (
            "sparsity: 0.5, scope: global, parts: [{weights: stem, granularity: row}], "
            "when: {at: 0ep}",
            "use scope: layer",
        ),
        (
            "sparsity: 0.5, parts: [{weights: head, granularity: row}], when: {at: 0ep}",
            "'head.weight' is not among the weights",
        ),
        (
            "sparsity: 0.5, parts: [{weights: stem, granularity: kernel}, {weights: s*, "
            "granularity: filter}], when: {at: 0ep}",
            "'stem.weight' is in two of them",
        ),
        ("sparsity: 0.5, granularity: row, when: {at: 0ep}", "rows need a weight of 2 dimensions"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, text):
    refused(f'movement, weights: "type:Conv2d", {options}', text)


def test_fp16_and_gates_on_the_same_tensor_are_refused():
    refused(HARD, "Use autocast: bf16", train=", autocast: fp16")
    gates = '  g: {prune: gates, weights: "type:Conv2d", sparsity: 0.5, when: {at: 0ep}}\n'
    with pytest.raises(PlanConflict, match=r"both set gates of 'stem\.weight'"):
        session(HARD, Net(), before=gates)
