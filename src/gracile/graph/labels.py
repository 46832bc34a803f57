"""Which channels must live and die together: labels on every index of every dim of every tensor.

A label is an int: -1 for an index that nothing can remove, else an atom. Atoms that are tied are
one (union-find). An atom may also stand for several: the channels of a dim that is split into
(heads, width) are each one head and one width, so the split makes an atom a head and an atom a
width, and every channel stands for its two. An index is removed when any of its atoms is.

The idea of labelling each index and the algebra of splitting and merging dims is ours.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from gracile.graph.graph import Node
from gracile.graph.maps import ChannelMap, home_of

Axis = tuple[str, int]  # (address, dim)
Labels = npt.NDArray[np.int64]
Shape = tuple[int, ...]
Atoms = tuple[int, ...]
KEPT = -1


@dataclass(frozen=True)
class Axes:
    """A tensor: for each dim the labels of its indices, None where none of them can go.

    Attributes:
        dims: one entry a dim.
        why: why the dims without labels have none.
    """

    dims: tuple[Labels | None, ...]
    why: str = "it is made from the model's input"

    def with_dim(self, dim: int, labels: Labels | None) -> "Axes":
        """The same with other labels along one dim."""
        dims = list(self.dims)
        dims[dim] = labels
        return Axes(tuple(dims), self.why)

    @property
    def labelled(self) -> list[int]:
        """Dims that have labels."""
        return [d for d, labels in enumerate(self.dims) if labels is not None]


@dataclass(frozen=True)
class Fixed:
    """Something without channels that could be cut (a number, a size), and why."""

    why: str


@dataclass(frozen=True)
class Several:
    """An operator's several outputs, as of `chunk`."""

    values: tuple["Value", ...]


Value = Axes | Fixed | Several


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
        shape_of: Callable[[str], Shape | None],
    ):
        self.size_of, self._canonical, self.shape_of = size_of, canonical, shape_of
        self._parent = np.arange(1024, dtype=np.int64)
        self._protected = np.zeros(1024, dtype=bool)
        self._composite = np.zeros(1024, dtype=bool)
        self._made = np.zeros(1024, dtype=bool)  # has a level
        self._n = 0
        self._reasons: dict[int, str] = {}
        self._parts: dict[int, tuple[int, ...]] = {}  # root -> the atoms it stands for
        self.made: list[Labels] = []  # the rows, or the columns, that one split made
        self._level: dict[int, str] = {}  # atoms made by a split: "outer" or "inner"
        self._together: dict[tuple[int, ...], int] = {}
        self.axes: dict[Axis, Labels] = {}  # labels of real tensors, in order of first use
        self.writes: dict[Axis, None] = {}  # axes of weights that make channels
        self.reads: dict[Axis, None] = {}  # axes of weights that take channels in
        self.constant: set[str] = set()  # nodes that are computed from parameters only
        self.statistics: set[str] = set()  # nodes that are proven on kept channels, see `verify`
        self.maps: dict[str, ChannelMap] = {}  # node id -> what takes its place once it is cut
        self._stiff: dict[str, str] = {}  # home of a map that cannot be made -> why

    # ------------------------------------------------------------------ labels of tensors

    def axis(self, address: str, dim: int) -> Labels:
        """Labels of one dim of a parameter, buffer or channel map.

        Raises:
            KeyError: there is no such tensor or dim.
        """
        key = (self._canonical(address), dim)
        if key not in self.axes:
            size = self.size_of(*key)
            if size is None:
                raise KeyError(f"{address} has no dim {dim}")
            self.axes[key] = self._new(size)
        return self.axes[key]

    def map_axis(self, address: str, dim: int, size: int) -> Labels:
        """Labels of a channel map that need not exist yet (see `graph.maps`)."""
        key = (address, dim)
        if key not in self.axes:
            self.axes[key] = self._new(size)
            if (why := self._stiff.get(address.rpartition(".")[0])) is not None:
                self.protect(self.axes[key], why)
        return self.axes[key]

    def channel_map(self, node: Node, map_: ChannelMap | None) -> str:
        """Have a map take the place of a call once something it reads is cut; where it lives.

        Without a map (the forward cannot be rewritten), what is tied to it is protected.
        """
        home = (map_.at if map_ is not None else "") or home_of(node.id)
        if map_ is None:
            self._stiff[home] = f"'{node.id}' has channel counts written in a forward that is fixed"
        else:
            self.maps[node.id] = map_
        return home

    def written(self, address: str, dim: int) -> Labels:
        """The axis along which a weight makes output channels."""
        self.writes[self._canonical(address), dim] = None
        return self.axis(address, dim)

    def read(self, address: str, dim: int) -> Labels:
        """The axis along which a weight takes input channels."""
        self.reads[self._canonical(address), dim] = None
        return self.axis(address, dim)

    def free(self, address: str, shape: Shape) -> Axes:
        """A parameter or buffer read by itself: each dim of more than one index may be channels."""
        dims = tuple(self.axis(address, d) if n > 1 else None for d, n in enumerate(shape))
        return Axes(dims, f"'{address}' has one index there")

    # ------------------------------------------------------------------ ties

    def tie(self, a: Labels, b: Labels, why: str) -> None:
        """Index by index: these go together. Both must have the same length.

        Args:
            why: the reason for the protection of what is tied to an index that cannot go.
        """
        if len(a) != len(b):
            raise ValueError(f"cannot tie {len(a)} to {len(b)} channels")
        while True:
            ra, rb = self.find(a), self.find(b)
            open_ = ra != rb
            if not open_.any():
                return
            ra, rb = ra[open_], rb[open_]
            a, b = ra, rb
            special = (ra < 0) | (rb < 0) | self._composite[ra] | self._composite[rb]
            if special.any():
                for x, y in {
                    (int(x), int(y)) for x, y in zip(ra[special], rb[special], strict=True)
                }:
                    self._tie_one(x, y, why)
                a, b = ra[~special], rb[~special]
                continue
            low, high = np.minimum(ra, rb), np.maximum(ra, rb)
            self._hand_down(high, low)
            self._parent[high] = low

    def tie_all(self, labels: Iterable[int], why: str) -> None:
        """All of these are one unit."""
        every = np.array(list(labels), dtype=np.int64)
        self.tie(every[1:], every[:-1], why)

    def protect(self, labels: Labels | Iterable[int] | None, why: str) -> None:
        """These must not be cut; the first reason given stays."""
        if labels is None:
            return
        for a in np.unique(self.find(np.asarray(labels, dtype=np.int64))):
            if a >= 0:
                for leaf in self.atoms(int(a)):
                    self._protect_root(leaf, why)

    def reasons(self, units: Sequence[int]) -> list[str]:
        """Why some of these must not be cut: one entry for each that must not."""
        return [self._reasons[u] for u in units if self._protected[u]]

    @property
    def count(self) -> int:
        """Labels handed out so far."""
        return self._n

    def table(self, labels: Labels) -> Labels:
        """(indices, most atoms an index has): the atoms of each index, -1 for no more."""
        roots = self.find(labels)
        if not self._composite[roots].any():
            return roots[:, None]
        kinds, of = np.unique(roots, return_inverse=True)
        atoms = [self.atoms(int(k)) for k in kinds]
        width = max(1, *(len(a) for a in atoms))
        rows = [(*a, *[KEPT] * (width - len(a))) for a in atoms]
        return np.array(rows, dtype=np.int64)[of]

    def whole(self, labels: Labels) -> Labels:
        """The atoms among these labels that stand for no others."""
        roots = self.find(labels)
        return roots[(roots >= 0) & ~self._composite[roots]]

    def plain(self, atoms: Labels) -> npt.NDArray[np.bool_]:
        """Which of these roots no split has made."""
        return ~self._made[atoms]

    def level(self, atom: int) -> str:
        """`outer` or `inner` for an atom that a split made, else `channels`."""
        return self._level.get(atom, "channels")

    def find(self, labels: Labels) -> Labels:
        """The smallest member of each label's class; -1 stays."""
        labels = np.asarray(labels, dtype=np.int64)
        free = labels < 0
        root = np.where(free, 0, labels)
        while True:
            up = self._parent[root]
            if (up == root).all():
                break
            self._parent[root] = self._parent[up]
            root = self._parent[root]
        return np.where(free, KEPT, root)

    def atoms(self, label: int) -> tuple[int, ...]:
        """The units whose removal removes an index with this label, outer ones first."""
        if label < 0:
            return ()
        root = int(self._parent[label])
        while self._parent[root] != root:
            root = int(self._parent[root])
        if root not in self._parts:
            return (root,)
        out: dict[int, None] = {}
        for part in self._parts[root]:
            out.update(dict.fromkeys(self.atoms(part)))
        return tuple(out)

    # ------------------------------------------------------------------ split and merge

    def merge(self, dims: Sequence[Labels | None], sizes: Sequence[int]) -> Labels | None:
        """Labels of several dims made one, the last running fastest."""
        labels, size = None, 1
        for inner, n in zip(dims, sizes, strict=True):
            labels = self._cross(labels, size, inner, n)
            size *= n
        return labels

    def split(self, labels: Labels | None, sizes: Sequence[int], why: str) -> list[Labels | None]:
        """Labels of each of the dims that one dim is split into, the last running fastest."""
        if labels is None:
            return [None] * len(sizes)
        out: list[Labels | None] = []
        rest: Labels | None = labels
        for k, n in enumerate(sizes[:-1]):
            inner = prod(sizes[k + 1 :])
            outer, rest = self._split_in_two(rest, n, inner, why)
            out.append(outer)
        return [*out, rest]

    def rearranged(self, value: Axes, before: Shape, after: Shape, why: str) -> Axes:
        """A tensor after a change of shape."""
        dims: list[Labels | None] = []
        for old, new in segments(before, after):
            here = [value.dims[d] for d in old]
            merged = self.merge(here, [before[d] for d in old])
            dims += self.split(merged, [after[d] for d in new], why) if new else []
            if not new:
                self.protect(merged, why)
        return Axes(tuple(dims), value.why)

    # ------------------------------------------------------------------ values

    def protect_value(self, value: Value, why: str) -> None:
        """Protect whatever channels a value has."""
        if isinstance(value, Axes):
            for labels in value.dims:
                self.protect(labels, why)
        elif isinstance(value, Several):
            for v in value.values:
                self.protect_value(v, why)

    def protect_tensor(self, address: str, why: str) -> None:
        """Protect every dim of a parameter or buffer."""
        dim = 0
        while self.size_of(self._canonical(address), dim) is not None:
            self.protect(self.axis(address, dim), why)
            dim += 1

    def give_up(self, node: Node, values: Sequence[Value], why: str) -> Value:
        """Protect all that an operator touches: its inputs and its parameters."""
        reason = f"{why} ('{node.id}')"
        for value in values:
            self.protect_value(value, reason)
        for address in node.params.values():
            self.protect_tensor(address, reason)
        return unlabelled(node.shape, reason)

    def along(self, value: Value, node: Node, dim: int, size: int) -> Labels:
        """The labels of an operand along a dim that the operator reads; the other dims stay.

        A tensor without labels there gives indices that cannot go.
        """
        if isinstance(value, Axes) and dim < len(value.dims):
            labels = value.dims[dim]
            if labels is not None and len(labels) == size:
                return labels
            if labels is not None:
                self.protect(labels, f"'{self.label(node)}' reads {size} channels ('{node.id}')")
        return np.full(size, KEPT, dtype=np.int64)

    def only(self, value: Value, node: Node, dims: Iterable[int]) -> None:
        """Protect what lies along any other dim of an operand: the operator cannot lose it."""
        if isinstance(value, Axes):
            allowed = set(dims)
            for d in value.labelled:
                if d not in allowed:
                    why = f"'{self.label(node)}' cannot lose indices of dim {d} ('{node.id}')"
                    self.protect(value.dims[d], why)
        else:
            self.protect_value(value, f"'{self.label(node)}' reads several tensors ('{node.id}')")

    def label(self, node: Node) -> str:
        """How a message calls an operator: its name, or what an unknown one is."""
        return str(node.attrs.get("target", node.op)) if node.op == "unknown" else node.op

    # ------------------------------------------------------------------ inside

    def _new(self, size: int) -> Labels:
        start, stop = self._n, self._n + size
        if stop > len(self._parent):
            room = max(stop, 2 * len(self._parent))
            self._parent = np.concatenate(
                [self._parent, np.arange(len(self._parent), room, dtype=np.int64)]
            )
            for name in ("_protected", "_composite", "_made"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros(room - len(old), dtype=bool)]))
        self._n = stop
        return np.arange(start, stop, dtype=np.int64)

    def _protect_root(self, root: int, why: str) -> None:
        if not self._protected[root]:
            self._protected[root] = True
            self._reasons[root] = why

    def _union(self, x: int, y: int) -> None:
        low, high = min(x, y), max(x, y)
        if low != high:
            self._hand_down(np.array([high]), np.array([low]))
            self._parent[high] = low

    def _hand_down(self, high: Labels, low: Labels) -> None:
        """What is known about the atoms that lose their place goes to those they join."""
        marked = self._protected[high] | self._made[high]
        for old, new in zip(high[marked].tolist(), low[marked].tolist(), strict=True):
            if old in self._level:
                self._made[new] = True
                self._level.setdefault(new, self._level[old])
            if self._protected[old]:
                self._protect_root(new, self._reasons[old])

    def _tie_one(self, x: int, y: int, why: str) -> None:
        """Make two labels, of which one may stand for several atoms or none, mean the same."""
        left, right = self.atoms(x), self.atoms(y)
        a = [i for i in left if i not in right]
        b = [i for i in right if i not in left]
        if not a or not b:  # what only one side can lose, it cannot
            self.protect(np.array(a + b, dtype=np.int64), why)
        elif len(a) == 1:
            self._stand_for(a[0], b)
        elif len(b) == 1:
            self._stand_for(b[0], a)
        elif len(a) == len(b):
            for i, j in zip(a, b, strict=True):
                self._union(*(int(k) for k in self.find(np.array([i, j]))))
        else:
            self.tie_all([*a, *b], why)

    def _stand_for(self, atom: int, atoms: Sequence[int]) -> None:
        """From now on an atom that stood for itself stands for these."""
        if len(atoms) == 1:
            self._union(*(int(k) for k in self.find(np.array([atom, atoms[0]]))))
            return
        if self._protected[atom]:
            for part in atoms:
                self._protect_root(part, self._reasons[atom])
        self._parts[atom] = tuple(atoms)
        self._composite[atom] = True

    def _together_label(self, atoms: Sequence[int]) -> int:
        """The one label that stands for these atoms."""
        if not atoms:
            return KEPT
        if len(atoms) == 1:
            return atoms[0]
        key = tuple(atoms)
        label = self._together.get(key)
        if label is None or self.atoms(label) != key:
            label = int(self._new(1)[0])
            self._parts[label] = key
            self._composite[label] = True
            self._together[key] = label
        return label

    def _cross(self, outer: Labels | None, n: int, inner: Labels | None, m: int) -> Labels | None:
        if outer is None and inner is None:
            return None
        if outer is None or n == 1:
            return None if inner is None else np.tile(inner, n)
        if inner is None or m == 1:
            return np.repeat(outer, m)
        rows = [self.atoms(int(x)) for x in outer]
        columns = [self.atoms(int(y)) for y in inner]
        cells = [
            self._together_label((*a, *(x for x in b if x not in a))) for a in rows for b in columns
        ]
        return np.array(cells, dtype=np.int64)

    def _split_in_two(
        self, labels: Labels | None, n: int, m: int, why: str
    ) -> tuple[Labels | None, Labels | None]:
        if labels is None:
            return None, None
        if n == 1:
            return None, labels
        if m == 1:
            return labels, None
        grid = self.find(labels).reshape(n, m)
        if (grid == grid[:, :1]).all():  # the same all along the inner dim
            return _or_none(grid[:, 0]), None
        if (grid == grid[:1]).all():
            return None, _or_none(grid[0])
        own = (grid >= 0) & ~self._composite[grid]
        if own.all() and len(np.unique(grid)) == n * m:
            return self._factor(grid)
        return self._split_known(grid, why)

    def _factor(self, grid: Labels) -> tuple[Labels, Labels]:
        """New atoms for the rows and the columns of a grid of atoms."""
        n, m = grid.shape
        rows, columns = self._new(n), self._new(m)
        self._made[rows] = self._made[columns] = True
        self.made += [rows, columns]
        self._level.update(dict.fromkeys(rows.tolist(), "outer"))
        self._level.update(dict.fromkeys(columns.tolist(), "inner"))
        for i, j in np.argwhere(self._protected[grid]):
            reason = self._reasons[int(grid[i, j])]
            self._protect_root(int(rows[i]), reason)
            self._protect_root(int(columns[j]), reason)
        for i, row in enumerate(grid.tolist()):
            for j, atom in enumerate(row):
                self._parts[atom] = (int(rows[i]), int(columns[j]))
        self._composite[grid.reshape(-1)] = True
        return rows, columns

    def _split_known(self, grid: Labels, why: str) -> tuple[Labels | None, Labels | None]:
        """Rows and columns of a grid whose cells stand for atoms already, where that fits."""
        n, m = grid.shape
        rows, columns, left = self._shared(grid)
        rest = [x for row in left for cell in row for x in cell]
        places = None
        if len(rest) == n * m and all(len(cell) == 1 for row in left for cell in row):
            places = _product(np.array(rest, dtype=np.int64).reshape(n, m))
        if places is not None:
            of_row, of_column, grid = places
            outer, inner = self._factor(grid)
            rows = [(*r, int(outer[k])) for r, k in zip(rows, of_row, strict=True)]
            columns = [(*c, int(inner[k])) for c, k in zip(columns, of_column, strict=True)]
        elif rest:
            self._tie_leftovers(left, why)
            rows, columns, left = self._shared(grid)
            self.protect([x for row in left for cell in row for x in cell], why)
        return (
            _or_none(np.array([self._together_label(r) for r in rows], dtype=np.int64)),
            _or_none(np.array([self._together_label(c) for c in columns], dtype=np.int64)),
        )

    def _shared(self, grid: Labels) -> tuple[list[Atoms], list[Atoms], list[list[Atoms]]]:
        """What all cells of each row share, of each column, and what is left of each cell."""
        cells = [[self.atoms(int(x)) for x in row] for row in grid]
        rows = [_common(row) for row in cells]
        columns = [_common(column) for column in zip(*cells, strict=True)]
        left = [
            [
                tuple(x for x in cell if x not in r and x not in c)
                for cell, c in zip(row, columns, strict=True)
            ]
            for row, r in zip(cells, rows, strict=True)
        ]
        return rows, columns, left

    def _tie_leftovers(self, left: list[list[Atoms]], why: str) -> None:
        """Make rows and columns of what fits neither: parts of a row go together, as do those of a
        column.

        As where the groups of a convolution are thirds of attention heads, or two halves of a
        concatenation have widths of their own.
        """
        outer = [[[x for x in cell if self.level(x) == "outer"] for cell in row] for row in left]
        inner = [[[x for x in cell if self.level(x) != "outer"] for cell in row] for row in left]
        for lines in (outer, zip(*inner, strict=True)):
            for line in lines:
                if any(line):
                    self.tie_all([x for cell in line for x in cell or [KEPT]], why)


def unlabelled(shape: Shape | None, why: str) -> Value:
    """A tensor of which nothing can be cut."""
    return Fixed(why) if shape is None else Axes((None,) * len(shape), why)


def segments(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Which dims of a reshape come from which: the smallest runs of dims with equal products.

    Dims of size 1 stand beside their neighbours and have no part in it.

    >>> segments((2, 6, 5), (2, 2, 3, 5))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    out: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [i] if i < len(before) else [], [j] if j < len(after) else []
        a = before[i] if old else 1
        b = after[j] if new else 1
        i, j = i + len(old), j + len(new)
        while a != b:
            if a < b and i < len(before):
                old.append(i)
                a *= before[i]
                i += 1
            elif j < len(after):
                new.append(j)
                b *= after[j]
                j += 1
            else:
                old.append(i)
                a *= before[i]
                i += 1
        out.append((old, new))
    return out


def _product(
    cells: Labels,
) -> tuple[list[int], list[int], Labels] | None:
    """Whether a grid of atoms is a product: every row is of a kind, every column is of a kind, and
    each pair of kinds has one atom of its own.

    Returns:
        the kind of each row and of each column, and the atom of each pair of kinds; or None.
    """
    row_kinds = {row.tobytes(): None for row in cells}
    column_kinds = {column.tobytes(): None for column in np.ascontiguousarray(cells.T)}
    of_row = [list(row_kinds).index(row.tobytes()) for row in cells]
    of_column = [list(column_kinds).index(c.tobytes()) for c in np.ascontiguousarray(cells.T)]
    grid = cells[[of_row.index(k) for k in range(len(row_kinds))]][
        :, [of_column.index(k) for k in range(len(column_kinds))]
    ]
    if len(np.unique(grid)) != grid.size or min(grid.shape) < 2:
        return None
    return of_row, of_column, grid


def _common(cells: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    first, *others = cells
    return tuple(x for x in first if all(x in other for other in others))


def _or_none(labels: Labels) -> Labels | None:
    return None if (labels < 0).all() else labels
