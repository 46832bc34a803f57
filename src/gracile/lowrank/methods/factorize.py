"""Low rank: layers become chains of smaller ones, a few at a time, with training in between."""

from collections.abc import Iterable, Sequence
from typing import Any, Self

from pydantic import Field, model_validator
from torch import Tensor

from gracile import registry
from gracile.analyze.responses import is_followed
from gracile.core import method as core
from gracile.core.plan import Factorize
from gracile.core.schedule import When
from gracile.errors import UserError
from gracile.graph.factorize import refusal
from gracile.graph.graph import Node
from gracile.lowrank.candidates import Ranks, work
from gracile.lowrank.factorizers.svd import svd_matrices
from gracile.lowrank.factorizers.svd_data import whitened
from gracile.lowrank.faster import Faster, LatencyTable
from gracile.lowrank.layers import path_of, size_of, sums, weight_of
from gracile.lowrank.layerwise import LayerByLayer
from gracile.lowrank.reconstruct import reconstruct
from gracile.lowrank.rounding import rounded_up
from gracile.lowrank.scheme import factorize, fixed_of, needs_of
from gracile.lowrank.together import Together
from gracile.nn.chain import Layer, Size, layer_of
from gracile.nn.schemes import chain_of, full_ranks
from gracile.recipe.fields import KernelRef, Selector, kernel
from gracile.recipe.messages import FieldError

PERIOD = 8  # channels of a vector
SUMS = ("gram", "cross")
BY_VALUES = ("energy", "evbmf")  # rules that look at singular values


class FactorizeOptions(core.Options):
    """Options of `lowrank: factorize`.

    Attributes:
        weights: of the layers; default all that the scheme takes.
        scheme: how a layer becomes smaller ones, a registered factorizer.
        rank: how small, a registered rank rule.
        round_to: ranks are rounded up to multiples of this; default 8 where they count channels.
        whitened: rules by singular values look at those of the layer's responses on calibration
            data, not at those of its weight; for the schemes svd, svd_data and svd_response.
        latency: a table of `gracile latency measure`; a layer whose factors it does not predict to
            be faster stays whole. `gracile.lowrank.faster.LatencyRef` has its keys.
        fit: fit the factors to what the layer gave in the original network, over calibration data.
        when: the firings; over several of them layers are factorized in equal parts, in the order
            of the network.
    """

    weights: Selector | None = None
    scheme: KernelRef("factorizer") = Field(default_factory=lambda: kernel("factorizer", "svd"))  # type: ignore[valid-type]
    rank: KernelRef("rank_rule") = Field(default_factory=lambda: kernel("rank_rule", "macs"))  # type: ignore[valid-type]
    round_to: int | None = Field(default=None, ge=1)
    whitened: bool = False
    fit: bool = False
    latency: LatencyTable | None = None
    when: When

    @model_validator(mode="after")
    def _table(self) -> Self:
        if self.rank.options.get("of") == "latency" and self.latency is None:
            raise FieldError("rank: of: latency needs a table. Write latency: FILE.")
        return self

    @model_validator(mode="after")
    def _whitened(self) -> Self:
        one_matrix = registry.get("factorizer", self.scheme.name).meta["matrices"] is svd_matrices
        if self.whitened and not (self.rank.name in BY_VALUES and one_matrix):
            raise FieldError(
                "whitened is for the rules energy and evbmf with the schemes svd, svd_data and "
                f"svd_response, got rule {self.rank.name} and scheme {self.scheme.name}. Leave it "
                "out."
            )
        return self


@core.method(
    "lowrank",
    "factorize",
    source="Denton et al. 2014, arXiv:1404.0736; Kim et al. 2016, arXiv:1511.06530; in turns with "
    "training: Gusak et al. 2019, arXiv:1903.09973",
)
class Factorization(LayerByLayer):
    """Replace layers by products of smaller ones."""

    Options = FactorizeOptions
    rewires = True

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        o, scheme = options, options.scheme.name
        channels = registry.get("factorizer", scheme).meta["matrices"] is not None
        self.period: int = o.round_to or (PERIOD if channels else 1)
        joint = registry.get("rank_rule", o.rank.name).meta["joint"]
        self.together = Together(self, o.scheme, o.rank, self.period) if joint else None
        # whether layers are factorized, or ranks are chosen, by what layers read
        self.fitted = o.fit or bool(set(needs_of(scheme)) & set(SUMS))
        looks = self.together is not None and self.together.by == "responses"
        self.looks = self.fitted or o.whitened or looks
        if self.looks or joint:
            self.needs = frozenset({"calibration", "teacher"})

    def on_attach(self, s: Any) -> None:
        ref = self.options.latency
        self.faster = None if ref is None else Faster(ref, s.recipe.path)
        self.ranks: dict[str, Ranks | None] | None = None  # what a rule for all layers chose
        super().on_attach(s)
        if self.together is not None:
            self.together.check(s, self.chosen, self.faster)

    def on_fire(self, s: Any, progress: float) -> None:
        if self.together is not None and self.ranks is None:
            self.ranks = self._together(s, self.together)
        super().on_fire(s, progress)

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        modules = dict(s.model.named_modules())
        for edit in edits:
            if edit.kind == "factorize" and edit.by == self.id and edit.at in modules:
                parts = [m for m in modules[edit.at].children() if hasattr(m, "weight")]
                for k in fixed_of(edit.scheme):
                    parts[k].weight.requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ranks": self.ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        ranks = state["ranks"]
        if ranks is not None:
            self.ranks = {a: None if r is None else tuple(r) for a, r in ranks.items()}

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
        if self.looks and not is_followed(node):
            return "what it reads, its padding or its axes, cannot be followed over data"
        return None

    def change(self, s: Any, address: str, node: Node) -> None:
        o, scheme, path = self.options, self.options.scheme.name, path_of(address)
        layer = layer_of(s.model.get_submodule(path))
        size, weight = size_of(s, node, layer), weight_of(s, address)
        seen: dict[str, Tensor] = {}
        if o.whitened:
            ((_, seen),) = sums(s, self, [address])
        try:
            ranks = self._ranks(address, weight, layer, size, seen)
            chain = chain_of(scheme, layer, ranks)
        except UserError as e:
            self.kept(s, address, str(e))
            return
        if work(chain, size) >= work(layer, size):
            what = "parameters" if layer.lookup else "MACs"
            why = f"{_spelled(ranks)} would need {work(chain, size):,} of {work(layer, size):,} "
            self.kept(s, address, why + what)
            return
        if self.fitted and not seen:
            ((_, seen),) = sums(s, self, [address])
        evidence = {**seen, "generator": s.generator(self.id, address)}
        factors = factorize(scheme, weight, layer, ranks, evidence, **o.scheme.options)
        if o.fit:
            factors = reconstruct(chain, factors, layer, seen["gram"], seen["cross"])
        edit = Factorize(by=self.id, at=path, scheme=scheme, ranks=ranks)
        if self.faster is not None:
            slower = self.faster.verdict(s, [edit], {path: factors})
            if slower is not None:
                self.kept(s, address, f"{_spelled(ranks)}: {slower}")
                return
        s.apply([edit], factors={path: factors})

    def _together(self, s: Any, together: Together) -> dict[str, Ranks | None]:
        try:
            return together.ranks(s, self.chosen, self.faster)
        except UserError as e:  # what others have cut since bind cannot be cut again
            s.warn("ranks", f"'{self.id}' leaves all layers whole: {e}")
            return dict.fromkeys(self.chosen)

    def _ranks(
        self, address: str, weight: Tensor, layer: Layer, size: Size, seen: dict[str, Tensor]
    ) -> Ranks:
        o, scheme = self.options, self.options.scheme.name
        full = full_ranks(scheme, layer)
        if self.ranks is not None:
            chosen = self.ranks[address]
            if chosen is None:
                raise UserError(f"the rule '{o.rank.name}' spends its budget on keeping it whole")
            # it may have lost channels since
            return tuple(min(r, most) for r, most in zip(chosen, full, strict=True))
        if seen:
            weight = whitened(weight, layer.groups, seen["gram"])
        ranks: Ranks = o.rank.fn(weight, layer, scheme, size)
        return rounded_up(ranks, full, self.period) if self.period > 1 else ranks


def _spelled(ranks: Sequence[int]) -> str:
    return f"rank {', '.join(str(r) for r in ranks)}"
