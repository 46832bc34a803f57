"""What a convolution of one bit costs in OpenVINO: one 3x3 layer with ReLU, of several widths.

Batch 1, f32 hint, one thread, random weights, all three in interleaved rounds: float, INT8 after
training (`ptq`), and weights and input of one bit (`quantize: binary`) in BinaryConvolution.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cell import ROUNDS, Cell, Values, latency, ratio, template
from benchmarks.networks import inputs, proven
from gracile import Recipe, Result, Session
from gracile.benchmark.runtimes.base import load
from gracile.benchmark.timing import measure as measure_rounds

NAME = "one_bit"
WIDTHS = ((16, 32), (64, 56), (128, 28), (256, 14), (512, 7))  # channels, places
METHODS: dict[str, dict[str, Any]] = {
    "float": {},
    "8 bits": {"q": {"quantize": "ptq", "when": {"at": "end"}}},
    "one bit": {"q": {"quantize": "binary", "weights": "layer.weight", "when": {"start": "0ep"}}},
}


class Layer(nn.Module):
    """One convolution, as wide out as in."""

    def __init__(self, width: int):
        super().__init__()
        self.layer = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, width, H, W) -> the same shape."""
        return F.relu(self.layer(x))


def cells() -> Iterator[Cell]:
    """A cell for each width."""
    for width, places in WIDTHS:
        name, shape = f"{width} channels, {places} x {places}", (1, width, places, places)
        facts = {"runtime": "openvino", "batch": 1, "shape": shape, "precision_hint": "f32"}
        records = [template(NAME, name, "latency_ms", "ms", v, **facts) for v in METHODS]
        records += [template(NAME, name, "ratio", "ratio", f"{v} / float", **facts) for v in RATIOS]
        yield Cell(NAME, name, "full", tuple(records), partial(measure, width, places))


RATIOS = tuple(v for v in METHODS if v != "float")


def measure(width: int, places: int) -> Values:
    """Quantize, prove and time all three."""
    x = inputs((width, places, places), 4)
    with tempfile.TemporaryDirectory() as folder:
        loaded = {
            v: load(
                proven(quantized(width, x, v), "openvino", Path(folder) / str(k), x),
                threads=1, hint="f32", batch=1,
            )
            for k, v in enumerate(METHODS)
        }  # fmt: skip
        t = measure_rounds(
            loaded, dict.fromkeys(METHODS, 1), rounds=ROUNDS, warmup=5, min_round_ms=50.0
        )
    found = {("latency_ms", v): latency(t[v]) for v in METHODS}
    return {**found, **{("ratio", f"{v} / float"): ratio(t[v], t["float"]) for v in RATIOS}}


def quantized(width: int, x: torch.Tensor, variant: str) -> Result:
    """The layer with one method; a single step of training, for methods that need one."""
    torch.manual_seed(0)
    model = Layer(width)
    recipe = Recipe.build(methods=METHODS[variant], train={"epochs": 1})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    session = Session(
        model, recipe, optimizer, example=x[:2], steps_per_epoch=1, calibration=[x],
        profile="openvino",
    )  # fmt: skip
    with session.epoch():
        session.model.train()
        session.loss(session.model(x).square().mean()).backward()
        session.step()
    result = session.finish()
    result.model.eval()
    return result
