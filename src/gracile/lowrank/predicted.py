"""Milliseconds of layers and of what may stand for them, each by itself, from a table."""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from gracile.errors import UserError
from gracile.latency.predict import Predictor
from gracile.latency.replacement import program, replacement_ms
from gracile.lowrank.faster import Faster
from gracile.nn.chain import Chain, Layer, build, drawn

Shape = tuple[int, ...]


class Predicted:
    """What layers take, for rules that weigh one layer's time against another's.

    A layer is exported without what stands around it, so that a network of n layers with m
    candidates each costs n x m small exports, not as many of the whole; what is chosen is compared
    once more in the network (`Faster`).

    Args:
        faster: whose table is asked, and added to where it may measure.
    """

    def __init__(self, faster: Faster):
        self.faster = faster
        self._known: dict[tuple[Layer, tuple[Chain, ...], Shape], list[float]] = {}

    def ms(self, layer: Layer, chains: Sequence[Chain], shape: Shape) -> list[float]:
        """The layer's time and that of each chain; infinite where the table cannot tell.

        Args:
            layer, chains: what may stand for it.
            shape: of the layer's input, batch first.
        """
        key = layer, tuple(chains), shape
        if key not in self._known:
            self._known[key] = self._asked(layer, chains, shape)
        return self._known[key]

    def _asked(self, layer: Layer, chains: Sequence[Chain], shape: Shape) -> list[float]:
        times, measuring = self.faster.times, self.faster.measuring
        x = torch.zeros(shape, dtype=torch.long if layer.lookup else torch.float32)
        whole, known = _module(Chain((layer,))), len(times.points)
        gains: list[float | None] = []
        for chain in chains:
            gains.append(None)
            with suppress(UserError):
                before, after = replacement_ms(whole, _module(chain), x, times, measuring=measuring)
                gains[-1] = after.ms - before.ms
        if len(times.points) > known:
            self.faster.table.save(self.faster.path)
        units = [("", unit) for unit in program(whole, x, times.setting)[1].elements()]
        ms = Predictor(times).network(units).sum_ms
        return [ms, *(float("inf") if g is None else max(0.0, ms + g) for g in gains)]


def _module(chain: Chain) -> torch.nn.Module:
    factors: tuple[Tensor, ...] = drawn(chain, torch.Generator().manual_seed(0))
    return build(chain, factors)
