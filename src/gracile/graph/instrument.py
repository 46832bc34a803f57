"""Insert modules between nodes of a captured graph: how activation quantizers get into a model."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import fx, nn

from gracile.errors import BindError, UserError, nearest
from gracile.graph.graph import Graph
from gracile.graph.shared_module import copied_graph

HOME = "_quantizers"
SUFFIX = ".quantize"
READ = ".input"  # of an operator: what it reads, where that alone passes a module


def instrument(
    graph: Graph,
    after: Mapping[str, nn.Module] = MappingProxyType({}),
    before: Mapping[str, nn.Module] = MappingProxyType({}),
) -> fx.GraphModule:
    """A GraphModule that computes the same as the graph, with ``after[id]`` called on node `id`.

    All readers of the node see the inserted module's output instead; ``before[id]`` is called on
    what node `id` reads first, and only that node sees its output. Submodules and parameters are
    shared with ``graph.module``, which is not changed. A module is stored as
    ``_quantizers.<id with ___ for dots>``; its node's id is ``<id>.quantize``, its op "quantize".
    For ``before`` the id there is ``<id>.input``.

    Args:
        graph: captured in a form that can be rewritten.
        after: node id -> module to call on its output (a tensor).
        before: node id -> module to call on its first input (a tensor).

    Raises:
        UserError: the graph cannot be rewritten.
        BindError: no such node, a node without an output (or input), or one that has a module there
            already.
    """
    if graph.module is None:
        raise UserError(
            "activation quantizers need a graph that can be rewritten, this one was captured by "
            f"'{graph.how}': {graph.reason}."
        )
    source = graph.module
    new, twin = copied_graph(graph)
    places = {node.id: twin[node.fx] for node in graph if node.fx in twin}
    module = fx.GraphModule(source, new, class_name=type(source).__name__)
    module.training = source.training
    if not hasattr(module, HOME):
        module.add_module(HOME, nn.Module())
    for id, inserted in after.items():
        _refuse(graph, places, id)
        name = f"{HOME}.{id.replace('.', '___')}"
        module.add_submodule(name, inserted)
        _insert(new, places[id], name, id)
    for id, inserted in before.items():
        _refuse_before(graph, places, id)
        name = f"{HOME}.{(id + READ).replace('.', '___')}"
        module.add_submodule(name, inserted)
        _insert_before(new, places[id], name, id)
    new.lint()
    module.recompile()
    return module


def _refuse(graph: Graph, places: Mapping[str, fx.Node], id: str) -> None:
    if id not in places:
        raise BindError(f"no node '{id}' to insert a module behind.{nearest(id, graph.nodes)}")
    if places[id].op == "output":
        raise BindError(f"node '{id}' is the output; insert behind the node it returns.")
    if any(user.meta.get("id") == id + SUFFIX for user in places[id].users):
        raise BindError(f"node '{id}' is followed by a quantizer already; change that one.")


def _refuse_before(graph: Graph, places: Mapping[str, fx.Node], id: str) -> None:
    if id not in places:
        raise BindError(f"no node '{id}' to insert a module before.{nearest(id, graph.nodes)}")
    reads = places[id].all_input_nodes
    if not reads:
        raise BindError(f"node '{id}' reads nothing; there is no place before it.")
    if reads[0].meta.get("id") == id + READ + SUFFIX:
        raise BindError(f"a quantizer is before node '{id}' already; change that one.")


def _insert(new: fx.Graph, node: fx.Node, target: str, id: str) -> None:
    anchor = node
    while node.op == "placeholder" and anchor.next.op == "placeholder":
        anchor = anchor.next  # inputs must come first
    with new.inserting_after(anchor):
        inserted = new.call_module(target, (node,))
    inserted.meta.update(id=id + SUFFIX, op="quantize")
    node.replace_all_uses_with(inserted, delete_user_cb=lambda user: user is not inserted)


def _insert_before(new: fx.Graph, node: fx.Node, target: str, id: str) -> None:
    read = node.all_input_nodes[0]
    with new.inserting_before(node):
        inserted = new.call_module(target, (read,))
    inserted.meta.update(id=id + READ + SUFFIX, op="quantize")
    node.replace_input_with(read, inserted)
