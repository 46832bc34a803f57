"""Preflight: what stands between a network and speed in one runtime, in seconds, without training.

The idea is ours; the bounds are Amdahl's law over measured times where an artifact can be made.
"""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from gracile import registry
from gracile.analyze.preflight import (
    Bound,
    Finding,
    Preflight,
    amdahl,
    dead_filters,
    found_in,
    layers_of,
)
from gracile.analyze.widths import CostModel, Timeline
from gracile.benchmark.processor import BLOCK
from gracile.benchmark.runtimes.base import Loaded, load, parse_target
from gracile.benchmark.timing import compare
from gracile.core.plan import Architecture, Plan
from gracile.core.record import find
from gracile.errors import GracileError, UserError
from gracile.graph import surgery
from gracile.graph.capture import capture
from gracile.graph.dependency import ChannelGroup, channel_groups, removable_together
from gracile.graph.graph import Graph
from gracile.prune.structure import candidates
from gracile.quantize.patterns import View
from gracile.quantize.profile import load_profile

BALANCE = 4.0  # multiply-adds a byte: 40 G of them a second against 10 GB/s, one core
FACTOR = 4.0  # int8 products in a vector for each float one


def preflight(
    model: nn.Module,
    example: Tensor,
    runtime: str,
    *,
    period: int = BLOCK,
    balance: float = BALANCE,
    measure: bool = True,
    threads: int = 1,
) -> Preflight:
    """Look at a network before it is compressed for a runtime.

    Hard-coded shapes, dead filters, widths off the vector's period, layers without an integer
    kernel, layers bound by memory, groups that cannot be cut, and the largest speed-up that cutting
    channels or integers could bring. The model is not changed.

    Args:
        model: with its weights.
        example: a batch of at least 2 inputs.
        runtime: `NAME` or `NAME:DEVICE`.
        period: channels that fill the runtime's vectors.
        balance: multiply-adds for each byte below which a layer is bound by memory.
        measure: export and time the network, and the same with every group cut to one unit: no
            choice of channels is faster. Otherwise the bound is one of multiply-adds.
        threads: of the measurement.

    Raises:
        UserError: no such runtime, a number out of range, or the model does not run.
    """
    name, _ = parse_target(runtime)
    if period < 1 or not balance > 0:
        raise UserError(f"period and balance must be positive, got {period} and {balance:g}.")
    was_training = model.training
    try:
        model.eval()
        graph = capture(model, example)
        groups = channel_groups(model, graph)
        reasons, note = _integers(model, graph, name)
        layers = layers_of(
            model, graph, groups, period=period, integer=lambda id: reasons.get(id, "")
        )
        findings = _shapes(model, graph, example)
        dead = dead_filters(model, graph)
        findings += found_in(layers, groups, dead, period=period, balance=balance)
        bounds, why = _channel_bound(model, graph, groups, example, runtime, measure, threads)
        notes = {**({"integers": note} if note else {}), **({"measured": why} if why else {})}
        share = sum(n.share_of_macs for n in layers if n.integer == "yes")
        if share:
            text = (
                f"{100 * share:.1f} % of the multiply-adds have an integer kernel; if each were "
                f"{FACTOR:g} times as fast as in float"
            )
            bounds.append(Bound("integers", amdahl(share, FACTOR), "arithmetic", text))
        return Preflight(runtime, tuple(findings), tuple(layers), tuple(bounds), notes)
    finally:
        model.train(was_training)


def _shapes(model: nn.Module, graph: Graph, example: Tensor) -> list[Finding]:
    """Operators that are not understood, and sizes the forward cannot change."""
    out = []
    if graph.how != "fx":
        out.append(
            Finding(
                "captured-otherwise",
                f"the forward was captured by {graph.how}, not as a whole by fx: {graph.reason}.",
            )
        )
    unknown = graph.of_op("unknown")
    if unknown:
        out.append(
            Finding(
                "unknown-operators",
                f"{len(unknown)} operators are not known; channels through them are protected. A "
                "rule of your own is one file, see the guide on extending.",
                tuple(n.id for n in unknown),
            )
        )
    if (why := _fails(model, example[:1])) is not None:
        text = f"the forward does not run for another batch size ({why}); exports get a fixed one."
        out.append(Finding("fixed-batch", text))
    if example.dim() == 4:
        larger = torch.cat([example, example], 2)
        larger = torch.cat([larger, larger], 3)
        size = "x".join(str(n) for n in example.shape[2:])
        if (why := _fails(model, larger)) is not None:
            text = (
                f"the forward is written for {size} pixels and fails at twice the size ({why}). No "
                "obstacle to compression; measurements hold for this size alone."
            )
            out.append(Finding("fixed-resolution", text))
    return out


def _fails(model: nn.Module, x: Tensor) -> str | None:
    try:
        with torch.no_grad():
            model(x)
    except Exception as e:
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"
    return None


def _integers(model: nn.Module, graph: Graph, name: str) -> tuple[dict[str, str], str]:
    """Operator -> "yes" or why it stays in float; and why nothing is known."""
    try:
        profile = load_profile(name)
    except UserError:
        return {}, f"nothing is known of integer kernels in {name}"
    view = View(graph, profile, [n for n, _ in model.named_parameters()], False)
    return {**view.why_float, **{n.id: "yes" for n in view.integer}}, ""


def _channel_bound(
    model: nn.Module,
    graph: Graph,
    groups: Sequence[ChannelGroup],
    example: Tensor,
    runtime: str,
    measure: bool,
    threads: int,
) -> tuple[list[Bound], str]:
    """What is left with every group at one unit, and why it was not measured."""
    free = candidates(groups)
    gone = removable_together(groups, {g.id: range(len(g.units) - 1) for g in free})
    if not gone:
        text = "no group of channels can be cut"
        return [Bound("channels", 1.0, "arithmetic", text)], ""
    model_of = CostModel.of(model, graph, groups)
    by_id = {g.id: g for g in groups}
    sizes = {axis: n for g in groups for axis, n in g.sizes.items()}
    timeline = Timeline([[by_id[id].units[u] for u in units] for id, units in gone.items()], sizes)
    left = model_of.total("macs", timeline.kept(len(gone)))
    whole = model_of.total("macs", {})
    ratio = amdahl(1 - left / whole) if whole else 1.0
    percent = 100 * left / whole if whole else 100.0
    text = f"{percent:.2g} % of the multiply-adds stay with every group at one unit"
    bounds = [Bound("channels", ratio, "arithmetic", text)]
    if not measure:
        return bounds, "not asked for"
    try:
        edits = surgery.remove_edits(groups, gone, by="preflight")
        floor = surgery.apply(copy.deepcopy(model), edits, example=example)
        before, after, speedup, busy = _measured(model, floor, example, runtime, threads)
    except (GracileError, RuntimeError, ImportError) as e:
        return bounds, str(e).strip().splitlines()[0]
    text = (
        f"{before:.3f} ms now, {after:.3f} ms with every group at one unit ({threads} thread"
        f"{'s' if threads > 1 else ''}, batch 1): no choice of channels is faster"
    )
    if busy:
        text += "; the machine was busy, so measure again"
    return [Bound("channels", speedup, "measured", text), *bounds], ""


def _measured(
    dense: nn.Module, floor: nn.Module, example: Tensor, runtime: str, threads: int
) -> tuple[float, float, float, bool]:
    """Milliseconds of both, their ratio, and whether others were at work meanwhile."""
    with TemporaryDirectory() as folder:
        loaded: dict[str, Loaded] = {}
        for label, net in (("dense", dense), ("floor", floor)):
            loaded[label] = _loaded(net.eval(), example, runtime, threads, Path(folder) / label)
        records = compare(loaded, rounds=5)
        times = find(records, "latency_ms")
        ms = {r.subject["model"]: r.value for r in times}
        (ratio,) = (r.value for r in find(records, "speedup"))
    busy = max(r.load_avg or 0.0 for r in times) > (os.cpu_count() or 1)
    return ms["dense"], ms["floor"], ratio, busy


def _loaded(net: nn.Module, example: Tensor, runtime: str, threads: int, folder: Path) -> Loaded:
    name, device = parse_target(runtime)
    plan = Plan(architecture=Architecture(name=type(net).__name__))
    artifact = registry.get("exporter", name).obj(
        net, plan, {}, example=example, path=folder, metadata={}
    )
    options: dict[str, Any] = {"module": net} if name == "pytorch" else {}
    return load(artifact, threads=threads, device=device, **options)
