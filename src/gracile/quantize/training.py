"""What methods share that quantize while the network trains: when they begin, and batch norm."""

from typing import Any, Self

from pydantic import model_validator
from torch import nn

from gracile.core.method import Options
from gracile.core.schedule import END, Time, TimeField, When
from gracile.errors import BindError
from gracile.quantize.engine import QuantizeOptions, Quantizer

LARGE_BATCH = 256  # from which on statistics of batches and running ones agree (NNCF's paper)


class Begins(Options):
    """When a method that trains quantized begins, and what stands still later.

    Attributes:
        when: `{start: T}`, the moment fake quantization begins.
        freeze_bn: from when batch norm uses its running statistics and no longer updates them;
            default never.
        decay_until: when the weight decay of the training ends; default never.
    """

    when: When
    freeze_bn: TimeField | None = None
    decay_until: TimeField | None = None

    @model_validator(mode="after")
    def _begins_in_training(self) -> Self:
        if self.when.at == END:
            raise ValueError(
                "this trains, 'at: end' is too late; write when: {start: 2ep}, or quantize: ptq"
            )
        if self.when.stop or self.when.every or not (self.when.once or self.when.start):
            raise ValueError("this begins once and lasts to the end; write when: {start: 2ep}")
        return self

    @property
    def timing(self) -> When:
        """One firing, at the start."""
        return When(at=self.start)

    @property
    def start(self) -> Time:
        """When fake quantization begins."""
        return Time.parse(self.when.start or self.when.at)


class TrainingOptions(Begins, QuantizeOptions):
    """Options of the methods that train quantized: `Begins` and `QuantizeOptions`."""


class TrainedQuantizer(Quantizer):
    """Base of the methods that quantize from a moment of training on.

    The user's weights stay as they are, in float, beside what the forward sees of them.

    Attributes:
        freezes: options with a time from which something stands still.
    """

    needs = frozenset({"train", "calibration", "graph"})
    freezes: tuple[str, ...] = ("freeze_bn", "decay_until")

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        self._judged = False
        if not options.activations and self.asked is None:
            self.needs = frozenset({"train"})  # type: ignore[misc]

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        for name in self.freezes:
            time = getattr(self.options, name)
            if time is not None and s.calendar.minibatch(time) >= s.calendar.total:
                raise BindError(
                    f"'{self.id}': {name}: {time} is not before the end of training "
                    f"({s.calendar.epochs} epochs), so it would never happen."
                )
        if self.options.decay_until is not None and s.optimizer is None:
            raise BindError(
                f"'{self.id}': decay_until changes the optimizer of the training, and the Session "
                "was given none. Pass it: Session(model, recipe, optimizer)."
            )

    def on_fire(self, s: Any, progress: float) -> None:
        self.lay(s)
        self.observe(s)

    def on_batch_start(self, s: Any) -> None:
        time = self.options.freeze_bn
        if self.laid and time is not None and s.now >= s.calendar.minibatch(time):
            for module in s.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        ends = self.options.decay_until
        if ends is not None and s.now >= s.calendar.minibatch(ends):
            for group in s.optimizer.param_groups:
                group["weight_decay"] = 0.0

    def on_batch_end(self, s: Any) -> None:
        if self.laid and not self._judged:
            self._judged = True
            self._judge_batch(s)

    def _judge_batch(self, s: Any) -> None:
        """Warn where batch norm trains on statistics that are not those of evaluation."""
        size = s.inputs[0].shape[0] if s.inputs else LARGE_BATCH
        helped = self.options.freeze_bn is not None or any(m.counts_statistics for m in s.methods)
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in s.model.modules())
        if size < LARGE_BATCH and norms and not helped:
            s.warn(
                "small-batch",
                f"'{self.id}' trains with batches of fewer than {LARGE_BATCH}, whose statistics "
                "differ from batch norm's running ones, for which quantization is less tolerant. "
                "Set freeze_bn for the last epochs, or add {recover: batch_norm, when: {at: end}}.",
            )
