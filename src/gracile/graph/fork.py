"""Run a captured graph under several changes of its weights, each only from where it changes.

What lies before the first changed weight is computed once for all of them. A branch runs on copies
of the values that are alive where it leaves, before the trunk goes on, so operators that work in
place harm neither.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn

from gracile.graph.graph import Graph


def branch_points(graph: Graph, changes: Mapping[str, Collection[nn.Parameter]]) -> dict[str, int]:
    """Name -> position of the first operator that reads one of these parameters.

    One that reads none of them stands at the end: it changes nothing.
    """
    assert graph.module is not None
    reads = [{id(p) for p in _read(graph.module, n)} for n in graph.module.graph.nodes]
    found = {}
    for name, parameters in changes.items():
        ids = {id(p) for p in parameters}
        found[name] = next((k for k, read in enumerate(reads) if read & ids), len(reads))
    return found


def forked(
    graph: Graph,
    inputs: tuple[Tensor, ...],
    points: Mapping[str, int],
    changed: Callable[[str | None], AbstractContextManager[None]],
    *,
    unchanged: bool = True,
) -> dict[str | None, Any]:
    """The graph's output under each change, and as it is under None; without gradient.

    Args:
        graph: of a model in the mode it is to run in.
        inputs: one batch.
        points: name -> where its branch leaves, see `branch_points`.
        changed: what holds while a branch runs, and under None while the trunk does.
        unchanged: whether the trunk runs to the end; without it there is no None.
    """
    assert graph.module is not None
    nodes = list(graph.module.graph.nodes)
    place = {n: k for k, n in enumerate(nodes)}
    last = {n: max((place[u] for u in n.users), default=k) for n, k in place.items()}
    given = [n for n in nodes if n.op == "placeholder"]
    trunk = _Part(graph.module, last, dict(zip(given, inputs, strict=True)))
    out: dict[str | None, Any] = {}
    done = 0
    order = sorted(points, key=lambda name: points[name])
    for name in [*order, *([None] if unchanged else ())]:
        point = len(nodes) if name is None else points[name]
        with torch.no_grad(), changed(None):
            trunk.through(nodes[done:point], done)
        done = point
        branch = trunk if name is None else trunk.copy()
        with torch.no_grad(), changed(name):
            branch.through(nodes[done:], done)
        out[name] = branch.made
    return out


class _Part(fx.Interpreter):
    """A run of a graph that stops and goes on; values that nobody reads any more are dropped."""

    def __init__(
        self, module: fx.GraphModule, last: Mapping[fx.Node, int], env: dict[fx.Node, Any]
    ):
        super().__init__(module)
        self.last, self.env = last, env
        self.made: Any = None  # the graph's output, at the end

    def copy(self) -> "_Part":
        """Another run from here; values that share memory share it there too."""
        values = copy.deepcopy([*self.env.values()])
        part = _Part(self.module, self.last, dict(zip(self.env, values, strict=True)))  # type: ignore[arg-type]
        part.made = self.made
        return part

    def through(self, nodes: Sequence[fx.Node], start: int) -> None:
        """Run these; the first is number `start` of the graph."""
        for k, n in enumerate(nodes, start):
            if n.op == "placeholder":
                continue
            value = self.run_node(n)
            if n.op == "output":
                self.made = value
                return
            self.env[n] = value
            for read in (*n.all_input_nodes, n):
                if self.last[read] <= k:
                    self.env.pop(read, None)


def _read(module: fx.GraphModule, node: fx.Node) -> list[nn.Parameter]:
    """The parameters that a node's module, or the node itself, reads."""
    if node.op == "call_module":
        return list(module.get_submodule(str(node.target)).parameters())
    if node.op == "get_attr":
        path, _, name = str(node.target).rpartition(".")
        value = module.get_submodule(path)._parameters.get(name)
        return [] if value is None else [value]
    return []
