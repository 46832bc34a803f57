"""Every scheme: exact at full rank, errors where theory knows them, and the metric of data."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowrank_case import apart, evidence, factorized, made, seen, taken
from torch import nn

from gracile import registry
from gracile.errors import UserError
from gracile.lowrank.factorizers.scheme1 import scheme1
from gracile.lowrank.factorizers.svd_data import svd_data, svd_response, whitened
from gracile.lowrank.factorizers.tucker2 import tucker2
from gracile.lowrank.scheme import factorize, matrices, needs_of
from gracile.nn.chain import Layer, layer_of
from gracile.nn.schemes import chain_of, product

EXACT = ("svd", "svd_data", "svd_response", "scheme1", "scheme2", "tucker2")


@pytest.mark.parametrize(("scheme", "kind"), taken(EXACT))
def test_full_rank_reproduces_the_layer(scheme, kind):
    module = made(kind)
    assert apart(module, factorized(module, scheme), seen(module)) < 1e-5


@pytest.mark.parametrize("kind", ["conv", "strided", "uneven", "dilated", "reflected", "conv1d"])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 1), (1, 2), (2, 3), (4, 2)])
def test_biclusters_of_full_rank_reproduce_the_layer(kind, a, b):
    module = made(kind)
    net = factorized(module, "bicluster", [a, b, 4 // a, 6 // b])
    assert apart(module, net, seen(module)) < 1e-5


SMALL = {
    "uneven": lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 2)),
    "dilated": lambda: nn.Conv2d(2, 4, 3, padding=(2, 3), dilation=(2, 3), bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, stride=(1, 2), padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(2, 4, (3, 2), groups=2),
    "conv1d": lambda: nn.Conv1d(3, 4, 5, stride=2, padding=1, dilation=2),
}
ALL_AT_ONCE = {
    "cp": {"how": "nls", "starts": 1, "sweeps": 20},
    "cp3": {"how": "nls", "starts": 1, "sweeps": 20},
    "scheme1_separable": {"sweeps": 1000, "starts": 4},
}


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("scheme", ALL_AT_ONCE)
def test_sums_of_rank_one_reproduce_the_layer_at_full_rank(kind, scheme):
    torch.manual_seed(0)
    module = SMALL[kind]().double()
    if (scheme, kind) == ("scheme1_separable", "conv1d"):
        scheme = "cp"  # one axis has nothing to separate
    options = ALL_AT_ONCE[scheme]
    assert apart(module, factorized(module, scheme, **options), seen(module)) < 1e-5


def test_pursuit_of_rank_one_terms_comes_ever_closer():
    module = made("conv")
    errors = [
        apart(module, factorized(module, "bicluster_rank1", [2, 2, k]), seen(module))
        for k in (1, 4, 12)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 < errors[0]


def test_monochromatic_is_exact_for_filters_of_a_few_colours():
    rng = torch.Generator().manual_seed(3)
    module = nn.Conv2d(3, 12, (5, 3), stride=(1, 2), padding=(2, 1)).double()
    palette = torch.randn(4, 3, generator=rng, dtype=torch.float64)
    spatial = torch.randn(12, 1, 5, 3, generator=rng, dtype=torch.float64)
    colour = palette[torch.randperm(12, generator=rng) % 4]
    module.weight.data = colour[:, :, None, None] * spatial
    assert apart(module, factorized(module, "monochromatic", [4]), seen(module)) < 1e-5
    assert apart(module, factorized(module, "monochromatic", [2]), seen(module)) > 0.1


def test_monochromatic_with_a_colour_for_each_filter_leaves_the_filters_tails():
    module = made("conv")
    layer = layer_of(module)
    factors = factorize("monochromatic", module.weight, layer, [6], evidence(module))
    chain = chain_of("monochromatic", layer, [6])
    error = (product(chain, factors, layer) - module.weight).square().sum()
    tails = torch.linalg.svdvals(module.weight.flatten(2))[:, 1:].square().sum()
    torch.testing.assert_close(error, tails)


@pytest.mark.parametrize(("scheme", "kind"), taken(["svd", "scheme1", "scheme2"]))
@pytest.mark.parametrize("rank", [1, 2])
def test_the_error_is_the_tail_of_the_singular_values(scheme, kind, rank):
    module = made(kind)
    layer = layer_of(module)
    chain = chain_of(scheme, layer, [rank])
    factors = factorize(scheme, module.weight, layer, [rank])
    error = (product(chain, factors, layer) - module.weight).square().sum()
    (found,) = matrices(scheme, module.weight, layer)
    tail = torch.linalg.svdvals(found)[:, rank:].square().sum()
    torch.testing.assert_close(error, tail, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("scheme", registry.names("factorizer"))
def test_factors_keep_the_dtype_and_repeat(scheme):
    module = nn.Conv2d(4, 6, 3).float()
    layer = layer_of(module)
    ranks = {
        "monochromatic": [3], "bicluster": [2, 3, 1, 1], "bicluster_rank1": [2, 3, 2],
        "tucker2": [2, 3],
    }.get(scheme, [2])  # fmt: skip

    def once():
        return factorize(scheme, module.weight, layer, ranks, evidence(module))

    first, again = once(), once()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert {f.dtype for f in first} <= {torch.float32, torch.int64}
    assert not any(f.requires_grad for f in first)


@given(
    st.sampled_from(["svd", "scheme1", "scheme2", "tucker2"]),
    st.sampled_from([1, 2]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.tuples(st.integers(1, 3), st.integers(2, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.booleans(),
)
def test_full_rank_reproduces_any_geometry(
    scheme, groups, i, o, kernel, stride, padding, dilation, bias
):
    torch.manual_seed(0)
    geometry = (kernel, stride, padding, dilation, groups, bias)
    module = nn.Conv2d(i * groups, o * groups, *geometry).double()
    assert apart(module, factorized(module, scheme), seen(module)) < 1e-5


def test_svd_by_hand():
    first, second = factorize("svd", torch.diag(torch.tensor([9.0, 1.0])), layer_of(two()), [1])
    assert first.tolist() == [[3.0, 0.0]]
    assert second.tolist() == [[3.0], [0.0]]


def two():
    return nn.Linear(2, 2, bias=False)


def response_error(weight, factors, module):
    """Sum of squared differences of responses, from the Gram matrix."""
    layer = layer_of(module)
    gram = evidence(module)["gram"]
    new = product(chain_of("svd", layer, [factors[0].shape[0] // layer.groups]), factors, layer)
    change = (new - weight).reshape(layer.groups, -1, gram.shape[-1])
    return float(((change @ gram) * change).sum())


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "dilated"])
def test_data_aware_is_the_tail_in_the_datas_norm_and_better_there_than_plain(kind):
    module = made(kind)
    layer, gram = layer_of(module), evidence(module)["gram"]
    weight = module.weight.detach()
    aware = svd_data(weight, layer.groups, (1,), gram, ridge=0.0)
    plain = factorize("svd", weight, layer, [1])
    white = whitened(weight, layer.groups, gram, ridge=0.0)
    (found,) = matrices("svd", white, layer)
    tail = float(torch.linalg.svdvals(found)[:, 1:].square().sum())
    assert response_error(weight, aware, module) == pytest.approx(tail, rel=1e-8)
    assert tail < 0.99 * response_error(weight, plain, module)


def test_data_that_never_shows_an_input_still_gives_the_layer_at_full_rank():
    module = made("linear")
    gram = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    factors = svd_data(module.weight, 1, (5,), gram)
    torch.testing.assert_close(factors[1] @ factors[0], module.weight.detach(), atol=1e-5, rtol=0)


def test_responses_are_followed_where_the_inputs_have_changed():
    """Reduced-rank regression beats cutting the weight when its inputs are no longer the same."""
    rng = torch.Generator().manual_seed(4)
    weight = torch.randn(5, 7, generator=rng, dtype=torch.float64)
    x = torch.randn(200, 7, generator=rng, dtype=torch.float64)
    seen_now = x @ (torch.eye(7) + 0.3 * torch.randn(7, 7, generator=rng)).double()
    gram, cross = seen_now.T @ seen_now, seen_now.T @ (x @ weight.T)

    def error(factors):
        return float((x @ weight.T - seen_now @ (factors[1] @ factors[0]).T).square().sum())

    best = error(svd_response(weight, 1, (2,), gram, cross))
    assert best < 0.9 * error(svd_data(weight, 1, (2,), gram))
    exact = svd_response(weight, 1, (5,), gram, cross, ridge=0.0)
    fitted = torch.linalg.lstsq(seen_now, x @ weight.T).solution.T
    torch.testing.assert_close(exact[1] @ exact[0], fitted)


def test_tucker2_is_exact_for_a_tensor_of_its_ranks_and_keeps_orthonormal_channels():
    rng = torch.Generator().manual_seed(5)
    parts = [torch.randn(s, generator=rng, dtype=torch.float64) for s in ((8, 3), (6, 2))]
    core = torch.randn(3, 2, 3, 3, generator=rng, dtype=torch.float64)
    weight = torch.einsum("tp,sr,prij->tsij", *parts, core)
    first, middle, last = tucker2(weight, 1, (2, 3))
    torch.testing.assert_close(
        torch.einsum("rs,prij,tp->tsij", first[:, :, 0, 0], middle, last[:, :, 0, 0]), weight
    )
    inputs = first[:, :, 0, 0]
    torch.testing.assert_close(inputs @ inputs.T, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
def test_hooi_is_not_worse_than_hosvd(seed):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(10, 4, 3, 3, generator=rng, dtype=torch.float64)
    layer = Layer(8, 10, (3, 3), groups=2)
    chain = chain_of("tucker2", layer, [2, 2])

    def error(sweeps):
        factors = factorize("tucker2", weight, layer, [2, 2], sweeps=sweeps)
        return float((product(chain, factors, layer) - weight).square().sum())

    assert error(20) < error(0)


def test_scheme1_costs_more_filters_only_where_channels_need_them():
    """A kernel that is one filter for each input channel is found with M = 1."""
    rng = torch.Generator().manual_seed(6)
    filters = torch.randn(1, 4, 3, 3, generator=rng, dtype=torch.float64)
    weight = torch.randn(6, 4, 1, 1, generator=rng, dtype=torch.float64) * filters
    spatial, mixing = scheme1(weight, 1, (1,))
    torch.testing.assert_close(mixing * spatial.transpose(0, 1), weight)


def test_missing_evidence_and_wrong_sums_are_named():
    module = made("linear")
    layer = layer_of(module)
    assert needs_of("svd_response") == ("gram", "cross")
    with pytest.raises(UserError, match=r"'svd_data' needs gram"):
        factorize("svd_data", module.weight, layer, [1])
    with pytest.raises(UserError, match=r"gram must have shape \(1, 7, 7\).*\(3, 3\)"):
        svd_data(module.weight, 1, (1,), torch.eye(3))
    with pytest.raises(UserError, match=r"no option 'sweps'. Nearest: 'sweeps'"):
        factorize("tucker2", torch.zeros(2, 2, 1, 1), layer_of(nn.Conv2d(2, 2, 1)), [1, 1], sweps=3)
    with pytest.raises(UserError, match=r"layer's shape \(5, 7\), got \(7, 5\)"):
        factorize("svd", module.weight.T, layer, [1])
