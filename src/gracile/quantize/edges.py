"""The first and the last weights of a network on finer grids, with the activations they read."""

from gracile.graph.graph import Graph
from gracile.quantize.bits import BitMap, read_by
from gracile.quantize.placement import Placement


def edges(placement: Placement, graph: Graph, bits: int) -> BitMap:
    """Other bits where the network begins and ends.

    First is every quantized weight whose operator no other one leads to, last every one that leads
    to no other; a network with two branches may have several. Activations that share a scale have
    the same bits.

    Args:
        placement: of all quantizers.
        graph: the captured model it was made for.
        bits: of these weights, and of the activations that their operators read.

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
    weights = dict.fromkeys(a for id, a in readers.items() if not above[id] or id not in leads)
    reads = read_by(placement, graph)
    return BitMap(
        dict.fromkeys(weights, bits), {id: bits for address in weights for id in reads[address]}
    )
