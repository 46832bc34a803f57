"""What rules that see all layers have in common: a budget over the sum of their costs."""

from collections.abc import Sequence

from gracile.errors import UserError
from gracile.lowrank.affordable import check_ratio
from gracile.lowrank.candidates import Candidate

Table = Sequence[Candidate]  # of one layer; the first is the layer as it is
COSTS = ("macs", "params", "latency")
ERRORS = ("responses", "loss")
UNITS = {"macs": "multiply-adds", "params": "parameters", "latency": "ms"}


def checked_budget(
    tables: Sequence[Table], ratio: float, of: str, by: str, candidates: int
) -> float:
    """The budget: a share of what the layers cost as they are.

    Raises:
        UserError: an option is out of range, or even the cheapest candidates cost more.
    """
    check_options(ratio, of, by, candidates)
    whole = sum(table[0].cost for table in tables)
    least = sum(min(c.cost for c in table) for table in tables)
    if least > ratio * whole:
        raise UserError(
            f"these layers have {whole:.6g} {UNITS[of]}, and at least {least:.6g} with the "
            f"smallest ranks, {least / whole:.1%} of it, above the ratio {ratio}. Ask for a larger "
            "ratio, more candidates or a smaller round_to."
        )
    return ratio * whole


def check_options(ratio: float, of: str, by: str, candidates: int) -> None:
    """Refuse what no rule takes.

    Raises:
        UserError: an option is out of range.
    """
    check_ratio(ratio)
    for name, value, known in (("of", of, COSTS), ("by", by, ERRORS)):
        if value not in known:
            raise UserError(f"{name} must be one of {', '.join(known)}, got '{value}'.")
    if candidates < 1:
        raise UserError(f"candidates must be >= 1, got {candidates}.")
