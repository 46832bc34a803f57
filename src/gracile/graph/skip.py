"""Leave residual blocks out of a model, and prove it: left out = multiplied by zero."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from gracile.core.plan import Skip
from gracile.errors import BindError, UserError, VerificationError
from gracile.graph import verify
from gracile.graph.capture import bare_copy
from gracile.graph.depth import blocks, check_block, dead_nodes, vanishing
from gracile.graph.graph import Graph
from gracile.graph.shared_module import SharedModule, copied_graph

Inputs = Tensor | tuple[Tensor, ...]


def leave_out(
    model: nn.Module,
    edits: Sequence[Skip],
    graph: Graph,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> fx.GraphModule:
    """A GraphModule without these blocks; modules and parameters only they used are not in it.

    Args:
        model: shares what stays with the result; itself not changed.
        edits: in order.
        graph: as captured from the model.
        optimizer: forgets the parameters that go and their state.

    Raises:
        BindError: the forward cannot be rewritten.
        UserError: no such block, or one that cannot be left out.
    """
    cut = _identities(model, edits, graph)
    module, twin = _copied(graph)
    for block, identity in cut.items():
        addition, stays = twin.get(block), twin.get(identity)
        if addition is None or stays is None:
            raise UserError(f"block '{block}' lies in one that is left out before it.")
        dead = dead_nodes(module.graph, {addition: stays})
        gone = vanishing(module, list(dead))
        addition.replace_all_uses_with(stays)
        for node in (addition, *reversed([n for n in module.graph.nodes if n in dead])):
            module.graph.erase_node(node)
        # a later block may hand on what this one did
        twin = {i: stays if n is addition else n for i, n in twin.items() if n not in dead}
        for path in gone:
            _drop(module, path)
    module.graph.lint()
    module.recompile()
    if optimizer is not None:
        kept = {id(p) for p in module.parameters()}
        forget(optimizer, [p for p in model.parameters() if id(p) not in kept])
    return module


def prove_skips(
    model: nn.Module, edits: Sequence[Skip], examples: Sequence[Inputs], graph: Graph
) -> verify.Proof:
    """Compare the model without these blocks with the one whose branches count zero times.

    In eval and in train mode: outputs, and the buffers that stay after one step.

    Args:
        model: not changed.
        edits: all at once.
        examples: input batches.
        graph: as captured from the model.

    Raises:
        BindError, UserError: see `leave_out`.
        VerificationError: the two differ; names the first operator that does.
    """
    cut = _identities(model, edits, graph)
    source, _ = _copied(graph)
    whole: Any = bare_copy(source)
    verify._fill_zero_parameters(whole)
    dtype, whole, inputs = verify.to_compare(whole, examples)
    masked, skipped = copy.deepcopy(whole), whole
    _multiply_by_zero(masked, cut)
    skipped = leave_out(whole, edits, Graph(_twins(graph, whole), graph.how, module=whole))
    tolerance = verify.TOLERANCE[dtype]
    try:
        worst, checks = verify._compare(masked, skipped, [], inputs, dtype)
    except verify._Different as e:
        where = _first_difference(masked, skipped, e, tolerance)
        names = ", ".join(f"'{id}'" for id in cut)
        raise VerificationError(
            f"leaving out {names} is not the same as adding nothing there in "
            f"{'train' if e.training else 'eval'} mode: {where} ({e}). The model was left as it "
            "was; keep these blocks."
        ) from None
    return verify.Proof(str(dtype).removeprefix("torch."), worst, tolerance, checks)


def _identities(model: nn.Module, edits: Sequence[Skip], graph: Graph) -> dict[str, str]:
    """Addition -> the operand it hands on."""
    if graph.module is None:
        raise BindError(f"no block can be left out: {graph.reason}")
    known = {b.id: b for b in blocks(model, graph)}
    for edit in edits:
        check_block(edit.block, known)
    return {edit.block: known[edit.block].identity for edit in edits}


def _copied(graph: Graph) -> tuple[SharedModule, dict[str, fx.Node]]:
    """The captured module with a graph of its own, and id -> node of that."""
    assert graph.module is not None
    module = SharedModule(graph.module, copied_graph(graph)[0])
    return module, {n.meta["id"]: n for n in module.graph.nodes}


def _twins(graph: Graph, module: fx.GraphModule) -> dict[str, Any]:
    """The graph's nodes, of a copy of its module."""
    by_id = {n.meta["id"]: n for n in module.graph.nodes}
    out = {}
    for node in graph:
        out[node.id] = copy.copy(node)
        out[node.id].fx = by_id[node.id]
    return out


def _multiply_by_zero(module: fx.GraphModule, cut: dict[str, str]) -> None:
    for node in [n for n in module.graph.nodes if n.meta["id"] in cut]:
        for operand in node.all_input_nodes:
            if operand.meta["id"] == cut[node.meta["id"]]:
                continue
            with module.graph.inserting_before(node):
                zero = module.graph.call_function(torch.mul, (operand, 0))
            zero.meta["id"] = f"{operand.meta['id']}.times_zero"
            node.replace_input_with(operand, zero)
    module.recompile()


def _first_difference(
    masked: fx.GraphModule, skipped: fx.GraphModule, e: verify._Different, tolerance: float
) -> str:
    left, right = (verify._outputs(m, e.inputs, e.training) for m in (masked, skipped))
    for id, b in right.items():
        a = left.get(id)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if a.shape != b.shape or not verify.difference(a, b) <= tolerance:
            return f"the first differing operator is '{id}'"
    return "no single operator differs"


def _drop(module: nn.Module, path: str) -> None:
    """Take a module or tensor out, and what holds nothing after that; nothing shared is touched."""
    *parents, name = path.split(".")
    way = [module]
    for part in parents:
        child = way[-1]._modules.get(part)
        if child is None:
            return  # went with an earlier path
        if type(child) is not nn.Module:  # the model's own, which only holds tensors here
            child = way[-1]._modules[part] = _holder(child)
        way.append(child)
    for owned in (way[-1]._modules, way[-1]._parameters, way[-1]._buffers):
        owned.pop(name, None)  # type: ignore[attr-defined]
    for home, part in zip(reversed(way[:-1]), reversed(parents), strict=True):
        held = home._modules[part]
        assert held is not None
        if held._modules or held._parameters or held._buffers:
            break
        del home._modules[part]


def _holder(source: nn.Module) -> nn.Module:
    out = nn.Module().train(source.training)
    out._parameters, out._buffers = dict(source._parameters), dict(source._buffers)
    out._modules = dict(source._modules)
    out._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
    return out


def forget(optimizer: torch.optim.Optimizer, gone: Sequence[nn.Parameter]) -> None:
    """Take parameters, and what an optimizer keeps of them, out of it."""
    lost = {id(p) for p in gone}
    for group in optimizer.param_groups:
        group["params"][:] = [p for p in group["params"] if id(p) not in lost]
    for p in gone:
        optimizer.state.pop(p, None)
