"""Low rank: layers become chains of smaller ones, a few at a time, with training in between."""

from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import Field
from torch import Tensor

from gracile import registry
from gracile.analyze.responses import is_followed
from gracile.core import method as core
from gracile.core.plan import Factorize
from gracile.core.schedule import When
from gracile.errors import UserError
from gracile.graph.factorize import refusal
from gracile.graph.graph import Node
from gracile.lowrank.layerwise import LayerByLayer, module_of, path_of, size_of
from gracile.lowrank.reconstruct import reconstruct
from gracile.lowrank.rounding import rounded_up
from gracile.lowrank.scheme import factorize, fixed_of, needs_of
from gracile.nn.chain import Layer, Size, layer_of
from gracile.nn.schemes import chain_of, full_ranks
from gracile.recipe.fields import KernelRef, Selector, kernel

PERIOD = 8  # channels of a vector
SUMS = ("gram", "cross")


class FactorizeOptions(core.Options):
    """Options of `lowrank: factorize`.

    Attributes:
        weights: of the layers; default all that the scheme takes.
        scheme: how a layer becomes smaller ones, a registered factorizer.
        rank: how small, a registered rank rule.
        round_to: ranks are rounded up to multiples of this; default 8 where they count channels.
        fit: fit the factors to what the layer gave in the original network, over calibration data.
        when: the firings; over several of them layers are factorized in equal parts, in the order
            of the network.
    """

    weights: Selector | None = None
    scheme: KernelRef("factorizer") = Field(default_factory=lambda: kernel("factorizer", "svd"))  # type: ignore[valid-type]
    rank: KernelRef("rank_rule") = Field(default_factory=lambda: kernel("rank_rule", "macs"))  # type: ignore[valid-type]
    round_to: int | None = Field(default=None, ge=1)
    fit: bool = False
    when: When


@core.method(
    "lowrank",
    "factorize",
    source="Denton et al. 2014, arXiv:1404.0736; Kim et al. 2016, arXiv:1511.06530; in turns with "
    "training: Gusak et al. 2019, arXiv:1903.09973",
)
class Factorization(LayerByLayer):
    """Replace layers by products of smaller ones."""

    Options = FactorizeOptions

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        if options.fit or set(needs_of(options.scheme.name)) & set(SUMS):
            self.needs = frozenset({"calibration", "teacher"})

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        modules = dict(s.model.named_modules())
        for edit in edits:
            if edit.kind == "factorize" and edit.by == self.id and edit.at in modules:
                layers = [m for m in modules[edit.at].children() if hasattr(m, "weight")]
                for k in fixed_of(edit.scheme):
                    layers[k].weight.requires_grad_(False)

    @property
    def doing(self) -> str:
        """For messages."""
        return f"factorized by '{self.options.scheme.name}'"

    def unsupported(self, s: Any, node: Node) -> str | None:
        path = path_of(node.params["weight"])
        if (why := refusal(s.model, path)) is not None:
            return why
        try:
            full_ranks(self.options.scheme.name, layer_of(s.model.get_submodule(path)))
        except UserError as e:
            return str(e)
        if self.needs and not is_followed(node):
            return "its padding or number of axes cannot be followed over data"
        return None

    def change(self, s: Any, address: str, node: Node) -> None:
        o, scheme, path = self.options, self.options.scheme.name, path_of(address)
        layer = layer_of(module_of(s, address))
        size = size_of(s, node, layer)
        weight = s.overlays.effective(address, upto="mask").detach()
        try:
            ranks = self._ranks(weight, layer, size)
        except UserError as e:
            self.kept(s, address, str(e))
            return
        chain = chain_of(scheme, layer, ranks)
        if chain.macs(size) >= layer.macs(size):
            why = f"{_spelled(ranks)} would need {chain.macs(size):,} of {layer.macs(size):,} MACs"
            self.kept(s, address, why)
            return
        sums = self.sums(s, node, weight) if self.needs else {}
        evidence = {**sums, "generator": s.generator(self.id, address)}
        factors = factorize(scheme, weight, layer, ranks, evidence, **o.scheme.options)
        if o.fit:
            factors = reconstruct(chain, factors, layer, sums["gram"], sums["cross"])
        edit = Factorize(by=self.id, at=path, scheme=scheme, ranks=ranks)
        s.apply([edit], factors={path: factors})

    def _ranks(self, weight: Tensor, layer: Layer, size: Size) -> tuple[int, ...]:
        o, scheme = self.options, self.options.scheme.name
        ranks: tuple[int, ...] = o.rank.fn(weight, layer, scheme, size)
        channels = registry.get("factorizer", scheme).meta["matrices"] is not None
        period = o.round_to or (PERIOD if channels else 1)
        return rounded_up(ranks, full_ranks(scheme, layer), period) if period > 1 else ranks


def _spelled(ranks: Sequence[int]) -> str:
    return f"rank {', '.join(str(r) for r in ranks)}"
