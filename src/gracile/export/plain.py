"""What the writers that go through a prepared model node by node read from it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gracile.export.prepare import Mark, MarkedLayer
from gracile.export.units import MOVES
from gracile.graph.normalize import Call, call_key, call_of, module_call
from gracile.graph.record import sized

BATCHES = (2, 3)
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
