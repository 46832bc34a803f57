"""Methods that judge cuts by the loss on labelled calibration data, before one is made."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from gracile.core import method as core
from gracile.core.plan import Remove
from gracile.core.schedule import When
from gracile.errors import UserError
from gracile.prune.cutting import CutOptions, Cutting


class JudgedOptions(CutOptions):
    """Options of every method that tries cuts out.

    Attributes:
        statistics: of BatchNorm, behind a candidate and after the last cut: counted anew on the
            calibration data, or kept as they are.
        ft_batches: mini-batches of calibration data each candidate is trained on before it is
            judged.
        ft_lr: learning rate of this training, plain SGD.
        when: the firings; default after training.
    """

    on_noise: ClassVar[Mapping[str, Any]] = {"ft_batches": 0}
    statistics: Literal["anew", "kept"] = "anew"
    ft_batches: int = Field(default=0, ge=0)
    ft_lr: float = Field(default=0.01, gt=0)
    when: When = Field(default=When(at="end"))


class Judged(Cutting):
    """Base of the methods that try cuts out."""

    Options: ClassVar[type[core.Options]] = JudgedOptions

    def __init__(self, id: str, options: Any, predict: Any = None):
        super().__init__(id, options, predict)
        if self.judges or self.anew:
            self.needs = self.needs | {"calibration"}

    @property
    def judges(self) -> bool:
        """Whether these options leave anything to be tried out."""
        return True

    @property
    def anew(self) -> bool:
        """Whether BatchNorm's statistics are counted anew."""
        return bool(self.options.statistics == "anew")

    def on_attach(self, s: Any) -> None:
        super().on_attach(s)
        if self.judges:
            s.loss_for(self)

    def tuned(self, s: Any, edits: Sequence[Remove]) -> tuple[float, Mapping[str, Tensor]]:
        """The loss of a candidate after its `ft_batches`, and the parameters it then has."""
        o = self.options
        return s.tune_after(  # type: ignore[no-any-return]
            self, edits, batches=o.ft_batches, lr=o.ft_lr, own_statistics=self.anew
        )

    def no_loss(self) -> UserError:
        """What to raise if no candidate has a loss."""
        return UserError(
            f"'{self.id}': the loss on the calibration data is no finite number, whatever is "
            "cut. Check the weights (has the training diverged?) and the data."
        )
