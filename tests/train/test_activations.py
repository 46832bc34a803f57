"""Statistics of activations against torch on all values at once, and Distiller's file read back."""

import pytest
import torch
from torch import nn

from gracile.analyze.activations import COLUMNS, Activations, load_activations
from gracile.errors import BindError, UserError
from gracile.quantize.ranges import Wanted, load_ranges
from gracile.recipe.fields import Kernel
from gracile.train.activations import activations


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.relu(self.conv(x))
        return self.head((x + 1).mean((2, 3)))


def setting():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.conv.bias[2] = -100  # a dead channel
    return model, [(torch.randn(n, 3, 6, 6), torch.zeros(n)) for n in (5, 2)]


def test_every_number_is_that_of_all_values_at_once():
    model, batches = setting()
    found = activations(model, batches)
    assert [r.tensor for r in found.rows] == ["x", "conv", "relu", "add", "mean", "head"]
    assert (found.images, found["relu"].inputs, found["relu"].shape) == (7, ("conv",), (4, 4, 4))
    with torch.no_grad():
        conv = model.conv(torch.cat([x for x, _ in batches])).double()
    for row, x in ((found["conv"], conv), (found["relu"], conv.relu())):
        each = x.flatten(1)
        bin = 2 * float(x.abs().max()) / 2048
        assert row.values == x.numel()
        for got, wanted in (
            (row.min, x.min()), (row.max, x.max()), (row.mean, x.mean()),
            (row.std, x.std(correction=0)), (row.zeros, (x == 0).double().mean()),
            (row.avg_min, each.amin(1).mean()), (row.avg_max, each.amax(1).mean()),
        ):  # fmt: skip
            assert got == pytest.approx(float(wanted), rel=1e-5, abs=1e-6)
        assert row.b == pytest.approx(float((x - x.mean()).abs().mean()), abs=bin)
        assert row.percentiles[4] == pytest.approx(float(x.quantile(0.5)), abs=bin)
        assert row.percentiles[7] == pytest.approx(float(x.quantile(0.99)), abs=0.1)
        channels = x.transpose(0, 1).flatten(1)
        assert row.channels.mean == pytest.approx(channels.mean(1).tolist(), rel=1e-5)
        assert row.channels.l1 == pytest.approx(channels.abs().mean(1).tolist(), rel=1e-5)
        assert row.channels.zeros == pytest.approx((channels == 0).double().mean(1).tolist())
        assert sum(row.histogram.counts) == int((x != 0).sum())
    assert found["relu"].channels.dead == 1


def test_how_images_are_batched_changes_nothing():
    model, batches = setting()
    one = [(x[None], 0) for x, _ in batches for x in x]
    a, b = activations(model, batches), activations(model, one)
    for left, right in zip(a.rows, b.rows, strict=True):
        assert left.histogram.counts == pytest.approx(right.histogram.counts, abs=3)
        assert left.mean == pytest.approx(right.mean, rel=1e-5, abs=1e-7)
        assert (left.values, left.tensor) == (right.values, right.tensor)


def test_histograms_are_as_coarse_as_asked():
    model, batches = setting()
    for bins in (1, 7, 64):
        for row in activations(model, batches, bins=bins).rows:
            h = row.histogram
            assert 0 < len(h.counts) <= bins
            assert h.start <= row.max
            assert h.start + len(h.counts) * h.step >= row.max


def test_files_round_trip_and_the_table_has_a_line_for_each(tmp_path):
    model, batches = setting()
    found = activations(model, batches, tensors=["conv", "head"])
    found.save(tmp_path)
    assert load_activations(tmp_path / "activations.json") == found
    head, *lines = (tmp_path / "activations.csv").read_text().splitlines()
    assert head.split(",") == list(COLUMNS)
    assert [line.split(",")[0] for line in lines] == ["conv", "head"]
    assert lines[0].split(",")[2] == "4x4x4"
    with pytest.raises(UserError, match="not statistics of activations"):
        Activations.from_dict({"format": 1})


def test_distiller_s_file_is_one_that_quantization_reads(tmp_path):
    model, batches = setting()
    found = activations(model, batches)
    found.save(tmp_path)
    wanted = [Wanted("relu", None, 8, True, False), Wanted("x", "conv", 8, False, True)]
    path = tmp_path / "activations.yaml"
    for observer, ends in (("min_max", ("min", "max")), ("mean_extremes", ("avg_min", "avg_max"))):
        got = load_ranges(path, wanted, Kernel("observer", observer, {}))
        for w in wanted:
            row = found[w.id]
            assert (got[w.id].low, got[w.id].high) == tuple(getattr(row, e) for e in ends)


def test_the_model_is_left_as_it_was():
    model, batches = setting()
    model.train()
    activations(model, batches)
    assert model.training


def test_values_that_are_not_finite_are_named():
    class Log(nn.Module):
        def forward(self, x):
            return x.abs() + torch.log(x * 0)

    found = activations(Log(), [(torch.ones(2, 3), 0)])
    assert "log" in found.left_out
    assert "not finite" in found.left_out["log"]
    assert "abs" in [r.tensor for r in found.rows]


def test_refusals():
    model, batches = setting()
    with pytest.raises(UserError, match="at least one batch"):
        activations(model, [])
    with pytest.raises(UserError, match="bins must be from 1 to 8192, got 0"):
        activations(model, batches, bins=0)
    with pytest.raises(BindError, match=r"'rel' matches no activation.*'relu'"):
        activations(model, batches, tensors="rel")
