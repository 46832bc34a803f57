"""From cut to artifact: pruned by half, saved, loaded elsewhere, quantized, exported, compared.

Every network takes two processes of its own (`pipeline_one`), one that cuts and one that knows only
the files, so that a crash is a row. `parity` is 1 where the artifact computes what the model does,
within the bounds of `gracile.export.parity`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from math import nan
from pathlib import Path
from typing import Any

from benchmarks.cell import Cell, Values, once, template
from benchmarks.pipeline_nets import Network, networks
from benchmarks.pipeline_one import RUNTIMES
from gracile.core.state import write_atomic
from gracile.errors import MissingExtra

NAME = "pipeline"
SECONDS = 900
ROOT = Path(__file__).parents[1]
TEXTS = ROOT / "results" / "pipeline.texts.json"


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
            template(NAME, name, metric, unit, name) for metric, unit in metrics(network).items()
        )
        tier = "smoke" if name in ("unet", "lstm") else "full"
        yield Cell(NAME, name, tier, records, lambda n=network: measure(n))


def measure(network: Network) -> Values:
    """Both halves of the way; nan for what was not reached.

    Raises:
        MissingExtra: the package it comes from is not installed.
    """
    if find_spec(network.package) is None:
        raise MissingExtra(f"{network.name} of the pipeline benchmark", network.package)
    with tempfile.TemporaryDirectory() as folder:
        found = _step("cut", network.name, Path(folder))
        if "text" not in found:
            found |= _step("ship", network.name, Path(folder))
    _keep_texts(network.name, found)
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
    command = [sys.executable, "-m", "benchmarks.pipeline_one", step, name, str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, timeout=SECONDS, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return {"text": f"{step}: not done after {SECONDS} s"}
    file = folder / f"{step}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"text": f"{step}: exit code {done.returncode}: {last}"}


def _keep_texts(name: str, found: Mapping[str, Any], file: Path = TEXTS) -> None:
    """What went wrong, in words: Records hold only numbers."""
    every = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    kept = {k: found[k] for k in ("text", "problems", "warnings") if found.get(k)}
    every[name] = kept
    write_atomic(file, (json.dumps(every, indent=1, sort_keys=True) + "\n").encode())
