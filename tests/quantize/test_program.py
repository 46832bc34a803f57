"""The integer program of mixed precision: published bit maps, equality with exhaustive search."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gracile.quantize.program import Resource, assign, least

# ResNet-18 on ImageNet without first and last layer, as published with arXiv:2011.10680 (the
# authors' notebook and bit configurations): mean Hessian traces, ||Q(W) - W||^2 of 8 and 4 bits,
# parameters, MACs, milliseconds on a T4. The downsampling layers are 6, 11 and 16.
# fmt: off
TRACES = (
    0.06857826, 0.03162379, 0.03298575, 0.01205663, 0.02222431, 0.00596336, 0.06931772,
    0.00807129, 0.00372905, 0.00530698, 0.00209011, 0.00737569, 0.00210454, 0.00151197,
    0.00158041, 0.00078146, 0.00451841, 0.00098745, 0.00072944,
)
MOVED_8 = (
    0.0235, 0.0125, 0.0102, 0.0082, 0.0145, 0.0344, 0.0023, 0.0287, 0.0148, 0.0333, 0.0682,
    0.0027, 0.0448, 0.0336, 0.0576, 0.1130, 0.0102, 0.0947, 0.0532,
)
MOVED_4 = (
    6.7430, 3.9691, 3.3281, 2.6796, 4.7277, 10.5966, 0.6827, 9.0942, 4.8857, 10.7599, 21.7546,
    0.8603, 14.5324, 10.9651, 18.7706, 36.4044, 3.1572, 29.6994, 17.4016,
)
PARAMETERS = (
    *[36864] * 4, 73728, 147456, 8192, 147456, 147456, 294912, 589824, 32768, 589824, 589824,
    1179648, 2359296, 131072, 2359296, 2359296,
)
MACS = (
    *[115605504] * 4, 57802752, 115605504, 6422528, 115605504, 115605504, 57802752, 115605504,
    6422528, 115605504, 115605504, 57802752, 115605504, 6422528, 115605504, 115605504,
)
MS_4 = (
    0.21094404, 0.21092674, 0.21104113, 0.21086851, 0.13642465, 0.19167506, 0.02532183,
    0.19148203, 0.19142914, 0.11395316, 0.20556011, 0.01917474, 0.20566918, 0.20566509,
    0.13185102, 0.22287786, 0.01790088, 0.22304611, 0.22286099,
)
MS_8 = (
    0.36189111, 0.36211718, 0.31141909, 0.30454471, 0.19184896, 0.38948934, 0.0334169,
    0.38904905, 0.3892859, 0.19134735, 0.34307431, 0.02802354, 0.34313329, 0.34310756,
    0.21117103, 0.37376585, 0.02896843, 0.37398187, 0.37405185,
)
# fmt: on
TIES = [(4, 6), (9, 11), (14, 16)]
PUBLISHED = {
    ("size", 0.75): "8888 888 88 888 84 888 84",
    ("size", 0.5): "8888 888 88 888 88 848 44",
    ("size", 0.25): "8888 888 88 888 88 444 44",
    ("bit_operations", 0.75): "8888 888 84 888 84 848 84",
    ("bit_operations", 0.5): "8884 888 84 888 44 444 44",
    ("bit_operations", 0.25): "8884 848 44 444 44 444 44",
    ("latency", 0.75): "8888 888 84 888 84 848 84",
    ("latency", 0.5): "8888 848 84 888 44 848 44",
    ("latency", 0.25): "8884 848 44 444 44 444 44",
}
COSTS = {
    "size": [(n / 2, n) for n in PARAMETERS],
    "bit_operations": [(16 * m, 64 * m) for m in MACS],
    "latency": list(zip(MS_4, MS_8, strict=True)),
}


@pytest.mark.parametrize(("what", "share"), PUBLISHED)
def test_the_bits_of_resnet_18_are_those_published(what, share):
    low, high = (sum(row[c] for row in COSTS[what]) for c in (0, 1))
    limit = low + share * (high - low)  # as the paper counts it
    losses = [(t * a, t * b) for t, a, b in zip(TRACES, MOVED_4, MOVED_8, strict=True)]
    kinds = [(4, 8)] * len(losses)
    chosen = assign(losses, [Resource(what, COSTS[what], limit)], kinds, TIES)
    assert "".join("48"[c] for c in chosen) == PUBLISHED[what, share].replace(" ", "")


numbers = st.integers(0, 40).map(lambda n: n / 8)


@st.composite
def instances(draw):
    choices = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 5)))]
    table = st.tuples(*(st.tuples(*[numbers] * n) for n in choices))
    kinds = draw(st.tuples(*(st.tuples(*[st.sampled_from([4, 8])] * n) for n in choices)))
    costs = draw(st.lists(table, min_size=1, max_size=2))
    limits = [draw(st.floats(0, 1)) * sum(max(r) for r in c) for c in costs]
    units = st.lists(st.integers(0, len(choices) - 1), min_size=2, max_size=3, unique=True)
    ties = draw(st.lists(units, max_size=2)) if len(choices) > 1 else []
    resources = [Resource(f"r{i}", *x) for i, x in enumerate(zip(costs, limits, strict=True))]
    return draw(table), resources, kinds, ties


def by_trying_all(losses, resources, kinds, ties):
    allowed = [
        chosen
        for chosen in itertools.product(*(range(len(row)) for row in losses))
        if all(r.of(chosen) <= r.limit * (1 + 1e-9) for r in resources)
        and all(len({kinds[i][chosen[i]] for i in tie}) == 1 for tie in ties)
    ]
    return min(
        (sum(row[c] for row, c in zip(losses, x, strict=True)) for x in allowed), default=None
    )


@given(instances())
@settings(max_examples=60, deadline=None)
def test_it_finds_what_trying_all_assignments_finds(instance):
    losses, resources, kinds, ties = instance
    chosen = assign(*instance)
    best = by_trying_all(*instance)
    if best is None:
        assert chosen is None
        return
    assert sum(row[c] for row, c in zip(losses, chosen, strict=True)) == pytest.approx(best)
    assert all(r.of(chosen) <= r.limit * (1 + 1e-9) for r in resources)
    assert all(len({kinds[i][chosen[i]] for i in tie}) == 1 for tie in ties)


def test_the_least_that_ties_allow():
    size = Resource("size", [[1, 5], [5, 1]], 0.0)
    assert least(size) == 2
    assert least(size, [[4, 8], [4, 8]], [(0, 1)]) == 6
    assert least(size, [[4, 4], [8, 8]], [(0, 1)]) == float("inf")
