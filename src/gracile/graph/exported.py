"""From what torch.export recorded to an fx graph over the model's own modules and tensors.

Whole modules become `call_module` nodes again, parameters and buffers `get_attr` nodes; assertions,
copies that change nothing and sizes that nobody reads are left out.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from gracile.graph.aliases import changed_in_place
from gracile.graph.leaf_call import LeafCall
from gracile.graph.oprule import rule_of_module
from gracile.graph.trace import CannotTrace

CONSTANTS = "_constants"  # where tensors live that the forward made from plain numbers
_CHECKS = ("_assert", "sym_constrain", "_guards")
_COPIES = ("detach", "detach_", "alias", "lift_fresh", "lift_fresh_copy")
_CASTS = ("aten.to.dtype", "aten.to.device", "aten.to.dtype_layout")


class Rebuilder:
    """Copies the nodes of one exported program into a new graph.

    Attributes:
        graph: the new graph.
        constants: address -> tensor, of what the forward made from plain numbers.
    """

    def __init__(self, program: ExportedProgram, calls: Sequence[LeafCall], model: nn.Module):
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self._program, self._calls, self._model = program, calls, model
        self._env: dict[fx.Node, Any] = {}
        self._specs = {s.arg.name: s for s in program.graph_signature.input_specs}
        first = {
            id(p): name for name, p in reversed([*model.named_parameters(remove_duplicate=False)])
        }
        self._names = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
        self._leaves: dict[fx.Node, tuple[LeafCall, fx.Node]] = {}
        self._parts: dict[tuple[fx.Node, Any], fx.Node] = {}
        self._attributes: dict[str, fx.Node] = {}
        self._device: tuple[torch.device, fx.Node] | None = None
        self._changed = changed_in_place(program.graph, self._may_change)
        self._placeholders()
        for node in program.graph.nodes:
            self._copy(node)
        self.graph.eliminate_dead_code(lambda n: n.op == "call_module" or n.is_impure())

    def _placeholders(self) -> None:
        for node in self._program.graph.find_nodes(op="placeholder"):
            kind = self._specs[node.name].kind
            if kind is InputKind.USER_INPUT:
                self._env[node] = self._put(node, self.graph.placeholder(str(node.target)))
                value = node.meta.get("val")
                if isinstance(value, Tensor) and self._device is None:
                    self._device = (value.device, self._env[node])
            elif kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                raise CannotTrace(f"the forward uses an object that is no tensor ({kind.name})")

    def _copy(self, node: fx.Node) -> None:
        if node.op == "output":
            self._output(node)
        elif node.op == "get_attr":
            raise CannotTrace("the forward has control flow inside the graph")
        elif node.op == "call_function" and not _is_check(node):
            self._env[node] = self._call(node)

    def _call(self, node: fx.Node) -> Any:
        if node.target is torch.ops.gracile.leaf.default:
            return self._leaf(node)
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node):
            if source in self._leaves and node.target is operator.getitem:
                return self._part(node, *self._leaves[source])
            if self._changes_nothing(node, source) or self._only_moves(node):
                return self._value(source)
        args: Any = fx.node.map_arg(node.args, self._value)
        kwargs: Any = fx.node.map_arg(node.kwargs, self._value)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": self._device_of(kwargs["device"])}
        target: Any = node.target
        if target is torch.ops.aten.view.default:  # the same, and asks nothing of strides
            target = torch.ops.aten.reshape.default
        return self._put(node, self.graph.call_function(target, args, kwargs))

    def _leaf(self, node: fx.Node) -> fx.Node:
        tensors, numbers, _ = node.args
        call = self._calls[_index(node)]
        take: Callable[[Any], Any] = lambda v: fx.node.map_arg(v, self._value)  # noqa: E731
        args, kwargs = call.arguments(take(tensors), take(numbers))
        made = self._put(node, self.graph.call_module(call.path, args, kwargs))
        self._leaves[node] = (call, made)
        return made

    def _part(self, node: fx.Node, call: LeafCall, whole: fx.Node) -> fx.Node:
        """The node of one tensor that a whole module returned; read level by level."""
        at: fx.Node = whole
        way: tuple[Any, ...] = ()
        for key in call.results[_index(node)]:
            way = (*way, key)
            if (whole, way) not in self._parts:
                get, value = _step(key)
                part = self.graph.call_function(get, (at, value))
                self._parts[whole, way] = self._put(node, part, inside=False)
            at = self._parts[whole, way]
        return at

    def _changes_nothing(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether a copy or cast hands on its input as it is."""
        name, before, after = str(node.target), source.meta.get("val"), node.meta.get("val")
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            return False
        if name in _CASTS:
            copied = True in node.args[2:] or node.kwargs.get("copy") is True
            return not copied and (before.dtype, before.device) == (after.dtype, after.device)
        if name not in (f"aten.{c}.default" for c in _COPIES):
            return False
        return not self._changed & {node, source} and self._made_of_constants(source)

    def _only_moves(self, node: fx.Node) -> bool:
        """Whether this only rearranges memory; whether it is recorded depends on the mode."""
        format = [*node.args[1:], *node.kwargs.values()]
        usual = format in ([], [torch.contiguous_format])
        plain = node not in self._changed and usual
        return plain and node.target is torch.ops.aten.contiguous.default

    def _may_change(self, node: fx.Node) -> bool:
        """Whether a module that stays whole may write to what it reads, or hand it on."""
        if node.target is not torch.ops.gracile.leaf.default:
            return False
        module = self._model.get_submodule(self._calls[_index(node)].path)
        return bool(getattr(module, "inplace", False)) or rule_of_module(module) is None

    def _made_of_constants(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return self._specs[node.name].kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        return node.op == "call_function" and all(
            self._made_of_constants(n) for n in node.all_input_nodes
        )

    def _value(self, node: fx.Node) -> Any:
        if node in self._env:
            return self._env[node]
        spec = self._specs[node.name]
        address = self._address(spec)
        if address not in self._attributes:
            self._attributes[address] = self.graph.create_node("get_attr", address)
        self._env[node] = self._attributes[address]
        return self._env[node]

    def _address(self, spec: InputSpec) -> str:
        target = str(spec.target)
        if spec.kind is not InputKind.CONSTANT_TENSOR:
            return self._names.get(target, target)
        address = f"{CONSTANTS}.{target.replace('.', '___')}"
        self.constants[address] = self._program.constants[target]
        return address

    def _device_of(self, device: Any) -> Any:
        """The first input's device where that is meant, so that the module can be moved."""
        if self._device is None or torch.device(device) != self._device[0]:
            return device
        key = (self._device[1], "device")
        if key not in self._parts:
            with self.graph.inserting_after(self.graph.find_nodes(op="placeholder")[-1]):
                self._parts[key] = self.graph.call_function(getattr, key)
        return self._parts[key]

    def _output(self, node: fx.Node) -> None:
        specs = self._program.graph_signature.output_specs
        if any(s.kind is not OutputKind.USER_OUTPUT for s in specs):
            raise CannotTrace("the forward changes something that is no buffer")
        values: Any = fx.node.map_arg(node.args[0], self._value)
        flat = list(values)
        spec = self._program.call_spec.out_spec
        if spec is None or _plain(spec):
            self.graph.output(flat if spec is None else pytree.tree_unflatten(flat, spec))
        else:
            self.graph.output(flat)
            self.graph.set_codegen(_Returns(spec))

    def _put(self, node: fx.Node, made: fx.Node, *, inside: bool = True) -> fx.Node:
        stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
        calls = [
            (key, (path.split("@")[0], kind))
            for key, (path, kind) in stack.items()
            if not key.startswith("_empty")
        ]
        made.meta["nn_module_stack"] = dict(calls if inside else calls[:-1])
        return made


class _Returns(CodeGen):
    """Generated code that gives results back in a structure that only pytree knows."""

    def __init__(self, spec: pytree.TreeSpec):
        super().__init__()
        self.spec = spec

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Returns":
        return _Returns(self.spec)  # a spec does not change

    def process_outputs(self, outputs: Any) -> Any:
        """The structure, from the flat list that the graph makes."""
        return pytree.tree_unflatten(outputs, self.spec)

    def generate_output(
        self,
        output_args: Any,
        *,
        descs: Any = None,
        repr_fn: Callable[[object], str] | None = None,
    ) -> str:
        """The return statement."""
        return f"return restore_structure({(repr_fn or repr)(output_args)})"

    def additional_globals(self) -> list[tuple[str, Any]]:
        """What the return statement calls."""
        return [*super().additional_globals(), ("restore_structure", self.process_outputs)]


def _index(node: fx.Node) -> int:
    """The number that a call of `leaf`, or of `getitem` on its results, ends with."""
    index = node.args[-1]
    assert isinstance(index, int)
    return index


def _step(key: Any) -> tuple[Callable[..., Any], Any]:
    """How one level of a structure is read, and with what."""
    if isinstance(key, pytree.GetAttrKey):
        return getattr, key.name
    return operator.getitem, key.idx if isinstance(key, pytree.SequenceKey) else key.key


def _plain(spec: pytree.TreeSpec) -> bool:
    if spec.is_leaf():
        return True
    return spec.type in (dict, list, tuple) and all(_plain(c) for c in spec.children())


def _is_check(node: fx.Node) -> bool:
    name = getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))
    return str(name).startswith(_CHECKS)
