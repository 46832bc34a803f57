"""A cut of a model that computes weights, against zeros in the weights as they are computed."""

import copy
import random

import pytest
import torch

from gracile.errors import VerificationError
from gracile.graph.surgery import remove_edits, verified_apply
from patterns import weights
from patterns.collected import ALL
from patterns.cuts import cut, groups_of, half, lost_indices, outputs, zeroed

STATISTICS = [p for p in ALL.values() if not p.masked and issubclass(p.model, weights._Two)]


@pytest.mark.parametrize("pattern", STATISTICS, ids=lambda p: p.name)
def test_what_is_left_of_a_computed_weight_is_computed_from_what_is_left(pattern):
    model, inputs = pattern.build()
    groups = list(groups_of(model, inputs).values())
    rng = random.Random(0)
    gone = {g.id: half(g, rng) for g in groups if g.protected is None}
    lost = lost_indices(groups, gone)
    keep = [sorted(set(range(n)) - lost["w", d][1]) for d, n in enumerate((6, 4))]
    dense, twin = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    smaller, _ = cut(model, inputs, groups, gone)
    for name, p in smaller.double().named_parameters():
        twin.get_parameter(name).data = p.data
    zeroed(dense, groups, gone)
    kernel = torch.zeros(6, 4, 3, 3, dtype=torch.float64)
    kernel[torch.tensor(keep[0])[:, None], torch.tensor(keep[1])] = twin.weight()
    dense.weight = lambda: kernel
    for a, b in zip(outputs(dense, inputs), outputs(smaller, inputs), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-8)


def test_a_kernel_makes_channels_and_its_gain_goes_with_them():
    groups = groups_of(*ALL["StandardizedByBatchNorm"].build())
    assert groups["b.weight"].producers == ("b.weight",)
    assert groups["a.weight"].consumers == ("b.weight",)
    assert ("b.gain", 0) in groups["b.weight"].sizes


def test_kernels_that_are_added_all_make_channels():
    groups = groups_of(*ALL["SumOfKernels"].build())
    assert groups["w"].producers == ("w", "k")
    assert groups["a.weight"].consumers == ("w", "k")


def test_a_filter_of_one_weight_has_no_variance_and_is_refused():
    model, inputs = ALL["StandardizedPointwise"].build()
    groups = list(groups_of(model, inputs).values())
    edits = remove_edits(groups, {"a.weight": [0, 1, 2]}, by="test")
    with pytest.raises(VerificationError, match="more than 1 value"):
        verified_apply(model, edits, examples=[inputs])
