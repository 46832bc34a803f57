"""Find channel shuffles: runs of reshape and permute that only change the order of channels.

Zhang et al. 2018, arXiv:1707.01083 (ShuffleNet): ``view(b, g, c // g, h, w).transpose(1, 2)
.reshape(b, c, h, w)``. Followed step by step, such a run would force every group to keep the same
channels; taken as one permutation it ties nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gracile.graph.graph import Graph, Node
from gracile.graph.ops.shape import permuted_dims

MOVES = ("reshape", "flatten", "permute", "identity")


@dataclass(frozen=True)
class Shuffle:
    """A run of nodes that permutes one dim.

    Attributes:
        source: node whose output goes in.
        inside: nodes before the last one.
        dim: the permuted dim.
        order: for each output index the input index.
    """

    source: str
    inside: tuple[str, ...]
    dim: int
    order: tuple[int, ...]


def shuffles(graph: Graph) -> dict[str, Shuffle]:
    """Id of a run's last node -> the run; the shortest one from each start."""
    readers: dict[str, list[Node]] = {}
    for node in graph:
        for i in node.inputs:
            readers.setdefault(i, []).append(node)
    out: dict[str, Shuffle] = {}
    taken: set[str] = set()
    for node in graph:
        if node.op != "reshape" or node.id in taken:
            continue
        found = _run_from(graph, node, readers)
        if found is not None:
            end, shuffle = found
            out[end] = shuffle
            taken.update((*shuffle.inside, end))
    return out


def _run_from(
    graph: Graph, first: Node, readers: Mapping[str, list[Node]]
) -> tuple[str, Shuffle] | None:
    source = graph[first.inputs[0]] if len(first.inputs) == 1 else None
    if source is None or source.shape is None or len(source.shape) < 2:
        return None
    start = np.arange(int(np.prod(source.shape[1:]))).reshape(source.shape[1:])
    data, node, run = start, first, [first.id]
    while True:
        moved = _moved(data, node, source.shape[0])
        if moved is None:
            return None
        data = moved
        if data.shape == start.shape and len(run) > 2:
            order = _one_dim(start, data)
            if order is not None:
                dim, index = order
                return node.id, Shuffle(source.id, tuple(run[:-1]), dim + 1, index)
        following = readers.get(node.id, [])
        if len(following) != 1 or following[0].op not in MOVES or len(run) > 6:
            return None
        node = following[0]
        run.append(node.id)


def _moved(data: npt.NDArray[np.int64], node: Node, batch: int) -> npt.NDArray[np.int64] | None:
    """One sample after this node; None where the batch is not kept as it is."""
    if node.shape is None or node.shape[0] != batch or int(np.prod(node.shape[1:])) != data.size:
        return None
    if node.op != "permute":
        return data.reshape(node.shape[1:])
    order = permuted_dims(node.attrs, data.ndim + 1)
    if order is None or order[0] != 0:
        return None
    return data.transpose([d - 1 for d in order[1:]])


def _one_dim(
    before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]
) -> tuple[int, tuple[int, ...]] | None:
    """The one dim along which the order changed, and the new order."""
    for dim in range(before.ndim):
        corner = tuple(slice(None) if d == dim else 0 for d in range(before.ndim))
        place = {int(v): i for i, v in enumerate(before[corner])}
        order = [place.get(int(v), -1) for v in after[corner]]
        if -1 in order or order == sorted(order):
            continue
        if np.array_equal(before.take(order, axis=dim), after):
            return dim, tuple(order)
    return None
