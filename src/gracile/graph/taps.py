"""Read what operators give while a model runs its own forward, with gradients.

A module's output is seen by a hook. What a function gives (a residual sum) is computed again from
the outputs of the modules before it, which are part of the forward's autograd graph; so the forward
stays the user's, and gradients are those of the value itself.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from gracile.errors import BindError
from gracile.graph.agree import same
from gracile.graph.capture import quiet
from gracile.graph.graph import Graph, Node
from gracile.graph.trace import restored_modes


class Taps:
    """Taps on some operators of a model.

    Args:
        model: as it is now; after surgery it wants new taps.
        graph: captured from it.
        ids: of the operators, each of which gives one tensor.

    Raises:
        BindError: an operator that cannot be read, and why.
    """

    def __init__(self, model: nn.Module, graph: Graph, ids: Collection[str]):
        self.model = model
        self._graph = graph
        self._ids = tuple(dict.fromkeys(ids))
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._calls: dict[nn.Module, list[str]] = {}  # ids of a module's calls, in order
        for node in graph:
            called = self._called(node)
            if called is not None:
                self._calls.setdefault(called, []).append(node.id)
        self._copied = any(in_place(n.fx, graph.module) for n in graph if n.fx is not None)
        self._plan: dict[str, None] = {}  # functions to compute, in order
        self._hooked: set[nn.Module] = set()
        for id in self._ids:
            self._reach(graph[id], id)
        self._handles: list[Any] = []
        self._on, self._grad = False, True
        self._inputs: tuple[Any, ...] = ()
        self._count: dict[nn.Module, int] = {}
        self._seen: dict[str, Any] = {}

    @property
    def is_open(self) -> bool:
        """Whether the next forward is read."""
        return bool(self._handles)

    def open(self, *, grad: bool = True) -> None:
        """Read every forward from now on; the last one counts.

        Args:
            grad: leave out forwards without gradient.
        """
        self.close()
        self._grad = grad
        self._handles = [self.model.register_forward_pre_hook(self._begin)]
        self._handles += [m.register_forward_hook(self._keep) for m in self._hooked]

    def close(self) -> None:
        """Take the hooks off and forget what was read."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._inputs, self._seen, self._count = [], (), {}, {}

    def values(self) -> dict[str, Tensor]:
        """Operator id -> its output in the last forward; empty if there was none."""
        if not self._seen and not self._inputs:
            return {}
        known = dict(self._seen)
        if self._plan:
            self._compute(known)
        return {id: known[id] for id in self._ids}

    def prove(
        self,
        inputs: tuple[Tensor, ...],
        laid: Callable[[nn.Module], AbstractContextManager[None]] = lambda _: nullcontext(),
        outputs: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """See that what is read is what the captured graph computes, in eval mode.

        Args:
            inputs: of the forward.
            laid: what holds while the graph runs (overlays on its weights).
            outputs: path of a module -> the operator, one of ours, that gives what it gives.

        Raises:
            BindError: an operator, or a module's output, is something else.
        """
        module = self._graph.module
        if module is None:
            return
        given: dict[str, Any] = {}
        handles = [
            self._modules[path].register_forward_hook(partial(_give, given, path))
            for path in outputs
        ]
        try:
            with torch.no_grad(), quiet(self.model), restored_modes(self.model):
                self.model.eval()
                with self.opened(grad=False):
                    self.model(*inputs)
                    got = self.values()
                with restored_modes(module), laid(module):
                    module.eval()
                    run = _Copying(module, self._ids)
                    run.run(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        for id in self._ids:
            if not same(run.found[id], got[id]):
                raise BindError(
                    f"'{id}' cannot be read in the forward: what its modules give is changed "
                    "before it gets there. Name the module before or after it."
                )
        for path, value in given.items():  # a GraphModule calls no modules with modules in them
            if not same(run.found[outputs[path]], value):
                inside = [f"'{i}'" for i in readable(self._graph) if i.startswith(f"{path}.")]
                raise BindError(
                    f"what '{path}' gives is not the output of its last operator. Name one: "
                    f"{', '.join(inside[-4:])}."
                )

    @contextmanager
    def opened(self, *, grad: bool = True) -> Iterator[None]:
        """`open` while this lasts."""
        self.open(grad=grad)
        try:
            yield
        finally:
            self.close()

    # --- inside

    def _called(self, node: Node) -> nn.Module | None:
        """The model's own module that a node calls; None of a function, or what is not its own."""
        if node.module is None:
            return None
        found = self._modules.get(node.module)
        if found is not None and self._graph.module is not None:
            return found if self._graph.module.get_submodule(node.module) is found else None
        return found

    def _reach(self, node: Node, wanted: str) -> None:
        """Find the modules from whose outputs a node can be had."""
        called = self._called(node)
        if called is not None:
            self._hooked.add(called)
            return
        if node.op == "input" or node.id in self._plan:
            return
        why = None
        if node.module is not None or node.fx is None:
            why = f"'{node.id}' is not called in the forward by itself"
        elif node.op in ("param", "batch_norm") or node.params:
            why = f"'{node.id}' reads weights outside of a module"
        elif node.op == "dropout":
            why = f"'{node.id}' is drawn anew each time"
        if why is not None:
            raise BindError(f"'{wanted}' cannot be read in the forward: {why}. Name a module.")
        for id in node.inputs:
            self._reach(self._graph[id], wanted)
        self._plan[node.id] = None

    def _begin(self, _model: nn.Module, args: tuple[Any, ...]) -> None:
        self._on = torch.is_grad_enabled() or not self._grad
        if self._on:
            self._inputs, self._seen, self._count = args, {}, {}

    def _keep(self, module: nn.Module, _args: Any, out: Any) -> None:
        if not self._on:
            return
        k = self._count.get(module, 0)
        self._count[module] = k + 1
        calls = self._calls[module]
        if k < len(calls):
            self._seen[calls[k]] = _copy(out) if self._copied else out

    def _compute(self, known: dict[str, Any]) -> None:
        assert self._graph.module is not None
        run = fx.Interpreter(self._graph.module)
        places = self._graph.module.graph.find_nodes(op="placeholder")
        run.env = dict(zip(places, self._inputs, strict=False))
        names: dict[fx.Node, str] = {n.fx: n.id for n in self._graph if n.fx is not None}
        for id in self._plan:
            node = self._graph[id].fx
            assert node is not None
            alone = in_place(node, self._graph.module)
            for n in node.all_input_nodes:
                if names.get(n) in known:
                    value = known[names[n]]
                    run.env[n] = _copy(value) if alone else value
                elif n not in run.env:
                    run.env[n] = run.run_node(n)  # a constant
            known[id] = run.env[node] = run.run_node(node)


def in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a call may change what it reads."""
    if node.op == "call_module":
        called = module.get_submodule(str(node.target)) if module is not None else None
        return bool(getattr(called, "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = str(name).split(".")[0]
    ends = name.endswith("_") and not name.startswith("__")
    adds = getattr(node.target, "__module__", "") == "_operator" and name in _AUGMENTED
    return ends or adds or bool(node.kwargs.get("inplace", False))


_AUGMENTED = {"iadd", "isub", "imul", "itruediv", "ipow", "iand", "ior", "setitem"}


def _copy(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.clone()
    return type(x)(_copy(v) for v in x) if type(x) in (tuple, list) else x


class _Copying(fx.Interpreter):
    """Runs a graph and keeps copies of some outputs, as later operators may change them."""

    def __init__(self, module: fx.GraphModule, ids: Collection[str]):
        super().__init__(module)
        self.ids, self.found = set(ids), {}  # type: ignore[var-annotated]

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; keep its output if it was asked for."""
        out = super().run_node(n)
        if n.meta.get("id") in self.ids:
            self.found[n.meta["id"]] = _copy(out)
        return out


def readable(graph: Graph) -> list[str]:
    """Operators that give one tensor made of the input, in order."""
    return [n.id for n in graph if n.op not in ("input", "output", "param") and n.shape is not None]


def names_of(model: nn.Module, graph: Graph) -> dict[str, str]:
    """Names of what gives one tensor -> the operator meant, in the order they run.

    An operator has its id; a module with operators inside stands for the last one of them.

    Args:
        model: as it is now.
        graph: captured from it.
    """
    known = readable(graph)
    last: dict[str, str] = {}
    for id in known:
        parts = id.split(".")
        last |= {".".join(parts[:k]): id for k in range(1, len(parts))}
    modules = {path for path, _ in model.named_modules()}
    found = {path: id for path, id in last.items() if path in modules} | {id: id for id in known}
    rank = {id: k for k, id in enumerate(known)}
    return dict(sorted(found.items(), key=lambda item: rank[item[1]]))


def _give(given: dict[str, Any], path: str, _module: nn.Module, _args: Any, out: Any) -> None:
    given[path] = _copy(out)
