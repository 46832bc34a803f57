"""PNG and JPEG rows: exact pixels, decoded once, faults placed."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from gracile.data.encoded import EncodedImages
from gracile.data.progress import slow_progress
from gracile.errors import UserError

rng = np.random.default_rng(0)


def png(array, mode=None):
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(buffer, "PNG")
    return buffer.getvalue()


def make(files, **options):
    reads = []

    def read(row):
        reads.append(row)
        return files[row]

    images = EncodedImages("set", read, torch.zeros(len(files)), **{"keep": True, **options})
    return images, reads


ARRAYS = [rng.integers(0, 256, (4, 6, 3), dtype=np.uint8) for _ in range(5)]


@pytest.mark.parametrize("keep", [True, False])
def test_pixels_are_exact_and_in_the_order_asked(keep):
    images, _ = make([png(a) for a in ARRAYS], keep=keep)
    got = images.images([3, 0, 3])
    assert got.dtype == torch.uint8
    for k, row in enumerate((3, 0, 3)):
        assert np.array_equal(got[k].numpy(), ARRAYS[row].transpose(2, 0, 1))
    assert images.images(torch.empty(0, dtype=torch.long)).shape == (0, 3, 4, 6)


def test_kept_rows_are_decoded_once_and_only_when_asked():
    images, reads = make([png(a) for a in ARRAYS])
    images.images([2])
    assert set(reads) == {0, 2}  # the first row tells the shape
    before = len(reads)
    images.images([2, 2])
    assert len(reads) == before
    assert torch.equal(images.images(range(5)), make([png(a) for a in ARRAYS])[0].images(range(5)))
    assert images._read is None  # the encoded bytes are released


def test_gray_stays_one_channel_unless_three_are_asked():
    gray = rng.integers(0, 256, (4, 4), dtype=np.uint8)
    one = make([png(gray)])[0].images([0])
    three = make([png(gray)], channels=3)[0].images([0])
    assert torch.equal(one[0, 0], torch.from_numpy(gray))
    assert torch.equal(three, one.expand(1, 3, 4, 4))
    assert make([png(ARRAYS[0])], channels=1)[0].images([0]).shape == (1, 1, 4, 6)


def test_palettes_become_rgb():
    assert make([png(ARRAYS[0], mode="P")])[0].images([0]).shape == (1, 3, 4, 6)


def test_size_scales_the_short_side_and_cuts_the_middle():
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    got = make([png(wide)], size=10)[0].images([0])
    assert got.shape == (1, 3, 10, 10)
    assert got.unique().tolist() == [200]
    assert make([png(wide)], size=5)[0].images([0]).shape == (1, 3, 5, 5)


@pytest.mark.parametrize("keep", [True, False])
def test_other_shapes_and_broken_files_name_the_row(keep):
    files = [png(ARRAYS[0]), png(ARRAYS[1][:3]), b"no image", png(ARRAYS[0])[:60]]
    images, _ = make(files, keep=keep)
    with pytest.raises(UserError, match=r"row 0 is \(3, 4, 6\), row 1 is \(3, 3, 6\); add \?size"):
        images.images([1])
    for row in (2, 3):
        with pytest.raises(UserError, match=f"set: row {row} is not a readable image"):
            images.images([row])


@pytest.mark.parametrize(
    ("options", "message"), [({"channels": 2}, "must be 1 or 3, got 2"), ({"size": 0}, "got 0")]
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make([png(ARRAYS[0])], **options)


def test_progress_shows_only_what_is_slow(monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich: treat stderr as a terminal
    assert list(slow_progress(range(4), "decoding", after_s=60)) == [0, 1, 2, 3]
    assert capfd.readouterr().err == ""
    assert list(slow_progress(range(4), "decoding x.parquet", after_s=-1)) == [0, 1, 2, 3]
    out, err = capfd.readouterr()
    assert "decoding x.parquet" in err
    assert out == ""
