"""Write a model for ncnn (`.param` and `.bin`), node by node, floats as f32, integers as ours.

Every tensor on a grid is written as integers (a Quantize layer, or the end of the convolution that
computes it), convolutions and linear layers read these, and whatever computes in floats reads them
through a Cast. ncnn's own converter (pnnx 20261020) was tried and is not used: it numbers all
tensors, stores floats in 16 bits, has no integers, and writes a slice of every second pixel as a
layer that ncnn does not have.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from gracile.benchmark.artifact import (
    KEY,
    UNIT_MARK,
    Artifact,
    artifact_path,
    content_sha,
    facts,
)
from gracile.benchmark.param import INT8_TERM, Layer, Value, numbers, write
from gracile.core.plan import Plan
from gracile.core.state import write_atomic
from gracile.errors import UserError
from gracile.export.integers import WeightGrid
from gracile.export.ncnn_layers import EMIT
from gracile.export.plain import (
    Dims,
    NotPlain,
    check_in_place,
    dims_of,
    emitter,
    read_call,
    returned,
    sample_sizes,
)
from gracile.export.prepare import DYNAMIC, UNIT, ActivationGrid, Prepared, described, prepare
from gracile.graph.capture import as_inputs
from gracile.graph.instrument import SUFFIX
from gracile.registry import register

FLOAT32, INT8 = 1, 3  # ncnn's numbers of types, in a Cast
CONVOLUTIONS = ("Convolution", "ConvolutionDepthWise")
LAYERS = (*CONVOLUTIONS, "InnerProduct")
ACTIVATION, ACTIVATION_PARAMS = 9, 10  # keys of what a layer does to its result
REQUANTIZED = 100  # added to a convolution's INT8_TERM: its result is integers
GRID_WAY_OUT = (
    "Quantize for it: profile: ncnn in the recipe's quantize entry, or --runtime ncnn alone."
)


@register("exporter", "ncnn", source="https://github.com/Tencent/ncnn/wiki/operators")
def export_ncnn(
    model: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    example: Tensor | tuple[Tensor, ...],
    path: str | Path,
    metadata: Mapping[str, Any],
) -> Artifact:
    """Write `path` (`.param`, or a folder) and its `.bin`; ncnn itself is not needed for it.

    The facts stand in the `.param` behind the layers, where ncnn does not read any more.

    Raises:
        UserError: the model cannot be captured, ncnn has no such operator, or a grid is not one of
            ncnn's.
    """
    prepared = prepare(model, plan, tensors, example)
    batch = as_inputs(example)
    try:
        writer = Writer(prepared, dims_of(prepared.module, [x.cpu() for x in batch]))
        layers = writer.layers_of_all()
    except NotPlain as e:
        raise UserError(
            f"ncnn has no layer for {e}, or none that fits. Replace it in the forward, or export "
            "to another runtime: openvino and onnxruntime know more operators."
        ) from None
    path = artifact_path(path, "ncnn")
    prepared.floats.update(writer.floats)
    metadata = described(metadata, prepared)
    precision = "mixed" if writer.floats and prepared.precision == "int8" else prepared.precision
    values = facts(precision, prepared.inputs, prepared.units, metadata)
    scales = {b: grid.scale for b, grid in writer.integers.items()}
    values[f"{KEY}.scales"] = json.dumps(scales)
    values[f"{KEY}.outputs"] = json.dumps(writer.outputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The text names no weights' file: weights first, then the text.
    write_atomic(path.with_suffix(".bin"), b"".join(x.data for x in layers))
    write_atomic(path, write(layers, values).encode())
    return Artifact(
        path=path,
        runtime="ncnn",
        sha=content_sha(path),
        precision=precision,
        inputs=prepared.inputs,
        units=prepared.units,
        metadata=metadata,
    )


class Writer:
    """The layers of a prepared model, as far as they are written.

    Attributes:
        names: fx node -> its tensor; a list where it makes several.
        dims: fx node -> dims of its output with the batch, which no tensor of ncnn has.
        integers: tensor -> the grid whose integers it holds.
        floats: address of a weight that was asked to be quantized and stays float -> reason.
        outputs: what the network returns, in order.
    """

    def __init__(self, prepared: Prepared, dims: Mapping[fx.Node, Dims | None]):
        self.prepared, self.module, self.dims = prepared, prepared.module, dims
        self.names: dict[fx.Node, Any] = {}
        self.layers: list[Layer] = []
        self.integers: dict[str, ActivationGrid] = {}
        self.as_floats: dict[str, str] = {}
        self.floats: dict[str, str] = {}
        self.units: set[str] = set()
        self.outputs: list[str] = []

    def layers_of_all(self) -> list[Layer]:
        """Write all nodes; the layers in order, each tensor read once."""
        names = iter(name for name, _ in self.prepared.inputs)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                name = next(names)
                self.names[node] = name
                sizes = dict(zip((0, 1, 2, 3), reversed(self.shape(node)), strict=False))
                self.layers.append(Layer("Input", name, (), (name,), sizes))
            elif node.op == "output":
                self.outputs = [self.float(n) for n in returned(node)]
            else:
                self.names[node] = self._write(node)
        self._fuse()
        layers = self._live()
        return self._split(self._named(layers))

    def add(
        self,
        type: str,
        inputs: Sequence[str],
        params: Mapping[int, Value] | None = None,
        data: bytes = b"",
    ) -> str:
        """One layer; the name of its output."""
        return self.several(type, inputs, 1, params, data)[0]

    def several(
        self,
        type: str,
        inputs: Sequence[str],
        n: int,
        params: Mapping[int, Value] | None = None,
        data: bytes = b"",
    ) -> list[str]:
        """One layer with n outputs; their names."""
        k = len(self.layers)
        names = tuple(f"_{type.lower()}{k}.{i}" for i in range(n))
        self.layers.append(Layer(type, f"{type}{k}", tuple(inputs), names, params or {}, data))
        return list(names)

    def constant(self, value: Tensor) -> str:
        """A stored tensor, as it is without a batch."""
        sizes = dict(zip((0, 1, 2, 3), reversed(value.shape), strict=False))
        return self.add("MemoryData", [], sizes, numbers(value.detach().numpy()))

    def raw(self, node: fx.Node) -> str:
        """The tensor of an fx node, integers where it is on a grid."""
        name = self.names.get(node)
        if not isinstance(name, str):
            raise NotPlain(f"'{node}', which is not one tensor of each sample")
        return name

    def float(self, node: fx.Node) -> str:
        """The tensor of an fx node in floats."""
        name = self.raw(node)
        grid = self.integers.get(name)
        if grid is None:
            return name
        if name not in self.as_floats:
            cast = self.add("Cast", [name], {0: INT8, 1: FLOAT32})
            times = {0: 2, 1: 1, 2: float(grid.scale)}
            self.as_floats[name] = self.add("BinaryOp", [cast], times)
        return self.as_floats[name]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of a node's output without the batch."""
        return sample_sizes(self.dims, node)

    def weight_grid(self, address: str, source: str) -> WeightGrid | None:
        """The integers of a weight, if what its layer reads are integers too."""
        grid = self.prepared.weights.get(address)
        if grid is None:
            return None
        if source not in self.integers:
            why = "what its layer reads is not quantized, and ncnn has no kernel of such a kind"
        elif grid.group is not None or bool(grid.zero_point.any()):
            why = "ncnn's integer weights have one scale for each output and no zero point"
        elif int(grid.q.abs().max()) > 127:
            why = "its integers do not fit 8 bits with a sign"
        else:
            return grid
        self.floats[address] = why
        return None

    def mark(self, name: str, node: fx.Node) -> str:
        """The end of a unit: its tensor gets the unit's name, and its grid if it has one."""
        if name.startswith(DYNAMIC):
            raise UserError(
                f"'{name.removeprefix(DYNAMIC)}' finds its range as the network runs, which ncnn "
                "cannot: use quantize: ptq, or another runtime."
            )
        source = node.all_input_nodes[0]
        if not name.startswith(UNIT):
            return self.raw(source)
        id = name.removeprefix(UNIT)
        grid = self.prepared.activations.get(id.removesuffix(SUFFIX))
        made = self.float(source)
        if grid is not None:
            made = self._on_grid(id, made, grid)
        given = {x for u in self.layers if u.type == "Input" for x in u.outputs}
        if made in self.units or made in given or made in self.as_floats.values():
            made = self.add("Noop", [made])
        self._rename(made, id)
        self.units.add(id)
        if grid is not None:
            self.integers[id] = grid
        return id

    def _on_grid(self, id: str, x: str, grid: ActivationGrid) -> str:
        if grid.zero_point != 0 or grid.qmin < -128 or grid.qmax > 127:
            sign = "int" if grid.signed else "uint"
            raise UserError(
                f"ncnn's integers are signed and have no zero point, but '{id}' is on a grid of "
                f"{sign}{grid.bits} with zero point {grid.zero_point}. {GRID_WAY_OUT}"
            )
        if grid.qmax < 127 or grid.qmin > -127:
            ends = {0: grid.qmin * grid.scale, 1: grid.qmax * grid.scale}
            x = self.add("Clip", [x], ends)
        return self.add("Quantize", [x], {0: 1}, numbers(1 / grid.scale))

    def _write(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return None  # whoever reads it stores it in his own form
        call = read_call(self.module, node)
        if call.op == "size":
            return None
        if call.op == "mark":
            return self.mark(call.attrs["name"], node)
        emit = emitter(EMIT, call)
        check_in_place(node, call)
        return emit(self, node, call)

    def _rename(self, old: str, new: str) -> None:
        self.names = {n: new if name == old else name for n, name in self.names.items()}
        self.layers = [
            replace(
                x,
                inputs=tuple(new if b == old else b for b in x.inputs),
                outputs=tuple(new if b == old else b for b in x.outputs),
            )
            for x in self.layers
        ]

    def _fuse(self) -> None:
        """Activations into the layer before them; a Quantize into a convolution of integers."""
        readers = _counted(self.layers, self.outputs)
        maker = {b: k for k, x in enumerate(self.layers) for b in x.outputs}
        layers: list[Layer | None] = list(self.layers)
        for k, x in enumerate(self.layers):
            at = maker.get(x.inputs[0]) if len(x.inputs) == 1 else None
            before = layers[at] if at is not None else None
            alone = before is not None and readers[x.inputs[0]] == 1
            if before is None or at is None or not alone or x.inputs[0] in self.units:
                continue
            joined = _with_activation(before, x) or _requantized(before, x)
            if joined is not None:
                layers[at], layers[k] = joined, None
                maker[x.outputs[0]] = at
        self.layers = [x for x in layers if x is not None]

    def _live(self) -> list[Layer]:
        """Without what nobody reads."""
        wanted, kept = set(self.outputs), []
        for x in reversed(self.layers):
            if x.type == "Input" or wanted & {*x.outputs} or self.units & {*x.outputs}:
                kept.append(x)
                wanted.update(x.inputs)
        return kept[::-1]

    def _named(self, layers: Sequence[Layer]) -> list[Layer]:
        """Names that say which unit a layer works for: the first one downstream."""
        works_for: dict[str, str] = {}
        out = []
        for k, x in reversed(list(enumerate(layers))):
            unit = next((b for b in x.outputs if b in self.units), None)
            unit = unit or next((works_for[b] for b in x.outputs if b in works_for), "")
            works_for.update({b: unit for b in x.inputs if b not in self.units})
            name = x.name if x.type == "Input" else f"{unit}{UNIT_MARK}{x.type}{k}"
            out.append(replace(x, name=name))
        return out[::-1]

    def _split(self, layers: Sequence[Layer]) -> list[Layer]:
        """A Split behind every tensor that several read, as ncnn wants it."""
        readers = _counted(layers, self.outputs)
        copies = {b: iter([f"{b}.copy{k}" for k in range(n)]) for b, n in readers.items() if n > 1}
        made = {b: tuple(f"{b}.copy{k}" for k in range(readers[b])) for b in copies}
        out: list[Layer] = []
        for x in layers:
            own = tuple(next(copies[b]) if b in copies else b for b in x.inputs)
            out.append(replace(x, inputs=own))
            out += [
                Layer("Split", f"{b}{UNIT_MARK}Split", (b,), made[b])
                for b in x.outputs
                if b in made
            ]
        self.outputs = [next(copies[b]) if b in copies else b for b in self.outputs]
        return out


def _counted(layers: Sequence[Layer], outputs: Sequence[str]) -> dict[str, int]:
    counts: dict[str, int] = {b: 0 for x in layers for b in x.outputs}
    for b in (*(b for x in layers for b in x.inputs), *outputs):
        counts[b] += 1
    return counts


def _with_activation(layer: Layer, x: Layer) -> Layer | None:
    """A layer that also does what a following activation does; None if it cannot."""
    if layer.type not in LAYERS or ACTIVATION in layer.params:
        return None
    if x.type == "ReLU":
        slope = float(x.params.get(0, 0.0))  # type: ignore[arg-type]
        kind: dict[int, Value] = {ACTIVATION: 1} if slope == 0 else {
            ACTIVATION: 2, ACTIVATION_PARAMS: (slope,)
        }  # fmt: skip
    elif x.type == "Clip":
        ends = float(x.params[0]), float(x.params[1])  # type: ignore[arg-type]
        kind = {ACTIVATION: 3, ACTIVATION_PARAMS: ends}
    else:
        return None
    return replace(layer, outputs=x.outputs, params={**layer.params, **kind})


def _requantized(layer: Layer, x: Layer) -> Layer | None:
    """A convolution of integers that hands on integers; None if there is nothing to join."""
    if x.type != "Quantize" or layer.type not in CONVOLUTIONS or not layer.in_integers:
        return None
    params = {**layer.params, INT8_TERM: int(layer.params[INT8_TERM]) + REQUANTIZED}  # type: ignore[arg-type]
    return replace(layer, outputs=x.outputs, params=params, data=layer.data + x.data)
