"""The Record: one measured value with everything needed to believe and repeat it.

`id` hashes all but the value fields and the time, so measuring the same thing again replaces the
old Record and never doubles it.
"""

import json
import time as clock
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from gracile.core.state import sha256, write_atomic
from gracile.errors import UserError

Kind = Literal["measured", "predicted", "published"]
VALUE_FIELDS = ("id", "value", "n", "median", "p95", "iqr", "ci95", "load_avg", "time")


@dataclass(frozen=True)
class Record:
    """One value. Units: `ms`, `bytes`, `share` (0..1), `points`, `count`, `nats`, `ratio`."""

    metric: str
    value: float
    unit: str
    kind: Kind = "measured"
    n: int | None = None
    median: float | None = None
    p95: float | None = None
    iqr: float | None = None
    ci95: tuple[float, float] | None = None
    split: str | None = None
    seed: int | None = None
    subject: dict[str, str] = field(default_factory=dict)
    runtime: str | None = None
    runtime_version: str | None = None
    precision_hint: str | None = None
    threads: int | None = None
    batch: int | None = None
    shape: tuple[int, ...] | None = None
    device: str | None = None
    load_avg: float | None = None
    recipe_sha: str | None = None
    data_sha: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    time: float = field(default_factory=clock.time)

    @property
    def id(self) -> str:
        """Hash of what was measured (not of what came out)."""
        facts = {k: v for k, v in asdict(self).items() if k not in VALUE_FIELDS}
        return sha256(json.dumps(facts, sort_keys=True))[:16]

    def to_dict(self) -> dict[str, Any]:
        """All fields, `id` first."""
        return {"id": self.id, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Record":
        """Inverse of `to_dict`.

        Raises:
            UserError: an unknown or missing field.
        """
        if not isinstance(data, dict):
            raise UserError(f"not a Record: it must be an object of fields, got {data!r}.")
        values = {k: v for k, v in data.items() if k != "id"}
        for key in ("shape", "ci95"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        try:
            return cls(**values)
        except TypeError as e:
            raise UserError(f"not a Record: {e}.") from None

    def about(self, **changes: Any) -> "Record":
        """A copy with some fields set (subject, recipe_sha, ...)."""
        unknown = set(changes) - {f.name for f in fields(self)}
        if unknown:
            raise ValueError(f"Record has no field {sorted(unknown)}")
        return replace(self, **changes)


class RecordLog:
    """`records.jsonl`: one Record a line; the last with an id wins; a torn last line is ignored."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._records: dict[str, Record] = {r.id: r for r in _read(self.path)}

    def add(self, *records: Record) -> None:
        """Store Records; the file is replaced in one step."""
        for record in records:
            self._records[record.id] = record
        lines = [json.dumps(r.to_dict(), sort_keys=True) for r in self._records.values()]
        write_atomic(self.path, ("\n".join(lines) + "\n").encode() if lines else b"")

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def find(self, metric: str, **facts: Any) -> list[Record]:
        """Records of one metric whose fields (or subject entries) have these values."""
        return find(self, metric, **facts)


def find(records: Iterable[Record], metric: str, **facts: Any) -> list[Record]:
    """Those Records of one metric whose fields (or subject entries) have these values."""
    return [
        r
        for r in records
        if r.metric == metric
        and all(getattr(r, k, r.subject.get(k)) == v for k, v in facts.items())
    ]


def _read(path: Path) -> list[Record]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    out = []
    for number, line in enumerate(lines, 1):
        try:
            data = json.loads(line)
        except ValueError:
            if number == len(lines):
                continue  # torn by a crash; the writer will measure it again
            raise UserError(f"{path}:{number}: not a Record (broken JSON).") from None
        try:
            out.append(Record.from_dict(data))
        except UserError as e:
            raise UserError(f"{path}:{number}: {e}") from None
    return out
