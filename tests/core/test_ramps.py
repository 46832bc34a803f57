import pytest
from hypothesis import given
from hypothesis import strategies as st

from gracile import registry
from gracile.core.ramps import (
    agp,
    constant,
    cubic,
    exponential,
    exponential_with_bias,
    linear,
    multistep,
    polynomial,
)
from gracile.errors import UserError

RAMPS = [e.obj for e in registry.entries("ramp")]
levels = st.floats(0, 0.99)


def test_cubic_matches_zhu_and_gupta_eq_1_by_hand():
    # s_f + (s_i - s_f)(1 - t)^3 with s_i = 0.1, s_f = 0.9, t = 1/4: 0.9 - 0.8 * 27/64 = 0.5625
    assert cubic(0.25, 0.1, 0.9) == pytest.approx(0.5625)


def test_linear_and_constant_by_hand():
    assert linear(0.25, 0.1, 0.9) == pytest.approx(0.3)
    assert constant(0.0, 0.1, 0.9) == 0.9


def test_exponential_by_hand():
    # density 0.9 * (0.4 / 0.9)^t: 0.9, 0.6, 0.4
    assert [exponential(t, 0.1, 0.6) for t in (0, 0.5, 1)] == pytest.approx([0.1, 0.4, 0.6])
    with pytest.raises(UserError, match=r"exponential needs levels below 1, got 0\.0 and 1\.0"):
        exponential(0.0, 0.0, 1.0)


def test_polynomial_by_hand():
    # concave: 0.5 - 0.4 (1 - 0.75)^0.5 = 0.3; convex: 0.1 + 0.4 * 0.25^0.5 = 0.3
    assert polynomial(0.75, 0.1, 0.5, power=0.5) == pytest.approx(0.3)
    assert polynomial(0.25, 0.1, 0.5, power=0.5, concave=False) == pytest.approx(0.3)
    assert polynomial(0.5, 0.0, 1.0) == pytest.approx(1 - 0.5**0.9)
    with pytest.raises(UserError, match="power of more than 0, got 0"):
        polynomial(0.5, 0.0, 0.5, power=0)


@given(st.floats(0, 1), levels, levels)
def test_cubic_is_a_concave_polynomial_of_power_3(progress, initial, final):
    assert polynomial(progress, initial, final, power=3) == pytest.approx(
        cubic(progress, initial, final), abs=1e-12
    )


def test_exponential_with_bias_by_hand():
    # z = exp(-k / 8) solves 1 - z = 3/4 (1 - z^8): z = 0.25 + 0.75 z^8 = 0.2500115, and halfway
    # the share of the way is (1 - z^4) / (1 - z^8) = 1 / (1 + z^4) = 1 / 1.0039070
    assert exponential_with_bias(0, 0.0, 0.4) == 0
    assert exponential_with_bias(1 / 8, 0.0, 0.4) == pytest.approx(0.75 * 0.4)
    assert exponential_with_bias(1 / 2, 0.0, 0.4) == pytest.approx(0.4 / 1.0039070, rel=1e-6)
    assert exponential_with_bias(1 / 8, 0.1, 0.5, reach=0.6875) == pytest.approx(0.75 * 0.5)
    with pytest.raises(UserError, match=r"0 < early < reach < 1, got 0\.8 and 0\.75"):
        exponential_with_bias(0.0, 0.0, 0.5, early=0.8)


@given(st.floats(0.02, 0.9), st.floats(0.02, 0.98))
def test_exponential_with_bias_goes_through_its_point(early, reach):
    early, reach = sorted((early, reach))
    if reach - early > 0.02:
        at = exponential_with_bias(early, 0.0, 0.5, early=early, reach=reach)
        assert at == pytest.approx(0.5 * reach)


def test_multistep_by_hand():
    stairs = {"steps": [0.3, 0.6], "levels": [0.2]}
    got = [multistep(t, 0.1, 0.5, **stairs) for t in (0, 0.29, 0.3, 0.59, 0.6, 1)]
    assert got == [0.1, 0.1, 0.2, 0.2, 0.5, 0.5]
    assert multistep(0.5, 0.1, 0.7, steps=[0.25, 0.75]) == pytest.approx(0.4)  # halfway
    assert multistep(0.7 - 0.4, 0.0, 0.5, steps=[0.3]) == 0.5  # 0.29999999999999993


@pytest.mark.parametrize(
    "options",
    [
        {"steps": []},
        {"steps": 0.5},
        {"steps": ["a"]},
        {"steps": [0.5, 0.3]},
        {"steps": [0.0]},
        {"steps": [1.5]},
        {"steps": [0.3, 0.6], "levels": []},
        {"steps": [0.3, 0.6], "levels": [0.7]},
        {"steps": [0.3, 0.6], "levels": 0.2},
        {"steps": [0.2, 0.3, 0.6], "levels": [0.3, 0.2]},
    ],
)
def test_stairs_that_do_not_rise_are_refused(options):
    with pytest.raises(UserError, match=r"^multistep needs "):
        multistep(0.5, 0.1, 0.5, **options)


@pytest.mark.parametrize("ramp", RAMPS, ids=lambda f: f.__name__)
@given(st.floats(0, 1), levels, levels)
def test_every_ramp_stays_between_its_ends_and_arrives(ramp, progress, initial, final):
    low, high = sorted((initial, final))
    assert low - 1e-12 <= ramp(progress, initial, final) <= high + 1e-12
    assert ramp(1.0, initial, final) == pytest.approx(final)


@given(st.floats(0, 1), st.floats(0, 1), levels, levels)
def test_levels_never_go_back(p, q, initial, final):
    initial, final = sorted((initial, final))
    p, q = sorted((p, q))
    for ramp in RAMPS:
        assert ramp(p, initial, final) <= ramp(q, initial, final) + 1e-12


def test_agp_is_another_name_of_cubic():
    assert agp is cubic
    assert registry.get("ramp", "agp").obj is registry.get("ramp", "cubic").obj
