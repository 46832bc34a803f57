"""Pruning by a threshold: what is not above it goes, however much that is.

The threshold is a number, or a multiple of the standard deviation of each tensor (sensitivity
pruning: layers that bear more get a larger multiple). A group of weights goes by its norm, as group
penalties leave it.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from gracile.core import method as core
from gracile.prune.grouping import group_ids, group_norms
from gracile.prune.masking import Masking, MaskOptions
from gracile.prune.thresholding import spread, tell_share
from gracile.recipe.fields import Amount, KernelRef, kernel


class ThresholdOptions(MaskOptions):
    """Options of `prune: threshold`.

    Attributes:
        threshold: what stays is larger; a number > 0 or `{ramp, initial, final}`.
        relative_to: the threshold is a number of its own (none), or a multiple of the standard
            deviation of the tensor's weights (std).
        frozen_scale: the standard deviation is that of the first firing; false: of each firing
            anew, pruned weights counted as 0.
        granularity: what goes as one.
        reduce: the norm of a group that is compared: mean_abs, max or l2.
    """

    threshold: Amount
    relative_to: Literal["none", "std"] = "none"
    frozen_scale: bool = True
    granularity: KernelRef("granularity") = Field(  # type: ignore[valid-type]
        default_factory=lambda: kernel("granularity", "element")
    )
    reduce: Literal["mean_abs", "max", "l2"] = "mean_abs"


@core.method(
    "prune",
    "threshold",
    source="Han et al. 2015, arXiv:1506.02626; groups: Wen et al. 2016, arXiv:1608.03665",
)
class Threshold(Masking):
    """Zero the weights, or groups of weights, that are not above a threshold.

    What is pruned counts as 0 from then on, so it stays pruned. With relative_to std and a frozen
    scale this is Distiller's SensitivityPruner, with groups its StructureParameterPruner.
    """

    Options = ThresholdOptions
    by_value = True

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        self.stds: dict[str, float] = {}  # address -> of the first firing
        group_ids(self.id, self.options.granularity, s, self.addresses)

    def masks(self, s: Any, progress: float) -> Mapping[str, Tensor]:
        level = self.options.threshold.at(progress)
        out = {}
        for a, groups in group_ids(self.id, self.options.granularity, s, self.addresses).items():
            weight = s.overlays.effective(a, upto="mask").detach()
            norms = group_norms(weight, groups, self.options.reduce)
            out[a] = (norms > level * self._scale(a, weight)).cpu()[groups]
        tell_share(s, self.id, out)
        return out

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        super().on_surgery(s, edits)
        self.stds.clear()  # those of other tensors

    def state_dict(self) -> dict[str, Any]:
        return {"stds": dict(self.stds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stds = {a: float(v) for a, v in state["stds"].items()}

    def _scale(self, address: str, weight: Tensor) -> float:
        if self.options.relative_to == "none":
            return 1.0
        if not self.options.frozen_scale:
            return spread(weight)
        if address not in self.stds:
            self.stds[address] = spread(weight)
        return self.stds[address]
