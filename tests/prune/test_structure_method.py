"""`prune: structure` in a session: levels, targets, limits, cuts that fail their proof."""

import pytest
import torch
from torch import nn

from gracile.analyze.cost import cost
from gracile.errors import BindError, PlanConflict, UserError, VerificationError
from gracile.recipe.load import loads
from gracile.train.session import Session


class Net(nn.Module):
    """A stem of 8 channels, a branch of 12 that returns to it, a layer of 10, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.outer = nn.Conv2d(12, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 10, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def session(options: str, more: str = "") -> Session:
    torch.manual_seed(0)
    text = (
        f"recipe: 1\ntrain: {{epochs: 4}}\nmethods:\n  m: {{prune: structure, {options}}}\n{more}"
    )
    model = Net()
    return Session(
        model,
        loads(text, name="r.yaml"),
        torch.optim.SGD(model.parameters(), lr=0.1),
        example=torch.randn(2, 3, 8, 8),
        steps_per_epoch=1,
    )


def widths(s: Session) -> tuple[int, int, int]:
    m = s.model
    assert m.outer.weight.shape[0] == m.stem.weight.shape[0] == m.last.weight.shape[1]
    return m.stem.weight.shape[0], m.inner.weight.shape[0], m.last.weight.shape[0]


def total(s: Session, column: str) -> int:
    return sum(getattr(row, column) for row in cost(s.model, s.graph))


def begin(s: Session, epochs: int = 4) -> None:
    for epoch in range(epochs):
        s.on_epoch_begin(epoch)


def test_each_firing_brings_the_share_of_the_original():
    s = session("scope: layer, ratio: {ramp: linear, final: 0.75}, when: {start: 0ep, stop: 4ep}")
    seen = []
    for epoch in range(4):
        s.on_epoch_begin(epoch)
        seen.append(widths(s))
    # 0, a quarter, a half, three quarters of 8, 12 and 10, rounded down
    assert seen == [(8, 12, 10), (6, 9, 8), (4, 6, 5), (2, 3, 3)]
    assert [v for _, v in s.history["channels/m"]] == [30, 23, 15, 8]


def test_the_weakest_of_all_layers_go():
    s = session("ratio: 0.4, norm: none, when: {at: 0ep}")  # 12 of 30
    with torch.no_grad():
        s.model.inner.weight.mul_(1e-3)
    begin(s, 1)
    assert widths(s) == (8, 1, 9)  # one of the weakest layer stays


def test_a_layer_of_which_one_channel_is_left_counts_in_what_is_gone():
    s = session("norm: none, ratio: {ramp: linear, final: 0.6}, when: {start: 0ep, stop: 4ep}")
    with torch.no_grad():
        s.model.inner.weight.mul_(1e-3)
    begin(s)
    assert widths(s)[1] == 1  # since epoch 2
    assert sum(widths(s)) == 30 - 18
    assert [v for _, v in s.history["channels/m"]] == [30, 24, 18, 12]


@pytest.mark.parametrize(("target", "column"), [("params", "params"), ("macs", "macs")])
@pytest.mark.parametrize("scope", ["layer", "global", "isomorphic"])
def test_a_cost_target_is_met_within_one_channel(target, column, scope):
    s = session(f"ratio: 0.5, target: {target}, scope: {scope}, when: {{at: 0ep}}")
    before = total(s, column)
    largest = {"params": (3 + 12 + 12 + 1) * 9 + 2 + 10, "macs": 64 * (3 + 12 + 12) * 9 + 640}
    begin(s, 1)
    assert before / 2 - largest[target] < total(s, column) <= before / 2


def test_ignored_layers_stay_and_the_rest_takes_no_more():
    s = session("ratio: 0.5, scope: layer, ignore: [outer, head], when: {at: 0ep}")
    begin(s, 1)
    assert widths(s) == (8, 6, 5)


def test_widths_end_at_multiples():
    s = session("ratio: 0.5, multiple_of: 4, min_width: 4, when: {at: 0ep}")
    begin(s, 1)
    assert all(w in (4, 8, 12, 10) for w in widths(s))
    assert abs(sum(widths(s)) - 15) <= 2


def test_limits_that_miss_the_share_are_told():
    s = session("ratio: 0.5, scope: layer, min_keep: 7, when: {at: 0ep}")
    begin(s, 1)
    assert widths(s) == (7, 7, 7)
    assert [code for code, _ in s.warnings] == ["target-missed"]


def test_a_target_out_of_reach_is_refused_before_training():
    with pytest.raises(UserError, match=r"^r.yaml:4: 'm': the target of .* macs cannot be reached"):
        session("ratio: 0.9, target: macs, max_ratio: 0.1, when: {at: 3ep}")


def test_nothing_to_cut_is_refused_with_the_reasons():
    with pytest.raises(BindError, match=r"none of the \d+ groups .*'head.weight': it is an output"):
        session('ratio: 0.5, ignore: "type:Conv2d", when: {at: 0ep}')


def test_two_entries_for_the_same_channels_conflict():
    other = "  n: {prune: structure, ratio: 0.2, when: {at: 1ep}}\n"
    with pytest.raises(PlanConflict, match=r"'m' \(line 4\) and 'n' \(line 5\) both set structure"):
        session("ratio: 0.5, when: {at: 0ep}", other)


def test_protected_channels_are_in_the_ledger():
    s = session("ratio: 0.5, when: {at: 0ep}")
    begin(s)
    (row,) = [r for r in s.finish().ledger if r.name == "head.weight" and r.structure == "kept"]
    assert (row.reason, row.by) == ("protected", "m")
    assert "output" in row.why


def refusing(monkeypatch, *bad):
    """Every cut that touches one of these groups fails its proof."""
    cut = Session.cut

    def fails(s, gone, *, by, reproduce):
        if set(gone) & set(bad):
            raise VerificationError("the first differing operator is 'x' (odd)")
        cut(s, gone, by=by, reproduce=reproduce)

    monkeypatch.setattr(Session, "cut", fails)


def test_a_group_that_fails_its_proof_is_protected_and_the_rest_goes_on(monkeypatch):
    refusing(monkeypatch, "inner.weight")
    s = session("ratio: 0.5, scope: layer, when: {at: 0ep}")
    begin(s)
    assert widths(s) == (4, 12, 5)
    assert [c for c, _ in s.warnings] == ["cut-refused"]
    rows = [r for r in s.finish().ledger if r.name == "inner.weight" and r.structure == "kept"]
    assert [r.reason for r in rows] == ["protected"]
    assert "'x' (odd)" in rows[0].why


def test_others_take_over_a_budget_that_a_failed_group_left(monkeypatch):
    refusing(monkeypatch, "last.weight")
    s = session("ratio: 0.5, target: params, when: {at: 0ep}")
    before = total(s, "params")
    begin(s, 1)
    assert widths(s)[2] == 10
    assert total(s, "params") <= before / 2


def test_a_run_in_which_no_cut_passes_fails(monkeypatch):
    refusing(monkeypatch, "stem.weight", "inner.weight", "last.weight")
    s = session("ratio: 0.5, when: {at: 0ep}")
    with pytest.raises(VerificationError, match="'m': no group of channels passes its proof"):
        s.on_epoch_begin(0)
    assert widths(s) == (8, 12, 10)


def test_a_refused_group_is_remembered_by_a_resumed_run(monkeypatch):
    refusing(monkeypatch, "inner.weight")
    options = "ratio: {ramp: linear, final: 0.5}, scope: layer, when: {start: 0ep, stop: 3ep}"
    first = session(options)
    begin(first, 2)
    second = session(options)
    second.load_state_dict(first.state_dict())
    assert second.methods[0].failed == first.methods[0].failed
    assert list(second.methods[0].failed) == ["inner.weight"]
