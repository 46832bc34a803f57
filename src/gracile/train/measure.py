"""Timing of artifacts that are already on disk: files, or all artifacts of a finished run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gracile.benchmark.artifact import CASCADE, RUNTIMES, Artifact, open_artifact
from gracile.benchmark.jobs import JobTable
from gracile.benchmark.runtimes.base import load, parse_target
from gracile.benchmark.side_by_side import side_by_side
from gracile.core.record import Record
from gracile.errors import UserError

REFERENCE = "reference"
READS = {"openvino": (".xml", ".onnx")}  # runtimes that read files of others, too


def measure(
    paths: Sequence[Path],
    *,
    runtimes: Sequence[str] = (),
    threads: int = 1,
    hint: str = "f32",
    batch: int = 1,
    rounds: int = 9,
    layers: bool = False,
    streams: int | None = None,
    memory: bool = False,
    reference: Path | None = None,
    jobs: Path | None = None,
) -> list[Record]:
    """Measure artifacts side by side, one comparison per runtime; see `side_by_side`.

    Args:
        paths: artifacts, whole files all of them, or one run directory.
        runtimes: only these; default every runtime the artifacts are made for. An `.onnx` file is
            also run by OpenVINO if that is named.
        reference: a file that is timed in every round and compared with nothing.
        jobs: folder of a table of jobs: measured by an agent, see `gracile agent`; not here.

    Raises:
        UserError: nothing to time, or artifacts of different runtimes named together.
    """
    wanted = [parse_target(r) for r in runtimes]
    if len(paths) == 1 and paths[0].is_dir():
        found = _of_run(paths[0])
    else:
        found = {}
        for path in paths:
            artifact = _in_one_of(open_artifact(path), [name for name, _ in wanted])
            found.setdefault(artifact.runtime, {})[_label(path, paths)] = artifact
        if len(found) > 1 and len(paths) > 1:
            made = ", ".join(sorted(found))
            raise UserError(
                f"these artifacts are made for different runtimes ({made}); time those of one at a "
                "time: a ratio across runtimes says nothing about a model."
            )
    devices = dict(wanted) or dict.fromkeys(found, "CPU")
    missing = sorted(set(devices) - set(found))
    if missing:
        raise UserError(
            f"no artifact for '{missing[0]}' there; there is {', '.join(sorted(found)) or 'none'}. "
            "Make one with `gracile export`."
        )
    records: list[Record] = []
    for runtime, device in devices.items():
        artifacts = found[runtime]
        if reference is not None:
            artifacts[REFERENCE] = _in_one_of(open_artifact(reference), [runtime])
        of_load: dict[str, Any] = {
            "threads": threads, "hint": hint, "batch": batch, "device": device,
        }  # fmt: skip
        rest: dict[str, Any] = {
            "rounds": rounds, "layers": layers, "streams": streams, "memory": memory,
            "reference": None if reference is None else REFERENCE,
        }  # fmt: skip
        if jobs is not None:
            table = JobTable(jobs)
            records += table.wait(table.add(artifacts, **of_load, **rest))
            continue
        loaded = {name: load(a, **of_load) for name, a in artifacts.items()}
        records += side_by_side(loaded, batch=batch, **rest)
    return records


def _in_one_of(artifact: Artifact, runtimes: Sequence[str]) -> Artifact:
    """The artifact for the first of these runtimes that reads its file, though made for another."""
    if artifact.runtime in runtimes:
        return artifact
    able = (r for r in runtimes if artifact.path.suffix in READS.get(r, ()))
    return replace(artifact, runtime=next(able, artifact.runtime))


def _of_run(folder: Path) -> dict[str, dict[str, Artifact]]:
    found: dict[str, dict[str, Artifact]] = {}
    for which in ("dense", "compressed"):
        for path in sorted((folder / "export").glob(f"*/{which}/model.*")):
            if RUNTIMES.get(path.suffix) not in (None, "pytorch"):  # weights need their network
                artifact = open_artifact(path)
                found.setdefault(artifact.runtime, {})[which] = artifact
        for path in sorted((folder / "export").glob(f"*/{which}/{CASCADE}")):
            artifact = open_artifact(path)
            found.setdefault(artifact.runtime, {})[which] = artifact
    if not found:
        raise UserError(
            f"{folder}: no exported artifacts in it; run `gracile compress ... --runtime NAME`."
        )
    return found


def _label(path: Path, paths: Sequence[Path]) -> str:
    same = [p for p in paths if p.name == path.name]
    return path.name if len(same) == 1 else str(path)
