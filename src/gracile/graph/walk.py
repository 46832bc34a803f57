"""Run a captured graph operator by operator, on several batches at once.

For methods that change a layer before what comes after it is run: every operator runs once for each
batch, values are dropped when nobody reads them any more.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from gracile.graph.graph import Graph


class Walk:
    """A graph half run.

    Args:
        graph: of a model in the mode it is to run in.
        batches: inputs of each batch.
        laid: what holds while an operator runs (overlays on its weights).
        before: called with an operator's id before it runs.
    """

    def __init__(
        self,
        graph: Graph,
        batches: Sequence[tuple[Tensor, ...]],
        laid: Callable[[], AbstractContextManager[None]] = nullcontext,
        before: Callable[[str], None] = lambda id: None,
    ):
        assert graph.module is not None
        self._laid, self._before = laid, before
        self._nodes: dict[str, fx.Node] = {n.meta["id"]: n for n in graph.module.graph.nodes}
        self._readers = {n: len(n.users) for n in self._nodes.values()}
        self._done: set[fx.Node] = set()
        places = graph.module.graph.find_nodes(op="placeholder")
        self._runs = [fx.Interpreter(graph.module) for _ in batches]
        for run, inputs in zip(self._runs, batches, strict=True):
            run.env = dict(zip(places, inputs, strict=True))
        self._done.update(places)

    def need(self, id: str) -> list[Any]:
        """The operator's output for each batch; runs it, and what it reads, if that was not yet.

        Raises:
            KeyError: its value was dropped, as all that read it have run.
        """
        self._run(self._nodes[id])
        return [run.env[self._nodes[id]] for run in self._runs]

    def _run(self, node: fx.Node) -> None:
        if node in self._done:
            return
        for n in node.all_input_nodes:
            self._run(n)
        self._before(node.meta["id"])
        with torch.no_grad(), self._laid():
            for run in self._runs:
                run.env[node] = run.run_node(node)
        self._done.add(node)
        for n in node.all_input_nodes:
            self._readers[n] -= 1
            if self._readers[n] == 0:
                for run in self._runs:
                    del run.env[n]


def operate(graph: Graph, id: str, x: Any) -> Any:
    """What one operator makes of an input, by itself and without gradient.

    Args:
        graph: of a model in the mode it is to run in.
        id: of an operator that reads one tensor beside its parameters.
        x: instead of what it reads in the graph.
    """
    assert graph.module is not None
    node = next(n for n in graph.module.graph.nodes if n.meta["id"] == id)
    run = fx.Interpreter(graph.module)
    with torch.no_grad():
        for n in node.all_input_nodes:
            run.env[n] = run.run_node(n) if n.op == "get_attr" else x
        return run.run_node(node)
