"""What methods that learn from teachers have in common: who teaches, and when."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from gracile.core import method as core
from gracile.core.schedule import When
from gracile.errors import BindError
from gracile.recipe.teachers import ORIGINAL, Teachers


class TaughtOptions(core.Options):
    """Options of every distillation.

    Attributes:
        teacher: `original`, the network before compression; `{model: SPEC, weights: FILE}`; or a
            name of `Session(..., teachers={name: network})`.
        when: the part of training in which it acts; default all of it.
    """

    teacher: Teachers = Field(default=(ORIGINAL,))
    when: When | None = None


class Taught(core.Method):
    """Base of the methods that learn from frozen networks.

    Attributes:
        teachers: in the recipe's order.
    """

    Options: ClassVar[type[core.Options]] = TaughtOptions
    needs = frozenset({"teacher", "train"})
    teachers: list[Any]

    def on_attach(self, s: Any) -> None:
        when = self.options.when
        if when is not None and when.at is not None:
            raise BindError(
                f"'{self.id}': distillation acts over a span of training; "
                f"write when: {{start: {when.at}}} instead of 'at'."
            )
        self.teachers = [s.teachers.of(ref) for ref in self.options.teacher]


def together(logits: Iterable[Tensor], temperature: float, mean: str) -> Tensor:
    """Logits of an ensemble: those of one teacher that answers as the mean of all.

    Args:
        logits: of each teacher, (N, C).
        temperature: T > 0.
        mean: probabilities: softmax(result / T) is the mean of softmax(logits / T); logits: their
            own mean.

    >>> together([torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 4.0]])], 1.0, "logits")
    tensor([[0., 3.]])
    """
    each = list(logits)
    if len(each) == 1:
        return each[0]
    if mean == "logits":
        return torch.stack(each).mean(0)
    shares = torch.stack([torch.log_softmax(x / temperature, dim=1) for x in each])
    return temperature * (shares.logsumexp(0) - torch.log(shares.new_tensor(len(each))))
