"""Reading a run directory: what a report is made of, checked for form before anything is drawn."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gracile.analyze.ledger import Ledger
from gracile.analyze.sensitivity import NAME as SENSITIVITY
from gracile.analyze.sensitivity import Sensitivity, load_sensitivity
from gracile.core.plan import Plan
from gracile.core.record import Record, RecordLog
from gracile.errors import UserError
from gracile.report.figures import Point

PARTS = ("before", "after", "stages", "speedup", "parity", "agreement", "kernels", "goal", "data")


@dataclass(frozen=True)
class Run:
    """The files of one run; what a run did not write is None or empty."""

    path: Path
    result: dict[str, Any]
    recipe: str | None = None
    plan: Plan | None = None
    ledger: Ledger | None = None
    records: tuple[Record, ...] = ()
    curves: dict[str, list[Point]] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None

    @property
    def name(self) -> str:
        """Name of the network, or of the folder where no plan says which network it was."""
        return self.plan.architecture.name if self.plan else self.path.resolve().name


def read(run_dir: str | Path) -> Run:
    """Read `result.json` and whatever else of a run is there.

    Raises:
        UserError: no `result.json`, or a file that is not what its name says.
    """
    path = Path(run_dir)
    result = _json(path / "result.json")
    if result is None:
        raise UserError(f"{path}: not a finished run: it has no result.json.")
    for part in PARTS:
        if not isinstance(result.get(part) or {}, dict):
            raise UserError(f"{path / 'result.json'}: '{part}' must be an object.")
    recipe, plan, ledger = (path / n for n in ("recipe.yaml", "plan.json", "ledger.json"))
    scan = path / SENSITIVITY
    return Run(
        path=path,
        result=result,
        recipe=recipe.read_text() if recipe.exists() else None,
        plan=Plan.load(plan) if plan.exists() else None,
        ledger=Ledger.load(ledger) if ledger.exists() else None,
        records=tuple(RecordLog(path / "records.jsonl")),
        curves=_curves(path / "history.json"),
        sensitivity=load_sensitivity(scan) if scan.exists() else None,
    )


def _curves(path: Path) -> dict[str, list[Point]]:
    data = _json(path) or {}
    try:
        return {
            str(name): [(float(x), None if y is None else float(y)) for x, y in points]
            for name, points in data.get("curves", {}).items()
        }
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: a curve must be a list of [epoch, value] pairs.") from None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except OSError as e:
        raise UserError(f"{path}: cannot read: {e.strerror}.") from None
    except ValueError as e:
        raise UserError(f"{path}: not a JSON file: {e}.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a JSON object.")
    return data
