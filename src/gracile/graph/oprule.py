"""The OpRule: what gracile knows about one operator, all in one place.

How it is recognised (module classes, functions, tensor methods, aten operators), how channels flow
through it, how the module is put right after its tensors were sliced, and what it costs. A new
operator family is one new file in `graph/ops/`; nothing else is edited.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

from torch import nn

from gracile import registry
from gracile.graph.graph import Node
from gracile.graph.labels import Flow, Value

R = TypeVar("R", bound="type[OpRule]")
Shape = tuple[int, ...]
Kept = Mapping[tuple[str, int], Sequence[int]]
COMPUTED = "?"  # stands in Node.attrs for a number that the forward computes


class OpRule:
    """One operator. Subclass, set the class attributes, override what differs.

    Attributes:
        op: the normalized name; set by `oprule`.
        modules: classes that are this operator; exact matches only, because a subclass may compute
            something else. A string `package.module.Class` names one without importing it.
        calls: functions, `".method"` names and `"aten.name"` names -> their argument names in
            order. A last name that starts with `*` collects what is left (`*shape`).
        defaults: values of arguments that a call may leave out.
        attributes: attributes of a module that go into `Node.attrs`.
        roles: parameters and buffers, as named in the module (`out_proj.weight` for one of its
            children's) and in `calls`.
        statistic: takes means over channels; where a channel is masked it is left out of them.
    """

    op: ClassVar[str] = ""
    modules: ClassVar[Sequence[type | str]] = ()
    calls: ClassVar[Mapping[Any, Sequence[str]]] = {}
    defaults: ClassVar[Mapping[str, Any]] = {}
    attributes: ClassVar[Sequence[str]] = ()
    roles: ClassVar[Sequence[str]] = ()
    statistic: ClassVar[bool] = False

    def roles_of(self, module: Any) -> Sequence[str]:
        """`roles` of one module, where they are not the same for all."""
        return self.roles

    def complete(self, attrs: dict[str, Any], params: Mapping[str, Shape]) -> None:
        """Fill in attrs that a call does not spell out, from the shapes of its parameters."""

    def flow(self, node: Node, values: Sequence[Value], flow: Flow) -> Value:
        """Tie and protect channels; say which lie along which dims of the output.

        Args:
            node: the call; shapes and attrs are filled in.
            values: what is known about each of `node.inputs`.
            flow: ties, protects, splits and hands out the labels of tensors.

        The default follows nothing: everything the operator touches is protected.
        """
        return flow.give_up(node, values, f"operator '{flow.label(node)}' is not known")

    def macs(self, node: Node, inputs: Sequence[Shape | None], params: Mapping[str, Shape]) -> int:
        """Multiply-adds of this call for the whole example batch; 0 for all but products."""
        return 0

    def resize(self, module: Any, kept: Kept) -> None:
        """Put a module's counts (`out_channels`, ...) right after its tensors were sliced.

        Args:
            module: the counts are still the old ones, the tensors are new.
            kept: (role, dim) -> the indices that were kept, for each dim this edit cut.
        """

    def attribute_size(self, module: Any, name: str, dim: int) -> int | None:
        """Channels along `dim` of something that is no tensor (`source`); None if there is none."""
        return None

    def cut_attribute(self, module: Any, name: str, dim: int, keep: Sequence[int]) -> None:
        """Keep only these channels of what `attribute_size` counts."""


def oprule(op: str, *, source: str) -> Callable[[R], R]:
    """Register an OpRule under its normalized operator name."""

    def add(cls: R) -> R:
        cls.op = op
        return registry.register("oprule", op, source=source)(cls)

    return add


@lru_cache(maxsize=1)
def rules() -> Mapping[str, OpRule]:
    """Operator name -> its rule, for all registered ones."""
    return {entry.name: entry.obj() for entry in registry.entries("oprule")}


@lru_cache(maxsize=1)
def _by_module() -> Mapping[type | str, OpRule]:
    return {m: rule for rule in rules().values() for m in rule.modules}


@lru_cache(maxsize=1)
def _by_call() -> Mapping[Any, OpRule]:
    return {key: rule for rule in rules().values() for key in rule.calls}


def rule_of_module(module: nn.Module) -> OpRule | None:
    """The rule for a module's exact class, or None."""
    cls = type(module)
    table = _by_module()
    return table.get(cls) or table.get(f"{cls.__module__}.{cls.__qualname__}")


def rule_of_call(key: Any) -> OpRule | None:
    """The rule for a function, a `".method"` or an `"aten.name"`, or None."""
    try:
        return _by_call().get(key)
    except TypeError:  # an unhashable callable
        return None


def rule_of_op(op: str) -> OpRule:
    """The rule of a normalized operator; the one that follows nothing for `unknown`."""
    return rules().get(op) or OpRule()
