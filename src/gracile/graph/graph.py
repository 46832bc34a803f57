"""The captured graph: one normalized list of operators, whatever way the model was captured.

Nodes carry stable ids people can read: the module's path for a module that is called once
(`layer1.0.conv1`), `path_1` for its second call, and `<path of the calling module>.<op>` for a
function (`layer1.0.add`, then `layer1.0.add_1`; `add` at the root). Plans, artifacts and parity
reports use these ids.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch.fx


@dataclass
class Node:
    """One operator call.

    Attributes:
        id: stable name, see the module docstring.
        op: normalized operator: `input`, `output`, `param`, `conv`, `conv_transpose`, `linear`,
            `batch_norm`, `relu`, `add`, `cat`, ...; `unknown` with `attrs["target"]` otherwise.
        inputs: ids of the nodes whose tensors it reads, in order.
        module: path of the called module, None for a function.
        params: role -> address of the parameters and buffers it reads (`weight`, `bias`,
            `running_mean`, ...).
        attrs: plain values: `stride`, `padding`, `groups`, `dim`, ...
        shape: shape of its output for the example input; None if it is not one tensor.
        fx: the torch.fx node, None where only the modules are known.
    """

    id: str
    op: str
    inputs: tuple[str, ...] = ()
    module: str | None = None
    params: dict[str, str] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    fx: torch.fx.Node | None = None


@dataclass
class Graph:
    """Nodes in the order they run.

    Attributes:
        nodes: id -> Node, in topological order.
        how: "fx" (whole forward seen), "export" (seen by torch.export: sizes other than the batch
            are numbers) or "modules" (only which modules exist).
        reason: why the better ways failed, for the user; None for "fx".
        module: the fx.GraphModule that computes the same as the model and shares its submodules and
            parameters; None for "modules".
        modes: the modes in which `module` does so; none for "modules". Without "train" (possible
            for "export" only) it computes in train mode what it does in eval mode; `reason` says
            why.
        fixed_batch: the only batch size that `module` is known to compute; None if any.
    """

    nodes: dict[str, Node]
    how: Literal["fx", "export", "modules"]
    reason: str | None = None
    module: torch.fx.GraphModule | None = None
    modes: tuple[Literal["eval", "train"], ...] = ("eval", "train")
    fixed_batch: int | None = None

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def __getitem__(self, id: str) -> Node:
        return self.nodes[id]

    def consumers(self, id: str) -> list[Node]:
        """Nodes that read this node's output."""
        return [n for n in self if id in n.inputs]

    def of_op(self, *ops: str) -> list[Node]:
        """Nodes of these operators, in order."""
        return [n for n in self if n.op in ops]
