"""Structured pruning: cut the least important coupled channels out, each cut proven first.

Nothing is masked: the model is smaller from the firing on, and training goes on with what is left.
"""

from typing import Any, Literal

from torch import Tensor

from gracile.core import method as core
from gracile.prune.cutting import CutOptions, Cutting
from gracile.prune.ranking import normalized


class StructureOptions(CutOptions):
    """Options of `prune: structure`.

    Attributes:
        scope: what is ranked together: each group of coupled channels (layer), all (global), or
            groups of one shape (isomorphic).
        norm: scores of a group are divided by their mean or max, so that layers compare; or none.
            auto: mean for scope global, none otherwise.
    """

    scope: Literal["layer", "global", "isomorphic"] = "global"
    norm: Literal["auto", "none", "mean", "max"] = "auto"


@core.method(
    "prune",
    "structure",
    source="Li et al. 2017, arXiv:1608.08710; scope isomorphic: Fang et al. 2024, arXiv:2407.04616",
)
class Structure(Cutting):
    """Cut the least important coupled channels, to an exact share of channels or cost."""

    Options = StructureOptions

    def on_fire(self, s: Any, progress: float) -> None:
        self.cut_to(s, self.options.ratio.at(progress), self._comparable)

    @property
    def scope(self) -> str:
        """What is ranked together."""
        return str(self.options.scope)

    def _comparable(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        norm = self.options.norm
        if norm == "auto":
            norm = "mean" if self.options.scope == "global" else "none"
        return {id: normalized(v, norm) for id, v in scores.items()}
