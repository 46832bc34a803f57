"""BatchNorm statistics counted anew on calibration data: the cheapest recovery there is."""

from typing import Any

from gracile.core import method as core
from gracile.core.schedule import When
from gracile.errors import BindError


class BatchNormOptions(core.Options):
    """Options of `recover: batch_norm`.

    Attributes:
        when: the firings.
    """

    when: When


@core.method("recover", "batch_norm", source="Li et al. 2020, arXiv:2007.02491 (adaptive BN)")
class BatchNormStatistics(core.Method):
    """Replace running means and variances by the averages over the calibration batches.

    What is pruned or quantized shifts the distributions that the stored statistics describe. Only
    BatchNorm runs in train mode, dropout stays off, weights stay as they are.
    """

    Options = BatchNormOptions
    needs = frozenset({"calibration"})
    counts_statistics = True

    def on_attach(self, s: Any) -> None:
        if not s.running_norms:
            raise BindError(
                f"'{self.id}': {s.name} has no BatchNorm with running statistics to count anew."
            )

    def on_fire(self, s: Any, progress: float) -> None:
        s.count_statistics(self)
