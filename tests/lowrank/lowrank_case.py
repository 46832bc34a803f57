"""Layers of every geometry, their factorized forms, and how far apart they are."""

from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor, nn

from gracile.errors import UserError
from gracile.lowrank.scheme import factorize, needs_of
from gracile.nn.chain import build, layer_of
from gracile.nn.schemes import chain_of, full_ranks

LAYERS = {
    "linear": lambda: nn.Linear(7, 5),
    "wide linear without bias": lambda: nn.Linear(4, 9, bias=False),
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    "uneven": lambda: nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(0, 2)),
    "dilated": lambda: nn.Conv2d(4, 6, 3, padding=(2, 3), dilation=(2, 3)),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(8, 4, 3, stride=(1, 2), padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "pointwise": lambda: nn.Conv2d(6, 4, 1, stride=2),
    "conv1d": lambda: nn.Conv1d(4, 6, 5, stride=2, padding=1, dilation=2),
}


def made(kind: str) -> nn.Module:
    """The layer of a kind, always with the same weights."""
    torch.manual_seed(0)
    return LAYERS[kind]().double()


def seen(module: nn.Module, n: int = 2) -> Tensor:
    """An input of it."""
    layer, rng = layer_of(module), torch.Generator().manual_seed(1)
    size = (n, layer.inputs, *(11, 12)[: len(layer.kernel)])
    return torch.randn(size, generator=rng, dtype=torch.float64)


def taken(schemes: Iterable[str]) -> list[tuple[str, str]]:
    """(scheme, kind) of all layers that each scheme takes."""
    out = []
    for scheme in schemes:
        for kind in LAYERS:
            with suppress(UserError):
                full_ranks(scheme, layer_of(made(kind)))
                out.append((scheme, kind))
    return out


def evidence(module: nn.Module) -> dict[str, object]:
    """All that a scheme may need, inputs being unequal."""
    layer, rng = layer_of(module), torch.Generator().manual_seed(2)
    size = layer.inputs // layer.groups * layer.area
    x = torch.randn(layer.groups, 4 * size, size, generator=rng, dtype=torch.float64)
    x = x * torch.linspace(0.2, 2.0, size, dtype=torch.float64)
    weight = module.weight.detach().double().reshape(layer.groups, -1, size)
    gram = x.mT @ x
    return {"gram": gram, "cross": gram @ weight.mT, "generator": rng}


def factorized(module: nn.Module, scheme: str, ranks=None, **options) -> nn.Sequential:
    """The chain in its place, full ranks by default."""
    layer = layer_of(module)
    ranks = full_ranks(scheme, layer) if ranks is None else ranks
    given = {n: v for n, v in evidence(module).items() if n in needs_of(scheme)}
    factors = factorize(scheme, module.weight, layer, ranks, given, **options)
    return build(chain_of(scheme, layer, ranks), factors, module.bias)


def apart(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """Relative difference of what two modules give."""
    with torch.no_grad():
        return float((a(x) - b(x)).norm() / a(x).norm())
