"""`gracile preflight`, on a network of a thousand parameters."""

NET = "net.py:Net?num_classes=5"


def test_files_page_and_json(as_json, tmp_path):
    out = tmp_path / "flight"
    found = as_json("preflight", NET, "--runtime", "onnxruntime", "--out", out)
    assert [n["layer"] for n in found["layers"]] == ["stem", "inner", "head"]
    assert found["bounds"][0]["kind"] == "measured"
    codes = {f["code"]: f for f in found["findings"]}
    assert codes["uneven-widths"]["where"] == ["stem", "inner"]
    assert sorted(p.name for p in out.iterdir()) == [
        "preflight.csv", "preflight.html", "preflight.json",
    ]  # fmt: skip
    page = (out / "preflight.html").read_text()
    assert "How fast it could get" in page
    assert "uneven-widths" in page


def test_the_table_and_the_lines(call):
    code, out, _ = call("preflight", NET, "--runtime", "openvino", "--no-measure", "--period", "8")
    assert code == 0
    heads = ["layer", "width", "MACs", "%", "MACs/byte", "cut", "integer"]
    assert out.split()[:7] == heads
    assert "protected" in out
    assert "uneven-widths" not in out
    assert "not known: measured, not asked for" in out
    assert "channels:" in out


def test_what_is_refused(call):
    code, _, err = call("preflight", NET, "--runtime", "openvin")
    assert code == 2
    assert "unknown runtime 'openvin'" in err
