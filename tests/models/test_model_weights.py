"""Weights files: what is accepted, and what a misfit says."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gracile.errors import UserError
from gracile.models.weights import load_weights


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))


@pytest.fixture
def state():
    torch.manual_seed(1)
    model = net()
    for p in model.parameters():
        nn.init.normal_(p)
    return model.state_dict()


def same(model, state):
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_safetensors(tmp_path, state):
    save_file(state, tmp_path / "w.safetensors")
    model = net()
    load_weights(model, tmp_path / "w.safetensors")
    assert same(model, state)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_torch_files_plain_or_nested(tmp_path, state, wrap, suffix):
    torch.save(wrap(state), tmp_path / f"w{suffix}")
    model = net()
    load_weights(model, tmp_path / f"w{suffix}")
    assert same(model, state)


def test_prefix_of_data_parallel_is_dropped(tmp_path, state):
    save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / "w.safetensors")
    model = net()
    load_weights(model, tmp_path / "w.safetensors")
    assert same(model, state)


def test_batch_counters_may_be_missing(tmp_path, state):
    del state["1.num_batches_tracked"]
    save_file(state, tmp_path / "w.safetensors")
    load_weights(net(), tmp_path / "w.safetensors")


def test_misfits_are_listed_with_the_nearest_and_nothing_is_loaded(tmp_path, state):
    state["head.weight"] = state.pop("3.weight")
    state["3.biass"] = state.pop("3.bias")
    state["0.weight"] = torch.zeros(2, 3, 3, 3)
    save_file(state, tmp_path / "w.safetensors")
    model, before = net(), net().state_dict()
    with pytest.raises(UserError) as e:
        load_weights(model, tmp_path / "w.safetensors")
    assert "does not fit Sequential: 2 missing ('3.weight', '3.bias'" in str(e.value)
    assert "2 unexpected ('3.biass', 'head.weight')" in str(e.value)
    assert "1 of another shape ('0.weight' is (2, 3, 3, 3) in the file, (2, 1, 3, 3) in the" in str(
        e.value
    )
    assert same(model, before)


def test_nearest_name_is_offered(tmp_path, state):
    state["linear.weight"] = state.pop("3.weight")
    save_file(
        {k.replace("3.bias", "33.bias"): v for k, v in state.items()}, tmp_path / "w.safetensors"
    )
    model = net()
    with pytest.raises(UserError, match=r"nearest in the file: 'linear\.weight'"):
        load_weights(model, tmp_path / "w.safetensors")


def test_a_pickled_module_is_refused_and_not_run(tmp_path):
    torch.save(net(), tmp_path / "w.pt")
    with pytest.raises(UserError, match="can be read without running code from it"):
        load_weights(net(), tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", b"abc", "not a safetensors file"),
        ("w.pt", b"abc", "not a file of tensors"),
        ("w.json", b"{}", "must be a .safetensors, .pt, .pth or .bin file"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_weights(net(), tmp_path / name)


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3, "note": json.dumps([1])}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="no state dict in it"):
        load_weights(net(), tmp_path / "w.pt")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_weights(net(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        load_weights(net(), tmp_path)
