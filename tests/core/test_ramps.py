import pytest
from hypothesis import given
from hypothesis import strategies as st

from gracile import registry
from gracile.core.ramps import agp, constant, cubic, linear

RAMPS = [e.obj for e in registry.entries("ramp")]
levels = st.floats(0, 0.99)


def test_cubic_matches_zhu_and_gupta_eq_1_by_hand():
    # s_f + (s_i - s_f)(1 - t)^3 with s_i = 0.1, s_f = 0.9, t = 1/4: 0.9 - 0.8 * 27/64 = 0.5625
    assert cubic(0.25, 0.1, 0.9) == pytest.approx(0.5625)


def test_linear_and_constant_by_hand():
    assert linear(0.25, 0.1, 0.9) == pytest.approx(0.3)
    assert constant(0.0, 0.1, 0.9) == 0.9


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
