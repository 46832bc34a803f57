"""A failed proof made small: the fewest cuts that still fail, and the operator where they show.

The idea is ours, after delta debugging (Zeller and Hildebrandt 2002): halves of the cuts, then
halves of the units of the one cut that is left, as long as one half fails by itself. A failure
that needs cuts of both halves stays as large as it is.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from gracile.core.plan import Axis, Member, Plan, Remove
from gracile.core.state import write_atomic
from gracile.errors import UserError, VerificationError
from gracile.graph.dependency import ChannelGroup
from gracile.graph.graph import Graph

PROOFS = 12  # at most; each is about three forwards
FORMAT = 1
Taken = Mapping[Axis, set[int]]  # indices counted before the first edit


@dataclass(frozen=True)
class Operator:
    """An operator of the captured graph and its neighbours.

    Attributes:
        id: as in the ledger and in exported files.
        op: what it computes.
        shape: of its output; None if it is no tensor.
        inputs: what it reads, without neighbours of their own.
        readers: what reads it.
    """

    id: str
    op: str
    shape: tuple[int, ...] | None
    inputs: tuple["Operator", ...] = ()
    readers: tuple["Operator", ...] = ()


def operator(graph: Graph, id: str) -> Operator:
    """The operator of a graph by this id, with its neighbours."""

    def bare(name: str) -> Operator:
        return Operator(name, graph[name].op, graph[name].shape)

    here = bare(id)
    inputs = tuple(bare(i) for i in dict.fromkeys(graph[id].inputs))
    return Operator(*_own(here), inputs, tuple(bare(n.id) for n in graph.consumers(id)))


def smallest(
    error: VerificationError,
    prove: Callable[[Sequence[Remove]], Any],
    groups: Sequence[ChannelGroup],
    proofs: int = PROOFS,
) -> VerificationError:
    """The error of the fewest cuts that still fail.

    Args:
        error: of a proof of `error.edits`.
        prove: repeats it for other cuts of the same model; must leave the model as it is.
        groups: of that model: what may be cut by itself.
        proofs: how many more may be made.

    Returns:
        An error of the same kind whose `edits` are one edit, or the error itself where no part of
        its cuts fails alone.
    """
    if not error.edits or not all(isinstance(e, Remove) for e in error.edits):
        return error
    search = _Search(error, prove, proofs)
    parts = search.narrow(_taken(error.edits))
    if len(parts) == 1:
        units = _units(parts[0], groups)
        if len(units) > 1:
            search.narrow(units)
    return search.error


class _Search:
    def __init__(self, error: VerificationError, prove: Callable[..., Any], proofs: int):
        self.error, self.prove, self.left = error, prove, proofs
        self.by = error.edits[0].by
        self.sizes: dict[Axis, int] = {}
        for edit in error.edits:
            for m in edit.group:
                self.sizes.setdefault((m.at, m.dim), m.of)

    def narrow(self, parts: Sequence[Taken]) -> Sequence[Taken]:
        """The parts that still fail; `error` is theirs from then on."""
        while len(parts) > 1:
            middle = len(parts) // 2
            half = next((p for p in (parts[:middle], parts[middle:]) if self._fails(p)), None)
            if half is None:
                break
            parts = half
        return parts

    def _fails(self, parts: Sequence[Taken]) -> bool:
        if self.left == 0:
            return False
        self.left -= 1
        try:
            self.prove([self._edit(parts)])
        except VerificationError as e:
            if not e.edits:  # no finite number: says nothing about the cut
                return False
            self.error = e
            return True
        except UserError:  # nothing would be left of a tensor
            return False
        return False

    def _edit(self, parts: Sequence[Taken]) -> Remove:
        members = []
        for (at, dim), of in self.sizes.items():
            gone = set().union(*(p.get((at, dim), ()) for p in parts))
            if not gone:
                continue
            if len(gone) == of:
                raise UserError(f"nothing would be left of '{at}' along dim {dim}.")
            keep = tuple(i for i in range(of) if i not in gone)
            members.append(Member(at=at, dim=dim, of=of, keep=keep))
        return Remove(by=self.by, group=tuple(members))


def _taken(edits: Iterable[Remove]) -> list[dict[Axis, set[int]]]:
    """What each edit takes, counted before the first one."""
    left: dict[Axis, list[int]] = {}
    out = []
    for edit in edits:
        taken = {}
        for m in edit.group:
            before = left.get((m.at, m.dim), list(range(m.of)))
            left[m.at, m.dim] = [before[k] for k in m.keep]
            taken[m.at, m.dim] = set(before) - set(left[m.at, m.dim])
        out.append(taken)
    return out


def _units(taken: Taken, groups: Sequence[ChannelGroup]) -> list[Taken]:
    """The units of a group that together are what is taken; [] if they are of no one group."""
    for group in groups:
        units = []
        for unit in group.units:
            part: dict[Axis, set[int]] = {}
            for s in unit:
                part.setdefault((s.at, s.dim), set()).update(s.index)
            if part and all(index <= taken.get(axis, set()) for axis, index in part.items()):
                units.append(part)
        covered: dict[Axis, set[int]] = {}
        for part in units:
            for axis, index in part.items():
                covered.setdefault(axis, set()).update(index)
        if covered == {axis: index for axis, index in taken.items() if index}:
            return [*units]
    return []


@dataclass(frozen=True)
class Refusal:
    """A cut that failed its proof, small enough to look at.

    Attributes:
        group: address of the first tensor it cuts.
        why: the error's text.
        operator: the first that differs; None if it could not be found.
        plan: from the original network: what was cut before, then the cut that fails.
    """

    group: str
    why: str
    operator: Operator | None
    plan: Plan

    @classmethod
    def of(cls, error: VerificationError, before: Plan) -> "Refusal":
        """From an error with edits, and the Plan that led to the model they were made for."""
        group = error.edits[0].group[0].at
        return cls(group, str(error), error.operator, before.extended(error.edits))

    def to_json(self) -> str:
        """The file's text."""
        found = None if self.operator is None else _plain(self.operator)
        head = {"format": FORMAT, "group": self.group, "why": self.why, "operator": found}
        text = json.dumps(head, indent=1)
        return f'{text.removesuffix("}").rstrip()},\n "plan": {self.plan.to_json().strip()}\n}}\n'

    def save(self, folder: Path) -> None:
        """Write `<group>.json`; beside other refusals of the group `<group>.2.json` and so on."""
        folder.mkdir(parents=True, exist_ok=True)
        text = self.to_json()
        for k in count(1):
            file = folder / (f"{self.group}.json" if k == 1 else f"{self.group}.{k}.json")
            if not file.exists():
                write_atomic(file, text.encode())
            if file.read_text(encoding="utf-8") == text:
                return


def _own(o: Operator) -> tuple[str, str, tuple[int, ...] | None]:
    return o.id, o.op, o.shape


def _plain(o: Operator) -> dict[str, Any]:
    names = ("id", "op", "shape")
    whole = asdict(o)
    near = {k: [{n: x[n] for n in names} for x in whole[k]] for k in ("inputs", "readers")}
    return {**{n: whole[n] for n in names}, **near}
