"""Capture a model's operators: by fx, else by torch.export, else only which modules there are."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gracile.errors import UserError
from gracile.graph.graph import Graph, Node
from gracile.graph.normalize import Call, call_of, module_call
from gracile.graph.oprule import Shape
from gracile.graph.trace import (
    DROPOUTS,
    CannotTrace,
    is_operator,
    owner,
    restored_modes,
    trace,
)
from gracile.nn.quantized import ActivationQuantizer

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip


def capture(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> Graph:
    """The model's operators in the order they run, with shapes for this example.

    fx first, whose graph can be rewritten; torch.export where the forward has Python that fx cannot
    follow; the bare list of modules where nothing else works, with the reason. A GraphModule that
    was captured before keeps its graph and its ids. The model is run in eval mode without gradients
    and is left as it was.

    Args:
        model: any module; overlays and hooks on it are not captured.
        example: one input batch, or a tuple of the forward's positional inputs.

    Raises:
        UserError: the model itself does not run on this example.
    """
    inputs = as_inputs(example)
    with bare(model), quiet(model), restored_modes(model), torch.no_grad():
        model.eval()
        expected = _run(model, inputs)
        try:
            return _by_fx(model, inputs, expected)
        except CannotTrace as e:
            reason = str(e)
        try:
            return _by_export(model, inputs, f"fx: {reason}")
        except CannotTrace as e:
            return _by_modules(model, inputs, f"fx: {reason}; torch.export: {e}")


def as_inputs(example: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The positional inputs of a forward."""
    return (example,) if isinstance(example, Tensor) else tuple(example)


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


@contextmanager
def repeatable() -> Iterator[None]:
    """The same random numbers every time, without touching anyone's generators."""
    ready = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if ready else []):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reach a sleeping GPU
        if ready:
            torch.cuda.manual_seed_all(0)
        yield


def bare_copy(model: nn.Module) -> nn.Module:
    """A deep copy without hooks; what hooks refer to is not copied along."""
    with bare(model):
        return copy.deepcopy(model)


def _run(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    try:
        with repeatable():
            return model(*inputs)
    except Exception as e:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        text = str(e).strip().split("\n")[0]
        raise UserError(
            f"{type(model).__name__} does not run on the example of shape {shapes}: "
            f"{type(e).__name__}: {text}"
        ) from e


def _by_fx(model: nn.Module, inputs: tuple[Tensor, ...], expected: Any) -> Graph:
    module = trace(model)
    with quiet(module), restored_modes(module):
        module.eval()
        recorder = _Recorder(module)
        try:
            with repeatable():
                got = recorder.run(*inputs)
        except Exception as e:
            text = str(e).strip().split("\n")[0]
            raise CannotTrace(f"the traced graph does not run: {text}") from e
    if not _same(expected, got):
        raise CannotTrace("the traced graph computes something else than the model")
    nodes = _nodes(module.graph, recorder, module.get_submodule, _attribute_address, keep=True)
    return Graph(nodes, "fx", module=module)


def _by_export(model: nn.Module, inputs: tuple[Tensor, ...], reason: str) -> Graph:
    try:
        with _torch_keeps_quiet():
            program = torch.export.export(model, inputs, strict=False)
            signature = program.graph_signature
            module = program.graph_module
    except Exception as e:
        text = str(e).strip().split("\n")[0]
        raise CannotTrace(f"{type(e).__name__}: {text}") from e
    tensors = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
    }
    for node in module.graph.nodes:
        _name_exported(node, model, tensors)
    _make_unique(module.graph, model)
    values = _ExportedShapes(module.graph)
    nodes = _nodes(
        module.graph, values, model.get_submodule, lambda n: tensors.get(n.name), keep=False
    )
    return Graph(nodes, "export", reason=reason)


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
    return Graph(nodes, "modules", reason=reason)


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


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the shape of every output."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.shapes: dict[fx.Node, Shape | None] = {}
        self.tensors: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note what it made."""
        out = super().run_node(n)
        self.shapes[n] = tuple(out.shape) if isinstance(out, Tensor) else None
        if any(isinstance(v, Tensor) for v in pytree.tree_leaves(out)):
            self.tensors.add(n)
        return out


class _ExportedShapes:
    """The same knowledge from an exported graph, which has run already."""

    def __init__(self, graph: fx.Graph):
        values = {n: n.meta.get("val") for n in graph.nodes}
        self.shapes = {
            n: tuple(int(s) for s in v.shape) if isinstance(v, Tensor) else None
            for n, v in values.items()
        }
        self.tensors = {
            n
            for n, v in values.items()
            if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(v))
        }


def _attribute_address(node: fx.Node) -> str | None:
    return str(node.target) if node.op == "get_attr" else None


def _nodes(
    graph: fx.Graph,
    seen: "_Recorder | _ExportedShapes",
    module_at: Callable[[str], nn.Module],
    address_of: Callable[[fx.Node], str | None],
    *,
    keep: bool,
) -> dict[str, Node]:
    shapes = {address_of(n): s for n, s in seen.shapes.items() if s is not None}
    out: dict[str, Node] = {}
    for node in graph.nodes:
        address = address_of(node)
        if address is not None:
            call = Call("param", None, address, {"value": address})
        else:
            call = call_of(node, module_at, address_of)
        path = _module_path(node)
        inputs = tuple(n.meta["id"] for n in call.args if n in seen.tensors)
        if call.rule is not None:
            sizes = {
                role: shapes.get(a) or _shape_at(module_at, a) for role, a in call.params.items()
            }
            call.rule.complete(call.attrs, sizes)
        id = node.meta["id"]
        out[id] = Node(
            id, call.op, inputs, path, call.params, call.attrs, seen.shapes.get(node),
            node if keep else None,
        )  # fmt: skip
    return out


def _shape_at(module_at: Callable[[str], nn.Module], address: str) -> Shape:
    path, _, name = address.rpartition(".")
    return tuple(getattr(module_at(path), name).shape)


def _module_path(node: fx.Node) -> str | None:
    if node.op == "call_module":
        path = str(node.target)
        return None if path.startswith(f"{DROPOUTS}.") else path
    return node.meta.get("module_path")


def _name_exported(node: fx.Node, model: nn.Module, tensors: dict[str, str]) -> None:
    """The id before doubles are numbered: the leaf module's path where it is one operator."""
    if node.op == "placeholder":
        node.meta["id"] = tensors.get(node.name, str(node.target))
        return
    if node.op == "output":
        node.meta["id"] = "output"
        return
    call = call_of(node, model.get_submodule, lambda n: tensors.get(n.name))
    path = owner(node)
    leaf = model.get_submodule(path)
    if path and is_operator(leaf) and module_call(leaf, path).op == call.op:
        node.meta["id"] = node.meta["module_path"] = path
    else:
        node.meta["id"] = f"{path}.{call.name}".lstrip(".")


def _make_unique(graph: fx.Graph, model: nn.Module) -> None:
    paths = {path for path, _ in model.named_modules()}
    taken: set[str] = set()
    for node in graph.nodes:
        base = id = node.meta["id"]
        k = 0
        while id in taken or (id in paths and not (k == 0 and node.meta.get("module_path") == id)):
            k += 1
            id = f"{base}_{k}"
        taken.add(id)
        node.meta["id"] = id


def _same(expected: Any, got: Any) -> bool:
    a, b = pytree.tree_leaves(expected), pytree.tree_leaves(got)
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if isinstance(x, Tensor):
            if not isinstance(y, Tensor) or x.shape != y.shape:
                return False
            if not torch.allclose(x.double(), y.double(), rtol=1e-4, atol=1e-5, equal_nan=True):
                return False
        elif x != y:
            return False
    return True
