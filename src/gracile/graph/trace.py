"""Trace a model with torch.fx: a GraphModule that shares its modules and has stable node ids."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from gracile.graph.normalize import argument, call_of
from gracile.graph.oprule import rule_of_module

DROPOUTS = "_dropouts"  # where functional dropouts live once they are modules
_DROPOUT_MODULES: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
_DROPOUT_NAMES = ("input", "p", "training", "inplace")
_DROPOUT_DEFAULTS = {"p": 0.5, "training": True, "inplace": False}
_CONTAINERS = (
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Transformer, nn.TransformerEncoder,
    nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
    parametrize.ParametrizationList, parametrizations._WeightNorm,
)  # fmt: skip


class CannotTrace(Exception):
    """Why fx cannot follow a forward; caught by `capture`, which then tries another way."""


class _Tracer(fx.Tracer):
    """Leaves are torch's own layers, everything an OpRule knows, and the modules in `whole`."""

    proxy_buffer_attributes = True

    def __init__(self, whole: Collection[str] = ()):
        super().__init__()
        self.whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the call of a module is one node."""
        return module_qualified_name in self.whole or is_operator(m)


def is_operator(module: nn.Module) -> bool:
    """Whether a module is one operator: torch's own, or one that an OpRule knows."""
    home = type(module).__module__
    own = home.startswith(("torch.nn.", "torch.ao.nn")) and not isinstance(module, _CONTAINERS)
    if parametrize.is_parametrized(module):  # a subclass that computes its weight
        return False
    return own or rule_of_module(module) is not None


def has_ids(model: nn.Module) -> bool:
    """Whether this is a GraphModule that was captured before."""
    return isinstance(model, fx.GraphModule) and all("id" in n.meta for n in model.graph.nodes)


def trace(model: nn.Module) -> fx.GraphModule:
    """A GraphModule that computes what the model computes, in train and in eval mode.

    It shares the model's submodules and parameters. Functional dropout that follows `training`
    becomes a module under `_dropouts`, which follows it too. A submodule whose forward depends on
    `training` in any other way stays one opaque node. Node ids are in ``meta["id"]``.

    Raises:
        CannotTrace: the forward cannot be followed, with the reason.
    """
    if isinstance(model, fx.GraphModule) and has_ids(model):
        return model
    whole: set[str] = set()
    hooked = any(type(m).train is not nn.Module.train for m in model.modules())
    for _ in range(8):
        still, made, asks = _trace_in(model, False, whole)
        moving = _trace_in(model, True, whole)[0] if asks or hooked else still
        differ = _owners_that_differ(still, moving)
        if not differ:
            break
        if "" in differ:
            raise CannotTrace("the model's own forward does something else in train and eval mode")
        whole |= differ
    else:
        raise CannotTrace("forwards do something else in train and eval mode")
    try:
        model.__dict__.update(made)
        module = fx.GraphModule(model, still, class_name=type(model).__name__)
    finally:
        for name in made:
            model.__dict__.pop(name, None)
    module.training = model.training
    name_nodes(module, model)
    if moving is not still:
        _dropouts_to_modules(module, owned(moving))
        module.graph.lint()
        module.recompile()
    return module


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Put every module's train/eval flag back afterwards, one by one."""
    flags = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for m, training in flags:
            m.training = training


@contextmanager
def _readings() -> Iterator[list[type[nn.Module]]]:
    """Which modules ask whether they are in train mode, for as long as this lasts.

    A forward that never asks, traced into its leaves, is the same in both modes.
    """
    read: list[type[nn.Module]] = []

    def get(module: nn.Module) -> bool:
        read.append(type(module))
        if "training" in module.__dict__:
            return bool(module.__dict__["training"])
        raise AttributeError("training")  # a scripted module keeps it elsewhere

    def put(module: nn.Module, training: bool) -> None:
        module.__dict__["training"] = training

    held = nn.Module.__dict__.get("training")
    nn.Module.training = property(get, put)  # type: ignore[assignment]
    try:
        yield read
    finally:
        if held is None:
            del nn.Module.training
        else:
            nn.Module.training = held


@contextmanager
def spelled_out() -> Iterator[None]:
    """torch's transformer layers run operator by operator, without looking at masks' values.

    Their fused path is one opaque operator. Whether a mask is causal is only a hint beside it.
    """
    home: Any = nn.modules.transformer
    held = {name: getattr(home, name) for name in ("_get_seq_len", "_detect_is_causal_mask")}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    home._get_seq_len = lambda src, batch_first: None
    home._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for name, function in held.items():
            setattr(home, name, function)


def owner(node: fx.Node) -> str:
    """Path of the module whose forward made this call."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if node.op == "call_module" and stack:
        stack = stack[:-1]
    return str(stack[-1][0]) if stack else ""


def _trace_in(
    model: nn.Module, training: bool, whole: Collection[str]
) -> tuple[fx.Graph, dict[str, Any], bool]:
    """The graph in one mode, the tensors made from plain numbers, whether `training` was read."""
    before = set(model.__dict__)
    with restored_modes(model), spelled_out():
        model.train(training)
        try:
            with _readings() as read:
                graph = _Tracer(whole).trace(model)
        except Exception as e:
            text = str(e).strip().split("\n")[0]
            raise CannotTrace(f"{type(e).__name__}: {text}") from e
        finally:  # fx leaves those tensors on the model; they belong to the graph
            made = {n: model.__dict__.pop(n) for n in set(model.__dict__) - before}
    return graph, made, bool(read)


def owned(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Nodes in order by the module whose forward made them."""
    out: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        out.setdefault(owner(node), []).append(node)
    return out


def _owners_that_differ(a: fx.Graph, b: fx.Graph) -> set[str]:
    if a is b:
        return set()
    left, right = owned(a), owned(b)
    return {
        path
        for path in left.keys() | right.keys()
        if [_signature(n) for n in left.get(path, [])]
        != [_signature(n) for n in right.get(path, [])]
    }


def _signature(node: fx.Node) -> tuple[Any, ...]:
    """What must be the same in train and eval mode: all but a dropout's `training`."""
    if node.target in _DROPOUT_MODULES:
        return (node.op, node.target, _dropout_options(node)["p"])
    hide = fx.node.map_arg((node.args, node.kwargs), lambda n: "node")
    return (node.op, str(node.target), repr(hide))


def _dropout_options(node: fx.Node) -> dict[str, Any]:
    given = {n: argument(node, _DROPOUT_NAMES, n) for n in _DROPOUT_NAMES[1:]}
    return {n: _DROPOUT_DEFAULTS[n] if v is None else v for n, v in given.items()}


def name_nodes(module: fx.GraphModule, model: nn.Module) -> None:
    """Give every node its stable id, see `graph.graph`."""
    paths = {path for path, _ in model.named_modules()}
    taken: set[str] = set()
    for node in module.graph.nodes:
        called = node.op == "call_module"
        if called or node.op in ("placeholder", "get_attr", "output"):
            base = "output" if node.op == "output" else str(node.target)
        else:
            name = call_of(node, module.get_submodule, _address).name
            base = f"{owner(node)}.{name}".lstrip(".")
        id, k = base, 0
        while id in taken or (id in paths and not (called and k == 0)):
            k += 1
            id = f"{base}_{k}"
        taken.add(id)
        node.meta["id"] = id


def _address(node: fx.Node) -> str | None:
    return str(node.target) if node.op == "get_attr" else None


def _dropouts_to_modules(module: fx.GraphModule, moving: dict[str, list[fx.Node]]) -> None:
    for path, nodes in owned(module.graph).items():
        for node, twin in zip(nodes, moving[path], strict=True):
            if node.target not in _DROPOUT_MODULES:
                continue
            options, training = _dropout_options(node), _dropout_options(twin)["training"]
            if not training or options["training"]:
                continue  # never or always on: it does not follow the mode
            name = f"{DROPOUTS}.{node.meta['id'].replace('.', '___')}"
            dropout = _DROPOUT_MODULES[node.target](options["p"], options["inplace"])
            module.add_submodule(name, dropout.train(module.training))
            with module.graph.inserting_before(node):
                new = module.graph.call_module(name, (argument(node, _DROPOUT_NAMES, "input"),))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            module.graph.erase_node(node)
