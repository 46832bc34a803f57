"""The Plan: an ordered, JSON-serializable list of Edits. A decision, never a tensor or a module.

Order in the list is order of application; addresses and indices count in the model as it is after
all earlier edits. A checkpoint is architecture + Plan + weights.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gracile.core.state import write_atomic
from gracile.errors import PlanConflict, UserError

Axis = tuple[str, int]  # address, dim
FORMAT = 1
KIND_ORDER = (
    "add", "remove", "skip", "factorize", "replace", "decompose", "exit", "mask", "share", "bits",
)  # fmt: skip


class Member(BaseModel):
    """One tensor of a coupled group: which indices along `dim` stay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: str
    dim: int = Field(ge=0)
    of: int = Field(gt=0)
    keep: tuple[int, ...]

    @model_validator(mode="after")
    def _indices(self) -> Self:
        if list(self.keep) != sorted(set(self.keep)):
            raise ValueError(f"{self.at}: 'keep' must be increasing and without doubles")
        if self.keep and (self.keep[0] < 0 or self.keep[-1] >= self.of):
            raise ValueError(f"{self.at}: 'keep' must lie in 0..{self.of - 1}")
        if not self.keep:
            raise ValueError(f"{self.at}: at least one index must be kept")
        return self

    @classmethod
    def trusted(cls, at: str, dim: int, of: int, keep: tuple[int, ...]) -> Self:
        """The same without the checks, for indices just computed: they cost more than a cut."""
        return cls.model_construct(at=at, dim=dim, of=of, keep=keep)


class _Edit(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = ""
    by: str = ""

    @property
    def targets(self) -> tuple[tuple[str, str], ...]:
        """What this edit decides about: (aspect, address) pairs, for the conflict check."""
        return ()


class Remove(_Edit):
    """Cut channels: every coupled member loses the same channels, each in its own index map."""

    kind: Literal["remove"] = "remove"
    group: tuple[Member, ...] = Field(min_length=1)


class Add(_Edit):
    """Inverse of `remove`: `of` is the width after adding, `keep` where the present indices go.

    `origin` says for each member which indices of the original network the added places restore, in
    order. `<key>.<at>.<dim>` are the tensors with the restored values.
    """

    kind: Literal["add"] = "add"
    group: tuple[Member, ...] = Field(min_length=1)
    origin: tuple[tuple[int, ...], ...]
    key: str

    @model_validator(mode="after")
    def _places(self) -> Self:
        if [len(o) for o in self.origin] != [m.of - len(m.keep) for m in self.group]:
            raise ValueError("'origin' needs one original index for each place that is added")
        return self


class Skip(_Edit):
    """Leave out a residual block: `y = x + f(x)` becomes `y = x`.

    `block` is the addition's node id, `nodes` are the other operators that no longer run, `gone`
    the paths of the modules and tensors that leave the model with them.
    """

    kind: Literal["skip"] = "skip"
    block: str
    nodes: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[tuple[str, str], ...]:
        return (("module", self.block),)


class Factorize(_Edit):
    """Replace a layer by a product of smaller ones."""

    kind: Literal["factorize"] = "factorize"
    at: str
    scheme: str
    ranks: tuple[int, ...]

    @property
    def targets(self) -> tuple[tuple[str, str], ...]:
        return (("module", self.at),)


class Replace(_Edit):
    """Replace a layer, or a head of linear layers, by a registered block with these options."""

    kind: Literal["replace"] = "replace"
    at: str
    with_: str = Field(alias="with")
    args: dict[str, Any] = Field(default_factory=dict)

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @property
    def targets(self) -> tuple[tuple[str, str], ...]:
        return (("module", self.at),)


class Decompose(_Edit):
    """Take a recurrent or attention layer apart into plain operators over the same parameters.

    `steps` is how many steps of a recurrent layer are unrolled, None for a cell and for attention.
    The network computes the same; what comes later may name the operators inside.
    """

    kind: Literal["decompose"] = "decompose"
    at: str
    steps: int | None = Field(default=None, ge=1)

    @property
    def targets(self) -> tuple[tuple[str, str], ...]:
        return (("module", self.at),)

    @property
    def group(self) -> tuple[Member, ...]:
        """No index of a tensor moves."""
        return ()


class Exit(_Edit):
    """Attach an early exit behind a graph node, whose output a registered head answers from.

    An input leaves there where the normalized entropy of softmax(answer / temperature) lies below
    `threshold`; None: nothing leaves yet. See `gracile.nn.exits`.
    """

    kind: Literal["exit"] = "exit"
    after: str
    head: str
    args: dict[str, Any] = Field(default_factory=dict)
    threshold: float | None = None
    temperature: float = Field(default=1.0, gt=0)

    @property
    def targets(self) -> tuple[tuple[str, str], ...]:
        return (("exit", self.after),)

    @property
    def group(self) -> tuple[Member, ...]:
        """No index of a tensor moves."""
        return ()


class Mask(_Edit):
    """Zeros inside a tensor that keeps its shape; `key` names the tensor in model.safetensors."""

    kind: Literal["mask"] = "mask"
    at: str
    key: str
    sparsity: float = Field(ge=0, le=1)


class Share(_Edit):
    """Weights taken from a small codebook: `levels` entries, each for `block` weights in a row.

    `<key>.codebook`, `<key>.codes` and, for blocks, `<key>.columns` are the tensors in
    model.safetensors; see `gracile.quantize.codebook.restore`. With `bucket` the entries are places
    between the ends of so many weights in a row, `<key>.low` and `<key>.width`, and `<key>.bucket`
    says how many; see `gracile.quantize.bucketed.restore`.
    """

    kind: Literal["share"] = "share"
    at: str
    key: str
    levels: int = Field(gt=1)
    block: int = Field(default=1, ge=1)
    bucket: int | None = Field(default=None, ge=1)

    @property
    def targets(self) -> tuple[tuple[str, str], ...]:
        return (("values", self.at),)


class Bits(_Edit):
    """Put a tensor on an affine grid: x ~ (q - zero_point) * scale with q in [qmin, qmax].

    `at` is a parameter for role weight or bias, a graph node for output. Role input is a model's
    input, or what the operator `at` reads, which then has one bit and `<key>.threshold`.
    `<key>.scale` and `<key>.zero_point` are the tensors in model.safetensors. One bit with a sign
    has the levels -1 and 1, and no 0.

    With `group` a weight (O, I, ...) has scales (O, groups): one for each so many of an output's
    inputs in a row, which are I times the places of a kernel.

    With `dynamic`, `at` is the operator whose first input is put on the grid of its own range
    whenever the network runs (role input); it has no tensors.
    """

    kind: Literal["bits"] = "bits"
    at: str
    role: Literal["weight", "input", "output", "bias"]
    bits: int = Field(ge=1, le=32)
    signed: bool
    symmetric: bool
    axis: int | None = None
    narrow: bool = False
    group: int | None = Field(default=None, ge=2)
    dynamic: bool = False
    key: str

    @model_validator(mode="after")
    def _found_at_run_time(self) -> Self:
        if self.dynamic and (self.role != "input" or self.signed or self.symmetric):
            raise ValueError("'dynamic' is for an unsigned input with a zero point")
        return self

    @model_validator(mode="after")
    def _of_weights(self) -> Self:
        if self.group is not None and (self.role != "weight" or self.axis != 0):
            raise ValueError("'group' is for a weight with scales along axis 0")
        return self

    @property
    def targets(self) -> tuple[tuple[str, str], ...]:
        return ((f"bits:{self.role}", self.at),)

    @property
    def qmin(self) -> int:
        """Smallest integer on the grid."""
        if self.signed and self.bits == 1:
            return -1
        return -(1 << (self.bits - 1)) + int(self.narrow) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest integer on the grid."""
        if self.signed and self.bits == 1:
            return 1
        return (1 << (self.bits - 1 if self.signed else self.bits)) - 1


Edit = Annotated[
    Add | Remove | Skip | Factorize | Replace | Decompose | Exit | Mask | Share | Bits,
    Field(discriminator="kind"),
]


class Architecture(BaseModel):
    """Which network the Plan starts from: a registered name and its arguments.

    `sha256` is the hash of parameter names and shapes, so that a Plan is never applied elsewhere.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    args: dict[str, Any] = Field(default_factory=dict)
    sha256: str = ""


class Plan(BaseModel):
    """All edits of a run, in order."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    architecture: Architecture
    edits: list[Edit] = Field(default_factory=list)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(self.edits)

    def __len__(self) -> int:
        return len(self.edits)

    def of_kind(self, kind: str) -> list[Any]:
        """The edits of one kind, in order."""
        return [e for e in self.edits if e.kind == kind]

    def extended(self, edits: Iterable[Any]) -> "Plan":
        """A new Plan with these edits appended and numbered `e0, e1, ...`."""
        out = list(self.edits)
        for edit in edits:
            out.append(edit.model_copy(update={"id": f"e{len(out)}"}))
        return Plan(architecture=self.architecture, edits=out)

    def amended(self, changes: Mapping[str, Mapping[str, Any]]) -> "Plan":
        """A new Plan in which the edits of these ids have other values of some fields."""
        edits = [e.model_copy(update=dict(changes.get(e.id, {}))) for e in self.edits]
        return Plan(architecture=self.architecture, edits=edits)

    def to_json(self) -> str:
        """The file format, one edit a line."""
        head = self.architecture.model_dump_json()
        lines = ",\n  ".join(e.model_dump_json(by_alias=True) for e in self.edits)
        body = f"[\n  {lines}\n ]" if self.edits else "[]"
        return f'{{"format": {FORMAT}, "architecture": {head}, "edits": {body}}}\n'

    def save(self, path: str | Path) -> None:
        """Write `plan.json` in one step."""
        write_atomic(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read and validate a plan file.

        Raises:
            UserError: no such file, no JSON, or a field that breaks the schema.
        """
        try:
            return cls.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as e:
            raise UserError(f"{path}: cannot read the plan: {e.strerror}.") from None
        except ValidationError as e:
            first = e.errors()[0]
            place = ".".join(str(p) for p in first["loc"])
            raise UserError(f"{path}: not a valid plan at '{place}': {first['msg']}.") from None
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}: not a JSON file: {e}.") from None

    def to_original(self) -> dict[Axis, list[int]]:
        """For each (address, dim) that was cut: the original index of every index that is there.

        Composes the index maps of all `remove` and `add` edits, in order.

        Raises:
            UserError: an edit was made for another width, or restores what is there.
        """
        maps: dict[Axis, list[int]] = {}
        for edit in self.edits:
            if isinstance(edit, (Remove, Add)):
                maps.update(composed(maps, edit))
        return maps


def composed(maps: Mapping[Axis, list[int]], edit: Remove | Add) -> dict[Axis, list[int]]:
    """Index maps of the axes one edit touches, after it.

    Args:
        maps: axis -> original index of every index that is there; an axis that is not in it is
            whole.
        edit: counts in the model that `maps` describes.

    >>> members = (Member(at="w", dim=0, of=4, keep=(0, 3)),)
    >>> composed({("w", 0): [1, 2, 5, 6]}, Remove(group=members))
    {('w', 0): [1, 6]}
    >>> composed({("w", 0): [1, 6]}, Add(group=members, origin=((2, 5),), key=""))
    {('w', 0): [1, 2, 5, 6]}
    """
    out = {}
    for k, m in enumerate(edit.group):
        had = m.of if isinstance(edit, Remove) else len(m.keep)
        before = maps.get((m.at, m.dim), list(range(had)))
        if len(before) != had:
            raise UserError(
                f"plan edit {edit.id}: '{m.at}' has {len(before)} indices along dim {m.dim}, the "
                f"edit was made for {had}."
            )
        if isinstance(edit, Remove):
            out[m.at, m.dim] = [before[i] for i in m.keep]
            continue
        there, new = dict(zip(m.keep, before, strict=True)), iter(edit.origin[k])
        after = [there[i] if i in there else next(new) for i in range(m.of)]
        if after != sorted(set(after)):
            raise UserError(
                f"plan edit {edit.id}: '{m.at}' would have the original indices {after} along dim "
                f"{m.dim}; an `add` restores missing ones, at their places."
            )
        out[m.at, m.dim] = after
    return out


def in_order(edits: Iterable[Any]) -> list[Any]:
    """Sort edits of one `apply()` by kind; the order within a kind is kept."""
    return sorted(edits, key=lambda e: KIND_ORDER.index(e.kind))


def check_conflicts(edits: Iterable[Any], lines: dict[str, int] | None = None) -> None:
    """Refuse two edits by different recipe entries that decide about the same thing.

    Args:
        edits: any edits, of one or several entries.
        lines: line of each recipe entry, for the message.

    Raises:
        PlanConflict: names both entries, and their lines where known.
    """
    seen: dict[tuple[str, str], str] = {}
    for edit in edits:
        for target in edit.targets:
            other = seen.setdefault(target, edit.by)
            if other != edit.by:
                raise PlanConflict(
                    f"{_entry(other, lines)} and {_entry(edit.by, lines)} both set "
                    f"{target[0].split(':')[0]} of '{target[1]}'; keep one."
                )


def _entry(name: str, lines: dict[str, int] | None) -> str:
    line = (lines or {}).get(name)
    return f"'{name}'" + (f" (line {line})" if line else "")
