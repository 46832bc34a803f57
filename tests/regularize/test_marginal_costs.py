"""What one more channel costs: by hand, clamped at the last, and as the bilinear formula says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gracile.graph.dependency import ChannelGroup, Slice
from gracile.regularize.resource import marginal_costs


def group(name, *axes, units):
    """Channel u is index u of all these axes."""
    return ChannelGroup(
        id=name,
        units=tuple(tuple(Slice(at, dim, (u,)) for at, dim in axes) for u in range(units)),
        producers=(axes[0][0],),
        consumers=(),
        protected=None,
        sizes=dict.fromkeys(axes, units),
        writes=dict(axes[:1]),
    )


A = group("a", ("a", 0), ("b", 1), units=4)
B = group("b", ("b", 0), ("c", 1), units=3)


def macs(kept):
    """Three layers in a row: 2 -> a -> b -> 5 channels."""
    a, b = kept[("a", 0)], kept[("b", 0)]
    assert (kept["b", 1], kept["c", 1]) == (a, b)
    return 2 * a + 10 * a * b + 5 * b


def costs(a, b):
    alive = {"a": np.array(a, dtype=bool), "b": np.array(b, dtype=bool)}
    found = marginal_costs([A, B], alive, macs)
    return found["a"].tolist(), found["b"].tolist()


def test_by_hand_with_all_alive():
    assert costs([1] * 4, [1] * 3) == ([2 + 30] * 4, [40 + 5] * 3)


def test_a_dead_reader_makes_its_makers_cheaper():
    assert costs([1, 1, 0, 0], [1, 1, 0]) == ([2 + 20] * 4, [20 + 5] * 3)


def test_the_last_channel_of_a_layer_cannot_be_saved_so_it_weighs_nothing():
    a, b = costs([1, 0, 0, 0], [1] * 3)
    assert a == [0, 32, 32, 32]  # a second one would cost what it costs
    assert b == [15, 15, 15]
    assert costs([0] * 4, [1] * 3)[0] == [0] * 4


@given(
    st.lists(st.booleans(), min_size=4, max_size=4).filter(lambda v: sum(v) > 1),
    st.lists(st.booleans(), min_size=3, max_size=3).filter(lambda v: sum(v) > 1),
)
def test_of_a_bilinear_cost_it_is_the_number_alive_on_the_other_side(a, b):
    assert costs(a, b) == ([2 + 10 * sum(b)] * 4, [10 * sum(a) + 5] * 3)


def test_a_channel_of_several_indices_counts_all_of_them():
    wide = ChannelGroup(
        id="f",
        units=((Slice("f", 0, (0,)), Slice("g", 1, (0, 1, 2))), (Slice("f", 0, (1,)),)),
        producers=("f",),
        consumers=("g",),
        protected=None,
        sizes={("f", 0): 2, ("g", 1): 4},
        writes={"f": 0},
    )
    found = marginal_costs(
        [wide], {"f": np.ones(2, bool)}, lambda kept: 100 * kept["f", 0] + kept["g", 1]
    )
    assert found["f"].tolist() == [103, 100]


def test_groups_that_share_an_axis_share_its_width():
    axis = ("cat", 1)
    halves = [
        ChannelGroup(
            id=name,
            units=tuple((Slice(name, 0, (u,)), Slice("cat", 1, (first + u,))) for u in range(2)),
            producers=(name,),
            consumers=("cat",),
            protected=None,
            sizes={(name, 0): 2, axis: 4},
            writes={name: 0},
        )
        for name, first in (("l", 0), ("r", 2))
    ]
    seen = []
    alive = {"l": np.array([True, False]), "r": np.array([True, True])}
    marginal_costs(halves, alive, lambda kept: seen.append(kept[axis]) or 0.0)
    assert seen[0] == 3
    assert set(seen) == {2, 3, 4}


def test_a_table_that_says_fewer_channels_are_slower_weighs_them_nothing():
    found = marginal_costs([A], {"a": np.ones(4, bool)}, lambda kept: -kept["a", 0])
    assert found["a"].tolist() == pytest.approx([0.0] * 4)
