"""Thinning: cut out the channels that masks have zeroed, so that the model really becomes smaller.

Every cut is verified (sliced model = masked model) before it is made; what the masks hide is then
gone from weights, BatchNorm, optimizer state and teacher-free memory alike.
"""

from typing import Any

import torch

from gracile.core import method as core
from gracile.core.schedule import When


class ThinOptions(core.Options):
    """Options of `prune: thin`.

    Attributes:
        when: usually `{at: 30ep}` after the last pruning step, or `{at: end}`.
    """

    when: When


@core.method("prune", "thin", source="Distiller, StructureRemover; verified as in ARCHITECTURE.md")
class Thin(core.Method):
    """Remove channels whose every weight is masked."""

    Options = ThinOptions
    needs = frozenset()

    def on_fire(self, s: Any, progress: float) -> None:
        gone = {g.id: masked_units(s, g) for g in s.groups if g.protected is None}
        gone = {id: units for id, units in gone.items() if units}
        if not gone:
            s.warn(
                "nothing-to-thin",
                f"'{self.id}' found no channel that is masked as a whole; element masks are not "
                "cut. Use granularity filter or channel before it.",
            )
            return
        s.cut(gone, by=self.id)


def masked_units(s: Any, group: Any) -> list[int]:
    """Units of a group whose slices are False throughout in the masks of the session."""
    out, names = [], s.parameter_names
    for u, unit in enumerate(group.units):
        slices = [p for p in unit if p.at in names]
        if slices and all(_hidden(s.mask(p.at), p) for p in slices):
            out.append(u)
    return out if len(out) < len(group.units) else []


def _hidden(mask: torch.Tensor | None, part: Any) -> bool:
    if mask is None:
        return False
    return not bool(mask.index_select(part.dim, torch.tensor(part.index)).any())
