"""Factors fitted to responses: sums stand for data, and errors only fall."""

import pytest
import torch
from lowrank_case import apart, evidence, made, seen
from torch.nn import functional as F

from gracile.errors import UserError
from gracile.lowrank.reconstruct import equivalent_data, reconstruct
from gracile.lowrank.scheme import factorize
from gracile.nn.chain import build, layer_of
from gracile.nn.schemes import chain_of, product, respond

CASES = [
    ("linear", "svd", [2]),
    ("conv", "scheme1", [2]),
    ("conv", "scheme2", [3]),
    ("grouped", "scheme2", [2]),
    ("uneven", "scheme1_separable", [2]),
    ("dilated", "tucker2", [2, 3]),
    ("strided", "cp", [4]),
    ("depthwise", "scheme1", [1]),
    ("conv", "bicluster", [2, 3, 1, 1]),
    ("conv", "monochromatic", [3]),
    ("conv1d", "cp3", [3]),
]


@pytest.mark.parametrize(("kind", "scheme", "ranks"), CASES)
def test_the_product_is_what_the_chain_computes(kind, scheme, ranks):
    module = made(kind)
    layer = layer_of(module)
    chain = chain_of(scheme, layer, ranks)
    factors = factorize(scheme, module.weight, layer, ranks, evidence(module))
    net, x = build(chain, factors, module.bias), seen(module)
    module.weight.data = product(chain, factors, layer)
    torch.testing.assert_close(net(x), module(x))


def test_a_few_patches_stand_for_all_data():
    module = made("grouped")
    layer, sums = layer_of(module), evidence(module)
    patches, wanted = equivalent_data(layer, sums["gram"], sums["cross"])
    grouped = patches.reshape(len(patches), 2, -1).transpose(0, 1)
    torch.testing.assert_close(grouped.mT @ grouped, sums["gram"])
    right = wanted.reshape(len(wanted), 2, -1).transpose(0, 1)
    torch.testing.assert_close(grouped.mT @ right, sums["cross"])


def test_inputs_never_seen_apart_are_no_trouble():
    """A Gram matrix without an inverse; what data do not say stays as it was."""
    module = made("linear")
    layer, rng = layer_of(module), torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=rng, dtype=torch.float64) @ torch.eye(3, 7).double()
    gram, cross = x.T @ x, x.T @ (x @ module.weight.detach().T)
    patches, wanted = equivalent_data(layer, gram, cross)
    torch.testing.assert_close(patches.T @ patches, gram)
    torch.testing.assert_close(patches.T @ wanted, cross)
    chain = chain_of("svd", layer, [3])
    factors = factorize("svd", module.weight, layer, [3])
    fitted = product(chain, reconstruct(chain, factors, layer, gram, cross, sweeps=30), layer)
    torch.testing.assert_close(x @ fitted.T, x @ module.weight.detach().T, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("kind", "scheme", "ranks"), CASES)
def test_every_sweep_brings_the_responses_closer(kind, scheme, ranks):
    module = made(kind)
    layer, given = layer_of(module), evidence(module)
    chain = chain_of(scheme, layer, ranks)
    factors = factorize(scheme, module.weight, layer, ranks, given)
    patches, wanted = equivalent_data(layer, given["gram"], given["cross"])
    errors = []
    for _ in range(3):
        errors.append(float((respond(chain, factors, patches) - wanted).square().sum()))
        factors = reconstruct(chain, factors, layer, given["gram"], given["cross"], sweeps=1)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.999 * errors[0]


def test_for_a_linear_layer_it_reaches_the_closed_form():
    module = made("linear")
    layer, given = layer_of(module), evidence(module)
    chain = chain_of("svd", layer, [2])
    patches, wanted = equivalent_data(layer, given["gram"], given["cross"])

    def error(factors):
        return float((respond(chain, factors, patches) - wanted).square().sum())

    begin = factorize("svd", module.weight, layer, [2])
    fitted = reconstruct(chain, begin, layer, given["gram"], given["cross"], sweeps=30)
    best = error(factorize("svd_response", module.weight, layer, [2], given, ridge=0.0))
    assert best < error(begin)
    assert error(fitted) == pytest.approx(best, rel=1e-3)


def test_on_images_filters_fitted_to_data_beat_filters_fitted_to_weights():
    """Jaderberg's second scheme on inputs that are smooth, as images are."""
    module = made("conv")
    layer, rng = layer_of(module), torch.Generator().manual_seed(7)
    x = F.avg_pool2d(torch.randn(8, 4, 12, 12, generator=rng, dtype=torch.float64), 3, 1)
    rows = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(1, -1, 36)
    responses = module(x) - module.bias[:, None, None]
    gram = rows.mT @ rows
    cross = rows.mT @ responses.detach().flatten(2).transpose(1, 2).reshape(1, -1, 6)
    chain = chain_of("scheme2", layer, [3])
    plain = factorize("scheme2", module.weight, layer, [3])
    fitted = reconstruct(chain, plain, layer, gram, cross)

    def error(factors):
        return apart(module, build(chain, factors, module.bias), x)

    assert error(fitted) < 0.9 * error(plain)


def test_orders_of_channels_and_dtypes_stay():
    module = made("conv").float()
    layer, given = layer_of(module), evidence(made("conv"))
    chain = chain_of("bicluster", layer, [2, 2, 1, 1])
    factors = factorize("bicluster", module.weight, layer, [2, 2, 1, 1], given)
    fitted = reconstruct(chain, factors, layer, given["gram"], given["cross"], sweeps=1)
    assert [f.dtype for f in fitted] == [f.dtype for f in factors]
    assert torch.equal(fitted[0], factors[0])
    assert torch.equal(fitted[-1], factors[-1])


def test_wrong_sums_are_named():
    module = made("grouped")
    layer, given = layer_of(module), evidence(module)
    chain = chain_of("svd", layer, [1])
    factors = factorize("svd", module.weight, layer, [1])
    with pytest.raises(UserError, match=r"gram must have shape \(2, 36, 36\).*\(36, 36\)"):
        reconstruct(chain, factors, layer, given["gram"][0], given["cross"])
    with pytest.raises(UserError, match=r"cross must have shape \(2, 36, 2\)"):
        reconstruct(chain, factors, layer, given["gram"], given["cross"][:, :, :1])
