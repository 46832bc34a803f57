"""Attach early exits: heads behind inner nodes of a captured graph, and the choice at its end.

The choice gives the final answer in train mode and as long as its thresholds are 0, so the network
computes what it did; the heads are operators of the same graph, which cuts and grids follow.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gracile import registry
from gracile.core.plan import Exit
from gracile.errors import BindError, UserError, VerificationError, nearest
from gracile.graph import verify
from gracile.graph.capture import bare_copy, capture
from gracile.graph.graph import Graph, Node
from gracile.graph.shared_module import SharedModule, copied_graph
from gracile.graph.taps import readable
from gracile.nn.exits import CHOICE, HOME, Choice, choice_of

Inputs = Tensor | tuple[Tensor, ...]


def head_path(after: str) -> str:
    """Where the head of the exit behind a node lives.

    >>> head_path("layer1.8.relu_1")
    'early_exits.layer1_8_relu_1'
    """
    return f"{HOME}.{after.replace('.', '_')}"


def final_answer(graph: Graph) -> Node:
    """The operator that gives the network's answer.

    Raises:
        BindError: the forward cannot be rewritten, or gives anything but one tensor (N, classes).
    """
    if graph.module is None:
        raise BindError(f"exits cannot be attached, the forward cannot be followed: {graph.reason}")
    (output,) = graph.of_op("output")
    assert output.fx is not None
    node = graph[output.inputs[0]] if len(output.inputs) == 1 else None
    single = isinstance(output.fx.args[0], torch.fx.Node)
    if node is None or not single or node.shape is None or len(node.shape) != 2:
        raise BindError(
            "early exits are for networks that answer with one tensor (N, classes), got "
            f"{None if node is None else node.shape}."
        )
    return node


def exit_edits(
    graph: Graph, ids: Sequence[str], head: str, args: dict[str, object], by: str
) -> list[Exit]:
    """One edit for each node, in the order they run.

    Raises:
        BindError: the network has exits, cannot have any, or none can stand behind such a node.
    """
    if graph.module is not None and choice_of(graph.module) is not None:
        raise BindError(f"'{by}': the network has exits already; name all of them in one entry.")
    end = final_answer(graph)
    before = _leading_to(graph, end.id)
    for id in ids:
        if id not in before or id == end.id:
            raise BindError(
                f"'{by}': an exit behind '{id}' would save nothing: the answer is not made of it, "
                f"or is it. The network's answer is '{end.id}'."
            )
    order = [id for id in readable(graph) if id in set(ids)]
    return [Exit(by=by, after=id, head=head, args=args) for id in order]


def attached(
    graph: Graph, edits: Sequence[Exit], *, optimizer: torch.optim.Optimizer | None = None
) -> SharedModule:
    """A GraphModule with heads behind these nodes and a choice among all answers at its end.

    Args:
        graph: as captured; its module shares everything with the result.
        edits: all exits of the network.
        optimizer: the heads join the group of the last weight that it trains.

    Raises:
        BindError: see `final_answer`.
        UserError: the network has exits, no such node, or a head that cannot read it.
    """
    end = final_answer(graph)
    assert graph.module is not None
    assert end.shape is not None
    if hasattr(graph.module, HOME):
        raise UserError(
            f"the network has '{HOME}' already; all its exits are attached at once, by one entry."
        )
    new, twin = copied_graph(graph)
    module = SharedModule(graph.module, new)
    module.add_module(HOME, nn.Module().train(module.training))
    final, early = twin[end.fx], []
    near = next((p for p in graph.module.parameters() if p.is_floating_point()), torch.empty(0))
    for edit in edits:
        node = graph.nodes.get(edit.after)
        if node is None or node.shape is None:
            raise UserError(
                f"no node '{edit.after}' to put an exit behind.{nearest(edit.after, graph.nodes)}"
            )
        build = registry.get("exit_head", edit.head).obj
        head = build(node.shape[1:], end.shape[1], **edit.args).to(near.device, near.dtype)
        head.train(module.training)
        path = head_path(edit.after)
        if hasattr(module.get_submodule(HOME), path.removeprefix(f"{HOME}.")):
            raise UserError(f"two exits would both be called '{path}'; keep one of them.")
        module.add_submodule(path, head)
        place = twin[node.fx]
        for name, _ in head.named_children():
            with new.inserting_after(place):
                step = new.call_module(f"{path}.{name}", (place,))
            step.meta["id"] = f"{path}.{name}"
            place = step
        early.append(place)
        if optimizer is not None:
            _join(optimizer, graph.module, head)
    made = Choice(len(edits)).to(near.device)
    module.add_submodule(CHOICE, made.train(module.training))
    (output,) = new.find_nodes(op="output")
    with new.inserting_before(output):
        choice = new.call_module(CHOICE, (final, *early))
    choice.meta["id"] = CHOICE
    output.replace_input_with(final, choice)
    settle(module, edits)
    new.lint()
    module.recompile()
    return module


def settle(model: nn.Module, edits: Sequence[Exit]) -> None:
    """Give the choice of a model the thresholds and temperatures of these exits, in order."""
    choice = choice_of(model)
    if choice is None or len(choice.thresholds) != len(edits):
        raise UserError(f"the network does not have these {len(edits)} exits.")
    for k, edit in enumerate(edits):
        choice.thresholds[k] = 0.0 if edit.threshold is None else edit.threshold
        choice.temperatures[k] = edit.temperature


def prove_attached(
    model: nn.Module, edits: Sequence[Exit], examples: Sequence[Inputs]
) -> verify.Proof:
    """Compare the network with and without exits, in eval and train mode.

    Raises:
        BindError, UserError: see `attached`.
        VerificationError: the final answers differ.
    """
    whole = bare_copy(model)
    dtype, whole, inputs = verify.to_compare(whole, examples)
    plain = [e.model_copy(update={"threshold": None}) for e in edits]
    more = bare_copy(attached(capture(whole, inputs[0], check=False), plain))
    try:
        # in this order, as the buffers of the second must all be in the first
        worst, checks = verify._compare(more, whole, [], inputs, dtype)
    except verify._Different as e:
        names = ", ".join(f"'{edit.after}'" for edit in edits)
        raise VerificationError(
            f"exits behind {names} changed the final answer in "
            f"{'train' if e.training else 'eval'} mode: {e}. The model was left as it was."
        ) from None
    return verify.Proof(str(dtype).removeprefix("torch."), worst, verify.TOLERANCE[dtype], checks)


def _leading_to(graph: Graph, id: str) -> set[str]:
    """A node and all that it is made of."""
    found: set[str] = set()
    todo = [id]
    while todo:
        id = todo.pop()
        if id not in found:
            found.add(id)
            todo += graph[id].inputs
    return found


def _join(optimizer: torch.optim.Optimizer, model: nn.Module, head: nn.Module) -> None:
    """Let an optimizer train a head as it does the last weight of the network."""
    homes = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    weights = [p for p in model.parameters() if p.dim() > 1 and id(p) in homes]
    home = homes[id(weights[-1])] if weights else optimizer.param_groups[-1]
    home["params"].extend(head.parameters())
