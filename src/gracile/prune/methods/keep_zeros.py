"""What is zero stays zero: train or quantize a sparse network without losing its sparsity."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gracile.core import method as core
from gracile.core.schedule import When
from gracile.prune.masking import Masking, MaskOptions
from gracile.prune.thresholding import tell_share


class KeepZerosOptions(MaskOptions):
    """Options of `prune: keep_zeros`.

    Attributes:
        when: the firings, each of which takes the weights that are zero then; default once, before
            anything else happens.
    """

    when: When | None = None  # type: ignore[assignment]


@core.method("prune", "keep_zeros", source="NNCF, constant sparsity (const_sparsity)")
class KeepZeros(Masking):
    """Mask the weights that are zero, for good."""

    Options = KeepZerosOptions
    by_value = True

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        if self.options.when is None:
            self.on_fire(s, 1.0)

    def masks(self, s: Any, progress: float) -> Mapping[str, Tensor]:
        out = {a: s.overlays.effective(a, upto="mask").detach() != 0 for a in self.addresses}
        if all(bool(keep.all()) for keep in out.values()):
            s.warn("nothing-to-keep", f"'{self.id}' finds no zero in the {len(out)} tensors.")
        tell_share(s, self.id, out)
        return out
