"""Accuracy control: operators go back to float, the most damaging first, until the drop is met.

The idea is NNCF's `quantize_with_accuracy_control`. Different from it: the drop is against this
network without its grids, operators are ranked once, and how many go is found by halving.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from gracile.core import method as core
from gracile.core.schedule import When
from gracile.errors import BindError, GracileError
from gracile.quantize.engine import Quantizer
from gracile.quantize.methods.ptq import Ptq
from gracile.recover.behind import refuse_before
from gracile.recover.methods.bias import BiasCorrection


class AccuracyOptions(core.Options):
    """Options of `recover: accuracy`.

    Attributes:
        max_drop: points of top-1 (1 point = 1 %) on validation data that quantization may cost.
        rank: what says how much an operator damages: the noise it puts on the network's outputs,
            or the accuracy it costs (noise among equals), of the network with all others quantized.
        images: of the validation data that are looked at for it; 0 is all.
        when: one instant; behind the quantizer.
    """

    max_drop: float = Field(ge=0, le=100)
    rank: Literal["noise", "accuracy"] = "noise"
    images: int = Field(default=300, ge=0)
    when: When = Field(default_factory=lambda: When(at="end"))

    @model_validator(mode="after")
    def _once(self) -> "AccuracyOptions":
        if not self.when.once:
            raise ValueError("accuracy control acts once; write when: {at: end}")
        return self


@dataclass(frozen=True)
class _Operator:
    of: Quantizer
    id: str


@core.method(
    "recover",
    "accuracy",
    source="NNCF, quantize_with_accuracy_control (docs: Quantizing with accuracy control)",
)
class AccuracyControl(core.Method):
    """Compute in float what costs most accuracy, until quantization costs no more than allowed."""

    Options = AccuracyOptions
    needs = frozenset({"validation", "graph"})

    def on_attach(self, s: Any) -> None:
        if not any(isinstance(m, Ptq) for m in s.methods):
            raise BindError(
                f"'{self.id}' reverts what `quantize: ptq` did, and this recipe has none; add "
                "int8: {quantize: ptq, when: {at: end}} before it."
            )
        refuse_before(self, s, [m for m in s.methods if isinstance(m, Ptq)])
        for m in s.methods[: s.methods.index(self)]:
            if isinstance(m, BiasCorrection) and m.options.when == self.options.when:
                raise BindError(
                    f"'{m.id}' would correct biases for operators that '{self.id}' then reverts "
                    f"to float; write '{self.id}' before it."
                )

    def on_fire(self, s: Any, progress: float) -> None:
        quantizers = [m for m in s.methods if isinstance(m, Ptq) and m.laid]
        if not quantizers:
            raise GracileError(
                f"'{self.id}' fires while nothing is quantized; put it behind the quantizer, at "
                "the same time or later."
            )
        wanted = top1(*s.logits(self, of="unquantized")) - self.options.max_drop / 100 - 1e-9
        first = top1(*s.logits(self))
        if first >= wanted:
            return
        ranked = self._ranked(s, quantizers)
        found: dict[int, float] = {}

        def without(k: int) -> float:
            _revert(s, quantizers, ranked[:k], f"reverted by '{self.id}' to keep the accuracy")
            if k not in found:
                found[k] = top1(*s.logits(self))
                s.track("accuracy/reverted", k)
                s.track("accuracy/top1", found[k])
            return found[k]

        k = fewest(lambda k: without(k) >= wanted, len(ranked))
        self._tell(s, ranked[:k], len(ranked), first, without(k))
        for m in quantizers:
            m.tell_reverted(s)
        s.changed = True

    def _ranked(self, s: Any, quantizers: list[Any]) -> list[_Operator]:
        """All operators, that one first without which the network is best."""
        images = self.options.images
        floats, labels = s.logits(self, images, of="unquantized")
        cost: dict[_Operator, tuple[float, float]] = {}
        for operator in [_Operator(m, id) for m in quantizers for id in m.placement.operators]:
            with _without(s, quantizers, operator):
                found, _ = s.logits(self, images)
            noise = float((found - floats).square().sum() / floats.square().sum())
            lost = -top1(found, labels) if self.options.rank == "accuracy" else 0.0
            cost[operator] = (lost, noise)
        return sorted(cost, key=cost.__getitem__)

    def _tell(self, s: Any, reverted: list[_Operator], of: int, first: float, top1: float) -> None:
        names = ", ".join(o.id for o in reverted[:8]) + (", ..." if len(reverted) > 8 else "")
        s.warn(
            "accuracy.reverted",
            f"'{self.id}': {len(reverted)} of {of} operators compute in float ({names}): top-1 on "
            f"the validation data is {top1:.2%} with them and was {first:.2%} without.",
        )
        if not any(o.of.placement and o.of.placement.weights for o in reverted):
            s.warn(
                "accuracy.nothing-left",
                f"'{self.id}': no weight stays quantized: at these bits the drop of "
                f"{self.options.max_drop:g} points cannot be kept. Take more bits, another "
                "observer, `tune: lapq`, or train (`quantize: qat`).",
            )


def fewest(enough: Callable[[int], bool], most: int) -> int:
    """The smallest number from 1 to `most` that is enough, where more always is, too.

    Asks for 1, 2, 4, ... and then halves, so that few numbers are asked for where few are enough.
    Where more is not always enough, a number that is while the one before it is not.

    Args:
        enough: of a number; that `most` is enough is taken for granted.
        most: 1 or more.

    >>> fewest(lambda k: k >= 11, 40)
    11
    """
    low, high = 0, 1
    while high < most and not enough(high):
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@contextmanager
def _without(s: Any, quantizers: list[Any], operator: _Operator) -> Iterator[None]:
    _revert(s, quantizers, [operator], "tried")
    try:
        yield
    finally:
        _revert(s, quantizers, [], "")


def _revert(s: Any, quantizers: list[Any], operators: list[_Operator], why: str) -> None:
    for m in quantizers:
        m.revert(s, {o.id: why for o in operators if o.of is m})


def top1(logits: Tensor, labels: Tensor) -> float:
    """Share of right answers, in [0, 1].

    Args:
        logits: (N, C).
        labels: (N,).
    """
    return float((logits.argmax(1) == labels).double().mean())
