"""BatchNorm statistics counted anew on calibration data: the cheapest recovery there is."""

from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from gracile.core import method as core
from gracile.core.schedule import When
from gracile.distribute.collective import all_reduce_mean_
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

    def on_attach(self, s: Any) -> None:
        if not _norms(s.model):
            raise BindError(
                f"'{self.id}': {s.name} has no BatchNorm with running statistics to count anew."
            )

    def on_fire(self, s: Any, progress: float) -> None:
        norms = _norms(s.model)
        momenta = [n.momentum for n in norms]
        try:
            for n in norms:
                n.reset_running_stats()
                n.momentum = None  # a plain average
            s.calibrate(self, training=norms)
            for n in norms:  # ranks that train together may have seen different images
                for statistic in (n.running_mean, n.running_var):
                    assert statistic is not None
                    all_reduce_mean_(statistic)
        finally:
            for n, momentum in zip(norms, momenta, strict=True):
                n.momentum = momentum


def _norms(model: Any) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
