"""Post-training quantization: ranges from a few calibration batches, no training."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from gracile.core.method import method
from gracile.core.schedule import When
from gracile.quantize.engine import ObservedOptions, Quantizer
from gracile.quantize.lapq import tune
from gracile.quantize.ranges import Range, Wanted, find_ranges, load_ranges, of_a_run
from gracile.recipe.fields import KernelRef, kernel


class PtqOptions(ObservedOptions):
    """Options of `quantize: ptq`, added to `ObservedOptions`.

    Attributes:
        observer: range of an activation over the calibration batches.
        tune: lapq searches all scales together for the least loss on the calibration data, which
            must have labels; it starts from the observers' ranges.
        evaluations: of that loss, at most; each is a pass over the calibration data.
        ranges: file of ranges that replaces calibration, relative to the recipe: `ranges.json` of
            a run, or a statistics file of Distiller (YAML), of which `observer` takes its part.
        when: one instant; default after training.
    """

    observer: KernelRef("observer") = Field(  # type: ignore[valid-type]
        default_factory=lambda: kernel("observer", "percentile")
    )
    tune: Literal["none", "lapq"] = "none"
    evaluations: int = Field(default=300, ge=1)
    ranges: str | None = None
    when: When = Field(default_factory=lambda: When(at="end"))

    @model_validator(mode="after")
    def _once(self) -> Self:
        if not self.when.once:
            raise ValueError("ptq acts once; write when: {at: end} or {at: 2ep}")
        if self.ranges is not None and not self.activations:
            raise ValueError("ranges are of activations, and activations is false; leave one out")
        if self.tune != "none" and self.scale != "float":
            raise ValueError("tune moves scales off powers of two; leave out tune or scale")
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
        if options.precision is not None or options.tune != "none":
            return  # judged by calibration data
        if not options.activations:
            self.needs = frozenset()  # type: ignore[misc]  # weights are their own data
        elif options.ranges is not None:
            self.needs = frozenset({"graph"})  # type: ignore[misc]

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        if self.options.tune != "none":
            s.loss_for(self)  # refuses where there is none
        if self.options.ranges is not None:
            path = find_ranges(self.options.ranges, s.recipe.path)
            if not of_a_run(path):  # what a run left is of the network at its end
                self._load(s, path)

    def on_fire(self, s: Any, progress: float) -> None:
        self.lay(s)
        self.fix_weights(s)
        if self.options.ranges is None:
            self.observe(s)
        else:
            path = find_ranges(self.options.ranges, s.recipe.path)
            self.set_ranges(self._load(s, path, cut=True))
            self.quantize()
        self.settle()
        if self.options.tune == "lapq":
            self._tune(s)

    def _tune(self, s: Any) -> None:
        before, after, factors = tune(self, lambda: s.mean_loss(self), self.options.evaluations)
        self.found = {
            id: r._replace(low=r.low * factors[id], high=r.high * factors[id])
            for id, r in self.found.items()
        }
        s.track("quantize/loss_before_tuning", before)
        s.track("quantize/loss_after_tuning", after)

    def _load(self, s: Any, path: Path, *, cut: bool = False) -> dict[str, Range]:
        assert self.placement is not None
        observed = [a for a in self.placement.activations if a.observed]
        wanted = [
            Wanted(a.id, _reader(s, a.id), a.bits, a.nonnegative, a.symmetric) for a in observed
        ]
        found = load_ranges(path, wanted, self.options.observer, cut=cut)
        return {a.id: found[a.id].above_zero() if a.nonnegative else found[a.id] for a in observed}


def _reader(s: Any, id: str) -> str | None:
    """The module that reads the model's input first, where Distiller noted what that is."""
    if s.graph[id].op != "input":
        return None
    while (readers := s.graph.consumers(id)) and readers[0].op == "quantize":
        id = readers[0].id
    return readers[0].module if readers else None
