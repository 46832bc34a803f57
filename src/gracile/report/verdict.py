"""The verdict: one sentence on what a run gained and lost, and what had been asked for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gracile.units import human_bytes

RUNTIME_NAMES = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "pytorch": "PyTorch",
    "ncnn": "ncnn",
    "executorch": "ExecuTorch",
    "litert": "LiteRT",
}
FAILED_PROOF = 3  # exit status of a failed verification or parity check


@dataclass(frozen=True)
class Wish:
    """One thing the recipe's goal asked for, and what came out; `met` is None if not judged."""

    name: str
    asked: str
    got: str
    met: bool | None = None


@dataclass(frozen=True)
class Verdict:
    """`met` is None if no goal was set; `headline` is the sentence to read if only one is read."""

    met: bool | None
    label: str
    headline: str
    detail: str
    wishes: tuple[Wish, ...]


def verdict(result: Mapping[str, Any]) -> Verdict:
    """Judge a run by its result object (CONTRACTS.md section 6); nothing is computed anew."""
    goal = section(result, "goal")
    met = goal.get("met")
    label = "No goal was set" if met is None else "Goal met" if met else "Goal missed"
    if result.get("exit") == FAILED_PROOF:
        met, label = False, "Verification failed: do not deploy"
    headline = f"{_gain(result)}, {_loss(result)}."
    headline = headline[0].upper() + headline[1:]
    return Verdict(met, label, headline, _detail(result), tuple(_wishes(goal, result)))


def section(result: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """A nested object of the result, empty where it is absent or null."""
    for key in path:
        result = result.get(key) or {}
    return result


def runtime_name(runtime: str) -> str:
    """A runtime as its makers write it.

    >>> runtime_name("openvino:CPU")
    'OpenVINO (CPU)'
    """
    name, _, device = runtime.partition(":")
    return RUNTIME_NAMES.get(name, name) + (f" ({device})" if device else "")


def per_runtime(result: Mapping[str, Any], part: str) -> dict[str, Mapping[str, Any]]:
    """One part of the result for every runtime that has it: `agreement`, `speedup`, ..."""
    return {name: found for name, found in section(result, part).items() if found}


def points_lost(result: Mapping[str, Any]) -> float | None:
    """Points of top-1 accuracy lost (negative: gained); None if one side was not measured.

    A run that judged its goal in a runtime says so in `drop_points`; else the two sides tell.
    """
    if result.get("drop_points") is not None:
        return float(result["drop_points"])
    before, after = section(result, "before").get("top1"), section(result, "after").get("top1")
    return None if before is None or after is None else 100 * (before - after)


def ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """Measured speed-up per runtime."""
    found = {name: s.get("ratio") for name, s in per_runtime(result, "speedup").items()}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def interval(ci95: Any, digits: int = 2, unit: str = "×") -> str:
    """A 95 % interval as text.

    >>> interval((2.361, 2.467))
    '2.36–2.47×'
    """
    return f"{ci95[0]:.{digits}f}–{ci95[1]:.{digits}f}{unit}" if ci95 else "–"


def _gain(result: Mapping[str, Any]) -> str:
    speedups = ratios(result)
    if speedups:
        said = [f"{_faster(ratio)} in {runtime_name(name)}" for name, ratio in speedups.items()]
        return " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)
    before, after = section(result, "before").get("bytes"), section(result, "after").get("bytes")
    if before and after:
        return f"{before / after:.2f}× smaller, speed not measured"
    return "speed not measured"


def _faster(ratio: float) -> str:
    return f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"


def _loss(result: Mapping[str, Any]) -> str:
    lost = points_lost(result)
    if lost is None:
        return "accuracy not measured"
    if abs(lost) < 0.005:
        return "no accuracy lost"
    change = "lost" if lost > 0 else "gained"
    return f"{abs(lost):.2f} points of accuracy {change}"


def _detail(result: Mapping[str, Any]) -> str:
    out = []
    for name, s in per_runtime(result, "speedup").items():
        ci95 = s.get("ci95")
        if ci95:
            doubt = " (not distinguishable from no change)" if ci95[0] <= 1 <= ci95[1] else ""
            out.append(f"{runtime_name(name)}: 95 % interval {interval(ci95)}{doubt}")
    before, after = section(result, "before").get("bytes"), section(result, "after").get("bytes")
    if before and after:
        out.append(f"weights {human_bytes(before)} → {human_bytes(after)}")
    return "; ".join(out) + ("." if out else "")


def _wishes(goal: Mapping[str, Any], result: Mapping[str, Any]) -> list[Wish]:
    """The run's own checks, or the goal beside the results if it kept none."""
    if goal.get("checks"):
        return [_checked(check) for check in goal["checks"]]
    after = section(result, "after")
    size, lost = after.get("bytes"), points_lost(result)
    speedups = ", ".join(f"{r:.2f}× {runtime_name(n)}" for n, r in ratios(result).items())
    latencies = ", ".join(
        f"{ms:.3f} ms {runtime_name(n)}"
        for n, ms in section(after, "latency").items()
        if ms is not None
    )
    found = (
        ("speedup", "Speed-up", "at least {:g}×", speedups),
        ("latency_ms", "Latency", "at most {:g} ms", latencies),
        ("size_mb", "Size", "at most {:g} MB", "" if size is None else f"{size / 1e6:.2f} MB"),
        ("max_drop", "Accuracy lost", "at most {:g} points",
         "" if lost is None else f"{lost:.2f} points"),
    )  # fmt: skip
    return [
        Wish(name, _asked(asked, goal[key]), got or "not measured")
        for key, name, asked, got in found
        if goal.get(key) is not None
    ]


def _asked(text: str, value: float) -> str:
    said = text.format(value)
    return said.removesuffix("s") if value == 1 and said.endswith("points") else said


def _checked(check: Mapping[str, Any]) -> Wish:
    what, got = str(check["what"]), check.get("got")
    bound = "at least" if what.startswith("speed-up") else "at most"
    name = runtime_names_in(what[0].upper() + what[1:])
    shown = "not measured" if got is None else f"{got:.4g}".replace("-", "−")
    return Wish(name, f"{bound} {check['wanted']:g}", shown, check.get("met"))


def runtime_names_in(text: str) -> str:
    """A sentence with its runtimes as their makers write them.

    >>> runtime_names_in("Latency in openvino (ms)")
    'Latency in OpenVINO (ms)'
    """
    for name, shown in RUNTIME_NAMES.items():
        text = re.sub(rf"\b{name}\b", shown, text)
    return text
