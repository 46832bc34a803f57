"""Half of every prunable group of whole libraries of architectures, each cut proven.

Random weights, batches of two small inputs. Each architecture is pruned in a process of its own
with limits of time and memory, so that one that hangs is a row. `heads` are whole attention heads
or groups of a grouped convolution, `widths` the channels within each; where both could go, only
heads are removed here. `MLP widths` are channels that one layer (or two, with a gate) makes and one
reads, in networks that have heads. An error is relative to the magnitude of the output, in float64.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from math import nan
from pathlib import Path
from typing import Any

from benchmarks.apart import outcome_of
from benchmarks.cell import Cell, Values, once, template, version
from benchmarks.structure_zoo import Architecture, architectures
from gracile.core.record import Record
from gracile.errors import UserError
from gracile.units import human_count

NAME = "structure"
SECONDS = 1200
NEEDS: Mapping[str, str] = {
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers": "transformers",
}
METRICS: Mapping[str, str] = {
    "correct": "flag",
    "groups": "count",
    "groups_free": "count",
    "channels_removed": "share",
    "heads_removed": "share",
    "widths_removed": "share",
    "mlp_removed": "share",
    "macs": "count",
    "macs_after": "count",
    "params": "count",
    "params_after": "count",
    "capture_s": "s",
    "analysis_s": "s",
    "surgery_s": "s",
    "proof_s": "s",
    "max_error": "ratio",
    "params_protected": "share",
}


def cells() -> Iterator[Cell]:
    """One cell an architecture."""
    for key, arch in architectures().items():
        records = tuple(_record(arch, metric, unit) for metric, unit in METRICS.items())
        notes: dict[str, Any] = {}
        run = partial(measure, arch, key, notes)
        yield Cell(NAME, key, arch.tier, records, run, notes)


def _record(arch: Architecture, metric: str, unit: str) -> Record:
    record = template(NAME, arch.family, metric, unit, arch.name)
    return record.about(versions={**record.versions, **_version(arch.package)})


@lru_cache
def _version(package: str) -> dict[str, str]:
    try:
        return {package: version(package)}
    except PackageNotFoundError:
        return {}


def measure(arch: Architecture, key: str, notes: dict[str, Any]) -> Values:
    """Prune it in a process of its own; what it says beyond numbers goes into `notes`.

    Raises:
        UserError: the package it comes from is not installed.
    """
    if find_spec(arch.package) is None:
        raise UserError(f"the structure benchmark of {key} needs {arch.package}: make bench-peers")
    found = run_apart(key)
    notes.update(texts_of(found))
    return {(metric, arch.name): once(value) for metric, value in values_of(found).items()}


def run_apart(key: str, seconds: int = SECONDS) -> dict[str, Any]:
    """What `structure_one` writes, or a status that says how its process ended."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcome.json"
        found = outcome_of("benchmarks.structure_one", [key, str(file)], file, seconds)
    return found if "status" in found else {"status": "error", **found}


def values_of(found: Mapping[str, Any]) -> dict[str, float]:
    """Metric -> value; nan for what an architecture has none of."""
    if "groups" not in found:  # its process did not get to the end
        return {"correct": 0.0, **{m: nan for m in METRICS if m != "correct"}}
    same = ("groups", "macs", "macs_after", "params", "params_after", "capture_s", "analysis_s")
    return {
        **{name: float(found[name]) for name in (*same, "surgery_s", "proof_s", "max_error")},
        "correct": float(found["status"] == "ok"),
        "groups_free": float(found["free"]),
        "channels_removed": share(found["written_gone"], found["written"]),
        "heads_removed": share(found["heads_gone"], found["heads"]),
        "widths_removed": share(found["widths_gone"], found["widths"]),
        "mlp_removed": share(found["hidden_gone"], found["hidden"]) if found["heads"] else nan,
        "params_protected": share(found["protected"], found["params"]),
    }


def share(part: float, whole: float) -> float:
    """Part of a whole; nan of nothing."""
    return part / whole if whole else nan


def texts_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Status, how it was captured and the three commonest reasons: Records hold only numbers."""
    reasons = sorted(found.get("reasons", {}).items(), key=lambda r: -r[1])
    return {
        "status": found["status"],
        "text": found["text"],
        "how": found.get("how", []),
        "reasons": dict(reasons[:3]),
    }


TITLES = (
    "architecture", "status", "groups (free)", "channels removed", "heads removed",
    "widths removed", "MLP widths removed", "MACs", "parameters",
    "capture, analysis, surgery, proof (s)", "masked vs sliced", "protected", "why",
)  # fmt: skip


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: one row for each architecture of a family.

    Args:
        records: of one family.
        texts: `family/name` -> what `texts_of` said.
    """
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for r in records:
        rows.setdefault((r.subject["cell"], r.subject["variant"]), {})[r.metric] = r.value
    lines = [f"| {' | '.join(TITLES)} |", f"|---|---|{'---:|' * (len(TITLES) - 3)}---|"]
    for key, arch in architectures().items():
        if (row := rows.get((arch.family, arch.name))) is not None:
            lines.append(f"| {' | '.join(_row(arch.name, row, texts.get(key, {})))} |")
    return lines


def _row(name: str, v: Mapping[str, float], text: Mapping[str, Any]) -> Sequence[str]:
    status = text.get("status", "ok" if v["correct"] else "not ok")
    if v["groups"] != v["groups"]:
        return [name, f"{status}: {text.get('text', '')}", *[""] * (len(TITLES) - 2)]
    total = v["params"] or nan
    return [
        name,
        status if status == "ok" else f"{status}: {text.get('text', '')}".replace("|", "/"),
        f"{v['groups']:.0f} ({v['groups_free']:.0f})",
        *(_percent(v[m]) for m in METRICS if m.endswith("_removed")),
        f"{human_count(v['macs'])} → {human_count(v['macs_after'])}",
        f"{human_count(v['params'])} → {human_count(v['params_after'])}",
        ", ".join(f"{v[m]:.2f}" for m in ("capture_s", "analysis_s", "surgery_s", "proof_s")),
        f"{v['max_error']:.0e}",
        _percent(v["params_protected"]),
        "; ".join(f"{why} ({n / total:.0%})" for why, n in text.get("reasons", {}).items()),
    ]


def _percent(x: float) -> str:
    return "" if x != x else f"{x:.0%}"
