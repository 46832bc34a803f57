"""`regularize: slimming` in a session: which scales, plain and weighted by what a channel costs."""

import pytest
import regularize_case as case
import torch
from torch import nn

from gracile.errors import BindError, RecipeError
from gracile.regularize.methods.slimming import Slimming

PLAIN = "m: {regularize: slimming, strength: 0.5}"


def params(kept):
    """Parameters of `Chain` at these widths."""
    a, b = kept["a.weight", 0], kept["b.weight", 0]
    return 27 * a + a + 2 * a + 9 * a * b + 2 * b + 4 * b + 4


def weighted(predict=params, net=case.Chain, strength=1.0):
    """A session, and a slimming method with costs that is attached to it."""
    s = case.session(net=net)
    m = Slimming("m", Slimming.Options(strength=strength), predict=predict)
    m.on_attach(s)
    s.methods.append(m)
    s.fired["m"] = 0
    return s, m


def gradients(s, m):
    for p in s.model.parameters():
        p.grad = None
    m.penalty(s).backward()
    return {n: p.grad for n, p in s.model.named_parameters() if p.grad is not None}


def set_scales(s, **values):
    with torch.no_grad():
        for name, v in values.items():
            s.parameter(f"{name}.weight").copy_(torch.as_tensor(v))


def test_the_term_is_the_strength_times_the_sum_of_the_scales_and_pulls_each_alike():
    s = case.session(PLAIN)
    set_scales(s, norm=torch.linspace(-1, 1, 8), norm2=-2.0)
    s.on_epoch_begin(0)
    s.on_minibatch_begin(0, 0, case.STEPS)
    term = s.before_backward_pass(0, 0, case.STEPS, torch.zeros((), requires_grad=True))
    want = 0.5 * (torch.linspace(-1, 1, 8).abs().sum().item() + 12)
    assert term.item() == pytest.approx(want)
    term.backward()
    assert torch.equal(s.parameter("norm.weight").grad, 0.5 * torch.linspace(-1, 1, 8).sign())
    assert torch.equal(s.parameter("norm2.weight").grad, -0.5 * torch.ones(6))


def test_what_is_pulled_shrinks_and_the_curve_says_how_many_are_alive():
    free = case.train(case.session("m: {regularize: slimming, strength: 1e-9}"), 0, 1, 2)
    pulled = case.train(
        case.session("m: {regularize: slimming, strength: 0.2, alive: 0.3}"), 0, 1, 2
    )
    for name in ("norm.weight", "norm2.weight"):
        assert pulled.parameter(name).abs().sum() < 0.7 * free.parameter(name).abs().sum()
    scales = torch.cat([pulled.parameter(f"{n}.weight").detach() for n in ("norm", "norm2")])
    share = (scales.abs() > 0.3).float().mean().item()
    assert pulled.history["alive/m"][-1] == (3.0, pytest.approx(share))
    assert share < 1
    assert [v for _, v in free.history["alive/m"]] == [1.0] * 3


def test_scales_whose_channels_cannot_be_cut_are_left_alone_and_noted():
    class Ends(case.Chain):
        """Its second BatchNorm is the output."""

        def forward(self, x):
            return self.norm2(self.b(torch.relu(self.norm(self.a(x))))).mean((2, 3))

    s = case.session(PLAIN, net=Ends)
    got = gradients(s, s.methods[0])
    assert set(got) == {"norm.weight"}
    notes = {n[0]: n[3:5] for n in s.notes}
    assert notes == {
        "norm2.weight": (
            "protected",
            "6 of 6 scales are not pulled: it is an output of the model",
        )
    }


def test_a_scale_in_two_overlapping_groups_counts_once():
    class Grouped(case.Chain):
        """Its second convolution has two groups: whole groups and their width can both be cut."""

        def __init__(self):
            super().__init__()
            self.b = nn.Conv2d(8, 6, 3, padding=1, groups=2)
            self.mix = nn.Conv2d(6, 6, 1)

        def forward(self, x):
            x = torch.relu(self.norm2(self.b(torch.relu(self.a(x)))))
            return self.head(self.mix(x).mean((2, 3)))

    s = case.session("m: {regularize: slimming, norms: norm2, strength: 1}", net=Grouped)
    assert sum(("norm2.weight", 0) in g.sizes for g in s.groups) == 2
    assert s.methods[0].penalty(s).item() == pytest.approx(6)


def test_only_the_selected_norms_are_pulled():
    s = case.session("m: {regularize: slimming, norms: norm2, strength: 0.5}")
    assert set(gradients(s, s.methods[0])) == {"norm2.weight"}


# ------------------------------------------------------------------ costs


def test_with_all_alive_the_weights_are_relative_costs_of_mean_one():
    s, m = weighted()
    assert m.penalty(s).item() == pytest.approx(8 + 6)
    got = gradients(s, m)
    mean = (8 * 84 + 6 * 78) / 14  # 27 + 1 + 2 + 9 * 6 and 9 * 8 + 2 + 4 parameters
    torch.testing.assert_close(got["norm.weight"], torch.full((8,), 84 / mean))
    torch.testing.assert_close(got["norm2.weight"], torch.full((6,), 78 / mean))


def test_resource_params_counts_what_the_analysis_counts():
    s = case.session("m: {regularize: slimming, strength: 1, resource: params}")
    by_hand, m = weighted()
    for names in ({}, {"norm": [1, 1, 1, 1e-4, 0, 0, 2, 3]}, {"norm2": [0, 1, 1, 1, 1, 1]}):
        set_scales(s, **names)
        set_scales(by_hand, **names)
        want = gradients(by_hand, m)
        for name, grad in gradients(s, s.methods[0]).items():
            torch.testing.assert_close(grad, want[name])


def test_resource_macs_counts_positions():
    s = case.session("m: {regularize: slimming, strength: 1, resource: macs}")
    a, b = 36 * 27 + 36 * 9 * 6, 36 * 72 + 4  # 6 x 6 positions; the head sees one
    mean = (8 * a + 6 * b) / 14
    got = gradients(s, s.methods[0])
    torch.testing.assert_close(got["norm.weight"], torch.full((8,), a / mean))
    torch.testing.assert_close(got["norm2.weight"], torch.full((6,), b / mean))


def test_the_weights_follow_the_channels_that_are_alive_and_the_unit_stays():
    s, m = weighted()
    mean = (8 * 84 + 6 * 78) / 14
    set_scales(s, norm=[1, 1, 1, 1, 1e-4, 1e-4, 1e-4, 1e-4])
    got = gradients(s, m)
    torch.testing.assert_close(got["norm.weight"], torch.full((8,), 84 / mean))
    torch.testing.assert_close(got["norm2.weight"], torch.full((6,), (36 + 6) / mean))
    set_scales(s, norm=1.0)
    torch.testing.assert_close(gradients(s, m)["norm2.weight"], torch.full((6,), 78 / mean))


def test_it_is_morphnets_regularizer_of_a_bilinear_cost():
    """G = C (sum |gamma_in| * alive_out + alive_in * sum |gamma_out|), summed over the layers."""

    def macs(kept):
        a, b = kept["a.weight", 0], kept["b.weight", 0]
        return 36 * 27 * a + 36 * 9 * a * b + 4 * b

    s, m = weighted(macs)
    torch.manual_seed(1)
    x, y = torch.rand(8) + 0.1, torch.rand(6) + 0.1
    x[:3], y[:2] = 1e-5, 0.0
    set_scales(s, norm=x, norm2=y)
    a, b = 5, 4
    first = 36 * 27 * x.sum()
    second = 36 * 9 * (x.sum() * b + a * y.sum())
    last = 4 * y.sum()
    assert m.penalty(s).item() * m.unit_cost == pytest.approx((first + second + last).item())


def test_of_a_residual_stream_the_largest_scale_of_a_channel_counts():
    calls = []

    def cost(kept):
        calls.append(dict(kept))
        return 10.0 * kept["a.weight", 0]

    s, m = weighted(cost, net=case.Residual)
    assert len(m.scales) == 1
    set_scales(s, norm=[0.5, 2, 0, 1, 1, 1, 1, 1], norm2=[2, -0.5, 0, 3, 3, 3, 3, 3])
    got = gradients(s, m)
    assert got["norm.weight"].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert got["norm2.weight"].tolist() == [1, 0, 0, 1, 1, 1, 1, 1]
    known = len(calls)
    m.penalty(s)
    assert len(calls) == known  # asked again only when a channel dies or returns
    assert calls[-1]["b.weight", 0] == calls[-1]["b.weight", 1] == calls[-1]["head.weight", 1]


def test_a_channel_without_a_scale_is_always_alive():
    s, m = weighted(lambda kept: kept["c.weight", 0] ** 2, net=case.Half)
    (scales,) = m.scales
    assert scales.scaled.tolist() == [False] * 4 + [True] * 4
    assert m.unit_cost == 8**2 - 7**2
    set_scales(s, norm=[1.0, 1.0, 0.0, 0.0])  # six alive: a loss saves 11, a return costs 13
    got = gradients(s, m)["norm.weight"]
    assert got.tolist() == pytest.approx([11 / 15, 11 / 15, 0, 0])


def test_the_expensive_layer_shrinks_first():
    s, _ = weighted(lambda kept: 99 * kept["a.weight", 0] + kept["b.weight", 0], strength=0.1)
    case.train(s, 0, 1)
    assert s.parameter("norm.weight").mean() < 0.8 * s.parameter("norm2.weight").mean()


def test_after_a_cut_the_widths_are_the_new_ones():
    s, m = weighted()
    s.cut({"a.weight": [0, 1, 2]}, by="cut")
    mean = (8 * 84 + 6 * 78) / 14
    got = gradients(s, m)
    assert got["norm.weight"].tolist() == pytest.approx([84 / mean] * 5)
    assert got["norm2.weight"].tolist() == pytest.approx([(45 + 6) / mean] * 6)


def test_slimming_then_cutting_by_the_scale_takes_the_channels_it_turned_off():
    s = case.session(
        "m: {regularize: slimming, strength: 1e-4, when: {start: 0ep, stop: 1ep}}",
        "cut: {prune: structure, ratio: 0.25, criterion: norm_scale, scope: layer, norm: none, "
        "when: {at: 1ep}}",
    )
    set_scales(s, norm=[1, 1e-4, 1, 1, 1e-4, 1, 1, 1])
    weight = s.parameter("a.weight").detach().clone()
    s.on_epoch_begin(1)
    assert torch.equal(s.model.a.weight, weight[[0, 2, 3, 5, 6, 7]])


# ------------------------------------------------------------------ stop, resume, refusals


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumed_equals_uninterrupted(stop):
    methods = (
        "m: {regularize: slimming, strength: {ramp: cubic, initial: 0.01, final: 0.1}, "
        "resource: macs, when: {start: 0ep, every: 2ep}}",
        "cut: {prune: structure, ratio: 0.3, when: {at: 2ep}}",
    )
    whole = case.train(case.session(*methods), *range(case.EPOCHS))
    first = case.train(case.session(*methods), *range(stop))
    second = case.session(*methods)
    second.load_state_dict(first.state_dict())
    case.train(second, *range(stop, case.EPOCHS))
    a, b = whole.finish(), second.finish()
    assert a.plan == b.plan
    case.assert_same(a.model.state_dict(), b.model.state_dict())
    assert a.history == b.history


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("strength: -1", "strength must be a number, not below 0, got -1"),
        ("strength: 1, alive: -0.1", "alive must be at least 0, got -0.1"),
        ("strength: 1, resource: time", "resource must be 'none', 'params' or 'macs', got 'time'"),
        ("strength: 1, norm: bn", "no key 'norm'. Nearest: 'norms'"),
        ("alive: 0.1", "needs 'strength'|strength"),
    ],
)
def test_wrong_options_are_refused_with_their_line(options, text):
    with pytest.raises(RecipeError, match=rf"^r.yaml:4: .*{text}"):
        case.recipe(f"m: {{regularize: slimming, {options}}}")


@pytest.mark.parametrize(
    ("net", "options", "text"),
    [
        (case.Chain, "norms: head", "'m': norms must select scales .* 'head.weight' is none"),
        (case.Chain, "norms: bn7", "'bn7' matches no tensor in Chain"),
        (case.Plain, "alive: 0.1", "'m': Plain has no BatchNorm with a scale"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
            "alive: 0.1",
            "no channel of the 1 selected BatchNorms can be cut: it is an output of the model",
        ),
        (case.Chain, "when: {at: 2ep}", r"'m': .* write when: \{start: 2ep\}"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_training(net, options, text):
    with pytest.raises(BindError, match=rf"^r.yaml:4: .*{text}"):
        case.session(f"m: {{regularize: slimming, strength: 1, {options}}}", net=net)


def test_costs_that_no_channel_changes_are_refused():
    with pytest.raises(BindError, match="'m': by the given costs no channel costs anything"):
        weighted(lambda kept: 5.0)
