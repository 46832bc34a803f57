"""Every way to find a range and to make a grid of it, exported: the runtimes compute the same."""

import pytest
import torch
from small_nets import ResNet, as_if_trained, export, load

from gracile.export import parity
from gracile.recipe.build import quantize
from gracile.recipe.schema import Recipe
from gracile.train.session import Session

GRIDS = [
    {"observer": "kl", "zero": "tune"},
    {"observer": "histogram", "weight_observer": "mse", "weight_bits": 4, "symmetric": True},
    {"observer": "aciq", "scale": "power_of_two", "zero": "tune", "symmetric": False},
]


def batches():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 16, 16, generator=g) for _ in range(2)]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: "-".join(str(v) for v in g.values()))
def test_both_runtimes_keep_parity(grid, tmp_path):
    torch.manual_seed(0)
    x = batches()[0]
    recipe = Recipe.build(methods={"int8": quantize("ptq", **grid)})
    session = Session(as_if_trained(ResNet()), recipe, example=x[:2], calibration=batches())
    result = session.finish()
    if grid.get("scale") == "power_of_two":
        scales = [v for k, v in result.tensors.items() if k.endswith(".scale")]
        assert all((torch.frexp(s).mantissa == 0.5).all() for s in scales)
    for runtime in ("onnxruntime", "openvino"):
        artifact = export(runtime, result.model, result.plan, result.tensors, x, tmp_path / runtime)
        assert artifact.precision == "int8"
        parity.require(parity.check(result.model, load(artifact), x), result.plan)
