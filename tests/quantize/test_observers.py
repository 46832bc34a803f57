"""Range observers: known ranges, bounded error, state, agreement between processes."""

import multiprocessing
import socket

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gracile import registry
from gracile.core.kinds import check_options
from gracile.errors import GracileError, UserError
from gracile.quantize.observers.aciq import Aciq
from gracile.quantize.observers.histogram import HistogramError
from gracile.quantize.observers.kl import Entropy
from gracile.quantize.observers.mean_extremes import MeanExtremes
from gracile.quantize.observers.mean_percentile import MeanPercentile
from gracile.quantize.observers.min_max import MinMax
from gracile.quantize.observers.moving_average import MovingAverage
from gracile.quantize.observers.mse import MeanSquaredError
from gracile.quantize.observers.percentile import Percentile
from gracile.quantize.observers.three_sigma import ThreeSigma

COUNTING = [Percentile, ThreeSigma, Entropy, MeanSquaredError, HistogramError, Aciq]
ALL = [MinMax, MovingAverage, MeanExtremes, MeanPercentile, *COUNTING]


def pair(observer):
    return [v.tolist() for v in observer.range()]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_all_are_registered_with_their_options():
    assert set(registry.names("observer")) == {
        "aciq", "histogram", "kl", "mean_extremes", "mean_percentile", "min_max", "moving_average",
        "mse", "percentile", "three_sigma",
    }  # fmt: skip
    assert {e.obj for e in registry.entries("observer")} == set(ALL)
    check_options("observer", "percentile", {"q": 99.0})
    with pytest.raises(UserError, match="no option 'axis'"):
        check_options("observer", "min_max", {"axis": 0})


# --- reference


def test_min_max_remembers_the_widest():
    o = MinMax()
    for x in ([0.0, 2.0], [-1.0, 1.0], [0.5, 0.6]):
        o.observe(torch.tensor(x))
    assert pair(o) == [-1.0, 2.0]


def test_moving_average_by_hand():
    o = MovingAverage(momentum=0.75)
    for x in ([0.0, 4.0], [-4.0, 8.0]):
        o.observe(torch.tensor(x))
    assert pair(o) == [-1.0, 5.0]  # 0.75 * 0 + 0.25 * -4, 0.75 * 4 + 0.25 * 8


def test_percentile_cuts_the_asked_share_of_each_tail():
    o = Percentile(q=99)
    for part in torch.arange(10_000.0).sub(5000).split(1000):
        o.observe(part)
    low, high = pair(o)
    assert low == pytest.approx(-4900, abs=5000 / 2048)
    assert high == pytest.approx(4899, abs=5000 / 2048)


def test_percentile_ignores_a_rare_outlier_and_min_max_does_not():
    x = torch.cat([torch.linspace(0, 1, 99_999), torch.tensor([1000.0])])
    p, m = Percentile(q=99.99), MinMax()
    p.observe(x)
    m.observe(x)
    assert pair(m)[1] == 1000
    assert pair(p)[1] < 1.5


def test_per_channel_ranges():
    x = torch.tensor([[[1.0, -2.0]], [[3.0, 5.0]]])  # (2, 1, 2)
    for cls in (MinMax, MovingAverage, Percentile, MeanExtremes, MeanSquaredError, HistogramError):
        o = cls()
        o.axis = 0
        o.observe(x)
        low, high = o.range()
        torch.testing.assert_close(low, torch.tensor([-2.0, 3.0]), rtol=0, atol=5e-3)
        torch.testing.assert_close(high, torch.tensor([1.0, 5.0]), rtol=0, atol=5e-3)


# --- properties and equivalences


@given(st.integers(0, 1000), st.floats(60, 100), st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_percentile_is_within_a_bin_of_the_sorted_values(seed, q, spread):
    batches = [noise(500, seed=seed + k) * spread * (k + 1) for k in range(3)]
    o = Percentile(q=q)
    for b in batches:
        o.observe(b)
    values = torch.cat(batches).double()
    bin_width = values.abs().max() / 2048
    share = torch.tensor([1 - q / 100, q / 100], dtype=torch.float64)
    lower = torch.quantile(values, share, interpolation="lower")
    higher = torch.quantile(values, share, interpolation="higher")
    got = torch.stack(o.range()).double()
    assert (got >= lower - bin_width).all()
    assert (got <= higher + bin_width).all()


def test_percentile_100_is_min_max():
    p, m = Percentile(q=100), MinMax()
    for k in range(3):
        p.observe(noise(50, seed=k))
        m.observe(noise(50, seed=k))
    assert pair(p) == pair(m)


def test_order_of_batches_and_their_size_do_not_matter():
    small, large = noise(100), 1000 * noise(100, seed=1)
    for cls in (MinMax, *COUNTING):
        one, other, whole = cls(), cls(), cls()
        for x in (small, large):
            one.observe(x)
        for x in (large, small):
            other.observe(x)
        whole.observe(torch.cat([small, large]).reshape(10, 20))
        assert pair(one) == pair(other) == pair(whole)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("axis", [None, 1])
def test_a_restored_observer_goes_on_as_if_never_stopped(cls, axis):
    steady, first = cls(), cls()
    steady.axis = first.axis = axis
    for o in (steady, first):
        o.observe(noise(4, 3))
    restored = cls()
    restored.axis = axis
    restored.load_state_dict(first.state_dict())
    first.observe(100 * noise(4, 3))  # must not reach the copy
    for o in (steady, restored):
        o.observe(2 * noise(4, 3, seed=1))
    assert pair(steady) == pair(restored)


@pytest.mark.parametrize("cls", ALL)
def test_half_precision_is_observed_in_float32(cls):
    o = cls()
    o.observe(torch.tensor([-1.0, 1.0, 3.0], dtype=torch.bfloat16, requires_grad=True))
    low, high = o.range()
    assert low.dtype == high.dtype == torch.float32
    assert not high.requires_grad
    assert high.item() == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize("cls", ALL)
def test_sync_changes_nothing_in_one_process(cls):
    o = cls()
    o.observe(noise(100))
    before = pair(o)
    o.sync()
    o.sync()
    assert pair(o) == before


@pytest.mark.parametrize("cls", ALL)
def test_constant_and_zero_tensors_are_ranges_of_width_zero(cls):
    for value in (0.0, 2.5):
        o = cls()
        o.observe(torch.full((10,), value))
        assert pair(o) == [value, value]


# --- two processes


def _rank(rank, port, results):
    import torch.distributed as dist

    from gracile.distribute import collective

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    ranges = []
    more = (ThreeSigma, Entropy, MeanSquaredError, Aciq, MeanExtremes)
    for make in (MinMax, MovingAverage, lambda: Percentile(q=90), *more):
        o = make()
        o.observe(torch.arange(100.0) * (1 if rank == 0 else 10))
        o.sync()
        o.sync()  # a second one counts nothing twice
        o.observe(torch.arange(100.0))
        o.sync()
        ranges.append(pair(o))
    model = torch.nn.Linear(2, 1, bias=rank >= 0)
    model.weight.grad = torch.full((1, 2), float(rank))
    if rank == 1:
        model.bias.grad = torch.tensor([4.0])
    collective.average_gradients(model)
    value = collective.broadcast_(torch.tensor(float(rank)), source=1)
    facts = {
        "ranges": ranges,
        "grads": [model.weight.grad.tolist(), model.bias.grad.tolist()],
        "size": (collective.world_size(), collective.rank(), collective.is_main()),
        "broadcast": value.item(),
    }
    results.put((rank, facts))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_end_with_the_same_ranges():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_rank, args=(r, port, results)) for r in range(2)]
    for w in workers:
        w.start()
    facts = dict(results.get(timeout=60) for _ in workers)
    for w in workers:
        w.join(timeout=30)
        assert w.exitcode == 0
    assert facts[0]["ranges"] == facts[1]["ranges"]
    min_max, moving, percentile, *clipped, mean_extremes = facts[0]["ranges"]
    assert mean_extremes == [0, pytest.approx((99 + 990 + 2 * 99) / 4)]  # 1-D: a sample each
    whole = torch.cat([torch.arange(100.0), 10 * torch.arange(100.0), *2 * [torch.arange(100.0)]])
    for make, got in zip((ThreeSigma, Entropy, MeanSquaredError, Aciq), clipped, strict=True):
        o = make()
        o.observe(whole)
        assert pair(o) == got
    assert min_max == [0, 990]
    assert moving == pytest.approx([0, 0.9 * (99 + 990) / 2 + 0.1 * 99])
    # 400 values: 40 lie above; of 0, 10, ..., 990 these are 600 and more (39), and 590 (the 40th)
    assert 590 <= percentile[1] <= 600
    assert facts[0]["grads"] == facts[1]["grads"] == [[[0.5, 0.5]], [2.0]]
    assert facts[0]["broadcast"] == facts[1]["broadcast"] == 1
    assert [facts[r]["size"] for r in (0, 1)] == [(2, 0, True), (2, 1, False)]


def test_collectives_do_nothing_in_a_single_process():
    from gracile.distribute import collective as c

    x = torch.tensor([1.0, 2.0])
    for f in (c.all_reduce_min_, c.all_reduce_max_, c.all_reduce_sum_, c.all_reduce_mean_):
        assert f(x) is x
    assert c.broadcast_(x) is x
    assert x.tolist() == [1, 2]
    assert (c.world_size(), c.rank(), c.is_main()) == (1, 0, True)
    with pytest.raises(ValueError, match="floating point"):
        c.all_reduce_mean_(torch.tensor([1]))


# --- errors


@pytest.mark.parametrize("cls", ALL)
def test_an_observer_that_saw_nothing_says_so(cls):
    with pytest.raises(GracileError, match="shown no tensor"):
        cls().range()


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_reported(cls, bad):
    o = cls()
    o.observe(torch.tensor([1.0, bad]))
    o.observe(torch.tensor([1.0, 2.0]))
    with pytest.raises(GracileError, match="NaN or infinity"):
        o.range()


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\)"):
        MovingAverage(momentum=1.0)
    with pytest.raises(ValueError, match="q must be in"):
        Percentile(q=50)
