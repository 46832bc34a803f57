"""Recipe, plan, environment, records and the command line: what repeats and proves a run."""

import shlex
from collections.abc import Sequence

from gracile.core.record import Record
from gracile.report.page import Absent, Block, Code, Items, Prose, Section
from gracile.report.run import Run
from gracile.report.texts import Table, integer, listed
from gracile.report.verdict import interval, section

MOST_ROWS = 60


def recipe(run: Run) -> Section | Absent:
    """The recipe as it ran and the edits it led to."""
    blocks: list[Block] = []
    if run.recipe is not None:
        blocks.append(Code(run.recipe, "recipe.yaml, defaults filled in"))
    if run.plan is not None and len(run.plan):
        counts: dict[tuple[str, str], int] = {}
        for edit in run.plan:
            counts[edit.kind, edit.by] = counts.get((edit.kind, edit.by), 0) + 1
        rows = tuple((kind, by or "–", str(n)) for (kind, by), n in counts.items())
        table = Table("Edits in the plan", ("Edit", "By", "Count"), rows, frozenset({0, 1}))
        blocks.append(table)
    if not blocks:
        return Absent("Recipe", "the run directory has neither recipe nor plan.")
    return Section("recipe", "Recipe", tuple(blocks))


def environment(run: Run) -> Section | Absent:
    """Where, with what and on which data."""
    records = [r for r in run.records if r.kind == "measured"]
    loads = [r.load_avg for r in records if r.load_avg is not None]
    load = "" if not loads else f"{_range(loads)} while measuring"
    data = section(run.result, "data")
    used = (f"{r.runtime} {r.runtime_version}" for r in records if r.runtime_version)
    pairs = [
        ("Device", listed(r.device for r in records)),
        ("Runtimes", listed(used)),
        ("Threads", listed(str(r.threads) for r in records if r.threads is not None)),
        ("Load average", load),
        ("Seed", "" if run.result.get("seed") is None else str(run.result["seed"])),
        ("Versions", listed(f"{k} {v}" for k, v in section(run.result, "versions").items())),
        ("Data", str(data.get("name") or "")),
        *((f"Split: {k}", str(v)) for k, v in (data.get("splits") or {}).items()),
    ]
    known = tuple((k, v) for k, v in pairs if v)
    if not known:
        return Absent("Environment", "the run recorded nothing about its surroundings.")
    return Section("environment", "Environment and data", (Items(known),))


def measurements(run: Run) -> Section | Absent:
    """Every Record, measured and published apart."""
    tables = tuple(
        record_table(f"All {kind} values", found, folded=True)
        for kind in ("measured", "published")
        if (found := [r for r in run.records if r.kind == kind])
    )
    if not tables:
        return Absent("Measurements", "records.jsonl has none.")
    return Section("measurements", "Measurements", tables)


def reproduce(run: Run) -> Section:
    """The command line that repeats the run."""
    command = run.result.get("command")
    told = bool(command)
    if isinstance(command, list | tuple):
        command = _shell(command)
    said = (
        "This is the command that made this run."
        if told
        else "Put together from the run's files; name the weights and data you started from."
    )
    seed = run.result.get("seed")
    repeats = "" if seed is None else f" With seed {seed} and the same number of threads it repeats"
    repeats += " bit for bit on the same machine; times vary." if repeats else ""
    text = str(command) if told else _command(run)
    return Section("reproduce", "How to reproduce", (Prose(said + repeats), Code(text, "shell")))


def record_table(title: str, records: Sequence[Record], *, folded: bool = False) -> Table:
    """Records as a table, cut off at `MOST_ROWS`."""
    shown = records[:MOST_ROWS]
    rows = tuple(
        (r.metric, r.runtime or "–", r.split or "–", f"{r.value:.6g}", r.unit, integer(r.n),
         interval(r.ci95, 4, ""), r.device or "–")
        for r in shown
    )  # fmt: skip
    columns = ("Metric", "Runtime", "Split", "Value", "Unit", "n", "95 % interval", "Device")
    more = len(records) - len(shown)
    note = f"{more} more in records.jsonl." if more else ""
    return Table(title, columns, rows, frozenset({0, 1, 2, 4, 7}), note, folded)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def runtimes(run: Run) -> list[str]:
    """Every runtime the result speaks of."""
    parts = ("speedup", "parity", "kernels")
    sides = [section(run.result, s, "latency") for s in ("before", "after")]
    return list(
        dict.fromkeys(n for s in (*sides, *(section(run.result, p) for p in parts)) for n in s)
    )


def _command(run: Run) -> str:
    words = ["gracile", "compress", run.name]
    if run.recipe is not None:
        words += ["--recipe", f"{run.result.get('out') or run.path}/recipe.yaml"]
    data = section(run.result, "data")
    if spec := data.get("spec") or data.get("name"):
        words += ["--data", str(spec)]
    for name in runtimes(run):
        words += ["--runtime", name]
    return _shell([*words, "--out", "runs/again"])


def _shell(words: Sequence[object]) -> str:
    """A quoted command line, one option a line."""
    quoted = [shlex.quote(str(word)) for word in words]
    return " ".join(f"\\\n  {w}" if w.startswith("--") else w for w in quoted)
