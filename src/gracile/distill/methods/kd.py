"""Knowledge distillation from the uncompressed model: shares of two losses, or one on top."""

from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gracile.core import method as core
from gracile.core.schedule import When
from gracile.errors import BindError
from gracile.recipe.fields import KernelRef, kernel

ALPHA = 0.1  # where neither form is given


class KDOptions(core.Options):
    """Options of `distill: kd`.

    With `alpha` (the default, 0.1) L = (1 - alpha) * soft + alpha * hard; with `scale`
    L = hard + scale * soft, so that the task's gradient keeps its size.

    Attributes:
        alpha: share of the ordinary (hard) loss, in [0, 1].
        scale: > 0, weight of the soft loss beside all of the hard one; instead of alpha.
        temperature: softness of both distributions.
        t2: scale the soft loss by temperature squared.
        loss: the soft loss.
        when: the part of training in which it acts; default all of it.
    """

    alpha: float | None = Field(default=None, ge=0, le=1)
    scale: float | None = Field(default=None, gt=0)
    temperature: float = Field(default=4.0, gt=0)
    t2: bool = True
    loss: KernelRef("kd_loss") = Field(default_factory=lambda: kernel("kd_loss", "soft"))  # type: ignore[valid-type]
    when: When | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.alpha is not None and self.scale is not None:
            raise ValueError(
                "alpha (shares of the two losses) and scale (the soft loss on top of the other) "
                "are two forms; keep one"
            )
        return self


@core.method("distill", "kd", source="Hinton, Vinyals & Dean 2015, arXiv:1503.02531")
class KnowledgeDistillation(core.Method):
    """Train the compressed model towards the outputs of a frozen teacher."""

    Options = KDOptions
    needs = frozenset({"teacher", "train"})

    def on_attach(self, s: Any) -> None:
        if self.options.when is not None and self.options.when.at is not None:
            raise BindError(
                f"'{self.id}': distillation acts over a span of training; "
                f"write when: {{start: {self.options.when.at}}} instead of 'at'."
            )

    def on_loss(self, s: Any) -> dict[str, Tensor]:
        if not s.active(self):
            return {}
        with torch.no_grad():
            target = s.teacher(*s.inputs)
        o = self.options
        soft = o.loss.fn(s.outputs, target, temperature=o.temperature, t2=o.t2)
        if o.scale is not None:
            return {self.id: o.scale * soft}
        alpha = ALPHA if o.alpha is None else o.alpha
        return {"task": alpha * s.task_loss, self.id: (1 - alpha) * soft}
