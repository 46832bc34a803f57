"""Cut a network with early exits into stages: what runs before the first answer, then on.

Every operator is in the first stage that needs it. What a later stage reads of an earlier one, be
it one tensor or several, is handed over; parameters are shared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gracile.errors import UserError
from gracile.graph.capture import as_inputs, capture
from gracile.graph.graph import Graph
from gracile.graph.instrument import SUFFIX
from gracile.nn.exits import CHOICE, Choice, choice_of
from gracile.nn.quantized import ActivationQuantizer


@dataclass(frozen=True)
class Stage:
    """A part of a network that ends with an answer.

    Attributes:
        module: gives the answer and what later stages read, as a tuple; alone the answer in the
            last one. It shares modules and parameters with the network.
        reads: names of its inputs, in order: inputs of the network, or made by earlier stages.
        makes: names of what it gives, in order, the answer first.
        nodes: ids of its operators in the network's graph.
    """

    module: fx.GraphModule
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    nodes: tuple[str, ...]


def stages(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> list[Stage]:
    """The stages of a network with exits, in order; the last one gives the final answer.

    Args:
        model: with a `gracile.nn.exits.Choice` in it.
        example: an input batch.

    Raises:
        UserError: the network has no exits.
    """
    graph = capture(model, example)
    if graph.module is None or choice_of(graph.module) is None:
        raise UserError("this network has no early exits to be cut at.")
    nodes: list[fx.Node] = list(graph.module.graph.nodes)
    (choice,) = [n for n in nodes if n.meta.get("id") == CHOICE]
    final, *early = choice.all_input_nodes
    own: list[list[fx.Node]] = []
    done: set[fx.Node] = set()
    for answer in (*early, final):
        needed = _needed(answer) - done
        own.append([n for n in nodes if n in needed and not _free(graph, n)])
        done |= set(own[-1])
    home = {n: k for k, part in enumerate(own) for n in part}
    out = []
    for k, (part, answer) in enumerate(zip(own, (*early, final), strict=True)):
        handed = [
            n for n in part
            if n is not answer and any(home.get(u, k) > k for u in _readers(graph, n))
        ]  # fmt: skip
        out.append(_stage(graph, part, (answer, *handed), last=k + 1 == len(own)))
    return out


def handed_on(
    found: Sequence[Stage], inputs: Tensor | tuple[Tensor, ...], graph_inputs: Sequence[str]
) -> list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """What each stage reads and gives, all of them run on a whole batch, without gradient.

    Args:
        found: all stages.
        inputs: one batch.
        graph_inputs: names of the network's inputs, in order.
    """
    known = dict(zip(graph_inputs, as_inputs(inputs), strict=False))
    out = []
    with torch.no_grad():
        for stage in found:
            given = tuple(known[name] for name in stage.reads)
            made = as_tuple(stage.module(*given))
            known |= dict(zip(stage.makes, made, strict=True))
            out.append((given, made))
    return out


def input_names(found: Sequence[Stage]) -> list[str]:
    """Names of the network's inputs: what stages read and none makes."""
    made = {name for stage in found for name in stage.makes}
    return list(dict.fromkeys(n for stage in found for n in stage.reads if n not in made))


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    """What a stage gives, always as a tuple."""
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def _needed(answer: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = [answer]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _free(graph: Graph, node: fx.Node) -> bool:
    """Whether every stage that reads it has it for itself: inputs, on a grid or not, parameters."""
    if node.op in ("placeholder", "get_attr"):
        return True
    return _quantizes(graph, node) and node.all_input_nodes[0].op == "placeholder"


def _quantizes(graph: Graph, node: fx.Node) -> bool:
    assert graph.module is not None
    return node.op == "call_module" and isinstance(
        graph.module.get_submodule(str(node.target)), ActivationQuantizer
    )


def _readers(graph: Graph, node: fx.Node) -> list[fx.Node]:
    assert graph.module is not None
    chosen = [u for u in node.users if u.op == "call_module"]
    choice = {u for u in chosen if isinstance(graph.module.get_submodule(str(u.target)), Choice)}
    return [u for u in node.users if u not in choice]


def _stage(graph: Graph, part: Sequence[fx.Node], gives: Sequence[fx.Node], last: bool) -> Stage:
    """One stage's own module; a tensor on a grid is put on it again where it comes in."""
    source = graph.module
    assert source is not None
    new = fx.Graph()
    twin: dict[fx.Node, fx.Node] = {}
    inside = set(part)
    reads: list[str] = []
    wanted = [n for n in source.graph.nodes if _wanted(graph, n, inside)]
    for node in wanted:  # inputs come first
        quantized = _quantizes(graph, node) and node not in inside
        if node.op == "get_attr" or (quantized and _free(graph, node)):
            continue
        id = str(node.meta["id"])
        reads.append(id)
        base = id.removesuffix(SUFFIX) if quantized else id
        place = new.placeholder(base.replace(".", "_"))
        place.meta.update(id=base)
        twin[node] = place
    for node in wanted:
        if node.op == "get_attr":
            twin[node] = new.node_copy(node)
        elif _quantizes(graph, node):
            raw = twin[node.all_input_nodes[0] if _free(graph, node) else node]
            twin[node] = new.call_module(str(node.target), (raw,))
            twin[node].meta = dict(node.meta)
    for node in part:
        twin[node] = new.node_copy(node, lambda n: twin[n])
    out = new.output(twin[gives[0]] if last else tuple(twin[n] for n in gives))
    (end,) = source.graph.find_nodes(op="output")
    out.meta.update({k: v for k, v in end.meta.items() if k == "captured"}, id="output")
    module = fx.GraphModule(source, new, class_name=type(source).__name__)
    module.training = source.training
    ids = tuple(str(n.meta["id"]) for n in part)
    return Stage(module, tuple(reads), tuple(str(n.meta["id"]) for n in gives), ids)


def _wanted(graph: Graph, node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a node outside a stage is read in it."""
    if node in inside:
        return False
    if any(u in inside for u in node.users):
        return True
    return node.op == "placeholder" and any(
        _free(graph, u) and any(v in inside for v in u.users) for u in node.users
    )
