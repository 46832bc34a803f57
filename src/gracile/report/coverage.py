"""The coverage section: stacked bars that add up to 100 %, and why things were left alone."""

import math
from collections.abc import Mapping, Sequence

from gracile.analyze.ledger import Ledger, Row
from gracile.report.figures import stacked_bar, swatch
from gracile.report.page import Absent, Block, Prose, Section, Stack
from gracile.report.run import Run
from gracile.report.texts import Table
from gracile.report.verdict import section
from gracile.units import percent

MOST_ROWS = 60
MEASURES = {"parameters": "by parameters", "macs": "by multiply-adds"}
PARTS_IN_ORDER = {
    "structure": ("kept", "factorized", "replaced", "added", "skipped", "removed"),
    "sparsity": ("nonzero", "zero", "removed"),
}
PART_STYLES = {
    "kept": "p-plain", "factorized": "p-main", "replaced": "p-second", "added": "p-third",
    "skipped": "p-void", "removed": "p-void", "float": "p-plain", "shared": "p-third",
    "binary": "p-fourth", "int8": "p-main", "nonzero": "p-plain", "zero": "p-main",
}  # fmt: skip


def coverage(run: Run) -> Section | Absent:
    """Shares of every fate, adding up to 100 %, and the reasons for what was left alone."""
    title = "Coverage"
    shares = run.ledger.shares() if run.ledger else section(run.result, "ledger", "shares")
    stacks: list[Block] = [
        _stack(f"{axis.capitalize()}, {said}", axis, shares[measure][axis])
        for measure, said in MEASURES.items()
        for axis in shares.get(measure, {})
        if shares[measure][axis]
    ]
    if not stacks:
        return Absent(title, "the run wrote no ledger.")
    intro = Prose(
        "Every parameter and every multiply-add, of the original model or added to it, is in "
        "exactly one part of each bar."
    )
    table = (_reasons(run.ledger),) if run.ledger else ()
    return Section("coverage", title, (intro, *stacks, *table))


def hundred(shares: Mapping[str, float], digits: int = 1) -> dict[str, str]:
    """Percentages that add up to exactly 100: the largest remainders are rounded up.

    >>> hundred({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    {'a': '33.4', 'b': '33.3', 'c': '33.3'}
    """
    scale = 10**digits
    exact = {name: share * 100 * scale for name, share in shares.items()}
    units = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    left = round(sum(exact.values())) - sum(units.values())
    for name in sorted(exact, key=lambda n: units[n] - exact[n])[:left]:
        units[name] += 1
    return {name: f"{n / scale:.{digits}f}" for name, n in units.items()}


def _stack(title: str, axis: str, shares: Mapping[str, float]) -> Stack:
    wanted = PARTS_IN_ORDER.get(axis, ())
    last = [n for n in ("float", "removed") if n in shares and n not in wanted]
    middle = sorted((n for n in shares if n not in wanted and n not in last), key=_by_bits)
    names = [n for n in (*wanted, *middle, *last) if n in shares]
    shown = hundred({n: shares[n] for n in names})
    spoken = title + ": " + ", ".join(f"{n} {shown[n]} %" for n in names)
    legend = tuple((swatch(_part_style(n)), n, f"{shown[n]} %") for n in names)
    return Stack(title, stacked_bar(spoken, [(_part_style(n), shares[n]) for n in names]), legend)


def _part_style(name: str) -> str:
    return PART_STYLES.get(name, "p-second")


def _by_bits(name: str) -> tuple[int, str]:
    digits = name.removeprefix("int")
    return (-int(digits) if digits.isdigit() else 0, name)


def _reasons(ledger: Ledger) -> Table:
    """Parameters and MACs by reason; all rows together are 100 %."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in ledger:
        done = row.structure if row.structure != "kept" else "compressed"
        key = (row.reason or done, row.why, row.by)
        groups.setdefault(key, []).append(row)
    totals = ledger.totals()

    def cells(rows: list[Row]) -> tuple[str, str, str]:
        numel, macs = sum(r.numel for r in rows), sum(r.macs for r in rows)
        return (
            percent(numel / totals["parameters"]).removesuffix(" %")
            if totals["parameters"]
            else "–",
            percent(macs / totals["macs"]).removesuffix(" %") if totals["macs"] else "–",
            str(len(rows)),
        )

    ordered = sorted(groups.items(), key=lambda g: -sum(r.numel for r in g[1]))
    rows = [
        (reason.replace("_", " "), why or "–", by or "–", *cells(found), _examples(found))
        for (reason, why, by), found in ordered[:MOST_ROWS]
    ]
    rest = [row for _, found in ordered[MOST_ROWS:] for row in found]
    if rest:
        rows.append(("other", "see ledger.json", "–", *cells(rest), _examples(rest)))
    columns = (
        "Fate or reason", "Explanation", "By", "Parameters (%)", "MACs (%)", "Rows", "For example",
    )  # fmt: skip
    return Table("Reasons", columns, tuple(rows), frozenset({0, 1, 2, 6}))


def _examples(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(r.name for r in rows))
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
