"""Quantization-aware training: the forward rounds as integer kernels do, the weights adapt."""

from collections.abc import Iterable
from typing import Any, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from gracile.core.method import method
from gracile.core.plan import Bits
from gracile.core.schedule import END, Time, TimeField, When
from gracile.errors import BindError
from gracile.nn.quantized import ActivationQuantizer
from gracile.quantize.engine import QuantizeOptions, Quantizer
from gracile.recipe.fields import KernelRef, kernel


class QatOptions(QuantizeOptions):
    """Options of `quantize: qat`, added to `QuantizeOptions`.

    Attributes:
        observer: range of an activation; first over the calibration batches, then over training.
        when: `{start: T}`, the moment fake quantization begins.
        freeze_observers: from when activation ranges stand still; default after two thirds of the
            training that follows `start`, so that the last third adapts to the final grids.
        freeze_bn: from when batch norm uses its running statistics and no longer updates them;
            default never.
    """

    observer: KernelRef("observer") = Field(  # type: ignore[valid-type]
        default_factory=lambda: kernel("observer", "moving_average")
    )
    when: When
    freeze_observers: TimeField | None = None
    freeze_bn: TimeField | None = None

    @model_validator(mode="after")
    def _begins_in_training(self) -> Self:
        if self.when.at == END:
            raise ValueError("qat trains, 'at: end' is too late; write when: {start: 2ep}, or ptq")
        if self.when.stop or self.when.every or not (self.when.once or self.when.start):
            raise ValueError("qat begins once and lasts to the end; write when: {start: 2ep}")
        return self

    @property
    def timing(self) -> When:
        """One firing, at the start."""
        return When(at=self.start)

    @property
    def start(self) -> Time:
        """When fake quantization begins."""
        return Time.parse(self.when.start or self.when.at)


@method(
    "quantize",
    "qat",
    source="Jacob et al. 2018, arXiv:1712.05877, section 3; Krishnamoorthi 2018, arXiv:1806.08342",
)
class Qat(Quantizer):
    """Train with weights and activations on their grids.

    Weight scales follow the weights at every forward. Activation ranges start from the calibration
    batches, follow the training batches (a batch is rounded with the ranges of those before it),
    and are frozen for the last part. Batch norm is not folded while training.
    """

    Options = QatOptions
    needs = frozenset({"train", "calibration", "graph"})

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        self.frozen = False
        self._hooks: list[Any] = []
        if not options.activations:
            self.needs = frozenset({"train"})  # type: ignore[misc]

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        for name in ("freeze_observers", "freeze_bn"):
            time = getattr(self.options, name)
            if time is not None and s.calendar.minibatch(time) >= s.calendar.total:
                raise BindError(
                    f"'{self.id}': {name}: {time} is not before the end of training "
                    f"({s.calendar.epochs} epochs), so it would never happen."
                )

    def on_fire(self, s: Any, progress: float) -> None:
        self.lay(s)
        self.observe(s)
        self._watch()

    def on_batch_start(self, s: Any) -> None:
        if not self.laid:
            return
        now = s.now
        if not self.frozen and now >= self._freeze_at(s):
            self._freeze()
        time = self.options.freeze_bn
        if time is not None and now >= s.calendar.minibatch(time):
            for module in s.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def on_batch_end(self, s: Any) -> None:
        if self.laid and not self.frozen:
            self.refresh()

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
