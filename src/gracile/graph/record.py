"""Run a traced module and keep the shape of every node's output, with or without values."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from gracile.graph.agree import repeatable, restored_buffers
from gracile.graph.oprule import Shape


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the shape of every output.

    Attributes:
        shapes: of each node's output; None where it is not one tensor.
        dtypes: likewise.
        tensors: nodes whose output has tensors in it.
        result: what the graph returned.
    """

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.shapes: dict[fx.Node, Shape | None] = {}
        self.dtypes: dict[fx.Node, torch.dtype | None] = {}
        self.tensors: set[fx.Node] = set()
        self.result: Any = None

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note what it made."""
        out = super().run_node(n)
        self.shapes[n] = tuple(out.shape) if isinstance(out, Tensor) else None
        self.dtypes[n] = out.dtype if isinstance(out, Tensor) else None
        if any(isinstance(v, Tensor) for v in pytree.tree_leaves(out)):
            self.tensors.add(n)
        return out


class _WithoutValues(Recorder):
    """For the meta device, where a batch norm would be a dozen operators in Python: skipped."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module makes; a batch norm only passes on what it takes."""
        m = self.fetch_attr(str(target))
        if isinstance(m, _BatchNorm) and args and args[0].shape[1] == m.num_features:
            return args[0]
        return super().call_module(target, args, kwargs)


class _Run(nn.Module):
    """An interpreter as a module, whose tensors can be exchanged for a call."""

    def __init__(self, interpreter: fx.Interpreter):
        super().__init__()
        self.module = interpreter.module
        self.interpreter = interpreter

    def forward(self, *inputs: Tensor) -> Any:
        """Run the graph."""
        return self.interpreter.run(*inputs)


def recorded(module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Recorder:
    """Run it on these inputs; buffers and random numbers are as before afterwards."""
    recorder = Recorder(module)
    with repeatable(), restored_buffers(module):
        recorder.result = recorder.run(*inputs)
    return recorder


def _on_meta(module: nn.Module) -> dict[str, Tensor]:
    """Name -> the tensor on the meta device, one for each name in each module object.

    A module that stands in two places comes once: `functional_call` restores in the order in which
    it exchanged, and would leave such a module with what it was given.
    """
    tied: dict[int, Tensor] = {}
    return {
        f"{at}.{name}".lstrip("."): tied.setdefault(id(t), t.to("meta"))
        for at, m in module.named_modules()
        for tensors in (m.named_parameters(recurse=False), m.named_buffers(recurse=False))
        for name, t in tensors
    }


def sized(module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Recorder:
    """Shapes without values: everything on the meta device, or a run where that does not work.

    `result` stays None if nothing was computed.
    """
    recorder = _WithoutValues(module)
    run = _Run(recorder)
    try:
        meta = tuple(x.to("meta") for x in inputs)
        functional_call(run, _on_meta(run), meta, tie_weights=False)
    except Exception:  # an operator that needs values, or makes tensors on a device of its own
        return recorded(module, inputs)
    return recorder
