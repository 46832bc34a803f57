"""Turn a compressed model into what is written out: BatchNorm folded, quantizers and units marked.

A mark is an identity operator with a name. It survives every exporter pass, so the file knows
exactly which tensor is which unit, which is quantized, and which is whose weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gracile.benchmark.artifact import Unit
from gracile.core.plan import Plan
from gracile.errors import UserError
from gracile.export.constants import fold_written
from gracile.export.integers import WeightGrid, weight_grids
from gracile.export.units import MOVES, choose_units
from gracile.graph.capture import as_inputs, capture
from gracile.graph.fold import CONVS, TRANSPOSED, channel_axis, fold_batchnorm
from gracile.graph.graph import Graph, Node
from gracile.graph.instrument import SUFFIX
from gracile.graph.normalize import call_key
from gracile.nn.binary import Binarizer, Step
from gracile.nn.quantized import ActivationQuantizer

MARKED = (*CONVS, *TRANSPOSED, nn.Linear, nn.Embedding)
LINEAR = (F.linear, "aten.linear")
UNIT, WEIGHT, BIAS, DYNAMIC = "unit:", "weight:", "bias:", "dynamic:"
# Operators with weights of their own that no quantizer reaches.
FLOAT_LAYERS = (
    "multihead_attention", "lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell", "bilinear",
)  # fmt: skip


@dataclass(frozen=True)
class ActivationGrid:
    """The grid of one tensor: x ~ (q - zero_point) * scale."""

    scale: float
    zero_point: int
    bits: int
    signed: bool
    qmin: int
    qmax: int


@dataclass
class Prepared:
    """A model ready to be written.

    Attributes:
        module: BatchNorm folded, no quantizers, marks on units and on quantized layers' tensors.
        graph: as captured, before folding.
        units: in execution order.
        activations: unit id -> grid of its tensor.
        weights: address -> integers.
        floats: address of a weight that was asked to be quantized and cannot be -> reason.
        precision: "f32", "int8" or "mixed".
        inputs: (name, shape with batch 1).
    """

    module: fx.GraphModule
    graph: Graph
    units: tuple[Unit, ...]
    activations: dict[str, ActivationGrid]
    weights: dict[str, WeightGrid]
    floats: dict[str, str]
    precision: str
    inputs: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def of_one_bit(self) -> list[str]:
        """Addresses of the weights that are a sign and a scale."""
        return [address for address, grid in self.weights.items() if grid.bits == 1]


def prepare(
    model: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    example: Tensor | tuple[Tensor, ...],
) -> Prepared:
    """Capture, fold and mark a copy of the model; the model is not changed.

    Raises:
        UserError: the model cannot be captured, or a weight is not on its grid.
    """
    graph = capture(model, example)
    if graph.module is None:
        raise UserError(
            f"the model cannot be exported, its forward cannot be followed: {graph.reason}"
        )
    activations = activation_grids(graph)
    before = {n: p.detach() for n, p in graph.module.named_parameters(remove_duplicate=False)}
    inputs = example_inputs(graph, example)
    fold = fold_batchnorm(graph.module)
    _without_optional(fold.module, len(inputs))
    layers = dict(fold.module.named_modules())
    scaled = {
        address: (factor, channel_axis(layers[address.removesuffix(".weight")]))
        for address, factor in fold.scaled.items()
    }
    weights = weight_grids(plan, tensors, before, scaled)
    _share_with_aliases(weights.grids, graph.module)
    module = fold.module.cpu()
    written = fold_written(module)
    _mark_dynamic(module)
    units = tuple(
        u for u in choose_units(graph, activations) if u.id not in written or u.id in activations
    )
    _run_in_place_nowhere(module)
    _mark_units(module, units, activations, fold.merged)
    _mark_weights(module, weights.grids)
    module.graph.lint()
    module.recompile()
    return Prepared(
        module=module,
        graph=graph,
        units=units,
        activations=activations,
        weights=weights.grids,
        floats=weights.floats,
        precision=_precision(graph, activations, weights.grids),
        inputs=inputs,
    )


def described(metadata: Mapping[str, Any], prepared: Prepared) -> dict[str, Any]:
    """The metadata of an artifact: what was given, and which weights stay float, and why."""
    return {**metadata, **({"left_float": prepared.floats} if prepared.floats else {})}


def with_wider(metadata: Mapping[str, Any], left: Mapping[str, str]) -> dict[str, Any]:
    """The same with the weights of one bit that run with more, and why."""
    return {**metadata, **({"left_wider": dict(left)} if left else {})}


def example_inputs(
    graph: Graph, example: Tensor | tuple[Tensor, ...]
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, shape with batch 1) of each input."""
    batch = as_inputs(example)
    names = [n.id for n in graph.of_op("input")]
    return tuple((n, (1, *t.shape[1:])) for n, t in zip(names, batch, strict=False))


def activation_grids(graph: Graph) -> dict[str, ActivationGrid]:
    """Node id -> the grid that its ActivationQuantizer puts it on, for quantizers in use."""
    if graph.module is None:
        return {}
    out = {}
    for node in graph.module.graph.nodes:
        quantizer = _quantizer(graph.module, node)
        if quantizer is not None and quantizer.mode == "quantize" and not quantizer.dynamic:
            out[str(node.meta["id"]).removesuffix(SUFFIX)] = ActivationGrid(
                scale=float(quantizer.scale),
                zero_point=int(quantizer.zero_point),
                bits=quantizer.bits,
                signed=quantizer.signed,
                qmin=quantizer.qmin,
                qmax=quantizer.qmax,
            )
    return out


def _share_with_aliases(grids: dict[str, WeightGrid], module: nn.Module) -> None:
    """Tied weights have one grid under all their names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    by_tensor = {id(parameters[a]): grid for a, grid in grids.items() if a in parameters}
    for address, parameter in parameters.items():
        if id(parameter) in by_tensor:
            grids.setdefault(address, by_tensor[id(parameter)])


class Mark(nn.Module):
    """The identity under a name, as an operator of its own in the exported file."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """x; while it is being exported, the output of a ``gracile::Mark`` operator."""
        if not torch.compiler.is_exporting():
            return x
        marked: Tensor = torch.onnx.ops.symbolic(
            "gracile::Mark",
            (x,),
            attrs={"name": self.name},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        return marked


class MarkedLayer(nn.Module):
    """A layer or table that reads its weight (at `address`) and bias through marks."""

    def __init__(self, layer: Any, address: str):
        super().__init__()
        self.layer, self.address = layer, address
        self.mark_weight = Mark(WEIGHT + address)
        self.mark_bias = Mark(BIAS + address)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        weight = self.mark_weight(layer.weight)
        result: Tensor
        if isinstance(layer, nn.Embedding):
            result = F.embedding(x, weight)
            return result
        bias = None if layer.bias is None else self.mark_bias(layer.bias)
        if isinstance(layer, nn.Linear):
            result = F.linear(x, weight, bias)
        elif isinstance(layer, CONVS):
            result = layer._conv_forward(x, weight, bias)
        else:
            function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.ndim - 3]
            sizes = (layer.stride, layer.padding, layer.output_padding)
            result = function(x, weight, bias, *sizes, layer.groups, layer.dilation)
        return result


def _quantizer(module: fx.GraphModule, node: fx.Node) -> ActivationQuantizer | None:
    if node.op != "call_module":
        return None
    called = module.get_submodule(str(node.target))
    return called if isinstance(called, ActivationQuantizer) else None


def _without_optional(module: fx.GraphModule, given: int) -> None:
    """Arguments of the forward beyond the inputs become the constants that they are by default."""
    optional = module.graph.find_nodes(op="placeholder")[given:]
    default = {node: node.args[0] for node in optional}
    for node in {user for o in optional for user in o.users}:
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda n: default.get(n, n))
    for node in optional:
        module.graph.erase_node(node)


def _run_in_place_nowhere(module: fx.GraphModule) -> None:
    for child in module.modules():
        if getattr(child, "inplace", False) is True:
            child.inplace = False  # type: ignore[assignment]
    for node in module.graph.nodes:
        if "inplace" in node.kwargs:
            node.kwargs = {**node.kwargs, "inplace": False}


def _mark_dynamic(module: fx.GraphModule) -> None:
    """Marks in place of the quantizers that find their range as the network runs."""
    for k, node in enumerate(list(module.graph.nodes)):
        quantizer = _quantizer(module, node)
        if quantizer is not None and quantizer.mode == "quantize" and quantizer.dynamic:
            id = str(node.meta["id"]).removesuffix(SUFFIX)
            node.target = f"_marks.dynamic{k}"
            module.add_submodule(node.target, Mark(DYNAMIC + id))


def _mark_units(
    module: fx.GraphModule,
    units: tuple[Unit, ...],
    quantized: Mapping[str, ActivationGrid],
    merged: Mapping[str, str],
) -> None:
    quantizers: dict[str, fx.Node] = {}
    for node in list(module.graph.nodes):
        quantizer = _quantizer(module, node)
        if isinstance(quantizer, Binarizer) and quantizer.mode == "quantize":
            _step_before(module, node, quantizer)
        if quantizer is not None:
            id = str(node.meta["id"]).removesuffix(SUFFIX)
            if id in quantized:
                quantizers[id] = node
            else:
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
    by_id = {node.meta.get("id"): node for node in module.graph.nodes}
    for k, unit in enumerate(units):
        name = f"_marks.unit{k}"
        module.add_submodule(name, Mark(UNIT + unit.id))
        node = quantizers.get(unit.id.removesuffix(SUFFIX))
        if node is not None:
            node.target = name
            continue
        node = by_id[merged.get(unit.id, unit.id)]
        with module.graph.inserting_after(node):
            mark = module.graph.call_module(name, (node,))
        node.replace_all_uses_with(mark, delete_user_cb=lambda user, mark=mark: user is not mark)
    module.delete_all_unused_submodules()


def _step_before(module: fx.GraphModule, node: fx.Node, q: Binarizer) -> None:
    """Compare as an operator of its own; what is left of the quantizer is an ordinary one."""
    name = f"{node.target}___step"
    module.add_submodule(name, Step(q.scale, q.threshold, q.dim))
    with module.graph.inserting_before(node):
        node.args = (module.graph.call_module(name, node.args),)


def _mark_weights(module: fx.GraphModule, grids: Mapping[str, WeightGrid]) -> None:
    layers = dict(module.named_modules())
    for node in list(module.graph.nodes):
        target = str(node.target)
        if node.op == "call_module" and type(layers[target]) in MARKED:
            address = f"{target}.weight"
            if address in grids:
                name = f"_marks.{address.replace('.', '___')}"
                if name not in layers:
                    layers[name] = MarkedLayer(layers[target], address)
                    module.add_submodule(name, layers[name])
                node.target = name
        elif node.op == "get_attr" and target in grids:
            name = f"_marks.read___{target.replace('.', '___')}"
            module.add_submodule(name, Mark(WEIGHT + target))
            with module.graph.inserting_after(node):
                mark = module.graph.call_module(name, (node,))
            node.replace_all_uses_with(mark, delete_user_cb=lambda u, mark=mark: u is not mark)
            for reader in list(mark.users):
                _mark_bias(module, reader, target)
    module.delete_all_unused_submodules()


def _mark_bias(module: fx.GraphModule, reader: fx.Node, address: str) -> None:
    """Mark the bias of a functional linear layer whose weight lies on a grid."""
    if call_key(reader) not in LINEAR or len(reader.all_input_nodes) < 3:
        return
    bias = reader.all_input_nodes[2]
    if bias.op != "get_attr":
        return
    name = f"_marks.{bias.target.replace('.', '___')}"  # type: ignore[union-attr]
    module.add_submodule(name, Mark(BIAS + address))
    with module.graph.inserting_before(reader):
        mark = module.graph.call_module(name, (bias,))
    reader.replace_input_with(bias, mark)


def _precision(
    graph: Graph, activations: Mapping[str, ActivationGrid], weights: Mapping[str, WeightGrid]
) -> str:
    if not activations and not weights:
        return "f32"
    whole = all(
        _in_integers(weights.get(n.params.get("weight", "")))
        and (_reads_dynamic(graph, n) or all(_on_grid(graph, i, activations) for i in n.inputs))
        for n in graph.of_op("conv", "conv_transpose", "linear")
    )
    return "int8" if whole and not graph.of_op(*FLOAT_LAYERS) else "mixed"


def _in_integers(grid: WeightGrid | None) -> bool:
    return grid is not None and grid.group is None  # what has a scale for each group is not summed


def _reads_dynamic(graph: Graph, reader: Node) -> bool:
    """Whether an operator's input passes a quantizer that finds its range as the network runs."""
    first = graph[reader.inputs[0]]
    if graph.module is None or first.op != "quantize" or first.module is None:
        return False
    q: Any = graph.module.get_submodule(first.module)
    return bool(q.dynamic and q.mode == "quantize")


def _on_grid(graph: Graph, id: str, activations: Mapping[str, ActivationGrid]) -> bool:
    while id not in activations and id.removesuffix(SUFFIX) not in activations:
        if graph[id].op not in (*MOVES, "max_pool") or not graph[id].inputs:
            return False
        id = graph[id].inputs[0]
    return True
