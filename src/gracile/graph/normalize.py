"""From what a capture saw (a module, a function, an aten operator) to one normalized call."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn

from gracile.graph.oprule import COMPUTED, OpRule, rule_of_call, rule_of_module
from gracile.nn.by_mode import ByMode

_SIZE_ATTRIBUTES = ("shape", "ndim", "device", "dtype")
_ARITHMETIC = {
    getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem", "index")
} | {int, len, max, min}


@dataclass
class Call:
    """One operator call before shapes are known.

    Attributes:
        op: normalized name, or "unknown".
        rule: its rule; None if unknown.
        name: what an id is made of: the op, or what an unknown operator is called.
        params: role -> address.
        attrs: plain values; a number that the forward computes is "?".
        args: the fx nodes it reads, in order, without those that are in `params`.
    """

    op: str
    rule: OpRule | None
    name: str
    params: dict[str, str] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    args: list[fx.Node] = field(default_factory=list)


def call_of(
    node: fx.Node,
    module_at: Callable[[str], nn.Module],
    address_of: Callable[[fx.Node], str | None],
) -> Call:
    """Normalize one fx node.

    Args:
        node: of a traced or exported graph.
        module_at: path -> module.
        address_of: address of the parameter or buffer that a node stands for, None for others.
    """
    if node.op == "placeholder":
        return Call("input", None, str(node.target))
    if node.op == "output":
        return Call("output", None, "output", args=node.all_input_nodes)
    if node.op == "get_attr":
        return Call("param", None, str(node.target), params={"value": str(node.target)})
    if node.op == "call_module":
        module = module_at(str(node.target))
        call = module_call(module, str(node.target), node.all_input_nodes)
        for name, arg in zip(getattr(module, "takes", ()), node.args[1:], strict=False):
            address = address_of(arg) if isinstance(arg, fx.Node) else None
            if isinstance(arg, fx.Node) and address is not None:
                call.params[name] = address
                call.args.remove(arg)
        return call
    if _is_size(node):
        return Call("size", rule_of_call(".size"), "size", args=node.all_input_nodes)
    key = call_key(node)
    rule = rule_of_call(key)
    if rule is None:
        return Call(
            "unknown",
            None,
            _short(node),
            attrs={"target": _short(node)},
            args=list(node.all_input_nodes),
        )
    return _bind(node, key, rule, address_of)


def module_call(module: nn.Module, path: str, args: Sequence[fx.Node] = ()) -> Call:
    """Normalize the call of a leaf module.

    A module whose parameters were replaced (weight normalization, pruning hooks) is unknown: its
    weight is computed from others.
    """
    if isinstance(module, ByMode):  # a number, as sizes are
        return Call("size", rule_of_call(".size"), "size")
    params = {
        name: f"{path}.{name}" if path else name
        for named in (module.named_parameters, module.named_buffers)
        for name, _ in named(remove_duplicate=False)
    }
    rule = rule_of_module(module)
    needed = {r for r in (rule.roles_of(module) if rule else ()) if _has(module, r)}
    if rule is None or not needed <= set(params):
        name = type(module).__name__
        return Call("unknown", None, name, params, {"target": name}, list(args))
    attrs = {a: _plain(getattr(module, a)) for a in rule.attributes if hasattr(module, a)}
    params = {r: params[r] for r in rule.roles_of(module) if r in params}
    return Call(rule.op, rule, rule.op, params, {**rule.defaults, **attrs}, list(args))


def _has(module: nn.Module, role: str) -> bool:
    try:
        return attrgetter(role)(module) is not None
    except AttributeError:
        return False


def call_key(node: fx.Node) -> Any:
    """What the rules know a call by: the function, `".method"`, `".attribute"` or `"aten.name"`."""
    if node.op == "call_method":
        return f".{node.target}"
    if node.target is getattr:
        return f".{node.args[1]}"
    namespace = getattr(node.target, "namespace", None)
    if namespace is not None and hasattr(node.target, "_opname"):
        return f"{namespace}.{node.target._opname}"
    return node.target


def argument(node: fx.Node, names: Sequence[str], name: str) -> Any:
    """The value of one named argument of a call; None if it is left out."""
    if name in node.kwargs:
        return node.kwargs[name]
    i = list(names).index(name)
    return node.args[i] if i < len(node.args) else None


def _bind(
    node: fx.Node, key: Any, rule: OpRule, address_of: Callable[[fx.Node], str | None]
) -> Call:
    call = Call(rule.op, rule, rule.op, attrs=dict(rule.defaults))
    for name, value in _named(node, rule.calls[key]):
        address = address_of(value) if isinstance(value, fx.Node) else None
        if name in rule.roles and address is not None:
            call.params[name] = address
            continue
        nodes = _nodes(value)
        call.args += nodes
        if not isinstance(value, fx.Node):
            call.attrs[name] = _plain(value)
        elif name not in ("input", "other", "a", "b", "tensors"):
            call.attrs[name] = COMPUTED
    return call


def _named(node: fx.Node, names: Sequence[str]) -> list[tuple[str, Any]]:
    fixed = [n for n in names if not n.startswith("*")]
    rest = [n[1:] for n in names if n.startswith("*")]
    out = list(zip(fixed, node.args, strict=False))
    extra = node.args[len(fixed) :]
    if rest and extra:
        out.append((rest[0], tuple(extra)))
    else:
        out += [(f"arg{len(fixed) + i}", v) for i, v in enumerate(extra)]
    return out + list(node.kwargs.items())


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def _plain(value: Any) -> Any:
    """Tuples for lists, "?" for nodes; tensors and the like are left out (None)."""
    if isinstance(value, fx.Node):
        return COMPUTED
    if isinstance(value, slice):
        return slice(_plain(value.start), _plain(value.stop), _plain(value.step))
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return None if isinstance(value, Tensor) else value


def _is_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _SIZE_ATTRIBUTES
    if "sym_size" in str(node.target):
        return True
    reads = node.all_input_nodes
    return node.target in _ARITHMETIC and bool(reads) and all(_is_size(n) for n in reads)


def _short(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    if node.target is getattr:
        return str(node.args[1])
    key = call_key(node)
    if isinstance(key, str):
        return key.split(".")[-1]
    return str(getattr(key, "__name__", key)).strip("_")
