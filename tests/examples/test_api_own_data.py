import argparse
import subprocess
import sys

import pytest
import torch
from torch import nn

import gracile
from gracile.api import _First

PTQ = {"int8": {"quantize": "ptq", "when": {"at": "end"}}}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


def batches(n=3, size=8):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 3, 8, 8, generator=g), torch.arange(size) % 4) for _ in range(n)]


def arguments(tmp_path, *more, **sections):
    path = tmp_path / "recipe.yaml"
    gracile.Recipe.build(**sections).save(path)
    parser = argparse.ArgumentParser()
    gracile.add_arguments(parser)
    return parser.parse_args(["--recipe", str(path), "--out", str(tmp_path / "out"), *more])


@pytest.mark.parametrize(("count", "sizes"), [(20, [8, 8, 4]), (8, [8]), (3, [3]), (99, [8, 8, 8])])
def test_calibration_takes_so_many_images(count, sizes):
    assert [len(x) for x in _First(batches(), count)] == sizes


def test_calibration_can_be_read_twice():
    first = _First(batches(), 20)
    assert [x.sum() for x in first] == [x.sum() for x in first]


def test_rows_cannot_be_named_in_a_loader_of_ones_own(tmp_path):
    args = arguments(tmp_path, methods=PTQ, data={"calibration": "train[:100]"})
    with pytest.raises(gracile.GracileError, match=r"train\[:100\].*give a count"):
        gracile.session_from(args, net(), None, batches())


def test_a_loader_without_a_length_is_refused(tmp_path):
    args = arguments(tmp_path, methods=PTQ)
    with pytest.raises(gracile.GracileError, match="must have a length"):
        gracile.session_from(args, net(), None, iter(batches()))


def test_batches_of_one_are_refused(tmp_path):
    args = arguments(tmp_path, methods=PTQ)
    with pytest.raises(gracile.GracileError, match="at least 2 samples, the loader gives 1"):
        gracile.session_from(args, net(), None, batches(size=1))


def test_one_runtime_chooses_the_profile_and_two_the_portable_one(tmp_path):
    def profile(*more):
        args = arguments(tmp_path, *more, methods=PTQ)
        return gracile.session_from(args, net(), None, batches()).profile

    assert profile() == "portable"
    assert profile("--runtime", "openvino") == "openvino"
    assert profile("--runtime", "openvino:CPU", "--runtime", "pytorch") == "openvino"
    assert profile("--runtime", "openvino", "--runtime", "onnxruntime") == "portable"


def test_finish_saves_and_exports_what_compress_returns(tmp_path):
    args = arguments(tmp_path, "--runtime", "onnxruntime", methods=PTQ)
    result = gracile.finish(args, gracile.session_from(args, net(), None, batches()))
    assert (args.out / "export" / "onnxruntime" / "model.onnx").exists()
    model = net()
    again = gracile.compress(
        model, gracile.recipe_from(args), example=batches()[0][0][:2], train=batches()
    )
    assert again.plan.to_json() == result.plan.to_json()
    for name, tensor in result.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor, rtol=0, atol=0)


def test_the_verbs_are_not_hidden_by_the_rooms_of_the_same_names():
    code = (
        "import gracile.export.onnx, gracile.benchmark.timing, gracile\n"
        "from gracile.export import parity\n"
        "assert callable(gracile.export) and callable(gracile.benchmark)\n"
        "gracile.compress\n"
        "assert callable(gracile.export) and parity.__name__ == 'gracile.export.parity'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
