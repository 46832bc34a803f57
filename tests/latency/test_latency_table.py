"""Tables as files: the same after a round trip, merged, refused elsewhere, damage told by line."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latency_case import HERE, conv, filled, point

from gracile.errors import UserError
from gracile.latency.staircase import Stair
from gracile.latency.table import Network, Table
from gracile.latency.unit import Unit

ELSEWHERE = replace(HERE, device="another one")


def full_table():
    table = filled(lambda i, o: i * o / 1000, (8, 16))
    times = table.of(HERE)
    times.stairs["conv", "f32", 1] = Stair(8, tail=True)
    times.networks["n"] = Network(1.0, 1.5, 0.0, weights=7)
    table.at(ELSEWHERE).points[conv(8, 8)] = point(9.0)
    return table


def test_saved_and_read_is_the_same(tmp_path):
    full_table().save(tmp_path / "t.jsonl")
    found, wanted = Table.load(tmp_path / "t.jsonl"), full_table()
    assert found.settings == wanted.settings
    for setting in wanted.settings:
        assert found.of(setting) == wanted.of(setting)


def test_saving_again_gives_the_same_bytes(tmp_path):
    full_table().save(tmp_path / "a")
    Table.load(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_times_of_another_device_are_refused_unless_asked_for():
    table = filled(lambda i, o: 1.0, (8,))
    with pytest.raises(UserError, match=r"device a processor, not another one\..*--anyway"):
        table.of(ELSEWHERE)
    assert table.of(ELSEWHERE, anyway=True).setting == HERE
    with pytest.raises(UserError, match=r"version 2026.4, not 2027"):
        table.of(replace(HERE, version="2027"))
    with pytest.raises(UserError, match=r"no times of 'onnxruntime'; it has openvino"):
        table.of(replace(HERE, runtime="onnxruntime"), anyway=True)


def test_of_several_the_nearest_setting_is_taken():
    table = filled(lambda i, o: 1.0, (8,))
    table.at(replace(HERE, threads=2, batch=8))
    assert table.of(replace(HERE, threads=4), anyway=True).setting == HERE


def test_merging_keeps_the_newer_time_and_adds_the_rest():
    mine, theirs = Table(), Table()
    mine.at(HERE).points |= {conv(8, 8): point(1.0, when=5), conv(8, 16): point(2.0, when=1)}
    theirs.at(HERE).points |= {conv(8, 8): point(7.0, when=4), conv(8, 16): point(8.0, when=2)}
    theirs.at(ELSEWHERE).networks["n"] = Network(1.0, 2.0, 3.0)
    mine.merge(theirs)
    times = mine.of(HERE)
    assert (times.points[conv(8, 8)].ms, times.points[conv(8, 16)].ms) == (1.0, 8.0)
    assert mine.of(ELSEWHERE).networks == {"n": Network(1.0, 2.0, 3.0)}


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "t.jsonl"
    full_table().save(path)
    path.write_text(path.read_text()[:-40])
    assert len(Table.load(path).settings) == 2


@pytest.mark.parametrize(
    ("number", "change", "said"),
    [
        (3, lambda line: line[:-5], "broken JSON"),
        (2, lambda line: line.replace("runtime", "walktime"), "walktime"),
        (5, lambda line: line.replace('"ms": ', '"ms": -'), "no time"),
        (5, lambda line: line.replace('"ms": ', '"ms": "'), "JSON"),
        (5, lambda line: line.replace('"widths": [8', '"widths": [0'), "widths"),
        (5, lambda line: '{"what": "joke", "setting": "x"}', "not a line of a table"),
        (3, lambda line: line.replace('"period": 8', '"period": 7'), "period 7"),
        (5, lambda line: "[1, 2]", "not a line of a table"),
    ],
)
def test_damage_is_told_with_its_line(tmp_path, number, change, said):
    path = tmp_path / "t.jsonl"
    full_table().save(path)
    lines = path.read_text().splitlines()
    lines[number - 1] = change(lines[number - 1])
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"t\.jsonl:{number}: .*{said}"):
        Table.load(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a latency table"),
        ("{}\n", "not a latency table"),
        ("[]\n", "not a latency table"),
        ('{"gracile": "latency table", "format": 2}\n', "format 2; this gracile reads format 1"),
    ],
)
def test_another_file_is_no_table(tmp_path, text, said):
    (tmp_path / "t").write_text(text)
    with pytest.raises(UserError, match=said):
        Table.load(tmp_path / "t")


def test_no_such_file_says_what_makes_one(tmp_path):
    with pytest.raises(UserError, match="latency measure MODEL --table"):
        Table.load(tmp_path / "no.jsonl")


@given(widths=st.lists(st.integers(1, 9999), max_size=2), text=st.text(max_size=5))
def test_a_unit_survives_json(widths, text):
    unit = Unit.of("conv", tuple(widths), {"act": text, "size": [3, 4], "add": []})
    assert Unit.from_dict(json.loads(json.dumps(unit.to_dict()))) == unit


def test_keys_tell_apart_what_differs_and_nothing_else():
    assert conv(8, 16) == conv(8, 16, kernel=[3, 3])
    assert conv(8, 16) != conv(16, 8)
    assert conv(8, 16).family == conv(16, 8).family
    assert conv(8, 16).family != conv(8, 16, precision="int8").family
    assert conv(8, 16, precision="int8").precision == "int8"
    assert conv(8, 16).dims([1, "i", "o", 7]) == [1, 8, 16, 7]
