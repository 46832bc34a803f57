"""Rows, columns, kernels, layers and blocks: which weights go as one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gracile import registry
from gracile.errors import UserError
from gracile.prune.granularity.block import block
from gracile.prune.granularity.column import column
from gracile.prune.granularity.filter import filter_
from gracile.prune.granularity.kernel import kernel
from gracile.prune.granularity.layer import layer
from gracile.prune.granularity.row import row


def test_rows_are_outputs_and_columns_inputs_of_a_linear_layer():
    weight = torch.nn.Linear(3, 2).weight  # (outputs, inputs)
    assert row(tuple(weight.shape)).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert column(tuple(weight.shape)).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert torch.equal(row((4, 5)), filter_((4, 5)))


def test_a_kernel_is_one_filter_channel_pair_in_one_two_or_three_dimensions():
    for size in ((3,), (3, 3), (3, 3, 3)):
        ids = kernel((4, 2, *size))
        assert ids.flatten(2).unique(dim=2).squeeze(2).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_layer_is_one_group():
    assert layer((4, 3, 2)).shape == (4, 3, 2)
    assert layer((4, 3, 2)).unique().tolist() == [0]


def test_a_block_spans_filters_and_channels_at_one_position():
    ids = block((4, 4, 2), filters=2, channels=4)
    assert ids[:, :, 0].tolist() == [[0] * 4, [0] * 4, [2] * 4, [2] * 4]
    assert ids[:, :, 1].tolist() == [[1] * 4, [1] * 4, [3] * 4, [3] * 4]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_blocks_are_all_of_one_size_and_numbered_without_gaps(filters, channels, reps, size):
    ids = block((filters * reps, channels * 2, size), filters=filters, channels=channels)
    assert torch.bincount(ids.flatten()).tolist() == [filters * channels] * (reps * 2 * size)


@pytest.mark.parametrize(
    ("name", "shape", "options", "text"),
    [
        ("row", (2, 3, 1), {}, r"rows need .* 2 dimensions, got \(2, 3, 1\); use filter"),
        ("column", (2,), {}, r"columns need .* got \(2,\); use channel"),
        ("kernel", (2, 3), {}, r"kernels need .* convolution, got shape \(2, 3\)"),
        ("block", (8,), {}, r"at least 2 dimensions, got \(8,\)"),
        ("block", (6, 12, 3, 3), {}, "1 filters x 8 channels does not divide .* 6 .* 12 channels"),
        ("block", (6, 8), {"filters": 4}, "4 filters x 8 channels does not divide"),
        ("block", (6, 8), {"filters": 0}, "0 filters"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_sizes(name, shape, options, text):
    with pytest.raises(UserError, match=text):
        registry.get("granularity", name).obj(shape, **options)
