"""Take recurrent and attention layers apart: in the graph, their operators stand for their call."""

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gracile.core.plan import Decompose
from gracile.errors import BindError, UserError, VerificationError, nearest
from gracile.graph import verify
from gracile.graph.capture import as_inputs, bare_copy, capture, quiet
from gracile.graph.graph import Graph, Node
from gracile.graph.normalize import argument, call_of
from gracile.graph.record import recorded
from gracile.graph.shared_module import SharedModule, copied_graph
from gracile.graph.trace import DROPOUTS, restored_modes
from gracile.nn.attention import Attention
from gracile.nn.recurrent import CELLS, LAYERS, Cell, Length, Recurrent

ATTENTION = ("multihead_attention",)
RECURRENT = ("lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell")
PLACE = "place"  # in the meta of a node: what it is in every step
LENGTH = "length"
DROPOUT = ("input", "p")

Inputs = Tensor | tuple[Tensor, ...]


def refusal(graph: Graph, node: Node) -> str | None:
    """Why a layer cannot be taken apart; None if it can."""
    if graph.module is None or node.fx is None or node.module is None:
        return "the forward cannot be rewritten"
    if node.op in RECURRENT and graph[node.inputs[0]].shape is None:
        return "it reads a packed sequence, whose lengths differ"
    return None


def decompose_edits(graph: Graph, ids: Iterable[str], by: str) -> list[Decompose]:
    """One edit for each module, in order, however often it is called."""
    steps: dict[str, int | None] = {}
    for id in ids:
        node = graph[id]
        assert node.module is not None
        found = _steps(graph, node)
        if steps.setdefault(node.module, found) != found:
            raise BindError(
                f"'{node.module}' is called on {steps[node.module]} and on {found} steps and "
                "cannot be taken apart into both; leave it whole with decompose: false."
            )
    return [Decompose(by=by, at=at, steps=n) for at, n in steps.items()]


def decomposed(graph: Graph, edits: Sequence[Decompose], example: Inputs) -> SharedModule:
    """A GraphModule in which the operators of these layers take the places of their calls.

    Names of parameters stay; the modules become `nn.attention.Attention`, `nn.recurrent.Recurrent`
    or `Cell`. New operators are called `<layer>.<op>`, those of a step `<layer>.<place>.<step>`,
    with what they are in every step in their ``meta["place"]``.

    Args:
        graph: as captured from the model; its module shares everything with the result.
        edits: which.
        example: an input batch; a recurrent layer is unrolled for as many steps as it has here.

    Raises:
        BindError: the forward cannot be rewritten.
        UserError: no such layer, or the example has another number of steps than an edit.
    """
    if graph.module is None:
        raise BindError(f"no layer can be taken apart: {graph.reason}")
    calls = {edit.at: _calls(graph, edit) for edit in edits}
    dtypes = _dtypes(graph.module, as_inputs(example))
    new, twin = copied_graph(graph)
    known = {
        twin[n.fx]: (n.shape, dtypes[n.fx])
        for n in graph
        if n.fx is not None and n.shape is not None
    }
    module = SharedModule(graph.module, new)
    for edit in edits:
        ours = _in_its_place(module, edit)
        for node in calls[edit.at]:
            _inline(module, twin[node.fx], ours, edit, known)
    new.eliminate_dead_code(is_impure_node=lambda n: n.op == "call_module" or n.is_impure())
    new.lint()
    module.recompile()
    return module


def prove_decomposition(
    edits: Sequence[Decompose], examples: Sequence[Inputs], graph: Graph
) -> verify.Proof:
    """Compare the model before and after, in eval and train mode, without dropout.

    Raises:
        BindError, UserError: see `decomposed`.
        VerificationError: the two differ.
    """
    if graph.module is None:
        raise BindError(f"no layer can be taken apart: {graph.reason}")
    whole: Any = bare_copy(SharedModule(graph.module, copied_graph(graph)[0]))
    dtype, whole, inputs = verify.to_compare(whole, examples)
    apart = decomposed(capture(whole, inputs[0], check=False), edits, inputs[0])
    apart = copy.deepcopy(apart)  # so that buffers are not counted twice
    tolerance = verify.TOLERANCE[dtype]
    try:
        worst, checks = verify._compare(whole, apart, [], inputs, dtype)
    except verify._Different as e:
        names = ", ".join(f"'{edit.at}'" for edit in edits)
        raise VerificationError(
            f"taking {names} apart changed what the model computes in "
            f"{'train' if e.training else 'eval'} mode: {e}. The model was left as it was; keep "
            "the layer whole with decompose: false."
        ) from None
    return verify.Proof(str(dtype).removeprefix("torch."), worst, tolerance, checks)


def _dtypes(module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Mapping[fx.Node, Any]:
    # Computed, as torch is slow at an LSTM of which only shapes are asked.
    with quiet(module), restored_modes(module), torch.no_grad():
        return recorded(module.eval(), inputs).dtypes  # type: ignore[arg-type]


def _calls(graph: Graph, edit: Decompose) -> list[Node]:
    layers = [n for n in graph.of_op(*ATTENTION, *RECURRENT) if n.module is not None]
    found = [n for n in layers if n.module == edit.at]
    if not found:
        raise UserError(
            f"'{edit.at}' is no recurrent or attention layer of this model that could be taken "
            f"apart.{nearest(edit.at, [str(n.module) for n in layers])}"
        )
    for node in found:
        if (why := refusal(graph, node)) is not None:
            raise UserError(f"'{edit.at}' cannot be taken apart: {why}.")
        if (steps := _steps(graph, node)) != edit.steps:
            raise UserError(
                f"'{edit.at}' was taken apart into {edit.steps} steps, and the example has "
                f"{steps}; give an example of {edit.steps}."
            )
    return found


def _steps(graph: Graph, node: Node) -> int | None:
    shape = graph[node.inputs[0]].shape
    if node.op in ATTENTION or node.op.endswith("_cell") or shape is None:
        return None
    return shape[_time(node, len(shape))]


def _time(node: Node, rank: int) -> int:
    return 1 if node.attrs.get("batch_first") and rank == 3 else 0


def _in_its_place(module: nn.Module, edit: Decompose) -> nn.Module:
    path, _, name = edit.at.rpartition(".")
    home = module.get_submodule(path)
    source = home._modules[name]
    ours: nn.Module
    if isinstance(source, LAYERS):
        ours = Recurrent(source, edit.steps)
    elif isinstance(source, CELLS):
        ours = Cell(source)
    else:
        assert isinstance(source, (nn.MultiheadAttention, Attention))
        ours = Attention(source, spelled=True)
    home._modules[name] = ours
    return ours


class _Known(fx.Proxy):
    """A value whose rank and type are known, so that Python may branch on them."""

    rank: int
    kind: torch.dtype

    def dim(self) -> int:
        """How many dims."""
        return self.rank

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self.kind


class _Inliner(fx.proxy.GraphAppendingTracer):
    """Writes what a forward does into a graph that is there already."""

    def __init__(self, module: SharedModule, at: str, known: dict[fx.Node, Any]):
        super().__init__(module.graph)
        self.module, self.at, self.known = module, at, known
        self.made: list[fx.Node] = []

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """The same, noted."""
        node = super().create_node(kind, target, *args, **kwargs)
        self.made.append(node)
        return node

    def value(self, node: fx.Node) -> fx.Proxy:
        """What stands for a node that was there before."""
        if node not in self.known:
            return fx.Proxy(node, self)
        proxy = _Known(node, self)
        shape, proxy.kind = self.known[node]
        proxy.rank = len(shape)
        return proxy

    def note(self, role: str, step: int | None, x: Any) -> Any:
        """Remember what a value is in its layer."""
        name = role
        if step is not None:
            place, _, part = role.rpartition(".")
            name = f"{place}.{step}.{part}"
        x.node.meta.update({"id": f"{self.at}.{name}", PLACE: f"{self.at}.{role}"})
        return x


def _inline(
    module: SharedModule, call: fx.Node, ours: Any, edit: Decompose, known: dict[fx.Node, Any]
) -> None:
    graph = module.graph
    tracer = _Inliner(module, edit.at, known)
    with graph.inserting_before(call):
        args, kwargs = call.args, dict(call.kwargs)
        if edit.steps is not None:
            args, kwargs = _of_one_length(module, tracer, call, ours, edit)
        proxies: dict[fx.Node, fx.Proxy] = {}

        def value(node: fx.Node) -> Any:
            return proxies.setdefault(node, tracer.value(node))

        args, kwargs = _mapped(args, value), _mapped(kwargs, value)
        held = _as_proxies(ours, edit.at, tracer)
        try:
            out = ours(*args, **kwargs)
        finally:
            for attributes, names in held:
                for name in names:
                    del attributes[name]
    _hand_on(call, _mapped_proxies(out), known)
    graph.erase_node(call)
    _rename(module, tracer)


def _of_one_length(
    module: SharedModule, tracer: _Inliner, call: fx.Node, ours: Any, edit: Decompose
) -> tuple[Any, dict[str, Any]]:
    """The arguments of a call, its input behind a check of its length."""
    assert edit.steps is not None
    series: Any = call.args[0] if call.args else call.kwargs["input"]
    shape, kind = tracer.known[series]
    time = 1 if ours.batch_first and len(shape) == 3 else 0
    path = f"{edit.at}.{LENGTH}"
    if not hasattr(ours, LENGTH):
        ours.add_module(LENGTH, Length(edit.steps, time, edit.at).train(ours.training))
    checked = tracer.create_node("call_module", path, (series,), {})
    tracer.known[checked] = (shape, kind)
    rest = {k: v for k, v in call.kwargs.items() if k != "input"}
    return (checked, *call.args[1:]), rest


def _as_proxies(
    ours: nn.Module, at: str, tracer: _Inliner
) -> list[tuple[dict[str, Any], list[str]]]:
    """Let a module read nodes of the graph for its parameters; what was put in, to take out."""
    there = {n.target: n for n in tracer.graph.nodes if n.op == "get_attr"}
    held: list[tuple[dict[str, Any], list[str]]] = []
    if isinstance(ours, (Recurrent, Cell)):
        ours.__dict__["note"] = tracer.note
        held.append((ours.__dict__, ["note"]))
    for path, module in ours.named_modules(prefix=at):
        names = [name for name, p in module._parameters.items() if p is not None]
        for name in names:
            address = f"{path}.{name}"
            node = there.get(address) or tracer.create_node("get_attr", address, (), {})
            module.__dict__[name] = fx.Proxy(node, tracer)
        held.append((module.__dict__, names))
    return held


def _mapped(value: Any, of: Any) -> Any:
    if isinstance(value, fx.Node):
        return of(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(v, of) for v in value)
    if isinstance(value, Mapping):
        return {k: _mapped(v, of) for k, v in value.items()}
    return value


def _mapped_proxies(value: Any) -> Any:
    if isinstance(value, fx.Proxy):
        return value.node
    return tuple(_mapped_proxies(v) for v in value) if isinstance(value, tuple) else value


def _hand_on(node: fx.Node, value: Any, known: dict[fx.Node, Any]) -> None:
    """Let all readers of a node read a value, which may be a tuple of nodes."""
    if isinstance(value, fx.Node):
        if node in known:
            known[value] = known[node]
        node.replace_all_uses_with(value)
        return
    for user in list(node.users):
        index = user.args[1] if user.target is operator.getitem else None
        if isinstance(index, int) and isinstance(value, tuple):
            _hand_on(user, value[index], known)
            user.graph.erase_node(user)
            continue

        def put(n: fx.Node) -> Any:
            return value if n is node else n

        user.args, user.kwargs = _mapped(user.args, put), _mapped(user.kwargs, put)


def _rename(module: SharedModule, tracer: _Inliner) -> None:
    """Ids for new nodes; functional dropouts become modules that follow the mode."""
    graph = module.graph
    new = set(tracer.made)
    taken = {n.meta["id"] for n in graph.nodes if n not in new}
    for node in tracer.made:
        if node.op in ("get_attr", "call_module"):
            base = str(node.target)
        else:
            name = call_of(node, module.get_submodule, _address).name
            base = node.meta.get("id") or f"{tracer.at}.{name}"
        id, k = base, 0
        while id in taken:
            k += 1
            id = f"{base}_{k}"
        taken.add(id)
        node.meta["id"] = id
        if node.target is F.dropout:
            path = f"{DROPOUTS}.{id.replace('.', '___')}"
            rate = float(argument(node, DROPOUT, "p"))
            module.add_submodule(path, nn.Dropout(rate).train(module.training))
            node.op, node.target, node.args, node.kwargs = "call_module", path, node.args[:1], {}


def _address(node: fx.Node) -> str | None:
    return str(node.target) if node.op == "get_attr" else None
