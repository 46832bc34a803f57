"""Why a run did not get as much faster as its arithmetic promised, from the run's own figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gracile.benchmark.processor import BLOCK
from gracile.report.page import Items, Section
from gracile.report.run import Run
from gracile.report.verdict import per_runtime, ratios, runtime_name, section

ENOUGH = 0.5  # of the promised saving; less is worth a reason
MANY = 0.2  # share of zeros that somebody will have hoped for speed from
SMALL_MS = 0.2  # below, what a runtime spends on each operator shows
SHOWN = 3


@dataclass(frozen=True)
class NoGain:
    """A runtime that kept less than half of what was promised.

    Attributes:
        runtime: its name.
        promised, saved: shares of multiply-adds (or zeros) and of milliseconds.
        text: the sentence, with its reasons.
    """

    runtime: str
    promised: float
    saved: float
    text: str


def no_gains(result: Mapping[str, Any]) -> list[NoGain]:
    """Runtimes in which milliseconds fell by less than half of what multiply-adds, or zeros, did.

    Args:
        result: a run's result object.

    Returns:
        One for each such runtime, each reason with its figures; none where time was not measured.
    """
    layers: Sequence[Mapping[str, Any]] = result.get("layers") or ()
    macs = _saved(section(result, "before").get("macs"), section(result, "after").get("macs"))
    zeros = _zeros(layers)
    what, promised = ("multiply-adds", macs) if macs >= zeros else ("weights that are zero", zeros)
    out = []
    for runtime, ratio in ratios(result).items():
        saved = 1 - 1 / ratio if ratio else 0.0
        if promised < 0.1 or saved >= ENOUGH * promised:
            continue
        reasons = [r for r in _reasons(result, runtime, layers, macs, zeros) if r]
        because = (
            "; ".join(reasons) or "nothing in this run's figures says why: profile the runtime"
        )
        how_much = (
            f"-{100 * promised:.0f} %" if what == "multiply-adds" else f"{100 * promised:.0f} %"
        )
        text = f"{what} {how_much}, milliseconds {-100 * saved:+.0f} %, because {because}."
        out.append(NoGain(runtime, promised, saved, text))
    return out


def gains(run: Run) -> list[Section]:
    """The section of a report; none where every runtime kept its promise."""
    found = no_gains(run.result)
    if not found:
        return []
    pairs = tuple((runtime_name(n.runtime), n.text) for n in found)
    return [Section("gains", "Why it is not faster", (Items(pairs, warning=True),))]


def _reasons(
    result: Mapping[str, Any],
    runtime: str,
    layers: Sequence[Mapping[str, Any]],
    macs: float,
    zeros: float,
) -> list[str | None]:
    return [
        _uneven(layers),
        _lone_zeros(zeros, macs),
        _floats(per_runtime(result, "kernels").get(runtime, {}), layers),
        _untouched(layers),
        _overhead(section(result, "after", "latency").get(runtime)),
    ]


def _uneven(layers: Sequence[Mapping[str, Any]]) -> str | None:
    cut = [n for n in layers if _width(n, "after") not in (0, _width(n, "before"))]
    uneven = [n for n in cut if _width(n, "after") % BLOCK and (n.get("bits") or 32) >= 32]
    if not uneven:
        return None
    some = ", ".join(f"{n['id']}: {_width(n, 'after')}" for n in uneven[:SHOWN])
    more = ", ..." if len(uneven) > SHOWN else ""
    return (
        f"{len(uneven)} of {len(cut)} cut layers have no multiple of {BLOCK} channels "
        f"({some}{more}), which float kernels round up (multiple_of: {BLOCK})"
    )


def _lone_zeros(zeros: float, macs: float) -> str | None:
    if zeros < MANY or macs >= zeros:
        return None
    return (
        f"{100 * zeros:.0f} % of the weights are zeros inside dense tensors, which are multiplied "
        "like any other number (prune whole filters, and thin)"
    )


def _floats(kernels: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> str | None:
    asked = [n for n in layers if (n.get("bits") or 32) < 32]
    whole, integer = kernels.get("convolutions"), kernels.get("convolutions_integer")
    if not asked or whole is None or integer is None or integer >= whole:
        return None
    return f"{whole - integer} of {whole} convolutions run in float although bits were reduced"


def _untouched(layers: Sequence[Mapping[str, Any]]) -> str | None:
    same = [n for n in layers if (n.get("macs_after") or 0) >= (n.get("macs_before") or 0) > 0]
    after = sum(n.get("macs_after") or 0 for n in layers)
    share = sum(n["macs_after"] for n in same) / after if after else 0.0
    if share < MANY:
        return None
    return (
        f"{len(same)} layers that nothing was cut from make {100 * share:.0f} % of what is left of "
        "the multiply-adds"
    )


def _overhead(ms: float | None) -> str | None:
    if ms is None or ms >= SMALL_MS:
        return None
    return f"at {ms:.3f} ms what a runtime spends on each operator, whatever its size, shows"


def _zeros(layers: Sequence[Mapping[str, Any]]) -> float:
    """Share of zeros in what is left, layers weighted by their multiply-adds."""
    left = [n for n in layers if n.get("channels_after") and n.get("sparsity") is not None]
    weight = sum(n.get("macs_after") or 0 for n in left)
    return sum(n["sparsity"] * (n.get("macs_after") or 0) for n in left) / weight if weight else 0.0


def _saved(before: float | None, after: float | None) -> float:
    return 1 - after / before if before and after is not None else 0.0


def _width(layer: Mapping[str, Any], when: str) -> int:
    return int(layer.get(f"channels_{when}") or 0)
