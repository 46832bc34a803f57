"""The first and the last weights of a network on finer grids, with the activations they read."""

from dataclasses import replace

from gracile.graph.graph import Graph
from gracile.quantize.placement import Placement


def with_edges(placement: Placement, graph: Graph, bits: int, weight_bits: int) -> Placement:
    """The same placement with other bits where the network begins and ends.

    First is every quantized weight whose operator no other one leads to, last every one that leads
    to no other; a network with two branches may have several. Activations that share a scale have
    the same bits.

    Args:
        placement: of all quantizers.
        graph: the captured model it was made for.
        bits: of the activations that these operators read.
        weight_bits: of their weights.

    Source:
        Zhou et al. 2016, arXiv:1606.06160, section 2.7; Esser et al. 2019, arXiv:1902.08153,
        section 3 (8 bits there).
    """
    addresses = {w.address for w in placement.weights}
    readers = {n.id: n.params["weight"] for n in graph if n.params.get("weight") in addresses}
    above: dict[str, set[str]] = {}  # node -> operators with weights that lead to it
    for n in graph:
        found = {i for i in n.inputs if i in readers}
        above[n.id] = found.union(*(above.get(i, set()) for i in n.inputs))
    leads = set().union(*(above[id] for id in readers)) if readers else set()
    edges = [id for id in readers if not above[id] or id not in leads]
    weights = {readers[id] for id in edges}

    leader = {a.id: a.shares_scale_with or a.id for a in placement.activations}
    groups: set[str] = set()
    for id in edges:
        at = graph[id].inputs[0]
        while at not in leader and graph[at].inputs:
            at = graph[at].inputs[0]
        if at in leader:
            groups.add(leader[at])
    return replace(
        placement,
        weights=tuple(
            replace(w, bits=weight_bits) if w.address in weights else w for w in placement.weights
        ),
        activations=tuple(
            replace(a, bits=bits) if leader[a.id] in groups else a for a in placement.activations
        ),
    )
