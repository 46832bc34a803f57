"""Where text goes: results on stdout, everything else on stderr."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from gracile.errors import UserError
from gracile.report.tables import summary

log = Console(stderr=True, highlight=False)
out = Console(highlight=False)


def say(text: str) -> None:
    """One line of progress on stderr."""
    log.print(f"[dim]·[/dim] {text}")


def show(result: dict[str, Any], as_json: bool) -> int:
    """Print a run's result, and return its exit status."""
    if as_json:
        print(json.dumps(result))
    else:
        out.print(summary(result))
        for w in result.get("warnings", []):
            out.print(f"[yellow]warning[/yellow] {w['code']}: {w['text']}")
        for line in [*proofs(result), *verdicts(result["goal"])]:
            out.print(line, soft_wrap=True)
        out.print(f"report: {Path(result['out']) / 'report.html'}", soft_wrap=True)
    return int(result["exit"])


def proofs(result: dict[str, Any]) -> list[str]:
    """One line per runtime: speed-up and interval, agreement with the original, integer kernels."""
    lines = []
    for runtime, ratio in result["speedup"].items():
        a, k = result["agreement"][runtime], result["kernels"][runtime]
        low, high = ratio["ci95"]
        lines.append(
            f"{runtime}: speed-up {ratio['ratio']:.2f}x (95 % CI {low:.2f} to {high:.2f}); "
            f"{100 * a['share']:.1f} % of {a['n']} answers as before "
            f"({a['lost']} lost, {a['gained']} gained, McNemar p = {a['mcnemar_p']:.3g}); "
            f"{k['convolutions_integer']} of {k['convolutions']} convolutions in integer kernels"
        )
    return lines


def verdicts(goal: dict[str, Any]) -> list[str]:
    """One line per checked part of the goal, with what is missing."""
    lines = []
    for c in goal.get("checks", []):
        got = "not measured" if c["got"] is None else f"{c['got']:.3g}"
        word = "goal met" if c["met"] else "GOAL MISSED"
        gap = ""
        if not c["met"] and c["got"] is not None:
            gap = f" (off by {abs(c['got'] - c['wanted']):.3g})"
        lines.append(f"{word}: {c['what']}: wanted {c['wanted']:.3g}, got {got}{gap}")
    return lines


def write_text(text: str) -> None:
    """Plain text on stdout, unwrapped."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def need_file(path: Path, what: str) -> Path:
    """Refuse a missing file at once.

    Raises:
        UserError: names the path.
    """
    if not path.exists():
        raise UserError(f"{path}: no such {what}.")
    return path
