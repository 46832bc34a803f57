import pytest
import torch
from benchmarks import structure
from benchmarks.structure_one import prune
from benchmarks.structure_zoo import architectures
from torch import nn


class Small(nn.Module):
    """Two convolutions and a classifier; `unused` is never called."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.unused, self.head = nn.Linear(4, 4), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def outcome():
    torch.manual_seed(0)
    return prune(Small(), (torch.randn(2, 3, 8, 8),))


def test_half_of_all_channels_go_and_the_cut_is_proven(outcome):
    assert outcome.status == "ok", outcome.text
    assert (outcome.written, outcome.written_gone) == (14, 7)
    assert outcome.max_error < 1e-6
    assert outcome.params_after == 4 * 27 + 4 + 3 * 36 + 3 + 20 + 3 * 5 + 5


def test_what_cannot_be_cut_is_counted_with_its_reason(outcome):
    assert outcome.protected == 20 + 5
    assert outcome.reasons == {"unused": 20, "it is an output of the model": 5}


def test_a_model_that_does_not_run_is_a_row_not_a_crash():
    broken = prune(nn.Linear(3, 4), (torch.randn(2, 5),))
    assert broken.status == "refused"
    assert "does not run" in broken.text


def test_a_family_has_a_table_with_status_and_reasons(outcome):
    found = {**outcome.__dict__}
    key, arch = next(iter(architectures().items()))
    (cell,) = (c for c in structure.cells() if c.name == key)
    values = structure.values_of(found)
    records = [r.about(value=values[r.metric]) for r in cell.records]
    *_, row = structure.table(records, {key: structure.texts_of(found)})
    assert row.startswith(f"| {arch.name} | ok | 3 (2) | 50% |")
    assert "it is an output of the model" in row


def test_a_process_that_ended_early_is_shown_with_its_message():
    key, arch = next(iter(architectures().items()))
    found = {"status": "error", "text": "not done after 1 s"}
    (cell,) = (c for c in structure.cells() if c.name == key)
    values = structure.values_of(found)
    records = [r.about(value=values[r.metric]) for r in cell.records]
    *_, row = structure.table(records, {key: structure.texts_of(found)})
    assert row.startswith(f"| {arch.name} | error: not done after 1 s |")
