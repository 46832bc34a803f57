"""Rank rules: what they promise holds, and one more would break it."""

from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_case import made

from gracile import registry
from gracile.errors import UserError
from gracile.lowrank.affordable import largest_ranks
from gracile.lowrank.ranks.energy import energy
from gracile.lowrank.ranks.fixed import fixed
from gracile.lowrank.ranks.macs import macs
from gracile.lowrank.ranks.params import params
from gracile.lowrank.rounding import rounded_up
from gracile.lowrank.scheme import along, factorize
from gracile.nn.chain import Layer, layer_of
from gracile.nn.schemes import chain_of, full_ranks, product

NONE = torch.empty(0)
CONV = Layer(64, 128, (3, 3), stride=(2, 2), padding=(1, 1), bias=True)


def test_energy_by_hand():
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))  # 9 + 4 + 1
    kept = [energy(weight, Layer(3, 3), "svd", (), share=s) for s in (0.6, 9 / 14, 0.65, 0.95, 1.0)]
    assert kept == [(1,), (1,), (2,), (3,), (3,)]


@settings(max_examples=40)
@given(st.floats(0.05, 1.0), st.sampled_from(["conv", "grouped", "depthwise", "conv1d"]))
def test_energy_bounds_the_error_and_one_less_does_not(share, kind):
    module = made(kind)
    layer, weight = layer_of(module), module.weight.detach()
    (rank,) = energy(weight, layer, "svd", (), share=share)

    def left_out(r):
        factors = factorize("svd", weight, layer, [r])
        change = product(chain_of("svd", layer, [r]), factors, layer) - weight
        return float(change.square().sum() / weight.square().sum())

    assert left_out(rank) <= 1 - share + 1e-9
    assert rank == 1 or left_out(rank - 1) > 1 - share - 1e-9


def test_energy_gives_each_mode_of_tucker_its_own_rank():
    core, weight = torch.randn(2, 3, 3, 3), torch.zeros(8, 6, 3, 3)
    weight[:2, :3] = core
    assert energy(weight, Layer(6, 8, (3, 3)), "tucker2", (), share=1.0) == (3, 2)


@settings(max_examples=40)
@given(
    st.sampled_from(["svd", "scheme1", "scheme2", "cp", "cp3", "tucker2", "bicluster_rank1"]),
    st.floats(0.1, 1.0),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_a_ratio_is_kept_and_the_next_ranks_would_break_it(scheme, ratio, inputs, outputs):
    layer = Layer(inputs, outputs, (3, 3), stride=(2, 1), padding=(1, 1), bias=True)
    for rule, cost in (
        (params, lambda c: c.params),
        (macs, lambda c: c.macs((9, 8))),
    ):
        if cost(chain_of(scheme, layer, along(scheme, layer, 1))) > ratio * cost(layer):
            with pytest.raises(UserError, match="has at least"):
                rule(NONE, layer, scheme, (9, 8), ratio=ratio)
            continue
        ranks = rule(NONE, layer, scheme, (9, 8), ratio=ratio)
        assert cost(chain_of(scheme, layer, ranks)) <= ratio * cost(layer)
        way = {along(scheme, layer, t) for t in range(1, max(full_ranks(scheme, layer)) + 1)}
        above = [cost(chain_of(scheme, layer, r)) for r in way if sum(r) > sum(ranks)]
        assert not above or min(above) > ratio * cost(layer)


def test_closed_forms_of_one_rank():
    layer = Layer(300, 200)
    assert params(NONE, layer, "svd", (), ratio=0.5) == (int(0.5 * 60_000 / 500),)
    conv = Layer(64, 128, (3, 3), padding=(1, 1))
    full = 64 * 128 * 9
    assert macs(NONE, conv, "scheme2", (8, 8), ratio=0.25) == (int(0.25 * full / (3 * 192)),)
    assert params(NONE, conv, "cp", (), ratio=0.1) == (int(0.1 * full / (64 + 128 + 6)),)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
@pytest.mark.parametrize(("s", "t"), [(64, 64), (64, 128), (256, 512)])
def test_tucker_ranks_are_the_root_of_the_quadratic(s, t, ratio):
    beta = max(0.8 * t / s, 1.0)
    linear = s + beta * t
    root = (-linear + sqrt(linear**2 + 4 * beta * 9 * ratio * s * t * 9)) / (2 * beta * 9)
    first, last = params(NONE, Layer(s, t, (3, 3)), "tucker2", (), ratio=ratio)
    assert int(root) <= first <= root + 1  # R4 is rounded down, which may leave room for one more
    assert last == int(beta * first)


def test_multiply_adds_know_the_stride_and_parameters_do_not():
    still = Layer(64, 128, (3, 3), padding=(1, 1))
    assert params(NONE, CONV, "svd", (), ratio=0.5) == params(
        NONE, Layer(64, 128, (3, 3), bias=True), "svd", (), ratio=0.5
    )
    assert macs(NONE, CONV, "tucker2", (32, 32), ratio=0.3) < macs(
        NONE, still, "tucker2", (32, 32), ratio=0.3
    )


def test_an_impossible_ratio_says_what_is_possible():
    with pytest.raises(UserError, match=r"'svd' has at least 20 parameters, above the 10 that"):
        params(NONE, Layer(10, 10), "svd", (), ratio=0.1)
    with pytest.raises(UserError, match=r"ratio must be in \(0, 1\], got 50"):
        macs(NONE, CONV, "svd", (32, 32), ratio=50)


def test_the_budget_may_be_anything_that_grows():
    deep = largest_ranks("svd", Layer(10, 10), lambda c: c.layers[0].outputs, 3, "channels")
    assert deep == (3,)


def test_fixed_ranks_are_clamped_and_shares_rounded_up():
    assert fixed(NONE, CONV, "tucker2", (), ranks=[16, 500]) == (16, 128)
    assert fixed(NONE, CONV, "tucker2", (), share=0.26) == (17, 34)
    with pytest.raises(UserError, match=r"2 ranks >= 1, got \(3,\)"):
        fixed(NONE, CONV, "tucker2", (), ranks=[3])
    with pytest.raises(UserError, match=r"share must be"):
        fixed(NONE, CONV, "tucker2", (), share=0.0)


def test_rules_by_singular_values_refuse_schemes_without():
    module = made("conv")
    for rule in ("energy", "evbmf"):
        with pytest.raises(
            UserError, match=r"'cp' are not those of a matrix.*params, macs or fixed"
        ):
            registry.get("rank_rule", rule).obj(module.weight, layer_of(module), "cp", ())
    with pytest.raises(UserError, match=r"share must be"):
        energy(module.weight, layer_of(module), "svd", (), share=90)


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 32))
def test_rounding_goes_up_to_the_period_and_never_beyond_full(rank, full, period):
    (got,) = rounded_up([min(rank, full)], [full], period)
    assert min(rank, full) <= got <= full
    assert got % period == 0 or got == full
    assert got - min(rank, full) < period


def test_a_period_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"period must be >= 1, got 0"):
        rounded_up([3], [4], 0)
