"""Knowledge distillation from the uncompressed model: L = (1 - alpha) * soft + alpha * hard."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gracile.core import method as core
from gracile.core.schedule import When
from gracile.errors import BindError
from gracile.recipe.fields import KernelRef, kernel


class KDOptions(core.Options):
    """Options of `distill: kd`.

    Attributes:
        alpha: share of the ordinary (hard) loss, in [0, 1].
        temperature: softness of both distributions.
        t2: scale the soft loss by temperature squared.
        loss: the soft loss.
        when: the part of training in which it acts; default all of it.
    """

    alpha: float = Field(default=0.1, ge=0, le=1)
    temperature: float = Field(default=4.0, gt=0)
    t2: bool = True
    loss: KernelRef("kd_loss") = Field(default_factory=lambda: kernel("kd_loss", "soft"))  # type: ignore[valid-type]
    when: When | None = None


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
        return {"task": o.alpha * s.task_loss, self.id: (1 - o.alpha) * soft}
