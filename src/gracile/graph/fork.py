"""Run a captured graph under several changes of its weights, each only from where it changes.

What lies before the first changed weight is computed once for all of them. A branch runs on copies
of the values that are alive where it leaves, before the trunk goes on, so operators that work in
place harm neither.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
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
    last = _last_readers(nodes)
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


@dataclass(frozen=True)
class Trial:
    """Values that some parameters take, one set after another.

    Attributes:
        addresses: of all parameters that are changed, in the graph's module.
        values: gives, at each call anew, address -> value for one set after another.
    """

    addresses: tuple[str, ...]
    values: Callable[[], Iterable[Mapping[str, Tensor]]]


@torch.no_grad()
def swept(
    module: fx.GraphModule,
    inputs: tuple[Tensor, ...],
    trials: Mapping[str, Trial],
    *,
    rows: int,
) -> Iterator[tuple[str | None, int, Any]]:
    """Outputs with some parameters at other values; what follows them runs as one larger batch.

    What lies before the first changed parameter runs once. Operators up to the last one that reads
    a changed parameter run for each set of values, all behind them for several sets at once: as
    long as everything alive there is one tensor with the batch as its first dim, else set by set.

    Args:
        module: of a captured graph, in eval mode and true for any batch.
        inputs: one batch.
        trials: name -> what is tried.
        rows: samples that run at once, at most (but at least one batch).

    Yields:
        name, number of the set, the output with it; in the order of the graph, and at the end
        (None, 0, the output as it is).
    """
    nodes = list(module.graph.nodes)
    spans = {name: _span(module, nodes, trial.addresses) for name, trial in trials.items()}
    fed = _fed(nodes)
    given = [n for n in nodes if n.op == "placeholder"]
    trunk = _Part(module, _last_readers(nodes), dict(zip(given, inputs, strict=True)))
    done, batch = 0, len(inputs[0])
    for name in sorted(trials, key=lambda name: spans[name]):
        start, stop = spans[name]
        trunk.through(nodes[done:start], done)
        done = start
        sets = enumerate(trials[name].values())
        while group := list(islice(sets, max(1, rows // batch))):
            parts = []
            for _, values in group:
                part = trunk.copy()
                with _holding(module, values):
                    part.through(nodes[start:stop], start)
                parts.append(part)
            for (k, _), out in zip(group, _finished(parts, nodes, stop, batch, fed), strict=True):
                yield name, k, out
    trunk.through(nodes[done:], done)
    yield None, 0, trunk.made


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
        return self.with_values(dict(zip(self.env, values, strict=True)))

    def with_values(self, env: dict[fx.Node, Any]) -> "_Part":
        """Another run of the same graph, at the same place, with other values."""
        part = copy.copy(self)  # an Interpreter made anew walks through all modules
        part.env = env
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


def _last_readers(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Position of the last operator that reads each one's value; its own if none does."""
    place = {n: k for k, n in enumerate(nodes)}
    return {n: max((place[u] for u in n.users), default=k) for n, k in place.items()}


def _span(
    module: fx.GraphModule, nodes: Sequence[fx.Node], addresses: Iterable[str]
) -> tuple[int, int]:
    """First operator that reads one of these parameters, and the one behind the last."""
    ids = {id(module.get_parameter(a)) for a in addresses}
    last = _last_readers(nodes)
    hit = [k for k, n in enumerate(nodes) if any(id(p) in ids for p in _read(module, n))]
    if not hit:
        return len(nodes), len(nodes)
    ends = (last[nodes[k]] if nodes[k].op == "get_attr" else k for k in hit)
    return hit[0], max(ends) + 1


def _fed(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes whose value depends on the inputs."""
    out: set[fx.Node] = set()
    for n in nodes:
        if n.op == "placeholder" or any(read in out for read in n.all_input_nodes):
            out.add(n)
    return out


def _finished(
    parts: Sequence[_Part], nodes: Sequence[fx.Node], stop: int, batch: int, fed: set[fx.Node]
) -> list[Any]:
    """The outputs of these runs, from operator `stop` on: as one run where that is possible."""
    whole = _stacked(parts, batch, fed) if len(parts) > 1 and stop < len(nodes) else None
    if whole is not None:
        whole.through(nodes[stop:], stop)
        if isinstance(whole.made, Tensor) and len(whole.made) == batch * len(parts):
            return list(whole.made.split(batch))
    for part in parts:
        part.through(nodes[stop:], stop)
    return [part.made for part in parts]


def _stacked(parts: Sequence[_Part], batch: int, fed: set[fx.Node]) -> _Part | None:
    """One run of all their values along the batch; None where a value is not that simple."""
    env: dict[fx.Node, Any] = {}
    for node, value in parts[0].env.items():
        if node not in fed:
            env[node] = value
        elif isinstance(value, Tensor) and value.dim() and len(value) == batch:
            env[node] = torch.cat([part.env[node] for part in parts])
        else:
            return None
    return parts[0].with_values(env)


@contextmanager
def _holding(module: fx.GraphModule, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The parameters have these values while this lasts."""
    held = [(module.get_parameter(a), value) for a, value in values.items()]
    before = [p.data for p, _ in held]
    try:
        for p, value in held:
            p.data = value
        yield
    finally:
        for (p, _), value in zip(held, before, strict=True):
            p.data = value


def _read(module: fx.GraphModule, node: fx.Node) -> list[nn.Parameter]:
    """The parameters that a node's module, or the node itself, reads."""
    if node.op == "call_module":
        return list(module.get_submodule(str(node.target)).parameters())
    if node.op == "get_attr":
        path, _, name = str(node.target).rpartition(".")
        value = module.get_submodule(path)._parameters.get(name)
        return [] if value is None else [value]
    return []
