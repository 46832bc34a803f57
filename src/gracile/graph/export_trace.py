"""Trace a model with torch.export: a GraphModule over its own modules, as `trace` makes by fx.

Python that fx cannot follow (branches on sizes, loops over them, dict outputs) is run, so all sizes
but the batch's are numbers in the graph.
"""

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from gracile.graph.agree import first_disagreement
from gracile.graph.exported import CONSTANTS, Rebuilder
from gracile.graph.leaf_call import leaf_calls
from gracile.graph.modes import follow_the_mode, owners_that_differ
from gracile.graph.shared_module import SharedModule
from gracile.graph.trace import CannotTrace, is_operator, name_nodes, restored_modes, spelled_out

_ROUNDS = 8


@dataclass(frozen=True)
class Exported:
    """What torch.export saw.

    Attributes:
        module: computes the same as the model and shares its modules, parameters and buffers.
        eval_only: why it does so in eval mode only; None if it does in train mode, too.
        fixed_batch: the only batch size it computes; None if any.
        full_precision: parts of the forward switch autocast off; `module` does not do that.
    """

    module: fx.GraphModule
    eval_only: str | None
    fixed_batch: int | None
    full_precision: bool = False


def export_trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Exported:
    """A GraphModule that computes what the model computes, checked on these inputs.

    Calls of modules that are one operator stay such calls, everything else is an aten operator.
    What follows the mode becomes a module that does: dropout under `_dropouts`, other numbers under
    `_by_mode`. A submodule that differs in more than numbers stays one opaque node.

    Args:
        model: without hooks; its modes, buffers and parameters are left as they were.
        inputs: of its forward. With a batch of one the model is looked at with a batch of two,
            because torch.export takes a size of 1 for a constant.

    Raises:
        CannotTrace: the forward cannot be followed, with the reason.
    """
    failed: CannotTrace | None = None
    training = model.training
    with restored_modes(model):
        for example, free in _attempts(inputs):
            try:
                seen = _traced(model, example, free, inputs)
            except CannotTrace as e:
                failed = e
                continue
            own = set(seen.module.modules()) - set(model.modules())
            for m in own:
                m.training = training
            return seen
    assert failed is not None
    raise failed


def _attempts(inputs: tuple[Tensor, ...]) -> Iterator[tuple[tuple[Tensor, ...], bool]]:
    """Examples to export with, and whether the batch size is left free."""
    sizes = {x.shape[0] for x in inputs if x.dim()}
    if sizes == {1}:
        yield tuple(torch.cat([x, x]) if x.dim() else x for x in inputs), True
    elif sizes:
        yield inputs, True
    yield inputs, False


def _traced(
    model: nn.Module, example: tuple[Tensor, ...], free: bool, inputs: tuple[Tensor, ...]
) -> Exported:
    whole = {path for path, m in model.named_modules() if path and is_operator(m)}
    still = _export(model, False, example, free, whole)
    fixed_batch = _fixed_batch(still)
    if fixed_batch is not None and example is not inputs:
        raise CannotTrace(f"the forward computes a batch of {fixed_batch} only")
    graphs, eval_only = _both_modes(model, still, example, free, whole)
    module = _module(model, graphs[0])
    if eval_only is None:
        follow_the_mode(module, graphs[1].graph)
    module.graph.lint()
    module.recompile()
    for batch in [inputs] if example is inputs else [inputs, example]:
        if what := _disagreement(model, module, batch, False):
            raise CannotTrace(f"the exported graph {what}")
    if eval_only is None and (what := _disagreement(model, module, example, True)):
        eval_only = f"in train mode the exported graph {what}"
        module = _module(model, _export(model, False, example, free, whole))
    return Exported(module, eval_only, fixed_batch, still.full_precision)


def _both_modes(
    model: nn.Module, still: "_Graph", example: tuple[Tensor, ...], free: bool, whole: set[str]
) -> tuple[list["_Graph"], str | None]:
    """The graphs in eval and train mode that differ in numbers only, or why there is but one."""
    first, whole = still, set(whole)
    for _ in range(_ROUNDS):
        try:
            moving = _export(model, True, example, free, whole)
        except CannotTrace as e:
            return [first], f"in train mode: {e}"
        differ = owners_that_differ(still.graph, moving.graph)
        if not differ:
            return [still, moving], None
        if "" in differ:
            return [first], "the model's own forward does something else in train mode"
        whole |= differ
        try:
            still = _export(model, False, example, free, whole)
        except CannotTrace as e:
            return [first], f"{', '.join(sorted(differ))} does something else in train mode: {e}"
    return [first], "forwards do something else in train mode"


@dataclass
class _Graph:
    graph: fx.Graph
    constants: dict[str, Tensor]
    sizes: list[Any]  # first dim of each input: a number, or a symbol where it is free
    full_precision: bool


def _export(
    model: nn.Module,
    training: bool,
    example: tuple[Tensor, ...],
    free: bool,
    whole: Collection[str],
) -> _Graph:
    shapes: Any = None
    if free:
        shapes = torch.export.ShapesCollection()
        for x in {id(x): x for x in example if x.dim() and x.shape[0] > 1}.values():
            shapes[x] = {0: torch.export.Dim.AUTO}
    model.train(training)
    try:
        with (
            spelled_out(),
            leaf_calls(model, whole) as calls,
            _torch_keeps_quiet(),
            _autocast_stays_off() as switched_off,
        ):
            program = torch.export.export(model, example, strict=False, dynamic_shapes=shapes)
            made = Rebuilder(program, calls, model)
    except CannotTrace:
        raise
    except Exception as e:
        text = str(e).strip().split("\n")[0]
        raise CannotTrace(f"{type(e).__name__}: {text}") from e
    values = [n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")]
    sizes = [v.shape[0] for v in values[-len(example) :] if isinstance(v, Tensor) and v.dim()]
    return _Graph(made.graph, made.constants, sizes, bool(switched_off))


def _fixed_batch(seen: _Graph) -> int | None:
    if not seen.sizes or not is_concrete_int(seen.sizes[0]):
        return None
    return int(seen.sizes[0])


def _module(model: nn.Module, seen: _Graph) -> fx.GraphModule:
    root = nn.Module()
    root.__dict__.update({**model.__dict__, "_modules": dict(model._modules)})
    if seen.constants:
        home = nn.Module()
        for address, tensor in seen.constants.items():
            home.register_buffer(address.removeprefix(f"{CONSTANTS}."), tensor, persistent=False)
        root.add_module(CONSTANTS, home)
    module = SharedModule(root, seen.graph, type(model).__name__)
    name_nodes(module, model)
    return module


def _disagreement(
    model: nn.Module, module: nn.Module, inputs: tuple[Tensor, ...], training: bool
) -> str | None:
    try:
        what = first_disagreement(model, module, inputs, training)
    except Exception as e:
        text = str(e).strip().split("\n")[0]
        return f"does not run: {text}"
    return f"has other {what} than the model" if what else None


@contextmanager
def _autocast_stays_off() -> Iterator[list[torch.autocast]]:
    """Switching autocast off where it is off does nothing; torch.export makes a subgraph of it."""
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__
    idle: list[torch.autocast] = []

    def enter_unless_idle(self: torch.autocast) -> Any:
        if self._enabled or torch.is_autocast_enabled(self.device):
            return enter(self)
        idle.append(self)
        return self

    def leave_unless_idle(self: torch.autocast, *error: Any) -> Any:
        return False if any(x is self for x in idle) else leave(self, *error)

    kind: Any = torch.autocast
    kind.__enter__, kind.__exit__ = enter_unless_idle, leave_unless_idle
    try:
        yield idle
    finally:
        kind.__enter__, kind.__exit__ = enter, leave


@contextmanager
def _torch_keeps_quiet() -> Iterator[None]:
    # torch.export prints the graph it stopped at and warns about its own internals.
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
