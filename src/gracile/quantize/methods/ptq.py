"""Post-training quantization: ranges from a few calibration batches, no training."""

from typing import Any, Self

from pydantic import Field, model_validator

from gracile.core.method import method
from gracile.core.schedule import When
from gracile.quantize.engine import QuantizeOptions, Quantizer
from gracile.recipe.fields import KernelRef, kernel


class PtqOptions(QuantizeOptions):
    """Options of `quantize: ptq`, added to `QuantizeOptions`.

    Attributes:
        observer: range of an activation over the calibration batches.
        when: one instant; default after training.
    """

    observer: KernelRef("observer") = Field(  # type: ignore[valid-type]
        default_factory=lambda: kernel("observer", "percentile")
    )
    when: When = Field(default_factory=lambda: When(at="end"))

    @model_validator(mode="after")
    def _once(self) -> Self:
        if not self.when.once:
            raise ValueError("ptq acts once; write when: {at: end} or {at: 2ep}")
        return self


@method(
    "quantize",
    "ptq",
    source="Jacob et al. 2018, arXiv:1712.05877; Krishnamoorthi 2018, arXiv:1806.08342, section 3",
)
class Ptq(Quantizer):
    """Put weights and activations on integer grids, with ranges seen on the calibration data."""

    Options = PtqOptions
    needs = frozenset({"calibration", "graph"})

    def __init__(self, id: str, options: Any):
        super().__init__(id, options)
        if not options.activations:
            self.needs = frozenset()  # type: ignore[misc]  # weights are their own data

    def on_fire(self, s: Any, progress: float) -> None:
        self.lay(s)
        self.fix_weights(s)
        self.observe(s)
        self.settle()
