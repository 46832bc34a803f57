"""CompactNet's tables: the published totals, and files that are none."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gracile.errors import UserError
from gracile.latency.compactnet import FLOORS, GROUPS, UNMODIFIED, CompactNetTable, read

CPU_15 = (32, 16, 24, 24, 32, 32, 32, *[12] * 4, *[16] * 3, *[24] * 3, 44)
NPU_15 = (32, 10, 12, 12, 16, 16, 16, *[12] * 4, *[16] * 3, *[24] * 3, 44)


@pytest.fixture(scope="module")
def published():
    folder = Path(os.environ.get("GRACILE_DATA", "/nowhere")) / "compactnet"
    if not folder.is_dir():
        if os.environ.get("GRACILE_REQUIRE_DATA") == "1":
            pytest.fail("data not there")
        pytest.skip("data not there")
    return {name: read(folder / f"{name}_sim_latency.txt") for name in ("CPU", "NPU")}


def test_totals_of_the_unmodified_network(published):
    assert published["CPU"].latency_ms() == pytest.approx(65.225874, abs=1e-6)
    assert published["NPU"].latency_ms() == pytest.approx(15.514113, abs=1e-6)


def test_published_speedups(published):
    ratio = {name: t.latency_ms() / t.latency_ms(CPU_15) for name, t in published.items()}
    assert ratio == pytest.approx({"CPU": 1.5227, "NPU": 1.3936}, abs=5e-5)
    ratio = {name: t.latency_ms() / t.latency_ms(NPU_15) for name, t in published.items()}
    assert ratio == pytest.approx({"CPU": 2.2277, "NPU": 1.4952}, abs=5e-5)


def test_all_entries_are_read(published):
    for table in published.values():
        assert sum(m.size for m in table.stages) == 160_992
        assert all((m > 0).all() for m in table.stages)


def test_the_published_npu_model_is_the_one_of_all_floors():
    floors = list(UNMODIFIED)
    for group, floor in zip(GROUPS, FLOORS, strict=True):
        for stage in group:
            floors[stage] = floor
    assert tuple(floors) == NPU_15


def text_of(change=lambda n, m: m):
    shapes = zip(UNMODIFIED, (1, *UNMODIFIED[:-1]), strict=True)
    out = []
    for n, shape in enumerate(shapes):
        m = change(n, np.full(shape, 0.5 + n))
        out.append("[[" + "]\n [".join(" ".join(f"{v:.2f}" for v in row) for row in m) + "]]")
    return "\n".join(out)


def test_entry_is_out_by_in(tmp_path):
    def marked(n, m):
        if n == 1:
            m[15, 31] = 7.0  # 16 filters of 32 inputs
        return m

    (tmp_path / "t.txt").write_text(text_of(marked))
    table = read(tmp_path / "t.txt")
    assert table.stage_ms(1, 16, 32) == 7.0
    assert table.latency_ms() == pytest.approx(sum(0.5 + n for n in range(18)) + 7.0 - 1.5)
    record = table.record()
    assert (record.kind, record.device) == ("predicted", "t")


def test_widths_beyond_the_table_are_refused():
    table = CompactNetTable("p", (np.ones((2, 1)), np.ones((3, 2))))
    assert table.latency_ms((2, 3)) == 2.0
    with pytest.raises(UserError, match=r"stage 1 is known for 1 to 3 filters.*not for 4 and 2"):
        table.latency_ms((2, 4))
    with pytest.raises(UserError, match="give 2 widths"):
        table.latency_ms((2,))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "0 blocks"),
        ("hello", r"does not begin with '\[\['"),
        ("[[1.0 2.0", r"block 0 does not end"),
        ("[[1.0]]", "1 blocks; a table has 18"),
        (text_of().replace("1.50", "__import__", 1), "'__import__' is not a number"),
        (text_of().replace("1.50", "-1.5", 1), "block 1: a time is not positive"),
        (text_of().replace("1.50", "1e999", 1), "block 1: a time is not positive and finite"),
        (text_of().replace("1.50 ", "", 1), "block 1: expected 16 rows of 32 numbers"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text, said):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(UserError, match=said):
        read(tmp_path / "t.txt")


def test_a_pickle_is_not_read(tmp_path):
    import pickle

    (tmp_path / "t.pickle").write_bytes(pickle.dumps([np.ones((2, 2))]))
    with pytest.raises(UserError, match="a pickle can run code"):
        read(tmp_path / "t.pickle")


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=50)
def test_any_bytes_are_refused_kindly(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "t.txt"
    path.write_bytes(data)
    with pytest.raises(UserError):
        read(path)
