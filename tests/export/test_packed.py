"""Files in few bytes: codes by hand, round trips of anything, and files that lie."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gracile.export.gaps import gaps, positions
from gracile.export.huffman import Coded, code_lengths, decode, encode
from gracile.export.packed import KEY, Header, pack, read_header, unpack


def through(tensors, **options):
    found = pack(tensors, **options)
    header = read_header(found.metadata())
    return found, unpack(found.tensors, header, lambda all, key: all[f"{key}.made"])


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors.values())


# ------------------------------------------------------------------ Huffman


def test_the_lengths_of_a_code_by_hand():
    # 45 13 12 16 9 5: the textbook's tree (Cormen et al., 16.3) has these depths
    lengths = code_lengths(np.array([45, 13, 12, 16, 9, 5]))
    assert lengths.tolist() == [1, 3, 3, 3, 4, 4]


def test_the_stream_by_hand():
    # lengths 1, 2, 2: codes 0, 10, 11; symbols 0 2 1 0 are 0 11 10 0, filled up with zeros
    coded = encode(np.array([0, 2, 1, 0]), 3)
    assert coded.lengths.tolist() == [1, 2, 2]
    assert coded.stream.tolist() == [0b01110000]
    assert coded.blocks.tolist() == [6]


def test_a_code_that_would_be_too_long_stays_within_sixteen_bits():
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = code_lengths(np.array(fibonacci)).astype(float)
    assert lengths.max() <= 16
    assert sum(2.0**-lengths) == 1


def test_the_length_is_within_a_bit_of_the_entropy():
    rng = np.random.default_rng(0)
    symbols = np.minimum(rng.geometric(0.3, 5000) - 1, 15)
    p = np.bincount(symbols) / len(symbols)
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum()
    bits = int(encode(symbols, 16).blocks.astype(int).sum())
    assert entropy <= bits / len(symbols) <= entropy + 1


@given(st.lists(st.integers(0, 300), max_size=3000), st.integers(301, 400))
@settings(max_examples=50, deadline=None)
def test_any_symbols_come_back(symbols, alphabet):
    wanted = np.array(symbols, np.int64)
    assert np.array_equal(decode(encode(wanted, alphabet)), wanted)


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 5000])
def test_blocks_of_every_fill_come_back(count):
    wanted = np.random.default_rng(count).integers(0, 17, count)
    assert np.array_equal(decode(encode(wanted, 17)), wanted)


# ------------------------------------------------------------------ distances


def test_figure_2_of_the_paper():
    # Indices 1, 4 and 15, counted from 1 on as the paper's first difference is 1: 3 bits hold at
    # most 8, so the difference of 11 becomes a filler zero at 8, then 3.
    distances, of = gaps(np.array([1, 4, 15]) - 1, 3, 16)
    values = np.array([3.4, 0.9, 1.7, 0.0])[of]  # -1, a filler, takes the zero
    assert distances.tolist() == [1, 3, 8, 3]
    assert values.tolist() == [3.4, 0.9, 0.0, 1.7]


@given(st.sets(st.integers(0, 2000), max_size=60), st.integers(1, 8), st.integers(0, 900))
@settings(max_examples=60, deadline=None)
def test_any_positions_come_back(places, bits, more):
    there = np.array(sorted(places), np.int64)
    whole = (int(there[-1]) + 1 if len(there) else 0) + more
    distances, of = gaps(there, bits, whole)
    assert len(distances) == 0 or (distances.min() >= 1 and distances.max() <= 1 << bits)
    assert np.array_equal(positions(distances)[of >= 0], there)
    end = int(distances.sum())
    assert 0 <= whole - end < 1 << bits


# ------------------------------------------------------------------ tensors

KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8)


@given(
    st.sampled_from(KINDS),
    st.integers(0, 3),
    st.integers(0, 400),
    st.floats(0, 1),
    st.integers(0, 10_000),
)
@settings(max_examples=80, deadline=None)
def test_any_tensor_comes_back_bit_by_bit(dtype, levels, count, sparsity, seed):
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=rng) * 3
    if levels:
        values = (values * levels).round() / levels
    values = torch.where(torch.rand(count, generator=rng) < sparsity, 0, values).to(dtype)
    _, back = through({"w": values})
    assert back["w"].dtype == dtype
    assert torch.equal(back["w"], values)


def test_minus_zero_and_not_a_number_stay_what_they_are():
    odd = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), -1.5] * 50)
    found, back = through({"w": odd})
    assert "w" in found.header.tensors
    assert back["w"].numpy().tobytes() == odd.numpy().tobytes()


@pytest.mark.parametrize("shape", [(0,), (), (3, 0, 2), (1,), (7, 5, 3, 3), (1000,)])
@pytest.mark.parametrize("fill", [0.0, 2.5])
def test_tensors_of_one_value_come_back(shape, fill):
    w = torch.full(shape, fill)
    _, back = through({"w": w, "mask": torch.full(shape, True), "n": torch.tensor(3)})
    assert torch.equal(back["w"], w)
    assert back["mask"].shape == shape
    assert back["mask"].all()
    assert back["n"] == 3


def test_a_pruned_and_shared_tensor_takes_what_its_entropy_says():
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(1, 17, (100_000,), generator=rng)
    w = torch.where(torch.rand(100_000, generator=rng) < 0.9, 0, codes / 16.0)
    found, back = through({"w": w})
    assert torch.equal(back["w"], w)
    entropy = 0.469 + 0.1 * 4  # bits: H(0.1), and 4 for each that is there
    assert found.header.tensors["w"].gap_bits is not None
    assert size(found.tensors) < 1.06 * 100_000 * entropy / 8


def test_a_pruned_tensor_of_many_values_keeps_them_and_their_places():
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(200_000, generator=rng) * (torch.rand(200_000, generator=rng) < 0.1)
    assert torch.signbit(w[w == 0]).any()  # -0.0, as weight * mask has it
    found, back = through({"w": w, "m": w != 0}, masks={"m": "w"})
    how = found.header.tensors["w"]
    assert how.codes is None
    assert torch.equal(back["w"], w)
    assert size(found.tensors) < 4.7 * w.count_nonzero()  # four bytes, and 5 bits for the place


def test_what_cannot_be_made_smaller_is_left_as_it_is():
    w = torch.randn(1000)
    found, back = through({"w": w})
    assert not found.header.tensors
    assert torch.equal(back["w"], w)


def test_a_mask_is_left_out_where_its_weight_says_it():
    w = torch.tensor([0.0, 1.0, 2.0, 0.0] * 100)
    found, back = through({"w": w, "m": w != 0}, masks={"m": "w"})
    assert "m" not in found.tensors
    assert torch.equal(back["m"], w != 0)
    other = w != 1  # hides a weight that is zero by itself, too
    _, back = through({"w": w, "m": other}, masks={"m": "w"})
    assert torch.equal(back["m"], other)


def test_a_weight_is_left_out_only_if_its_codebook_makes_just_it():
    w = torch.randn(100)
    parts = {"w": w, "k.made": w.clone()}
    found, back = through(parts, shared={"w": "k"}, restore=lambda key: w.clone())
    assert "w" not in found.tensors
    assert torch.equal(back["w"], w)
    found, back = through(parts, shared={"w": "k"}, restore=lambda key: w + 1e-7)
    assert "w" in found.tensors
    assert torch.equal(back["w"], w)


# ------------------------------------------------------------------ files that lie

W = torch.where(torch.arange(4000) % 7 == 0, (torch.arange(4000) % 5).float(), 0.0)


def lying(change):
    found = pack({"w": W})
    header = json.loads(found.metadata()[KEY])
    tensors = dict(found.tensors)
    change(header["tensors"]["w"], tensors)
    return tensors, header


def cut(h, t):
    t["w"] = t["w"][:-3]


def longer(h, t):
    t["w"] = torch.cat([t["w"], torch.zeros(2, dtype=torch.uint8)])


def count(h, t):
    h["gaps"]["count"] += 1


def huge_count(h, t):
    h["codes"]["count"] = 1 << 60


def huge_table(h, t):
    h["table"] = 1 << 60


def huge_shape(h, t):
    h["shape"] = [1 << 40, 1 << 20]


def negative_shape(h, t):
    h["shape"] = [-4000]


def two_negatives(h, t):
    h["shape"] = [-40, -100]


def other_type(h, t):
    h["dtype"] = "float16"


def unknown_type(h, t):
    h["dtype"] = "object"


def lengths(h, t):
    t["w"] = t["w"].clone()
    t["w"][0] = 200


def zeros(h, t):
    t["w"] = torch.zeros_like(t["w"])


def floats(h, t):
    t["w"] = t["w"].float()


def missing(h, t):
    del t["w"]


def no_gaps(h, t):
    del h["gaps"]


@pytest.mark.parametrize(
    "change",
    [
        cut, longer, count, huge_count, huge_table, huge_shape, negative_shape, two_negatives,
        other_type, unknown_type, lengths, zeros, floats, missing, no_gaps,
    ],
)  # fmt: skip
def test_what_a_file_claims_is_checked(change):
    tensors, header = lying(change)
    with pytest.raises(ValueError, match="'w': "):
        unpack(tensors, Header.model_validate(header), lambda all, key: all[key])


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_stream_with_wrong_bytes_is_an_error_or_a_tensor_of_that_shape(data):
    found = pack({"w": W})
    stream = found.tensors["w"].clone()
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    try:
        back = unpack({"w": stream}, found.header, lambda all, key: all[key])
    except ValueError:
        return
    assert back["w"].shape == W.shape


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "no JSON"),
        ("[]", "wrong"),
        ('{"format": 2}', "format"),
        ('{"run": "code"}', "run"),
        ('{"tensors": {"w": {"shape": [2], "dtype": "bool", "table": -1}}}', "table"),
        (
            '{"tensors": {"w": {"shape": [2], "dtype": "x", "table": 1, "gap_bits": 60}}}',
            "gap_bits",
        ),
    ],
)
def test_a_wrong_header_is_named(text, what):
    with pytest.raises(ValueError, match=what):
        read_header({KEY: text})


def test_a_file_of_another_kind_has_no_header():
    assert read_header({"format": "pt"}) is None


def test_a_code_that_is_not_complete_is_refused():
    bad = Coded(np.array([1, 2], np.uint8), np.array([3], np.uint16), np.zeros(1, np.uint8), 2)
    with pytest.raises(ValueError, match="prefix code"):
        decode(bad)
