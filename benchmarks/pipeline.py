"""From cut to artifact: pruned by half, saved, loaded elsewhere, quantized, exported, compared.

Every network takes two processes of its own (`pipeline_one`), one that cuts and one that knows only
the files, so that a crash is a row. `parity` is 1 where the artifact computes what the model does,
within the bounds of `gracile.export.parity`.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

from benchmarks.apart import outcome_of
from benchmarks.cell import Cell, Values, once, template
from benchmarks.pipeline_nets import Network, networks
from benchmarks.pipeline_one import RUNTIMES
from gracile.core.record import Record
from gracile.units import human_bytes, human_count

NAME = "pipeline"
SECONDS = 900
NEEDS: Mapping[str, str] = {"torchvision": "torchvision"}
TABLE = "cut by half, loaded elsewhere, quantized, exported"


def metrics(network: Network) -> dict[str, str]:
    """Metric -> unit; no integers are asked of a network that is not quantized."""
    kinds = ("f32", "int8") if network.quantize else ("f32",)
    made = [f"{kind}.{runtime}" for kind in kinds for runtime in RUNTIMES]
    plain = {"params": "count", "params_after": "count", "cut_s": "s", "reload_equal": "flag"}
    return {
        **plain,
        **{f"parity.{key}": "flag" for key in made},
        **{f"bytes.{key}": "bytes" for key in made},
    }


def cells() -> Iterator[Cell]:
    """One cell a network."""
    for name, network in networks().items():
        records = tuple(
            template(NAME, TABLE, metric, unit, name) for metric, unit in metrics(network).items()
        )
        notes: dict[str, Any] = {}
        yield Cell(NAME, name, "full", records, partial(measure, network, notes), notes)


def measure(network: Network, notes: dict[str, Any]) -> Values:
    """Both halves of the way; nan for what was not reached, in words in `notes`."""
    with tempfile.TemporaryDirectory() as folder:
        found = _step("cut", network.name, Path(folder))
        if "text" not in found:
            found |= _step("ship", network.name, Path(folder))
    notes.update({k: found[k] for k in ("text", "problems", "warnings") if found.get(k)})
    parity = found.get("parity", {})
    values = {
        **{f"parity.{key}": float(ok) for key, ok in parity.items()},
        **{f"bytes.{key}": float(found.get(f"{key}.bytes", nan)) for key in parity},
        **{k: float(v) for k, v in found.items() if isinstance(v, (int, float))},
    }
    return {
        (metric, network.name): once(values.get(metric, 0.0 if "parity" in metric else nan))
        for metric in metrics(network)
    }


def _step(step: str, name: str, folder: Path) -> dict[str, Any]:
    file = folder / f"{step}.json"
    found = outcome_of("benchmarks.pipeline_one", [step, name, str(folder)], file, SECONDS)
    return found if file.exists() else {"text": f"{step}: {found['text']}"}


def table(records: Iterable[Record], texts: Mapping[str, Any]) -> list[str]:
    """Markdown: one row for each network; ok where the artifact computes what the model does."""
    rows: dict[str, dict[str, float]] = {}
    for r in records:
        rows.setdefault(r.subject["variant"], {})[r.metric] = r.value
    kinds = [(kind, runtime) for kind in ("f32", "int8") for runtime in RUNTIMES]
    titles = [f"{kind}, {runtime}" for kind, runtime in kinds]
    lines = [
        f"| network | parameters | reloaded | {' | '.join(titles)} | what went wrong |",
        f"|---|---|---|{'---|' * len(titles)}---|",
    ]
    for name, row in rows.items():
        said = texts.get(name, {})
        wrong = [str(said.get("text", ""))]
        wrong += [f"{key}: {text}" for key, text in said.get("problems", {}).items()]
        shown = [_artifact(row, f"{kind}.{runtime}") for kind, runtime in kinds]
        lines.append(
            f"| {name} | {_counts(row)} | "
            f"{'equal' if row.get('reload_equal') == 1 else 'not equal'} | {' | '.join(shown)} | "
            f"{'; '.join(w for w in wrong if w).replace('|', '/')} |"
        )
    return lines


def _counts(row: Mapping[str, float]) -> str:
    before, after = row["params"], row["params_after"]
    return "" if before != before else f"{human_count(before)} → {human_count(after)}"


def _artifact(row: Mapping[str, float], key: str) -> str:
    if f"parity.{key}" not in row:
        return "not asked"
    size = row.get(f"bytes.{key}", nan)
    known = f", {human_bytes(int(size))}" if size == size else ""
    return f"ok{known}" if row[f"parity.{key}"] else "differs"
