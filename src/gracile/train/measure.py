"""Timing of artifacts that are already on disk: files, or all artifacts of a finished run."""

from collections.abc import Sequence
from pathlib import Path

from gracile.benchmark.artifact import Artifact, open_artifact
from gracile.benchmark.runtimes.base import load, parse_target
from gracile.benchmark.timing import compare
from gracile.core.record import Record
from gracile.errors import UserError


def measure(
    paths: Sequence[Path],
    *,
    runtimes: Sequence[str] = (),
    threads: int = 1,
    hint: str = "f32",
    batch: int = 1,
    rounds: int = 9,
) -> list[Record]:
    """Time artifacts side by side, one comparison per runtime.

    Args:
        paths: `.onnx` and `.xml` files, or one run directory.
        runtimes: only these; default every runtime the artifacts are made for.

    Raises:
        UserError: nothing to time, or artifacts of different runtimes named together.
    """
    wanted = [parse_target(r) for r in runtimes]
    if len(paths) == 1 and paths[0].is_dir():
        found = _of_run(paths[0])
    else:
        found = {}
        for path in paths:
            artifact = open_artifact(path)
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
        loaded = {
            name: load(a, threads=threads, hint=hint, batch=batch, device=device)
            for name, a in found[runtime].items()
        }
        records += compare(loaded, rounds=rounds, batch=batch)
    return records


def _of_run(folder: Path) -> dict[str, dict[str, Artifact]]:
    found: dict[str, dict[str, Artifact]] = {}
    for which in ("dense", "compressed"):
        for path in sorted((folder / "export").glob(f"*/{which}/model.*")):
            if path.suffix in (".onnx", ".xml"):
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
