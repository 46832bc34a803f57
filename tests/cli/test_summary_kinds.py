"""`gracile summary --kind ...`, on a network of a thousand parameters."""

import csv

NET = "net.py:Net?num_classes=5"


def test_every_kind_has_its_file(as_json, tmp_path):
    kinds = (
        "compute", "sparsity", "modules", "attributes", "connectivity", "percentiles", "model",
        "graph", "graph-params",
    )  # fmt: skip
    found = as_json("summary", NET, "--out", tmp_path, *(w for k in kinds for w in ("--kind", k)))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "attributes.csv", "compute.csv", "connectivity.csv", "graph-params.svg", "graph.svg",
        "model.txt", "modules.csv", "percentiles.csv", "sparsity.csv",
    ]  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "compute.csv").read_text().splitlines()))
    stem = next(r for r in rows if r["operator"] == "stem")
    assert (stem["kind"], stem["output"], stem["macs"]) == ("conv", "8x8x8", str(64 * 8 * 27))
    assert found["sparsity"]["total"]["size"] == 8 * 27 + 8 * 72 + 8 * 5
    assert {"module": "relu", "type": "ReLU"} in found["modules"]
    assert found["text"].startswith("Net(")
    assert "stem: conv 8x8x8" in (tmp_path / "graph.svg").read_text()
    assert "216 parameters" in (tmp_path / "graph-params.svg").read_text()
    (stem,) = (r for r in found["attributes"] if r["module"] == "stem")
    assert (stem["in_channels"], stem["kernel_size"], stem["groups"]) == ("3", "3x3", "1")
    (relu,) = (r for r in found["connectivity"] if r["operator"] == "relu")
    assert (relu["kind"], relu["reads"]) == ("relu", "bn")
    assert [r["tensor"] for r in found["percentiles"]] == [
        r["tensor"] for r in found["sparsity"]["tensors"]
    ]


def test_tables(call):
    code, out, _ = call("summary", NET, "--kind", "modules", "--kind", "model")
    assert code == 0
    assert ["stem", "Conv2d"] in [line.split() for line in out.splitlines()]
    assert "(stem): Conv2d(3, 8" in out
    code, out, _ = call("summary", NET, "--kind", "sparsity")
    assert code == 0
    assert "0.00 % of 832 weights are zero, 832 left" in out


def test_what_is_refused(call):
    code, _, err = call("summary", NET, "--kind", "sparse")
    assert code == 2
    assert "unknown kind of summary 'sparse'. Nearest: 'sparsity'." in err
    code, _, err = call("summary", NET, "--kind", "graph")
    assert code == 2
    assert "--kind graph draws graph.svg: name a folder with --out." in err


def test_two_networks_side_by_side(call, as_json, tmp_path):
    other = NET.replace("5", "7")
    found = as_json("summary", NET, "--against", other, "--out", tmp_path)
    changed = [o["operator"] for o in found["operators"] if o["status"] == "changed"]
    assert changed == ["head"]
    assert found["other"]["params"] - found["one"]["params"] == 2 * 9
    assert "head,linear,changed,5,7" in (tmp_path / "comparison.csv").read_text()
    code, out, _ = call("summary", NET, "--against", other)
    assert code == 0
    assert "1 of" in out
    code, _, err = call("summary", NET, "--against", other, "--kind", "model")
    assert code == 2
    assert "leave --kind out" in err
