"""A method and kernels that exist only in these tests, so that recipes can name something."""

from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import Field, model_validator

from gracile import registry
from gracile.core import method as core
from gracile.core.kinds import criterion
from gracile.core.schedule import When
from gracile.recipe.fields import KernelRef, Level, Selector, kernel


@pytest.fixture(scope="module")
def toy_methods() -> Iterator[None]:
    """Only the methods and criteria below are registered while a module that asks for it runs."""
    registry.load("ramp")
    kept = {k: v for k, v in registry._entries.items() if k[0] not in ("method", "criterion")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_entries", kept)
        patch.setattr(registry, "_loaded", registry._loaded | {"method", "criterion"})
        _register()
        yield


def _register() -> None:
    @criterion("flat", source="tests")
    def flat(weight: Any) -> Any:
        """All alike."""
        return weight

    @criterion("power", source="tests")
    def power(weight: Any, *, p: int = 2, scale: float = 1.0, absolute: bool = True) -> Any:
        """A power."""
        return (weight * scale) ** p

    @criterion("memory", source="tests")
    class Memory:
        """A kernel that is a class."""

        def __init__(self, *, momentum: float = 0.9):
            self.momentum = momentum

    class FadeOptions(core.Options):
        weights: Selector
        sparsity: Level
        criterion: KernelRef("criterion") = Field(  # type: ignore[valid-type]
            default_factory=lambda: kernel("criterion", "flat")
        )
        scope: Literal["layer", "global"] = "layer"
        multiple_of: int = Field(default=1, ge=1)
        share: float = Field(default=0.5, ge=0, le=1)
        sizes: tuple[int, ...] = (1,)
        limit: int | Literal["auto"] = "auto"
        note: str | None = None
        exact: bool = False
        when: When

    @core.method("prune", "fade", source="tests")
    class Fade(core.Method):
        """Prunes nothing."""

        Options = FadeOptions

    class CutOptions(core.Options):
        when: When

    @core.method("prune", "cut", source="tests")
    class Cut(core.Method):
        """Cuts nothing."""

        Options = CutOptions

    class GridOptions(core.Options):
        bits: Literal[4, 8] = 8
        low: float = 0.0
        high: float = 1.0
        when: When | None = None

        @model_validator(mode="after")
        def _order(self) -> "GridOptions":
            if self.low >= self.high:
                raise ValueError(f"'low' must be below 'high', got {self.low} and {self.high}")
            return self

    @core.method("quantize", "grid", source="tests")
    class Grid(core.Method):
        """Quantizes nothing."""

        Options = GridOptions


VALID = """\
recipe: 1
seed: 7
goal: {speedup: 2.5, max_drop: 1.0}
train:
  epochs: 3
  batch_size: 64
  optimizer: {class: SGD, lr: 0.05, momentum: 0.9, weight_decay: 1e-4}
  lr: {class: OneCycleLR, max_lr: 0.1}
data: {val: "test[5000:]", calibration: 300, mean: [0.5, 0.4, 0.3], std: [1, 1, 1]}
methods:
  filters:
    prune: fade
    weights: ["type:Conv2d", "!conv1.weight"]
    criterion: {name: power, p: 3}
    sparsity: {ramp: cubic, initial: 0.05, final: 0.5}
    when: {start: 0ep, stop: 2ep, every: 50it}
  thin: {prune: cut, when: {at: 2ep}}
  int8: {quantize: grid, when: {at: end}}
"""


@pytest.fixture(scope="module")
def valid() -> str:
    """A recipe that uses most of the grammar."""
    return VALID
