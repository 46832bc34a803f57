"""Low rank: layers become chains of smaller ones, a few at a time, with training in between."""

from collections.abc import Iterable, Sequence
from math import ceil
from typing import Any

from pydantic import Field
from torch import Tensor

from gracile import registry
from gracile.analyze.responses import LAYERS, Responses, is_followed
from gracile.core import method as core
from gracile.core.plan import Factorize
from gracile.core.schedule import When
from gracile.errors import BindError, UserError
from gracile.graph.factorize import refusal
from gracile.graph.graph import Graph, Node
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
class Factorization(core.Method):
    """Replace layers by products of smaller ones."""

    Options = FactorizeOptions
    rewires = True

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        if options.fit or set(needs_of(options.scheme.name)) & set(SUMS):
            self.needs = frozenset({"calibration", "teacher"})

    def on_attach(self, s: Any) -> None:
        self.done = 0  # of `chosen`
        chosen = self.options.weights
        selected = None if chosen is None else s.tensors(chosen)
        self.chosen: list[str] = []
        whys: dict[str, str] = {}
        for address, node in _layers(s).items():
            if selected is not None and address not in selected:
                continue
            why = self._refusal(s, node)
            if why is None:
                self.chosen.append(address)
            else:
                whys[address] = why
                s.note(address, "structure", "kept", "unsupported", why, self.id)
        if not self.chosen:
            first = next((f"'{a}': {why}" for a, why in whys.items()), "it has no such layer")
            raise BindError(
                f"'{self.id}': no layer of {s.name} can be factorized by "
                f"'{self.options.scheme.name}': {first}"
            )

    def on_fire(self, s: Any, progress: float) -> None:
        wanted = ceil(progress * len(self.chosen) - 1e-9)
        for address in self.chosen[self.done : wanted]:
            if address in s.parameter_names:
                self._factorize(s, address)
        self.done = max(self.done, wanted)

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        modules = dict(s.model.named_modules())
        for edit in edits:
            if edit.kind == "factorize" and edit.by == self.id and edit.at in modules:
                layers = [m for m in modules[edit.at].children() if hasattr(m, "weight")]
                for k in fixed_of(edit.scheme):
                    layers[k].weight.requires_grad_(False)

    def claims(self, s: Any) -> Iterable[tuple[str, str]]:
        return [("module", _path(a)) for a in self.chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = int(state["done"])

    # --- one layer

    def _refusal(self, s: Any, node: Node) -> str | None:
        path = _path(node.params["weight"])
        if (why := refusal(s.model, path)) is not None:
            return why
        try:
            full_ranks(self.options.scheme.name, layer_of(s.model.get_submodule(path)))
        except UserError as e:
            return str(e)
        if self.needs and not is_followed(node):
            return "its padding or number of axes cannot be followed over data"
        return None

    def _factorize(self, s: Any, address: str) -> None:
        o, scheme = self.options, self.options.scheme.name
        node, path = _layers(s)[address], _path(address)
        layer = layer_of(s.model.get_submodule(path))
        size = _size(s, node, layer)
        weight = s.overlays.effective(address, upto="mask").detach()
        try:
            ranks = self._ranks(weight, layer, size)
        except UserError as e:
            s.note(address, "structure", "kept", "no_gain", str(e), self.id)
            return
        chain = chain_of(scheme, layer, ranks)
        if chain.macs(size) >= layer.macs(size):
            why = f"{_spelled(ranks)} would need {chain.macs(size):,} of {layer.macs(size):,} MACs"
            s.note(address, "structure", "kept", "no_gain", why, self.id)
            return
        sums = self._sums(s, node, weight) if self.needs else {}
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

    def _sums(self, s: Any, node: Node, weight: Tensor) -> dict[str, Tensor]:
        """What the layer reads now, and what it should give, over calibration data."""
        found = Responses(weight, node, bias=False)
        kept = s.plan.to_original().get((node.params["weight"], 0))
        rng = s.generator(self.id, "points", node.id)
        dim = -1 if node.op == "linear" else 1
        with s.walk(self, lambda id: None) as (model, teacher):
            bias = _bias(s.teacher_graph, node)
            for x, y in zip(model.need(node.inputs[0]), teacher.need(node.id), strict=True):
                wanted = y
                if bias is not None:
                    shape = [1] * y.dim()
                    shape[dim] = -1
                    wanted = y - bias.reshape(shape)
                if kept is not None and wanted.shape[dim] != weight.shape[0]:
                    wanted = wanted.index_select(dim, wanted.new_tensor(kept).long())
                found.see(x, wanted, 0, rng)
        found.share()
        return {"gram": found.gram, "cross": found.right}


def _layers(s: Any) -> dict[str, Node]:
    """Weight -> the node of the layer that has it as its own and alone calls it, in order."""
    calls: dict[str, list[Node]] = {}
    for node in s.graph.of_op(*LAYERS):
        calls.setdefault(node.params.get("weight", ""), []).append(node)
    return {
        a: nodes[0]
        for a, nodes in calls.items()
        if len({n.module for n in nodes}) == 1 and nodes[0].module == _path(a)
    }


def _bias(graph: Graph, node: Node) -> Tensor | None:
    """Of the original layer; None if it adds none."""
    address = graph[node.id].params.get("bias")
    assert graph.module is not None
    return None if address is None else graph.module.get_parameter(address).detach()


def _path(address: str) -> str:
    return address.removesuffix(".weight")


def _size(s: Any, node: Node, layer: Layer) -> Size:
    shape = s.graph[node.inputs[0]].shape
    return tuple(shape[2:]) if layer.kernel and shape is not None else ()


def _spelled(ranks: Sequence[int]) -> str:
    return f"rank {', '.join(str(r) for r in ranks)}"
