"""The networks that are timed: random weights, made by gracile's own recipes, one seed.

Batch norms get the statistics of random images: without them a deep random network's activations
fade to nothing, and quantizing nothing is no test of a runtime.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gracile import Recipe, Result, Session, registry, resolve_model
from gracile.benchmark.artifact import Artifact
from gracile.benchmark.runtimes.base import load
from gracile.core.plan import Architecture, Plan
from gracile.export import parity

SHAPES = {
    "resnet20_cifar_a": (3, 32, 32),
    "mobilenet_v2": (3, 224, 224),
    "resnet50": (3, 224, 224),
}
_AT_END = {"when": {"at": "end"}}
_HALF = {
    "filters": {
        "prune": "oneshot",
        "weights": "type:Conv2d",
        "criterion": "l1",
        "granularity": "filter",
        "sparsity": 0.5,
        **_AT_END,
    },
    "thin": {"prune": "thin", **_AT_END},
}
_ZEROS = {
    "weights": {
        "prune": "oneshot",
        "weights": ["type:Conv2d", "type:Linear"],
        "criterion": "l1",
        "granularity": "element",
        "sparsity": 0.9,
        **_AT_END,
    }
}
_INT8 = {"int8": {"quantize": "ptq", **_AT_END}}
METHODS: Mapping[str, dict[str, object]] = {
    "dense": {},
    "half": _HALF,
    "int8": _INT8,
    "half int8": {**_HALF, **_INT8},
    "90 % zeros": _ZEROS,
}


def fresh(name: str) -> nn.Module:
    """The network with weights of seed 0, in training mode."""
    torch.manual_seed(0)
    return resolve_model(name).model


def normalized(model: nn.Module, x: Tensor) -> nn.Module:
    """Set the statistics of all batch norms to those of a batch, in place; then eval mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return model.eval()


def inputs(shape: tuple[int, ...], batch: int) -> Tensor:
    """Standard normal images of seed 0."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


def compressed(name: str, variant: str, profile: str) -> Result:
    """One variant of a network; nothing is trained, ranges come from 8 random images."""
    x = inputs(SHAPES[name], 8)
    model, methods = normalized(fresh(name), x), METHODS[variant]
    if not methods:
        return Result(model, Plan(architecture=Architecture(name=name)))
    recipe = Recipe.build(methods=methods)
    return Session(model, recipe, example=x[:2], calibration=[x], profile=profile).finish()


def written(result: Result, runtime: str, path: Path, x: Tensor) -> Artifact:
    """Export, and prove nothing."""
    write = registry.get("exporter", runtime).obj
    artifact: Artifact = write(result.model, result.plan, result.tensors, x, path, {})
    return artifact


def proven(result: Result, runtime: str, path: Path, x: Tensor) -> Artifact:
    """Export, and prove every unit alone.

    The outputs are not compared: a deep network of random weights blows the rounding of single
    values up over its layers, which says nothing about the artifact.

    Raises:
        ParityError: a unit computes something else.
    """
    artifact = written(result, runtime, path, x)
    report = parity.check(result.model, load(artifact), x, precision=artifact.precision)
    if report.first_bad is not None:
        parity.require(report, result.plan)
    return artifact


class Chain(nn.Module):
    """Four 3x3 convolutions with ReLU, all of one width, for the cost of a width.

    Args:
        width: channels in and out of each.
    """

    def __init__(self, width: int):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(4):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) -> the same shape."""
        out: Tensor = self.layers(x)
        return out
