"""ncnn's text form: written, read back, facts behind the layers, units that can be fed."""

import numpy as np
import pytest

from gracile.benchmark.artifact import Unit, facts, open_artifact
from gracile.benchmark.param import Layer, numbers, read, readable, tagged, write
from gracile.errors import UserError

LAYERS = [
    Layer("Input", "x", (), ("x",), {0: 5, 1: 4, 2: 3}),
    Layer("Clip", "c", ("x",), ("y",), {0: -1.5, 1: 1e20}),
    Layer("Split", "s", ("y",), ("y1", "y2")),
    Layer("Crop", "k", ("y1",), ("a",), {9: (1, 2), 11: (0, 1)}),
    Layer("BinaryOp", "b", ("a", "y2"), ("z",), {0: 2}),
]


def test_read_is_the_inverse_of_write():
    known = {"gracile.format": "1", "gracile.metadata": '{"note": "two\\nlines"}'}
    assert read(write(LAYERS, known)) == (LAYERS, known)


def test_lists_without_their_length_are_read_too():
    (layer,), _ = read("7767517\n1 1\nCrop k 1 1 x y -23309=2,1,2 10=3,4 0=0\n")
    assert layer.params == {9: (1, 2), 10: (3, 4), 0: 0}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "does not begin with 7767517"),
        ("7767517\n3 3\nInput x 0 1 x\n", "3 layers are announced, 1 are there"),
        ("7767517\n1 1\nReLU r 1 1 x\n", "line of 'r' is too short"),
    ],
)
def test_other_texts_are_refused(text, why, tmp_path):
    with pytest.raises(ValueError, match=why):
        read(text)
    (tmp_path / "m.param").write_text(text)
    (tmp_path / "m.bin").write_bytes(b"")
    with pytest.raises(UserError, match=f"not an ncnn network: .*{why}"):
        open_artifact(tmp_path / "m.param")


def test_numbers_by_hand():
    assert numbers([1.0]) == b"\x00\x00\x80\x3f"
    assert tagged(np.float32([1.0])) == b"\x00\x00\x00\x00\x00\x00\x80\x3f"
    assert tagged(np.int8([1, -1])) == b"\x38\x4b\x0d\x00\x01\xff\x00\x00"  # filled up to 4 bytes


def test_what_reads_a_fed_tensor_reads_an_input():
    fed = readable(["y", "z"], LAYERS)
    assert [x.name for x in fed if x.type == "Input"] == ["y.fed", "x"]  # nobody reads z
    assert next(x for x in fed if x.type == "Split").inputs == ("y.fed",)


def test_facts_come_back_and_a_file_from_elsewhere_opens_without(tmp_path):
    (tmp_path / "m.bin").write_bytes(b"")
    known = facts("int8", [("x", (1, 3, 4, 5))], [Unit("z", ("layer",))], {"seed": 7})
    (tmp_path / "m.param").write_text(write(LAYERS, known))
    artifact = open_artifact(tmp_path / "m.param")
    assert (artifact.runtime, artifact.precision) == ("ncnn", "int8")
    assert (artifact.units, artifact.metadata) == ((Unit("z", ("layer",)),), {"seed": 7})
    (tmp_path / "m.param").write_text(write(LAYERS))
    artifact = open_artifact(tmp_path / "m.param")
    assert (artifact.units, artifact.precision) == ((), "f32")
    assert artifact.inputs == (("x", (1, 3, 4, 5)),)
