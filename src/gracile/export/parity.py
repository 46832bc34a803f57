"""Does the artifact compute what the PyTorch model computes? If not: which unit is the first.

Outputs are compared on real inputs. Then every unit is compared alone: the artifact is cut behind
each unit and fed PyTorch's tensors there, so that a unit shows only its own error and rounding
differences of earlier layers neither add up nor hide a fault.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gracile.benchmark.artifact import Unit
from gracile.benchmark.processor import FULL_RANGE, sums_saturate
from gracile.benchmark.runtimes.base import Array, Loaded
from gracile.benchmark.runtimes.cascade import Cascade, entropy
from gracile.benchmark.runtimes.pytorch import flat, node_values, unit_values
from gracile.core.plan import Plan
from gracile.errors import ParityError
from gracile.export.prepare import ActivationGrid, activation_grids
from gracile.graph.capture import capture
from gracile.graph.instrument import SUFFIX
from gracile.graph.stages import handed_on, input_names, stages
from gracile.nn.exits import choice_of
from gracile.nn.quantized import ActivationQuantizer

FEW = 3  # elements of a tiny unit that may be ties whatever share that is
FLOAT_TOLERANCE = {"f32": 1e-3, "bf16": 6e-2, "f16": 1e-2}
LEVELS = 1  # a unit fed the same integers may round a tie to the other level, no more
LEVELS_LOW_BITS = 2  # runtimes widen grids of fewer bits to 8 and average on them: rounded twice
SHARE_TIES = 3e-2  # share of a layer's elements that may be off; beyond it each must be half-way
HALF_WAY = 0.1  # of a level: biases are rounded to steps of the sum; seen: 0.05 in depthwise layers
SHARE_TIES_POOL = 0.3  # sums of a few integers, averaged or added, are exact ties far more often
MIN_COSINE = {"f32": 0.99999, "bf16": 0.998, "f16": 0.9999, "int8": 0.99}
NEAR, NEAR_INT8 = {"f32": 1e-3}, 0.05  # entropies as near to a threshold may fall on either side
MIN_COSINE_LOW_BITS = 0.9  # one level of a 4-bit grid is 1/15 of its range
REASON = {
    "f32": (
        "float sums taken in another order differ by about 1e-6 of the largest value; 1e-3 leaves "
        "room for fused kernels and still shows a single wrong filter"
    ),
    "bf16": "bfloat16 keeps 8 significant bits, so each layer may differ by a few parts in 256",
    "f16": "float16 keeps 11 significant bits, so each layer may differ by a few parts in 2048",
    "int8": (
        "fed the same integers, a runtime may round a value that lies half-way to the other of two "
        "levels, so a unit may be off by 1 level; over many layers such differences reach the "
        "output, whose direction (cosine) must stay"
    ),
}


@dataclass(frozen=True)
class UnitDifference:
    """How far one unit is off when it is fed the right inputs.

    Attributes:
        id: the unit.
        layers: torch modules it consists of.
        relative: largest difference / largest value.
        lsb: largest difference in levels of its own grid; None for a float unit.
        share: share of elements off by half a level or more (by more than allowed, for floats).
        bad: whether that is more than rounding can explain.
    """

    id: str
    layers: tuple[str, ...]
    relative: float
    lsb: float | None
    share: float
    bad: bool


@dataclass(frozen=True)
class ParityReport:
    """The comparison of an artifact with its model.

    Attributes:
        precision: which tolerance holds: "f32", "bf16", "f16", "int8" or "mixed".
        max_abs: largest difference of any output.
        max_lsb: largest difference of any quantized unit in levels; None without any.
        cosine: smallest cosine between a sample's outputs in the artifact and in PyTorch.
        agreement: share of samples with the same largest output (top-1).
        first_bad: id of the first unit, in execution order, that is off; None if none is.
        layers: torch modules of `first_bad`.
        worst: id of the unit that is off most; None if the artifact shows no units.
        tolerance: the relative difference allowed for float tensors, the cosine, and the levels.
        reason: why that much is allowed.
        ok: whether outputs and all units are within tolerance.
        problems: what is not, in words.
        units: every unit's difference, in execution order.
    """

    precision: str
    max_abs: float
    max_lsb: float | None
    cosine: float
    agreement: float
    first_bad: str | None
    layers: tuple[str, ...]
    worst: str | None
    tolerance: dict[str, float]
    reason: str
    ok: bool
    problems: tuple[str, ...]
    units: tuple[UnitDifference, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        out = asdict(self)
        out["layers"], out["problems"] = list(self.layers), list(self.problems)
        out["units"] = [{**u, "layers": list(u["layers"])} for u in out["units"]]
        return out


def check(
    model: nn.Module,
    loaded: Loaded,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    precision: str | None = None,
) -> ParityReport:
    """Compare a loaded artifact with the model it was exported from.

    Args:
        model: the compressed model; quantizers simulate the integers.
        loaded: the artifact in its runtime.
        inputs: real inputs, one batch of at least a few samples.
        precision: what it computes in; as it says of itself if None.

    Returns:
        The report; use `require` to raise if it is not in order.
    """
    batch = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    batch = tuple(x.detach().cpu() for x in batch)
    if isinstance(loaded, Cascade):
        return _check_cascade(model, loaded, batch)
    kind = _kind(precision or loaded.precision, loaded.hint)
    tolerance = _tolerance(model, kind)
    with _on_cpu(model) as reference:
        expected = _outputs(reference, batch)
        got = [np.asarray(x, np.float32) for x in loaded.run(batch)]
        problems = _shape_problems(expected, got)
        units: list[UnitDifference] = []
        pairs: list[tuple[Array, Array]] = []
        if not problems:
            pairs = list(zip(expected, got, strict=True))
            problems = _output_problems(pairs, tolerance)
            units = compare_units(reference, loaded, batch, kind)
    bad = next((u for u in units if u.bad), None)
    if bad is not None:
        problems.append(_unit_problem(bad))
    levels = [u.lsb for u in units if u.lsb is not None]
    infinite = float("inf") if not pairs else 0.0
    return ParityReport(
        precision=kind,
        max_abs=max((float(np.abs(a - b).max(initial=0)) for a, b in pairs), default=infinite),
        max_lsb=max(levels) if levels else None,
        cosine=min((_cosine(a, b) for a, b in pairs), default=0.0),
        agreement=_agreement(*pairs[0]) if pairs else 0.0,
        first_bad=bad.id if bad else None,
        layers=bad.layers if bad else (),
        worst=max(units, key=lambda u: (u.bad, u.relative)).id if units else None,
        tolerance=tolerance,
        reason=REASON["int8" if kind == "mixed" else kind],
        ok=not problems,
        problems=tuple(problems),
        units=tuple(units),
    )


def _check_cascade(model: nn.Module, loaded: Cascade, batch: tuple[Tensor, ...]) -> ParityReport:
    """Every stage by itself, fed what PyTorch's stages hand on; then where inputs leave.

    An input may leave elsewhere than in PyTorch if its entropy is as near to the threshold as the
    runtime's answers are to PyTorch's.
    """
    with _on_cpu(model) as reference:
        found = stages(reference, batch)
        between = handed_on(found, batch, input_names(found))
        reports = [
            check(stage.module, part, given)
            for stage, part, (given, _) in zip(found, loaded.stages, between, strict=True)
        ]
        with torch.no_grad():
            expected = reference(*batch).numpy()
    problems = [f"stage {k}: {text}" for k, r in enumerate(reports) for text in r.problems]
    got, taken = loaded.answer(batch)
    left = np.zeros(len(got), dtype=bool)
    choice = choice_of(model)
    assert choice is not None
    for k, threshold in enumerate(choice.thresholds.tolist()):
        mine = entropy(between[k][1][0].numpy(), float(choice.temperatures[k]))
        clear = ~left & (np.abs(mine - threshold) > NEAR.get(reports[k].precision, NEAR_INT8))
        wrong = int((clear & ((mine < threshold) != (taken == k))).sum())
        if wrong:
            problems.append(f"{wrong} inputs leave at exit {k} that should not, or do not")
        left |= (taken == k) | (mine < threshold)
    worst = max(reports, key=lambda r: (not r.ok, r.max_abs))
    levels = [r.max_lsb for r in reports if r.max_lsb is not None]
    return replace(
        worst,
        max_abs=max(r.max_abs for r in reports),
        max_lsb=max(levels) if levels else None,
        cosine=min(r.cosine for r in reports),
        agreement=_agreement(expected, got),
        ok=not problems,
        problems=tuple(problems),
        units=tuple(u for r in reports for u in r.units),
    )


def saturation_warning(plan: Plan, cpu_flags: str | None = None) -> str | None:
    """A warning where the sums of a plan's 8-bit weights may saturate.

    Args:
        plan: says how many bits weights and activations have.
        cpu_flags: the processor's features, as in /proc/cpuinfo; None reads this machine's.

    Returns:
        The text to show, or None where the arithmetic is exact.
    """
    grids: list[Any] = plan.of_kind("bits")
    wide = any(e.role == "weight" and e.bits >= FULL_RANGE for e in grids)
    whole = any(e.role != "weight" for e in grids)
    if not (wide and whole and sums_saturate(cpu_flags)):
        return None
    return (
        "this processor has no VNNI: products of uint8 activations and int8 weights are added in "
        "16 bits and may saturate, so the runtime may differ from PyTorch. half_range: true keeps "
        "weights small enough; without it, trust only a parity check over this model's real data."
    )


def require(report: ParityReport, plan: Plan | None = None) -> ParityReport:
    """Return the report if it is in order.

    Raises:
        ParityError: says what differs, and in which unit first.
    """
    if report.ok:
        return report
    where = ""
    if report.first_bad is not None:
        layers = f" (layers {', '.join(report.layers)})" if report.layers else ""
        where = f" First differing unit: '{report.first_bad}'{layers}."
    elif report.units:
        where = " Every unit alone is right: the difference comes from how the runtime joins them."
    danger = saturation_warning(plan) if plan is not None else None
    raise ParityError(
        f"the artifact does not compute what the PyTorch model computes ({report.precision}): "
        + "; ".join(report.problems)
        + f".{where} Allowed: {report.reason}."
        + (f" A likely cause: {danger}" if danger else "")
    )


def compare_units(
    model: nn.Module, loaded: Loaded, batch: tuple[Tensor, ...], kind: str
) -> list[UnitDifference]:
    """Every unit's own difference, in execution order; [] if the artifact shows no units."""
    units = loaded.artifact.units
    if not units:
        return []
    graph = capture(model, batch)
    if graph.module is None:
        return []
    ids = {str(node.meta["id"]) for node in graph.module.graph.nodes}
    foreign = [u for u in units if not {u.id, u.id + SUFFIX} & ids]
    if foreign:  # made from another model: nothing else can be compared
        return [UnitDifference(u.id, u.layers, float("inf"), None, 1.0, True) for u in foreign]
    grids = activation_grids(graph)
    with _evaluating(graph.module):
        want = unit_values(graph.module, units, batch)
        got = loaded.run_units(batch, want)

        def compare(unit: Unit, unrounded: Array | None = None) -> UnitDifference:
            grid = grids.get(unit.id) or grids.get(unit.id.removesuffix(SUFFIX))
            return _difference(unit, want[unit.id], got[unit.id], grid, kind, unrounded)

        found = {unit.id: compare(unit) for unit in units}
        suspects = [u for u in units if found[u.id].bad and found[u.id].lsb is not None]
        raw = {u.id: u.id.removesuffix(SUFFIX) for u in suspects}  # what the quantizer got
        unrounded = node_values(graph.module, set(raw.values()), batch) if raw else {}
    again = {u.id: compare(u, unrounded[raw[u.id]]) for u in suspects}
    return list((found | again).values())


def _difference(
    unit: Unit,
    want: Array,
    got: Array,
    grid: ActivationGrid | None,
    kind: str,
    unrounded: Array | None,
) -> UnitDifference:
    """One unit; `unrounded` is what its quantizer got, if ties are to be told from errors."""

    def difference(lsb: float | None, share: float, relative: float, bad: bool) -> UnitDifference:
        return UnitDifference(unit.id, unit.layers, relative, lsb, share, bad)

    if want.shape != got.shape or not np.isfinite(got).all():
        return difference(None, 1.0, float("inf"), True)
    diff = np.abs(want.astype(np.float64) - got)
    top = float(np.abs(want).max(initial=0.0))
    relative = float(diff.max(initial=0.0)) / (top + 1e-12)
    if grid is not None:
        levels = np.round(diff / grid.scale, 3)  # without the dust of float arithmetic
        most, off = float(levels.max(initial=0.0)), levels > 0.5
        unexplained = off if unrounded is None else off & ~_half_way(unrounded, grid)
        allowed = max(FEW, (SHARE_TIES if unit.layers else SHARE_TIES_POOL) * levels.size)
        most_allowed = LEVELS if grid.bits >= 8 or unit.layers else LEVELS_LOW_BITS
        bad = most > most_allowed + 0.01 or unexplained.sum() > allowed
        return difference(most, off.sum() / max(1, levels.size), relative, bool(bad))
    limit = FLOAT_TOLERANCE.get(kind, FLOAT_TOLERANCE["f32"]) * (top + 1e-6)
    share = float((diff > limit).mean()) if diff.size else 0.0
    return difference(None, share, relative, share > 0)


def _half_way(unrounded: Array, grid: ActivationGrid) -> npt.NDArray[np.bool_]:
    """Which values lie half-way between two levels, so that either is right."""
    levels = unrounded.astype(np.float64) / grid.scale
    return np.abs(levels - np.floor(levels) - 0.5) < HALF_WAY


def _kind(precision: str, hint: str) -> str:
    return hint if precision == "f32" else precision


def _tolerance(model: nn.Module, kind: str) -> dict[str, float]:
    floats = FLOAT_TOLERANCE.get(kind, FLOAT_TOLERANCE["f32"])
    if kind in MIN_COSINE and kind != "int8":
        return {"relative": floats, "cosine": MIN_COSINE[kind]}
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    low = any(q.bits < 8 for q in quantizers if q.mode == "quantize")
    cosine = MIN_COSINE_LOW_BITS if low else MIN_COSINE["int8"]
    return {"levels": float(LEVELS), "share": SHARE_TIES, "cosine": cosine, "relative": floats}


@contextmanager
def _on_cpu(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode on the CPU; a copy if it is elsewhere."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.device.type != "cpu" for t in tensors):
        model = copy.deepcopy(model).cpu()
    with _evaluating(model):
        yield model


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    flags = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for m, training in flags:
            m.training = training


@torch.no_grad()
def _outputs(model: nn.Module, batch: tuple[Tensor, ...]) -> list[Array]:
    return [x.float().numpy() for x in flat(model(*batch))]


def _shape_problems(expected: list[Array], got: list[Array]) -> list[str]:
    if [x.shape for x in expected] != [x.shape for x in got]:
        return [
            f"outputs have shapes {[x.shape for x in got]} instead of {[x.shape for x in expected]}"
        ]
    if not all(np.isfinite(x).all() for x in got):
        return ["outputs are not finite"]
    return []


def _output_problems(pairs: list[tuple[Array, Array]], tolerance: dict[str, float]) -> list[str]:
    problems = []
    for k, (a, b) in enumerate(pairs):
        top = float(np.abs(a).max(initial=0.0))
        off = float(np.abs(a - b).max(initial=0.0)) / (top + 1e-12)
        if "levels" not in tolerance and off > tolerance["relative"]:
            problems.append(f"output {k} is off by {off:.2g} of its largest value")
        least, cosine = tolerance["cosine"], _cosine(a, b)
        if cosine < least:
            problems.append(f"output {k} has cosine {cosine:.5f}, at least {least} is needed")
    return problems


def _unit_problem(unit: UnitDifference) -> str:
    if unit.lsb is not None:
        return (
            f"unit '{unit.id}' is off by up to {unit.lsb:.1f} levels, and {100 * unit.share:.2g} % "
            "of its elements are off"
        )
    if math.isinf(unit.relative):
        return f"unit '{unit.id}' is no unit of this model, has another shape, or is not finite"
    return f"unit '{unit.id}' is off by {unit.relative:.2g} of its largest value"


def _cosine(a: Array, b: Array) -> float:
    """Smallest cosine of a sample's outputs; 1 where both are zero."""
    if not a.size:
        return 1.0
    x = a.reshape(len(a), -1).astype(np.float64) if a.ndim else a.reshape(1, 1)
    y = b.reshape(len(b), -1).astype(np.float64) if b.ndim else b.reshape(1, 1)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    both_zero = ~x.any(1) & ~y.any(1)
    values = np.where(both_zero, 1.0, (x * y).sum(1) / np.where(norms == 0, 1.0, norms))
    return float(values.min())


def _agreement(a: Array, b: Array) -> float:
    if a.ndim < 2 or not a.size:
        return float(np.allclose(a, b, rtol=1e-3))
    axis = 1
    return float((a.argmax(axis) == b.argmax(axis)).mean())
