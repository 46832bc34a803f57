"""Learning-rate policies of Distiller as one schedule of spans.

At the end of each epoch e of its policy a scheduler is asked for the rate of epoch e + 1, counted
from the start of training, as a closed form of the first rate: so the rate jumps when a policy
begins late, and stands still when it ends.
"""

from typing import Any

from gracile.recipe.distiller.read import Component, Schedule

# Arguments that change nothing, and those with another name here.
_DROPPED = ("verbose", "scale_mode")
_RENAMED = {("PolynomialLR", "T_max"): "total_iters"}


def convert(s: Schedule) -> dict[str, Any] | None:
    """`train.lr`, or None where no policy moves the rate."""
    spans = []
    for p in s.policies:
        if p.kind != "lr_scheduler" or p.start >= s.epochs:
            continue
        schedule = _schedule(s, p.component)
        if p.every is None:
            spans += [{"start": e, "stop": e + 1, "schedule": schedule} for e in p.epochs]
            continue
        every = {"every": p.every} if p.every > 1 else {}
        spans.append({"start": p.start, "stop": p.stop, **every, "schedule": schedule})
    return {"class": "Spans", "spans": spans} if spans else None


def _schedule(s: Schedule, c: Component) -> dict[str, Any]:
    milestones = c.args.get("milestones", [])
    if sorted(milestones) != milestones:
        s.refuse((*c.keys, "milestones"), f"must rise, got {milestones}. Put them in order.")
    if "gammas" in c.args and len(c.args["gammas"]) != len(milestones):
        s.refuse((*c.keys, "gammas"), f"must be as many as milestones ({len(milestones)}).")
    args = {_RENAMED.get((c.cls, k), k): v for k, v in c.args.items() if k not in _DROPPED}
    return {"class": c.cls, **args}
