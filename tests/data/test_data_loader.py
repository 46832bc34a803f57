"""Batches: normalization, augmentation, sharding, and that all is a function of (seed, epoch)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gracile.data.bundle import DataBundle, Subset, TensorImages
from gracile.data.loader import PAD, Loader, calibration_batches, shifted
from gracile.errors import UserError

PLAIN = {"mean": (0.0,), "std": (1.0,)}
SHUFFLED = {**PLAIN, "shuffle": True, "seed": 5}


def numbered(n, channels=1, side=6):
    """Image k has label k and its number in every pixel."""
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None]
    return TensorImages(pixels.expand(n, channels, side, side).clone(), torch.arange(n))


def noise(n=24, channels=3, side=8):
    torch.manual_seed(0)
    return TensorImages(
        torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8), torch.arange(n)
    )


def equal(a, b):
    a, b = list(a), list(b)
    assert len(a) == len(b)
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True))


def test_normalization_by_hand():
    images = TensorImages(torch.full((1, 2, 1, 1), 51, dtype=torch.uint8), torch.tensor([3]))
    ((x, y),) = Loader(images, 4, mean=(0.1, 0.2), std=(0.5, 0.25))
    torch.testing.assert_close(x.flatten(), torch.tensor([0.2, 0.0]))  # 51/255 = 0.2
    assert (x.dtype, y.tolist(), y.dtype) == (torch.float32, [3], torch.int64)


@given(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.integers(0, 3))
def test_every_image_comes_once_an_epoch(n, size, shuffle, epoch):
    loader = Loader(numbered(n), size, **PLAIN, shuffle=shuffle)
    batches = list(loader.batches(epoch))
    labels = torch.cat([y for _, y in batches])
    assert len(batches) == len(loader)
    assert sorted(labels.tolist()) == list(range(n))
    images = torch.cat([x[:, 0, 0, 0] for x, _ in batches])
    assert torch.equal((images * 255).round().long(), labels)


def test_without_shuffle_the_order_is_kept():
    assert torch.cat([y for _, y in Loader(numbered(7), 3, **PLAIN)]).tolist() == list(range(7))


@pytest.mark.parametrize("augment", ["none", "shift", "standard"])
@pytest.mark.parametrize("start", [0, 1, 4, 5, 9])
def test_started_in_mid_epoch_equals_the_tail(augment, start):
    loader = Loader(noise(), 5, mean=(0.5,) * 3, std=(0.2,) * 3, shuffle=True, augment=augment)
    whole = list(loader.batches(2))
    assert equal(loader.batches(2, start=start), whole[start:])


def test_epochs_differ_and_repeat():
    def make():
        return Loader(noise(), 5, **SHUFFLED, augment="standard")

    assert equal(make().batches(1), make().batches(1))
    assert not torch.equal(next(make().batches(0))[0], next(make().batches(1))[0])
    assert equal(make(), make().batches(0))


def test_seed_changes_the_order():
    first = [
        torch.cat([y for _, y in Loader(noise(), 5, **PLAIN, shuffle=True, seed=s)]) for s in (0, 1)
    ]
    assert not torch.equal(*first)


@given(st.integers(2, 5), st.integers(1, 4), st.sampled_from(["none", "shift", "standard"]))
def test_ranks_together_are_one_process(world, size, augment):
    """Batch b of all ranks, interleaved, is batch b of one process with world times the size."""
    one = list(Loader(noise(), size * world, **SHUFFLED, augment=augment))
    ranks = [
        list(Loader(noise(), size, **SHUFFLED, augment=augment, rank=r, world=world))
        for r in range(world)
    ]
    for b, (x, y) in enumerate(one):
        for r in range(world):
            if len(y[r::world]):
                assert torch.equal(ranks[r][b][0], x[r::world])
                assert torch.equal(ranks[r][b][1], y[r::world])
    assert sum(len(y) for rank in ranks for _, y in rank) == 24


@given(st.integers(8, 40), st.integers(1, 4), st.integers(1, 2))
def test_drop_last_gives_every_rank_as_many_full_batches(n, size, world):
    loaders = [
        Loader(numbered(n), size, **PLAIN, drop_last=True, rank=r, world=world)
        for r in range(world)
    ]
    counts = [[len(y) for _, y in loader] for loader in loaders]
    assert all(c == [size] * (n // (size * world)) for c in counts)
    assert [len(c) for c in counts] == [len(loader) for loader in loaders]


@given(st.integers(0, 2 * PAD), st.integers(0, 2 * PAD))
def test_shift_equals_cropping_the_padded_image(dy, dx):
    x = noise(2).pixels
    got = shifted(x, torch.tensor([[dy, dx], [PAD, PAD]]))
    padded = F.pad(x, (PAD,) * 4)
    assert torch.equal(got[0], padded[0, :, dy : dy + 8, dx : dx + 8])
    assert torch.equal(got[1], x[1])


def test_standard_mirrors_about_half_and_shift_none():
    pixels = torch.zeros(400, 1, 12, 12, dtype=torch.uint8)
    pixels[..., 5] = 1  # a line left of the middle and a brighter one right of it
    pixels[..., 6] = 2
    images = TensorImages(pixels, torch.zeros(400))

    def mirrored(augment):
        ((x, _),) = Loader(images, 400, **PLAIN, augment=augment)
        return int((x[:, 0, 6].argmax(1) < (x[:, 0, 6] * 255 == 1).int().argmax(1)).sum())

    assert mirrored("shift") == 0
    assert 150 < mirrored("standard") < 250


def test_shift_reaches_all_offsets_and_pads_with_black():
    images = TensorImages(torch.full((2000, 1, 6, 6), 255, dtype=torch.uint8), torch.zeros(2000))
    ((x, _),) = Loader(images, 2000, **PLAIN, augment="shift")
    rows = x[:, 0].amax(2).sum(1)  # bright rows left: 6 - |dy|
    assert set(rows.tolist()) == {2.0, 3.0, 4.0, 5.0, 6.0}
    assert set(x.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"augment": "standrad"}, "unknown augment 'standrad'. Nearest: 'standard'"),
        ({"rank": 2, "world": 2}, "rank must be in 0..world-1, got rank 2 of 2"),
        ({"batch_size": 9, "drop_last": True}, "8 images do not fill one batch of 9"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Loader(numbered(8), options.pop("batch_size", 2), **PLAIN, **options)


def test_an_empty_part_is_refused():
    with pytest.raises(UserError, match="has no images"):
        Loader(Subset(numbered(3), torch.empty(0)), 2, **PLAIN)


def bundle(train, calibration):
    images = numbered(train)
    part = Subset(images, torch.arange(train).flip(0)[:calibration])
    return DataBundle(
        name="n", spec="n", train=images, val=images, test=images, calibration=part,
        classes=train, class_names=(), shape=(1, 6, 6), mean=(0.0,), std=(1.0,), sha="",
    )  # fmt: skip


def test_calibration_takes_the_first_of_the_drawn_images():
    def labels(count):
        return [y.tolist() for _, y in calibration_batches(bundle(9, 5), count, 2)]

    assert labels(None) == labels(5) == labels("test[:3]") == [[8, 7], [6, 5], [4]]
    assert labels(3) == [[8, 7], [6]]


def test_calibration_of_more_than_there_is():
    everything = calibration_batches(bundle(4, 4), 300)
    assert sum(len(y) for _, y in everything) == 4
    with pytest.raises(UserError, match=r"has 5 images, 8 were asked: set data\.calibration"):
        calibration_batches(bundle(9, 5), 8)
