"""Which channels must live and die together: union-find over exact (tensor, dim, index) atoms.

An atom is one index of one dim of one parameter or buffer, or of something that cannot be cut (an
input). Operators tie atoms; a class of tied atoms is a unit; a protected atom protects its unit.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gracile.graph.graph import Node

Axis = tuple[str, int]  # (address, dim)


@dataclass(frozen=True)
class Channels:
    """A tensor whose channels lie along `dim`: one atom an index."""

    dim: int
    atoms: tuple[int, ...]


@dataclass(frozen=True)
class Fixed:
    """A tensor without channels that could be cut, and why."""

    why: str


@dataclass(frozen=True)
class Free:
    """A parameter or buffer read by itself: each dim may still turn out to be the channels."""

    address: str


@dataclass(frozen=True)
class Several:
    """An operator's several outputs, as of `chunk`."""

    values: tuple["Value", ...]


Value = Channels | Fixed | Free | Several


class Flow:
    """The ties found so far.

    Args:
        size_of: (address, dim) -> number of indices, None if there is no such tensor.
        canonical: address -> the one name of a tied tensor.
        shape_of: node id -> shape of its output.
    """

    def __init__(
        self,
        size_of: Callable[[str, int], int | None],
        canonical: Callable[[str], str],
        shape_of: Callable[[str], tuple[int, ...] | None],
    ):
        self._size_of, self._canonical, self.shape_of = size_of, canonical, shape_of
        self._parent: list[int] = []
        self._reason: dict[int, str] = {}
        self.axes: dict[Axis, range] = {}  # atoms of real tensors, in order of first use
        self.writes: dict[Axis, None] = {}  # axes of weights that make channels
        self.reads: dict[Axis, None] = {}  # axes of weights that take channels in

    def axis(self, address: str, dim: int) -> range:
        """Atoms of one dim of a parameter, buffer or channel map.

        Raises:
            KeyError: there is no such tensor or dim.
        """
        key = (self._canonical(address), dim)
        if key not in self.axes:
            size = self._size_of(*key)
            if size is None:
                raise KeyError(f"{address} has no dim {dim}")
            self.axes[key] = self._new(size)
        return self.axes[key]

    def written(self, address: str, dim: int) -> range:
        """The axis along which a weight makes output channels."""
        self.writes[self._canonical(address), dim] = None
        return self.axis(address, dim)

    def read(self, address: str, dim: int) -> range:
        """The axis along which a weight takes input channels."""
        self.reads[self._canonical(address), dim] = None
        return self.axis(address, dim)

    def fresh(self, size: int, why: str) -> tuple[int, ...]:
        """Atoms that are no tensor's and must stay."""
        atoms = tuple(self._new(size))
        self.protect(atoms, why)
        return atoms

    def tie(self, a: Iterable[int], b: Iterable[int]) -> None:
        """Index by index: these go together. Both must have the same length."""
        for x, y in zip(a, b, strict=True):
            x, y = self.find(x), self.find(y)
            if x != y:
                low, high = min(x, y), max(x, y)
                self._parent[high] = low
                if high in self._reason:
                    self._reason.setdefault(low, self._reason.pop(high))

    def tie_all(self, atoms: Sequence[int]) -> None:
        """All of these are one unit."""
        self.tie(atoms[1:], atoms[:-1])

    def protect(self, atoms: Iterable[int], why: str) -> None:
        """These must not be cut; the first reason given stays."""
        for a in atoms:
            self._reason.setdefault(self.find(a), why)

    def reason(self, atom: int) -> str | None:
        """Why an atom's unit must not be cut, or None."""
        return self._reason.get(self.find(atom))

    def find(self, atom: int) -> int:
        """The unit of an atom: its smallest member."""
        root = atom
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[atom] != root:
            self._parent[atom], atom = root, self._parent[atom]
        return root

    def protect_value(self, value: Value, why: str) -> None:
        """Protect whatever channels a value has."""
        if isinstance(value, Channels):
            self.protect(value.atoms, why)
        elif isinstance(value, Free):
            self.protect_tensor(value.address, why)
        elif isinstance(value, Several):
            for v in value.values:
                self.protect_value(v, why)

    def protect_tensor(self, address: str, why: str) -> None:
        """Protect every dim of a parameter or buffer."""
        dim = 0
        while self._size_of(self._canonical(address), dim) is not None:
            self.protect(self.axis(address, dim), why)
            dim += 1

    def give_up(self, node: Node, values: Sequence[Value], why: str) -> Fixed:
        """Protect all that an operator touches: its inputs and its parameters."""
        reason = f"{why} ('{node.id}')"
        for value in values:
            self.protect_value(value, reason)
        for address in node.params.values():
            self.protect_tensor(address, reason)
        return Fixed(reason)

    def along(self, value: Value, node: Node, dim: int, size: int) -> tuple[int, ...]:
        """The atoms of an operand along a dim that the operator reads as channels.

        Channels that lie along another dim are protected, and a tensor without known channels
        gives atoms that must stay.
        """
        if isinstance(value, Channels):
            if value.dim == dim and len(value.atoms) == size:
                return value.atoms
            why = f"'{self.label(node)}' reads another dim as channels ('{node.id}')"
            self.protect(value.atoms, why)
            return self.fresh(size, why)
        if isinstance(value, Free) and self._size_of(self._canonical(value.address), dim) == size:
            return tuple(self.axis(value.address, dim))
        self.protect_value(value, why := _why(value, node))
        return self.fresh(size, why)

    def label(self, node: Node) -> str:
        """How a message calls an operator: its name, or what an unknown one is."""
        return str(node.attrs.get("target", node.op)) if node.op == "unknown" else node.op

    def _new(self, size: int) -> range:
        start = len(self._parent)
        self._parent.extend(range(start, start + size))
        return range(start, start + size)


def _why(value: Value, node: Node) -> str:
    if isinstance(value, Fixed):
        return value.why
    return f"'{node.op}' reads something whose channels cannot be followed ('{node.id}')"
