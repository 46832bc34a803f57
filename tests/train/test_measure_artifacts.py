"""A run directory is timed in every runtime that it was exported to."""

import pytest
import torch
from torch import nn

import gracile
from gracile.train.measure import measure


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "ncnn", "litert"])
def test_the_artifacts_of_a_run_are_found_whatever_they_are(runtime, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for which in ("dense", "compressed"):
        folder = tmp_path / "export" / runtime / which
        gracile.export(net.eval(), runtime, folder, example=torch.randn(2, 3, 8, 8))
    records = measure([tmp_path], rounds=5)
    (ratio,) = (r for r in records if r.metric == "speedup")
    assert (ratio.runtime, ratio.subject["model"]) == (runtime, "compressed")
