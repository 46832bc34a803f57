"""`gracile groups`, on a network of a thousand parameters."""


def test_groups_as_json_by_hand(as_json):
    found = as_json("groups", "net.py:Net?num_classes=5")
    by_id = {g["id"]: g for g in found["groups"]}
    assert list(by_id) == ["stem.weight", "inner.weight", "head.weight"]
    stem = by_id["stem.weight"]
    assert (stem["kind"], stem["units"], stem["protected"]) == ("channels", 8, None)
    # its filters, BatchNorm's scale and shift, and the columns of inner
    assert stem["params"] == 8 * 27 + 16 + 8 * 8 * 9
    assert stem["macs"] == 64 * 8 * 27 + 64 * 64 * 9  # 8 x 8 pixels
    assert (stem["producers"], stem["consumers"]) == (["stem.weight"], ["inner.weight"])
    members = {(m["at"], m["dim"]): m for m in stem["members"]}
    assert members["inner.weight", 1] == {
        "at": "inner.weight", "dim": 1, "of": 8, "units": [[i] for i in range(8)],
    }  # fmt: skip
    assert ("bn.running_var", 0) in members
    assert "output" in by_id["head.weight"]["protected"]
    assert found["macs"] == 64 * (8 * 27 + 8 * 72) + 8 * 5
    assert found["params"] == 861


def test_the_table_names_groups_costs_and_reasons(call):
    code, out, _ = call("groups", "net.py:Net?num_classes=5")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["stem.weight", "channels", "8", "1", "1", "808", "50.69", "k"] in rows
    assert "head.weight: protected, it is an output of the model" in out
    assert "2 of 3 groups can be cut, 16 units; captured by fx" in out


def test_all_names_every_layer(call):
    text = "stem.weight: written by stem; read by inner"
    assert text not in call("groups", "net.py:Net?num_classes=5")[1]
    assert text in call("groups", "net.py:Net?num_classes=5", "--all")[1]


def test_data_gives_the_shape_and_the_classes(as_json, call):
    found = as_json("groups", "net.py:Net", "--data", "digits")
    head = next(g for g in found["groups"] if g["id"] == "head.weight")
    assert head["units"] == 10
    code, _, err = call("groups", "net.py:Net?num_classes=5", "--shape", "3,x")
    assert code == 2
    assert "--shape must be like 3,32,32, got '3,x'" in err
