"""Capture a model's operators: by fx, else by torch.export, else only which modules there are."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from gracile.errors import UserError
from gracile.graph.agree import repeatable as repeatable
from gracile.graph.agree import restored_buffers, same
from gracile.graph.export_trace import export_trace
from gracile.graph.graph import Graph, Node
from gracile.graph.modes import SWITCHES
from gracile.graph.normalize import Call, call_of, module_call
from gracile.graph.oprule import Shape
from gracile.graph.record import Recorder, recorded, sized
from gracile.graph.trace import (
    DROPOUTS,
    CannotTrace,
    has_ids,
    is_operator,
    restored_modes,
    trace,
)
from gracile.nn.quantized import ActivationQuantizer

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip


def capture(model: nn.Module, example: Tensor | tuple[Tensor, ...], *, check: bool = True) -> Graph:
    """The model's operators in the order they run, with shapes for this example.

    fx first; torch.export where the forward has Python that fx cannot follow, or where fx sees a
    part with weights only from outside, with all sizes but the batch's as numbers; the bare list of
    modules where nothing else works, with the reason. A GraphModule that was captured before keeps
    its graph, its ids and what is known about them. The model is run in eval mode without gradients
    (for torch.export also once in train mode) and is left as it was.

    Args:
        model: any module; overlays and hooks on it are not captured.
        example: one input batch, or a tuple of the forward's positional inputs.
        check: compare what fx saw with the model. Without it nothing is computed where shapes can
            be had on the meta device; a proof of what is done with the graph
            (`surgery.verified_apply`) compares with the model itself.

    Raises:
        UserError: the model itself does not run on this example.
    """
    inputs = as_inputs(example)
    with bare(model), quiet(model), restored_modes(model), torch.no_grad():
        model.eval()
        graph = None
        check = check and not has_ids(model)  # what was captured before is its own graph
        expected = _run(model, inputs) if check else None
        try:
            graph = _by_fx(model, inputs, expected, check)
            closed = _closed(graph)
            if not closed or has_ids(model):
                return graph
            reason = f"'{closed[0].id}' ({closed[0].attrs['target']}) cannot be looked into"
        except CannotTrace as e:
            reason = str(e)
        if not check:
            _run(model, inputs)  # says so if the model itself does not run
        try:
            exported = _by_export(model, inputs, f"fx: {reason}")
        except CannotTrace as e:
            return graph or _by_modules(model, inputs, f"fx: {reason}; torch.export: {e}")
        if graph is None or ("train" in exported.modes and len(_closed(exported)) < len(closed)):
            return exported
        return graph


def as_inputs(example: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The positional inputs of a forward."""
    return (example,) if isinstance(example, Tensor) else tuple(example)


def _closed(graph: Graph) -> list[Node]:
    """Unknown operators with weights inside: what is in them cannot be followed."""
    out = []
    weights = {n for n, _ in graph.module.named_parameters()} if graph.module is not None else set()
    for node in graph.of_op("unknown"):
        target = node.fx.target if node.fx is not None and node.fx.op == "call_module" else None
        if target is not None and graph.module is not None:
            if any(True for _ in graph.module.get_submodule(str(target)).parameters()):
                out.append(node)
        elif any(graph[i].params.get("value") in weights for i in node.inputs):
            out.append(node)
    return out


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Take all hooks off (statistics, overlays) for as long as this lasts."""
    held = [
        (m, {name: m.__dict__[name] for name in _HOOKS if name in m.__dict__})
        for m in model.modules()
    ]
    try:
        for m, hooks in held:
            m.__dict__.update({name: type(value)() for name, value in hooks.items()})
        yield
    finally:
        for m, hooks in held:
            m.__dict__.update(hooks)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Switch activation quantizers off: no rounding, nothing shown to observers."""
    quantizers: list[Any] = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    modes = [q.mode for q in quantizers]
    try:
        for q in quantizers:
            q.mode = "off"
        yield
    finally:
        for q, mode in zip(quantizers, modes, strict=True):
            q.mode = mode


def bare_copy(model: nn.Module) -> nn.Module:
    """A deep copy without hooks; what hooks refer to is not copied along."""
    with bare(model):
        return copy.deepcopy(model)


def _run(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    try:
        with repeatable(), restored_buffers(model):
            return model(*inputs)
    except Exception as e:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        text = str(e).strip().split("\n")[0]
        raise UserError(
            f"{type(model).__name__} does not run on the example of shape {shapes}: "
            f"{type(e).__name__}: {text}"
        ) from e


def _by_fx(model: nn.Module, inputs: tuple[Tensor, ...], expected: Any, check: bool) -> Graph:
    with restored_buffers(model):  # fx leaves proxies where a forward assigns to a buffer
        module = trace(model)
    with quiet(module), restored_modes(module):
        module.eval()
        recorder = _record(module, inputs, values=check)
    if check and not same(expected, recorder.result):
        raise CannotTrace("the traced graph computes something else than the model")
    return _graph_of(module, recorder)


def _record(module: fx.GraphModule, inputs: tuple[Tensor, ...], values: bool = True) -> Recorder:
    try:
        return recorded(module, inputs) if values else sized(module, inputs)
    except Exception as e:
        text = str(e).strip().split("\n")[0]
        raise CannotTrace(f"the traced graph does not run: {text}") from e


def _graph_of(module: fx.GraphModule, seen: Recorder) -> Graph:
    (output,) = module.graph.find_nodes(op="output")
    how = output.meta.get("captured", {"how": "fx"})
    return Graph(_nodes(module, seen), module=module, **how)


def _by_export(model: nn.Module, inputs: tuple[Tensor, ...], reason: str) -> Graph:
    seen = export_trace(model, inputs)
    if seen.eval_only is not None:
        reason += f"; eval mode only: {seen.eval_only}"
    if seen.full_precision:
        reason += "; parts that switch autocast off follow it in the captured graph"
    (output,) = seen.module.graph.find_nodes(op="output")
    output.meta["captured"] = {
        "how": "export",
        "reason": reason,
        "modes": ("eval", "train") if seen.eval_only is None else ("eval",),
        "fixed_batch": seen.fixed_batch,
    }
    return _graph_of(seen.module, _record(seen.module, inputs))


def _by_modules(model: nn.Module, inputs: tuple[Tensor, ...], reason: str) -> Graph:
    nodes: dict[str, Node] = {}
    for k, x in enumerate(inputs):
        nodes[f"input_{k}" if k else "input"] = Node(
            f"input_{k}" if k else "input", "input", shape=tuple(x.shape)
        )
    hooks = []

    def record(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            id, k = path, 0
            while id in nodes:
                k += 1
                id = f"{path}_{k}"
            call = module_call(module, path)
            shape = tuple(out.shape) if isinstance(out, Tensor) else None
            call.attrs["input_shapes"] = tuple(
                tuple(a.shape) for a in args if isinstance(a, Tensor)
            )
            nodes[id] = Node(id, call.op, (), path, call.params, call.attrs, shape)

        return hook

    for path, module in model.named_modules():
        if is_operator(module):
            hooks.append(module.register_forward_hook(record(path)))
    try:
        _run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return Graph(nodes, "modules", reason=reason, modes=())


def _attribute_address(node: fx.Node) -> str | None:
    return str(node.target) if node.op == "get_attr" else None


def _nodes(module: fx.GraphModule, seen: Recorder) -> dict[str, Node]:
    shapes = {_attribute_address(n): s for n, s in seen.shapes.items() if s is not None}
    out: dict[str, Node] = {}
    for node in module.graph.nodes:
        address = _attribute_address(node)
        if address is not None:
            call = Call("param", None, address, {"value": address})
        else:
            call = call_of(node, module.get_submodule, _attribute_address)
        path = _module_path(node)
        inputs = tuple(n.meta["id"] for n in call.args if n in seen.tensors)
        if call.rule is not None:
            sizes = {role: shapes.get(a) or _shape_at(module, a) for role, a in call.params.items()}
            call.rule.complete(call.attrs, sizes)
        id = node.meta["id"]
        out[id] = Node(
            id, call.op, inputs, path, call.params, call.attrs, seen.shapes.get(node), node
        )
    return out


def _shape_at(module: nn.Module, address: str) -> Shape:
    path, _, name = address.rpartition(".")
    return tuple(getattr(module.get_submodule(path), name).shape)


def _module_path(node: fx.Node) -> str | None:
    if node.op != "call_module":
        return None
    path = str(node.target)
    return None if path.split(".")[0] in (DROPOUTS, SWITCHES) else path
