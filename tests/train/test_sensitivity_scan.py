"""A scan against the network changed by hand; resumed = uninterrupted; what it refuses."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gracile.analyze.sensitivity import Sensitivity, load_sensitivity
from gracile.errors import BindError, ResumeError, UserError
from gracile.train.sensitivity import rounded, sensitivity


class Net(nn.Module):
    def __init__(self, view=False):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8 * 36 if view else 8, 7)
        self.view = view

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x = x + torch.relu(self.depth(torch.relu(self.inner(x))))
        return self.head(x.view(x.size(0), -1) if self.view else x.mean((2, 3)))


def setting(**options):
    torch.manual_seed(0)
    model = Net(**options).eval()
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.bias.normal_()
        model.bn.weight.uniform_(0.5, 2)
    batches = [(torch.randn(5, 3, 6, 6), torch.randint(7, (5,))) for _ in range(3)]
    return model, batches


def score(model, batches):
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    with torch.no_grad():
        out = model(x)
    return float((out.argmax(1) == y).double().mean()), float(cross_entropy(out, y))


def check(row, model, batches):
    top1, loss = score(model, batches)
    assert row.top1 == pytest.approx(top1)
    assert row.loss == pytest.approx(loss, rel=1e-4)
    assert row.images == 15


def test_a_filter_goes_with_its_bias_and_its_batch_norm():
    model, batches = setting()
    found = sensitivity(model, batches, levels=[0.25, 0.5], tensors=["stem", "inner"])
    check(found.base, model, batches)
    assert [(r.tensor, r.level, r.removed, r.of) for r in found.rows] == [
        ("stem.weight", 0.25, 2, 8), ("stem.weight", 0.5, 4, 8),
        ("inner.weight", 0.25, 2, 8), ("inner.weight", 0.5, 4, 8),
    ]  # fmt: skip
    for row in found.rows:
        changed = copy.deepcopy(model)
        weight = changed.get_parameter(row.tensor)
        gone = weight.abs().flatten(1).sum(1).argsort()[: row.removed]
        shift = changed.bn if row.tensor == "stem.weight" else changed.inner
        with torch.no_grad():
            weight[gone] = 0
            shift.bias[gone] = 0
            if shift is changed.bn:
                shift.running_mean[gone] = 0
        check(row, changed, batches)


def test_channels_elements_and_bits_by_hand():
    model, batches = setting()
    weight = model.stem.weight.detach()
    columns = weight.abs().sum((0, 2, 3)).argsort()[:1]
    smallest = weight.abs().flatten().argsort()[:108]  # half of 8 * 3 * 9
    without = weight.clone()
    without[:, columns] = 0
    sparse = weight.flatten().clone()
    sparse[smallest] = 0
    wanted = {"channel": without, "element": sparse.view_as(weight), "bits": rounded(weight, 3)}
    for by, value in wanted.items():
        (row,) = sensitivity(
            model, batches, by=by, levels=[3 if by == "bits" else 0.5], tensors="stem"
        ).rows
        changed = copy.deepcopy(model)
        changed.stem.weight.data = value
        check(row, changed, batches)


def test_rounding_by_hand():
    # 3 bits, narrow: integers -3..3; the scale of each row is its largest magnitude / 3
    got = rounded(torch.tensor([[3.0, -1.4, 0.6], [0.3, -0.6, 0.0]]), 3)
    torch.testing.assert_close(got, torch.tensor([[3.0, -1.0, 1.0], [0.2, -0.6, 0.0]]))


@pytest.mark.parametrize("by", ["filter", "element", "bits"])
def test_memory_changes_nothing(by, monkeypatch):
    model, batches = setting()
    monkeypatch.setattr("gracile.train.sensitivity.MOST_IMAGES", 2)  # parts of two images
    small = sensitivity(model, batches, by=by)
    monkeypatch.undo()
    large = sensitivity(model, batches, by=by)
    assert [r.tensor for r in small.rows] == [r.tensor for r in large.rows]
    for a, b in zip((small.base, *small.rows), (large.base, *large.rows), strict=True):
        assert (a.top1, a.top5, a.images) == (b.top1, b.top5, b.images)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)


def test_networks_side_by_side_change_nothing(monkeypatch):
    model, batches = setting()
    monkeypatch.setattr("gracile.train.sensitivity.MOST_IMAGES", 2)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append(sensitivity(model, batches, levels=[0.25, 0.75]))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)
    one, three = found
    assert (one.base, one.rows) == (three.base, three.rows)


def test_an_error_in_one_of_several_networks_is_told(monkeypatch):
    model, batches = setting()
    monkeypatch.setattr("gracile.train.sensitivity.MOST_IMAGES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    wrong = [(x, y + 1000) for x, y in batches]
    with pytest.raises((IndexError, RuntimeError)):
        sensitivity(model, wrong, levels=[0.5])


def test_a_view_that_needs_the_usual_order_of_memory_is_followed():
    model, batches = setting(view=True)
    found = sensitivity(model, batches, levels=[0.5], tensors="inner")
    check(found.base, model, batches)
    changed = copy.deepcopy(model)
    gone = model.inner.weight.abs().flatten(1).sum(1).argsort()[:4]
    with torch.no_grad():
        changed.inner.weight[gone] = 0
        changed.inner.bias[gone] = 0
    check(found.rows[0], changed, batches)


def test_the_model_is_left_as_it_was():
    model, batches = setting()
    model.train()
    before = copy.deepcopy(model.state_dict())
    sensitivity(model, batches, levels=[0.5])
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.stem.weight.is_contiguous()


def test_what_has_nothing_to_lose_is_named():
    model, batches = setting()
    found = sensitivity(model, batches, by="channel", levels=[0.5])
    assert found.left_out == {"depth.weight": "it has only one channel"}
    assert "depth.weight" not in found.tensors


class Killed(Exception):
    pass


def test_resumed_is_uninterrupted(tmp_path):
    model, batches = setting()
    options = {"by": "filter", "levels": [0.25, 0.75], "identity": {"data": "a"}}
    whole = sensitivity(model, batches, **options)
    state = tmp_path / "state.json"
    calls = []

    def killed():
        calls.append(1)
        if len(calls) == 2:
            raise Killed

    with pytest.raises(Killed):
        sensitivity(model, batches, **options, state=state, advance=killed)
    seen = []

    def watched():
        for k, batch in enumerate(batches):
            seen.append(k)
            yield batch

    again = sensitivity(model, watched(), **options, state=state, resume=True)
    assert (again.base, again.rows) == (whole.base, whole.rows)
    with pytest.raises(ResumeError, match=r"another data; choose another --out"):
        sensitivity(
            model, batches, **{**options, "identity": {"data": "b"}}, state=state, resume=True
        )
    with torch.no_grad():
        model.head.bias += 1
    with pytest.raises(ResumeError, match="another weights"):
        sensitivity(model, batches, **options, state=state, resume=True)


def scan(drops, by="filter"):
    """A scan of one tensor with these drops in points by level."""
    from gracile.analyze.sensitivity import Row

    base = Row("", 0.0, 0, 0, 0.9, None, 0.5, 100)
    rows = [Row("a.weight", lv, 1, 8, 0.9 - d / 100, None, 0.6, 100) for lv, d in drops.items()]
    return Sensitivity(by, "l1", base, tuple(rows), {"b.weight": "it has only one filter"}, 1.5)


def test_what_a_tensor_stands_ends_at_the_first_level_that_costs_more():
    found = scan({0.1: 0.0, 0.2: 0.5, 0.3: 3.0, 0.4: 0.8})
    assert found.tolerated(1.0) == {"a.weight": 0.2}
    assert found.tolerated(-1.0) == {"a.weight": 0.0}
    assert scan({8: 0, 4: 0.9, 6: 0.1, 2: 9}, by="bits").tolerated(1.0) == {"a.weight": 4}
    assert scan({8: 5.0}, by="bits").tolerated(1.0) == {"a.weight": 32.0}


def test_files_round_trip(tmp_path):
    found = scan({0.5: 2.0})
    found.save(tmp_path)
    assert load_sensitivity(tmp_path / "sensitivity.json") == found
    assert (tmp_path / "sensitivity.csv").read_text() == (
        "tensor,level,removed,of,top1,top5,loss,drop,images\n"
        ",0,0,0,0.900000,,0.500000,0.0000,100\n"
        "a.weight,0.5,1,8,0.880000,,0.600000,2.0000,100\n"
    )
    (tmp_path / "bad.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=r"bad\.json: not a sensitivity scan"):
        load_sensitivity(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"by": "rows"}, r"by must be one of filter, channel, element, bits, got 'rows'"),
        ({"levels": [1.2]}, r"shares in \[0, 1\), got 1\.2\. For 20 % write 0\.2"),
        ({"by": "bits", "levels": [0.5]}, r"whole numbers, 2 to 16, got 0\.5"),
        ({"levels": []}, "at least one level"),
        (
            {"criterion": "taylor"},
            r"'taylor' needs gradients?; a scan ranks by weights alone: .*l1",
        ),
        ({"criterion": "l9"}, "unknown criterion 'l9'"),
        ({"memory_mib": 0}, "memory_mib must be at least 1, got 0"),
    ],
)
def test_refusals_say_the_way_out(options, text):
    model, batches = setting()
    with pytest.raises(UserError, match=text):
        sensitivity(model, batches, **options)


def test_no_images_and_no_such_tensor():
    model, batches = setting()
    with pytest.raises(UserError, match="at least one batch"):
        sensitivity(model, [])
    with pytest.raises(BindError, match=r"'innr.weight' matches no weight.*'inner.weight'"):
        sensitivity(model, batches, tensors="innr.weight")
