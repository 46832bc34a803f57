"""All sections of a report in reading order, and those about accuracy, layers and kernels."""

from collections.abc import Mapping, Sequence
from typing import Any

from gracile.report.coverage import coverage
from gracile.report.curves import sparsity, training
from gracile.report.figures import Bar, LayerBars, bar_chart, figure, layer_chart
from gracile.report.gains import gains
from gracile.report.ladder import ladder
from gracile.report.page import Absent, Block, Items, Prose, Section
from gracile.report.provenance import environment, measurements, recipe, reproduce
from gracile.report.run import Run
from gracile.report.sensitivity import sensitivity
from gracile.report.tables import before_after
from gracile.report.texts import (
    COUNTS,
    Table,
    dash,
    integer,
    number,
    over,
    p_value,
    part_of,
    percent_text,
    scaled,
    significant,
)
from gracile.report.timing import conditions, latency, latency_records, speed
from gracile.report.verdict import per_runtime, runtime_name, section

STAGES = ("dense", "cut", "recovered")


def everything(run: Run) -> list[Section | Absent]:
    """All sections in reading order."""
    return [
        summary(run), stages(run), agreement(run), speed(run), *gains(run),
        latency(run), layers(run),
        *ladder(run), training(run), sparsity(run), *sensitivity(run), coverage(run), warnings(run),
        kernels(run), parity(run), recipe(run), environment(run), measurements(run),
        reproduce(run),
    ]  # fmt: skip


def summary(run: Run) -> Section:
    """The before/after table and the conditions the times were taken under."""
    blocks: list[Block] = [before_after(run.result)]
    said = dict.fromkeys(conditions(name, r) for (name, _), r in latency_records(run).items())
    if said:
        blocks.append(Prose("Latency is the median per batch. " + " ".join(said)))
    return Section("summary", "Before and after", tuple(blocks))


def stages(run: Run) -> Section | Absent:
    """Accuracy of the dense model, right after the cut, and recovered."""
    title = "Accuracy on the way"
    found = {n: s for n in STAGES if (s := section(run.result, "stages").get(n))}
    if not found:
        return Absent(title, "accuracy was not measured between the stages of this run.")
    table = Table(
        title,
        ("Stage", "Top-1 (%)", "Top-5 (%)", "Loss (nats)", "Split"),
        tuple(
            (n, percent_text(s.get("top1")), percent_text(s.get("top5")), number(s.get("loss")),
             str(s.get("split") or "–"))
            for n, s in found.items()
        ),
        frozenset({0, 4}),
    )  # fmt: skip
    bars = [
        Bar(n, 100 * s["top1"], f"{100 * s['top1']:.2f} %", style=_stage_style(n))
        for n, s in found.items()
        if s.get("top1") is not None
    ]
    if not bars:
        return Section("stages", title, (table,))
    chart = figure(
        "Top-1 accuracy at each stage",
        lambda w: bar_chart("Top-1 accuracy at each stage, in %", {"": bars}, width=w, unit="%"),
        "Dense is the original, cut the worst score right after a change, recovered the result.",
    )
    return Section("stages", title, (chart, table))


def agreement(run: Run) -> Section | Absent:
    """How often the deployed model says the same as the original, sample by sample."""
    title = "Agreement with the original"
    found = per_runtime(run.result, "agreement")
    if not found:
        return Absent(title, "predictions were not compared sample by sample.")
    rows = tuple(
        (runtime_name(n), percent_text(a.get("share")), integer(a.get("flips")),
         integer(a.get("lost")), integer(a.get("gained")), integer(a.get("n")),
         dash(a.get("worst_class")), number(a.get("worst_class_drop"), 2),
         p_value(a.get("mcnemar_p")))
        for n, a in found.items()
    )  # fmt: skip
    note = (
        "Flips are samples whose answer changed; lost were right before and are wrong now, gained "
        "the reverse. McNemar tests whether lost and gained are balanced: a small p means that the "
        "accuracy really changed."
    )
    columns = (
        "Runtime", "Same answer (%)", "Flips", "Lost", "Gained", "Samples",
        "Worst class", "Its drop (points)", "McNemar p",
    )  # fmt: skip
    return Section("agreement", title, (Table(title, columns, rows, frozenset({0, 6}), note),))


def layers(run: Run) -> Section | Absent:
    """Channels, bits, zeros and multiply-adds of every layer."""
    title = "Layer by layer"
    found: Sequence[Mapping[str, Any]] = run.result.get("layers") or ()
    if not found:
        return Absent(title, "this run has no list of layers.")
    bars = [
        LayerBars(str(n.get("id")), n.get("channels_before"), n.get("channels_after"),
                  n.get("bits"), n.get("sparsity"))
        for n in found
    ]  # fmt: skip
    chart = figure(
        "What is left of each layer",
        lambda w: layer_chart("Channels, bits and zeros of every layer", bars, width=w),
        "Pale bars are the original width, full bars what is left; 32 bits are floating point. "
        "Zeros are zeros inside the weights that are left.",
    )
    macs = [n.get(k) for n in found for k in ("macs_before", "macs_after")]
    unit, _ = scaled(COUNTS, *macs)
    size = next(s for s, u in COUNTS if u == unit)
    columns = (
        "Layer", "Operator", "Channels before", "After", "Bits", "Zeros (%)",
        f"MACs before ({unit})" if unit else "MACs before", "After",
    )  # fmt: skip
    rows = tuple(
        (str(n.get("id")), dash(n.get("op")), integer(n.get("channels_before")),
         integer(n.get("channels_after")), integer(n.get("bits")),
         percent_text(n.get("sparsity"), 1), number(over(n.get("macs_before"), size), 2),
         number(over(n.get("macs_after"), size), 2))
        for n in found
    )  # fmt: skip
    table = Table("All layers as a table", columns, rows, frozenset({0, 1}), folded=True)
    return Section("layers", title, (chart, table))


def warnings(run: Run) -> Section | Absent:
    """What the run wants its reader to know."""
    found = run.result.get("warnings") or ()
    if not found:
        return Absent("Warnings", "the run raised none.")
    pairs = tuple((str(w.get("code", "")), str(w.get("text", ""))) for w in found)
    return Section("warnings", "Warnings", (Items(pairs, warning=True),))


def kernels(run: Run) -> Section | Absent:
    """Which kernels the runtime really chose."""
    title = "Proof of integer kernels"
    found = per_runtime(run.result, "kernels")
    if not found:
        return Absent(title, "no runtime reported which kernels it runs.")
    rows = tuple(
        (runtime_name(n), part_of(k.get("convolutions_integer"), k.get("convolutions")),
         integer(k.get("integer")), integer(k.get("float")))
        for n, k in found.items()
    )  # fmt: skip
    columns = ("Runtime", "Convolutions in integers", "Integer operators", "Float operators")
    note = "Counted in the runtime's own optimized graph, not in the exported file."
    return Section("kernels", title, (Table(title, columns, rows, note=note),))


def parity(run: Run) -> Section | Absent:
    """Whether the exported model computes what the PyTorch model computes."""
    title = "Parity with PyTorch"
    found = per_runtime(run.result, "parity")
    if not found:
        return Absent(title, "nothing was exported, so there was nothing to compare.")
    rows = tuple(
        (runtime_name(n), dash(p.get("precision")), significant(p.get("max_abs")),
         number(p.get("max_lsb"), 2), number(p.get("cosine"), 6),
         percent_text(p.get("agreement")), str(p.get("first_bad") or "none"))
        for n, p in found.items()
    )  # fmt: skip
    columns = (
        "Runtime", "Precision", "Largest difference", "In quantized units (LSB)",
        "Cosine", "Same answer (%)", "First differing unit",
    )  # fmt: skip
    return Section("parity", title, (Table(title, columns, rows, frozenset({0, 1, 6})),))


def _stage_style(name: str) -> str:
    return {"dense": "before", "cut": "cut"}.get(name, "after")
