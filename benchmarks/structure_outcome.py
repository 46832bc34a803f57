"""What came out of cutting one architecture, and how channels, heads and widths are counted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from gracile.graph.dependency import ChannelGroup
from gracile.graph.graph import Graph

OUTPUT = "output of the model"
PARTS = "by number"  # picked or taken apart: query, key and value of a projection are no heads


@dataclass
class Outcome:
    """What came out for one part, or summed over all parts of an architecture.

    Attributes:
        status: ok; refused (the proof did not hold, nothing was cut); wrong (proven, and yet it
            computes something else than zeros do); or an error.
        reasons: why parameters cannot be cut -> how many, in elements.
        written, written_gone: channels that weights make (outputs of the model left out).
        heads, heads_gone: units of groups that stand for whole heads or groups of channels.
        widths: of `inner` groups, the width within each.
        hidden: of groups that at most two layers make and one reads, as inside an MLP.
        surgery_s: the cut, graph and groups being known; proof_s: what proving it takes on top.
        max_error: largest difference of masked and sliced model, as a share of the magnitude.
    """

    status: str = "ok"
    text: str = ""
    how: list[str] = field(default_factory=list)
    groups: int = 0
    free: int = 0
    written: int = 0
    written_gone: int = 0
    heads: int = 0
    heads_gone: int = 0
    widths: int = 0
    widths_gone: int = 0
    hidden: int = 0
    hidden_gone: int = 0
    macs: int = 0
    macs_after: int = 0
    params: int = 0
    params_after: int = 0
    protected: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    capture_s: float = 0.0
    analysis_s: float = 0.0
    surgery_s: float = 0.0
    proof_s: float = 0.0
    max_error: float = 0.0

    def protect(self, why: str, params: int) -> None:
        """Count parameters that cannot be cut."""
        self.reasons[why] = self.reasons.get(why, 0) + params

    def add(self, other: "Outcome", part: str) -> None:
        """Sum up; the worst status and the largest error stay."""
        if other.status != "ok":
            self.status, self.text = other.status, f"{part}: {other.text}"
        self.max_error = max(self.max_error, other.max_error)
        self.how += other.how
        for why, n in other.reasons.items():
            self.protect(why, n)
        for name in SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))


SUMMED = (
    "groups", "free", "written", "written_gone", "heads", "heads_gone", "widths", "widths_gone",
    "hidden", "hidden_gone", "macs", "macs_after", "params", "params_after", "protected",
    "capture_s", "analysis_s", "surgery_s", "proof_s",
)  # fmt: skip


def count(out: Outcome, groups: Sequence[ChannelGroup], gone: dict[str, list[int]]) -> None:
    """Groups, and of the channels, heads and widths that are no output: how many, how many go."""
    out.groups, out.free = len(groups), sum(g.protected is None for g in groups)
    known = {g.id: g for g in groups}
    axes: dict[tuple[str, int], set[int]] = {}
    outputs: set[tuple[str, int]] = set()
    for g in groups:
        units = gone.get(g.id, [])
        why = g.protected or ""
        kind = kind_of(g, known)
        if OUTPUT not in why and not (kind == "heads" and PARTS in why):
            for name, n in ((kind, len(g.units)), (f"{kind}_gone", len(units))):
                if hasattr(out, name):
                    setattr(out, name, getattr(out, name) + n)
        for axis in g.writes.items():
            axes.setdefault(axis, set()).update(
                i for u in units for s in g.units[u] if (s.at, s.dim) == axis for i in s.index
            )
            if OUTPUT in why:
                outputs.add(axis)
    sizes = {axis: size for g in groups for axis, size in g.sizes.items()}
    out.written = sum(sizes[axis] for axis in axes if axis not in outputs)
    out.written_gone = sum(len(lost) for axis, lost in axes.items() if axis not in outputs)


def kind_of(group: ChannelGroup, known: Mapping[str, ChannelGroup]) -> str:
    """`heads`, `widths`, `hidden`, or `other`: a stream, or an output."""
    if group.kind == "inner":
        return "widths"
    if group.kind == "outer" or any(known[o].kind == "inner" for o in group.overlaps):
        return "heads"
    return "hidden" if len(group.producers) <= 2 and len(group.consumers) == 1 else "other"


def count_protected(
    out: Outcome, model: nn.Module, graph: Graph, groups: Sequence[ChannelGroup]
) -> None:
    """Parameters of which no dim can be cut, by reason."""
    free = {s.at for g in groups if g.protected is None for unit in g.units for s in unit}
    read = {address for node in graph for address in node.params.values()}
    unread = "unused" if "train" in graph.modes else "unused in eval mode"
    reasons: dict[str, str] = {}
    for g in groups:
        if g.protected is not None:
            for at, _ in g.sizes:
                reasons.setdefault(at, g.protected.split(" ('")[0])
    for name, p in model.named_parameters():
        if name not in free:
            out.protected += p.numel()
            other = "in no group of channels" if name in read else unread
            out.protect(reasons.get(name, other), p.numel())
