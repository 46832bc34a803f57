"""What differs between the exported graphs of train and eval mode, and modules that follow it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from gracile.graph.trace import DROPOUTS, owned
from gracile.nn.by_mode import ByMode

SWITCHES = "_by_mode"  # where numbers live that differ between train and eval mode
_DROPOUTS: Mapping[str, type[nn.Module]] = {  # others are switched: their modules ask for a rank
    "aten.dropout": nn.Dropout,
    "aten.alpha_dropout": nn.AlphaDropout,
    "aten.feature_alpha_dropout": nn.FeatureAlphaDropout,
}


def owners_that_differ(a: fx.Graph, b: fx.Graph) -> set[str]:
    """Modules whose forward does something else in train mode than other numbers; "" for all."""
    left, right = _work(a), _work(b)
    if out := {p for p in left.keys() | right.keys() if left.get(p) != right.get(p)}:
        return out
    left_places, right_places = ({n: i for i, n in enumerate(g.nodes)} for g in (a, b))
    wired = len(a.nodes) == len(b.nodes) and all(
        _signature(n, left_places) == _signature(m, right_places)
        for n, m in zip(a.nodes, b.nodes, strict=True)
    )
    return set() if wired else {""}


def _work(graph: fx.Graph) -> dict[str, list[tuple[Any, ...]]]:
    """What each module's forward does, in order. Sizes are taken at the root for everyone."""
    sizes = (torch.ops.aten.sym_size.int, getattr)
    made = {
        path: [n for n in nodes if n.target not in sizes] for path, nodes in owned(graph).items()
    }
    return {path: [_signature(n, {}) for n in nodes] for path, nodes in made.items() if nodes}


def _signature(node: fx.Node, places: Mapping[fx.Node, int]) -> tuple[Any, ...]:
    """What must be the same in both modes: all but plain numbers that an operator takes."""
    given = {k: v for k, v in _arguments(node).items() if not _may_switch(node, k)}
    return (node.op, str(node.target), repr(fx.node.map_arg(given, lambda n: places.get(n, "n"))))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Argument -> value, with defaults for what is left out."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {**{str(i): v for i, v in enumerate(node.args)}, **node.kwargs}
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {**defaults, **given, **node.kwargs}


def _may_switch(node: fx.Node, name: str) -> bool:
    schema = getattr(node.target, "_schema", None)
    kinds = {a.name: str(a.type) for a in schema.arguments} if schema is not None else {}
    plain = kinds.get(name, "").removeprefix("Optional[").removesuffix("]")
    return plain in ("float", "bool", "number") and not isinstance(_arguments(node)[name], fx.Node)


def follow_the_mode(module: fx.GraphModule, moving: fx.Graph) -> None:
    """Put modules in the place of what differs between the modes."""
    for node, twin in zip([*module.graph.nodes], moving.nodes, strict=True):
        mine, others = _arguments(node), _arguments(twin)
        differ = [k for k, v in mine.items() if _may_switch(node, k) and v != others[k]]
        if differ == ["train"] and others["train"] and (dropout := _dropout(node)) is not None:
            _replace(module, node, DROPOUTS, dropout)
            continue
        for name in differ:
            _switch(module, node, name, ByMode(train=others[name], eval=mine[name]))


def _dropout(node: fx.Node) -> nn.Module | None:
    name = str(node.target).removesuffix(".default")
    kind = _DROPOUTS.get(name.removesuffix("_"))
    return None if kind is None else kind(_arguments(node)["p"], inplace=name.endswith("_"))


def _replace(module: fx.GraphModule, node: fx.Node, home: str, new: nn.Module) -> None:
    target = f"{home}.{node.meta['id'].replace('.', '___')}"
    module.add_submodule(target, new.train(module.training))
    with module.graph.inserting_before(node):
        call = module.graph.call_module(target, (node.args[0],))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    module.graph.erase_node(node)


def _switch(module: fx.GraphModule, node: fx.Node, name: str, switch: ByMode) -> None:
    id = f"{node.meta['id']}.{name}"
    target = f"{SWITCHES}.{id.replace('.', '___')}"
    module.add_submodule(target, switch.train(module.training))
    with module.graph.inserting_before(node):
        call = module.graph.call_module(target)
    call.meta = {**node.meta, "id": id}
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    if names.index(name) < len(node.args):
        node.update_arg(names.index(name), call)
    else:
        node.update_kwarg(name, call)
