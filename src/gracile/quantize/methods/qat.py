"""Quantization-aware training: the forward rounds as integer kernels do, the weights adapt."""

from collections.abc import Iterable
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from gracile.core.method import method
from gracile.core.plan import Bits
from gracile.core.schedule import TimeField
from gracile.nn.quantized import ActivationQuantizer
from gracile.quantize.engine import ObservedOptions
from gracile.quantize.training import TrainedQuantizer, TrainingOptions
from gracile.recipe.fields import KernelRef, kernel


class QatOptions(TrainingOptions, ObservedOptions):
    """Options of `quantize: qat`, added to `TrainingOptions` and `ObservedOptions`.

    Attributes:
        observer: range of an activation; first over the calibration batches, then over training.
        freeze_observers: from when activation ranges stand still; default after two thirds of the
            training that follows `start`, so that the last third adapts to the final grids.
    """

    observer: KernelRef("observer") = Field(  # type: ignore[valid-type]
        default_factory=lambda: kernel("observer", "moving_average")
    )
    freeze_observers: TimeField | None = None


@method(
    "quantize",
    "qat",
    source="Jacob et al. 2018, arXiv:1712.05877, section 3; Krishnamoorthi 2018, arXiv:1806.08342",
)
class Qat(TrainedQuantizer):
    """Train with weights and activations on their grids.

    Weight scales follow the weights at every forward. Activation ranges start from the calibration
    batches, follow the training batches (a batch is rounded with the ranges of those before it),
    and are frozen for the last part. Batch norm is not folded while training.
    """

    Options = QatOptions
    freezes = ("freeze_observers", *TrainedQuantizer.freezes)

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        self.frozen = False
        self._hooks: list[Any] = []

    def on_fire(self, s: Any, progress: float) -> None:
        super().on_fire(s, progress)
        self._watch()

    def on_batch_start(self, s: Any) -> None:
        if self.laid and not self.frozen and s.now >= self._freeze_at(s):
            self._freeze()
        super().on_batch_start(s)

    def on_batch_end(self, s: Any) -> None:
        if self.laid and not self.frozen:
            self.refresh()
        super().on_batch_end(s)

    def on_detach(self, s: Any) -> Iterable[Bits]:
        self._freeze()
        return super().on_detach(s)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "frozen": self.frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.frozen = bool(state["frozen"])
        if self.laid and not self.frozen:
            self._watch()

    def _freeze_at(self, s: Any) -> int:
        if self.options.freeze_observers is not None:
            return int(s.calendar.minibatch(self.options.freeze_observers))
        start = int(s.calendar.minibatch(self.options.start))
        return start + -(-2 * (int(s.calendar.total) - start) // 3)

    def _freeze(self) -> None:
        self.frozen = True
        self.settle()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _watch(self) -> None:
        self._hooks = [
            q.register_forward_pre_hook(_show) for q in self.quantizers.values() if q.observer
        ]


def _show(q: nn.Module, args: tuple[Tensor, ...]) -> None:
    # Takes the module as argument and holds nothing, so that copies of the model watch themselves.
    if isinstance(q, ActivationQuantizer) and q.training and q.observer is not None:
        q.observer.observe(args[0])
