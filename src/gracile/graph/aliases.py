"""Which values of an exported graph are changed in place after they were made."""

import operator
from collections.abc import Callable

from torch import fx


def changed_in_place(graph: fx.Graph, changes: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Nodes whose memory some operator writes to, directly or through a view of it.

    Args:
        graph: of aten operators, whose schemas say what is a view of what and what is written to.
        changes: whether a call that has no telling schema may write to what it reads.
    """
    parent: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while node in parent:
            node = parent[node]
        return node

    written = []
    for node in graph.nodes:
        unknown = changes(node)
        for source, shared, writes in _reads(node):
            if writes or unknown:
                written.append(source)
            if (shared or unknown) and find(source) is not find(node):
                parent[find(source)] = find(node)
    roots = {find(n) for n in written}
    return {n for n in graph.nodes if find(n) in roots}


def _reads(node: fx.Node) -> list[tuple[fx.Node, bool, bool]]:
    """(input, whether the output may share its memory, whether it is written to) of a call."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        shared = node.target in (operator.getitem, getattr)
        return [(n, shared, False) for n in node.all_input_nodes]
    infos = {a.name: a.alias_info for a in schema.arguments}
    given = {**dict(zip(infos, node.args, strict=False)), **node.kwargs}
    out = []
    for name, value in given.items():
        info = infos.get(name)
        found: list[fx.Node] = []
        fx.node.map_arg(value, lambda n, found=found: found.append(n) or n)  # type: ignore
        out += [(n, info is not None, info is not None and info.is_write) for n in found]
    return out
