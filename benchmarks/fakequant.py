"""gracile's fake quantization against torch's kernels: forward and backward, side by side."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.cell import Cell, Values, latency, ratio, side_by_side, template
from gracile.nn.rounding import fake_quantize

NAME = "fakequant"


@dataclass(frozen=True)
class Case:
    """A tensor as it occurs in training: an activation per tensor, a weight per channel."""

    name: str
    shape: tuple[int, ...]
    axis: int | None
    qmin: int
    qmax: int


CASES = (
    Case("activation, ResNet-20, batch 128", (128, 16, 32, 32), None, 0, 255),
    Case("activation, ResNet-50, batch 2", (2, 256, 56, 56), None, 0, 255),
    Case("weight 64x64x3x3", (64, 64, 3, 3), 0, -127, 127),
    Case("weight 512x512x3x3", (512, 512, 3, 3), 0, -127, 127),
)


def cells() -> Iterator[Cell]:
    """A cell for each case."""
    for case in CASES:
        make = partial(template, NAME, case.name, shape=case.shape)
        records = (
            make("latency_ms", "ms", "gracile"),
            make("latency_ms", "ms", "torch"),
            make("ratio", "ratio", "gracile / torch"),
        )
        yield Cell(NAME, case.name, "smoke", records, partial(measure, case))


def measure(case: Case) -> Values:
    """Time both rules, forward and backward."""
    steps = {"gracile": step(ours, case), "torch": step(theirs, case)}
    t = side_by_side(steps, min_round_ms=50.0)
    found = {("latency_ms", name): latency(x) for name, x in t.items()}
    return {**found, ("ratio", "gracile / torch"): ratio(t["gracile"], t["torch"])}


def ours(x: Tensor, scale: Tensor, zero_point: Tensor, case: Case) -> Tensor:
    """gracile's rule."""
    return fake_quantize(x, scale, zero_point, case.qmin, case.qmax, case.axis)


def theirs(x: Tensor, scale: Tensor, zero_point: Tensor, case: Case) -> Tensor:
    """torch's kernels."""
    if case.axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, case.qmin, case.qmax)
    return torch.fake_quantize_per_channel_affine(
        x, scale, zero_point, case.axis, case.qmin, case.qmax
    )


def arguments(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scale and zero point: standard normal values, a few in a thousand clipped."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.shape, generator=generator)
    channels = () if case.axis is None else (case.shape[case.axis],)
    scale = torch.full(channels, 6.0 / (case.qmax - case.qmin))
    zero = 128 if case.qmin == 0 else 0
    return x, scale, torch.full(channels, zero, dtype=torch.int32)


def step(rule: Callable[..., Tensor], case: Case) -> Callable[[], None]:
    """One forward and backward."""
    x, scale, zero_point = arguments(case)
    x.requires_grad_(True)
    gradient = torch.ones_like(x)

    def run() -> None:
        x.grad = None
        rule(x, scale, zero_point, case).backward(gradient)

    return run
