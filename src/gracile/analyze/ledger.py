"""The coverage ledger: the fate of every parameter and operator, and why; adds up to 100 %.

Rows are additive: a tensor of 100 elements of which 40 were cut is a row `kept` of 60 and a row
`removed` of 40. So on each axis (structure, precision, sparsity) the counts of all rows add up to
the original model plus whatever was added, by parameters (tensor rows) and by MACs (operator rows).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gracile.core.plan import Plan
from gracile.core.state import write_json
from gracile.errors import UserError, nearest

if TYPE_CHECKING:  # reading a ledger, as a report does, should not load torch
    from torch import Tensor

    from gracile.graph.graph import Graph

FORMAT = 1
AXES = ("structure", "precision", "sparsity")
STRUCTURES = ("kept", "factorized", "replaced", "added", "skipped", "removed")
REASONS = ("not_asked", "protected", "unsupported", "sensitive", "no_gain")
GONE = ("skipped", "removed")
BINARY = "binary"
NO_OPERATORS = ("input", "output", "param", "quantize")
MOVES_VALUES = (
    "quantize", "identity", "dropout", "flatten", "reshape", "permute", "getitem", "max_pool",
)  # fmt: skip


@dataclass(frozen=True)
class Operator:
    """One operator of a captured graph, as the ledger needs it.

    Attributes:
        op: normalized name, `conv`, `linear`, `add`, ...
        macs: multiply-adds for one sample.
        weight: address of its weight tensor, None if it has none.
        inputs: ids of the operators it reads; None if unknown, then an operator counts as integer
            as soon as its weight does.
    """

    op: str
    macs: int
    weight: str | None = None
    inputs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Inventory:
    """What a model consists of: tensor name -> (elements, zeros), operator id -> Operator."""

    tensors: Mapping[str, tuple[int, int]]
    operators: Mapping[str, Operator] = field(default_factory=dict)


class Note(NamedTuple):
    """What a Method says about one address on one axis, and why it is so.

    `value` is the state it ended in (`kept`, `float`, `binary`, ...); None speaks about any state.
    A note whose value contradicts what is found in the model is ignored.
    """

    address: str
    axis: str
    value: str | float | None
    reason: str | None
    why: str = ""
    by: str = ""


@dataclass(frozen=True)
class Row:
    """A part of one tensor or operator that shares one fate.

    `precision` and `sparsity` are None where the part no longer exists. A row without a `reason`
    was compressed on at least one axis and nobody had anything to explain.
    """

    name: str
    kind: str
    op: str | None
    numel: int
    macs: int
    structure: str
    precision: str | None
    sparsity: float | None
    reason: str | None = None
    why: str = ""
    by: str = ""


@dataclass(frozen=True)
class Ledger:
    """All rows of a run: tensors first, then operators, each in model order."""

    rows: tuple[Row, ...] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def totals(self) -> dict[str, int]:
        """Original plus added parameters and MACs: what 100 % is."""
        return {
            "parameters": sum(r.numel for r in self.rows),
            "macs": sum(r.macs for r in self.rows),
        }

    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """measure -> axis -> value -> count; each axis adds up to `totals()` to the last unit."""
        return {
            measure: {axis: _count(self.rows, attribute, axis) for axis in AXES}
            for measure, attribute in (("parameters", "numel"), ("macs", "macs"))
        }

    def shares(self) -> dict[str, dict[str, dict[str, float]]]:
        """`counts()` as shares in [0, 1]; an axis is empty where there is nothing to share out.

        >>> row = Row("w", "tensor", None, 60, 0, "kept", "int8", 0.0)
        >>> gone = Row("w", "tensor", None, 40, 0, "removed", None, None)
        >>> Ledger((row, gone)).shares()["parameters"]["precision"]
        {'int8': 0.6, 'removed': 0.4}
        """
        totals = self.totals()
        return {
            measure: {
                axis: {value: n / totals[measure] for value, n in values.items()}
                for axis, values in axes.items()
            }
            for measure, axes in self.counts().items()
        }

    def to_dict(self) -> dict[str, Any]:
        """The file format: totals and shares for readers, rows as the truth."""
        return {
            "format": FORMAT,
            "totals": self.totals(),
            "shares": self.shares(),
            "rows": [asdict(r) for r in self.rows],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Ledger":
        """Inverse of `to_dict`; shares are computed again from the rows.

        Raises:
            UserError: another format, or a row with unknown or missing fields.
        """
        if data.get("format") != FORMAT or not isinstance(data.get("rows"), list):
            raise UserError(
                f"not a ledger: 'format' must be {FORMAT} with a list 'rows', "
                f"got format {data.get('format')!r}."
            )
        try:
            return cls(tuple(Row(**row) for row in data["rows"]))
        except TypeError as e:
            raise UserError(f"not a ledger row: {e}.") from None

    def save(self, path: str | Path) -> None:
        """Write `ledger.json` in one step."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Ledger":
        """Read `ledger.json`.

        Raises:
            UserError: no such file, no JSON, or not a ledger.
        """
        try:
            data = json.loads(Path(path).read_text())
        except OSError as e:
            raise UserError(f"{path}: cannot read the ledger: {e.strerror}.") from None
        except ValueError as e:
            raise UserError(f"{path}: not a JSON file: {e}.") from None
        return cls.from_dict(data)


def inventory(
    tensors: "Iterable[tuple[str, Tensor]]", graph: "Graph", macs: Mapping[str, int]
) -> Inventory:
    """Take stock of a model.

    Args:
        tensors: (address, tensor) pairs, usually `model.named_parameters()` of the bare model.
        graph: the captured model.
        macs: node id -> multiply-adds for one sample; a node that is missing costs none.
    """
    return Inventory(
        {name: (t.numel(), int((t == 0).sum())) for name, t in tensors},
        {
            n.id: Operator(n.op, int(macs.get(n.id, 0)), n.params.get("weight"), n.inputs)
            for n in graph
        },
    )


def build(
    before: Inventory, after: Inventory, plan: Plan, notes: Iterable[tuple[Any, ...]] = ()
) -> Ledger:
    """Say what became of every tensor and operator of the original model.

    What exists is taken from the two inventories, who did it and at which precision from the Plan,
    why something was left alone from the notes. A tensor that was never touched and that no note
    explains was `not_asked`.

    Args:
        before: the original model.
        after: the compressed one, with the same ids.
        plan: all edits between the two.
        notes: `Note`s or plain tuples of its fields.

    Raises:
        ValueError: a note with an unknown axis or reason.
    """
    facts = _Facts(before, after, plan, [Note(*n) for n in notes])
    tensors = _split(
        {n: size for n, (size, _) in before.tensors.items()},
        {n: size for n, (size, _) in after.tensors.items()},
        _regions(plan),
        plan,
    )
    operators = _split(
        _macs(before.operators), _macs(after.operators), [*_regions(plan), *_apart(plan)], plan
    )
    return Ledger(
        (*(facts.tensor_row(p) for p in tensors), *(facts.operator_row(p) for p in operators))
    )


class _Part(NamedTuple):
    """`size` elements (or MACs) of one name that share one structural fate."""

    name: str
    structure: str
    size: int
    by: str = ""
    why: str = ""


class _Region(NamedTuple):
    """A module an edit rewrote as a whole."""

    path: str
    structure: str
    by: str
    why: str

    def holds(self, name: str) -> bool:
        return name == self.path or name.startswith(self.path + ".")


def _split(
    before: Mapping[str, int], after: Mapping[str, int], regions: list[_Region], plan: Plan
) -> list[_Part]:
    """Divide both models into parts with one fate each.

    The parts that are not `added` add up to `before`, those that are not gone to `after`. Every
    name has a part, if only an empty one.
    """
    fresh: dict[_Region | None, list[str]] = {}
    for name in after:
        if name not in before:
            fresh.setdefault(_innermost(name, regions), []).append(name)
    budget = {r: sum(after[n] for n in names) for r, names in fresh.items()}
    parts: list[_Part] = []
    replaced: dict[_Region | None, int] = {}
    for name, old in before.items():
        region = _innermost(name, regions)
        if name in after:
            parts += _survivor(name, old, after[name], region)
        elif region is None or region.structure == "skipped":
            parts.append(_left(name, old, region))
        else:
            covered = min(old, budget.get(region, 0) - replaced.get(region, 0))
            replaced[region] = replaced.get(region, 0) + covered
            parts.append(_left(name, old - covered, region))
    for region, names in fresh.items():
        room = replaced.get(region, 0)
        for name in names:
            parts += _newcomer(name, after[name], min(room, after[name]), region, plan)
            room -= min(room, after[name])
    return parts


def _survivor(name: str, old: int, now: int, region: _Region | None) -> Iterator[_Part]:
    rewritten = region is not None and region.structure in ("factorized", "replaced")
    if min(old, now) or old == now:
        if region is not None and rewritten:
            yield _Part(name, region.structure, min(old, now), region.by, region.why)
        else:
            yield _Part(name, "kept", min(old, now))
    if now < old:
        yield _Part(name, "removed", old - now, region.by if region and rewritten else "")
    if now > old:
        yield _Part(name, "added", now - old)


def _left(name: str, size: int, region: _Region | None) -> _Part:
    if region is None:
        return _Part(name, "removed", size, "", "no longer in the model")
    if region.structure == "skipped":
        return _Part(name, "skipped", size, region.by, region.why)
    return _Part(name, "removed", size, region.by, f"{region.why}: needs fewer")


def _newcomer(
    name: str, size: int, covered: int, region: _Region | None, plan: Plan
) -> Iterator[_Part]:
    if region is not None and (covered or size == 0):
        yield _Part(name, region.structure, covered, region.by, region.why)
    if size > covered or (region is None and size == 0):
        by = region.by if region else _joined(e.by for e in plan.of_kind("exit"))
        yield _Part(name, "added", size - covered, by)


def _regions(plan: Plan) -> list[_Region]:
    out = [
        _Region(path, "skipped", e.by, f"block '{e.block}' left out")
        for e in plan.of_kind("skip")
        for path in (e.block, *e.nodes, *e.gone)
    ]
    for e in plan.of_kind("factorize"):
        ranks = ", ".join(str(r) for r in e.ranks)
        out.append(_Region(e.at, "factorized", e.by, f"{e.scheme}, rank {ranks}"))
    for e in plan.of_kind("replace"):
        out.append(_Region(e.at, "replaced", e.by, f"by {e.with_}"))
    return out


def _apart(plan: Plan) -> list[_Region]:
    """Layers of which the operators are others, and the tensors the same."""
    return [
        _Region(e.at, "replaced", e.by, "by its own operators") for e in plan.of_kind("decompose")
    ]


def _innermost(name: str, regions: list[_Region]) -> _Region | None:
    holding = [r for r in regions if r.holds(name)]
    return max(holding, key=lambda r: len(r.path), default=None)


class _Facts:
    """Precision, sparsity, authors and reasons of every name, looked up once."""

    def __init__(self, before: Inventory, after: Inventory, plan: Plan, notes: list[Note]):
        for note in notes:
            if note.axis not in AXES:
                raise ValueError(
                    f"note on '{note.address}': unknown axis '{note.axis}'."
                    f"{nearest(note.axis, AXES)}"
                )
            if note.reason is not None and note.reason not in REASONS:
                raise ValueError(
                    f"note on '{note.address}': unknown reason '{note.reason}'."
                    f"{nearest(note.reason, REASONS)}"
                )
        self.before, self.after = before, after
        self.notes = {(n.address, n.axis): n for n in notes}
        self.tensor_bits: dict[str, str] = {e.at: "shared" for e in plan.of_kind("share")}
        self.value_bits: dict[tuple[str, str], str] = {}
        self.grouped: set[str] = set()  # weights with a scale for each few inputs
        self.dynamic: set[str] = set()  # operators that quantize what they read as they run
        for e in plan.of_kind("bits"):
            if e.role in ("weight", "bias"):
                self.tensor_bits[e.at] = _precision(e.bits)
                if e.group is not None:
                    self.grouped.add(e.at)
            else:
                self.value_bits[e.at, e.role] = _precision(e.bits)
                if e.dynamic:
                    self.dynamic.add(e.at)
        self.authors = _authors(plan)
        self.readers: dict[str, list[str]] = {}
        for id, operator in {**before.operators, **after.operators}.items():
            if operator.weight is not None:
                self.readers.setdefault(operator.weight, []).append(id)

    def tensor_row(self, part: _Part) -> Row:
        size, zeros = self.after.tensors.get(part.name, (0, 0))
        old_size, old_zeros = self.before.tensors.get(part.name, (0, 0))
        sparsity = zeros / size if size else 0.0
        keys = [part.name, *self.readers.get(part.name, ())]
        precision = self.tensor_bits.get(part.name) or self._noted(keys, "float")
        return self._row(
            part, keys, "tensor", None, part.size, 0, precision, sparsity,
            masked=sparsity > (old_zeros / old_size if old_size else 0.0),
        )  # fmt: skip

    def operator_row(self, part: _Part) -> Row:
        operator = self.after.operators.get(part.name) or self.before.operators[part.name]
        keys = [part.name, *([operator.weight] if operator.weight else [])]
        size, zeros = self.after.tensors.get(operator.weight or "", (0, 0))
        computed, why = self._computes_in(part.name, operator)
        precision = computed if computed != "float" else self._noted(keys, "float")
        row = self._row(
            part, keys, "operator", operator.op, 0, part.size, precision,
            zeros / size if size else 0.0, masked=zeros > 0,
        )  # fmt: skip
        if why and row.precision == computed and not row.why:
            row = Row(**{**asdict(row), "reason": row.reason or "not_asked", "why": why})
        return row

    def _computes_in(self, id: str, operator: Operator) -> tuple[str, str]:
        """The precision of its arithmetic: integers need a weight and inputs on a grid."""
        if operator.weight is None and not operator.macs:
            found = self.value_bits.get((id, "output")) or self.value_bits.get((id, "input"))
            return found or "float", ""
        weight = self.tensor_bits.get(operator.weight, "float") if operator.weight else None
        if weight in ("float", "shared") or operator.inputs is None:
            return weight or "float", ""
        if operator.weight in self.grouped:
            return "float", "weight with a scale for each few inputs, which no integer kernel takes"
        if id in self.dynamic:
            return f"{weight} dynamic", ""
        own = self.value_bits.get((id, "input"))
        inputs = [own or self._leaves(i) for i in operator.inputs if not self._is_parameter(i)]
        if not inputs or None in inputs:
            return "float", "" if weight is None else "weight on a grid, but its input is float"
        if weight == BINARY and set(inputs) != {BINARY}:
            return str(inputs[0]), "its weight has one bit, what it reads has more"
        return weight or str(inputs[0]), ""

    def _leaves(self, id: str) -> str | None:
        """Grid of the values an operator hands on; one that only moves values keeps its input's."""
        while (found := self.value_bits.get((id, "output"))) is None:
            operator = self.after.operators.get(id)
            if operator is not None and operator.op == "input":
                return self.value_bits.get((id, "input"))
            if operator is None or operator.op not in MOVES_VALUES or not operator.inputs:
                return None
            id = operator.inputs[0]
        return found

    def _is_parameter(self, id: str) -> bool:
        return id in self.after.operators and self.after.operators[id].op == "param"

    def _noted(self, keys: list[str], default: str) -> str:
        values = (self.notes[k, "precision"].value for k in keys if (k, "precision") in self.notes)
        return next((str(v) for v in values if v is not None), default)

    def _row(
        self, part: _Part, keys: list[str], kind: str, op: str | None, numel: int, macs: int,
        precision: str, sparsity: float, *, masked: bool,
    ) -> Row:  # fmt: skip
        gone = part.structure in GONE
        state: dict[str, Any] = {
            "structure": part.structure,
            "precision": None if gone else precision,
            "sparsity": None if gone else sparsity,
        }
        notes = [
            n
            for axis in AXES
            for key in keys
            if (n := self.notes.get((key, axis))) and _agrees(n, state[axis])
        ]
        compressed = part.structure != "kept" or precision != "float" or masked
        reason = next((n.reason for n in notes if n.reason), None)
        by = [*([part.by] if part.by else self._by(keys, gone)), *(n.by for n in notes)]
        return Row(
            name=part.name, kind=kind, op=op, numel=numel, macs=macs, **state,
            reason=reason if compressed or reason else "not_asked",
            why=part.why or "; ".join(dict.fromkeys(n.why for n in notes if n.why)),
            by=_joined(by),
        )  # fmt: skip

    def _by(self, keys: list[str], gone: bool) -> list[str]:
        kinds = ("remove",) if gone else ("add", "mask", "share", "bits")
        return [by for key in keys for kind in kinds for by in self.authors.get((key, kind), ())]


def _authors(plan: Plan) -> dict[tuple[str, str], list[str]]:
    """(address, edit kind) -> the recipe entries that made such an edit there."""
    out: dict[tuple[str, str], list[str]] = {}
    for e in plan:
        if e.kind in ("remove", "add"):
            places = [m.at for m in e.group]
        elif e.kind in ("mask", "share", "bits"):
            places = [e.at]
        else:
            places = []
        for at in places:
            out.setdefault((at, e.kind), []).append(e.by)
    return out


def _agrees(note: Note, found: str | float | None) -> bool:
    if note.value is None:
        return found is not None
    if note.axis == "sparsity":
        return isinstance(found, float) and abs(float(note.value) - found) < 0.005
    return note.value == found


def _precision(bits: int) -> str:
    return BINARY if bits == 1 else f"int{bits}"


def _macs(operators: Mapping[str, Operator]) -> dict[str, int]:
    return {id: o.macs for id, o in operators.items() if o.op not in NO_OPERATORS}


def _count(rows: Iterable[Row], attribute: str, axis: str) -> dict[str, int]:
    """value -> count; what no longer exists is `removed` on the axes where it has no value."""
    out: dict[str, int] = {}
    for row in rows:
        size: int = getattr(row, attribute)
        if axis == "sparsity" and row.sparsity is not None:
            zero = round(size * row.sparsity)
            values = {"nonzero": size - zero, "zero": zero}
        else:
            value = getattr(row, axis)
            values = {"removed" if value is None else value: size}
        for value, n in values.items():
            if n:
                out[value] = out.get(value, 0) + n
    return out


def _joined(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(n for n in names if n))
