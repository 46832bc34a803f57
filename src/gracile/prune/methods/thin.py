"""Thinning: cut out the channels that masks have zeroed, so that the model really becomes smaller.

Every cut is verified (sliced model = masked model) before it is made; what the masks hide is then
gone from weights, BatchNorm, optimizer state and teacher-free memory alike.
"""

from typing import Any

from gracile.core import method as core
from gracile.core.schedule import When
from gracile.prune.masked_units import masked_units


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
    cuts_masked = True

    def on_fire(self, s: Any, progress: float) -> None:
        masks = {a: s.mask(a) for a in s.parameter_names}
        gone = {}
        for g in s.groups:
            units = masked_units(g, masks, masks) if g.protected is None else []
            if 0 < len(units) < len(g.units):
                gone[g.id] = units
        if not gone:
            s.warn(
                "nothing-to-thin",
                f"'{self.id}' found no channel that is masked as a whole; element masks are not "
                "cut. Use granularity filter or channel before it.",
            )
            return
        s.cut(gone, by=self.id)
