"""The part of a quantizing method that chooses bits: curvature, rounding errors, the program."""

import math
from abc import ABC, abstractmethod
from collections.abc import Generator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gracile.core.method import Method
from gracile.graph.graph import Graph
from gracile.quantize.bits import BitMap, with_bits
from gracile.quantize.placement import Placement, WeightSpec
from gracile.quantize.precision import Precision, Search, positive, read_table
from gracile.quantize.sensitivity import fisher_traces, hessian_traces, perturbation


class Choosing(Method, ABC):
    """Base of `Quantizer`, which says where quantizers go and what their grids are.

    Attributes:
        placement: all quantizers; None before the method is attached.
        chosen: bits by `precision`; empty before they are chosen.
    """

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        self.placement: Placement | None = None
        self.chosen = BitMap()

    @property
    def asked(self) -> Precision | None:
        """How bits are to be chosen; None where they are given, or there is nothing to choose."""
        found: Precision | None = getattr(self.options, "precision", None)
        return found

    # --- what a quantizer says

    @abstractmethod
    def rounded(self, weight: Tensor, spec: WeightSpec) -> Tensor:
        """A weight on the grid it would have."""

    def moved(self, weight: Tensor, spec: WeightSpec) -> float:
        """||Q(W) - W||^2 for the grid a weight would have."""
        return perturbation(weight, self.rounded(weight, spec))

    @abstractmethod
    def _placed(self, s: Any) -> Placement:
        """All quantizers, with the same bits everywhere."""

    @abstractmethod
    def _graph(self, s: Any) -> Graph:
        """The graph that quantizers are placed on."""

    @abstractmethod
    def _place(self, s: Any) -> Placement:
        """All quantizers with the bits of each."""

    @abstractmethod
    def _fixed(self, s: Any, placement: Placement) -> BitMap:
        """Bits that the recipe gives single layers and activations."""

    # --- what it asks

    def refuse_impossible_precision(self, s: Any) -> None:
        """Before any training: look whether the limits of `precision` can be kept to.

        Raises:
            BindError: they cannot; names the smallest that can.
        """
        if self.asked is not None:
            self._search(s).refuse_the_impossible()

    def choose_precision(self, s: Any) -> None:
        """Choose what `precision` asks for, of the network as it is now.

        Raises:
            BindError: no labelled calibration data, or no loss.
        """
        if self.asked is not None:
            self.chosen = self._choose(s)

    # --- inside

    def _search(self, s: Any) -> Search:
        placement = self._placed(s)
        p = self.asked
        assert p is not None
        table = read_table(p.table, s.recipe.path) if p.table is not None else None
        fixed = self._fixed(s, placement)
        return Search(p, with_bits(placement, fixed), self._graph(s), s.model, fixed, table)

    def _choose(self, s: Any) -> BitMap:
        """Bits within the limit that cost the loss least, of the network as it is now."""
        p, search = self.asked, self._search(s)
        assert p is not None
        curvature = self._curvature(s, [u.address for u in search.units if u.free])
        by_bits = {w: self._all_moved(s, w) for w in {w for w, _ in p.choices(self.options.bits)}}
        losses = [
            [curvature[u.address] * by_bits[w][u.address] if u.free else 0.0 for w, _ in u.choices]
            for u in search.units
        ]
        chosen = search.best(losses)
        for unit, costs, k in zip(search.units, losses, chosen, strict=True):
            if unit.free:
                others = ", ".join(
                    f"{w} bits {costs[i]:.2g}" for i, (w, _) in enumerate(unit.choices)
                )
                why = f"{unit.choices[k][0]} bits chosen; sensitivity at {others}"
                s.note(unit.address, "precision", None, None, why, self.id)
        return search.bits(chosen)

    def _all_moved(self, s: Any, bits: int) -> dict[str, float]:
        """||Q(W) - W||^2 of every weight with so many bits."""
        assert self.placement is not None
        before = self.chosen
        self.chosen = BitMap(dict.fromkeys((w.address for w in self.placement.weights), bits))
        with torch.no_grad():
            out = {
                spec.address: self.moved(
                    s.overlays.effective(spec.address, upto="share").detach(), spec
                )
                for spec in self._place(s).weights
            }
        self.chosen = before
        return out

    def _curvature(self, s: Any, addresses: list[str]) -> dict[str, float]:
        """Mean curvature of the loss for each weight, above 0 where it is anywhere."""
        p = self.asked
        assert p is not None
        weights = {a: s.parameter(a) for a in addresses}

        def losses(at_a_time: int | None = None) -> Generator[tuple[Tensor, int]]:
            left = p.samples or math.inf
            for loss, images in s.losses(self, at_a_time=at_a_time):
                yield loss, images
                left -= images
                if left <= 0:
                    return

        found: dict[str, float] = {}
        if p.sensitivity == "hessian":
            g = s.generator(self.id, "hutchinson")
            try:
                found = hessian_traces(
                    losses, weights, generator=g, rounds=p.rounds, tolerance=p.tolerance
                )
            except RuntimeError as e:
                why = f"this network cannot be differentiated twice ({str(e).splitlines()[0]})"
            else:
                why = "no weight's Hessian has a positive trace"
        if not any(v > 0 for v in found.values()):
            if p.sensitivity == "hessian":
                s.warn(
                    "precision-fisher",
                    f"'{self.id}': {why}, so the squared gradients of the empirical Fisher matrix "
                    "stand for it.",
                )
            found = fisher_traces(partial(losses, 1), weights)
        found, wrong = positive(found)
        if wrong and p.sensitivity == "hessian":
            s.warn(
                "precision-flat",
                f"'{self.id}': the Hessian's trace of {wrong[0]} (of {len(wrong)} weights) is not "
                "positive; it counts as much as the smallest that is. The network is far from a "
                "minimum, or samples are few: raise rounds, or write sensitivity: fisher.",
            )
        return found
