"""Let activations and additions write where they read, which saves a tensor each."""

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from gracile.graph.fold import CONVS, NORMS, TRANSPOSED
from gracile.graph.normalize import call_key

OWNERS = (*CONVS, *TRANSPOSED, *NORMS, nn.Linear)  # their result shares memory with nothing
RELUS = (F.relu, torch.relu, ".relu")
ADDS = (operator.add, torch.add, ".add")


def write_in_place(module: fx.GraphModule) -> None:
    """Rewrite ReLUs and additions whose first operand nobody else reads.

    An addition is taken to be one of equal shapes: where the second operand is larger, the module
    raises RuntimeError when it is called. No gradient can go through it any more.
    """
    own: set[fx.Node] = set()
    for node in module.graph.nodes:
        called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(called, OWNERS):
            own.add(node)
            continue
        operands = 2 if _is(node, ADDS) else 1
        nodes = [a for a in node.args if isinstance(a, fx.Node)]
        plain = len(node.args) == len(nodes) == operands and not node.kwargs
        if isinstance(called, nn.ReLU) or (plain and _is(node, (*RELUS, *ADDS))):
            if nodes[0] in own and len(nodes[0].users) == 1:
                node.op, node.target = "call_method", "add_" if operands == 2 else "relu_"
                own.add(node)
            elif operands == 2:
                own.add(node)
    module.recompile()


def _is(node: fx.Node, functions: tuple[object, ...]) -> bool:
    return node.op in ("call_function", "call_method") and call_key(node) in functions
