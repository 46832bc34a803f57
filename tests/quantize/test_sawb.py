"""SAWB: ends by hand, against a search for the least squared error, and in `quantize: pact`."""

import pytest
import torch
from learned_case import resumed, same, start, trained
from quant_session import PROFILE

from gracile.errors import BindError
from gracile.quantize import engine
from gracile.quantize.dorefa import dorefa_spec
from gracile.quantize.placement import WeightSpec
from gracile.quantize.sawb import ODD, WITH_ZERO, SawbGrid, best_end


@pytest.fixture(autouse=True)
def _profile(monkeypatch):
    monkeypatch.setattr(engine, "load_profile", lambda name: PROFILE)
    monkeypatch.setattr(engine, "sums_saturate", lambda: False)


def grid(bits, *, zero=False):
    spec, odd = dorefa_spec(WeightSpec("w", bits, True, True, 0, True), 8, zero)
    return SawbGrid(spec, None, odd)


def test_the_end_and_the_four_levels_by_hand():
    w = torch.tensor([1.0, -1.0, 2.0, -2.0, 1.0, -1.0, 1.0, -3.0])
    end = 3.12 * (22 / 8) ** 0.5 - 2.064 * 12 / 8
    assert float(best_end(w, 2, True)) == pytest.approx(end)
    got = grid(2)(w)
    want = torch.tensor([1, -1, 3, -3, 1, -1, 1, -3]) * end / 3  # 2 is nearer to the end
    torch.testing.assert_close(got, want)
    with_zero = grid(2, zero=True)(torch.tensor([0.1, -5.0, 4.0, 0.0]))
    assert with_zero.sign().tolist() == [0, -1, 1, 0]


def test_the_gradient_goes_straight_through():
    w = torch.tensor([0.1, -5.0, 0.3], requires_grad=True)
    grid(3)(w).sum().backward()
    assert w.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("odd", "bits"), [*((True, k) for k in ODD), *((False, k) for k in WITH_ZERO)]
)
@pytest.mark.parametrize("name", ["gauss", "laplace", "logistic"])
def test_the_error_is_nearly_the_least_that_any_end_gives(name, odd, bits):
    g = torch.Generator().manual_seed(0)
    u = torch.rand(20_000, generator=g).clamp(1e-5, 1 - 1e-5)
    w = {
        "gauss": torch.special.ndtri(u),
        "laplace": (u - 0.5).sign() * -torch.log1p(-2 * (u - 0.5).abs()),
        "logistic": torch.logit(u),
    }[name]

    def error(end):
        q = grid(bits, zero=not odd)
        q.scale, q.zero_point = end / q.qmax, torch.tensor(0)
        return float((q(w) - w).square().mean())

    least = min(error(end) for end in torch.linspace(0.05, 1, 60) * w.abs().max())
    assert error(best_end(w, bits, odd)) < 1.1 * least


def test_many_bits_reach_the_largest_weight():
    w = torch.tensor([0.5, -3.0, 1.0])
    assert float(best_end(w, 8, False)) == 3
    assert float(best_end(torch.zeros(3), 2, True)) == 1


def test_in_pact_and_resumed():
    options = {"bits": 2, "weight_rule": "sawb", "edges_bits": 8}
    whole = trained("pact", **options)
    same(whole, resumed("pact", 1, **options))
    weight = whole[0].get_parameter("conv2.weight")
    assert len(weight.abs().unique()) == 2


def test_bits_without_a_fit_are_refused():
    with pytest.raises(BindError, match=r"no end for 3 bits with a level for 0; it has 2, 4"):
        start("pact", bits=3, weight_rule="sawb", zero=True)
