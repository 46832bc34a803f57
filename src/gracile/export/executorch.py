"""Write a model for ExecuTorch (`.pte`), lowered to XNNPACK, with the integers of our grids.

Marks of grids become quantize and dequantize operators around the layers, the form of which XNNPACK
makes kernels of integers. What XNNPACK does not take runs on ExecuTorch's portable kernels, which
are hundreds of times slower: that is told, by name. Beside the file lies a second program
(`.units`), cut behind every unit, of which only the parity check makes use.
"""

import contextlib
import io
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gracile.benchmark.artifact import (
    KEY,
    Artifact,
    Unit,
    artifact_path,
    content_sha,
    facts,
    units_path,
    with_facts,
)
from gracile.core.plan import Plan
from gracile.core.state import write_atomic
from gracile.errors import MissingExtra, UserError
from gracile.export.integers import WeightGrid
from gracile.export.prepare import (
    DYNAMIC,
    UNIT,
    ActivationGrid,
    Mark,
    MarkedLayer,
    Prepared,
    described,
    prepare,
)
from gracile.graph.capture import as_inputs
from gracile.graph.fold import CONVS
from gracile.graph.instrument import SUFFIX
from gracile.registry import register

CLAMPS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, F.relu, F.relu6, F.hardtanh, torch.relu, "relu")
CLAMP_NAMES = ("relu", "hardtanh", "clamp")  # ends of a kernel of integers
NO_KERNEL = ("getitem", "executorch_call_delegate", "alloc")
LOUD = "executorch", "torch.export", "torchao", "root"


@register("exporter", "executorch", source="https://docs.pytorch.org/executorch, XNNPACK backend")
def export_executorch(
    model: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    example: Tensor | tuple[Tensor, ...],
    path: str | Path,
    metadata: Mapping[str, Any],
) -> Artifact:
    """Write `path` (`.pte`, or a folder) for a batch of 1, and the program of its units beside it.

    Operators without a kernel in XNNPACK are warned of, and listed in the metadata
    (`left_portable`).

    Raises:
        UserError: the model cannot be captured or lowered, or a grid does not fit 8 bits.
        MissingExtra: executorch is not installed.
    """
    prepared = prepare(model, plan, tensors, example)
    batch = as_inputs(example)
    one = tuple(x[:1].cpu() for x in batch)
    module, floats = in_operators(prepared)
    program, kernels = lowered(module, one)
    cut, fed = cut_behind(module, prepared.units)
    seen = unit_tensors(module, one)
    inner, _ = lowered(cut, (*one, *(seen[id] for id in fed)))
    path = artifact_path(path, "executorch")
    prepared.floats.update(floats)
    precision = "mixed" if floats and prepared.precision == "int8" else prepared.precision
    metadata = described(metadata, prepared)
    slow = Counter(k[1].removeprefix("portable ") for k in kernels if k[1].startswith("portable "))
    if slow:
        metadata["left_portable"] = dict(slow)
        warnings.warn(_slow(slow), stacklevel=2)
    values = facts(precision, prepared.inputs, prepared.units, metadata)
    values[f"{KEY}.kernels"] = json.dumps(kernels)
    values[f"{KEY}.fed"] = json.dumps(fed)
    values[f"{KEY}.shapes"] = json.dumps({id: list(x.shape) for id, x in seen.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(units_path(path), inner)
    write_atomic(path, with_facts(program, values))
    return Artifact(
        path=path,
        runtime="executorch",
        sha=content_sha(path),
        precision=precision,
        inputs=prepared.inputs,
        units=prepared.units,
        metadata=metadata,
    )


class UnitEnd(nn.Module):
    """The end of a unit: its tensor as it is."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        """x."""
        return x


class OnGrid(UnitEnd):
    """The end of a unit on a grid: quantize to 8 bits with a sign, and back.

    An unsigned grid is the same grid 128 integers lower.
    """

    def __init__(self, unit: str, grid: ActivationGrid):
        super().__init__(unit)
        shift = 0 if grid.signed else 128
        self.low, self.high = ((q - grid.zero_point) * grid.scale for q in (grid.qmin, grid.qmax))
        self.cut = (grid.qmin - shift, grid.qmax - shift) != (-128, 127)
        self.args = (float(grid.scale), grid.zero_point - shift, -128, 127, torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        """The tensor on its grid."""
        if self.cut:  # XNNPACK's kernels use all 256 integers
            x = torch.clamp(x, self.low, self.high)
        ops = torch.ops.quantized_decomposed
        q = ops.quantize_per_tensor.default(x, *self.args)
        y: Tensor = ops.dequantize_per_tensor.default(q, *self.args)
        return y


class IntegerLayer(nn.Module):
    """A layer whose weight is stored as integers with a scale for each output."""

    q: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, layer: Any, grid: WeightGrid):
        super().__init__()
        self.layer, self.axis = layer, grid.axis or 0
        # ExecuTorch writes the bytes of the scales as they lie in memory, and reads them as f32.
        scale = grid.scale.expand(grid.q.shape[self.axis]).float().clone()
        self.register_buffer("q", grid.q.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int64))
        self.bias = layer.bias
        del layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes."""
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
        weight = dequantize(self.q, self.scale, self.zero, self.axis, -127, 127, torch.int8)
        result: Tensor
        if isinstance(self.layer, nn.Linear):
            result = F.linear(x, weight, self.bias)
        else:
            result = self.layer._conv_forward(x, weight, self.bias)
        return result


def in_operators(prepared: Prepared) -> tuple[fx.GraphModule, dict[str, str]]:
    """The prepared module with grids as operators, and the weights that stay float with reasons."""
    try:
        import torch.ao.quantization.fx._decomposed  # noqa: F401  registers the operators
    except ImportError:  # moved to torchao with torch's own
        raise MissingExtra("exporting to ExecuTorch", "executorch") from None
    module = prepared.module
    for node in list(module.graph.nodes):
        mark = _called(module, node)
        if not isinstance(mark, Mark):
            continue
        if mark.name.startswith(DYNAMIC):
            raise UserError(
                f"'{mark.name.removeprefix(DYNAMIC)}' finds its range as the network runs, which "
                "is not written for ExecuTorch: use quantize: ptq, or another runtime."
            )
        id = mark.name.removeprefix(UNIT) if mark.name.startswith(UNIT) else ""
        grid = prepared.activations.get(id.removesuffix(SUFFIX))
        if grid is not None and grid.bits != 8:
            raise UserError(
                f"'{id}' has {grid.bits} bits, and ExecuTorch takes activations of 8 only: "
                "bits: 8, or another runtime."
            )
        if not id:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            module.graph.erase_node(node)
            continue
        _put(module, node, UnitEnd(id) if grid is None else OnGrid(id, grid))
    floats = {}
    for node in list(module.graph.nodes):
        layer = _called(module, node)
        if isinstance(layer, MarkedLayer):
            made, why = _layer(prepared, module, node, layer)
            if why:
                floats[layer.address] = why
            _put(module, node, made)
    module.recompile()
    return module, floats


def _put(module: fx.GraphModule, node: fx.Node, made: nn.Module) -> None:
    parent, _, last = str(node.target).rpartition(".")
    setattr(module.get_submodule(parent), last, made)


def _called(module: nn.Module, node: fx.Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _layer(
    prepared: Prepared, module: fx.GraphModule, node: fx.Node, marked: MarkedLayer
) -> tuple[nn.Module, str]:
    """The layer to write in place of a marked one, and why it is one of floats, if it is."""
    grid, layer = prepared.weights[marked.address], marked.layer
    if type(layer) not in (*CONVS, nn.Linear):
        return layer, "XNNPACK has no kernel of integers for it here"
    if grid.group is not None or bool(grid.zero_point.any()) or int(grid.q.abs().max()) > 127:
        return layer, "XNNPACK's integer weights have one scale for each output and no zero point"
    if not _grid_of(module, node.all_input_nodes[0]):
        return layer, "what its layer reads is not quantized"
    at = node
    while len(at.users) == 1:
        at = next(iter(at.users))
        if _grid_of(module, at):
            return IntegerLayer(layer, grid), ""
        called = _called(module, at)
        if not (at.target in CLAMPS or isinstance(called, CLAMPS[:3])):
            break
    return layer, "its result is not quantized, and XNNPACK sums integers only into integers"


def _grid_of(module: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(_called(module, node), OnGrid)


def cut_behind(module: fx.GraphModule, units: tuple[Unit, ...]) -> tuple[fx.GraphModule, list[str]]:
    """A network with an input for each reader of a unit, and every unit as a result.

    Readers do not share one: XNNPACK orders the channels of an input for one of them, and another
    would read them in that order.

    Returns:
        It, and the unit that each further input stands for, in order.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, copies)
    cut = fx.GraphModule(module, graph)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    last = inputs[-1]
    fed: list[str] = []
    found = {}
    for node in list(graph.nodes):
        end = _called(cut, node)
        if isinstance(end, UnitEnd):
            found[end.unit] = node
    for id, node in found.items():
        for reader in list(node.users):
            with graph.inserting_after(last):
                last = graph.placeholder(f"fed_{len(fed)}")
            source = last
            if _grid_of(cut, node):
                with graph.inserting_before(reader):
                    source = graph.call_module(str(node.target), (last,))
            reader.replace_input_with(node, source)
            fed.append(id)
    graph.output(tuple(found[u.id] for u in units))
    graph.lint()
    cut.recompile()
    return cut, fed


def unit_tensors(module: fx.GraphModule, one: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Every unit's tensor for one sample."""
    found: dict[str, Tensor] = {}

    class Reader(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            end = _called(module, n)
            if isinstance(end, UnitEnd):
                found[end.unit] = out.detach()
            return out

    with torch.no_grad():
        Reader(module).run(*one)
    return found


def lowered(
    module: fx.GraphModule, one: tuple[Tensor, ...]
) -> tuple[bytes, list[tuple[str, str, str]]]:
    """The program of a module, and its kernels: (unit, type, precision).

    Raises:
        UserError: torch.export or ExecuTorch refuses the model.
        MissingExtra: executorch is not installed.
    """
    try:
        with _quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    except ImportError:
        raise MissingExtra("exporting to ExecuTorch", "executorch") from None
    try:
        with _quiet(), torch.no_grad():
            edge = to_edge_transform_and_lower(
                with_own_dequantize(torch.export.export(module, one)),
                partitioner=[XnnpackPartitioner()],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            kernels = _kernels(edge.exported_program(), module)
            buffer = bytes(edge.to_executorch().buffer)
    except Exception as e:  # its many error types are not public
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"ExecuTorch cannot take the model: {first} Replace the operator it names, or export "
            "to another runtime."
        ) from e
    return buffer, kernels


def with_own_dequantize(program: Any) -> Any:
    """An exported program in which every reader of integers dequantizes them by itself, in place.

    ExecuTorch (1.5) orders channels anew at one of these, and loses the shape of a result of
    XNNPACK's that another reader takes from the same one.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if "dequantize_per_tensor" in _operator(node):
            for reader in list(node.users)[1:]:
                with graph.inserting_after(node):
                    reader.replace_input_with(node, graph.node_copy(node))
    program.graph_module.recompile()
    return program


def _kernels(edge: Any, module: fx.GraphModule) -> list[tuple[str, str, str]]:
    """What XNNPACK was given, and what is left. Quantize and dequantize are parts of kernels."""
    units = _units_of_layers(module)
    out = []
    for node in edge.graph.nodes:
        if node.op == "get_attr":
            inner = getattr(edge.graph_module, str(node.target)).original_module
            for n in inner.graph.nodes:
                name = _operator(n)
                if name and "quantize" not in name:
                    out.append((_unit_of(n, inner, units), f"XNNPACK {name}", _precision(n)))
        else:
            name = _operator(node)
            if name and name not in NO_KERNEL:
                out.append((_unit_of(node, edge, units), f"portable {name}", "f32"))
    return out


def _operator(node: fx.Node) -> str:
    """``aten.convolution`` for one of its overloads; "" for what computes nothing."""
    if node.op != "call_function":
        return ""
    name = getattr(node.target, "__name__", str(node.target))
    return name.removesuffix(".default").removeprefix("aten.")


def _precision(node: fx.Node) -> str:
    """Integers where all tensors it reads as it runs are on grids, and its result is."""
    reads = [i for i in node.all_input_nodes if i.op == "call_function"]
    if len(reads) == 1 and _operator(node).startswith(CLAMP_NAMES):
        node, reads = reads[0], [i for i in reads[0].all_input_nodes if i.op == "call_function"]
    whole = bool(reads) and all("dequantize" in _operator(i) for i in reads)
    at = node
    while whole and len(at.users) == 1:
        at = next(iter(at.users))
        name = _operator(at)
        if name.startswith("quantized_decomposed.quantize") or "quantize_per_tensor" in name:
            return "int8"
        if not name.startswith(CLAMP_NAMES):
            break
    return "f32"


def _units_of_layers(module: fx.GraphModule) -> dict[str, str]:
    """Module of the traced network -> the unit it works for."""
    out: dict[str, str] = {}
    for node in module.graph.nodes:
        at = node
        while node.op == "call_module" and at is not None:
            end = _called(module, at)
            if isinstance(end, UnitEnd):
                out[str(node.target)] = end.unit
                break
            at = next(iter(at.users), None)
    return out


def _unit_of(node: fx.Node, program: Any, units: Mapping[str, str]) -> str:
    """The unit of the module whose weights a kernel reads, or which it was traced in; or ""."""
    names = [*_weights_read(node, program.graph_signature)]
    names += [path for path, _ in reversed([*node.meta.get("nn_module_stack", {}).values()])]
    for name in names:
        for path in (name, name.rpartition(".")[0]):
            if path in units:
                return units[path]
    return ""


def _weights_read(node: fx.Node, signature: Any) -> Iterator[str]:
    """Addresses of parameters and buffers that a node reads, behind their dequantization too."""
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for source in node.all_input_nodes:
        if source.name in stored:
            yield str(stored[source.name])
        elif "dequantize" in _operator(source):
            yield from _weights_read(source, signature)


def _slow(left: Mapping[str, int]) -> str:
    named = ", ".join(f"{name} ({n})" for name, n in left.items())
    return (
        f"XNNPACK does not take {named}: these run on ExecuTorch's portable kernels, which are up "
        "to hundreds of times slower, and cut the network into pieces. Replace them in the forward."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Its notes on missing GPU libraries and its own deprecations help no user."""
    loggers = [logging.getLogger(n) for n in LOUD]
    before = [(log, log.level) for log in loggers]
    try:
        for log in loggers:
            log.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in before:
            log.setLevel(level)
