"""Efficient blocks: layers make way for cheaper ones that learn what they did, a few at a time."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from gracile import registry
from gracile.analyze.responses import is_followed
from gracile.core import method as core
from gracile.core.plan import Replace
from gracile.core.schedule import When
from gracile.distribute.collective import all_reduce_sum_
from gracile.errors import UserError
from gracile.graph.graph import Graph, Node
from gracile.graph.replace import refused_block
from gracile.lowrank.faster import Faster, LatencyTable
from gracile.lowrank.imitation import imitate
from gracile.lowrank.layers import layers, path_of, responses, size_of, sums
from gracile.lowrank.layerwise import LayerByLayer
from gracile.lowrank.reconstruct import reconstruct
from gracile.nn.blocks import (
    Block,
    all_args,
    block_of,
    build_block,
    linear_layers,
    plain_args,
    reads,
    standing_for,
)
from gracile.nn.chain import Chain, Layer
from gracile.recipe.fields import KernelRef, Selector, kernel

MOVES_NOTHING = ("dropout", "identity")
FLATTENS = ("flatten", "reshape")
REORDERS = ("permute", "transpose", "reshape", "flatten", "getitem", "input", "param")


class ReplaceOptions(core.Options):
    """Options of `lowrank: replace`.

    Attributes:
        weights: of the layers; default all that the block is for.
        block: what takes their place, a registered block.
        fit: let the block learn what the layer gave in the original network, over calibration data.
        latency: a latency table; layers are replaced only where it predicts that to be faster.
        when: the firings; over several of them layers are replaced in equal parts, in the order of
            the network.
    """

    weights: Selector | None = None
    block: KernelRef("block") = Field(default_factory=lambda: kernel("block", "separable"))  # type: ignore[valid-type]
    fit: bool = False
    latency: LatencyTable | None = None
    when: When


@core.method(
    "lowrank",
    "replace",
    source="Howard et al. 2017, arXiv:1704.04861; Sandler et al. 2018, arXiv:1801.04381; learnt "
    "from the layers that go: Crowley et al. 2018, arXiv:1711.02613; chosen by times: ours",
)
class Replacement(LayerByLayer):
    """Replace layers by cheaper blocks, which do not compute the same and must be trained."""

    Options = ReplaceOptions

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        self.faster: Faster | None = None
        if options.fit:
            self.needs = frozenset({"calibration", "teacher"})

    def on_attach(self, s: Any) -> None:
        wanted = self.options.weights
        self.selected = None if wanted is None else set(s.tensors(wanted))
        super().on_attach(s)
        self.heads = {a: h for a in self.chosen if (h := self._head(s, a)) and h[0] == a}
        covered = {a for head in self.heads.values() for a in head[1:]}
        self.chosen = [a for a in self.chosen if a not in covered]
        if self.options.latency is not None:
            self.faster = Faster(self.options.latency, s.recipe.path)

    @property
    def doing(self) -> str:
        """For messages."""
        return f"replaced by '{self.options.block.name}'"

    def unsupported(self, s: Any, node: Node) -> str | None:
        path = path_of(node.params["weight"])
        if (why := refused_block(s.model, path)) is not None:
            return why
        if self._flat and _image(s.graph, node) is None:
            behind = node.params["weight"] in self._head(s, node.params["weight"])
            return None if behind else "it does not read a flattened image"
        try:
            layer = standing_for(s.model.get_submodule(path))
            block = block_of(self.options.block.name, layer, self._args(s, node))
        except UserError as e:
            return str(e)
        if self.options.fit and block.linear and not is_followed(node):
            return "its padding or number of axes cannot be followed over data"
        return None

    def claims(self, s: Any) -> list[tuple[str, str]]:
        layers = [a for c in self.chosen for a in self.heads.get(c, [c])]
        paths = [*map(self._at, self.chosen), *map(path_of, layers)]
        return [("module", path) for path in dict.fromkeys(paths)]

    def change(self, s: Any, address: str, node: Node) -> None:
        name, at = self.options.block.name, self._at(address)
        layer, args = standing_for(s.model.get_submodule(at)), self._args(s, node)
        try:
            block = block_of(name, layer, args)
        except UserError as e:  # as after a cut
            self.kept(s, address, str(e))
            return
        size = size_of(s, node, layer)
        before = sum(m.macs(size) for m in self._layers(s, at))
        if block.macs(size) >= before:
            why = f"'{name}' would need {block.macs(size):,} of {before:,} MACs"
            self.kept(s, address, why)
            return
        last = layers(s)[self.heads.get(address, [address])[-1]]
        made = self._begun(s, block, layer, at, node, last)
        tensors = {at: tuple(made.state_dict().values())}
        edit = Replace.model_validate(
            {"by": self.id, "at": at, "with": name, "args": plain_args(all_args(name, args))}
        )
        if self.faster is not None:
            why_not = self.faster.verdict(s, [edit], tensors)
            if why_not is not None:
                self.kept(s, address, why_not)
                return
        s.apply([edit], factors=tensors)

    # --- one layer

    @property
    def _flat(self) -> bool:
        return reads(self.options.block.name) == "flat"

    def _at(self, address: str) -> str:
        """The module that goes: the layer, or the head that it begins."""
        path = path_of(address)
        return path.rpartition(".")[0] if address in self.heads else path

    def _head(self, s: Any, address: str) -> list[str]:
        """All weights of the head that a layer is in, if it goes as one; [] else."""
        if not self._flat:
            return []
        head = _head_of(s, path_of(address))
        chosen = self.selected is None or set(head) <= self.selected
        known = layers(s)
        if len(head) < 2 or not chosen or not set(head) <= known.keys():
            return []
        whole = refused_block(s.model, path_of(address).rpartition(".")[0]) is None
        return head if whole and _image(s.graph, known[head[0]]) else []

    def _args(self, s: Any, node: Node) -> Mapping[str, Any]:
        given = self.options.block.options
        return {**given, "image": _image(s.graph, node) or ()} if self._flat else given

    def _layers(self, s: Any, at: str) -> list[Layer]:
        module = s.model.get_submodule(at)
        return [standing_for(m) for m in linear_layers(module) or [module]]

    def _begun(
        self, s: Any, block: Block, layer: Layer, at: str, node: Node, last: Node
    ) -> nn.Sequential:
        """The block with weights to begin with: near the layer's, then fitted to what it gave."""
        weight, bias = _product(s, at)
        start = registry.get("block", self.options.block.name).meta["start"]
        factors = tuple(f.to(weight) for f in start(weight, layer, block))
        if self.options.fit and block.linear and factors:
            if block.image:
                factors, bias = self._pooled(s, block, layer, (factors[0], bias), node, last)
            else:
                ((_, found),) = sums(s, self, [node.params["weight"]])
                gram, cross = found["gram"], found["cross"]
                factors = reconstruct(block.chain, factors, layer, gram, cross)
        made = build_block(block, factors, bias if block.chain.layers else None, dtype=weight.dtype)
        made = made.to(weight.device)
        if self.options.fit and not block.linear:
            pairs = responses(s, self, node, len(weight))
            imitate(made, [(x.detach(), y.detach()) for x, y in pairs])
        return made

    def _pooled(
        self,
        s: Any,
        block: Block,
        layer: Layer,
        begin: tuple[Tensor, Tensor | None],
        node: Node,
        last: Node,
    ) -> tuple[tuple[Tensor], Tensor | None]:
        """Weight and bias over means with the least squares to what the head gave."""
        weight, bias = begin
        rows = [weight] if bias is None else [weight, bias.unsqueeze(1)]
        start = torch.cat(rows, 1).double()
        gram = start.new_zeros(start.shape[1], start.shape[1])
        cross = start.new_zeros(start.shape[1], len(start))
        for x, y in responses(s, self, node, layer.outputs, last):
            mean = x.reshape(len(x), block.image[0], -1).mean(2).double()
            if bias is not None:
                mean = torch.cat([mean, mean.new_ones(len(mean), 1)], 1)
            gram, cross = gram + mean.mT @ mean, cross + mean.mT @ y.double()
        all_reduce_sum_(gram)
        all_reduce_sum_(cross)
        plain = Layer(start.shape[1], layer.outputs)
        (found,) = reconstruct(Chain((plain,)), (start,), plain, gram, cross)
        found = found.to(weight.dtype)
        return (found[:, : weight.shape[1]],), None if bias is None else found[:, -1]


def _image(graph: Graph, node: Node) -> tuple[int, ...] | None:
    """(channels, *size) of the image that a linear layer reads flattened; None if it does not."""
    id = node.inputs[0]
    while graph[id].op in MOVES_NOTHING:
        id = graph[id].inputs[0]
    if graph[id].op not in FLATTENS:
        return None
    before = graph[graph[id].inputs[0]]
    shape, flat = before.shape, graph[id].shape
    if shape is None or flat is None or len(shape) not in (3, 4) or len(flat) != 2:
        return None
    if shape[0] != flat[0] or prod(shape[1:]) != flat[1]:
        return None
    while not (before.op.startswith(("conv", "batch_norm")) or before.op.endswith("pool")):
        if before.op in REORDERS or not before.inputs:  # channels may be another dim
            return None
        before = graph[before.inputs[0]]
    return tuple(shape[1:])


def _head_of(s: Any, path: str) -> list[str]:
    """Addresses of the linear layers of the head that a layer is in, in order; [] if none."""
    home = path.rpartition(".")[0]
    module = s.model.get_submodule(home)
    if not home or not isinstance(module, nn.Sequential) or not linear_layers(module):
        return []
    names = {id(m): n for n, m in module.named_children()}
    return [f"{home}.{names[id(m)]}.weight" for m in linear_layers(module)]


def _product(s: Any, at: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer as they are seen; of a head, as if it had no activations."""
    module = s.model.get_submodule(at)
    names = {id(m): n for n, m in module.named_children()}
    layers = [f"{at}.{names[id(m)]}" for m in linear_layers(module)] or [at]
    weight: Tensor | None = None
    bias: Tensor | None = None
    for path in reversed(layers):  # the widest product last
        here = s.overlays.effective(f"{path}.weight", upto="mask").detach()
        own = s.model.get_submodule(path).bias
        if own is not None:
            own = own.detach() if weight is None else weight @ own.detach()
            bias = own if bias is None else bias + own
        weight = here if weight is None else weight @ here
    assert weight is not None
    return weight, bias
