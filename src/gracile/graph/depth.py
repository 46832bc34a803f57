"""Residual blocks that can be left out as a whole: `y = x + f(x)` becomes `y = x`.

After Huang et al. 2016, arXiv:1603.09382 (stochastic depth), whose networks work without some of
their blocks. What is a block is read off the graph, not off class names: an addition of which one
operand is made from the other. The idea of telling what goes by what nobody reads any more is ours.
"""

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from gracile.core.plan import Skip
from gracile.errors import BindError, UserError, nearest
from gracile.graph.graph import Graph, Node
from gracile.graph.oprule import rule_of_op

_CHANGES_FIRST = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


@dataclass(frozen=True)
class Block:
    """A residual block.

    Attributes:
        id: node id of the addition (`layer1.0.add`).
        identity: id of the node whose output it hands on once the block is left out.
        branch: id of the node that makes what is added.
        nodes: what would no longer run, the addition last; empty where `protected`.
        gone: paths of the modules, parameters and buffers that would go.
        last: addresses of the last weights of the branch: those that scale what is added.
        parameters: elements that would go; 0 where other layers share all its weights.
        macs: multiply-adds for one sample that would go.
        share: these as a share of the whole network's.
        protected: why it cannot be left out; None if it can.
    """

    id: str
    identity: str = ""
    branch: str = ""
    nodes: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    parameters: int = 0
    macs: int = 0
    share: float = 0.0
    protected: str | None = None


def blocks(model: nn.Module, graph: Graph) -> list[Block]:
    """All residual blocks with weights in their branch, in the order of their additions.

    Args:
        model: the model the graph was captured from.
        graph: see `graph.capture`; one that is only a list of modules shows no blocks.
    """
    if graph.module is None:
        return []
    above = _ancestors(graph)
    fed, weights = (_bits(graph, has) for has in (lambda n: n.op == "input", lambda n: n.params))
    macs = _macs(model, graph)
    total = sum(macs.values())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    out = []
    for node in graph.of_op("add"):
        operands = [above[i] for i in dict.fromkeys(node.inputs)]
        if len(operands) != 2 or node.shape is None or not all(bits & fed for bits in operands):
            continue
        if not (operands[0] ^ operands[1]) & weights:
            continue  # `x + position`, or a sum inside a GELU that is written out
        found = _identity(node, above)
        if found is None:
            a, b = dict.fromkeys(node.inputs)
            why = f"the shortcut is not an identity: neither '{a}' nor '{b}' is made from the other"
            out.append(Block(node.id, protected=why))
            continue
        identity, branch = found
        dead = _dead(graph, {node.id: identity})
        gone = _gone(graph, dead)
        parameters = sum(n for name, n in sizes.items() if covers(gone, name))
        block = Block(
            node.id, identity, branch, (*(n.id for n in graph if n.id in dead), node.id), gone,
            _last_weights(graph, branch, dead, sizes), parameters, n := sum(macs[i] for i in dead),
            n / total if total else 0.0,
        )  # fmt: skip
        why_not = _refusal(graph, node, block, sum(sizes.values()))
        out.append(
            block if why_not is None else Block(node.id, identity, branch, protected=why_not)
        )
    return out


def skip_edits(model: nn.Module, graph: Graph, ids: Iterable[str], by: str) -> list[Skip]:
    """One `skip` edit for each block; what several share goes with the last of them.

    Args:
        model: the model the graph was captured from.
        graph: see `blocks`.
        ids: of blocks, in order. One that lies in an earlier one of them is left out with it.
        by: the recipe's name of the entry that decided.

    Raises:
        BindError: the forward cannot be followed.
        UserError: no such block, or one that cannot be left out.
    """
    if graph.module is None:
        raise BindError(f"no block can be left out: {graph.reason}")
    known = {b.id: b for b in blocks(model, graph)}
    cut: dict[str, str] = {}
    dead: set[str] = set()
    gone: tuple[str, ...] = ()
    edits = []
    for id in ids:
        check_block(id, known)
        if id in dead or id in cut:
            continue
        cut[id] = known[id].identity
        all_dead = _dead(graph, cut)
        all_gone = _gone(graph, all_dead)
        nodes = tuple(n.id for n in graph if n.id in all_dead - dead and n.id not in cut)
        paths = tuple(p for p in all_gone if not covers(gone, p))
        edits.append(Skip(by=by, block=id, nodes=nodes, gone=paths))
        dead, gone = all_dead, all_gone
    return edits


def check_block(id: str, known: Mapping[str, Block]) -> None:
    """Refuse a block that is not there or cannot be left out.

    Raises:
        UserError: names the nearest one, or the reason.
    """
    if id not in known:
        raise UserError(f"no residual block '{id}' to leave out.{nearest(id, known)}")
    why = known[id].protected
    if why is not None:
        raise UserError(f"block '{id}' cannot be left out: {why}.")


def covers(gone: Collection[str], address: str) -> bool:
    """Whether a tensor, or a channel map's attribute, goes with one of these paths.

    >>> covers(("layer1.0.conv1",), "layer1.0.conv1.weight")
    True
    """
    parts = address.split(".")
    return any(".".join(parts[:k]) in gone for k in range(1, len(parts) + 1))


def dead_nodes(graph: fx.Graph, cut: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """Nodes that nobody reads any more once these additions hand on one operand.

    Args:
        graph: not changed.
        cut: addition -> the operand it hands on.
    """
    before, after = _live(graph, {}), _live(graph, cut)
    dead = before - after
    for node in graph.nodes:  # what nobody read before goes along if it reads what goes
        if node not in after and dead.intersection(node.all_input_nodes):
            dead.add(node)
    return dead - set(cut)


def _live(graph: fx.Graph, cut: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    live: set[fx.Node] = set()
    size = -1
    while size != len(live):
        size = len(live)
        for node in reversed(graph.nodes):
            statement = not node.users and changes_input(node)  # `x.add_(1)`, its result unread
            if (
                node in live
                or node.op in ("output", "placeholder")
                or (statement and node.all_input_nodes[0] in live)
            ):
                live.add(node)
                live.update([cut[node]] if node in cut else node.all_input_nodes)
    return live


def changes_input(node: fx.Node) -> bool:
    """Whether a call may change its first operand."""
    if not node.all_input_nodes:
        return False
    if node.op == "call_module":
        root = node.graph.owning_module
        module = root.get_submodule(str(node.target)) if root is not None else None
        return bool(getattr(module, "inplace", False))
    if node.target in _CHANGES_FIRST or node.kwargs.get("inplace"):
        return True
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name.split(".")[0].endswith("_") and not name.startswith("__")


def _ancestors(graph: Graph) -> dict[str, int]:
    """Node -> the set of nodes its output depends on and itself, as bits in the order they run."""
    out: dict[str, int] = {}
    for k, node in enumerate(graph):
        bits = 1 << k
        for i in node.inputs:
            bits |= out[i]
        out[node.id] = bits
    return out


def _bits(graph: Graph, has: Callable[[Node], object]) -> int:
    return sum(1 << k for k, node in enumerate(graph) if has(node))


def _identity(node: Node, above: Mapping[str, int]) -> tuple[str, str] | None:
    """(the operand that the other one is made from, the other one)."""
    a, b = dict.fromkeys(node.inputs)
    common = above[a] & above[b]
    if common == above[a]:
        return a, b
    return (b, a) if common == above[b] else None


def _dead(graph: Graph, cut: Mapping[str, str]) -> set[str]:
    assert graph.module is not None
    by_id = {n.meta["id"]: n for n in graph.module.graph.nodes}
    dead = dead_nodes(graph.module.graph, {by_id[a]: by_id[b] for a, b in cut.items()})
    return {n.meta["id"] for n in dead}


def _gone(graph: Graph, dead: Collection[str]) -> tuple[str, ...]:
    assert graph.module is not None
    return vanishing(graph.module, [n for n in graph.module.graph.nodes if n.meta["id"] in dead])


def vanishing(module: fx.GraphModule, dead: Sequence[fx.Node]) -> tuple[str, ...]:
    """Paths of modules and tensors that only these nodes use, tied names included."""
    out = set(dead)
    called: dict[str, bool] = {}  # path of a module or tensor -> whether it stays in use
    for node in module.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            called[str(node.target)] = called.get(str(node.target), False) or node not in out
    stay = {path for path, used in called.items() if used}
    above = {path[:k] for path in stay for k, c in enumerate(path) if c == "."}
    gone = dict.fromkeys(
        path
        for path, used in called.items()
        if not used and path not in above and not covers(stay, path)
    )
    names = [
        (name, id(t))
        for named in (module.named_parameters, module.named_buffers)
        for name, t in named(remove_duplicate=False)
    ]
    kept = {t for name, t in names if covers(stay, name)}
    lost = {t for name, t in names if covers(gone, name)} - kept
    return (*gone, *(n for n, t in names if t in lost and not covers(gone, n)))


def _macs(model: nn.Module, graph: Graph) -> dict[str, int]:
    """Node -> multiply-adds for one sample."""
    shapes = {n: tuple(t.shape) for n, t in model.named_parameters(remove_duplicate=False)}
    batch = next((n.shape[0] for n in graph.of_op("input") if n.shape), 1)
    return {
        n.id: rule_of_op(n.op).macs(
            n,
            [graph[i].shape for i in n.inputs],
            {role: shapes[a] for role, a in n.params.items() if a in shapes},
        )
        // batch
        for n in graph
    }


def _last_weights(
    graph: Graph, branch: str, dead: Collection[str], parameters: Collection[str]
) -> tuple[str, ...]:
    found: list[str] = []
    seen, ahead = set[str](), [branch]
    while ahead:
        id = ahead.pop()
        if id in seen or id not in dead:
            continue
        seen.add(id)
        params = {role: a for role, a in graph[id].params.items() if a in parameters}
        ends = ("out_proj.weight", "weight", "value")
        mine = next((w for end in ends if (w := _ending(params, end))), [])
        found += mine
        if not mine:
            ahead += graph[id].inputs
    return tuple(dict.fromkeys(found))


def _ending(params: Mapping[str, str], end: str) -> list[str]:
    return [a for role, a in params.items() if role.endswith(end)]


def _refusal(graph: Graph, node: Node, block: Block, parameters: int) -> str | None:
    identity, call = graph[block.identity], node.fx
    assert call is not None
    assert identity.fx is not None
    if identity.shape != node.shape:
        return f"'{identity.id}' has the shape {identity.shape}, the sum {node.shape}"
    if node.attrs.get("alpha") not in (None, 1) and call.args[0] is not identity.fx:
        return "the shortcut is multiplied by a number"
    if not any(graph[id].params for id in block.nodes):
        return f"'{block.branch}' is read elsewhere too, so no layer would go"
    if block.parameters == parameters:
        return "no weight would be left in the model"
    inside = {graph[id].fx for id in block.nodes}
    for id in block.nodes[:-1]:
        changed = graph[id].fx
        assert changed is not None
        if changes_input(changed) and changed.all_input_nodes[0] not in inside:
            return f"'{id}' changes its input in place, which others read"
    others = [u for u in identity.fx.users if u not in inside]
    for user in call.users:
        if others and changes_input(user) and user.all_input_nodes[0] is call:
            return f"'{user.meta['id']}' changes the sum in place, and others read the shortcut"
    return None
