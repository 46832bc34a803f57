"""`gracile activations`, on a network of a thousand parameters."""


def test_files_page_and_json(as_json, tmp_path):
    out = tmp_path / "stats"
    found = as_json("activations", "net.py:Net", "--images", "20", "--out", out, "--bins", "16")
    assert (found["images"], found["data"]) == (20, "digits, calibration")
    rows = {r["tensor"]: r for r in found["rows"]}
    assert rows["stem"]["shape"] == [8, 8, 8]
    assert rows["stem"]["values"] == 20 * 512
    assert rows["relu"]["min"] == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "activations.csv", "activations.html", "activations.json", "activations.yaml",
    ]  # fmt: skip
    page = (out / "activations.html").read_text()
    assert "Ranges along the network" in page
    assert "20 images of digits, calibration" in page


def test_the_table(call):
    code, out, _ = call(
        "activations", "net.py:Net", "--images", "20", "--split", "val", "--tensors", "re:relu.*"
    )
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["tensor", "op", "shape", "min"]
    assert [line.split()[0] for line in lines[1:3]] == ["relu", "relu_1"]
    assert "20 images of digits, val" in out


def test_what_is_refused(call):
    code, _, err = call("activations", "net.py:Net", "--tensors", "nothing")
    assert code == 2
    assert "'nothing' matches no activation" in err
    code, _, err = call("activations", "net.py:Net", "--split", "valid")
    assert code == 2
    assert "valid" in err
