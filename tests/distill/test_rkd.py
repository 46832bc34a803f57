import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile.distill.features.rkd import rkd


def points(seed, n=5, width=4):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=g, dtype=torch.float64)


def huber(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def by_loops(s, t, distance, angle):
    """Equations 5 to 10, pair by pair and triple by triple."""
    n = len(s)
    d = [[[math.dist(x[i], x[j]) for j in range(n)] for i in range(n)] for x in (s, t)]
    mean = [sum(map(sum, table)) / (n * (n - 1)) for table in d]
    pairs = [
        huber(d[0][i][j] / mean[0] - d[1][i][j] / mean[1])
        for i in range(n)
        for j in range(n)
        if i != j
    ]

    def cosine(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        return float(a @ b / (a.norm() * b.norm()))

    triples = [
        huber(cosine(s, i, j, k) - cosine(t, i, j, k))
        for i in range(n)
        for j in range(n)
        for k in range(n)
        if len({i, j, k}) == 3
    ]
    return distance * sum(pairs) / len(pairs) + angle * sum(triples) / len(triples)


def test_distances_by_hand():
    # on a line at 0, 1, 3: mean distance 2; the teacher's are all 1
    s = torch.tensor([[0.0], [1.0], [3.0]])
    t = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])
    expected = (huber(1 / 2 - 1) + huber(3 / 2 - 1) + huber(2 / 2 - 1)) / 3
    assert rkd(s, t, distance=1.0, angle=0.0).item() == pytest.approx(expected, rel=1e-5)


def test_angles_by_hand():
    # a right angle of equal legs (cosines 0, r, r; r = 1/sqrt 2) and an equilateral triangle (1/2)
    s = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    t = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])
    expected = (huber(0.5) + 2 * huber(1 / math.sqrt(2) - 0.5)) / 3
    assert rkd(s, t, distance=0.0, angle=1.0).item() == pytest.approx(expected, rel=1e-5)


@given(st.integers(0, 30))
def test_equals_the_loops_of_the_paper(seed):
    s, t = points(seed), points(seed + 50, width=7)
    assert rkd(s, t).item() == pytest.approx(by_loops(s, t, 25, 50), rel=1e-4)


@given(st.integers(0, 30), st.floats(0.1, 10), st.floats(-5, 5))
def test_turning_moving_and_scaling_do_not_count(seed, scale, shift):
    s, t = points(seed), points(seed + 50)
    turn, _ = torch.linalg.qr(points(seed + 99, n=4))
    torch.testing.assert_close(rkd(scale * s @ turn + shift, t), rkd(s, t), rtol=1e-3, atol=1e-3)
    assert rkd(scale * t @ turn + shift, t).item() == pytest.approx(0, abs=1e-4)


def test_features_of_any_shape_are_compared():
    assert rkd(torch.randn(4, 3, 2, 2), torch.randn(4, 9)).item() > 0


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_images_have_no_relations_and_a_gradient_of_zero(n):
    s = torch.randn(n, 4, requires_grad=True)
    rkd(s, torch.randn(n, 3)).backward()
    assert s.grad.abs().max() < 1e-5


def test_images_in_one_place_give_finite_gradients():
    s = torch.ones(4, 3, requires_grad=True)
    rkd(s, torch.randn(4, 3)).backward()
    assert s.grad.isfinite().all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"of the same images, got \(2, 3\).*\(4, 3\)"):
        rkd(torch.zeros(2, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="must be >= 0"):
        rkd(torch.zeros(2, 3), torch.zeros(2, 3), angle=-1.0)
