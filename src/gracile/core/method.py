"""The Method contract: something that acts over time on a live model and ends by emitting Edits.

`Method` is subclassed once per technique; to vary a technique, pass a kernel. A Method never names
another Method and never changes shapes itself.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from gracile import registry
from gracile.core.schedule import When
from gracile.errors import BindError

M = TypeVar("M", bound="type[Method]")


class Options(BaseModel):
    """Base of a method's options: its fields are the YAML keys; unknown keys are errors.

    Attributes:
        on_noise: values of options for a run on random data, where a search would find nothing.
    """

    on_noise: ClassVar[Mapping[str, Any]] = {}
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @property
    def timing(self) -> When | None:
        """When the method fires; None if it acts all the time and has no firings."""
        return getattr(self, "when", None)


class Method:
    """A compression technique in time. Every hook does nothing unless overridden.

    Order of the hooks in one run: `on_attach`, then per epoch `on_epoch_start`, per batch
    `on_batch_start`, `on_loss`, `on_before_step`, `on_batch_end`, then `on_epoch_end`; after
    training the firings `at: end`, then `on_detach`. `s` is the Session.

    Attributes:
        needs: train, calibration, validation, teacher or graph: what a session must have.
        by_value: how much is removed follows from the values of the weights, not from a share that
            the recipe states; `recipe simulate` warns, as it does not train them.
        counts_statistics: it counts the statistics of batch norms anew.
        rewires: it takes operators out or puts others in their place, which cannot be done once
            activations are quantized.
        cuts_masked: it removes what is masked as a whole.
    """

    Options: ClassVar[type[Options]] = Options
    needs: frozenset[str] = frozenset()
    by_value: bool = False
    counts_statistics: bool = False
    rewires: bool = False
    cuts_masked: bool = False
    verb: ClassVar[str] = ""
    kind_name: ClassVar[str] = ""

    def __init__(self, id: str, options: Any):
        self.id = id  # the recipe's name for this entry
        self.options = options

    def on_attach(self, s: Any) -> None:
        """Bind names to tensors, lay overlays; refuse here, before any training."""

    def on_fire(self, s: Any, progress: float) -> None:
        """The timetable says now. Called by the Session, which counts; `progress` in [0, 1].

        For an epoch time this is before `on_epoch_start` of that epoch, for a step time before
        `on_batch_start`, for `at: end` after the last epoch.
        """

    def on_calibrate(self, s: Any) -> None:
        """After each no-grad forward of `s.calibrate(self)`."""

    def on_epoch_start(self, s: Any) -> None:
        """Before the first batch of an epoch."""

    def on_batch_start(self, s: Any) -> None:
        """Before the forward of a batch."""

    def on_loss(self, s: Any) -> dict[str, Tensor]:
        """Extra, named loss terms. The name "task" replaces the task loss itself."""
        return {}

    def on_before_step(self, s: Any) -> None:
        """Gradients are complete and unscaled; the optimizer is about to step."""

    def on_batch_end(self, s: Any) -> None:
        """After the optimizer's step."""

    def on_epoch_end(self, s: Any) -> None:
        """After the epoch's last batch and validation."""

    def on_surgery(self, s: Any, edits: Iterable[Any]) -> None:
        """Shapes have changed: tensors held by address must be sliced or recomputed."""

    def on_detach(self, s: Any) -> Iterable[Any]:
        """The permanent decision, as Edits."""
        return ()

    def claims(self, s: Any) -> Iterable[tuple[str, str]]:
        """After attach: the (aspect, address) pairs this method will decide about.

        Two methods that claim the same pair are a `PlanConflict`, found before training.
        """
        return ()

    def masked(self, s: Any) -> Iterable[str]:
        """After attach: addresses of weights that this method leaves masked in the end."""
        return ()

    def nonzero(self, s: Any) -> Iterable[str]:
        """After attach: addresses whose values cannot be zero, so that none may be masked."""
        return ()

    def rounds_from(self, s: Any) -> tuple[int, ...] | None:
        """After attach: the moment (`s.moment`) from which activations are quantized, if ever."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors and JSON values, nested dicts allowed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; called after `on_attach`."""


def refuse_loss_scaling(m: Method, s: Any, what: str) -> None:
    """For methods with an optimizer of their own: the Session scales losses for the user's only.

    Args:
        m: the method.
        s: the Session.
        what: "its codebooks, which have an optimizer of their own".

    Raises:
        BindError: the recipe trains with autocast: fp16.
    """
    if s.recipe.train.autocast == "fp16":
        raise BindError(
            f"'{m.id}': the loss scaling of autocast: fp16 does not reach {what}. Use autocast: "
            "bf16."
        )


def method(verb: str, name: str, *, source: str) -> Callable[[M], M]:
    """Register a Method as `{<verb>: <name>, ...}` in recipes."""

    def add(cls: M) -> M:
        cls.verb, cls.kind_name = verb, name
        return registry.register("method", f"{verb}/{name}", source=source)(cls)

    return add
