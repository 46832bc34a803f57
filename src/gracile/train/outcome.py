"""What a run found, in one object: the `--json` result, judged against the recipe's goal."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gracile.recipe.schema import Goal


def outcome(
    goal: Goal,
    *,
    dense: Mapping[str, Any],
    trained: Mapping[str, Any],
    compressed: Mapping[str, Any],
    runtimes: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The result of a run.

    Args:
        goal: the recipe's.
        dense, trained, compressed: what those stages found.
        runtimes: name -> what its export, evaluate and benchmark stages found, in the user's order.
        facts: more entries, as they are (out, data, versions, seed, ...).

    Returns:
        The `--json` object.
    """
    before = _column(dense, "dense", runtimes)
    after = _column(compressed, "compressed", runtimes)
    drop = points_lost(dense, compressed, runtimes)
    judged = judge(goal, drop=drop, runtimes=runtimes, after=after)
    missed = judged["met"] is False
    warnings = [*trained["warnings"]]
    for r in runtimes.values():
        warnings += [*r["export"]["warnings"], *r["benchmark"]["warnings"]]
    return {
        "format": 1,
        "status": "goal missed" if missed else "ok",
        "exit": 1 if missed else 0,
        "goal": judged,
        "before": before,
        "after": after,
        "drop_points": drop,
        "stages": {
            "dense": {**dense["val"], "split": "val"},
            "cut": {**(trained["cut"] or compressed["val"]), "split": "val"},
            "recovered": {**compressed["val"], "split": "val"},
        },
        "speedup": {r: v["benchmark"]["speedup"] for r, v in runtimes.items()},
        "parity": {r: v["export"]["compressed"]["parity"] for r, v in runtimes.items()},
        "agreement": {
            "pytorch": compressed["agreement"],
            **{r: v["evaluate"]["agreement"] for r, v in runtimes.items()},
        },
        "kernels": {r: v["export"]["compressed"]["kernels"] for r, v in runtimes.items()},
        "layers": compressed["layers"],
        **({"ladder": trained["ladder"]} if trained.get("ladder") else {}),
        **_exits(compressed, runtimes),
        "warnings": [{"code": c, "text": t} for c, t in warnings],
        **facts,
    }


def points_lost(
    dense: Mapping[str, Any],
    compressed: Mapping[str, Any],
    runtimes: Mapping[str, Mapping[str, Any]],
) -> float:
    """Points of top-1 lost on the test split, in the first runtime; without one, in PyTorch."""
    for found in runtimes.values():
        scores = found["evaluate"]
        return 100 * float(scores["dense"]["top1"] - scores["compressed"]["top1"])
    return 100 * float(dense["test"]["top1"] - compressed["test"]["top1"])


def judge(
    goal: Goal, *, drop: float, runtimes: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any]:
    """Compare the goal with what was measured: `met` is None without a goal.

    The first runtime asked for is the target: speed, latency and artifact size are judged there,
    the others are measured alongside. Without a runtime a speed or latency goal cannot be met.
    """
    checks: list[dict[str, Any]] = []

    def check(what: str, wanted: float, got: float | None, ok: bool) -> None:
        checks.append({"what": what, "wanted": wanted, "got": got, "met": ok})

    for r, v in list(runtimes.items())[:1]:
        if goal.speedup is not None:
            ratio = v["benchmark"]["speedup"]["ratio"]
            check(f"speed-up in {r}", goal.speedup, ratio, ratio >= goal.speedup)
        if goal.latency_ms is not None:
            ms = v["benchmark"]["latency_ms"]["compressed"]
            check(f"latency in {r} (ms)", goal.latency_ms, ms, ms <= goal.latency_ms)
        if goal.size_mb is not None:
            mb = v["benchmark"]["bytes"]["compressed"] / 1e6
            check(f"artifact size in {r} (MB)", goal.size_mb, mb, mb <= goal.size_mb)
    if not runtimes:
        if goal.speedup is not None:
            check("speed-up (no --runtime given to measure it)", goal.speedup, None, False)
        if goal.latency_ms is not None:
            check("latency (no --runtime given to measure it)", goal.latency_ms, None, False)
        if goal.size_mb is not None:
            mb = after["bytes"] / 1e6
            check("size (MB)", goal.size_mb, mb, mb <= goal.size_mb)
    if goal.max_drop is not None:
        check("top-1 drop (points)", goal.max_drop, drop, drop <= goal.max_drop + 1e-9)
    met = all(c["met"] for c in checks) if checks else None
    return {**goal.model_dump(), "met": met, "checks": checks}


def _exits(
    compressed: Mapping[str, Any], runtimes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Early exits, if there are any: in PyTorch, and how many inputs left where in each runtime."""
    if "exits" not in compressed:
        return {}
    rates = {r: v["evaluate"]["exit_rates"] for r, v in runtimes.items()}
    return {"exits": {**compressed["exits"], "runtimes": rates}}


def versions() -> dict[str, str]:
    """Versions that a Record carries."""
    out = {"python": platform.python_version()}
    for name in (
        "gracile", "torch", "onnx", "onnxruntime", "openvino", "ncnn", "executorch",
        "ai-edge-litert",
    ):  # fmt: skip
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def kernel_counts(kernels: Sequence[Any]) -> dict[str, int]:
    """How many steps of a runtime's program compute in integers, and how many convolutions do."""
    convolutions = [k for k in kernels if k.is_convolution]
    integer = sum(k.is_integer for k in kernels)
    return {
        "total": len(kernels),
        "integer": integer,
        "float": len(kernels) - integer,
        "convolutions": len(convolutions),
        "convolutions_integer": sum(k.is_integer for k in convolutions),
    }


def _column(
    scores: Mapping[str, Any], which: str, runtimes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        **{k: scores["test"][k] for k in ("top1", "top5", "loss")},
        **{k: scores[k] for k in ("macs", "params", "bytes")},
        **{k: scores[k] for k in ("nonzeros", "packed_bytes") if k in scores},
        "accuracy": {r: v["evaluate"][which]["top1"] for r, v in runtimes.items()},
        "latency": {r: v["benchmark"]["latency_ms"][which] for r, v in runtimes.items()},
        "latency_records": {r: v["benchmark"]["latency"][which] for r, v in runtimes.items()},
        "artifact_bytes": {r: v["benchmark"]["bytes"][which] for r, v in runtimes.items()},
    }
