"""A GraphModule with all of its source's modules, parameters and buffers, under the same names."""

import copy
from collections.abc import Callable, Collection
from typing import Any

from torch import fx, nn

from gracile.graph.graph import Graph


def copied_graph(graph: Graph) -> tuple[fx.Graph, dict[Any, fx.Node]]:
    """A copy of a captured module's graph, ids in it, and the copy of each of its nodes."""
    assert graph.module is not None
    new = copy.deepcopy(graph.module.graph)  # meta goes along, modules do not
    twin: dict[Any, fx.Node] = dict(zip(graph.module.graph.nodes, new.nodes, strict=True))
    for node in graph:
        if node.fx in twin:
            twin[node.fx].meta.setdefault("id", node.id)
    return new, twin


class SharedModule(fx.GraphModule):
    """A GraphModule that shares a root's tensors and leaf modules, and has all of its names.

    `fx.GraphModule` takes over only what its graph refers to, in the order of reference, and makes
    buffers persistent. This one has the root's `state_dict()` and `named_parameters()` exactly, and
    so have its deep copies. Modules that only hold others are new: what is put into them does not
    reach the root.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str | None = None):
        super().__init__(root, graph, class_name or type(root).__name__)
        called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
        _mirror(root, self, "", called, {})
        self.training = root.training
        if isinstance(root, fx.GraphModule):
            self.meta.update(root.meta)

    def _deepcopy_init(self) -> Callable[..., None]:
        return _init


def _init(module: Any, root: nn.Module, graph: fx.Graph) -> None:
    SharedModule.__init__(module, root, graph)


def _mirror(
    source: nn.Module,
    target: nn.Module,
    path: str,
    called: Collection[str],
    made: dict[nn.Module, nn.Module],
) -> None:
    made[source] = target
    target.training = source.training
    target._parameters = dict(source._parameters)
    target._buffers = dict(source._buffers)
    target._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
    target._modules = {}
    for name, child in source._modules.items():
        at = f"{path}.{name}".lstrip(".")
        leaf = child is None or not (child._modules or type(child) is nn.Module)
        if leaf or at in called:
            target._modules[name] = child
            continue
        assert child is not None
        if child not in made:
            _mirror(child, nn.Module(), at, called, made)
        target._modules[name] = made[child]
