"""Put channel maps in the place of calls that have channel counts written in them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from gracile.errors import BindError
from gracile.graph.graph import Graph, Node
from gracile.graph.shared_module import SharedModule, copied_graph
from gracile.nn import maps as modules

HOME = "_maps"


@dataclass(frozen=True)
class ChannelMap:
    """What takes the place of a call.

    Attributes:
        module: computes the same, with its channel counts as data.
        args: its arguments, nodes of the captured graph.
        kwargs: and those by name.
        at: path of the module whose place it takes; "" for one of its own.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    at: str = ""


def home_of(id: str) -> str:
    """Where the channel map of a node lives."""
    return f"{HOME}.{id.replace('.', '___')}"


def place_maps(graph: Graph, found: Mapping[str, ChannelMap]) -> fx.GraphModule:
    """A GraphModule that computes the same as the graph, with these maps in it.

    Submodules and parameters are shared with ``graph.module``, which is not changed; ids stay.

    Raises:
        BindError: the graph cannot be rewritten.
    """
    source = graph.module
    if source is None:
        raise BindError(f"the forward cannot be rewritten: {graph.reason}")
    new, twin = copied_graph(graph)
    module = SharedModule(source, new)
    if not hasattr(module, HOME):
        module.add_module(HOME, nn.Module())
    for id, map_ in found.items():
        old = twin[graph[id].fx]
        path = map_.at or home_of(id)
        _set_module(module, path, map_.module.train(module.training))
        args: Any = fx.node.map_arg(map_.args, twin.__getitem__)
        kwargs: Any = fx.node.map_arg(dict(map_.kwargs), twin.__getitem__)
        with new.inserting_before(old):
            call = new.call_module(path, args, kwargs)
        call.meta = dict(old.meta)
        old.replace_all_uses_with(call)
        twin[graph[id].fx] = call
        new.erase_node(old)
    new.eliminate_dead_code(is_impure_node=lambda n: n.op == "call_module" or n.is_impure())
    new.lint()
    module.recompile()
    return module


def norm_of(node: Node) -> ChannelMap | None:
    """The map of a functional layer or RMS normalization."""
    if node.fx is None:
        return None
    given = _named(node)
    shape = given["normalized_shape"]
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    eps = given.get("eps")
    if node.op == "layer_norm":
        module: nn.Module = modules.LayerNorm(shape, 1e-5 if eps is None else eps)
        return ChannelMap(module, (given["input"], given.get("weight"), given.get("bias")))
    return ChannelMap(modules.RMSNorm(shape, eps), (given["input"], given.get("weight")))


def conv_of(node: Node) -> ChannelMap | None:
    """The map of a functional convolution."""
    if node.fx is None:
        return None
    given = _named(node)
    names = ("groups", "stride", "padding", "dilation")
    options = {name: given[name] for name in names if name in given}
    if any(isinstance(v, fx.Node) for v in options.values()):
        return None
    args = (given["input"], given["weight"], given.get("bias"))
    return ChannelMap(modules.Convolution(**options), args)


def _named(node: Node) -> dict[str, Any]:
    from gracile.graph.normalize import call_key
    from gracile.graph.oprule import rule_of_op

    assert node.fx is not None
    names = rule_of_op(node.op).calls[call_key(node.fx)]
    return {**dict(zip(names, node.fx.args, strict=False)), **node.fx.kwargs}


def _set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    home = root.get_submodule(parent)
    home._modules[name] = module
