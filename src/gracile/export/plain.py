"""What the writers that go through a prepared model node by node read from it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gracile.export.prepare import WEIGHT, Mark, MarkedLayer, Prepared
from gracile.export.units import MOVES
from gracile.graph.normalize import Call, call_key, call_of, module_call
from gracile.graph.oprule import COMPUTED
from gracile.graph.record import sized

BATCHES = (2, 3)
READ_FROM_OUTPUT = ("shape", "unflattened_size", "sizes")  # computed numbers that are not needed
Dims = tuple[int | None, ...]  # None: it depends on the batch


class NotPlain(Exception):
    """An operator, or a form of one, that a writer does not know."""


def read_call(module: fx.GraphModule, node: fx.Node) -> Call:
    """What a node computes: its operator, arguments and addresses; marks are operators ("mark")."""
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        if isinstance(called, Mark):
            return Call("mark", None, "mark", attrs={"name": called.name})
        if isinstance(called, MarkedLayer):
            return module_call(called.layer, f"{node.target}.layer", node.all_input_nodes)
    return call_of(node, module.get_submodule, lambda n: None)


def dims_of(module: fx.GraphModule, example: Sequence[Tensor]) -> dict[fx.Node, Dims | None]:
    """Dims of every node's output, None for those that follow the batch.

    They come from two batch sizes on the meta device.
    """
    seen = []
    for n in BATCHES:
        batch = tuple(x[:1].expand(n, *x.shape[1:]) for x in example)
        try:
            seen.append(sized(module, batch).shapes)
        except Exception as e:
            raise NotPlain(f"it does not run on a batch of {n}") from e
    out: dict[fx.Node, Dims | None] = {}
    for node, one in seen[0].items():
        other = seen[1][node]
        if one is None or other is None:
            out[node] = None
        else:
            out[node] = tuple(a if a == b else None for a, b in zip(one, other, strict=True))
    return out


def check_in_place(node: fx.Node, call: Call) -> None:
    """Writers only make new tensors: a write is fine where nobody reads what was there before."""
    key = call_key(node) if node.op != "call_module" else ""
    name = key if isinstance(key, str) else getattr(key, "__name__", "")
    writes = (name.endswith("_") and not name.endswith("__")) or name in ("iadd", "isub", "imul")
    if writes or call.attrs.get("inplace") is True:
        source = call.args[0]
        if len(source.users) > 1 or source.op in ("placeholder", "get_attr") or call.op in MOVES:
            raise NotPlain(f"'{name}' writes into a tensor that others read")


def check_dropout_is_off(module: fx.GraphModule, node: fx.Node, call: Call) -> None:
    """A dropout that still drops cannot be written."""
    if node.op == "call_module":
        on = module.get_submodule(str(node.target)).training
    else:
        on = call.attrs.get("training", True) is not False
    if on:
        raise NotPlain("a dropout that is on")


def stored(module: fx.GraphModule, address: str) -> Tensor:
    """A parameter or buffer."""
    path, _, name = address.rpartition(".")
    value = getattr(module.get_submodule(path), name)
    if not isinstance(value, Tensor):
        raise NotPlain(f"'{address}' is no tensor")
    return value


def returned(output: fx.Node) -> list[fx.Node]:
    """The tensors that a forward returns."""
    given: Any = output.args[0]
    results = [given] if isinstance(given, fx.Node) else given
    if not isinstance(results, (tuple, list)) or not all(isinstance(r, fx.Node) for r in results):
        raise NotPlain("what the forward returns is no tensor and no tuple of tensors")
    return list(results)


def each(value: Any, n: int) -> list[int]:
    """A number for each of n axes: given so, or one for all of them."""
    values = list(value) if isinstance(value, (tuple, list)) else [value] * n
    values = values * n if len(values) == 1 else values
    if len(values) != n or not all(isinstance(v, int) for v in values):
        raise NotPlain("sizes that cannot be read")
    return values


def part_lengths(call: Call, dims: Dims | None) -> list[int]:
    """How long the parts of a chunk or split are."""
    axis = call.attrs["dim"]
    size = None if dims is None else dims[axis]
    given = call.attrs.get("chunks", call.attrs.get("sizes"))
    if size is None or given is None:
        raise NotPlain("a split whose sizes cannot be read")
    line = torch.empty(size, device="meta")
    parts = line.chunk(given) if call.op == "chunk" else line.split(given)
    return [len(p) for p in parts]


def window(call: Call, spatial: int) -> tuple[list[int], list[int], list[int]]:
    """Kernel, stride and padding of a pooling, a number for each spatial axis."""
    a = call.attrs
    if a.get("ceil_mode") or spatial < 1:  # the last window of other tools is not torch's
        raise NotPlain(f"'{call.op}' with ceil_mode")
    given = a["kernel_size"], a["stride"] or a["kernel_size"], a["padding"]
    kernel, stride, padding = (each(v, spatial) for v in given)
    return kernel, stride, padding


def slices(index: Any) -> list[tuple[int, slice]]:
    """(axis, slice) of what an index leaves out; the rest of the axes stay whole."""
    out = []
    for axis, part in enumerate(index if isinstance(index, tuple) else (index,)):
        if not isinstance(part, slice):
            raise NotPlain("an index that is no slice")
        given = (part.start, part.stop, part.step)
        if not all(v is None or isinstance(v, int) for v in given):
            raise NotPlain("a slice by a computed number")
        if given != (None, None, None):
            out.append((axis, part))
    return out


def constant_padding(module: fx.GraphModule, node: fx.Node, call: Call) -> tuple[list[int], float]:
    """Numbers on both sides, last axis first, and the value that a padding fills in."""
    a = call.attrs
    if node.op == "call_module":
        kind = type(module.get_submodule(str(node.target))).__name__
        constant = kind.startswith(("Zero", "Constant"))
    else:
        constant = a["mode"] == "constant"
    around, value = list(a["padding"]), a.get("value") or 0
    if not constant or any(not isinstance(n, int) or n < 0 for n in around):
        raise NotPlain("a padding that is not with a number, or that cuts")
    return around, float(value)


def layer_operands(
    prepared: Prepared, node: fx.Node, call: Call
) -> tuple[fx.Node, Tensor, Tensor | None, str]:
    """What a layer reads, its weight (of its integers, if it has some) and bias, its address."""
    module = prepared.module
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        address = layer.address if isinstance(layer, MarkedLayer) else call.params["weight"]
        found = {r: stored(module, a) for r, a in call.params.items()}
        weight, bias = found["weight"], found.get("bias")
        source = node.all_input_nodes[0]
    else:
        source = call.args[0]
        address, weight = _behind_marks(module, call.args[1])
        bias = _behind_marks(module, call.args[2])[1] if len(call.args) > 2 else None
    if address in prepared.weights:
        weight = prepared.weights[address].floats()
    return (
        source,
        weight.detach().cpu().float().contiguous(),
        None if bias is None else bias.detach().cpu().float(),
        address,
    )


def _behind_marks(module: fx.GraphModule, node: fx.Node) -> tuple[str, Tensor]:
    """(address, tensor) of a weight that is read as it is stored."""
    address = ""
    while node.op == "call_module":
        call = read_call(module, node)
        name = str(call.attrs.get("name", ""))
        if call.op != "mark":
            break
        address = name.removeprefix(WEIGHT) if name.startswith(WEIGHT) else address
        node = node.all_input_nodes[0]
    if node.op != "get_attr":
        raise NotPlain("a layer whose weight is computed in the forward")
    return address or str(node.target), stored(module, str(node.target))


def check_running_statistics(module: fx.GraphModule, node: fx.Node, call: Call) -> None:
    """A batch norm that uses the batch's own statistics cannot be written."""
    own = node.op != "call_module" or module.get_submodule(str(node.target)).training
    if own or not {"running_mean", "running_var"} <= set(call.params):
        raise NotPlain("a batch norm of the batch's own statistics")


def image_window(call: Call, spatial: int) -> tuple[list[int], list[int], list[int]]:
    """`window` of an image, by a pooling without further options."""
    a = call.attrs
    dilated = a.get("dilation") is not None and set(each(a["dilation"], spatial)) != {1}
    if spatial != 2 or dilated or a.get("return_indices") or a.get("divisor_override"):
        raise NotPlain(f"'{call.op}' with options, or not of images")
    return window(call, spatial)


def check_rows_of_a_line(
    module: fx.GraphModule, dims: Mapping[fx.Node, Dims | None], node: fx.Node, call: Call
) -> None:
    """An embedding is written if a line of an input's numbers looks its rows up as they are."""
    if node.op != "call_module" or call.args[0].op != "placeholder":
        raise NotPlain("a look-up of numbers that are no input")
    layer: Any = module.get_submodule(str(node.target))
    table = layer.layer if isinstance(layer, MarkedLayer) else layer
    if table.max_norm is not None or len(sample_sizes(dims, call.args[0])) != 1:
        raise NotPlain("an embedding that scales its rows, or of other than a line of numbers")


def sample_sizes(dims: Mapping[fx.Node, Dims | None], node: fx.Node) -> tuple[int, ...]:
    """Sizes of a node's output without the batch, which must be its first dim and no other."""
    found = dims.get(node)
    if found is None or not found or found[0] is not None or None in found[1:]:
        raise NotPlain(f"'{node}', whose first dim alone must be the batch,")
    return tuple(d for d in found[1:] if d is not None)


def emitter(emitters: Mapping[str, Any], call: Call) -> Any:
    """How a writer that knows the sizes of results writes an operator; an entry of its table."""
    known = call.rule.roles if call.rule else ()
    skipped = (*READ_FROM_OUTPUT, *known)
    found = emitters.get(call.op)
    if found is None or any(v == COMPUTED for k, v in call.attrs.items() if k not in skipped):
        raise NotPlain(f"'{call.name}'")
    return found
