"""Tensors that a forward makes anew at each call and writes into, made constants for export.

Swin's mask of shifted windows is zeros with parts filled in: the same at every call. A mark on
such a part would cut the tie between the part and the whole, and exporters drop the writes.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx

MAPS = "_maps"
MAKERS = ("new_zeros", "new_ones", "new_full", "new_empty", "zeros", "ones", "full", "arange")
OF_A_TENSOR = ("new_zeros", "new_ones", "new_full", "new_empty")  # take its type, not its values


def fold_written(module: fx.GraphModule) -> frozenset[str]:
    """Compute what depends on no input and is written into, and put its values in place of it.

    Args:
        module: changed in place; untouched where nothing is written into.

    Returns:
        Ids of the operators that are gone.
    """
    values = _constants(module)
    if not any(_writes(node) for node in values):
        return frozenset()
    stored = 0
    for node in list(module.graph.nodes):
        if node in values:
            _compute(module, node, values)
            continue
        for made in [i for i in node.all_input_nodes if isinstance(values.get(i), Tensor)]:
            name = f"_written_{stored}"
            stored += 1
            module.register_buffer(name, values[made].clone(), persistent=False)
            with module.graph.inserting_before(node):
                constant = module.graph.get_attr(name)
            constant.meta["id"] = name
            node.replace_input_with(made, constant)
    gone = frozenset(str(n.meta.get("id")) for n in values if n.op != "get_attr")
    for node in reversed(list(values)):
        if not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return gone


def _constants(module: fx.GraphModule) -> dict[fx.Node, Any]:
    """Nodes whose value is the same at every call, not yet computed."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            if str(node.target) not in parameters:
                found[node] = None
        elif node.op == "call_module":
            # A cut network has channel maps in the place of such calls; they hold numbers only.
            rest = {k: v for k, v in node.kwargs.items() if k != "like"}  # gives only its type
            read: list[fx.Node] = []
            fx.node.map_arg((node.args, rest), read.append)
            if str(node.target).startswith(f"{MAPS}.") and all(i in found for i in read):
                found[node] = None
        elif node.op in ("call_function", "call_method"):
            if _target(node) in MAKERS:
                skip = 1 if _target(node) in OF_A_TENSOR else 0
                sizes: list[fx.Node] = []
                fx.node.map_arg((node.args[skip:], dict(node.kwargs)), sizes.append)
                if not sizes:  # numbers
                    found[node] = None
            elif node.all_input_nodes and all(i in found for i in node.all_input_nodes):
                found[node] = None
    return found


def _compute(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> None:
    def value(other: fx.Node) -> Any:
        return values[other] if other in values else torch.zeros(())

    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
    target: Any = node.target
    with torch.no_grad():
        if node.op == "get_attr":
            values[node] = operator.attrgetter(str(target))(module)
        elif node.op == "call_module":
            values[node] = module.get_submodule(str(target))(*args, **kwargs)
        elif node.op == "call_method":
            values[node] = getattr(args[0], target)(*args[1:], **kwargs)
        else:
            values[node] = target(*args, **kwargs)


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).rpartition("::")[2]
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _writes(node: fx.Node) -> bool:
    name = _target(node)
    return node.op != "get_attr" and (
        name in ("setitem", "copy_") or (name.endswith("_") and not name.endswith("__"))
    )
